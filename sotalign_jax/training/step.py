"""One training step, and a dispatch of several: pure functions of state, tables and key."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int

from sotalign_jax.config import Config
from sotalign_jax.features.batches import (
    Batch,
    Stream,
    advance,
    batch_rows,
    drawn_neighbours,
    first_order,
    step_key,
)
from sotalign_jax.models import Aligner
from sotalign_jax.objectives import OBJECTIVES
from sotalign_jax.objectives.base import LossSettings, Metrics, Moment, RowPotentials
from sotalign_jax.objectives.fusemix import mixed, mixtures
from sotalign_jax.teachers import LinearTeacher
from sotalign_jax.training.devices import AXIS, place_vector, put_rows, replicate, take_rows

__all__ = [
    "OptimizerSettings",
    "Setup",
    "TrainState",
    "init_state",
    "place_state",
    "prepare",
    "run_resident",
    "run_steps",
    "run_streamed",
]


# nnx.State: too narrow a type for what optax returns, and one that beartype cannot check.
Variables = Any


_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """``config.optimizer`` and ``config.steps``, field by field.

    A pytree: learning rate and weight decay are its leaves, all else is static.

    Attributes:
        name: ``"lion"`` or ``"adamw"``.
        learning_rate: the peak.
        weight_decay: decoupled, on every parameter, as in the SOTAlign authors' code.
        b1: decay of the interpolated momentum.
        b2: decay of the second average.
        warmup: fraction of ``steps`` over which the rate rises linearly; it then falls to zero as
            a cosine.
        steps: length of the schedule.
    """

    name: str = dataclasses.field(metadata=_STATIC)
    learning_rate: Any
    weight_decay: Any
    b1: float = dataclasses.field(metadata=_STATIC)
    b2: float = dataclasses.field(metadata=_STATIC)
    warmup: float = dataclasses.field(metadata=_STATIC)
    steps: int = dataclasses.field(metadata=_STATIC)

    @classmethod
    def from_config(cls, config: Config) -> OptimizerSettings:
        """The settings of a validated configuration."""
        return cls(steps=config.steps, **config.optimizer.to_dict())

    def schedule(self) -> optax.Schedule:
        """Learning rate of a step: linear warm-up to the peak, then a cosine to zero."""
        warmup = round(self.warmup * self.steps)
        rate = optax.cosine_decay_schedule(self.learning_rate, max(self.steps - warmup, 1))
        if warmup > 0:
            # (step + 1) / warmup: the first step already moves.
            def rise(step):
                return self.learning_rate * (step + 1) / warmup

            rate = optax.join_schedules([rise, rate], [warmup])
        # optax counts steps in integers and multiplies them with floats, which needs a cast where
        # dtypes are strict.
        return lambda step: rate(jnp.asarray(step, jnp.float32))

    def transformation(self) -> optax.GradientTransformation:
        """The optimiser with its schedule."""
        make = {"lion": optax.lion, "adamw": optax.adamw}[self.name]
        return make(self.schedule(), b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is, beside its rows and its parameters.

    A pytree of a few numbers; two runs whose setups differ in no more share compiled programs, and
    can be trained by one.

    Attributes:
        graph: structure of the aligner.
        loss: the objective.
        optimizer: the optimiser.
        streams: how pairs, unpaired images and unpaired texts are read.
        mesh: over which rows are spread; None on one device.
    """

    graph: nnx.GraphDef = dataclasses.field(metadata=_STATIC)
    loss: LossSettings
    optimizer: OptimizerSettings
    streams: tuple[Stream, Stream, Stream] = dataclasses.field(metadata=_STATIC)
    mesh: Mesh | None = dataclasses.field(default=None, metadata=_STATIC)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Pairs (or mixtures of them), unpaired images and texts that the objective sees a step."""
        pairs, image, text = self.streams
        return mixtures(self.loss.fusemix, pairs.size), image.size, text.size

    def spread(self, function, *arguments):
        """``function`` of this setup, a state and more on each device: to a state and metrics.

        Args:
            function: on what one device has of its arguments.
            arguments: how each argument after the state lies on the mesh.

        Returns:
            The function of a setup and whole arguments.
        """
        if self.mesh is None:
            return function
        return jax.shard_map(
            function,
            mesh=self.mesh,
            in_specs=(_SAME, _STATE, *arguments),
            out_specs=(_STATE, _SAME),
        )


class TrainState(NamedTuple):
    """What changes from step to step, and what a checkpoint holds.

    Attributes:
        params: of the aligner.
        opt_state: of the optimiser.
        step: steps done.
        potentials: of all unpaired images, as they were when last seen, 0 before; spread over the
            mesh as the images are. The next plan of a row starts from them.
    """

    params: Variables
    opt_state: optax.OptState
    step: Int[Array, ""]
    potentials: RowPotentials = RowPotentials()


# How arguments lie on a mesh.
_SAME: Any = PartitionSpec()
_ROWS: Any = PartitionSpec(AXIS)
_STATE: Any = TrainState(_SAME, _SAME, _SAME, RowPotentials(_ROWS, _ROWS))
_TABLES: Any = Batch(*[_ROWS] * (len(Batch._fields) - 1), neighbours=_SAME)
_RAW: Any = _TABLES._replace(image_rows=_SAME)


def init_state(setup: Setup, params: Variables) -> TrainState:
    """The state before the first step."""
    images = setup.streams[1].rows
    return TrainState(
        params,
        setup.optimizer.transformation().init(params),
        jnp.zeros((), jnp.int32),
        RowPotentials(*(jnp.zeros(images) if kept else None for kept in setup.loss.warm)),
    )


def place_state(state: TrainState, mesh: Mesh | None) -> TrainState:
    """A state as it lies on the mesh.

    Args:
        state: all of it, the same in every process.
        mesh: where to; None leaves it on one device.

    Returns:
        The state, its potentials spread as rows are, all else the same on every device.
    """
    placed = replicate(state._replace(potentials=None), mesh)
    return placed._replace(
        potentials=jax.tree.map(lambda leaf: place_vector(leaf, mesh), state.potentials)
    )


def prepare(
    setup: Setup, params: Variables, rest: Variables, teacher: LinearTeacher, raw: Batch
) -> Batch:
    """Raw rows as a step reads them: preprocessed for the aligner, projected by the teacher."""
    aligner: Aligner = nnx.merge(setup.graph, params, rest)
    wanted = setup.loss.reads.teacher
    near_image, near_text = raw.neighbour_image, raw.neighbour_text
    return Batch(
        aligner.preprocess_image(raw.pairs_image),
        aligner.preprocess_text(raw.pairs_text),
        aligner.preprocess_image(raw.unpaired_image),
        aligner.preprocess_text(raw.unpaired_text),
        teacher.project_image(raw.unpaired_image) if wanted else None,
        teacher.project_text(raw.unpaired_text) if wanted else None,
        raw.image_rows,
        None if near_image is None else aligner.preprocess_image(near_image),
        None if near_text is None else aligner.preprocess_text(near_text),
        raw.neighbours,
    )


def _step(
    setup: Setup, state: TrainState, rest: Variables, batch: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """One step on a prepared batch, with the run's data key."""
    start = jax.tree.map(lambda kept: _recall(setup, kept, batch.image_rows), state.potentials)
    moment = Moment(state.step, step_key(key, state.step), start)
    batch = mixed(batch, setup.streams[0].size, setup.loss, moment.key)
    objective = OBJECTIVES[setup.loss.objective]

    def loss_of(params):
        aligner = nnx.merge(setup.graph, params, rest)
        return objective.loss(aligner, batch, setup.loss, moment)

    # Scopes name the parts of a step in profiles; see benchmarks/step.py.
    (loss, outcome), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    with jax.named_scope("optimizer"):
        optimizer = setup.optimizer.transformation()
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params: Variables = optax.apply_updates(state.params, updates)
        params = objective.settle(params, setup.loss)
    metrics = {
        "train/loss": loss,
        **outcome.metrics,
        "train/gradient_norm": optax.tree.norm(gradient),
        "train/parameter_norm": optax.tree.norm(params),
        "train/learning_rate": jnp.asarray(setup.optimizer.schedule()(state.step), jnp.float32),
        "train/scale": jnp.exp(params["log_scale"][...]),
        "train/bias": params["bias"][...],
    }
    potentials = jax.tree.map(
        lambda kept, new: _remember(setup, kept, batch.image_rows, new),
        state.potentials,
        outcome.potentials,
    )
    return TrainState(params, opt_state, state.step + 1, potentials), metrics


def _recall(setup: Setup, kept: Array, rows: Array | None) -> Array:
    """What is kept of the images of a batch."""
    if rows is None:
        return kept
    return jnp.take(kept, rows, axis=0) if setup.mesh is None else take_rows(kept, rows)


def _remember(setup: Setup, kept: Array, rows: Array | None, new: Array) -> Array:
    """What is kept of all images, after those of a batch."""
    if rows is None:
        return new
    return kept.at[rows].set(new) if setup.mesh is None else put_rows(kept, rows, new)


@functools.partial(jax.jit, static_argnames=("length",), donate_argnames=("state",))
def run_resident(
    setup: Setup, length: int, state: TrainState, rest: Variables, tables: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """``length`` steps in one dispatch, their batches drawn on device from prepared tables.

    Args:
        setup: of the run.
        length: steps of this dispatch.
        state: donated.
        rest: the aligner's variables that are not trained.
        tables: all rows of each source, prepared.
        key: the run's data key.

    Returns:
        The state after ``length`` steps, and the metrics of each of them, stacked.
    """
    steps = setup.spread(functools.partial(run_steps, length), _SAME, _TABLES, _SAME)
    return steps(setup, state, rest, tables, key)


def run_steps(
    length: int, setup: Setup, state: TrainState, rest: Variables, tables: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """`run_resident` on the rows that this device has of each table, not compiled."""
    pairs, image, text = setup.streams

    def one(carry, _):
        state, orders = carry
        with jax.named_scope("draw"):
            orders, batch = draw(state.step, orders)
        state, metrics = _step(setup, state, rest, batch, key)
        return (state, orders), metrics

    def draw(step, orders):
        orders = tuple(
            advance(stream, key, step, order)
            for stream, order in zip(setup.streams, orders, strict=True)
        )
        rows = {
            stream.number: batch_rows(stream, order, step)
            for stream, order in zip(setup.streams, orders, strict=True)
        }

        near = drawn_neighbours(tables.neighbours, key, step, rows[pairs.number])

        def take(table, stream: Stream):
            return table if stream.whole else take_these(table, rows[stream.number])

        def take_these(table, rows):
            if table is None:
                return None
            return jnp.take(table, rows, axis=0) if setup.mesh is None else take_rows(table, rows)

        return orders, Batch(
            take(tables.pairs_image, pairs),
            take(tables.pairs_text, pairs),
            take(tables.unpaired_image, image),
            take(tables.unpaired_text, text),
            take(tables.teacher_image, image),
            take(tables.teacher_text, text),
            None if image.whole else rows[image.number],
            take_these(tables.neighbour_image, near.image),
            take_these(tables.neighbour_text, near.text),
        )

    orders = tuple(first_order(stream, key, state.step) for stream in setup.streams)
    (state, _), metrics = jax.lax.scan(one, (state, orders), None, length=length)
    return state, metrics


@functools.partial(jax.jit, donate_argnames=("state",))
def run_streamed(
    setup: Setup, state: TrainState, rest: Variables, teacher: LinearTeacher, raw: Batch, key: Array
) -> tuple[TrainState, Metrics]:
    """One step on a batch of raw rows that came from the host."""

    def step(setup, state, rest, teacher, raw, key):
        batch = prepare(setup, state.params, rest, teacher, raw)
        return _step(setup, state, rest, batch, key)

    spread = setup.spread(step, _SAME, _SAME, _RAW, _SAME)
    return spread(setup, state, rest, teacher, raw, key)
