"""The points of a sweep as an array of jobs of SLURM, through submitit."""

from __future__ import annotations

import ast
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from sotalign_jax.config import ConfigError
from sotalign_jax.sweeps.points import Sweep, SweepDir, load_sweep
from sotalign_jax.sweeps.run import SweepStopped, groups_of, run_sweep
from sotalign_jax.sweeps.table import write_tables
from sotalign_jax.training import distributed

__all__ = ["parse_options", "submit"]

# How often a job that is out of time is queued again, unless the options say otherwise.
_TIMEOUTS = 1_000


def submit(
    sweep: Sweep,
    workdir: str | os.PathLike,
    *,
    points: Sequence[str] = (),
    size: int = 8,
    options: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Submits the unfinished points of a sweep, a job of the array a group of points.

    A job that is preempted or out of time saves what it is at work on, is queued again and goes on;
    logs are in ``DIR/slurm``. A job waits for points of its own that another process is at work on.

    Args:
        sweep: of `load_sweep`.
        workdir: the directory of the sweep.
        points: numbers or keys of those to run; none: all.
        size: the largest group.
        options: of submitit, as ``{"timeout_min": 600, "slurm_partition": "gpu"}``; and
            ``"cluster"``, ``"slurm"`` unless given (``"local"``: processes of this machine). The
            time limit must be among them: submitit's own is five minutes. A job may run out of
            time a thousand times, unless ``"slurm_max_num_timeout"`` says otherwise.

    Returns:
        submitit's jobs.

    Raises:
        ImportError: submitit is missing; the message says which extra has it.
        ConfigError: no time limit, an option that submitit or SLURM does not take, or no SLURM on
            this machine.
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
    limit = given.get(f"{cluster}_time", given.get("timeout_min"))
    if not isinstance(limit, int):
        raise ConfigError(
            f"--slurm_options: timeout_min: must be the longest time of a job in minutes, as "
            f"timeout_min=600 (what is not finished by then is queued again), got {limit!r}"
        )
    times = {name: given.pop(name, _TIMEOUTS) for name in [f"{cluster}_max_num_timeout"]}
    folder = home.path.absolute() / "slurm"
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **times)
        executor.update_parameters(**given)
        # Only strings and numbers go into the job: it reads the sweep's file again.
        job = _Job(sweep.source, sweep.overrides, os.fspath(home.path.absolute()), size)
        return executor.map_array(job, groups)
    # What sbatch refuses is a RuntimeError of submitit.
    except (RuntimeError, NameError, AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"--slurm: {' '.join(str(error).split())}") from error


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
        again = _queue_again()
        distributed.start()
        sweep = load_sweep(self._source, self._overrides)
        home = SweepDir(self._workdir)
        known = sweep.runs()
        if gone := [key for key in keys if key not in known]:
            print(f"not run, the file has them no more: {', '.join(gone)}", flush=True)
        keys = [key for key in keys if key in known]
        if not keys:  # none would mean all
            return []
        try:
            outcome = run_sweep(sweep, home.path, points=keys, size=self._size)
        except SweepStopped:
            again()
            return []  # only in tasks but the first, which alone queues the job and ends here
        if jax.process_index() == 0 and home.complete(sweep):
            write_tables(sweep, home)
        if outcome.failed:
            raise RuntimeError("; ".join(f"{k}: {why}" for k, why in outcome.failed.items()))
        return outcome.finished

    def checkpoint(self, keys: list[str]) -> Any:
        """What submitit queues in place of a job that is out of time: the same again."""
        import submitit

        return submitit.helpers.DelayedSubmission(self, keys)


def _queue_again() -> Callable[[], None]:
    """Lets SIGTERM and the signal of submitit (a time limit that is near) come to one thing.

    While points are run both save first, see `PreemptionWatch`; at any other time they queue the
    job again at once. By itself submitit ignores SIGTERM, and saves nothing at its own signal.

    Returns:
        What queues the job again and ends this process.
    """
    number = _submitit().JobEnvironment()._usr_sig()
    handler = signal.getsignal(number)

    def again(*_: Any) -> None:
        if callable(handler):
            handler(number, None)

    signal.signal(signal.SIGTERM, again)
    signal.signal(number, lambda *_: signal.raise_signal(signal.SIGTERM))
    return again
