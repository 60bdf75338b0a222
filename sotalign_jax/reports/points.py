"""A comparison or a sweep as a list of runs: what each is, where it stands, how far it is."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sotalign_jax.config import flatten
from sotalign_jax.sweeps.layout import lower_is_better
from sotalign_jax.training.workdir import read_json

__all__ = ["Choice", "Group", "Point", "Points", "read_points"]

Scores = Mapping[str, float]

SEED = "seed"
LABEL = "label."
# What is chosen by where nothing else was recorded.
_SELECT = "val/mean_recall@1"
# Columns of the table of a sweep that hold numbers.
_NUMBERS = ("mean", "sd")


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of several.

    Attributes:
        name: of its directory, for anchors and for people.
        given: what it was given of its own: labels as ``"label.NAME"``, and fields.
        path: its directory, which need not be there yet.
        config: all its fields, flat; only those given of a run that has not started.
        results: of a finished run, else None.
        failure: why it failed last, else empty.
    """

    name: str
    given: Mapping[str, Any]
    path: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any] | None
    failure: str = ""

    @property
    def state(self) -> str:
        """How far it is."""
        if self.results is not None:
            return "finished"
        if self.failure:
            return "failed"
        return "started" if (self.path / "config.json").exists() else "waiting"

    @property
    def seed(self) -> Any:
        """Its seed; None of a run that has not started and was given none."""
        return self.given[SEED] if SEED in self.given else self.config.get(SEED)

    def scores(self, split: str) -> Scores | None:
        """Its retrieval on the test or on the validation pairs."""
        found = None if self.results is None else self.results.get(split)
        return found if isinstance(found, Mapping) else None


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        values: of the axes of `Points`, in their order; None of what these runs were not given.
        seeds: retrieval by seed, of those that are finished.
        val: the same on validation.
        teacher: retrieval of the teachers of these runs, on the pairs of ``seeds``.
        wanted: how many seeds there will be.
        chosen: whether it stands in the table for its cell, of which there may be more groups.
        final: whether no run of its cell is missing.
    """

    values: tuple[Any, ...]
    seeds: Mapping[Any, Scores]
    val: Mapping[Any, Scores]
    teacher: Mapping[Any, Scores]
    wanted: int
    chosen: bool = True
    final: bool = True

    @property
    def title(self) -> str:
        """Its values, for people."""
        return ", ".join(_shown(value) for value in self.values if value is not None) or "all"

    def metric(self, name: str, split: Mapping[Any, Scores] | None = None) -> list[float]:
        """A metric of every finished seed that has it."""
        return [s[name] for s in (self.seeds if split is None else split).values() if name in s]


@dataclasses.dataclass(frozen=True)
class Choice:
    """How the table of a sweep chooses, as its ``sweep.json`` says.

    Attributes:
        cells: labels and fields of the rows and columns: every value is a cell.
        select: metric of the validation pairs by which one group a cell is chosen; empty: there
            is one.
        over: the field that is averaged over.
    """

    cells: tuple[str, ...] = ()
    select: str = ""
    over: str = SEED

    def preference(self, group: Group) -> tuple[int, float]:
        """The larger, the better: first the fewest seeds missing, then validation."""
        select = (self.select or _SELECT).removeprefix("val/")
        values = group.metric(select, group.val)
        sign = -1 if lower_is_better(select) else 1
        score = sign * statistics.fmean(values) if values else float("-inf")
        return len(group.seeds) - group.wanted, score


@dataclasses.dataclass(frozen=True)
class Points:
    """The runs of a comparison or a sweep.

    Attributes:
        kind: "comparison" or "sweep".
        name: of the directory, or of the sweep's file.
        points: in the order in which they were asked for.
        axes: labels and fields that tell the groups apart.
        more: rows of the tables that are no runs (the teacher of a comparison).
        records: what else was written down, by the name of its file.
        choice: how one of several groups is chosen; None: not recorded.
    """

    kind: str
    name: str
    points: Sequence[Point]
    axes: tuple[str, ...]
    more: Sequence[Group]
    records: Mapping[str, Any]
    choice: Choice | None = None

    @property
    def split(self) -> str:
        """Which held-out pairs the tables are about: test where any run has them."""
        found = [p for p in self.points if p.results is not None]
        return "val" if found and not any(p.scores("test") for p in found) else "test"

    def alike(self) -> list[list[Point]]:
        """Points that differ in the seed alone, together."""
        members: dict[tuple[str, ...], list[Point]] = {}
        for point in self.points:
            key = tuple(repr(point.given.get(axis)) for axis in self.axes)
            members.setdefault(key, []).append(point)
        return list(members.values())

    def groups(self) -> list[Group]:
        """What stands beside the points, and the points without their seeds."""
        groups: list[Group] = []
        cells: list[tuple[str, ...]] = []
        for some in self.alike():
            found = (
                {p.seed: s for p in some if (s := p.scores(split)) is not None}
                for split in (self.split, "val", f"teacher_{self.split}")
            )
            values = tuple(some[0].given.get(axis) for axis in self.axes)
            groups.append(Group(values, *found, wanted=len({p.seed for p in some})))
            cells.append(self.cell(some[0]))
        groups = self._choose(groups, cells)
        shared = None if self.more else common_teacher(groups)
        if shared:
            values = ("teacher", *[None] * (len(self.axes) - 1))
            wanted = len({p.seed for p in self.points})
            groups.insert(0, Group(values, shared, {}, {}, wanted))
        return [*self.more, *groups]

    def cell(self, point: Point) -> tuple[str, ...]:
        """Points that compete for one cell of the table have this in common."""
        names = self.choice.cells if self.choice and self.choice.select else self.axes
        return tuple(repr(point.given.get(name)) for name in names)

    def _choose(self, groups: Sequence[Group], cells: Sequence[tuple[str, ...]]) -> list[Group]:
        """The groups with what they are in their cells: chosen on validation, and for good."""
        choice = self.choice or Choice()
        members: dict[tuple[str, ...], list[Group]] = {}
        for cell, group in zip(cells, groups, strict=True):
            members.setdefault(cell, []).append(group)
        found = []
        for cell, group in zip(cells, groups, strict=True):
            others = members[cell]
            # Of what is not averaged over seeds, the sweep's own table tells the choice.
            chosen = len(others) == 1 or (
                choice.over == SEED
                and bool(group.seeds)
                and group is max((g for g in others if g.seeds), key=choice.preference)
            )
            final = all(len(g.seeds) == g.wanted for g in others)
            found.append(dataclasses.replace(group, chosen=chosen, final=final))
        return found


def common_teacher(groups: Iterable[Group]) -> dict[Any, Scores] | None:
    """Retrieval by seed of the one teacher that some runs have; None where they have several."""
    found: dict[Any, Scores] = {}
    for group in groups:
        for seed, scores in group.teacher.items():
            if found.setdefault(seed, scores) != scores:
                return None
    return found


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def read_points(directory: Path) -> Points | None:
    """The runs of a comparison or a sweep.

    Args:
        directory: holds ``sweep.json`` and ``points/``, or what `sotalign_jax.sweeps.compare` left.

    Returns:
        The runs; None where the directory is neither.

    Raises:
        ValueError: a file that does not hold what it should.
    """
    if (directory / "sweep.json").exists():
        return _sweep(directory)
    config = directory / "config.json"
    if not config.exists() or (directory / "metrics.jsonl").exists():
        return None
    compare = _object(config).get("compare") or {}
    methods, seeds = compare.get("methods") or {}, compare.get("seeds") or ()
    # A run may have a comparison in its configuration.
    if not any((directory / name).is_dir() for name in methods):
        return None
    return _comparison(directory, methods, seeds, str(compare.get("teacher") or ""))


def _sweep(directory: Path) -> Points:
    record = _object(directory / "sweep.json")
    try:
        points = [
            _point(
                directory / "points" / str(one["key"]),
                str(one["key"]),
                {f"{LABEL}{name}": value for name, value in one["labels"].items()}
                | dict(one["fields"]),
            )
            for one in record["points"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{directory / 'sweep.json'}: a point lacks its key, labels or fields ({error})"
        ) from None
    name = str(record.get("name") or directory.resolve().name)
    written = directory / "table.csv"
    records = {written.name: _lines(written)} if written.exists() else {}
    choice = _choice(record, directory / "sweep.json")
    return Points("sweep", name, points, _axes(points), (), records, choice)


def _choice(record: Mapping[str, Any], path: Path) -> Choice | None:
    """How the table chooses; None in a record of an earlier version."""
    if "layout" not in record:
        return None
    try:
        layout = record["layout"]
        cells = (*layout["rows"], *layout["columns"])
        return Choice(cells, str(layout["select"]), str(layout["over"]))
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: layout: must hold rows, columns, select and over ({error})"
        ) from None


def _lines(path: Path) -> list[dict[str, str]]:
    """The lines of a table that `sotalign sweep table` wrote."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    if not all(map(_is_line, lines)):
        raise ValueError(f"{path}: not the table of a sweep; write it again or remove it")
    return lines


def _is_line(line: Mapping[str | None, str | None]) -> bool:
    """Whether there are as many cells as heads, with numbers where numbers should be."""
    try:
        numbers = [float(line[name] or 0) for name in _NUMBERS]
        numbers.append(float(line.get("paper") or 0))  # only `--paper` writes it
    except (KeyError, ValueError):
        return False
    return (
        bool(numbers)
        and {"metric", "chosen"} <= line.keys()
        and None not in {*line, *line.values()}
    )


def _comparison(directory: Path, methods: Mapping[str, Any], seeds, teacher: str) -> Points:
    points = [
        _point(
            directory / method / f"seed_{seed}",
            f"{method}-seed_{seed}",
            {f"{LABEL}method": method, SEED: seed},
        )
        for method in methods
        for seed in seeds
    ]
    # The teacher of the comparison is that of the methods that have none of their own.
    plain = {m for m, fields in methods.items() if not {"teacher", "data"} & set(fields)}
    scores = {
        split: {
            p.given[SEED]: found
            for p in points
            if p.given[f"{LABEL}method"] in plain and (found := p.scores(f"teacher_{split}"))
        }
        for split in ("test", "val")
    }
    more = [Group((teacher,), scores["test"], scores["val"], {}, len(seeds))] if teacher else []
    records = {}
    for name in ("tuning.json",):
        if (directory / name).exists():
            records[name] = _object(directory / name)
    name = directory.resolve().name
    axes = (f"{LABEL}method",)
    more = [group for group in more if group.seeds]
    return Points("comparison", name, points, axes, more, records, Choice())


def _point(path: Path, name: str, given: dict[str, Any]) -> Point:
    config, results = path / "config.json", path / "results.json"
    failed = path.with_name(f"{path.name}.failed.json")
    return Point(
        name,
        given,
        path,
        flatten(_object(config)) if config.exists() else given,
        _object(results) if results.exists() else None,
        str(_object(failed).get("message", "")) if failed.exists() else "",
    )


def _object(path: Path) -> Mapping[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _axes(points: Sequence[Point]) -> tuple[str, ...]:
    """Labels, and those of the varying fields that tell more apart than labels and numbers do."""
    names = [n for n in dict.fromkeys(name for p in points for name in p.given) if n != SEED]
    axes = [n for n in names if len({repr(p.given.get(n)) for p in points}) > 1]

    def groups(some: Sequence[str]) -> int:
        return len({tuple(repr(p.given.get(axis)) for axis in some) for p in points})

    # Numbers are kept before names of things: they are what curves are drawn against.
    fields = [a for a in axes if not a.startswith(LABEL)]
    for axis in sorted(fields, key=lambda axis: is_numeric(points, axis)):
        without = [a for a in axes if a != axis]
        if groups(without) == groups(axes):
            axes = without
    return tuple(axes)


def is_numeric(points: Sequence[Point], axis: str) -> bool:
    """Whether an axis holds numbers, and more than one of them."""
    values = [p.given[axis] for p in points if axis in p.given]
    return all(type(value) in (int, float) for value in values) and len(set(values)) > 1
