"""What ``sotalign sweep run | status | table | plot`` do, and their flags."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sotalign_jax.config import ConfigError
from sotalign_jax.sweeps import plot as drawing
from sotalign_jax.sweeps import table as formats
from sotalign_jax.sweeps.layout import collect
from sotalign_jax.sweeps.points import Sweep, SweepDir, load_sweep
from sotalign_jax.sweeps.run import run_sweep
from sotalign_jax.sweeps.submit import parse_options, submit
from sotalign_jax.training import distributed
from sotalign_jax.training.metrics import make_console

__all__ = ["WORDS", "plot", "run", "status", "sweep", "table", "with_config_flag"]

_POINT = flags.DEFINE_list("point", [], "Numbers or keys of the points of a sweep to run.")
_SHARD = flags.DEFINE_string("shard", "1/1", "i/n: every n-th group of points, from the i-th on.")
_TOGETHER = flags.DEFINE_integer("together", 8, "Most points of a sweep that are run together.")
_PRINT = flags.DEFINE_bool("print", False, "Run nothing; print a command a point.")
_SLURM = flags.DEFINE_bool("slurm", False, "Run nothing here; submit jobs.")
_OPTIONS = flags.DEFINE_list("slurm_options", [], "NAME=VALUE of submitit, with commas between.")
_PAPER = flags.DEFINE_bool("paper", False, "Show the published figures beside ours.")

_LEFT = 75  # EX_TEMPFAIL of sysexits.h
_VERBS = ("run", "status", "table", "plot")


def with_config_flag(argv: list[str]) -> list[str]:
    """The command line with the file of ``sotalign sweep VERB FILE.py`` as ``--config``."""
    if argv[1:2] == ["sweep"] and len(argv) > 3 and not argv[3].startswith("-"):
        return [*argv[:3], f"--config={argv[3]}", *argv[4:]]
    return argv


def sweep(words: Sequence[str]) -> int:
    """The command by its flags; the exit status."""
    if len(words) != 1 or words[0] not in _VERBS:
        raise ConfigError(f"write sotalign sweep {'|'.join(_VERBS)} FILE.py --workdir=DIR")
    verb, workdir = words[0], flags.FLAGS.workdir
    if flags.FLAGS.config is None:
        raise ConfigError(f"give the sweep's file, as in sotalign sweep {verb} FILE.py")
    if workdir is None:
        raise ConfigError("--workdir: this command needs it")
    source = config_flags.get_config_filename(flags.FLAGS["config"])
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    trains = verb == "run" and not _PRINT.value and not _SLURM.value
    if not trains and (other := distributed.left_to_first()):
        print(f"sotalign sweep: left to process 0 of {other.process_count} ({other.method})")
        return 0
    if verb != "run":
        # What was set beside the file when it was run, unless something else is set now.
        overrides = overrides or SweepDir(workdir).recorded()["overrides"]
    loaded = load_sweep(source, overrides)
    if verb == "status":
        status(loaded, workdir)
    elif verb == "table":
        table(loaded, workdir, paper=_PAPER.value)
    elif verb == "plot":
        plot(loaded, workdir)
    elif _PRINT.value:
        print("\n".join(commands_of(loaded, workdir, _POINT.value)))
    elif _SLURM.value:
        return _submit(loaded, workdir)
    else:
        return run(loaded, workdir, _POINT.value, _SHARD.value, _TOGETHER.value)
    return 0


def run(
    sweep: Sweep,
    workdir: str,
    points: Sequence[str] = (),
    shard: str = "1/1",
    together: int = 8,
    console: Console | None = None,
) -> int:
    """Run what is not finished; the table, once everything is.

    The exit status: 1 of failures, 75 (try again later) where points were left to others.
    """
    part, slash, parts = shard.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal()):
        raise ConfigError(f"--shard: must be i/n, as in 1/4, got {shard!r}")
    first = distributed.start().process_index == 0
    console = console or make_console()
    outcome = run_sweep(
        sweep,
        workdir,
        points=points,
        shard=(int(part), int(parts)),
        size=together,
        wait=not points,
        console=console,
    )
    status = 1 if outcome.failed else _LEFT if outcome.left else 0
    if not first:
        return status
    home = SweepDir(workdir)
    if home.complete(sweep):
        table(sweep, workdir, console=console)
    for text, keys in _by_message(outcome.failed).items():
        numbers = [str(p.number) for p in sweep.points if p.key in keys]
        _say(console, f"failed: point {', '.join(numbers)} ({', '.join(keys)}): {text}")
    if outcome.left:
        _say(console, f"left to other processes: {', '.join(outcome.left)}")
    return status


def status(sweep: Sweep, workdir: str, console: Console | None = None) -> dict[str, int]:
    """How far each point is, and how many are in which state."""
    console = console or make_console()
    home = SweepDir(workdir)
    home.recorded()
    home.check(sweep)
    shown = Table(title=escape(f"{sweep.name} in {workdir}"), title_justify="left")
    for name in ("", "key", "point", "state", "step", "val", "test"):
        shown.add_column(name, justify="right" if name in ("", "step", "val", "test") else "left")
    counts: dict[str, int] = {}
    for point in sweep.points:
        state = home.state(point.key)
        results = home.results(point.key) or {}
        scores = [
            f"{100 * results[part]['mean_recall@1']:.1f}" if part in results else ""
            for part in ("val", "test")
        ]
        done = f"{home.step(point.key)}/{point.config.steps}" if state != "waiting" else ""
        shown.add_row(str(point.number), point.key, escape(point.title), state, done, *scores)
    for key in sweep.runs():
        counts[home.state(key)] = counts.get(home.state(key), 0) + 1
    shown.caption = "val, test: mean recall@1 in percent"
    console.print(shown)
    total = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    _say(console, f"{len(sweep.runs())} runs: {total}")
    for text, keys in _by_message(
        {k: home.why_failed(k) for k in sweep.runs() if home.failed(k)}
    ).items():
        _say(console, f"failed: {', '.join(keys)}: {text}")
    if earlier := home.recorded()["earlier"]:
        _say(console, f"{len(earlier)} earlier points are not in the file any more")
    return counts


def table(
    sweep: Sweep, workdir: str, *, paper: bool = False, console: Console | None = None
) -> list[Path]:
    """Print the table and write it as ``table.md``, ``table.tex`` and ``table.csv``."""
    console = console or make_console()
    home = SweepDir(workdir)
    home.recorded()
    grid, paths = formats.write_tables(sweep, home, paper=paper)
    console.print(formats.to_console(grid, paper=paper))
    for note in formats.notes(grid, paper=paper):
        _say(console, note)
    _say(console, f"written: {', '.join(map(str, paths))}")
    return paths


def plot(sweep: Sweep, workdir: str, console: Console | None = None) -> list[Path]:
    """Draw the plot of a sweep."""
    layout = sweep.layout
    if not layout.plot:
        raise ConfigError("get_table: has no plot; give {'plot': {'x': FIELD}}")
    home = SweepDir(workdir)
    home.check(sweep)
    home.recorded()
    field = layout.plot["x"]
    metric = layout.plot.get("metric", layout.metrics[-1])
    grid = collect(
        layout,
        sweep.points,
        home.results,
        home.failed,
        rows=layout.lines,
        columns=(field,),
        metrics=(metric,),
    )
    paths = drawing.draw(grid, metric, field, home.path)
    _say(console or make_console(), f"written: {', '.join(map(str, paths))}")
    return paths


def commands_of(sweep: Sweep, workdir: str, points: Sequence[str] = ()) -> list[str]:
    """A shell command for every point that is not finished."""
    home = SweepDir(workdir)
    home.check(sweep)
    place = [f"--workdir={home.path.absolute()}"]
    fields = [f"--config.{name}={value}" for name, value in sweep.overrides.items()]
    # Paths in a configuration may be relative: they are those of this directory.
    there = f"cd {shlex.quote(os.getcwd())} && "
    command = ["sotalign", "sweep", "run", sweep.source, *place, *fields]
    return [
        there + shlex.join([*command, f"--point={key}"])
        for key in sweep.runs(points)
        if not home.finished(key)
    ]


def _submit(sweep: Sweep, workdir: str) -> int:
    console = make_console()
    jobs = submit(
        sweep,
        workdir,
        points=_POINT.value,
        size=_TOGETHER.value,
        options=parse_options(_OPTIONS.value),
    )
    if not jobs:
        _say(console, "nothing to submit, all runs are finished")
    for job in jobs:
        _say(console, f"submitted: job {job.job_id}")
    return 0


def _by_message(failed: Mapping[str, str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for key, message in failed.items():
        grouped.setdefault(message, []).append(key)
    return grouped


def _say(console: Console, text: Any) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


# By the command's name, for `main`.
WORDS = {"sweep": sweep}
