"""SAIL with the unpaired rows as further negatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sotalign_jax import losses
from sotalign_jax.features.batches import Batch
from sotalign_jax.models import Aligner
from sotalign_jax.objectives.base import (
    LossSettings,
    Moment,
    Objective,
    Outcome,
    Reads,
    block,
    counts,
    whole,
)

__all__ = ["SAIL_SEMI"]


@jax.named_scope("siglip")
def _sail_semi(
    aligner: Aligner, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    """Paired images against all texts, and paired texts against all images, averaged.

    Unpaired images and unpaired texts do not meet. Grids and the published choice: as of ``sail``.
    """
    del moment
    pairs = (aligner.project_image(batch.pairs_image), aligner.project_text(batch.pairs_text))
    more = (
        aligner.project_image(batch.unpaired_image),
        aligner.project_text(batch.unpaired_text),
    )
    mask, whole_mask = counts(pairs[0], settings.sizes[0], settings)

    def against(side: int, other: int) -> Array:
        """The pairs of one side against the pairs and the unpaired rows of the other."""
        others = jnp.concatenate([whole(pairs[other], settings), whole(more[other], settings)])
        _, more_mask = counts(more[other], settings.sizes[1 + other], settings)
        return losses.siglip(
            pairs[side],
            others,
            scale=aligner.scale,
            bias=aligner.bias[...],
            normalization=settings.normalization,
            image_mask=mask,
            text_mask=None if mask is None else jnp.concatenate([whole_mask, more_mask]),
            block=block(pairs[side].shape[0], others.shape[0], settings),
            precision=settings.precision,
            axis_name=settings.axis_name,
        )

    value = 0.5 * (against(0, 1) + against(1, 0))
    return value, Outcome({"train/siglip": value})


def _reads(config: Any) -> Reads:
    del config
    return Reads(unpaired=True)


def _prior(settings: LossSettings, pairs: int, images: int, texts: int) -> float:
    if settings.normalization == "rows":
        return 2.0 / (2 * pairs + images + texts)
    return 0.5 * (1.0 / (pairs + images) + 1.0 / (pairs + texts))


SAIL_SEMI = Objective(_sail_semi, reads=_reads, prior=_prior)
