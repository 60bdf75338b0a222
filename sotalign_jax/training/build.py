"""From a configuration to what a run is made of: rows, teacher, model, optimiser, streams."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from sotalign_jax.config import Config, ConfigError
from sotalign_jax.features import FeatureTable, Splits
from sotalign_jax.features.batches import Batch, Stream
from sotalign_jax.models import Aligner, LayerConfig
from sotalign_jax.objectives import loss_settings
from sotalign_jax.objectives.base import Reads
from sotalign_jax.teachers import LinearTeacher
from sotalign_jax.training.data import fit_teacher, load_splits
from sotalign_jax.training.devices import AXIS, make_mesh, padded
from sotalign_jax.training.distributed import broadcast
from sotalign_jax.training.neighbours import (
    NeighbourCache,
    check_neighbours,
    with_neighbours,
)
from sotalign_jax.training.step import OptimizerSettings, Setup, TrainState, init_state

__all__ = [
    "InputCache",
    "Inputs",
    "build",
    "check_splits",
    "fits",
    "init_aligner",
    "inputs_key",
    "load_inputs",
    "of_first",
    "raw_tables",
    "resident_bytes",
    "sources",
]


T = TypeVar("T")


class Inputs(NamedTuple):
    """What a run reads: a function of ``config.data``, ``config.teacher`` and ``config.seed``."""

    splits: Splits
    teacher: LinearTeacher


def load_inputs(config: Config) -> Inputs:
    """Rows and teacher of a validated configuration, checked; see `load_splits`."""
    splits = load_splits(config)
    teacher = fit_teacher(config, splits)
    return Inputs(splits, of_first(teacher))


def of_first(fitted: T) -> T:
    """What process 0 fitted: an eigendecomposition may differ in last bits between machines."""
    if jax.process_count() == 1:
        return fitted
    leaves, structure = jax.tree.flatten(fitted)
    leaves = broadcast([np.asarray(leaf) for leaf in leaves], 0)
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])


def inputs_key(config: Config) -> str:
    """Equal for validated configurations whose rows and teacher are the same."""
    return config.data.to_json() + config.teacher.to_json() + str(config.seed)


class InputCache:
    """Rows and teachers of several runs: what has the same data, teacher and seed is loaded once.

    Args:
        test: with the test pairs; without them for runs that others are chosen by.
        keep: how many are kept, those that were asked for last; 0: all.
    """

    def __init__(self, *, test: bool = True, keep: int = 0):
        self._test, self._keep = test, keep
        self._inputs: dict[str, Inputs] = {}

    def get(self, config: Config) -> Inputs:
        """The inputs of a validated configuration, one object for all that have the same."""
        key = inputs_key(config)
        inputs = self._inputs.pop(key, None)
        if inputs is None:
            while self._keep and len(self._inputs) >= self._keep:
                del self._inputs[next(iter(self._inputs))]  # before others take their memory
            inputs = load_inputs(config)
            if not self._test:
                inputs = inputs._replace(splits=dataclasses.replace(inputs.splits, test=None))
        self._inputs[key] = inputs  # the last one asked for stands last
        return inputs


def check_splits(config: Config, splits: Splits, reads: Reads) -> None:
    """Raises ConfigError where a run needs rows that its data does not have."""
    if config.select == "best" and splits.val is None:
        raise ConfigError("config.select: 'best' needs validation pairs, and the data has none")
    for side in reads.sides:
        table = getattr(splits, f"unpaired_{side}")
        if reads.unpaired and not len(table):
            raise ConfigError(
                f"config.objective: {config.objective!r} needs unpaired rows, but {table.name} has "
                "none; give fewer pairs, more data, or objective 'sail'"
            )
    check_neighbours(config, splits, reads)


def build(config: Config, splits: Splits, teacher: LinearTeacher) -> tuple[Setup, TrainState, Any]:
    """The static setup of a run, its first state, and the variables that are not trained."""
    aligner = init_aligner(config, splits, teacher)
    graph, params, rest = nnx.split(aligner, nnx.Param, ...)
    loss = loss_settings(config)
    tables = raw_tables(splits, loss.reads)
    streams = (
        Stream.of(len(splits.pairs), config.batch.pairs, 0),
        Stream.of(len(tables.unpaired_image), config.batch.unpaired, 1),
        Stream.of(len(tables.unpaired_text), config.batch.unpaired, 2),
    )
    if streams[1].whole and streams[2].whole:
        # The teacher's plan is the same in every step, and solved once a dispatch; a start that
        # changes would have it solved in every step.
        loss = dataclasses.replace(loss, warm_teacher=0.0)
    mesh = make_mesh(config)
    setup = Setup(graph, loss, OptimizerSettings.from_config(config), streams, mesh)
    if mesh is not None:
        loss = dataclasses.replace(loss, axis_name=AXIS, sizes=setup.sizes)
        setup = dataclasses.replace(setup, loss=loss)
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


def raw_tables(splits: Splits, reads: Reads) -> Batch:
    """The sources of a run but neighbours; no unpaired rows that the objective does not read."""
    image, text = splits.unpaired_image, splits.unpaired_text
    if not (reads.unpaired and "image" in reads.sides):
        image = image.select([])
    if not (reads.unpaired and "text" in reads.sides):
        text = text.select([])
    return Batch(splits.pairs.image, splits.pairs.text, image, text)


def sources(
    config: Config,
    splits: Splits,
    setup: Setup,
    state: TrainState,
    rest: Any,
    *,
    console: Console | None = None,
    cache: NeighbourCache | None = None,
) -> Batch:
    """The sources of a run, neighbours included: they are searched here.

    Args:
        config: a validated configuration.
        splits: its rows, checked by `check_splits`.
        setup: of the run, as are its first state and the variables that are not trained; not yet
            on a mesh.
        state: see ``setup``.
        rest: see ``setup``.
        console: where to announce a search.
        cache: of what was found for other runs.

    Raises:
        ConfigError: a pair has fewer neighbours than asked.
    """
    reads = setup.loss.reads
    tables = raw_tables(splits, reads)
    if not reads.neighbours:
        return tables
    aligner = nnx.merge(setup.graph, state.params, rest)
    found = (cache or NeighbourCache()).get(config, splits, aligner, reads, console=console)
    return with_neighbours(tables, splits, found)


def fits(config: Config, tables: Batch, teacher: LinearTeacher, mesh: Mesh | None = None) -> bool:
    """Whether the rows of a device fit into the memory set aside for them, raw and prepared.

    On a mesh each device has its share of every table.
    """
    if config.data.resident != "auto":
        return config.data.resident == "always"
    return resident_bytes(tables, teacher, mesh) <= config.data.resident_gib * 2**30


def resident_bytes(tables: Batch, teacher: LinearTeacher, mesh: Mesh | None = None) -> int:
    """What the rows of a run take on each device, raw and prepared."""
    devices = 1 if mesh is None else mesh.size

    def values(table: FeatureTable | None, projected: int = 0) -> int:
        if table is None:
            return 0
        return padded(len(table), mesh) // devices * (2 * table.dim + projected)

    dim = teacher.image_weight.shape[1]
    total = values(tables.pairs_image) + values(tables.pairs_text)
    total += values(tables.unpaired_image, dim) + values(tables.unpaired_text, dim)
    total += values(tables.neighbour_image) + values(tables.neighbour_text)
    return 4 * (total + sum(rows.size for rows in tables.neighbours if rows is not None))
