"""Losses on pairs: row ``i`` of the images belongs to row ``i`` of the texts."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.losses.affinity import cosine_affinity

__all__ = ["info_nce", "siglip"]


def siglip(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m d"],
    *,
    scale: float | Float[ArrayLike, ""] = 20.0,
    bias: float | Float[ArrayLike, ""] = -10.0,
    normalization: Literal["mean", "rows"] = "mean",
) -> Float[Array, ""]:
    r"""Sigmoid loss of every image with every text, the diagonal being the true pairs.

    .. math::
        L = -\frac{1}{Z} \sum_{i \le n,\; j \le m} \log \sigma\big(z_{ij}
        (\mathrm{scale} \cos(\mathrm{image}_i, \mathrm{text}_j) + \mathrm{bias})\big),
        \qquad z_{ij} = +1 \text{ if } i = j \text{ else } -1

    Further rows on the longer side are negatives only, so ``m > n`` takes extra unpaired texts and
    ``n > m`` extra unpaired images (semi-supervised SAIL averages the two).

    Args:
        image: ``(n, d)`` embeddings, any floating dtype; rows are normalised here.
        text: ``(m, d)`` embeddings; text ``i`` belongs to image ``i`` for ``i < min(n, m)``.
        scale: logit scale, positive (not its logarithm). The paper starts at 20 and learns it.
        bias: logit bias. The paper starts at -10 and learns it.
        normalization: ``"mean"``: ``Z = n m``, as in the SOTAlign authors' code, to which the
            paper's alpha refers; ``"rows"``: ``Z = min(n, m)``, as in the SigLIP paper, which is
            ``max(n, m)`` times larger.

    Returns:
        Float32 scalar, in nats.

    Raises:
        ValueError: if the dimensions differ or ``normalization`` is unknown.

    References:
        X. Zhai et al., "Sigmoid loss for language image pre-training", ICCV 2023, equation (1).
        SAIL, CVPR 2025. SOTAlign, arXiv 2602.23353, section 4.
    """
    if normalization not in ("mean", "rows"):
        raise ValueError(f"normalization must be 'mean' or 'rows', got {normalization!r}")
    logits = jnp.asarray(scale, jnp.float32) * cosine_affinity(image, text)
    logits = logits + jnp.asarray(bias, jnp.float32)
    # -log sigmoid(x) = softplus(-x) = softplus(x) - x: all entries count as negatives, and the
    # diagonal is then corrected. No matrix of targets is formed.
    total = jnp.sum(jnp.sum(jax.nn.softplus(logits), axis=1)) - jnp.sum(jnp.diagonal(logits))
    n, m = logits.shape
    return total / (n * m if normalization == "mean" else min(n, m))


def info_nce(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "n d"],
    *,
    scale: float | Float[ArrayLike, ""] = 1.0 / 0.07,
) -> Float[Array, ""]:
    r"""Symmetric InfoNCE: cross-entropy of each row, and of each column, to its own pair.

    .. math:: L = -\frac{1}{2n} \sum_i \Big(\log \frac{e^{s K_{ii}}}{\sum_j e^{s K_{ij}}}
              + \log \frac{e^{s K_{ii}}}{\sum_j e^{s K_{ji}}}\Big)

    Args:
        image: ``(n, d)`` embeddings, any floating dtype; rows are normalised here.
        text: ``(n, d)`` embeddings; text ``i`` belongs to image ``i``.
        scale: inverse temperature ``s``, positive (not its logarithm).

    Returns:
        Float32 scalar, in nats; ``log(n)`` when nothing is told apart.

    Raises:
        ValueError: if the shapes differ.

    References:
        A. Radford et al., "Learning transferable visual models from natural language supervision"
        (CLIP), ICML 2021.
    """
    if jnp.shape(image)[0] != jnp.shape(text)[0]:
        raise ValueError(
            f"image and text must pair row by row, got {jnp.shape(image)[0]} and "
            f"{jnp.shape(text)[0]} rows"
        )
    logits = jnp.asarray(scale, jnp.float32) * cosine_affinity(image, text)
    rows = jax.nn.logsumexp(logits, axis=1)
    columns = jax.nn.logsumexp(logits, axis=0)
    return jnp.mean(0.5 * (rows + columns) - jnp.diagonal(logits))
