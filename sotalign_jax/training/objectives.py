"""What a step minimises: a loss of an aligner on a batch, by the name a configuration gives it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from sotalign_jax import losses
from sotalign_jax.config import Config
from sotalign_jax.features.batches import Batch
from sotalign_jax.models import Aligner

__all__ = ["DIVERGENCES", "OBJECTIVES", "LossSettings"]

Metrics = dict[str, Array]


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
    normalization: Literal["mean", "rows"]

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


def _klot(image, text, batch: Batch, settings: LossSettings) -> tuple[Array, Metrics]:
    value, info = losses.klot(
        image,
        text,
        batch.teacher_image,
        batch.teacher_text,
        epsilon=settings.epsilon,
        teacher_epsilon=settings.teacher_epsilon,
        threshold=settings.threshold,
        max_iterations=settings.max_iterations,
        iterations=settings.iterations or None,
    )
    return value, {
        "train/klot": value,
        "train/student_marginal_error": info.student.marginal_error,
        "train/teacher_marginal_error": info.teacher.marginal_error,
        "train/student_iterations": info.student.iterations.astype(jnp.float32),
        "train/teacher_iterations": info.teacher.iterations.astype(jnp.float32),
    }


def _cka(image, text, batch: Batch, settings: LossSettings) -> tuple[Array, Metrics]:
    del settings
    value = losses.cka(image, text, batch.teacher_image, batch.teacher_text)
    return value, {"train/cka": value}


def _info_nce(image, text, batch: Batch, settings: LossSettings) -> tuple[Array, Metrics]:
    value = losses.info_nce_divergence(
        image,
        text,
        batch.teacher_image,
        batch.teacher_text,
        epsilon=settings.epsilon,
        teacher_epsilon=settings.teacher_epsilon,
    )
    return value, {"train/info_nce_divergence": value}


DIVERGENCES: dict[str, Callable[..., tuple[Array, Metrics]]] = {
    "klot": _klot,
    "cka": _cka,
    "info_nce": _info_nce,
}


def sail(aligner: Aligner, batch: Batch, settings: LossSettings) -> tuple[Array, Metrics]:
    """SigLIP on the pairs alone: the supervised baseline (SAIL, CVPR 2025)."""
    value = losses.siglip(
        aligner.project_image(batch.pairs_image),
        aligner.project_text(batch.pairs_text),
        scale=aligner.scale,
        bias=aligner.bias[...],
        normalization=settings.normalization,
    )
    return value, {"train/siglip": value}


def sail_semi(aligner: Aligner, batch: Batch, settings: LossSettings) -> tuple[Array, Metrics]:
    """SAIL with the unpaired rows as further negatives, averaged over both sides."""
    image = aligner.project_image(batch.pairs_image)
    text = aligner.project_text(batch.pairs_text)
    more_image = aligner.project_image(batch.unpaired_image)
    more_text = aligner.project_text(batch.unpaired_text)
    siglip = functools.partial(
        losses.siglip,
        scale=aligner.scale,
        bias=aligner.bias[...],
        normalization=settings.normalization,
    )
    value = 0.5 * (
        siglip(image, jnp.concatenate([text, more_text]))
        + siglip(jnp.concatenate([image, more_image]), text)
    )
    return value, {"train/siglip": value}


def sotalign(aligner: Aligner, batch: Batch, settings: LossSettings) -> tuple[Array, Metrics]:
    """SigLIP on the pairs plus ``alpha`` times a divergence to the teacher on the unpaired rows.

    SOTAlign, arXiv 2602.23353, section 4.2.
    """
    value, metrics = sail(aligner, batch, settings)
    if settings.alpha == 0:
        return value, metrics
    divergence, more = DIVERGENCES[settings.divergence](
        aligner.project_image(batch.unpaired_image),
        aligner.project_text(batch.unpaired_text),
        batch,
        settings,
    )
    return value + settings.alpha * divergence, metrics | more


OBJECTIVES: dict[str, Callable[..., tuple[Array, Metrics]]] = {
    "sotalign": sotalign,
    "sail": sail,
    "sail_semi": sail_semi,
}
