"""What stands in the directory of a run, whole or not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sotalign_jax.reports.series import Series, read_series
from sotalign_jax.training.workdir import read_json

__all__ = ["Run", "read_run"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as far as it is.

    Attributes:
        path: its directory.
        config: as recorded.
        starts: a record a start: time, command, versions, devices.
        series: its metrics against the step.
        results: held-out retrieval and what was selected; None of an unfinished run.
    """

    path: Path
    config: Mapping[str, Any]
    starts: tuple[Mapping[str, Any], ...]
    series: Mapping[str, Series]
    results: Mapping[str, Any] | None

    @property
    def step(self) -> int:
        """The last step that was reported."""
        return int(max((one.steps[-1] for one in self.series.values()), default=0))

    @property
    def state(self) -> str:
        """How far it is, in words."""
        if self.results is not None:
            return "finished"
        steps = self.config.get("steps", "?")
        return f"not finished: step {self.step:,} of {steps:,}" if self.step else "no step reported"


def read_run(path: Path) -> Run:
    """Reads a run directory; only ``config.json`` has to be there.

    Args:
        path: the directory.

    Returns:
        The run.

    Raises:
        ValueError: no ``config.json``, or a file that does not hold what it should.
    """
    config = path / "config.json"
    if not config.exists():
        raise ValueError(f"{path}: holds no run, since there is no config.json")
    results = path / "results.json"
    return Run(
        path,
        _record(config),
        _starts(path / "provenance.jsonl"),
        read_series(path / "metrics.jsonl"),
        _record(results) if results.exists() else None,
    )


def _record(path: Path) -> Mapping[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def _starts(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The whole lines; a kill may have cut one off."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return tuple(record for record in records if isinstance(record, dict))
