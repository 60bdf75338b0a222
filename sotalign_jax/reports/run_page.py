"""The page of one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sotalign_jax.config import default_config, flatten
from sotalign_jax.reports.curves import training_figures
from sotalign_jax.reports.examples import examples_of
from sotalign_jax.reports.markup import Markup, fold, page, section, table, tag
from sotalign_jax.reports.runs import Run
from sotalign_jax.reports.tables import (
    retrieval_tables,
    shorten_paths,
    show_command,
    show_value,
)

__all__ = ["config_fold", "run_page"]


def run_page(run: Run) -> tuple[str, list[str]]:
    """The page of a run, finished or not.

    Args:
        run: what its directory holds.

    Returns:
        The text of the file, and what it could not show.
    """
    problems: list[str] = []
    results = run.results or {}
    parts = [_header(run)]
    if scores := retrieval_tables(results):
        note = tag("p", "FOSCTTM: the fraction of wrong candidates that are closer; 0 is best.")
        parts.append(section("Retrieval", *scores, tag("div", note, class_="note")))
    figures = training_figures(run.series, results.get("teacher_val"))
    if figures:
        parts.append(section("Training", tag("div", *figures, class_="figures")))
    else:
        parts.append(section("Training", tag("p", "No metrics were recorded.", class_="note")))
    parts.append(_examples(run, problems))
    parts.append(section("Configuration", config_fold(run.config)))
    parts.append(_provenance(run))
    return page(f"{run.path.resolve().name}: sotalign run", *parts), problems


def _header(run: Run) -> Markup:
    config, results = flatten(run.config), run.results or {}
    done = "done" if run.results is not None else "open"
    trained = config.get("aligner", "layers") == "layers"
    start = f"{config.get('objective', '?')} from a {config.get('model.init', '?')} start"
    about = [
        start if trained else f"{config['aligner']}, fitted in one go",
        f"{config.get('data.name', '?')} data",
        f"{results.get('pairs', config.get('data.n_pairs', '?')):,} pairs",
        f"seed {config.get('seed', '?')}",
    ]
    tiles = []
    held_out = next((split for split in ("test", "val") if split in results), None)
    if held_out is not None:
        scores, teacher = results[held_out], results.get(f"teacher_{held_out}", {})
        for k in (1, 10):
            metric = f"mean_recall@{k}"
            if metric in scores:
                beside = f" teacher {100 * teacher[metric]:.1f}" if metric in teacher else None
                title = f"mean R@{k}, {held_out}, %"
                tiles.append(_tile(title, f"{100 * scores[metric]:.1f}", beside))
    if "selected_step" in results and trained:
        steps = config.get("steps")
        beside = None if results["selected_step"] == steps else f" of {steps}"
        tiles.append(_tile("selected step", f"{results['selected_step']:,}", beside))
    elif run.step:
        tiles.append(_tile("step", f"{run.step:,}", f" of {config.get('steps', '?')}"))
        for k in (1, 10):
            if (recall := run.series.get(f"val/mean_recall@{k}")) is not None:
                title = f"mean R@{k}, val, %"
                last = f" at step {recall.steps[-1]:,.0f}"
                tiles.append(_tile(title, f"{100 * recall.values[-1]:.1f}", last))
    if "seconds" in results:
        tiles.append(_tile("time", _duration(results["seconds"])))
    return tag(
        "header",
        tag("h1", run.path.resolve().name, " ", tag("span", run.state, class_=f"state {done}")),
        tag("p", ", ".join(map(str, about)), class_="soft"),
        tag("dl", *tiles, class_="tiles") if tiles else None,
    )


def _tile(title: str, value: str, beside: str | None = None) -> Markup:
    small = None if beside is None else tag("small", beside)
    return tag("div", tag("dt", title), tag("dd", value, small))


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{seconds / 3600:.1f} h"


def _examples(run: Run, problems: list[str]) -> Markup:
    heading = "Best and worst retrievals"
    try:
        parts, found = examples_of(run)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        if run.results is not None:
            problems.append(f"no examples of retrieval: {reason}")
        shown = shorten_paths(reason, run.path)
        return section(heading, tag("p", f"Not shown: {shown}.", class_="note"))
    problems += found
    notes = [tag("p", shorten_paths(problem, run.path), class_="note") for problem in found]
    return section(heading, *parts, *notes)


def config_fold(config: Mapping[str, Any]) -> Markup:
    """All fields of a configuration; those that are not as in `default_config` come first."""
    recorded, defaults = flatten(config), flatten(default_config())
    missing = object()

    def same(name: str) -> bool:
        default = defaults.get(name, missing)
        return recorded[name] == (list(default) if isinstance(default, tuple) else default)

    changed = [name for name in recorded if not same(name)]
    rest = [name for name in recorded if same(name)]

    def row(name: str) -> tuple[Markup, str, str]:
        default = show_value(defaults[name]) if name in defaults else "no such field by default"
        return tag("code", name), shorten_paths(show_value(recorded[name])), default

    return tag(
        "div",
        fold(
            f"{len(changed)} of {len(recorded)} fields are not as by default",
            table(["field", "value", "default"], map(row, changed), text=3),
            open="" if len(changed) <= 30 else None,
        ),
        fold(
            f"the other {len(rest)} fields",
            table(["field", "value"], (row(name)[:2] for name in rest), text=2),
        ),
        id="configuration",
    )


def _provenance(run: Run) -> Markup:
    if not run.starts:
        return section("Provenance", tag("p", "No start was recorded.", class_="note"))
    last = run.starts[-1]
    rows = [
        ("seed", show_value(run.config.get("seed", "?"))),
        ("sotalign_jax", f"{last.get('sotalign_jax', '?')}{_commit(last)}"),
        ("Python", str(last.get("python", "?"))),
        *((name, str(version)) for name, version in dict(last.get("versions") or {}).items()),
        ("platform", str(last.get("platform", "?"))),
        ("command", tag("code", show_command(last.get("command") or []))),
    ]
    starts = [
        (
            str(start.get("time", "?")),
            ", ".join(map(str, start.get("devices") or [])) or "?",
            str(start.get("cpu_count", "?")),
            str(start.get("sotalign_jax", "?")) + _commit(start),
        )
        for start in run.starts
    ]
    count = f"{len(starts)} start{'s' if len(starts) > 1 else ''}"
    return section(
        "Provenance",
        fold(
            "versions, seed and command",
            table(["", ""], rows, text=2),
            id="versions",
        ),
        fold(
            count,
            table(["time", "devices", "CPUs", "sotalign_jax"], starts, text=4),
        ),
    )


def _commit(start: Mapping[str, Any]) -> str:
    git = start.get("git")
    if not isinstance(git, Mapping):
        return ""
    return f", commit {str(git.get('commit', '?'))[:12]}{', changed' if git.get('dirty') else ''}"
