"""What one run leaves in its directory: metrics and checkpoints on the way, results at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from sotalign_jax.config import Config
from sotalign_jax.features import FeatureTable, Pairs
from sotalign_jax.fitted import FittedAligner
from sotalign_jax.models import Aligner
from sotalign_jax.objectives import OBJECTIVES
from sotalign_jax.training.build import Inputs
from sotalign_jax.training.checkpoints import Checkpoints
from sotalign_jax.training.devices import local_copy
from sotalign_jax.training.distributed import broadcast, from_first, together
from sotalign_jax.training.evaluate import evaluate
from sotalign_jax.training.metrics import MetricWriter, ProgressBar, make_sinks
from sotalign_jax.training.step import Setup, TrainState, Variables
from sotalign_jax.training.workdir import Workdir, write_json

__all__ = ["Record", "checked_means", "evaluate_teacher", "write_results"]

Scores = dict[str, dict[str, float]]

_MANIFEST = ("encoder", "pooling", "normalized", "source", "licence")


class Record:
    """The record of one run, from where an earlier start left it.

    Args:
        config: of the run, validated.
        home: its directory, locked.
        inputs: its rows and teacher.
        setup: of the run.
        rest: the aligner's variables that are not trained.

    Attributes:
        start: the step that training goes on from; 0 for a new run.
    """

    def __init__(self, config: Config, home: Workdir, inputs: Inputs, setup: Setup, rest: Any):
        self._config, self._home, self._inputs = config, home, inputs
        self._setup, self._rest = setup, rest
        self._keep_best = config.select == "best"
        self._checkpoints: Any = None
        self._closed = False
        self.start: int = 0
        # A directory that was not started has no checkpoints, and stays empty until it is.
        if from_first(lambda: home.started):
            self._find_checkpoints()
            self.start = from_first(lambda: self._checkpoints.latest) or 0
        self._writer: MetricWriter | None = None

    def _find_checkpoints(self) -> None:
        self._checkpoints = Checkpoints(self._home.checkpoints, keep_best=self._keep_best)

    def restore(self, like: TrainState) -> TrainState:
        """The state to go on from: that of `start`, or ``like`` for a new run."""
        return self._checkpoints.restore(like, self.start) if self.start else like

    def open(self, console: Console, *, quiet: bool) -> None:
        """Get ready for what is to come, once the directory is started.

        Process 0 of several writes and reports.
        """
        if self._checkpoints is None:
            self._find_checkpoints()
        first = jax.process_index() == 0
        self._writer = together(
            lambda: (
                MetricWriter(
                    self._home.metrics, self.start, make_sinks(self._config, self._home.path)
                )
                if first
                else None
            )
        )
        self._bar = ProgressBar(console, self._config.steps, self.start, quiet=quiet)
        self._clock = _Clock(self.start, sum(stream.size for stream in self._setup.streams))

    def take(self, state: Callable[[], TrainState], step: int, metrics: Any) -> None:
        """What a dispatch brought: written, and validated and saved where that is due.

        Args:
            state: returns that after the dispatch; called where it is needed.
            step: steps done.
            metrics: of each step of the dispatch.

        Raises:
            FloatingPointError: as `checked_means`.
            OSError: an earlier checkpoint could not be written.
        """
        config = self._config
        record = checked_means(metrics, step) | self._clock.tick(step)
        final = step == config.steps
        save = final or _due(step, config.checkpoint_every)
        val = self._inputs.splits.val
        due = final or _due(step, config.eval_every) or (save and self._keep_best)
        if val is not None and due:
            scores = evaluate(self.aligner(state()), val)
            # Those of process 0, since all must select the same checkpoint.
            (values,) = broadcast([np.array(list(scores.values()), np.float64)], 0)
            record |= {f"val/{k}": float(v) for k, v in zip(scores, values, strict=True)}
        if self._writer is not None:
            self._writer.write(step, record)
        self._bar.update(step, record)
        if save:
            self._checkpoints.save(state(), record.get(f"val/{config.select_metric}"))

    def save(self, state: TrainState) -> None:
        """A checkpoint to go on from, and for nothing else: without a metric.

        Where no checkpoint was due none may be selected, or the outcome would depend on the
        interruption.
        """
        self._checkpoints.save(state)

    def close(self) -> None:
        """Wait for what is being written, and close files and sinks."""
        if self._writer is not None:
            self._bar.close()
            self._writer.close()
            self._writer = None
        if self._checkpoints is not None and not self._closed:
            self._closed = True
            self._checkpoints.close()

    def aligner(self, state: TrainState) -> Aligner:
        """The aligner of this process, of parameters that may be spread over several."""
        return merge(self._setup, state.params, self._rest)

    def finish(
        self, state: TrainState, teacher_scores: Scores, began: float, *, together: int = 1
    ) -> dict[str, Any]:
        """Select, save and evaluate the aligner; ``results.json`` is written last.

        Args:
            state: after the last step.
            teacher_scores: of `evaluate_teacher`.
            began: when the run was started, by `time.perf_counter`.
            together: how many runs were trained since then, of whose time it has its share.

        Returns:
            What ``results.json`` holds.
        """
        config, home = self._config, self._home
        selected = config.steps
        best = from_first(lambda: self._checkpoints.best) if self._keep_best else None
        if best is not None:
            selected, state = best, self._checkpoints.restore(state, best)
        aligner = self.aligner(state)
        prior = OBJECTIVES[config.objective].prior
        aligner.training_prior = prior(self._setup.loss, *self._setup.sizes)
        return write_results(
            config, home, self._inputs, aligner, selected, teacher_scores, began, runs=together
        )


def write_results(
    config: Config,
    home: Workdir,
    inputs: Inputs,
    aligner: Aligner | FittedAligner,
    step: int,
    teacher_scores: Scores,
    began: float,
    *,
    runs: int = 1,
) -> dict[str, Any]:
    """Save an aligner and its teacher, and evaluate it; ``results.json`` is written last.

    Args:
        config: of the run.
        home: its directory.
        inputs: its rows and teacher.
        aligner: what came of it.
        step: how many steps it took.
        teacher_scores: of `evaluate_teacher`.
        began: when the run was started, by `time.perf_counter`.
        runs: how many were trained since then; ``seconds`` is the share of one.

    Returns:
        What ``results.json`` holds.
    """
    splits, teacher = inputs
    results: dict[str, Any] = {"selected_step": step, "pairs": len(splits.pairs)}
    for name, pairs in _held_out(inputs):
        results[name] = evaluate(aligner, pairs)
        results[f"teacher_{name}"] = teacher_scores[name]
    results["seconds"] = round((time.perf_counter() - began) / runs, 3)

    def write() -> None:
        if jax.process_index() == 0:
            description = {
                "data": splits.description,
                "features": {
                    "image": _described(splits.pairs.image),
                    "text": _described(splits.pairs.text),
                },
                "config": json.loads(config.to_json()),
            }
            aligner.save(home.aligner, metadata=description | {"step": step})
            Aligner.from_teacher(teacher).save(home.teacher, metadata=description)
            write_json(home.results, results)

    together(write)
    return from_first(lambda: results)


def _described(table: FeatureTable) -> dict[str, Any]:
    """What is known of features, for whoever is to make more of them."""
    manifest = table.manifest
    known = {name: getattr(manifest, name) for name in _MANIFEST}
    return {name: value for name, value in known.items() if value not in ("", None)} | {
        "dim": table.dim
    }


def _held_out(inputs: Inputs) -> list[tuple[str, Pairs]]:
    splits = inputs.splits
    return [(name, p) for name, p in (("val", splits.val), ("test", splits.test)) if p is not None]


def evaluate_teacher(inputs: Inputs) -> Scores:
    """Retrieval of the teacher itself on the held-out pairs, by their name."""
    teacher = Aligner.from_teacher(inputs.teacher)
    return {name: evaluate(teacher, pairs) for name, pairs in _held_out(inputs)}


def merge(setup: Setup, params: Variables, rest: Variables) -> Aligner:
    """The aligner of this process, of parameters that may be spread over several."""
    return nnx.merge(setup.graph, local_copy(params), rest)


def checked_means(metrics: Any, step: int) -> dict[str, float]:
    """Means over the steps of a dispatch (maxima of errors), once the loss is known to be finite.

    Raises:
        FloatingPointError: naming the first step whose loss, gradient or outcome is not finite.
    """
    values = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
    for name in ("train/loss", "train/gradient_norm", "train/parameter_norm"):
        bad = np.flatnonzero(~np.isfinite(values[name]))
        if bad.size:
            first = step - len(values[name]) + int(bad[0]) + 1
            raise FloatingPointError(
                f"{name} is {values[name][bad[0]]} at step {first}; checkpoints before it are "
                "intact. Try a lower optimizer.learning_rate or a higher loss.epsilon"
            )
    return {
        name: float(np.max(value) if name.endswith("_error") else np.mean(value))
        for name, value in values.items()
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Clock:
    """Steps and rows a second since the last tick; the first tick includes compilation."""

    def __init__(self, step: int, rows_a_step: int):
        self._step, self._rows, self._time = step, rows_a_step, time.perf_counter()

    def tick(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        steps, seconds = step - self._step, now - self._time
        self._step, self._time = step, now
        return {
            "time/steps_per_second": steps / seconds,
            "time/rows_per_second": steps * self._rows / seconds,
        }
