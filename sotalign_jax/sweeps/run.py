"""Run the points of a sweep: once each, in groups, beside other processes, again after any end."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console

from sotalign_jax.config import ConfigError
from sotalign_jax.sweeps.points import Point, Sweep, SweepDir
from sotalign_jax.training.build import InputCache, inputs_key
from sotalign_jax.training.distributed import (
    Preempted,
    PreemptionWatch,
    from_first,
    together,
)
from sotalign_jax.training.many import together_key, train_many
from sotalign_jax.training.metrics import make_console
from sotalign_jax.training.workdir import InUse, lock, write_json

__all__ = ["Outcome", "SweepStopped", "groups_of", "run_sweep"]

# What may be wrong with one point and no other; anything else ends the sweep.
_FAILURES = (ValueError, FloatingPointError, OSError, jax.errors.JaxRuntimeError)
# Seconds between looks at points that other processes are at work on.
_PATIENCE = (0.2, 5.0)
# Seconds until such points are left to them: a look of `status` holds a point's lock for a moment.
_GRACE = 1.0


class Outcome(NamedTuple):
    """What came of the runs that were asked for.

    Attributes:
        finished: their keys.
        failed: key to message.
        left: keys of those that other processes are at work on.
    """

    finished: list[str]
    failed: dict[str, str]
    left: list[str]


class SweepStopped(Preempted):
    """A sweep stopped because of SIGTERM; started again it goes on."""

    def __init__(self, finished: int, of: int):
        Exception.__init__(
            self, f"stopped by SIGTERM with {finished} of {of} runs done; the same command goes on"
        )


def run_sweep(
    sweep: Sweep,
    workdir: str | os.PathLike,
    *,
    points: Sequence[str] = (),
    shard: tuple[int, int] = (1, 1),
    size: int = 8,
    wait: bool = True,
    console: Console | None = None,
) -> Outcome:
    """Runs the points of a sweep that are not finished; given the same directory, it goes on.

    Each point is a run of `train` in ``DIR/points/KEY``. Any number of processes may share a
    directory: each point is run by one of them. A point that fails is reported, its error kept in
    ``DIR/points/KEY.failed.json``, and the others go on; the next call tries it again.

    Args:
        sweep: of `load_sweep`.
        workdir: the directory of the sweep.
        points: numbers or keys of those to run; none: all.
        shard: ``(i, n)``: only every n-th group of points, from the i-th (counted from 1) on.
        size: the largest group.
        wait: where other processes are at work on points, wait until those are finished, or take
            them over should their process end; otherwise leave them.
        console: where to report; standard output by default.

    Returns:
        What is finished, what failed and what was left to others.

    Raises:
        ConfigError: a directory that cannot be used, points or a shard that do not exist.
        SweepStopped: SIGTERM came; the same call goes on.
        OSError: the sweep's own files cannot be written.
    """
    if size < 1:
        raise ConfigError(f"together: must be at least 1, got {size}")
    if not 1 <= shard[0] <= shard[1]:
        raise ConfigError(f"shard: must be i/n with 1 <= i <= n, got {shard[0]}/{shard[1]}")
    first = jax.process_index() == 0
    console = (console or make_console()) if first else Console(quiet=True)
    home = SweepDir(workdir)
    runs = sweep.runs(points)
    # Over all of them, finished or not, so that the shards of one sweep never overlap.
    groups = groups_of(list(runs.values()), size)[shard[0] - 1 :: shard[1]]
    together(lambda: home.start(sweep) if first else home.check(sweep))
    with PreemptionWatch() as watch:
        return _Runner(home, groups, console, watch).run(wait)


def groups_of(points: Sequence[Point], size: int) -> list[list[Point]]:
    """Points that may run together, in groups of at most ``size``.

    Those with the same rows and teacher stand next to each other: a group shares what it can.
    """
    alike: dict[str, list[Point]] = {}
    inputs: dict[str, int] = {}
    for point in points:
        inputs.setdefault(inputs_key(point.config), len(inputs))
        alike.setdefault(together_key(point.config), []).append(point)
    for members in alike.values():
        members.sort(key=lambda point: inputs[inputs_key(point.config)])
    return [
        members[start : start + size]
        for members in alike.values()
        for start in range(0, len(members), size)
    ]


class _Runner:
    def __init__(
        self,
        home: SweepDir,
        groups: list[list[Point]],
        console: Console,
        watch: PreemptionWatch,
    ):
        self._home, self._groups, self._console, self._watch = home, groups, console, watch
        everyone = sorted((p for group in groups for p in group), key=lambda p: p.number)
        self._points = {point.key: point for point in everyone}
        self._inputs = InputCache(keep=max(map(len, groups), default=1))
        # Failures of earlier starts are tried again; those that appear from now on are others'.
        self._old = {key: self._stamp(key) for key in self._points}

    def run(self, wait: bool) -> Outcome:
        before = from_first(lambda: [k for k in self._points if self._home.finished(k)])
        self._console.print(
            f"{len(self._points)} runs"
            + (f", {len(before)} of them finished before" if before else ""),
            highlight=False,
        )
        groups, pause, waited = self._groups, _PATIENCE[0], 0.0
        while groups:
            left = [busy for group in groups if (busy := self._group(group))]
            if not left or (not wait and waited >= _GRACE):
                groups = left
                break
            if sum(map(len, left)) < sum(map(len, groups)):
                pause = _PATIENCE[0]
            else:
                time.sleep(pause)
                waited += pause
                pause = min(2 * pause, _PATIENCE[1])
            groups = left
        return Outcome(*from_first(self._outcome))

    def _outcome(self) -> tuple[list[str], dict[str, str], list[str]]:
        finished = [key for key in self._points if self._home.finished(key)]
        failed = {
            key: self._home.why_failed(key)
            for key in self._points
            if key not in finished and self._settled(key)
        }
        left = [key for key in self._points if key not in finished and key not in failed]
        return finished, failed, left

    def _group(self, group: list[Point]) -> list[Point]:
        """Runs what nobody else has run or is running of a group; returns what others run."""
        if self._watch.agreed(0):
            raise self._stopped()
        with contextlib.ExitStack() as claims:
            mine = from_first(lambda: self._claim(group, claims))
            try:
                self._run_group([self._points[key] for key in mine])
            except Preempted:
                raise self._stopped() from None
        settled = from_first(lambda: [p.key for p in group if self._settled(p.key)])
        return [point for point in group if point.key not in settled]

    def _claim(self, group: list[Point], claims: contextlib.ExitStack) -> list[str]:
        """Keys of the points of a group that are to be run here, now locked."""
        mine = []
        for point in group:
            if not self._settled(point.key):
                free = claims.enter_context(lock(self._home.lock(point.key)))
                if free and not self._settled(point.key):  # it may have been until a moment ago
                    mine.append(point.key)
        return mine

    def _settled(self, key: str) -> bool:
        """Finished, or failed since this start."""
        return self._home.finished(key) or self._stamp(key) not in (None, self._old[key])

    def _stamp(self, key: str) -> int | None:
        """When a failure was written; None without one."""
        try:
            return self._home.failure(key).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _run_group(self, members: list[Point]) -> None:
        """Trains points side by side; one by one where that fails, to find out which ones fail."""
        ready = []
        for point in members:
            try:
                ready.append((point, self._inputs.get(point.config)))
            except _FAILURES as error:
                self._failed(point, error)
        left = [point for point, _ in ready]
        if not ready:
            return

        def done(number: int, found: dict[str, Any] | FloatingPointError) -> None:
            point = ready[number][0]
            left.remove(point)
            if isinstance(found, FloatingPointError):
                self._failed(point, found)
            else:
                self._finished(point, found)

        try:
            train_many(
                [point.config for point, _ in ready],
                [self._home.run(point.key) for point, _ in ready],
                quiet=True,
                inputs=[inputs for _, inputs in ready],
                watch=self._watch,
                on_done=done,
            )
        except _FAILURES as error:
            if len(ready) > 1:
                for point in left.copy():
                    self._run_group([point])
            elif isinstance(error, InUse):
                pass  # somebody trains in this very directory, outside of the sweep
            elif jax.process_count() > 1 and not isinstance(error, ValueError):
                raise  # the other processes may know nothing of it
            else:
                self._failed(ready[0][0], error)

    def _finished(self, point: Point, results: dict[str, Any]) -> None:
        if jax.process_index() != 0:
            return
        self._home.failure(point.key).unlink(missing_ok=True)
        done = sum(self._home.finished(key) for key in self._points)
        scores = "  ".join(
            f"{name} R@1 {100 * results[name]['mean_recall@1']:5.1f} "
            f"R@10 {100 * results[name]['mean_recall@10']:5.1f}"
            for name in ("val", "test")
            if name in results
        )
        self._console.print(
            f"{done} of {len(self._points)}  {point.title}  {scores}  ({results['seconds']:.0f} s)",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def _failed(self, point: Point, error: Exception) -> None:
        if jax.process_index() != 0:
            return
        message = " ".join(str(error).split()) or type(error).__name__
        write_json(
            self._home.failure(point.key),
            {
                "point": point.title,
                "error": type(error).__name__,
                "message": message,
                "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "traceback": traceback.format_exception(error),
            },
        )
        self._console.print(
            f"failed  {point.title}  {message}", highlight=False, markup=False, soft_wrap=True
        )

    def _stopped(self) -> SweepStopped:
        done = from_first(lambda: sum(self._home.finished(key) for key in self._points))
        return SweepStopped(done, len(self._points))
