"""SAIL: SigLIP on the pairs alone, the supervised baseline."""

from __future__ import annotations

import jax
from jaxtyping import Array

from sotalign_jax import losses
from sotalign_jax.features.batches import Batch
from sotalign_jax.models import Aligner
from sotalign_jax.objectives.base import (
    LossSettings,
    Moment,
    Objective,
    Outcome,
    block,
    counts,
    whole,
)

__all__ = ["SAIL", "sail"]


@jax.named_scope("siglip")
def sail(
    aligner: Aligner, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    """SigLIP on the pairs (SAIL, CVPR 2025).

    Grids: ``optimizer.learning_rate`` 1e-5 to 1e-3, ``model.scale`` 10 or 20. As in the published
    code: ``loss.normalization="mean"``, scale 20, bias -10, ``optimizer.name="lion"``.
    """
    del moment
    image = aligner.project_image(batch.pairs_image)
    text = whole(aligner.project_text(batch.pairs_text), settings)
    image_mask, text_mask = counts(image, settings.sizes[0], settings)
    value = losses.siglip(
        image,
        text,
        scale=aligner.scale,
        bias=aligner.bias[...],
        normalization=settings.normalization,
        image_mask=image_mask,
        text_mask=text_mask,
        block=block(image.shape[0], text.shape[0], settings),
        precision=settings.precision,
        axis_name=settings.axis_name,
    )
    return value, Outcome({"train/siglip": value})


SAIL = Objective(sail)
