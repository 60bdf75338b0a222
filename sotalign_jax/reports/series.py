"""What ``metrics.jsonl`` holds, as one curve a metric, short enough to draw."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

__all__ = ["MAX_POINTS", "Series", "read_series", "thinned"]

MAX_POINTS = 500


class Series(NamedTuple):
    """A metric against the step.

    Attributes:
        steps: increasing.
        values: finite.
    """

    steps: Float[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]


def read_series(path: Path, most: int = MAX_POINTS) -> dict[str, Series]:
    """The metrics of a run, finished or not.

    Args:
        path: a ``metrics.jsonl``; lines that are cut off or hold no record are passed over, and so
            are values that are not finite numbers.
        most: points of a curve.

    Returns:
        A curve a metric, in the order of the file; empty where there is no file.
    """
    points: dict[str, dict[float, float]] = {}
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                for name, step, value in _values(line):
                    points.setdefault(name, {})[step] = value  # the last one of a step
    found = {}
    for name, by_step in points.items():
        steps = sorted(by_step)
        values = [by_step[step] for step in steps]
        found[name] = thinned(Series(np.array(steps), np.array(values)), most)
    return found


def _values(line: str) -> list[tuple[str, float, float]]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return []
    step = _number(record.get("step")) if isinstance(record, Mapping) else None
    if step is None:
        return []
    numbers = [(name, _number(value)) for name, value in record.items() if name != "step"]
    return [(name, step, value) for name, value in numbers if value is not None]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def thinned(series: Series, most: int = MAX_POINTS) -> Series:
    """A series with fewer points that looks the same: of every stretch its lowest and its highest.

    Args:
        series: to thin.
        most: points to keep at most, at least 4; the first and the last are among them.

    Returns:
        Points of the series, in their order.
    """
    count = len(series.steps)
    if count <= most:
        return series
    kept = {0, count - 1}
    edges = np.linspace(1, count - 1, (most - 2) // 2 + 1).astype(int)
    for start, stop in itertools.pairwise(edges):
        stretch = series.values[start:stop]
        kept |= {start + int(stretch.argmin()), start + int(stretch.argmax())}
    index = np.array(sorted(kept))
    return Series(series.steps[index], series.values[index])
