"""Two images and two captions that differ in little: who belongs to whom (Winoground, MMVP)."""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

__all__ = ["mmvp_metrics", "winoground_metrics"]


def winoground_metrics(scores: Float[ArrayLike, "..."]) -> dict[str, float]:
    """Text, image and group score.

    An item's text score is 1 if each image scores strictly higher with its own caption than with
    the other, its image score if each caption does with its own image, its group score if both do.
    A tie is wrong. Chance is 1/4, 1/4 and 1/6.

    Args:
        scores: ``(n, 2, 2)``: of item, image and caption; caption k belongs to image k.

    Returns:
        ``text_score``, ``image_score``, ``group_score``, fractions of the items, and ``n_items``.

    Raises:
        ValueError: another shape, no items, NaN or infinity.

    References:
        Thrush et al., Winoground: probing vision and language models for visio-linguistic
        compositionality, CVPR 2022.
    """
    by_text, by_image = _right(scores)
    return {
        "text_score": float(np.mean(by_text)),
        "image_score": float(np.mean(by_image)),
        "group_score": float(np.mean(by_text & by_image)),
        "n_items": float(len(by_text)),
    }


def mmvp_metrics(scores: Float[ArrayLike, "..."], patterns: Sequence[str]) -> dict[str, float]:
    """Share of pairs in which both captions find their image, by visual pattern.

    That is Winoground's image score; with a softmax over the two images, each caption gives its own
    more than one half. A tie is wrong. Chance is 1/4.

    Args:
        scores: ``(n, 2, 2)``: of pair, image and caption; caption k belongs to image k.
        patterns: names, of which pair i has ``patterns[i // (n / len(patterns))]``.

    Returns:
        ``pattern/NAME`` for each, ``accuracy``, their mean, and ``n_items``.

    Raises:
        ValueError: another shape, no pairs, NaN or infinity, or pairs that do not divide into the
            patterns.

    References:
        Tong et al., Eyes wide shut? Exploring the visual shortcomings of multimodal LLMs, CVPR
        2024.
    """
    _, by_image = _right(scores)
    if not patterns or len(by_image) % len(patterns):
        raise ValueError(
            f"patterns: {len(by_image)} pairs do not divide into {len(patterns)} equal patterns"
        )
    shares = by_image.reshape(len(patterns), -1).mean(axis=1)
    metrics = {f"pattern/{name}": float(v) for name, v in zip(patterns, shares, strict=True)}
    return {"accuracy": float(np.mean(shares)), **metrics, "n_items": float(len(by_image))}


def _right(scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Whether each item's images find their captions, and its captions their images."""
    scores = np.asarray(scores)
    if scores.ndim != 3 or scores.shape[1:] != (2, 2) or not len(scores):
        raise ValueError(f"scores: shape {scores.shape}; items, images, captions are (n, 2, 2)")
    if not np.isfinite(scores).all():
        raise ValueError("scores: hold NaN or infinity; every score must be finite")
    first, second = scores[:, 0, 0], scores[:, 1, 1]
    image_0_caption_1, image_1_caption_0 = scores[:, 0, 1], scores[:, 1, 0]
    by_text = (first > image_0_caption_1) & (second > image_1_caption_0)
    by_image = (first > image_1_caption_0) & (second > image_0_caption_1)
    return by_text, by_image
