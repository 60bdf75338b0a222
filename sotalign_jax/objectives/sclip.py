"""S-CLIP: InfoNCE on the pairs, and pseudo-labels for the unpaired rows."""

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
    no_prior,
    whole,
    with_log_scale,
)
from sotalign_jax.objectives.options import options, traced

__all__ = ["SCLIP", "SClipOptions"]

_SIDES = {"both": ("image", "text"), "image": ("image",), "text": ("text",)}


@options
class SClipOptions:
    """The table ``config.sclip``.

    Attributes:
        labels: what the pseudo-labels are: the most similar pair (``"hard"``), a softmax over the
            pairs (``"soft"``), or the rows of an entropic transport plan (``"ot"``).
        space: where similarity to the pairs is measured: among the rows that the aligner takes
            (``"unimodal"``; without ``model.center``: features as they are, as published), or among
            what it makes of them (``"joint"``).
        sides: whose unpaired rows take part, as negatives and with pseudo-labels.
        image_weight: of the unpaired images' pseudo-labels; 0 leaves them as negatives. Grid: 0,
            0.1, 1, 10.
        text_weight: of the unpaired texts'. Grid: likewise.
        label_scale: inverse temperature of the pseudo-labels, for ``"ot"`` one over the
            regularisation; 0: the learned scale as it is at each step.
        max_scale: to which a learned scale is brought back after a step that went beyond; 0: no
            bound.
        iterations: of Sinkhorn for ``"ot"``; 0: until ``loss.threshold``, ``loss.max_iterations``
            at most.
    """

    labels: Literal["hard", "soft", "ot"] = "ot"
    space: Literal["unimodal", "joint"] = "unimodal"
    sides: Literal["both", "image", "text"] = "both"
    image_weight: Any = traced(default=1.0, zero_is_none=True)
    text_weight: Any = traced(default=1.0, zero_is_none=True)
    label_scale: Any = traced(default=0.0, zero_is_none=True)
    max_scale: Any = traced(default=0.0, zero_is_none=True)
    iterations: int = 10

    def check(self) -> None:
        for name in ("image_weight", "text_weight", "label_scale", "max_scale", "iterations"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: must be finite and not negative, got {getattr(self, name)}"
                )


def _sclip(
    aligner: Aligner, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    """InfoNCE of the pairs among all rows, and cross-entropy to pseudo-labels.

    Paired images look for their text among the paired and the unpaired texts, paired texts for
    their image likewise; the mean of the two. Unpaired images are told the texts of the paired
    images that they resemble, and the reverse; labels are constants.

    As in the SOTAlign baseline: the defaults, and any choice of the grids; its script has
    ``sides="image"``. As in S-CLIP: ``sides="image"``, ``image_weight=0.5``, ``space="joint"``,
    ``max_scale=100``, and ``batch.pairs`` as large as ``batch.unpaired``; there the gradient goes
    through the labels too. Its plan is that of 10 iterations, after which columns are still unequal
    at large scales; the plan that the paper defines has ``iterations=0``. The logit bias is not
    used.
    """
    del moment
    given: SClipOptions = settings.options
    sides = _SIDES[given.sides]
    project = {"image": aligner.project_image, "text": aligner.project_text}
    # Rows as the aligner takes them, and as it gives them back.
    taken = {
        "image": (batch.pairs_image, batch.unpaired_image),
        "text": (batch.pairs_text, batch.unpaired_text),
    }
    pairs = {side: project[side](taken[side][0]) for side in project}
    more = {side: project[side](taken[side][1]) for side in sides}
    all_pairs = {side: whole(rows, settings) for side, rows in pairs.items()}
    mask, all_mask = counts(pairs["image"], settings.sizes[0], settings)
    sizes = {"image": settings.sizes[1], "text": settings.sizes[2]}
    shared: dict[str, Any] = {
        "scale": aligner.scale,
        "precision": settings.precision,
        "axis_name": settings.axis_name,
    }

    def among(side: str, other: str) -> Array:
        """The pairs of one side, each among all rows of the other."""
        candidates, wanted = all_pairs[other], all_mask
        if other in sides:
            candidates = jnp.concatenate([candidates, whole(more[other], settings)])
            if wanted is not None:
                _, more_mask = counts(more[other], sizes[other], settings)
                wanted = jnp.concatenate([wanted, more_mask])
        return losses.one_sided_info_nce(
            pairs[side],
            candidates,
            anchor_mask=mask,
            candidate_mask=wanted,
            block=block(pairs[side].shape[0], candidates.shape[0], settings),
            **shared,
        )

    def labelled(side: str, other: str) -> Array:
        """The unpaired rows of one side with the pairs of the other."""
        views = (taken[side][1], whole(taken[side][0], settings))
        if given.space == "joint":
            views = (more[side], all_pairs[side])
        more_mask, _ = counts(more[side], sizes[side], settings)
        return losses.pseudo_label(
            more[side],
            all_pairs[other],
            *views,
            labels=given.labels,
            label_scale=given.label_scale,
            iterations=given.iterations or None,
            threshold=settings.threshold,
            max_iterations=settings.max_iterations,
            unpaired_mask=more_mask,
            paired_mask=all_mask,
            block=block(more[side].shape[0], all_pairs[other].shape[0], settings),
            **shared,
        )

    with jax.named_scope("info_nce"):
        value = 0.5 * (among("image", "text") + among("text", "image"))
    metrics = {"train/info_nce": value}
    weights = {"image": given.image_weight, "text": given.text_weight}
    with jax.named_scope("pseudo_label"):
        for side, other in (("image", "text"), ("text", "image")):
            if side in sides and weights[side] is not None:
                metrics[f"train/pseudo_label_{side}"] = labelled(side, other)
                value += weights[side] * metrics[f"train/pseudo_label_{side}"]
    return value, Outcome(metrics)


def _reads(config: Any) -> Reads:
    return Reads(unpaired=True, sides=_SIDES[config.sclip.sides])


def _settle(params: Any, settings: LossSettings) -> Any:
    if settings.options.max_scale is None:
        return params
    most = jnp.log(settings.options.max_scale)
    return with_log_scale(params, jnp.minimum(params["log_scale"][...], most))


SCLIP = Objective(_sclip, options=SClipOptions, reads=_reads, prior=no_prior, settle=_settle)
