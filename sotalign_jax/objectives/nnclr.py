"""Nearest neighbours as further positives, on top of SAIL: NNCLR and DeCLIP."""

from __future__ import annotations

import math
from typing import Any, Literal

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
from sotalign_jax.objectives.options import options, traced

__all__ = ["NNCLR", "NeighbourOptions"]


@options
class NeighbourOptions:
    """The table ``config.nnclr``.

    Attributes:
        k: the neighbour of a step is one of so many nearest, each as likely. Grid: 1, 5, 10.
        text_weight: of the images with neighbours of their texts. Grid: 0, 0.1, 1, 10.
        image_weight: of the texts with neighbours of their images. Grid: likewise.
        base_weight: of SigLIP on the pairs themselves.
        stop_gradient: whether the embeddings of neighbours are constants.
        duplicates: whether unpaired rows that equal the pair's own, or each other, count.
    """

    k: int = 5
    text_weight: Any = traced(default=1.0, zero_is_none=True)
    image_weight: Any = traced(default=1.0, zero_is_none=True)
    base_weight: Any = traced(default=1.0, zero_is_none=True)
    stop_gradient: bool = False
    duplicates: Literal["drop", "keep"] = "drop"

    def check(self) -> None:
        if self.k < 1:
            raise ValueError(f"k: must be at least 1, got {self.k}")
        weights = ("text_weight", "image_weight", "base_weight")
        for name in weights:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: must be finite and not negative, got {getattr(self, name)}"
                )
        if not any(getattr(self, name) for name in weights):
            raise ValueError("base_weight: must be positive where the other weights are 0, got 0")


@jax.named_scope("siglip")
def _nnclr(
    aligner: Aligner, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    """SigLIP on the pairs, and with a neighbour in place of their text or of their image.

    A pair's neighbours are the unpaired texts nearest to its text, and the unpaired images nearest
    to its image, by cosines of the rows that the aligner takes (without ``model.center``: of the
    features as they are, as published). They are searched once, all rows compared; the published
    code searches approximately, and through the pairs too. A step draws one of the ``k`` of each.

    As in the SOTAlign baseline: the defaults, with ``duplicates="keep"``; the gradient goes through
    neighbours, and ``loss.normalization="mean"``. As in DeCLIP: ``stop_gradient``, ``k=1``,
    ``image_weight=0``, ``text_weight`` a half of ``base_weight``, over a bank of past texts and
    with InfoNCE; NNCLR likewise.
    """
    del moment
    given: NeighbourOptions = settings.options
    image = aligner.project_image(batch.pairs_image)
    text = whole(aligner.project_text(batch.pairs_text), settings)
    image_mask, text_mask = counts(image, settings.sizes[0], settings)
    shared: dict[str, Any] = {
        "scale": aligner.scale,
        "bias": aligner.bias[...],
        "normalization": settings.normalization,
        "image_mask": image_mask,
        "text_mask": text_mask,
        "block": block(image.shape[0], text.shape[0], settings),
        "precision": settings.precision,
        "axis_name": settings.axis_name,
    }
    value, metrics = jnp.zeros(()), {}
    if given.base_weight is not None:
        metrics["train/siglip"] = losses.siglip(image, text, **shared)
        value += given.base_weight * metrics["train/siglip"]

    def constant(rows: Array) -> Array:
        return jax.lax.stop_gradient(rows) if given.stop_gradient else rows

    near: dict[str, Any] = {}
    if given.text_weight is not None:
        rows = constant(aligner.project_text(batch.neighbour_text))
        near |= {"text_neighbour": whole(rows, settings), "text_weight": given.text_weight}
    if given.image_weight is not None:
        rows = constant(aligner.project_image(batch.neighbour_image))
        near |= {"image_neighbour": rows, "image_weight": given.image_weight}
    if near:
        metrics["train/neighbour_siglip"] = losses.neighbour_siglip(image, text, **near, **shared)
        value += metrics["train/neighbour_siglip"]
    return value, Outcome(metrics)


def _reads(config: Any) -> Reads:
    given = config.nnclr
    sides = tuple(side for side in ("image", "text") if given[f"{side}_weight"])
    return Reads(neighbours=given.k if sides else 0, duplicates=given.duplicates, sides=sides)


NNCLR = Objective(_nnclr, options=NeighbourOptions, reads=_reads)
