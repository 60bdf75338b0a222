"""What a step minimises: a loss of an aligner on a batch, by the name a configuration gives it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sotalign_jax import losses
from sotalign_jax.config import Config
from sotalign_jax.features.batches import Batch
from sotalign_jax.losses.klot import dense_or_block
from sotalign_jax.models import Aligner
from sotalign_jax.numerics import MatmulPrecision

__all__ = ["DIVERGENCES", "OBJECTIVES", "LossSettings", "Outcome", "RowPotentials"]

Metrics = dict[str, Array]


class RowPotentials(NamedTuple):
    """Row potentials of the two plans of KLOT, one a row; None of a plan that starts from nothing.

    Attributes:
        student: of the student's plan.
        teacher: of the teacher's plan.
    """

    student: Any = None
    teacher: Any = None


class Outcome(NamedTuple):
    """What an objective tells beside its value.

    Attributes:
        metrics: by name.
        potentials: of the unpaired images of the batch, for the next time that they are seen.
    """

    metrics: Metrics
    potentials: RowPotentials = RowPotentials()


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """The static part of a loss; field by field ``config.objective`` and ``config.loss``."""

    objective: str
    divergence: str
    alpha: float
    epsilon: float
    teacher_epsilon: float
    threshold: float
    max_iterations: int
    iterations: int  # 0: until the threshold
    memory: Literal["auto", "dense", "streamed"]
    memory_gib: float
    warm_student: float
    warm_teacher: float
    precision: MatmulPrecision
    normalization: Literal["mean", "rows"]
    # Not of the configuration: where the rows of a batch are spread over devices, the axis of the
    # mesh, and how many pairs, unpaired images and unpaired texts a batch has before padding.
    axis_name: str | None = None
    sizes: tuple[int, int, int] = (0, 0, 0)

    @classmethod
    def from_config(cls, config: Config) -> LossSettings:
        """The settings of a validated configuration."""
        return cls(objective=config.objective, **config.loss.to_dict())

    @property
    def unpaired(self) -> bool:
        """Whether the objective reads unpaired rows."""
        return self.objective == "sail_semi" or self.teacher

    @property
    def teacher(self) -> bool:
        """Whether the objective reads the teacher's view of the unpaired rows."""
        return self.objective == "sotalign" and self.alpha > 0

    @property
    def warm(self) -> RowPotentials:
        """Of which plans potentials are kept from step to step."""
        klot = self.teacher and self.divergence == "klot"
        return RowPotentials(klot and self.warm_student > 0, klot and self.warm_teacher > 0)

    def prior(self, pairs: int, images: int, texts: int) -> float | None:
        """Share of true pairs among the combinations that SigLIP sees in a step.

        Args:
            pairs: pairs a step.
            images: unpaired images a step.
            texts: unpaired texts a step.

        Returns:
            The share, weighted as the loss weighs its entries; None where all are true pairs.
        """
        if self.objective != "sail_semi":
            return 1.0 / pairs if pairs > 1 else None
        if self.normalization == "rows":
            return 2.0 / (2 * pairs + images + texts)
        return 0.5 * (1.0 / (pairs + images) + 1.0 / (pairs + texts))


def _whole(rows: Array, settings: LossSettings) -> Array:
    """All rows of a batch, of which each device has a share."""
    if settings.axis_name is None:
        return rows
    return jax.lax.all_gather(rows, settings.axis_name, tiled=True)


def _counts(local: Array, size: int, settings: LossSettings) -> tuple[Any, Any]:
    """Which of this device's rows, and which of all rows, are not padding; None without a mesh."""
    if settings.axis_name is None:
        return None, None
    rows, devices = local.shape[0], jax.lax.axis_size(settings.axis_name)
    here = jax.lax.axis_index(settings.axis_name) * rows + jnp.arange(rows, dtype=jnp.int32)
    return here < size, jnp.arange(rows * devices) < size


def _block(rows: int, columns: int, settings: LossSettings) -> int | None:
    """Rows of SigLIP's logits to hold at once; None for all of them."""
    return dense_or_block(settings.memory, settings.memory_gib, rows, columns) or None


def _klot(
    image, text, batch: Batch, settings: LossSettings, start: RowPotentials
) -> tuple[Array, Outcome]:
    mask, _ = _counts(image, settings.sizes[1], settings)
    _, text_mask = _counts(text, settings.sizes[2], settings)
    text = _whole(text, settings)

    def init(potential, share: float):
        # The first update of a balanced problem replaces the potentials of the columns.
        return None if potential is None else (share * potential, jnp.zeros(text.shape[0]))

    value, info = losses.klot(
        image,
        text,
        batch.teacher_image,
        _whole(batch.teacher_text, settings),
        epsilon=settings.epsilon,
        teacher_epsilon=settings.teacher_epsilon,
        a=None if mask is None else mask.astype(jnp.float32) / settings.sizes[1],
        b=None if text_mask is None else text_mask.astype(jnp.float32) / settings.sizes[2],
        threshold=settings.threshold,
        max_iterations=settings.max_iterations,
        iterations=settings.iterations or None,
        init=(
            init(start.student, settings.warm_student),
            init(start.teacher, settings.warm_teacher),
        ),
        memory=settings.memory,
        memory_gib=settings.memory_gib,
        precision=settings.precision,
        axis_name=settings.axis_name,
    )
    metrics = {
        "train/klot": value,
        "train/student_marginal_error": info.student.marginal_error,
        "train/teacher_marginal_error": info.teacher.marginal_error,
        "train/student_iterations": info.student.iterations.astype(jnp.float32),
        "train/teacher_iterations": info.teacher.iterations.astype(jnp.float32),
    }
    potentials = RowPotentials(
        *(
            None if old is None else _centred(plan.f, mask, settings)
            for old, plan in zip(start, info, strict=True)
        )
    )
    return value, Outcome(metrics, potentials)


def _centred(potential: Array, mask: Array | None, settings: LossSettings) -> Array:
    """Row potentials less their mean, as which they are the same whatever constant a solve chose.

    So potentials of rows that were last seen in different batches can start one solve together.
    Padding, and potentials of a problem that has no plan, are 0.
    """
    known = jnp.isfinite(potential) if mask is None else mask & jnp.isfinite(potential)
    total = jnp.sum(jnp.where(known, potential, 0.0))
    count = jnp.sum(known.astype(potential.dtype))
    if settings.axis_name is not None:
        total, count = jax.lax.psum((total, count), settings.axis_name)
    return jnp.where(known, potential - total / jnp.maximum(count, 1.0), 0.0)


def _on_every_device(divergence, image, text, batch: Batch, settings: LossSettings) -> Array:
    """A divergence of whole batches, done by each device for itself: it has no form for a share."""
    _, images, texts = settings.sizes
    rows = (image, text, batch.teacher_image, batch.teacher_text)
    if settings.axis_name is None:
        return divergence(*rows)
    counts = (images, texts, images, texts)
    whole = (_whole(part, settings)[:count] for part, count in zip(rows, counts, strict=True))
    # Equal on all devices: the mean says so, and gives each the share of the gradient that is its.
    return jax.lax.pmean(divergence(*whole), settings.axis_name)


def _cka(
    image, text, batch: Batch, settings: LossSettings, start: RowPotentials
) -> tuple[Array, Outcome]:
    del start
    value = _on_every_device(losses.cka, image, text, batch, settings)
    return value, Outcome({"train/cka": value})


def _info_nce(
    image, text, batch: Batch, settings: LossSettings, start: RowPotentials
) -> tuple[Array, Outcome]:
    del start
    divergence = functools.partial(
        losses.info_nce_divergence,
        epsilon=settings.epsilon,
        teacher_epsilon=settings.teacher_epsilon,
    )
    value = _on_every_device(divergence, image, text, batch, settings)
    return value, Outcome({"train/info_nce_divergence": value})


DIVERGENCES: dict[str, Callable[..., tuple[Array, Outcome]]] = {
    "klot": _klot,
    "cka": _cka,
    "info_nce": _info_nce,
}


@jax.named_scope("siglip")
def sail(
    aligner: Aligner, batch: Batch, settings: LossSettings, start: RowPotentials
) -> tuple[Array, Outcome]:
    """SigLIP on the pairs alone: the supervised baseline (SAIL, CVPR 2025)."""
    del start
    image = aligner.project_image(batch.pairs_image)
    text = _whole(aligner.project_text(batch.pairs_text), settings)
    image_mask, text_mask = _counts(image, settings.sizes[0], settings)
    value = losses.siglip(
        image,
        text,
        scale=aligner.scale,
        bias=aligner.bias[...],
        normalization=settings.normalization,
        image_mask=image_mask,
        text_mask=text_mask,
        block=_block(image.shape[0], text.shape[0], settings),
        precision=settings.precision,
        axis_name=settings.axis_name,
    )
    return value, Outcome({"train/siglip": value})


@jax.named_scope("siglip")
def sail_semi(
    aligner: Aligner, batch: Batch, settings: LossSettings, start: RowPotentials
) -> tuple[Array, Outcome]:
    """SAIL with the unpaired rows as further negatives, averaged over both sides."""
    del start
    pairs = (aligner.project_image(batch.pairs_image), aligner.project_text(batch.pairs_text))
    more = (
        aligner.project_image(batch.unpaired_image),
        aligner.project_text(batch.unpaired_text),
    )
    mask, whole_mask = _counts(pairs[0], settings.sizes[0], settings)

    def against(side: int, other: int) -> Array:
        """The pairs of one side against the pairs and the unpaired rows of the other."""
        others = jnp.concatenate([_whole(pairs[other], settings), _whole(more[other], settings)])
        _, more_mask = _counts(more[other], settings.sizes[1 + other], settings)
        return losses.siglip(
            pairs[side],
            others,
            scale=aligner.scale,
            bias=aligner.bias[...],
            normalization=settings.normalization,
            image_mask=mask,
            text_mask=None if mask is None else jnp.concatenate([whole_mask, more_mask]),
            block=_block(pairs[side].shape[0], others.shape[0], settings),
            precision=settings.precision,
            axis_name=settings.axis_name,
        )

    value = 0.5 * (against(0, 1) + against(1, 0))
    return value, Outcome({"train/siglip": value})


def sotalign(
    aligner: Aligner, batch: Batch, settings: LossSettings, start: RowPotentials
) -> tuple[Array, Outcome]:
    """SigLIP on the pairs plus ``alpha`` times a divergence to the teacher on the unpaired rows.

    SOTAlign, arXiv 2602.23353, section 4.2.
    """
    value, supervised = sail(aligner, batch, settings, start)
    if settings.alpha == 0:
        return value, supervised
    with jax.named_scope("divergence"):
        divergence, outcome = DIVERGENCES[settings.divergence](
            aligner.project_image(batch.unpaired_image),
            aligner.project_text(batch.unpaired_text),
            batch,
            settings,
            start,
        )
    outcome = outcome._replace(metrics=supervised.metrics | outcome.metrics)
    return value + settings.alpha * divergence, outcome


OBJECTIVES: dict[str, Callable[..., tuple[Array, Outcome]]] = {
    "sotalign": sotalign,
    "sail": sail,
    "sail_semi": sail_semi,
}
