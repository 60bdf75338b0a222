"""Numbers of retrieval as tables of a page."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sotalign_jax.reports.markup import Markup, table, tag

__all__ = [
    "METRICS",
    "heading",
    "headings",
    "mean_and_spread",
    "retrieval_tables",
    "shorten_paths",
    "show_command",
    "show_value",
]

_KS = (1, 5, 10)
# Two parts or more, from a slash that begins a word: neither "t2i/recall" nor "https://...".
_ABSOLUTE = re.compile(r"""(?<![\w./…~])/(?:[^\s/'":;,()=]+/)+([^\s/'":;,()=]*)""")
METRICS = tuple(f"{side}recall@{k}" for side in ("t2i/", "i2t/", "mean_") for k in _KS)


def heading(metric: str) -> str:
    """A metric for people, as "T2I R@5"."""
    side, _, k = metric.partition("recall@")
    return f"{ {'t2i/': 'T2I', 'i2t/': 'I2T', 'mean_': 'mean'}.get(side, side) } R@{k}"


def headings() -> list[str]:
    """Of `METRICS`, each direction named once."""
    return [heading(m) if m.endswith("@1") else heading(m).split()[1] for m in METRICS]


def retrieval_tables(results: Mapping[str, Any]) -> list[Markup]:
    """Recall of teacher and aligner on the held-out pairs of a run, and their difference.

    Args:
        results: what ``results.json`` holds.

    Returns:
        A table for the test and for the validation pairs, as far as there are such.
    """
    found = []
    for split, name in (("test", "Test"), ("val", "Validation")):
        scores, teacher = results.get(split), results.get(f"teacher_{split}")
        if not isinstance(scores, Mapping):
            continue
        rows: list[tuple[object, ...]] = [("aligner", *_cells(scores))]
        if isinstance(teacher, Mapping):
            rows.insert(0, ("teacher", *_cells(teacher)))
            rows.append(("difference", *_differences(scores, teacher)))
        caption = (
            f"{name} pairs, {scores.get('n_images', 0):,.0f} images and "
            f"{scores.get('n_texts', 0):,.0f} texts: recall in percent"
        )
        found.append(table(["", *headings(), "FOSCTTM"], rows, caption=caption))
    return found


def _cells(scores: Mapping[str, float]) -> list[str]:
    cells = [f"{100 * scores[m]:.1f}" if m in scores else "–" for m in METRICS]
    return [*cells, f"{scores['foscttm']:.4f}" if "foscttm" in scores else "–"]


def _differences(scores: Mapping[str, float], teacher: Mapping[str, float]) -> list[object]:
    cells: list[object] = []
    for metric, factor, form in (*((m, 100, "+.1f") for m in METRICS), ("foscttm", 1, "+.4f")):
        if metric not in scores or metric not in teacher:
            cells.append("–")
            continue
        difference = factor * (scores[metric] - teacher[metric])
        better = -difference if metric == "foscttm" else difference
        kind = "up" if better > 0 else "down" if better < 0 else None
        cells.append(tag("span", f"{difference:{form}}", class_=kind))
    return cells


def mean_and_spread(values: Sequence[float]) -> tuple[str, str]:
    """In percent: the mean, and the standard deviation (of n - 1), empty of a single value."""
    spread = f"{100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}", spread


def show_value(value: Any) -> str:
    """A value of a configuration for people."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return value or "''"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(show_value, value)) + ")"
    return str(value)


def shorten_paths(text: str, directory: Path | None = None) -> str:
    """A text without the places of this machine, since pages are passed on.

    Args:
        text: a message or a value.
        directory: of the run; paths in it begin with its name.

    Returns:
        The text, absolute paths elsewhere shortened to their last part.
    """
    if directory is not None:
        for place in (directory.absolute(), directory.resolve()):
            text = text.replace(str(place), place.name)
    return _ABSOLUTE.sub(lambda found: f"…/{found[1]}", text)


def show_command(command: Sequence[object]) -> str:
    """A command line for people, its program and absolute paths without their places."""

    def shown(word: str) -> str:
        name, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        # As a whole, since a path may hold a space.
        value = f"…/{Path(value).name}" if value.startswith("/") else shorten_paths(value)
        return f"{name}{equals}{value}"

    words = [str(word) for word in command]
    return " ".join([*(Path(word).name for word in words[:1]), *map(shown, words[1:])])
