"""Train an aligner: from a configuration and a directory to a saved model and its retrieval."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from sotalign_jax.config import Config, ConfigError, validate
from sotalign_jax.features import FeatureTable, Splits
from sotalign_jax.features.batches import Batch, Stream, stream_batches
from sotalign_jax.models import Aligner, LayerConfig
from sotalign_jax.objectives import OBJECTIVES, loss_settings
from sotalign_jax.objectives.base import Reads
from sotalign_jax.teachers import LinearTeacher
from sotalign_jax.training.checkpoints import Checkpoints
from sotalign_jax.training.data import fit_teacher, load_splits
from sotalign_jax.training.devices import (
    AXIS,
    local_copy,
    make_mesh,
    padded,
    place_batch,
    place_table,
    replicate,
    share,
)
from sotalign_jax.training.distributed import (
    Preempted,
    PreemptionWatch,
    broadcast,
    from_first,
    together,
)
from sotalign_jax.training.evaluate import evaluate
from sotalign_jax.training.metrics import MetricWriter, ProgressBar, make_console, make_sinks
from sotalign_jax.training.step import (
    OptimizerSettings,
    Setup,
    TrainState,
    Variables,
    init_state,
    place_state,
    prepare,
    run_resident,
    run_streamed,
)
from sotalign_jax.training.workdir import Workdir, read_json, write_json

__all__ = ["Inputs", "init_aligner", "load_inputs", "train"]


class Inputs(NamedTuple):
    """What a run reads: a function of ``config.data``, ``config.teacher`` and ``config.seed``."""

    splits: Splits
    teacher: LinearTeacher


def load_inputs(config: Config) -> Inputs:
    """Rows and teacher of a validated configuration, checked; see `load_splits`."""
    splits = load_splits(config)
    teacher = fit_teacher(config, splits)
    if jax.process_count() > 1:
        # That of process 0: an eigendecomposition may differ in last bits from machine to machine.
        leaves, structure = jax.tree.flatten(teacher)
        leaves = broadcast([np.asarray(leaf) for leaf in leaves], 0)
        teacher = jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])
    return Inputs(splits, teacher)


def train(
    config: Config,
    workdir: str | os.PathLike,
    *,
    console: Console | None = None,
    quiet: bool = False,
    inputs: Inputs | None = None,
    watch: PreemptionWatch | None = None,
) -> dict[str, Any]:
    """One run, from its configuration to ``results.json``; given the same directory, it goes on.

    The directory ends up with ``config.json``, ``provenance.jsonl``, ``metrics.jsonl``,
    ``checkpoints/``, ``aligner/`` (the trained model), ``teacher/`` (the teacher, as an aligner)
    and ``results.json``. A run that was killed at any moment and is started again ends with the
    parameters of one that was not. A run that is done returns its results again. On SIGTERM it
    finishes the dispatch at hand, saves a checkpoint and stops.

    Args:
        config: a configuration; see ``configs/default.py``.
        workdir: the run's directory.
        console: where to report; standard output by default.
        quiet: report nothing.
        inputs: the rows and the teacher, where a caller of several runs has them already.
        watch: who looks out for SIGTERM, where a caller does so; by default this run itself.

    Returns:
        What ``results.json`` holds: retrieval of the aligner and of its teacher on the test and
        the validation pairs, the step that was selected, and times.

    Raises:
        ValueError: a configuration, file or directory that cannot be used, before any training.
        FloatingPointError: the loss is no longer finite.
        OSError: a checkpoint could not be written.
        Preempted: the run was stopped by SIGTERM; the same call goes on.
    """
    config = together(lambda: validate(config))
    home = together(lambda: Workdir(workdir, config))
    done = from_first(lambda: read_json(home.results) if home.results.exists() else None)
    if done is not None:
        return done
    began = time.perf_counter()

    with contextlib.ExitStack() as stack:
        together(lambda: stack.enter_context(home.locked()))
        watch = watch or stack.enter_context(PreemptionWatch())
        return _train(config, home, console or make_console(), quiet, inputs, watch, began)


def _train(
    config: Config,
    home: Workdir,
    console: Console,
    quiet: bool,
    inputs: Inputs | None,
    watch: PreemptionWatch,
    began: float,
) -> dict[str, Any]:
    # Process 0 of several writes and reports.
    first = jax.process_index() == 0
    quiet = quiet or not first

    # ---- data and teacher: every check of the input happens here
    splits, teacher = load_inputs(config) if inputs is None else inputs

    # ---- model, optimiser, streams
    setup, state, rest = build(config, splits, teacher)
    _check_splits(config, splits, setup.loss.reads)
    home.start(config)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    mesh = setup.mesh
    state = place_state(state, mesh)
    fixed, projector, key = replicate((rest, teacher, key), mesh)
    tables = raw_tables(splits, unpaired=setup.loss.reads.unpaired)
    resident = fits(config, tables, teacher, mesh)
    if resident:
        raw = Batch(*(place_table(table, mesh) for table in tables))
        tables = jax.jit(prepare)(setup, state.params, fixed, projector, raw)
        del raw

    # ---- resume
    keep_best = config.select == "best"
    checkpoints = Checkpoints(home.checkpoints, keep_best=keep_best)
    start = from_first(lambda: checkpoints.latest)
    if start is not None:
        state = checkpoints.restore(state, start)
    start = start or 0
    if not quiet:
        _announce(console, config, splits, setup, teacher, resident, start)

    # ---- train loop
    writer = together(
        lambda: MetricWriter(home.metrics, start, make_sinks(config, home.path)) if first else None
    )
    bar = ProgressBar(console, config.steps, start, quiet=quiet)
    clock = _Clock(start, sum(stream.size for stream in setup.streams))
    dispatches = (
        _dispatch_resident(setup, state, fixed, tables, key, start, config)
        if resident
        else _dispatch_streamed(setup, state, fixed, projector, tables, key, start, config)
    )
    try:
        if start < config.steps and watch.agreed(start):
            raise Preempted(start)
        for state, step, metrics in dispatches:
            record = _checked_means(metrics, step)
            record |= clock.tick(step)
            final = step == config.steps
            save = final or _due(step, config.checkpoint_every)
            if splits.val is not None and (
                final or _due(step, config.eval_every) or (save and keep_best)
            ):
                scores = evaluate(_merge(setup, state.params, rest), splits.val)
                # Those of process 0, since all must select the same checkpoint.
                (values,) = broadcast([np.array(list(scores.values()), np.float64)], 0)
                record |= {f"val/{k}": float(v) for k, v in zip(scores, values, strict=True)}
            if writer is not None:
                writer.write(step, record)
            bar.update(step, record)
            if save:
                checkpoints.save(state, record.get(f"val/{config.select_metric}"))
            if not final and watch.agreed(step):
                # Without its metric: where no checkpoint was due, none may be selected, or the
                # outcome would depend on the interruption.
                checkpoints.save(state)
                raise Preempted(step)
    finally:
        bar.close()
        if writer is not None:
            writer.close()
        checkpoints.close()

    # ---- select, save, evaluate
    selected = config.steps
    best = from_first(lambda: checkpoints.best) if keep_best else None
    if best is not None:
        selected, state = best, checkpoints.restore(state, best)
    aligner = _merge(setup, state.params, rest)
    prior = OBJECTIVES[config.objective].prior
    aligner.training_prior = prior(setup.loss, *(stream.size for stream in setup.streams))
    teacher_aligner = Aligner.from_teacher(teacher)
    results: dict[str, Any] = {"selected_step": selected, "pairs": len(splits.pairs)}
    for name, held_out in (("val", splits.val), ("test", splits.test)):
        if held_out is not None:
            results[name] = evaluate(aligner, held_out)
            results[f"teacher_{name}"] = evaluate(teacher_aligner, held_out)
    results["seconds"] = round(time.perf_counter() - began, 3)

    def write() -> None:
        if first:
            description = {"data": splits.description, "config": json.loads(config.to_json())}
            aligner.save(home.aligner, metadata=description | {"step": selected})
            teacher_aligner.save(home.teacher, metadata=description)
            write_json(home.results, results)

    together(write)
    return from_first(lambda: results)


def _check_splits(config: Config, splits: Splits, reads: Reads) -> None:
    """Raises ConfigError where a run needs rows that its data does not have."""
    if config.select == "best" and splits.val is None:
        raise ConfigError("config.select: 'best' needs validation pairs, and the data has none")
    for table in (splits.unpaired_image, splits.unpaired_text):
        if reads.unpaired and not len(table):
            raise ConfigError(
                f"config.objective: {config.objective!r} needs unpaired rows, but {table.name} has "
                "none; give fewer pairs, more data, or objective 'sail'"
            )


def build(config: Config, splits: Splits, teacher: LinearTeacher) -> tuple[Setup, TrainState, Any]:
    """The static setup of a run, its first state, and the variables that are not trained."""
    aligner = init_aligner(config, splits, teacher)
    graph, params, rest = nnx.split(aligner, nnx.Param, ...)
    loss = loss_settings(config)
    unpaired = (splits.unpaired_image, splits.unpaired_text)
    images, texts = (len(table) if loss.reads.unpaired else 0 for table in unpaired)
    streams = (
        Stream.of(len(splits.pairs), config.batch.pairs, 0),
        Stream.of(images, config.batch.unpaired, 1),
        Stream.of(texts, config.batch.unpaired, 2),
    )
    if streams[1].whole and streams[2].whole:
        # The teacher's plan is the same in every step, and solved once a dispatch; a start that
        # changes would have it solved in every step.
        loss = dataclasses.replace(loss, warm_teacher=0.0)
    mesh = make_mesh(config)
    if mesh is not None:
        loss = dataclasses.replace(
            loss, axis_name=AXIS, sizes=tuple(stream.size for stream in streams)
        )
    setup = Setup(graph, loss, OptimizerSettings.from_config(config), streams, mesh)
    return setup, init_state(setup, params), rest


def init_aligner(config: Config, splits: Splits, teacher: LinearTeacher) -> Aligner:
    """The aligner before training, as the configuration wants it.

    From the teacher, ``model.dim`` gives way to the dimension of the teacher: further columns would
    start at zero and get no gradient.
    """
    model = config.model
    if model.init == "teacher":
        return Aligner.from_teacher(teacher, scale=model.scale, bias=model.bias)
    layer = LayerConfig(
        model.layer, layer_norm=model.layer_norm, width_factor=model.width_factor or None
    )
    return Aligner(
        splits.pairs.image.dim,
        splits.pairs.text.dim,
        model.dim,
        layer=layer,
        rngs=nnx.Rngs(config.seed),
        scale=model.scale,
        bias=model.bias,
        normalize=model.normalize,
        image_mean=teacher.image_mean if model.center else None,
        text_mean=teacher.text_mean if model.center else None,
        image_columns=teacher.image_columns,
        text_columns=teacher.text_columns,
    )


def _merge(setup: Setup, params: Variables, rest: Variables) -> Aligner:
    """The aligner of this process, of parameters that may be spread over several."""
    return nnx.merge(setup.graph, local_copy(params), rest)


def raw_tables(splits: Splits, *, unpaired: bool) -> Batch:
    """The sources of a run; none of the unpaired rows for an objective that reads none."""
    image, text = splits.unpaired_image, splits.unpaired_text
    if not unpaired:
        image, text = image.select([]), text.select([])
    return Batch(splits.pairs.image, splits.pairs.text, image, text)


def fits(config: Config, tables: Batch, teacher: LinearTeacher, mesh: Mesh | None = None) -> bool:
    """Whether the rows of a device fit into the memory set aside for them, raw and prepared.

    On a mesh each device has its share of every table.
    """
    if config.data.resident != "auto":
        return config.data.resident == "always"
    devices = 1 if mesh is None else mesh.size

    def values(table: FeatureTable, projected: int = 0) -> int:
        return padded(len(table), mesh) // devices * (2 * table.dim + projected)

    dim = teacher.image_weight.shape[1]
    total = values(tables.pairs_image) + values(tables.pairs_text)
    total += values(tables.unpaired_image, dim) + values(tables.unpaired_text, dim)
    return 4 * total <= config.data.resident_gib * 2**30


def _dispatch_resident(
    setup, state, rest, tables, key, start: int, config
) -> Iterator[tuple[TrainState, int, Any]]:
    step = start
    while step < config.steps:
        length = min(config.log_every, config.steps - step)
        state, metrics = run_resident(setup, length, state, rest, tables, key)
        step += length
        yield state, step, metrics


def _dispatch_streamed(
    setup, state, rest, teacher, tables, key, start: int, config
) -> Iterator[tuple[TrainState, int, Any]]:
    collected = []
    pairs, image, text = sizes = tuple(stream.size for stream in setup.streams)
    shares = (share(pairs, setup.mesh), share(image, setup.mesh), share(text, setup.mesh))
    batches = stream_batches(
        tables, setup.streams, local_copy(key), start, config.steps, shares=shares
    )
    for step, raw in enumerate(batches, start + 1):
        batch = place_batch(raw, sizes, setup.mesh)
        state, metrics = run_streamed(setup, state, rest, teacher, batch, key)
        collected.append(metrics)
        if step % config.log_every == 0 or step == config.steps:
            yield state, step, jax.tree.map(lambda *leaves: np.stack(leaves), *collected)
            collected = []


def _checked_means(metrics, step: int) -> dict[str, float]:
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


def _announce(console, config, splits, setup, teacher, resident: bool, start: int) -> None:
    pairs, image, text = setup.streams
    console.print(f"data: {splits.description}", highlight=False)
    console.print(
        f"pairs {pairs.rows} ({pairs.size} a step), unpaired images {image.rows} ({image.size}), "
        f"unpaired texts {text.rows} ({text.size}), rows "
        f"{'resident on device' if resident else 'streamed'}",
        highlight=False,
    )
    console.print(
        f"teacher: {config.teacher.name}, {teacher.image_weight.shape[1]} dimensions; objective "
        f"{config.objective} from a {config.model.init} start"
        + (f"; resuming from step {start}" if start else ""),
        highlight=False,
    )
