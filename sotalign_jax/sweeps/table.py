"""The table of a sweep as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path

import rich.table
from rich.markup import escape

from sotalign_jax.files import replace_text
from sotalign_jax.sweeps.hyper import LABEL
from sotalign_jax.sweeps.layout import (
    NEITHER_IS_BETTER,
    Cell,
    Grid,
    Key,
    Layout,
    collect,
    is_percent,
    lower_is_better,
    wrapped,
)
from sotalign_jax.sweeps.points import Sweep, SweepDir

__all__ = ["notes", "to_console", "to_csv", "to_latex", "to_markdown", "write_tables"]

_PAPER = "paper"


@dataclasses.dataclass(frozen=True)
class _Text:
    """One cell: a number with its spread, or what stands for it."""

    mean: str = ""
    sd: str = ""
    note: str = ""
    bold: bool = False


@dataclasses.dataclass(frozen=True)
class _Column:
    key: Key
    metric: str
    paper: bool = False


def write_tables(sweep: Sweep, home: SweepDir, *, paper: bool = False) -> tuple[Grid, list[Path]]:
    """Writes ``table.md``, ``table.tex`` and ``table.csv`` of a sweep as far as it is.

    Args:
        sweep: of `sotalign_jax.sweeps.load_sweep`.
        home: its directory.
        paper: show the published figures.

    Returns:
        What the table shows, and the files.

    Raises:
        ConfigError: the directory holds another sweep, or runs without a metric of the table.
        OSError: a file cannot be written.
    """
    home.check(sweep)
    grid = collect(sweep.layout, sweep.points, home.results, home.failed)
    texts = {
        "md": to_markdown(grid, paper=paper),
        "tex": to_latex(grid, paper=paper),
        "csv": to_csv(grid, paper=paper),
    }
    paths = {kind: home.path / f"table.{kind}" for kind in texts}
    for kind, text in texts.items():
        replace_text(paths[kind], text)
    return grid, list(paths.values())


def to_markdown(grid: Grid, *, paper: bool = False) -> str:
    """A Markdown table, its caption above and its notes below.

    Args:
        grid: of `sotalign_jax.sweeps.layout.collect`.
        paper: show the published figures, each beside ours.

    Returns:
        The text, which ends in a line break.
    """
    rows, columns = _lines(grid, paper)
    heads = [_escaped(grid.layout.heading(name)) for name in grid.layout.rows]
    lines = [f"**{_escaped(grid.layout.caption)}**", ""] if grid.layout.caption else []
    lines.append("| " + " | ".join([*heads, *(_escaped(_head(grid, c)) for c in columns)]) + " |")
    lines.append("| " + " | ".join(["---"] * len(heads) + ["---:"] * len(columns)) + " |")
    for row in rows:
        cells = [_text(grid, row, column) for column in columns]
        shown = [_escaped(_value(part)) for part in row]
        lines.append("| " + " | ".join(shown + [_plain(cell, "**") for cell in cells]) + " |")
    lines += ["", *(f"{_escaped(note)}  " for note in notes(grid, paper=paper))]
    return "\n".join(lines).rstrip() + "\n"


def to_latex(grid: Grid, *, paper: bool = False) -> str:
    """A ``tabular`` in the style of booktabs, inside a ``table``; arguments as `to_markdown`."""
    rows, columns = _lines(grid, paper)
    layout = grid.layout
    keys = list(dict.fromkeys(column.key for column in columns))
    leading = len(layout.rows)
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        *([f"\\caption{{{_tex(layout.caption)}}}"] if layout.caption else []),
        f"\\begin{{tabular}}{{{'l' * leading}{'r' * len(columns)}}}",
        "\\toprule",
    ]
    if layout.columns:
        top, rules, start = [""] * leading, [], leading + 1
        for key in keys:
            width = sum(column.key == key for column in columns)
            head = _tex(_key_head(layout, key))
            top.append(f"\\multicolumn{{{width}}}{{c}}{{{head}}}")
            rules.append(f"\\cmidrule(lr){{{start}-{start + width - 1}}}")
            start += width
        lines += [_tex_row(top), "".join(rules)]
    heads = [_tex(layout.heading(name)) for name in layout.rows]
    heads += [_tex(_PAPER if c.paper else layout.heading(c.metric)) for c in columns]
    lines += [_tex_row(heads), "\\midrule"]
    for before, row in zip([None, *rows], rows, strict=False):
        if before is not None and before[:-1] != row[:-1]:
            lines.append("\\addlinespace")
        cells = [_tex(_value(part)) for part in row]
        cells += [_tex_cell(_text(grid, row, column)) for column in columns]
        lines.append(_tex_row(cells))
    lines += ["\\bottomrule", "\\end{tabular}"]
    if found := notes(grid, paper=paper):
        lines += ["", "\\smallskip", "\\parbox{\\linewidth}{\\footnotesize"]
        lines += [" \\\\\n".join(_tex(note) for note in found) + "}"]
    return "\n".join([*lines, "\\end{table}"]) + "\n"


def to_csv(grid: Grid, *, paper: bool = False) -> str:
    """A line a cell and metric: full precision, fractions as fractions, the paper's likewise.

    Arguments as `to_markdown`.

    Columns: those of rows and columns, ``metric``, ``mean``, ``sd`` (empty below two), ``n`` (what
    the mean is over), ``wanted`` (what it will be over), ``runs``, ``finished`` and ``failed`` of
    the cell, ``chosen`` (JSON) and, where asked for, ``paper``.
    """
    layout = grid.layout
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    numbers = ["mean", "sd", "n", "wanted", "runs", "finished", "failed", "chosen"]
    numbers += [_PAPER] if paper else []
    writer.writerow([*layout.rows, *layout.columns, "metric", *numbers])
    rows, columns = _lines(grid, paper)
    for row in rows:
        for column in columns:
            if column.paper:
                continue
            cell = grid.cells.get((row, column.key))
            published = layout.published(row, column.key, column.metric)
            if cell is None and published is None:
                continue
            line = [*row, *column.key, column.metric]
            if cell is None:
                line += [""] * 8
            else:
                mean, sd = cell.mean(column.metric), cell.sd(column.metric)
                line += ["" if mean is None else repr(mean), "" if sd is None else repr(sd)]
                line += [len(cell.values.get(column.metric, ())), cell.wanted]
                line += [cell.runs, cell.finished, cell.failed]
                line.append(json.dumps(cell.chosen) if cell.chosen else "")
            if published is not None and is_percent(column.metric):
                published = round(published / 100, 12)  # 30.3 / 100 is not 0.303
            shown = ["" if published is None else repr(published)] if paper else []
            writer.writerow([*line, *shown])
    return out.getvalue()


def to_console(grid: Grid, *, paper: bool = False) -> rich.table.Table:
    """The same for a terminal; arguments as `to_markdown`."""
    rows, columns = _lines(grid, paper)
    table = rich.table.Table(title=escape(grid.layout.caption) or None, title_justify="left")
    for name in grid.layout.rows:
        table.add_column(escape(grid.layout.heading(name)), no_wrap=True)
    for column in columns:
        table.add_column(escape(_head(grid, column).replace(": ", "\n")), justify="right")
    for row in rows:
        cells = [_plain(_text(grid, row, column), "*") for column in columns]
        table.add_row(*map(escape, [*(_value(part) for part in row), *cells]))
    return table


def notes(grid: Grid, *, paper: bool = False) -> list[str]:
    """What stands below a table: over what it is the mean, what was chosen, what is missing.

    Args:
        grid: of `sotalign_jax.sweeps.layout.collect`.
        paper: the published figures are shown.

    Returns:
        Sentences.
    """
    layout, found = grid.layout, []
    shown = [cell for cell in grid.cells.values() if cell.wanted]
    counts = sorted({cell.wanted for cell in shown})
    text = "In percent" if all(map(is_percent, layout.metrics)) else ""
    if counts and counts[-1] > 1 and layout.over:
        many = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        text += f"{': mean' if text else 'Mean'} ± sd over {many} {_plural(layout.over)}"
    if text:
        found.append(f"{text}.")
    if choices := list(_choices(grid)):
        found.append(
            f"Chosen on validation ({layout.heading(layout.select).removeprefix('val ')}): "
            + "; ".join(choices)
            + "."
        )
    missing = sum(cell.runs - cell.finished for cell in shown)
    if missing:
        failed = sum(cell.failed for cell in shown)
        found.append(
            f"Not final: {missing} of {sum(cell.runs for cell in shown)} runs of these cells are "
            f"not finished{f', {failed} of them failed' if failed else ''}."
        )
    if paper and layout.paper and layout.arg:
        found.append(
            f"The paper's figures are of its own data, those of the file without {layout.arg!r}."
        )
    return found


def _choices(grid: Grid) -> Iterator[str]:
    for row in grid.rows:
        for column in grid.columns:
            cell = grid.cells.get((row, column))
            if cell is not None and cell.chosen:
                values = ", ".join(
                    f"{grid.layout.heading(name)} {_value(value)}"
                    for name, value in cell.chosen.items()
                )
                yield f"{', '.join(map(_value, (*row, *column)))}: {values}"


def _lines(grid: Grid, paper: bool) -> tuple[list[Key], list[_Column]]:
    """Rows and columns to show; with the paper's, those that only the paper has come last."""
    layout = grid.layout
    rows, keys = list(grid.rows), list(grid.columns)
    if paper:
        rows += [key for one in layout.paper if (key := wrapped(one)) not in rows]
        if layout.columns:
            more = [wrapped(one) for values in layout.paper.values() for one in values]
            keys += [key for key in dict.fromkeys(more) if key not in keys]
    columns = []
    for key in keys:
        for metric in layout.metrics:
            columns.append(_Column(key, metric))
            if paper and any(layout.published(row, key, metric) is not None for row in rows):
                columns.append(_Column(key, metric, paper=True))
    return rows, columns


def _text(grid: Grid, row: Key, column: _Column) -> _Text:
    layout, metric = grid.layout, column.metric
    if column.paper:
        published = layout.published(row, column.key, metric)
        if published is None:
            return _Text()
        return _Text(f"{published:.{layout.decimals}f}" if is_percent(metric) else f"{published:g}")
    cell = grid.cells.get((row, column.key))
    if cell is None:
        return _Text()
    mean, sd = cell.mean(metric), cell.sd(metric)
    note = "" if cell.final else f" ({_missing(layout, cell)})"
    if mean is None:
        return _Text("–", note=note)
    shown = layout.show(metric, mean)
    best = _best(grid, row, column)
    return _Text(
        shown, "" if sd is None else layout.show(metric, sd), note, cell.final and shown in best
    )


def _best(grid: Grid, row: Key, column: _Column) -> set[str]:
    """How the best mean beside a row reads, in its group of rows and its column.

    Nothing where nothing final is compared, or the row is not one that is compared.
    """
    metric, references = column.metric, grid.layout.reference_rows
    if metric in NEITHER_IS_BETTER or row[-1] in references:
        return set()
    group = [other for other in grid.rows if other[:-1] == row[:-1] and other[-1] not in references]
    cells = [grid.cells.get((other, column.key)) for other in group]
    means = [m for c in cells if c is not None and c.final and (m := c.mean(metric)) is not None]
    if len(means) < 2:
        return set()
    best = min(means) if lower_is_better(metric) else max(means)
    return {grid.layout.show(metric, best)}


def _missing(layout: Layout, cell: Cell) -> str:
    text = f"{cell.finished} of {cell.runs} "
    text += _plural(layout.over) if layout.over and cell.runs == cell.wanted else "runs"
    return text + (f", {cell.failed} failed" if cell.failed else "")


def _head(grid: Grid, column: _Column) -> str:
    layout = grid.layout
    metric = layout.heading(column.metric) + (f" ({_PAPER})" if column.paper else "")
    return f"{_key_head(layout, column.key)}: {metric}" if column.key else metric


def _key_head(layout: Layout, key: Key) -> str:
    """Labels speak for themselves; a value of a field has its name before it."""
    return ", ".join(
        _value(value) if name.startswith(LABEL) else f"{layout.heading(name)} {_value(value)}"
        for name, value in zip(layout.columns, key, strict=True)
    )


def _plain(cell: _Text, bold: str) -> str:
    mark = bold if cell.bold else ""
    return f"{mark}{cell.mean}{mark}" + (f"±{cell.sd}" if cell.sd else "") + cell.note


def _tex_row(cells: list[str]) -> str:
    line = " & ".join(cells) + r" \\"
    # The end of the row before, or a rule, would take these for an argument of its own.
    return "{}" + line if line.startswith(("[", "*")) else line


def _tex_cell(cell: _Text) -> str:
    mean = "--" if cell.mean == "–" else _tex(cell.mean)
    mean = f"\\textbf{{{mean}}}" if cell.bold else mean
    return mean + (f"$\\pm${_tex(cell.sd)}" if cell.sd else "") + _tex(cell.note)


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "–": "--",
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def _escaped(text: str) -> str:
    """Text inside a Markdown table."""
    for letter in "\\|*_`<>":
        text = text.replace(letter, f"\\{letter}")
    return text


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if type(value) is int and value >= 10_000 else str(value)


def _plural(field: str) -> str:
    name = field.split(".")[-1].replace("_", " ")
    return f"{name}s"
