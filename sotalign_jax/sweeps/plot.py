"""A metric of a sweep against one of its fields, drawn."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sotalign_jax.sweeps.layout import Grid, is_percent

__all__ = ["FORMATS", "Line", "draw", "lines_of", "scale_of"]

FORMATS = ("pdf", "png", "svg")
# Okabe and Ito's colours, which people of any colour vision can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv<"  # not as many as colours: a colour that comes again has another one


class Line(NamedTuple):
    """What is drawn of one row of the table.

    Attributes:
        label: the row.
        x: values of the field, ascending.
        mean: of the metric over seeds.
        sd: its standard deviation; None where there is one seed.
        level: the row has one value of the field where others have more: a line across the plot.
        final: of every value, whether no run is missing.
    """

    label: str
    x: list[float]
    mean: list[float]
    sd: list[float | None]
    level: bool
    final: list[bool]


def lines_of(grid: Grid, metric: str) -> list[Line]:
    """Lines of a grid whose columns are the values of the field.

    Args:
        grid: of `sotalign_jax.sweeps.layout.collect`, with one column field.
        metric: one of those that the grid was collected with.

    Returns:
        A line a row that has a finished run; recalls in percent.
    """
    factor = 100 if is_percent(metric) else 1
    names = grid.layout.lines
    lines = []
    for row in grid.rows:
        found = []
        for (x,) in grid.columns:
            cell = grid.cells.get((row, (x,)))
            if cell is not None and (mean := cell.mean(metric)) is not None:
                sd = cell.sd(metric)
                sd = None if sd is None else factor * sd
                found.append((float(x), factor * mean, sd, cell.final))
        if found:
            found.sort(key=lambda one: one[0])
            x, mean, sd, final = (list(part) for part in zip(*found, strict=True))
            level = sum((row, column) in grid.cells for column in grid.columns) == 1
            label = ", ".join(_named(grid, name, v) for name, v in zip(names, row, strict=False))
            label = label or (str(row[0]) if row else "aligner")
            lines.append(Line(label, x, mean, sd, level and len(grid.columns) > 1, final))
    return lines


def _named(grid: Grid, field: str, value: Any) -> str:
    """A word speaks for itself, a number has its field before it."""
    if isinstance(value, str):
        return value
    shown = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{grid.layout.heading(field)} {shown}"


def scale_of(values: Sequence[float]) -> str:
    """``"log"``, ``"symlog"`` (with a zero among them) or ``"linear"``: how values are spaced."""
    distinct = sorted(set(values))
    positive = [value for value in distinct if value > 0]
    if len(positive) < 2 or distinct[0] < 0:
        return "linear"
    ratios = [after / before for before, after in itertools.pairwise(positive)]
    gaps = [after - before for before, after in itertools.pairwise(positive)]
    # Even steps are linear, even factors are logarithmic; of two values, a factor of ten is.
    if len(positive) == 2:
        logarithmic = ratios[0] >= 10
    else:
        logarithmic = max(gaps) / min(gaps) > max(ratios) / min(ratios)
    if not logarithmic:
        return "linear"
    return "log" if len(positive) == len(distinct) else "symlog"


def draw(grid: Grid, metric: str, field: str, directory: Path) -> list[Path]:
    """Draws the lines of a grid and writes them in every format.

    Args:
        grid: as for `lines_of`.
        metric: what is drawn.
        field: along the horizontal axis.
        directory: gets ``plot.pdf``, ``plot.png`` and ``plot.svg``.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is missing; the message says which extra has it.
        ValueError: no run is finished yet.
        OSError: a file cannot be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plot: install the extra, sotalign-jax[plots]") from error
    lines = lines_of(grid, metric)
    if not lines:
        raise ValueError("plot: no point is finished yet, nothing to draw")
    # Text stays text in the files, and the same runs give the same bytes.
    options: dict[Any, Any] = {"svg.fonttype": "none", "pdf.fonttype": 42, "svg.hashsalt": "sweep"}
    with matplotlib.rc_context(options):
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.add_subplot()
        scale = scale_of([x for line in lines if not line.level for x in line.x])
        if scale == "symlog":
            smallest = min(x for line in lines for x in line.x if x > 0)
            axes.set_xscale("symlog", linthresh=smallest, linscale=0.5)
        else:
            axes.set_xscale(scale)
        styles = zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), lines, strict=False)
        for colour, marker, line in styles:
            _draw_line(axes, line, colour, marker)
        axes.set_xlabel(grid.layout.heading(field))
        unit = " (%)" if is_percent(metric) else ""
        axes.set_ylabel(grid.layout.heading(metric) + unit)
        if not all(all(line.final) for line in lines):
            axes.set_title("hollow or dotted: runs are missing", fontsize="small", loc="right")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False)
        return [_write(figure, directory / f"plot.{kind}", kind) for kind in FORMATS]


def _draw_line(axes: Any, line: Line, colour: str, marker: str) -> None:
    if line.level:
        style = "--" if line.final[0] else ":"
        axes.axhline(line.mean[0], color=colour, linestyle=style, label=_literal(line.label))
        if line.sd[0] is not None:
            low, high = line.mean[0] - line.sd[0], line.mean[0] + line.sd[0]
            axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
        return
    final = [i for i, one in enumerate(line.final) if one]
    filled = {"marker": marker, "markersize": 4, "markevery": final} if final else {}
    axes.plot(line.x, line.mean, color=colour, label=_literal(line.label), **filled)
    if rest := [i for i, one in enumerate(line.final) if not one]:
        x, mean = [line.x[i] for i in rest], [line.mean[i] for i in rest]
        hollow = {"marker": marker, "markersize": 4, "markerfacecolor": "white"}
        axes.plot(x, mean, color=colour, linestyle="none", **hollow)
    spread = [0.0 if sd is None else sd for sd in line.sd]
    low = [mean - sd for mean, sd in zip(line.mean, spread, strict=True)]
    high = [mean + sd for mean, sd in zip(line.mean, spread, strict=True)]
    axes.fill_between(line.x, low, high, color=colour, alpha=0.15, linewidth=0)


def _literal(label: str) -> str:
    """A label as it reads: two dollars would be a formula, and "_" first hides from the legend."""
    label = label.replace("$", r"\$")
    return f"\u200b{label}" if label.startswith("_") else label


def _write(figure: Any, path: Path, kind: str) -> Path:
    """A picture under a temporary name, then under its own."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    stamp = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": {}}[kind]
    try:
        figure.savefig(partial, format=kind, dpi=200, metadata=stamp)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
