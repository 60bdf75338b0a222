"""What all objectives share: their interface, their settings, and rows that lie on several devices.

An objective is one file of this package and one line in its registry; docs/objectives.md walks
through one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sotalign_jax.losses.klot import dense_or_block
from sotalign_jax.numerics import MatmulPrecision

__all__ = [
    "Divergence",
    "LossSettings",
    "Metrics",
    "Moment",
    "Objective",
    "Outcome",
    "Reads",
    "RowPotentials",
    "block",
    "counts",
    "no_prior",
    "on_every_device",
    "pairs_prior",
    "share",
    "whole",
    "with_log_scale",
]

Metrics = dict[str, Array]


class RowPotentials(NamedTuple):
    """Row potentials of the two plans of KLOT, one a row; None of a plan that starts from nothing.

    Attributes:
        student: of the student's plan.
        teacher: of the teacher's plan.
    """

    student: Any = None
    teacher: Any = None


class Moment(NamedTuple):
    """What an objective knows of the step beside its batch.

    Attributes:
        step: steps done before this one, an integer scalar.
        key: of this step's random choices, the same on all devices.
        start: potentials that the unpaired images had when they were last in a batch.
    """

    step: Any
    key: Any
    start: RowPotentials = RowPotentials()


class Outcome(NamedTuple):
    """What an objective tells beside its value.

    Attributes:
        metrics: by name.
        potentials: of the unpaired images of the batch, for the next time that they are seen.
    """

    metrics: Metrics
    potentials: RowPotentials = RowPotentials()


class Reads(NamedTuple):
    """What an objective reads beside the pairs.

    Attributes:
        unpaired: the unpaired rows.
        teacher: the teacher's view of them, ``batch.teacher_image`` and ``batch.teacher_text``.
        neighbours: one of so many nearest unpaired rows of each pair, ``batch.neighbour_image`` and
            ``batch.neighbour_text``; 0 for none. The option ``k`` of the objective, if it has any.
        duplicates: whether rows that equal the pair's own, or each other, are neighbours.
        sides: of which the unpaired rows, or the neighbours, are read.
    """

    unpaired: bool = False
    teacher: bool = False
    neighbours: int = 0
    duplicates: Literal["drop", "keep"] = "drop"
    sides: tuple[str, ...] = ("image", "text")


def _pairs_only(config: Any) -> Reads:
    del config
    return Reads()


def pairs_prior(settings: LossSettings, pairs: int, images: int, texts: int) -> float | None:
    """The share of true pairs among all combinations of images and texts of the pairs."""
    del settings, images, texts
    return 1.0 / pairs if pairs > 1 else None


def no_prior(settings: LossSettings, pairs: int, images: int, texts: int) -> None:
    """Of a loss whose logits are not those of a probability that two rows belong together."""
    del settings, pairs, images, texts


def _as_they_are(params: Any, settings: LossSettings) -> Any:
    del settings
    return params


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss of an aligner on a batch, and what must be known about it.

    Attributes:
        loss: of ``(aligner, batch, settings, moment)``, returns the value and an `Outcome`. Rows of
            the batch are prepared for the aligner. On a mesh it sees this device's share of the
            rows, and its value is the same on all; see :func:`whole` and :func:`counts`.
        options: class of its own table in the configuration (`options`), found in
            ``settings.options``; None without one.
        reads: what it reads, of a validated configuration.
        prior: share of true pairs among the combinations that a sigmoid loss sees in a step, of
            ``(settings, pairs, images, texts)``; None of a loss that is no such thing.
        settle: parameters after an update, of ``(params, settings)``: brought back into the range
            that the loss keeps them in, or set to what it takes in their place.
    """

    loss: Callable[..., tuple[Array, Outcome]]
    options: type | None = None
    reads: Callable[[Any], Reads] = _pairs_only
    prior: Callable[[LossSettings, int, int, int], float | None] = pairs_prior
    settle: Callable[[Any, LossSettings], Any] = _as_they_are


@dataclasses.dataclass(frozen=True)
class Divergence:
    """How far a student's affinities on unpaired rows are from a teacher's, for ``sotalign``.

    Attributes:
        value: of ``(image, text, batch, settings, moment)``, embeddings of the unpaired rows first;
            returns the value and an `Outcome`.
        options: class of its own table in the configuration, found in
            ``settings.divergence_options``; None without one.
        potentials: whether it starts from the potentials of its last solves.
    """

    value: Callable[..., tuple[Array, Outcome]]
    options: type | None = None
    potentials: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossSettings:
    """``config.objective`` and ``config.loss``, field by field, and what follows from them.

    A pytree: ``alpha``, the two epsilons and the traced fields of the options and of FuseMix are
    its leaves, all else is static.

    Attributes:
        teacher_epsilon: None for 0, the arg-max.
        options: those of the objective.
        divergence_options: those of the divergence.
        fusemix: how pairs are mixed; None where they are not.
        reads: what the objective reads beside the pairs.
        axis_name: where the rows of a batch are spread over devices, the axis of the mesh.
        sizes: there, how many pairs (mixtures of them, if they are mixed), unpaired images and
            unpaired texts a batch has before padding.
    """

    alpha: Any
    epsilon: Any
    teacher_epsilon: Any
    options: Any
    divergence_options: Any
    fusemix: Any
    objective: str = dataclasses.field(metadata={"static": True})
    divergence: str = dataclasses.field(metadata={"static": True})
    threshold: float = dataclasses.field(metadata={"static": True})
    max_iterations: int = dataclasses.field(metadata={"static": True})
    iterations: int = dataclasses.field(metadata={"static": True})  # 0: until the threshold
    memory: Literal["auto", "dense", "streamed"] = dataclasses.field(metadata={"static": True})
    memory_gib: float = dataclasses.field(metadata={"static": True})
    warm_student: float = dataclasses.field(metadata={"static": True})
    warm_teacher: float = dataclasses.field(metadata={"static": True})
    precision: MatmulPrecision = dataclasses.field(metadata={"static": True})
    normalization: Literal["mean", "rows"] = dataclasses.field(metadata={"static": True})
    reads: Reads = dataclasses.field(metadata={"static": True})
    potentials: bool = dataclasses.field(metadata={"static": True})
    axis_name: str | None = dataclasses.field(default=None, metadata={"static": True})
    sizes: tuple[int, int, int] = dataclasses.field(default=(0, 0, 0), metadata={"static": True})

    @property
    def warm(self) -> RowPotentials:
        """Of which plans potentials are kept from step to step."""
        kept = self.reads.teacher and self.potentials
        return RowPotentials(kept and self.warm_student > 0, kept and self.warm_teacher > 0)


def whole(rows: Array, settings: LossSettings) -> Array:
    """All rows of a batch, of which each device has a share; padding stands at their end."""
    if settings.axis_name is None:
        return rows
    return jax.lax.all_gather(rows, settings.axis_name, tiled=True)


def share(rows: Array, settings: LossSettings) -> Array:
    """This device's share of rows that are whole on each: zeros pad them, as `whole` returns."""
    if settings.axis_name is None:
        return rows
    each = -(-rows.shape[0] // jax.lax.axis_size(settings.axis_name))
    missing = each * jax.lax.axis_size(settings.axis_name) - rows.shape[0]
    rows = jnp.pad(rows, ((0, missing), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(rows, jax.lax.axis_index(settings.axis_name) * each, each)


def counts(local: Array, size: int, settings: LossSettings) -> tuple[Any, Any]:
    """Which of this device's rows, and which of all rows, are not padding; None without a mesh."""
    if settings.axis_name is None:
        return None, None
    rows, devices = local.shape[0], jax.lax.axis_size(settings.axis_name)
    here = jax.lax.axis_index(settings.axis_name) * rows + jnp.arange(rows, dtype=jnp.int32)
    return here < size, jnp.arange(rows * devices) < size


def block(rows: int, columns: int, settings: LossSettings) -> int | None:
    """Rows of a pair loss's logits to hold at once; None for all of them."""
    return dense_or_block(settings.memory, settings.memory_gib, rows, columns) or None


def on_every_device(
    function: Callable[..., Array],
    rows: tuple[Array, ...],
    sizes: tuple[int, ...],
    settings: LossSettings,
) -> Array:
    """A loss of whole batches, done by each device for itself: for what has no form for a share.

    Args:
        function: of whole arrays, without padding; returns a scalar.
        rows: its arguments, this device's share of each.
        sizes: rows of each before padding.
        settings: of the loss.

    Returns:
        The value, on a mesh the same on all devices.
    """
    if settings.axis_name is None:
        return function(*rows)
    everything = (whole(part, settings)[:size] for part, size in zip(rows, sizes, strict=True))
    # Equal on all devices: the mean says so, and gives each the share of the gradient that is its.
    return jax.lax.pmean(function(*everything), settings.axis_name)


def with_log_scale(params: Any, value: Array) -> Any:
    """The parameters of an aligner with another ``log_scale``."""
    settled = jax.tree.map(lambda leaf: leaf, params)
    settled["log_scale"] = settled["log_scale"].replace(value)
    return settled
