"""How the points of a sweep become the cells of a table: means over seeds, fields chosen."""

from __future__ import annotations

import dataclasses
import difflib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sotalign_jax.config import ConfigError, default_config, flatten
from sotalign_jax.sweeps.hyper import LABEL, Fields
from sotalign_jax.training.workdir import NO_MATTER

if TYPE_CHECKING:
    from sotalign_jax.sweeps.points import Point

__all__ = [
    "NEITHER_IS_BETTER",
    "Cell",
    "Grid",
    "Layout",
    "collect",
    "is_percent",
    "lower_is_better",
    "wrapped",
]

_TEACHER = "teacher_"
_SPLITS = ("test/", "val/", f"{_TEACHER}test/", f"{_TEACHER}val/")
NEITHER_IS_BETTER = ("selected_step", "pairs")
_OF_THE_RUN = ("seconds", *NEITHER_IS_BETTER)
# What the teacher of a run is a function of.
_OF_THE_TEACHER = ("data.", "teacher.", "seed")
_LOWER_IS_BETTER = ("foscttm", "median_rank", "seconds")

# Of every part of a run's results, see `sotalign_jax.evaluation.retrieval`.
_METRICS = (
    *(f"{side}recall@{k}" for side in ("mean_", "t2i/", "i2t/") for k in (1, 5, 10)),
    *("t2i/median_rank", "i2t/median_rank", "foscttm", "n_images", "n_texts"),
)

Key = tuple[Any, ...]
Results = Callable[[str], Mapping[str, Any] | None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the table and the plot of a sweep read; what ``get_table()`` returns, as an object.

    Attributes:
        rows: fields of the configuration, or labels as ``"label.NAME"``, one row a value;
            numbers by size, other values as the file has them.
        columns: likewise; none: one column a metric.
        metrics: what is shown, as ``"test/t2i/recall@1"``: a part of ``results.json`` and the name
            in it; or ``"seconds"``, ``"selected_step"``, ``"pairs"``.
        over: the field that is averaged over; empty: none.
        select: metric of the validation pairs by which all other fields that vary are chosen, in
            every cell, in the mean over ``over``; empty: nothing else may vary.
        teacher_rows: name of a row to value of (the last field of) ``rows``: a row for the teacher
            alone of these runs, at the top of its group.
        reference_rows: values of (the last field of) ``rows``, or names of teacher rows, that are
            shown to compare with and never in bold, as an upper bound.
        paper: published figures, in the units of the table, by value of ``rows`` (a tuple where
            there are several), then, where there are columns, by value of ``columns``, then by
            metric. ``--paper`` shows them; rows and columns that only the paper has are added.
        names: headings of fields and metrics other than the usual ones.
        caption: a sentence.
        decimals: of recalls and accuracies in percent.
        plot: ``{"x": FIELD, "metric": METRIC}`` of the plot, which has a line for every value of
            the rows (but for ``x`` itself); no metric: the last of ``metrics``.
        arg: the argument that the file was loaded with; not a key of the dict.
    """

    rows: tuple[str, ...]
    metrics: tuple[str, ...]
    columns: tuple[str, ...] = ()
    over: str = "seed"
    select: str = ""
    teacher_rows: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    reference_rows: tuple[Any, ...] = ()
    paper: Mapping[Any, Any] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    caption: str = ""
    decimals: int = 1
    plot: Mapping[str, str] = dataclasses.field(default_factory=dict)
    arg: str = ""

    @classmethod
    def of(cls, spec: Any, arg: str | None = None) -> Layout:
        """From what ``get_table()`` returned, of a file loaded with an argument.

        Raises:
            ConfigError: an unknown key, a missing one, or a value of the wrong kind.
        """
        if not isinstance(spec, Mapping):
            raise ConfigError(f"get_table: must return a dict, got {spec!r}")
        known = {field.name: field for field in dataclasses.fields(cls) if field.name != "arg"}
        for name in spec:
            if name not in known:
                raise ConfigError(f"get_table: {name!r}: no such key{_near(str(name), known)}")
        given = dict(spec)
        for name in ("rows", "metrics", "columns"):
            value = given.get(name, ())
            value = (value,) if isinstance(value, str) else value
            if not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
                raise ConfigError(f"get_table: {name}: must be a name or several, got {value!r}")
            given[name] = tuple(value)
            if not value and name != "columns":
                raise ConfigError(f"get_table: {name}: names nothing to show")
        references = given.get("reference_rows", ())
        if not isinstance(references, list | tuple):
            references = (references,)
        given["reference_rows"] = tuple(references)
        for name in ("over", "select", "caption"):
            given[name] = given.get(name, known[name].default) or ""
            if not isinstance(given[name], str):
                raise ConfigError(f"get_table: {name}: must be text, got {given[name]!r}")
        for name in ("teacher_rows", "paper", "names", "plot"):
            if not isinstance(given.get(name, {}), Mapping):
                raise ConfigError(f"get_table: {name}: must be a dict, got {given[name]!r}")
        decimals = given.get("decimals", 1)
        if isinstance(decimals, bool) or not isinstance(decimals, int) or decimals < 0:
            raise ConfigError(
                f"get_table: decimals: must be a whole number, not negative, got {decimals!r}"
            )
        for text in given.get("names", {}).values():
            if not isinstance(text, str):
                raise ConfigError(f"get_table: names: a heading must be text, got {text!r}")
        layout = cls(**given, arg=arg or "")
        layout._check_names()
        layout._check_paper()
        layout._check_texts()
        return layout

    def _check_names(self) -> None:
        known = flatten(default_config())
        x = [self.plot["x"]] if "x" in self.plot else []
        for name in (*self.rows, *self.columns, *filter(None, [self.over]), *x):
            if not name.startswith(LABEL) and name not in known:
                raise ConfigError(f"get_table: {name}: no such field{_near(name, known)}")
        shown = [self.plot["metric"]] if "metric" in self.plot else []
        for name in (*self.metrics, *shown, *filter(None, [self.select])):
            if not name.startswith(_SPLITS) and name not in _OF_THE_RUN:
                raise ConfigError(
                    f"get_table: {name}: must begin with one of {', '.join(_SPLITS)} or be one of "
                    f"{', '.join(_OF_THE_RUN)}"
                )
            metric = name.partition("/")[2]
            if metric and metric not in _METRICS:
                near = _near(metric, _METRICS) or f"; there are {', '.join(_METRICS)}"
                raise ConfigError(f"get_table: {name}: no such metric{near}")
        if self.select and not self.select.startswith("val/"):
            raise ConfigError(
                f"get_table: select: must be a metric of the validation pairs, as "
                f"'val/mean_recall@1', got {self.select!r}"
            )
        if self.plot and ("x" not in self.plot or set(self.plot) - {"x", "metric"}):
            raise ConfigError(
                f"get_table: plot: must be {{'x': FIELD}} or {{'x': FIELD, 'metric': METRIC}}, got "
                f"{dict(self.plot)!r}"
            )

    def _check_paper(self) -> None:
        for row, cells in self.paper.items():
            _check_key(row, self.rows, "rows", f"paper: {row!r}")
            if not isinstance(cells, Mapping):
                raise ConfigError(f"get_table: paper: {row!r}: must be a dict, got {cells!r}")
            for column, values in cells.items() if self.columns else [(None, cells)]:
                where = f"paper: {row!r}" + (f": {column!r}" if self.columns else "")
                if self.columns:
                    _check_key(column, self.columns, "columns", where)
                if not isinstance(values, Mapping):
                    by = f"by value of {', '.join(self.columns)}, then by metric"
                    raise ConfigError(
                        f"get_table: {where}: must be a dict of metrics (figures stand {by}), got "
                        f"{values!r}"
                    )
                for metric, value in values.items():
                    if metric not in self.metrics:
                        raise ConfigError(
                            f"get_table: {where}: {metric!r} is none of metrics"
                            f"{_near(str(metric), self.metrics)}"
                        )
                    if isinstance(value, bool) or not isinstance(value, int | float):
                        raise ConfigError(
                            f"get_table: {where}: {metric}: must be a number, got {value!r}"
                        )

    def _check_texts(self) -> None:
        rows = [part for row in self.paper for part in wrapped(row)]
        texts = [("caption", self.caption)]
        texts += [("names", text) for text in self.names.values()]
        texts += [("teacher_rows", text) for text in self.teacher_rows]
        texts += [("paper", text) for text in rows]
        for name, text in texts:
            if isinstance(text, str) and len(text.splitlines()) > 1:
                raise ConfigError(f"get_table: {name}: must be one line, got {text!r}")

    def check(self, points: Sequence[Point]) -> None:
        """Raises ConfigError where the points cannot fill the table or the plot."""
        plotted = [self.plot["metric"]] if "metric" in self.plot else []
        for name in filter(None, (*self.metrics, *plotted, self.select)):
            part = name.partition("/")[0].removeprefix(_TEACHER)
            without = next((point for point in points if not _has(point, part)), None)
            if without is not None:
                fields = f"config.data.files.{part}_image and {part}_text"
                raise ConfigError(
                    f"get_table: {name}: point {without.number} has no {part} pairs; give {fields}"
                    + f", or config.data.files.n_{part}"
                )
        last = {point.value(self.rows[-1]) for point in points}
        for row, source in self.teacher_rows.items():
            if source not in last:
                raise ConfigError(
                    f"get_table: teacher_rows: {row!r}: {source!r} is no value of {self.rows[-1]}"
                )
            if row in last:
                raise ConfigError(f"get_table: teacher_rows: {row!r}: is a row already")
        for row in self.reference_rows:
            if row not in last and row not in self.teacher_rows:
                raise ConfigError(
                    f"get_table: reference_rows: {row!r} is no value of {self.rows[-1]}"
                )
        self._check_cells(points, self.rows, self.columns, "the table")
        if self.plot:
            x = self.plot["x"]
            for point in points:
                value = point.value(x)
                if isinstance(value, bool) or not isinstance(value, int | float):
                    raise ConfigError(
                        f"get_table: plot: {x} must be a number, and is {value!r} in point "
                        f"{point.number}"
                    )
            self._check_cells(points, self.lines, (x,), "the plot")

    @property
    def lines(self) -> tuple[str, ...]:
        """Fields of which each value is a line of the plot: those of the rows, without its x."""
        return tuple(name for name in self.rows if name != self.plot.get("x"))

    def _check_cells(
        self, points: Sequence[Point], rows: tuple[str, ...], columns: tuple[str, ...], where: str
    ) -> None:
        for point in points:
            for name in (*rows, *columns, *filter(None, [self.over])):
                if point.value(name) is None:
                    raise ConfigError(f"get_table: {name}: point {point.number} has no such label")
        for (row, column), members in _cells(rows, columns, points).items():
            varying = _varying(members, self.over)
            if self.select and "seed" in varying:
                raise ConfigError(
                    f"get_table: {', '.join(map(str, (*row, *column)))}: the points of this cell "
                    f"of {where} differ in seed, and select would show the best one; give "
                    "'over': 'seed', or name it in rows or columns"
                )
            if varying and not self.select:
                raise ConfigError(
                    f"get_table: {', '.join(map(str, (*row, *column)))}: the points of this cell "
                    f"of {where} differ in {', '.join(varying)}; name it in rows, columns or over, "
                    "or give select"
                )

    def heading(self, name: str) -> str:
        """A field, label or metric for people."""
        if name in self.names:
            return self.names[name]
        if name.startswith(_SPLITS):
            split, metric = name.split("/", 1)
            for old, new in (("t2i/", "T2I "), ("i2t/", "I2T "), ("mean_recall", "mean recall")):
                metric = metric.replace(old, new)
            text = metric.replace("recall@", "R@").replace("_", " ")
            return text if split == "test" else f"{split.replace('_', ' ')} {text}"
        return name.split(".")[-1].replace("_", " ")

    def show(self, metric: str, value: float) -> str:
        """A number of a metric: recalls and accuracies in percent."""
        if is_percent(metric):
            return f"{100 * value:.{self.decimals}f}"
        return f"{value:.4g}"

    def published(self, row: Key, column: Key, metric: str) -> float | None:
        """The paper's figure, in the units of the table."""
        found: Any = self.paper.get(_unwrapped(row))
        if found is not None and self.columns:
            found = found.get(_unwrapped(column))
        return None if found is None else found.get(metric)


@dataclasses.dataclass(frozen=True)
class Cell:
    """What a cell of a table shows.

    Attributes:
        values: of every metric, a number for each value of ``over`` whose run is finished.
        wanted: how many there will be.
        chosen: fields that were chosen on validation.
        runs: runs that the cell depends on, the ones not chosen among them.
        finished: how many of them are done.
        failed: how many of them failed.
    """

    values: Mapping[str, tuple[float, ...]]
    wanted: int
    chosen: Fields
    runs: int
    finished: int
    failed: int

    @property
    def final(self) -> bool:
        """Whether no run is missing."""
        return self.runs == self.finished > 0

    def mean(self, metric: str) -> float | None:
        """Mean over ``over``; None where nothing is finished."""
        values = self.values.get(metric)
        return statistics.fmean(values) if values else None

    def sd(self, metric: str) -> float | None:
        """Standard deviation over ``over``, of n - 1; None of fewer than two."""
        values = self.values.get(metric, ())
        return statistics.stdev(values) if len(values) > 1 else None


@dataclasses.dataclass(frozen=True)
class Grid:
    """Rows by columns of cells: numbers in order of size, other values in that of the file."""

    layout: Layout
    rows: tuple[Key, ...]
    columns: tuple[Key, ...]
    cells: Mapping[tuple[Key, Key], Cell]


def collect(
    layout: Layout,
    points: Sequence[Point],
    results: Results,
    failed: Callable[[str], bool],
    *,
    rows: tuple[str, ...] | None = None,
    columns: tuple[str, ...] | None = None,
    metrics: tuple[str, ...] | None = None,
) -> Grid:
    """The cells of a sweep as far as its runs are.

    Args:
        layout: how the table reads.
        points: of the sweep.
        results: given the key of a run, what its ``results.json`` holds; None of an unfinished one.
        failed: whether the run of a key failed.
        rows, columns, metrics: others than those of the layout, for a plot.

    Returns:
        The grid; cells without points are left out.

    Raises:
        ConfigError: finished runs lack a metric.
    """
    names = layout.rows if rows is None else rows
    columns = layout.columns if columns is None else columns
    metrics = layout.metrics if metrics is None else metrics
    cells: dict[tuple[Key, Key], Cell] = {}
    grouped = _cells(names, columns, points)

    def fill(members: Sequence[Point], prefix: str) -> Cell:
        return _cell(layout, metrics, members, results, failed, prefix)

    for (row, column), members in grouped.items():
        cells[row, column] = fill(members, "")
        for name, source in layout.teacher_rows.items():
            if theirs := [p for p in members if p.value(layout.rows[-1]) == source]:
                cells[(*row[:-1], name), column] = fill(theirs, _TEACHER)
    made = {row for row, _ in cells}
    order: list[Key] = []
    for row in _ordered(row for row, _ in grouped):
        if not order or order[-1][:-1] != row[:-1]:
            heads = [(*row[:-1], name) for name in layout.teacher_rows]
            order += [head for head in heads if head in made]
        order.append(row)
    return Grid(layout, tuple(order), tuple(_ordered(column for _, column in grouped)), cells)


def is_percent(metric: str) -> bool:
    """Whether a metric is a fraction that is shown in percent."""
    return "recall@" in metric or "accuracy" in metric


def lower_is_better(metric: str) -> bool:
    """Whether the best value of a metric is the smallest one."""
    return metric.endswith(_LOWER_IS_BETTER)


def _cells(
    rows: tuple[str, ...], columns: tuple[str, ...], points: Iterable[Point]
) -> dict[tuple[Key, Key], list[Point]]:
    """Points by the cell they belong to, every run once."""
    cells: dict[tuple[Key, Key], dict[str, Point]] = {}
    for point in points:
        row, column = (tuple(point.value(name) for name in names) for names in (rows, columns))
        cells.setdefault((row, column), {}).setdefault(point.key, point)
    return {place: list(members.values()) for place, members in cells.items()}


def _ordered(keys: Iterable[Key]) -> list[Key]:
    """Distinct keys, sorted part by part: numbers by size, all else by first appearance."""
    distinct = list(dict.fromkeys(keys))
    parts = [list(dict.fromkeys(part)) for part in zip(*distinct, strict=True)]
    for part in parts:
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in part):
            part.sort()
    return sorted(distinct, key=lambda k: [p.index(v) for p, v in zip(parts, k, strict=True)])


def _varying(points: Sequence[Point], over: str, among: tuple[str, ...] = ("",)) -> list[str]:
    """Fields in which the configurations of some points differ, but for ``over``."""
    return [
        name
        for name in flatten(points[0].config)
        if name != over
        and name.startswith(among)
        and not f"{name}.".startswith(NO_MATTER)
        and len({repr(point.value(name)) for point in points}) > 1
    ]


def _cell(
    layout: Layout,
    metrics: tuple[str, ...],
    members: Sequence[Point],
    results: Results,
    failed: Callable[[str], bool],
    prefix: str,
) -> Cell:
    # Runs that share a teacher are as good as one another for the teacher's own row.
    varying = _varying(members, layout.over, _OF_THE_TEACHER if prefix else ("",))
    candidates: dict[Key, dict[Any, list[Point]]] = {}
    for point in members:
        candidate = candidates.setdefault(tuple(point.value(name) for name in varying), {})
        candidate.setdefault(point.value(layout.over) if layout.over else None, []).append(point)

    done: dict[Key, list[Mapping[str, Any]]] = {}
    runs = finished = failures = 0
    for values, candidate in candidates.items():
        found = []
        for points in candidate.values():
            outcome = next((r for p in points if (r := results(p.key)) is not None), None)
            runs += 1
            if outcome is not None:
                found.append(outcome)
            elif any(failed(point.key) for point in points):
                failures += 1
        finished += len(found)
        done[values] = found

    best = _chosen(layout, candidates, done, prefix)
    # Of the teacher alone there is no time, step or number of pairs to show.
    shown = [m for m in metrics if not (prefix and m in _OF_THE_RUN)]
    return Cell(
        {m: tuple(_metric(outcome, m, prefix) for outcome in done[best]) for m in shown},
        wanted=len(candidates[best]),
        chosen=dict(zip(varying, best, strict=True)) if done[best] else {},
        runs=runs,
        finished=finished,
        failed=failures,
    )


def _chosen(
    layout: Layout,
    candidates: Mapping[Key, Mapping[Any, Any]],
    done: Mapping[Key, Sequence[Mapping[str, Any]]],
    prefix: str,
) -> Key:
    """The candidate that is best on validation, of those with the fewest runs missing."""
    if len(candidates) == 1:
        return next(iter(candidates))
    started = [values for values in candidates if done[values]]
    if not started:
        return next(iter(candidates))
    missing = {values: len(candidates[values]) - len(done[values]) for values in started}
    eligible = [values for values in started if missing[values] == min(missing.values())]
    sign = -1 if lower_is_better(layout.select) else 1

    def score(values: Key) -> float:
        return sign * statistics.fmean(_metric(o, layout.select, prefix) for o in done[values])

    return max(eligible, key=score)  # the first of several


def _metric(outcome: Mapping[str, Any], name: str, prefix: str) -> float:
    part, _, metric = name.partition("/")
    found: Any = outcome
    if metric:
        # A metric that names the teacher itself is the same in every row.
        found = outcome.get(part if part.startswith(_TEACHER) else prefix + part, {})
    key = metric or part
    if key not in found:
        has = [n if not isinstance(v, Mapping) else f"{n}/..." for n, v in outcome.items()]
        raise ConfigError(
            f"get_table: {name}: a finished run has no such metric"
            f"{_near(key, found) or ', only ' + ', '.join(has)}"
        )
    return float(found[key])


def _has(point: Point, part: str) -> bool:
    """Whether a point has the held-out pairs of a part, as far as its configuration says."""
    files = point.config.data.files
    if part not in ("val", "test") or point.config.data.name != "files" or not files.image:
        return True  # not of files, or of none yet
    return bool(files[f"{part}_image"] or files[f"n_{part}"])


def _check_key(key: Any, fields: tuple[str, ...], name: str, where: str) -> None:
    """A key of published figures: a value where there is one field, else a tuple of values."""
    if isinstance(key, tuple) if len(fields) == 1 else len(wrapped(key)) != len(fields):
        wanted = "a value" if len(fields) == 1 else "a tuple of values"
        raise ConfigError(f"get_table: {where}: must be {wanted} of {name} ({', '.join(fields)})")


def wrapped(value: Any) -> Key:
    """A key of published figures as the tuple of its values."""
    return value if isinstance(value, tuple) else (value,)


def _unwrapped(key: Key) -> Any:
    return key[0] if len(key) == 1 else key


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
