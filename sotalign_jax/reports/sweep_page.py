"""The page of a comparison or a sweep: its tables, curves over what was varied, and its points."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sotalign_jax.config import flatten
from sotalign_jax.reports.figures import COLOURS, figure
from sotalign_jax.reports.markup import Markup, fold, page, section, table, tag
from sotalign_jax.reports.points import (
    LABEL,
    SEED,
    Choice,
    Group,
    Point,
    Points,
    common_teacher,
    is_numeric,
)
from sotalign_jax.reports.tables import (
    METRICS,
    heading,
    headings,
    mean_and_spread,
    shorten_paths,
    show_value,
)

__all__ = ["sweep_page"]

# Of one figure.
_MOST_LINES = len(COLOURS)
_MOST_BARS = 40
_DRAWN = ("mean_recall@1", "mean_recall@10")
# Methods in a matrix of differences.
_MOST_COMPARED = 12


def sweep_page(points: Points) -> tuple[str, list[str]]:
    """The page of several runs, finished or not.

    Args:
        points: the runs.

    Returns:
        The text of the file, and what it could not show.
    """
    groups = points.groups()
    split = {"test": "test pairs", "val": "validation pairs"}[points.split]
    done = [group for group in groups if group.seeds]
    chosen = [group for group in groups if group.chosen]
    parts = [_header(points)]
    if done:
        parts.append(
            section(
                "Retrieval",
                *_written(points),
                _table(points, chosen, split) if chosen else None,
                _candidates(points, groups) if len(chosen) < len(groups) else None,
                *_tuning(points),
            )
        )
        if points.kind == "comparison" and 2 <= len(done) <= _MOST_COMPARED:
            parts.append(section("Paired differences", *_differences(done)))
        figures = list(_curves(points, done)) or list(_bars(points, [g for g in done if g.chosen]))
        if figures:
            note = (
                f"On the {split} where no others are named; bands and whiskers: one standard "
                "deviation over seeds; hollow: runs are missing."
            )
            parts.append(
                section(
                    "Curves" if any(is_numeric(points.points, a) for a in points.axes) else "Runs",
                    tag("p", note, class_="note"),
                    tag("div", *figures, class_="figures large"),
                )
            )
    parts.append(section("Points", _point_table(points), *_details(points)))
    return page(f"{points.name}: sotalign {points.kind}", *parts), []


def _header(points: Points) -> Markup:
    # Points that differ in labels alone are one run.
    states = [point.state for point in {point.name: point for point in points.points}.values()]
    finished, failed = states.count("finished"), states.count("failed")
    text = f"{finished} of {len(states)} runs finished"
    if failed:
        text += f", {failed} failed"
    done = "done" if finished == len(states) else "open"
    seeds = {point.seed for point in points.points}
    about = f"{points.kind}: {len(states)} runs"
    if len(seeds) > 1:
        about += f", {len(seeds)} seeds"
    if points.axes:
        about += f", varied: {', '.join(map(_axis, points.axes))}"
    return tag(
        "header",
        tag("h1", points.name, " ", tag("span", text, class_=f"state {done}")),
        tag("p", about, class_="soft"),
    )


def _axis(name: str) -> str:
    return name.removeprefix(LABEL)


def _table(
    points: Points, groups: Sequence[Group], pairs: str, *, split: str | None = None
) -> Markup:
    """Groups by recall: of those that are chosen on the split of the points, or on another one."""

    def values_of(group: Group, metric: str) -> list[float]:
        return group.metric(metric, group.val if split == "val" else None)

    # What may still change is not the best, nor is what was not chosen; where it is not known
    # whether rows were to be compared or to be chosen from, none is.
    ranked = [] if split or points.choice is None else [g for g in groups if _whole(g)]
    best = {
        metric: max(
            (statistics.fmean(v) for g in ranked if (v := values_of(g, metric))),
            default=float("nan"),
        )
        for metric in METRICS
    }

    def cell(group: Group, metric: str) -> object:
        values = values_of(group, metric)
        if not values:
            return "–"
        mean, spread = mean_and_spread(values)
        # All that read the same are best.
        top = len(ranked) > 1 and group in ranked and mean == f"{100 * best[metric]:.1f}"
        small = tag("small", f" ±{spread}", class_="soft") if spread else None
        return tag("span", tag("b", mean) if top else mean, small)

    def row(group: Group) -> list[object]:
        values = [show_value(v) if v is not None else "" for v in group.values] or ["all"]
        more = ["chosen" if group.chosen else ""] if split else []
        return [*values, *(cell(group, metric) for metric in METRICS), _count(group), *more]

    axes = [_axis(axis) for axis in points.axes] or [""]
    spread = ", mean ± standard deviation over seeds" if _several_seeds(groups) else ""
    bold = "; the best in bold, of those with no run missing" if len(ranked) > 1 else ""
    return table(
        [*axes, *headings(), "seeds", *(["in the table"] if split else [])],
        map(row, groups),
        caption=f"Recall on the {pairs}, in percent{spread}{bold}",
        text=len(axes),
    )


def _candidates(points: Points, groups: Sequence[Group]) -> Markup:
    """What was chosen from, on what it was chosen on."""
    select = points.choice.select if points.choice else ""
    competing = [group for group in groups if group.val or group.wanted > len(group.seeds)]
    return fold(
        f"what was chosen from, by {select}",
        _table(points, competing, "validation pairs", split="val"),
    )


def _whole(group: Group) -> bool:
    return group.final and len(group.seeds) == group.wanted


def _count(group: Group) -> str:
    count = str(len(group.seeds))
    return count if len(group.seeds) == group.wanted else f"{count} of {group.wanted}"


def _written(points: Points) -> Iterator[Markup]:
    """The sweep's own table, as it was last written: its rows, its metrics, what it chose."""
    lines = points.records.get("table.csv")
    if not lines:
        return
    names = list(lines[0])
    keys = names[: names.index("metric")]
    metrics = list(dict.fromkeys(line["metric"] for line in lines))
    choices = any(line["chosen"] for line in lines)
    published = {line["metric"] for line in lines if line.get("paper")}
    missing = any(map(_missing, lines))
    rows: dict[tuple[str, ...], dict[str, Mapping[str, str]]] = {}
    for line in lines:
        rows.setdefault(tuple(line[key] for key in keys), {})[line["metric"]] = line

    def cells(of: Mapping[str, Mapping[str, str]]) -> Iterator[object]:
        for metric in metrics:
            line = of.get(metric, {})
            yield _number(metric, line.get("mean", ""), line.get("sd", ""))
            if metric in published:
                yield _number(metric, paper) if (paper := line.get("paper")) else ""
        if choices:
            yield shorten_paths(
                next((line["chosen"] for line in of.values() if line["chosen"]), "")
            )
        if missing:
            yield next(filter(None, map(_missing, of.values())), "all")

    heads = [_axis(key) for key in keys]
    for metric in metrics:
        part, _, name = metric.partition("/")
        heads.append(f"{part} {heading(name)}" if "recall@" in name else metric)
        heads += ["paper"] if metric in published else []
    caption = "The table of the sweep, as it was last written"
    yield table(
        [
            *heads,
            *(["chosen on validation"] if choices else []),
            *(["finished"] if missing else []),
        ],
        [[*key, *cells(of)] for key, of in rows.items()],
        caption=f"{caption}; paper: as published, on its own data" if published else caption,
        text=len(keys),
    )


def _missing(line: Mapping[str, str]) -> str:
    """What a cell of the table was still without; empty of a final one."""
    finished, runs = line.get("finished", ""), line.get("runs", "")
    if finished == runs:
        return ""
    failed = line.get("failed") or "0"
    return f"{finished} of {runs} runs" + (f", {failed} failed" if failed != "0" else "")


def _number(metric: str, mean: str, spread: str = "") -> object:
    """A number of a table; recalls and accuracies in percent."""
    if not mean:
        return "–"
    percent = "recall@" in metric or "accuracy" in metric

    def shown(text: str) -> str:
        return f"{100 * float(text):.1f}" if percent else f"{float(text):.4g}"

    small = tag("small", f" ±{shown(spread)}", class_="soft") if spread else None
    return tag("span", shown(mean), small)


def _several_seeds(groups: Sequence[Group]) -> bool:
    return any(len(group.seeds) > 1 for group in groups)


def _tuning(points: Points) -> Iterator[Markup]:
    chosen = points.records.get("tuning.json")
    if chosen:
        rows = [(name, tag("code", _flat(fields))) for name, fields in chosen.items()]
        yield fold("what tuning chose", table(["method", "fields"], rows, text=2))


def _flat(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={show_value(value)}" for name, value in flatten(fields).items())


def _differences(groups: Sequence[Group]) -> Iterator[Markup]:
    """Every method against those that are worse, seed by seed."""
    for metric in _DRAWN:
        having = [group for group in groups if group.metric(metric)]
        ranked = sorted(having, key=lambda group: statistics.fmean(group.metric(metric)))
        rows = []
        for group in ranked[1:]:
            cells: list[object] = []
            for reference in ranked[:-1]:
                below = ranked.index(reference) < ranked.index(group)
                cells.append(_difference(group, reference, metric) if below else "")
            rows.append([group.title, *cells])
        if rows:
            yield table(
                ["", *(f"− {reference.title}" for reference in ranked[:-1])],
                rows,
                caption=(
                    f"Mean R@{metric.split('@')[1]}, in points: mean ± standard deviation over "
                    "seeds (smallest, largest)"
                ),
            )


def _difference(group: Group, reference: Group, metric: str) -> object:
    shared = [seed for seed in group.seeds if seed in reference.seeds]
    deltas = [100 * (group.seeds[s][metric] - reference.seeds[s][metric]) for s in shared]
    if not deltas:
        return "–"
    text = f"{statistics.fmean(deltas):+.1f}"
    if len(deltas) == 1:
        return text
    spread = tag("br"), tag("small", f"({min(deltas):+.1f}, {max(deltas):+.1f})", class_="soft")
    return tag("span", f"{text} ± {statistics.stdev(deltas):.1f}", *spread)


# ---- figures


def _curves(points: Points, groups: Sequence[Group]) -> Iterator[Markup]:
    """Recall against each number that was varied."""
    for place, axis in enumerate(points.axes):
        if not is_numeric(points.points, axis):
            continue
        # What was chosen among is shown on what it was chosen on.
        among = _chosen_among(points, place)
        some = groups if among else [group for group in groups if group.chosen]
        lines, note = _lines(points, some, place)
        if not any(len(line) > 1 for line in lines.values()):
            continue
        if among:
            note = f"on the validation pairs{'; ' if note else ''}{note}"
        for metric in _DRAWN:
            yield _curve(axis, metric, lines, note, validation=among)


def _chosen_among(points: Points, place: int) -> bool:
    """Whether several values of an axis compete for one cell of the table."""
    axis = points.axes[place]
    values: dict[tuple[str, ...], set[str]] = {}
    for point in points.points:
        values.setdefault(points.cell(point), set()).add(repr(point.given.get(axis)))
    return any(len(some) > 1 for some in values.values())


def _lines(
    points: Points, groups: Sequence[Group], place: int
) -> tuple[dict[str, dict[Any, Group]], str]:
    """Groups by what else they are and by the axis at that place; and a note on what was chosen.

    Where that makes too many lines, the other numbers are chosen on validation.
    """

    prefer = (points.choice or Choice()).preference

    def by(keep: Sequence[int]) -> dict[str, dict[Any, Group]]:
        lines: dict[str, dict[Any, Group]] = {}
        for group in groups:
            x = group.values[place]
            if not isinstance(x, int | float):
                continue  # was not given this field, as a teacher
            name = ", ".join(show_value(v) for i in keep if (v := group.values[i]) is not None)
            line = lines.setdefault(name, {})
            if x not in line or prefer(group) > prefer(line[x]):
                line[x] = group
        return lines

    others = [i for i in range(len(points.axes)) if i != place]
    lines = by(others)
    if len(lines) <= _MOST_LINES:
        return lines, ""
    names = [i for i in others if not is_numeric(points.points, points.axes[i])]
    chosen = [_axis(points.axes[i]) for i in others if i not in names]
    lines = by(names)
    note = f"{', '.join(chosen)} chosen on validation" if chosen else ""
    if len(lines) > _MOST_LINES:
        best = sorted(lines, key=lambda name: max(map(prefer, lines[name].values())), reverse=True)
        lines = {name: lines[name] for name in lines if name in best[:_MOST_LINES]}
        note += f"{'; ' if note else ''}the best {_MOST_LINES} of {len(best)} lines"
    return lines, note


def _curve(
    axis: str,
    metric: str,
    lines: Mapping[str, Mapping[Any, Group]],
    note: str,
    *,
    validation: bool,
) -> Markup:
    def values_of(group: Group) -> list[float]:
        return group.metric(metric, group.val if validation else None)

    def draw(axes: Any) -> None:
        numbers: set[Any] = set()
        for colour, (name, line) in zip(COLOURS, lines.items(), strict=False):
            x = sorted(number for number, group in line.items() if values_of(group))
            numbers |= set(x)
            values = [[100 * v for v in values_of(line[number])] for number in x]
            means = [statistics.fmean(v) for v in values]
            spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
            final = [i for i, number in enumerate(x) if _whole(line[number])]
            filled = {"marker": "o", "markevery": final} if final else {}
            axes.plot(x, means, color=colour, label=name or None, **filled)
            if rest := [i for i in range(len(x)) if i not in final]:
                hollow = {"marker": "o", "markerfacecolor": "none", "linestyle": "none"}
                axes.plot([x[i] for i in rest], [means[i] for i in rest], color=colour, **hollow)
            low, high = (
                [m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1)
            )
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        # Of the teachers, what is at hand is on the pairs of the table.
        teacher = {} if validation else _teachers(lines)
        x = sorted(n for n in teacher if all(metric in s for s in teacher[n].values()))
        if x:
            means = [100 * statistics.fmean(s[metric] for s in teacher[n].values()) for n in x]
            axes.plot(x, means, color=COLOURS[5], linestyle=":", label="teacher")
        _scale(axes, numbers)
        axes.set_xlabel(_axis(axis))
        axes.set_ylabel("%")
        if any(lines) or x:
            axes.legend(fontsize="small")

    k = metric.split("@")[1]
    name = f"over-{axis}-{k}".replace(".", "-")
    title = f"Mean R@{k} against {_axis(axis)}"
    return figure(name, draw, title=title, note=note, size=(5.4, 3.2))


def _teachers(lines: Mapping[str, Mapping[Any, Group]]) -> dict[Any, dict[Any, Any]]:
    """Retrieval by seed of the teacher at every number, if there is one teacher at each."""
    found = {}
    for number in {number for line in lines.values() for number in line}:
        scores = common_teacher(line[number] for line in lines.values() if number in line)
        if scores is None:
            return {}
        found[number] = scores
    return {number: scores for number, scores in found.items() if scores}


def _scale(axes: Any, numbers: set[Any]) -> None:
    """A logarithmic axis where the numbers ask for one; zero then stands at its left end."""
    positive = [number for number in numbers if number > 0]
    if not positive or min(numbers) < 0 or max(positive) < 20 * min(positive):
        return
    if len(positive) == len(numbers):
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=min(positive))


def _bars(points: Points, groups: Sequence[Group]) -> Iterator[Markup]:
    """A dot a seed, a line at the mean; the best on top. Of too many, the best on validation."""
    prefer = (points.choice or Choice()).preference
    # A teacher may have no scores there, and stays.
    kept = sorted(groups, key=lambda g: (not g.val, prefer(g)), reverse=True)[:_MOST_BARS]
    for metric in _DRAWN:
        having = [group for group in kept if group.metric(metric)]
        ranked = sorted(having, key=lambda group: statistics.fmean(group.metric(metric)))
        if len(ranked) < 2:
            continue

        def draw(axes: Any, ranked=ranked, metric=metric) -> None:
            for y, group in enumerate(ranked):
                values = [100 * value for value in group.metric(metric)]
                mean = statistics.fmean(values)
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                axes.plot([mean - spread, mean + spread], [y, y], color=COLOURS[0], linewidth=1)
                axes.plot(values, [y] * len(values), "o", color=COLOURS[0], alpha=0.45)
                axes.plot([mean], [y], "|", color=COLOURS[1], markersize=12, markeredgewidth=2)
            axes.set_yticks(range(len(ranked)), [_named(group) for group in ranked])
            axes.set_xlabel("%")
            axes.grid(axis="y", visible=False)

        k = metric.split("@")[1]
        yield figure(
            f"runs-{k}",
            draw,
            title=f"Mean R@{k}",
            note="dots: seeds; upright: their mean",
            size=(5.4, 0.9 + 0.3 * len(ranked)),
        )


def _named(group: Group) -> str:
    """Its title, and how many seeds are finished where some are not."""
    count = "" if len(group.seeds) == group.wanted else f" ({_count(group)} seeds)"
    return _short(group.title) + count


def _short(title: str, most: int = 40) -> str:
    return title if len(title) <= most else f"{title[: most - 1]}…"


# ---- points


def _point_table(points: Points) -> Markup:
    # Beside its neighbours, a point that was not chosen would be picked on test.
    several = any(not group.chosen for group in points.groups())
    split = "val" if several else points.split

    def row(number: int, point: Point, first: Point) -> list[object]:
        scores = point.scores(split) or {}
        results = point.results or {}
        recalls = [f"{100 * scores[m]:.1f}" if m in scores else "" for m in _DRAWN]
        values = [*map(point.given.get, points.axes), point.seed]
        return [
            tag("a", str(number), href=f"#{_anchor(points, first)}"),
            *(show_value(value) if value is not None else "" for value in values),
            tag("span", point.state, title=_failure(point) or None),
            tag("code", Path(*point.path.parts[-2:])),
            *recalls,
            f"{results['selected_step']:,}" if "selected_step" in results else "",
            f"{results['seconds']:.0f} s" if "seconds" in results else "",
        ]

    firsts = {id(point): members[0] for members in points.alike() for point in members}
    rows = [row(number, p, firsts[id(p)]) for number, p in enumerate(points.points, 1)]
    about = "val mean" if several else "mean"
    recalls = [f"{about} R@{metric.split('@')[1]}" for metric in _DRAWN]
    axes = [_axis(axis) for axis in points.axes]
    return table(
        ["", *axes, "seed", "state", "directory", *recalls, "step", "time"],
        rows,
        caption="Every point; its number leads to what differs in it",
        text=len(axes) + 4,
    )


def _details(points: Points) -> Iterator[Markup]:
    """What all runs share, and what those that differ in the seed alone have of their own."""
    started = [point.config for point in points.points if "steps" in point.config]
    first = started[0] if started else {}
    shared = {n: v for n, v in first.items() if all(c.get(n) == v for c in started[1:])}
    shared = {name: value for name, value in shared.items() if name != SEED}
    cards = [_card(points, members, shared) for members in points.alike()]
    yield tag("h3", "What differs")
    yield tag("div", *cards, class_="points")
    if shared:
        rows = [_field(name, value) for name, value in shared.items()]
        heads = ["field", "value"]
        yield fold(f"{len(rows)} fields that all runs share", table(heads, rows, text=2))


def _card(points: Points, members: Sequence[Point], shared: Mapping[str, Any]) -> Markup:
    # One that has started knows all its fields.
    point = max(members, key=lambda point: len(point.config))
    title = [show_value(v) for axis in points.axes if (v := point.given.get(axis)) is not None]
    fields = {name: v for name, v in point.given.items() if not name.startswith(LABEL)}
    own = {n: v for n, v in {**fields, **point.config}.items() if n not in (*shared, SEED)}
    rows = [_field(name, value) for name, value in own.items()]
    failures = [
        tag("p", f"seed {show_value(one.seed)} failed: {_failure(one)}", class_="down")
        for one in members
        if one.failure and one.results is None
    ]
    return tag(
        "div",
        tag("h4", ", ".join(title) or "all"),
        table(["field", "value"], rows, text=2) if rows else None,
        *failures,
        id=_anchor(points, members[0]),
    )


def _field(name: str, value: Any) -> tuple[Markup, str]:
    return tag("code", name), shorten_paths(show_value(value))


def _failure(point: Point) -> str:
    return shorten_paths(point.failure, point.path)


def _anchor(points: Points, point: Point) -> str:
    # By its number too, since points of several labels may be one run.
    number = next(i for i, one in enumerate(points.points, 1) if one is point)
    return f"point-{number}-{point.name}"
