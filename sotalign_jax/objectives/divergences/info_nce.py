"""Generalised InfoNCE: row-wise softmaxes of the teacher's and the student's affinities."""

from __future__ import annotations

import functools

from jaxtyping import Array

from sotalign_jax import losses
from sotalign_jax.features.batches import Batch
from sotalign_jax.objectives.base import (
    Divergence,
    LossSettings,
    Moment,
    Outcome,
    on_every_device,
)

__all__ = ["INFO_NCE"]


def _info_nce(
    image: Array, text: Array, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    del moment
    divergence = functools.partial(
        losses.info_nce_divergence,
        epsilon=settings.epsilon,
        teacher_epsilon=0.0 if settings.teacher_epsilon is None else settings.teacher_epsilon,
    )
    _, images, texts = settings.sizes
    rows = (image, text, batch.teacher_image, batch.teacher_text)
    value = on_every_device(divergence, rows, (images, texts, images, texts), settings)
    return value, Outcome({"train/info_nce_divergence": value})


INFO_NCE = Divergence(_info_nce)
