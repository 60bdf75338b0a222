"""Centred kernel alignment with the teacher's affinities."""

from __future__ import annotations

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

__all__ = ["CKA"]


def _cka(
    image: Array, text: Array, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    del moment
    _, images, texts = settings.sizes
    rows = (image, text, batch.teacher_image, batch.teacher_text)
    value = on_every_device(losses.cka, rows, (images, texts, images, texts), settings)
    return value, Outcome({"train/cka": value})


CKA = Divergence(_cka)
