"""Losses on pairs: row ``i`` of the images belongs to row ``i`` of the texts."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from sotalign_jax.losses.affinity import check_same_dim
from sotalign_jax.numerics import MatmulPrecision, check_precision, matmul, unit_rows
from sotalign_jax.transport import StreamedAffinity
from sotalign_jax.transport.geometry import AxisName
from sotalign_jax.transport.streamed import over_blocks

__all__ = ["check_block", "info_nce", "one_sided_info_nce", "siglip"]


def siglip(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m d"],
    *,
    scale: float | Float[ArrayLike, ""] = 20.0,
    bias: float | Float[ArrayLike, ""] = -10.0,
    normalization: Literal["mean", "rows"] = "mean",
    image_mask: Bool[ArrayLike, " n"] | None = None,
    text_mask: Bool[ArrayLike, " m"] | None = None,
    block: int | None = None,
    precision: MatmulPrecision = "float32",
    axis_name: AxisName | None = None,
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
        image_mask: ``(n,)``, False for rows that do not count (padding); all count by default.
        text_mask: ``(m,)``, likewise. ``n`` and ``m`` above are then the rows that count.
        block: rows of logits that are held at once, forward and backward; all by default.
        precision: of the products of embeddings, forward and backward, as for `klot`;
            ``"bfloat16_3x"`` has no forward-mode derivative.
        axis_name: inside ``shard_map``, the mesh axes over which the images are spread: ``image``
            and ``image_mask`` are this device's rows, in the order of the devices; texts are whole
            on every device, and the value is the same on all.

    Returns:
        Float32 scalar, in nats.

    Raises:
        ValueError: if the dimensions differ, ``normalization`` or ``precision`` is unknown, or
            ``block`` is not positive.

    References:
        X. Zhai et al., "Sigmoid loss for language image pre-training", ICCV 2023, equation (1).
        SAIL, CVPR 2025. SOTAlign, arXiv 2602.23353, section 4.
    """
    if normalization not in ("mean", "rows"):
        raise ValueError(f"normalization must be 'mean' or 'rows', got {normalization!r}")
    check_block(block)
    check_precision(precision)
    check_same_dim(image, text)
    n, m = jnp.shape(image)[0], jnp.shape(text)[0]
    image_mask = jnp.ones(n, bool) if image_mask is None else jnp.asarray(image_mask)
    text_mask = jnp.ones(m, bool) if text_mask is None else jnp.asarray(text_mask)
    affinity = StreamedAffinity(unit_rows(image), unit_rows(text), block or n, precision)
    partner = _partners(n, axis_name)
    scale, bias = jnp.asarray(scale, jnp.float32), jnp.asarray(bias, jnp.float32)

    def rows_of(carry, rows):
        image, mask, partner = rows
        logits = scale * affinity.of_rows(image) + bias
        # -log sigmoid(x) = softplus(-x) = softplus(x) - x: all entries count as negatives, and the
        # true pairs are then corrected. No matrix of targets is formed.
        negatives = jnp.sum(jnp.where(text_mask[None, :], jax.nn.softplus(logits), 0.0), axis=1)
        at = jnp.minimum(partner, m - 1)
        paired = mask & (partner < m) & text_mask[at]
        own = jnp.take_along_axis(logits, at[:, None], axis=1)[:, 0]
        return carry, jnp.where(mask, negatives, 0.0) - jnp.where(paired, own, 0.0)

    if block is not None:
        rows_of = jax.checkpoint(rows_of)  # or the logits of all blocks would wait for the gradient
    _, losses = over_blocks(rows_of, (), (affinity.image, image_mask, partner), affinity.block)
    total, n = jnp.sum(losses), jnp.sum(image_mask, dtype=jnp.float32)
    if axis_name is not None:
        total, n = jax.lax.psum((total, n), axis_name)
    m = jnp.sum(text_mask, dtype=jnp.float32)
    return total / (n * m if normalization == "mean" else jnp.minimum(n, m))


def info_nce(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "n d"],
    *,
    scale: float | Float[ArrayLike, ""] = 1.0 / 0.07,
    precision: MatmulPrecision = "float32",
) -> Float[Array, ""]:
    r"""Symmetric InfoNCE: cross-entropy of each row, and of each column, to its own pair.

    .. math:: L = -\frac{1}{2n} \sum_i \Big(\log \frac{e^{s K_{ii}}}{\sum_j e^{s K_{ij}}}
              + \log \frac{e^{s K_{ii}}}{\sum_j e^{s K_{ji}}}\Big)

    The mean of :func:`one_sided_info_nce` in both directions, of logits that are formed once.

    Args:
        image: ``(n, d)`` embeddings, any floating dtype; rows are normalised here.
        text: ``(n, d)`` embeddings; text ``i`` belongs to image ``i``.
        scale: inverse temperature ``s``, positive (not its logarithm).
        precision: of the products of embeddings, as for `siglip`.

    Returns:
        Float32 scalar, in nats; ``log(n)`` when nothing is told apart.

    Raises:
        ValueError: if the shapes differ, or ``precision`` is unknown.

    References:
        A. Radford et al., "Learning transferable visual models from natural language supervision"
        (CLIP), ICML 2021.
    """
    if jnp.shape(image)[0] != jnp.shape(text)[0]:
        raise ValueError(
            f"image and text must pair row by row, got {jnp.shape(image)[0]} and "
            f"{jnp.shape(text)[0]} rows"
        )
    check_precision(precision)
    check_same_dim(image, text)
    logits = jnp.asarray(scale, jnp.float32) * matmul(
        unit_rows(image), unit_rows(text).T, precision
    )
    rows = jax.nn.logsumexp(logits, axis=1)
    columns = jax.nn.logsumexp(logits, axis=0)
    return jnp.mean(0.5 * (rows + columns) - jnp.diagonal(logits))


def one_sided_info_nce(
    anchor: Float[ArrayLike, "n d"],
    candidate: Float[ArrayLike, "m d"],
    *,
    scale: float | Float[ArrayLike, ""] = 1.0 / 0.07,
    anchor_mask: Bool[ArrayLike, " n"] | None = None,
    candidate_mask: Bool[ArrayLike, " m"] | None = None,
    block: int | None = None,
    precision: MatmulPrecision = "float32",
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""One direction of InfoNCE: cross-entropy of each anchor, among all candidates, to its own.

    .. math:: L = -\frac{1}{n} \sum_{i \le n} \log
              \frac{e^{s K_{ii}}}{\sum_{j \le m} e^{s K_{ij}}}, \qquad
              K_{ij} = \cos(\mathrm{anchor}_i, \mathrm{candidate}_j)

    Candidates beyond the first ``n`` are negatives only: S-CLIP has the unpaired texts stand among
    those of the paired images, and the reverse. With ``m = n`` the mean of both directions is
    :func:`info_nce`.

    Args:
        anchor: ``(n, d)`` embeddings, any floating dtype; rows are normalised here.
        candidate: ``(m, d)`` embeddings, ``m >= n``; candidate ``i`` belongs to anchor ``i``.
        scale: inverse temperature ``s``, positive (not its logarithm).
        anchor_mask: ``(n,)``, False for rows that do not count (padding); all count by default.
        candidate_mask: ``(m,)``, likewise; that of each anchor which counts must count.
        block: rows of logits that are held at once, forward and backward; all by default.
        precision: of the products of embeddings, as for :func:`siglip`.
        axis_name: inside ``shard_map``, the mesh axes over which the anchors are spread, in the
            order of the devices; candidates are whole on every device, and so is the value.

    Returns:
        Float32 scalar, in nats; ``log(m)`` when nothing is told apart.

    Raises:
        ValueError: if the dimensions differ, there are fewer candidates than anchors, ``precision``
            is unknown, or ``block`` is not positive.

    References:
        S. Mo et al., "S-CLIP: semi-supervised vision-language learning using few specialist
        captions", NeurIPS 2023, section 3.
    """
    check_block(block)
    check_precision(precision)
    if jnp.shape(anchor)[-1] != jnp.shape(candidate)[-1]:
        raise ValueError(
            f"candidate must have the dimension of anchor, {jnp.shape(anchor)[-1]}, got "
            f"{jnp.shape(candidate)[-1]}"
        )
    n, m = jnp.shape(anchor)[0], jnp.shape(candidate)[0]
    if m < n:
        raise ValueError(f"candidate must have a row for each of the {n} anchors, got {m}")
    anchor_mask = jnp.ones(n, bool) if anchor_mask is None else jnp.asarray(anchor_mask)
    wanted = jnp.ones(m, bool) if candidate_mask is None else jnp.asarray(candidate_mask)
    affinity = StreamedAffinity(unit_rows(anchor), unit_rows(candidate), block or n, precision)
    scale = jnp.asarray(scale, jnp.float32)

    def rows_of(carry, rows):
        anchor, mask, partner = rows
        logits = scale * affinity.of_rows(anchor)
        total = jax.nn.logsumexp(jnp.where(wanted[None, :], logits, -jnp.inf), axis=1)
        at = jnp.minimum(partner, m - 1)  # of padding there may be none
        own = jnp.take_along_axis(logits, at[:, None], axis=1)[:, 0]
        return carry, jnp.where(mask, total - own, 0.0)

    if block is not None:
        rows_of = jax.checkpoint(rows_of)  # as in `siglip`
    rows = (affinity.image, anchor_mask, _partners(n, axis_name))
    _, losses = over_blocks(rows_of, (), rows, affinity.block)
    total, count = jnp.sum(losses), jnp.sum(anchor_mask, dtype=jnp.float32)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / count


def check_block(block: int | None) -> None:
    """Raise unless so many rows can be held at once."""
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")


def _partners(n: int, axis_name: AxisName | None) -> Int[Array, " n"]:
    """The row of the other side that each of this device's rows belongs to."""
    first = jnp.asarray(0, jnp.int32)
    if axis_name is not None:
        first = jnp.asarray(jax.lax.axis_index(axis_name) * n, jnp.int32)
    return first + jnp.arange(n, dtype=jnp.int32)
