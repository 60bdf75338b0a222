"""The points of a sweep as an array of jobs of SLURM, through submitit."""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from sotalign_jax.config import ConfigError
from sotalign_jax.sweeps.points import Sweep, SweepDir, load_sweep
from sotalign_jax.sweeps.run import groups_of, run_sweep
from sotalign_jax.sweeps.table import write_tables
from sotalign_jax.training import distributed

__all__ = ["parse_options", "submit"]


def submit(
    sweep: Sweep,
    workdir: str | os.PathLike,
    *,
    points: Sequence[str] = (),
    size: int = 8,
    options: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Submits the unfinished points of a sweep, a job of the array a group of points.

    A job that is preempted or out of time is queued again by submitit and goes on; logs are in
    ``DIR/slurm``. Points that another process is at work on when their job begins are left to it.

    Args:
        sweep: of `load_sweep`.
        workdir: the directory of the sweep.
        points: numbers or keys of those to run; none: all.
        size: the largest group.
        options: of submitit, as ``{"timeout_min": 600, "slurm_partition": "gpu"}``; and
            ``"cluster"``, ``"slurm"`` unless given (``"local"``: processes of this machine).

    Returns:
        submitit's jobs.

    Raises:
        ImportError: submitit is missing; the message says which extra has it.
        ConfigError: an option that submitit does not take, or no SLURM on this machine.
    """
    submitit = _submitit()
    home = SweepDir(workdir)
    home.start(sweep)
    missing = [p for p in sweep.runs(points).values() if not home.finished(p.key)]
    groups = [[point.key for point in group] for group in groups_of(missing, size)]
    if not groups:
        return []
    given = {"name": f"sweep-{sweep.name}".replace(":", "-")} | dict(options or {})
    cluster = given.pop("cluster", "slurm")
    folder = home.path.absolute() / "slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**given)
    except (RuntimeError, NameError, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"--slurm: {' '.join(str(error).split())}") from error
    # Only strings and numbers go into the job: it reads the sweep's file again.
    job = _Job(sweep.source, sweep.overrides, os.fspath(home.path.absolute()), size)
    return executor.map_array(job, groups)


def _submitit() -> Any:
    """The package. Its import would close the log handlers of this process, unless told not to."""
    level = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"
    try:
        import submitit
    except ImportError as error:
        raise ImportError("--slurm: install the extra, sotalign-jax[slurm]") from error
    finally:
        del os.environ["SUBMITIT_LOG_LEVEL"]  # jobs inherit the rest
        if level is not None:
            os.environ["SUBMITIT_LOG_LEVEL"] = level
    return submitit


def parse_options(given: Sequence[str]) -> dict[str, Any]:
    """``["timeout_min=600", "slurm_partition=gpu"]`` as a dict, numbers as numbers.

    Raises:
        ConfigError: one that is not NAME=VALUE.
    """
    options = {}
    for one in given:
        name, equals, text = one.partition("=")
        if not name or not equals:
            raise ConfigError(f"--slurm_options: {one!r}: must be NAME=VALUE, with commas between")
        try:
            options[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[name] = text
    return options


class _Job:
    """What a job does; submitit keeps it in a file, and calls it again after a preemption."""

    def __init__(self, source: str, overrides: Mapping[str, Any], workdir: str, size: int):
        self._source, self._overrides = source, dict(overrides)
        self._workdir, self._size = workdir, size

    def __call__(self, keys: list[str]) -> list[str]:
        distributed.start()
        sweep = load_sweep(self._source, self._overrides)
        home = SweepDir(self._workdir)
        outcome = run_sweep(sweep, home.path, points=keys, size=self._size, wait=False)
        if jax.process_index() == 0 and home.complete(sweep):
            write_tables(sweep, home)
        if outcome.failed:
            raise RuntimeError("; ".join(f"{k}: {why}" for k, why in outcome.failed.items()))
        return outcome.finished

    def checkpoint(self, keys: list[str]) -> Any:
        """What submitit queues in place of a job that is out of time: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, keys)
