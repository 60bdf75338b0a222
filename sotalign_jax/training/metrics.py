"""Where the numbers of a run go: one JSON line a record, optional sinks, and a bar to watch."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sotalign_jax.config import Config
from sotalign_jax.files import replace_text

__all__ = ["MetricWriter", "ProgressBar", "make_console", "make_sinks"]


@runtime_checkable
class Sink(Protocol):
    """A further place for metrics."""

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def make_console() -> Console:
    """Standard output; where that is a file or a pipe, wide enough for every table."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


class MetricWriter:
    """Appends records to a JSON-lines file and passes them on to sinks.

    Args:
        path: the file. Records of steps after ``resume_from`` are dropped, since those steps will
            be done again, and so is a last line that was cut off.
        resume_from: the step that training goes on from; 0 begins anew.
        sinks: further places.
    """

    def __init__(self, path: Path, resume_from: int = 0, sinks: tuple[Sink, ...] = ()):
        self._sinks = sinks
        kept = [line for line, step in _records(path) if step <= resume_from]
        replace_text(path, "".join(kept))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One record; it is on disk when this returns."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        """Close the file and the sinks."""
        self._file.close()
        for sink in self._sinks:
            sink.close()


def _records(path: Path) -> list[tuple[str, int]]:
    """Whole lines of a metrics file with their steps."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            records.append((line.rstrip("\n") + "\n", json.loads(line)["step"]))
        except (json.JSONDecodeError, KeyError):
            continue  # cut off by a kill in the middle of a write
    return records


def make_sinks(config: Config, workdir: Path) -> tuple[Sink, ...]:
    """The sinks that a configuration asks for.

    Raises:
        ImportError: the package of a sink is missing; the message says which extra has it.
    """
    sinks: list[Sink] = []
    if config.metrics.tensorboard:
        sinks.append(_TensorBoard(workdir / "tensorboard"))
    if config.metrics.wandb:
        sinks.append(_WandB(config.metrics.wandb, workdir, json.loads(config.to_json())))
    return tuple(sinks)


class _TensorBoard:
    def __init__(self, directory: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "config.metrics.tensorboard: install the extra, sotalign-jax[tensorboard]"
            ) from error
        self._writer = SummaryWriter(str(directory))

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, project: str, workdir: Path, config: dict[str, Any]):
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "config.metrics.wandb: install the extra, sotalign-jax[wandb]"
            ) from error
        self._run = wandb.init(
            project=project,
            name=workdir.name,
            dir=str(workdir),
            id=_run_id(workdir),
            resume="allow",
            config=config,
            # Runs that are trained together are open together; by default, all would be the first.
            reinit="create_new",
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)

    def close(self) -> None:
        self._run.finish()


def _run_id(workdir: Path) -> str:
    """One id a workdir, so that a resumed run goes on in its own curves, wherever it was moved.

    The directory's name would not do: every method of a comparison has a ``seed_0``.
    """
    file = workdir / "wandb_id"
    if not file.exists():
        replace_text(file, uuid.uuid4().hex[:16])
    return file.read_text(encoding="utf-8")


class ProgressBar:
    """A live bar on a terminal; elsewhere (a log file, a scheduler) a line from time to time.

    Args:
        console: where to draw.
        total: steps of the run.
        done: steps done before this start.
        unit: what is counted.
        quiet: draw nothing.
    """

    def __init__(
        self,
        console: Console,
        total: int,
        done: int,
        *,
        unit: str = "step",
        quiet: bool = False,
    ):
        self._console, self._total, self._unit, self._quiet = console, total, unit, quiet
        self._next_line = done
        self._bar = None
        if console.is_terminal and not quiet:
            self._bar = Progress(
                TextColumn(unit),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[status]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("train", total=total, completed=done, status="")
            self._bar.start()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show the state of the run at ``step``."""
        status = "  ".join(
            f"{label} {metrics[name]:{form}}"
            for name, label, form in (
                ("train/loss", "loss", ".4g"),
                ("train/siglip", "siglip", ".4g"),
                ("train/klot", "klot", ".4g"),
                ("train/student_marginal_error", "err", ".0e"),
                ("train/teacher_marginal_error", "err*", ".0e"),
                ("time/rows_per_second", "rows/s", ",.0f"),
            )
            if name in metrics
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif not self._quiet and (step >= self._next_line or step == self._total):
            self._console.print(
                f"{self._unit} {step}/{self._total}  {status}".rstrip(), highlight=False
            )
            self._next_line = step + self._total // 10

    def close(self) -> None:
        """Leave the bar as it is and free the terminal."""
        if self._bar is not None:
            self._bar.stop()
