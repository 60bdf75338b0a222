"""CLIP: symmetric InfoNCE on the pairs alone."""

from __future__ import annotations

import math
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
    block,
    counts,
    no_prior,
    whole,
    with_log_scale,
)
from sotalign_jax.objectives.options import options, traced

__all__ = ["CLIP", "ClipOptions", "pairs_info_nce"]


@options
class ClipOptions:
    """The table ``config.clip``.

    Attributes:
        temperature: 0 learns the scale, from ``model.scale`` on; another value fixes it at
            ``1 / temperature``.
        max_scale: to which a learned scale is brought back after a step that went beyond.
    """

    temperature: Any = traced(0.0)
    max_scale: Any = traced(100.0)

    def check(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(
                f"temperature: must be finite and not negative (0: learned), got {self.temperature}"
            )
        if not 0 < self.max_scale < math.inf:
            raise ValueError(f"max_scale: must be positive and finite, got {self.max_scale}")


@jax.named_scope("info_nce")
def pairs_info_nce(image: Array, text: Array, scale: Any, settings: LossSettings) -> Array:
    """Symmetric InfoNCE of embeddings of pairs, on a mesh this device's share of them."""
    n = image.shape[0]
    if settings.axis_name is None and block(n, n, settings) is None:
        return losses.info_nce(image, text, scale=scale, precision=settings.precision)
    mask, whole_mask = counts(image, settings.sizes[0], settings)

    def direction(anchor: Array, candidate: Array) -> Array:
        candidate = whole(candidate, settings)
        return losses.one_sided_info_nce(
            anchor,
            candidate,
            scale=scale,
            anchor_mask=mask,
            candidate_mask=whole_mask,
            block=block(anchor.shape[0], candidate.shape[0], settings),
            precision=settings.precision,
            axis_name=settings.axis_name,
        )

    return 0.5 * (direction(image, text) + direction(text, image))


def _clip(
    aligner: Aligner, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    """InfoNCE in both directions at a learned scale, without a bias (CLIP, ICML 2021).

    Grids: ``optimizer.learning_rate`` 1e-5 to 1e-3; fixed, ``clip.temperature`` 0.01 to 0.1. As in
    CLIP: ``model.scale=14.2857`` (1 / 0.07), learned, at most 100 after each step. The value is
    ``log(n)`` at chance, whatever ``loss.normalization`` says.
    """
    del moment
    fixed = settings.options.temperature
    image = aligner.project_image(batch.pairs_image)
    text = aligner.project_text(batch.pairs_text)
    scale = jnp.where(fixed > 0, 1.0 / jnp.where(fixed > 0, fixed, 1.0), aligner.scale)
    value = pairs_info_nce(image, text, scale, settings)
    return value, Outcome({"train/info_nce": value})


def _settle(params: Any, settings: LossSettings) -> Any:
    fixed, most = settings.options.temperature, settings.options.max_scale
    learned = jnp.minimum(params["log_scale"][...], jnp.log(most))
    return with_log_scale(
        params, jnp.where(fixed > 0, -jnp.log(jnp.where(fixed > 0, fixed, 1.0)), learned)
    )


CLIP = Objective(_clip, options=ClipOptions, prior=no_prior, settle=_settle)
