"""STRUCTURE: InfoNCE on the pairs, and layers that keep the similarities within a modality."""

from __future__ import annotations

import math
from collections.abc import Iterable
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
    no_prior,
    whole,
    with_log_scale,
)
from sotalign_jax.objectives.clip import pairs_info_nce
from sotalign_jax.objectives.options import options, traced

__all__ = ["STRUCTURE", "StructureOptions"]


@options
class StructureOptions:
    """The table ``config.structure``.

    Attributes:
        weight: ``lambda`` of the regulariser, after the warm-up.
        warmup: steps over which it rises to that, from 0 in the first; 0: there from the start.
        rows: whose similarities are kept: of the ``pairs`` of a batch, its ``unpaired`` rows, or
            ``both`` as one set.
        combine: images and texts count by their ``sum`` (paper) or their ``mean`` (published code).
        temperature: of InfoNCE and of the similarities; fixed, with no learned scale.
        levels: powers of the similarities that are compared; above 1 they cost ``n^3``.
        weighting: of the levels, equal (``none``) or one over the level (``inverse``).
        margin: divergence of a level, in nats, that is free.
        divergence: ``js``, Jensen-Shannon (paper), or ``reverse``, what the published code computes
            in its place.
        eps: inside the logarithms of ``reverse``.
    """

    weight: Any = traced(10.0)
    warmup: int = 0
    rows: Literal["pairs", "both", "unpaired"] = "pairs"
    combine: Literal["sum", "mean"] = "sum"
    temperature: float = 0.07
    levels: int = 1
    weighting: Literal["none", "inverse"] = "none"
    margin: float = 0.0
    divergence: Literal["js", "reverse"] = "js"
    eps: float = 1e-8

    def check(self) -> None:
        for name in ("weight", "warmup", "margin"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: must be finite and not negative, got {getattr(self, name)}"
                )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: must be positive and finite, got {self.temperature}")
        if self.levels < 1:
            raise ValueError(f"levels: must be at least 1, got {self.levels}")
        if not 1e-30 <= self.eps < 1:
            raise ValueError(f"eps: must lie in [1e-30, 1), got {self.eps}")


def _structure(
    aligner: Aligner, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    """InfoNCE plus ``lambda_t`` times a divergence of similarities, of images and of texts.

    With ``t`` the steps done, ``lambda_t = weight min(1, t / warmup)`` (Gröger et al., NeurIPS
    2025, and the published code). The similarities to keep are those of the rows as the aligner
    gets them: of unit length, centred as ``config.model`` says, once more made unit and centred on
    the batch. With ``model.center=False`` and no standardised columns these are the frozen
    features, as in the paper. Its "linear" layer has ``model.layer_norm=False``.

    Grids: ``structure.weight`` 0.1, 1, 10, 100, 1000 (of the published code's ``combine="mean"``
    and ``divergence="reverse"``), ``warmup`` 0 or 500, ``rows`` pairs or both, ``temperature`` 0.07
    or 0.05.
    """
    how: StructureOptions = settings.options
    sides = (
        (batch.pairs_image, batch.unpaired_image, settings.sizes[1], aligner.project_image),
        (batch.pairs_text, batch.unpaired_text, settings.sizes[2], aligner.project_text),
    )
    image, text = aligner.project_image(batch.pairs_image), aligner.project_text(batch.pairs_text)
    info_nce = pairs_info_nce(image, text, 1.0 / how.temperature, settings)
    regularisers = []
    for (pairs, unpaired, size, project), embedded in zip(sides, (image, text), strict=True):
        parts = []
        if how.rows != "unpaired":
            parts.append((embedded, pairs, settings.sizes[0]))
        if how.rows != "pairs":
            parts.append((project(unpaired), unpaired, size))
        regularisers.append(_regulariser(parts, how, settings))
    total = (regularisers[0] + regularisers[1]) * (1.0 if how.combine == "sum" else 0.5)
    done = jnp.asarray(moment.step, jnp.float32)
    weight = how.weight * (jnp.minimum(1.0, done / how.warmup) if how.warmup else jnp.ones(()))
    metrics = {
        "train/info_nce": info_nce,
        "train/structure_image": regularisers[0],
        "train/structure_text": regularisers[1],
        "train/structure_weight": weight,
    }
    return info_nce + weight * total, Outcome(metrics)


@jax.named_scope("structure")
def _regulariser(
    parts: list[tuple[Array, Array, int]], how: StructureOptions, settings: LossSettings
) -> Array:
    """The divergence of one modality, of (embeddings, features, rows before padding) of its parts.

    On a mesh all rows, features included, travel to every device, which compares its share.
    """

    def together(rows: Iterable[Array]) -> Array:
        if settings.axis_name is None:
            return jnp.concatenate(list(rows))
        sizes = [size for _, _, size in parts]
        return jnp.concatenate(
            [whole(part, settings)[:size] for part, size in zip(rows, sizes, strict=True)]
        )

    embeddings = together(embedded for embedded, _, _ in parts)
    features = together(frozen for _, frozen, _ in parts)
    count = embeddings.shape[0]
    if count < 2:
        raise ValueError(
            f"config.structure.rows: {how.rows!r} are {count} of a modality a step, and "
            "similarities need at least 2; take more rows a batch"
        )
    devices = 1 if settings.axis_name is None else jax.lax.axis_size(settings.axis_name)
    return losses.structure(
        embeddings,
        features,
        temperature=how.temperature,
        levels=how.levels,
        weighting=how.weighting,
        margin=how.margin,
        divergence=how.divergence,
        eps=how.eps,
        block=block(-(-count // devices), count, settings) if how.levels == 1 else None,
        axis_name=settings.axis_name,
    )


def _reads(config: Any) -> Reads:
    return Reads(unpaired=config.structure.rows != "pairs")


def _settle(params: Any, settings: LossSettings) -> Any:
    log_scale = jnp.asarray(-math.log(settings.options.temperature), jnp.float32)
    return with_log_scale(params, log_scale)


STRUCTURE = Objective(
    _structure, options=StructureOptions, reads=_reads, prior=no_prior, settle=_settle
)
