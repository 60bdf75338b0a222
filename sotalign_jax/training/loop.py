"""Train an aligner: from a configuration and a directory to a saved model and its retrieval."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from rich.console import Console

from sotalign_jax.config import Config, validate
from sotalign_jax.features.batches import stream_batches
from sotalign_jax.training.build import (
    Inputs,
    build,
    check_splits,
    fits,
    load_inputs,
    of_first,
    sources,
)
from sotalign_jax.training.data import fit_aligner
from sotalign_jax.training.devices import (
    local_copy,
    place_batch,
    place_tables,
    replicate,
    share,
)
from sotalign_jax.training.distributed import (
    Preempted,
    PreemptionWatch,
    from_first,
    together,
)
from sotalign_jax.training.metrics import make_console
from sotalign_jax.training.neighbours import NeighbourCache
from sotalign_jax.training.record import Record, evaluate_teacher, write_results
from sotalign_jax.training.step import (
    TrainState,
    place_state,
    prepare,
    run_resident,
    run_streamed,
)
from sotalign_jax.training.workdir import Workdir, read_json

__all__ = ["train", "train_in"]


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

    Where ``config.aligner`` is fitted in one go there are no steps: the directory has neither
    ``metrics.jsonl`` nor ``checkpoints/``, and all else is the same.

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
        return train_in(config, home, console or make_console(), quiet, inputs, watch, began)


def train_in(
    config: Config,
    home: Workdir,
    console: Console,
    quiet: bool,
    inputs: Inputs | None,
    watch: PreemptionWatch,
    began: float,
    cache: NeighbourCache | None = None,
) -> dict[str, Any]:
    """`train` of a validated configuration in a directory that the caller has locked."""
    quiet = quiet or jax.process_index() != 0

    # ---- data and teacher: every check of the input happens here
    inputs = load_inputs(config) if inputs is None else inputs
    splits, teacher = inputs
    if config.aligner != "layers":
        return _fit(config, home, console, quiet, inputs, began)

    # ---- model, optimiser, streams
    setup, state, rest = build(config, splits, teacher)
    check_splits(config, splits, setup.loss.reads)
    said = None if quiet else console
    tables = sources(config, splits, setup, state, rest, console=said, cache=cache)
    home.start(config)
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    mesh = setup.mesh
    state = place_state(state, mesh)
    fixed, projector, key = replicate((rest, teacher, key), mesh)
    resident = fits(config, tables, teacher, mesh)
    if resident:
        raw = place_tables(tables, mesh)
        tables = jax.jit(prepare)(setup, state.params, fixed, projector, raw)
        del raw

    # ---- resume
    record = Record(config, home, inputs, setup, rest)
    if not quiet:
        _announce(console, config, splits, setup, teacher, resident, record.start)

    # ---- train loop
    try:
        state = record.restore(state)
        record.open(console, quiet=quiet)
        dispatches = (
            _dispatch_resident(setup, state, fixed, tables, key, record.start, config)
            if resident
            else _dispatch_streamed(
                setup, state, fixed, projector, tables, key, record.start, config
            )
        )
        if record.start < config.steps and watch.agreed(record.start):
            raise Preempted(record.start)
        for state, step, metrics in dispatches:
            record.take(lambda state=state: state, step, metrics)
            if step < config.steps and watch.agreed(step):
                record.save(state)
                raise Preempted(step)
    finally:
        record.close()

    # ---- select, save, evaluate
    return record.finish(state, evaluate_teacher(inputs), began)


def _fit(
    config: Config, home: Workdir, console: Console, quiet: bool, inputs: Inputs, began: float
) -> dict[str, Any]:
    """A run without steps."""
    splits = inputs.splits
    aligner = of_first(together(lambda: fit_aligner(config, splits)))
    home.start(config)
    if not quiet:
        unpaired = len(splits.unpaired_image), len(splits.unpaired_text)
        console.print(f"data: {splits.description}", highlight=False)
        console.print(
            f"pairs {len(splits.pairs)}, unpaired images {unpaired[0]}, unpaired texts "
            f"{unpaired[1]}; aligner: {config.aligner}, {aligner.dim} dimensions",
            highlight=False,
        )
    return write_results(config, home, inputs, aligner, 0, evaluate_teacher(inputs), began)


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
