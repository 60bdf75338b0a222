"""STRUCTURE: alignment layers keep the similarities that rows of one modality have among them."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from sotalign_jax.numerics import unit_rows
from sotalign_jax.transport.geometry import AxisName
from sotalign_jax.transport.streamed import over_blocks

__all__ = ["structure"]

# Similarities that add nothing to a divergence in float32, and whose inverse square, which the
# gradient forms, would leave it.
_NOTHING = 1e-18
# What float32 still tells from 0, inverse and all.
_SMALLEST_EPS = 1e-30


def structure(
    embeddings: Float[ArrayLike, "n d"],
    features: Float[ArrayLike, "n e"],
    *,
    temperature: float = 0.07,
    levels: int = 1,
    weighting: Literal["none", "inverse"] = "none",
    margin: float = 0.0,
    divergence: Literal["js", "reverse"] = "js",
    eps: float = 1e-8,
    block: int | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""Divergence between the similarities within a modality before and after its layer.

    With ``z`` the rows scaled to unit length, less their mean (and not scaled again),

    .. math:: P = \mathrm{softmax}_j(z_i \cdot z_j / \tau), \qquad
              R = \frac{1}{L} \sum_{l=1}^{L} w_l \max\Big(0, \frac{1}{n} \sum_i
              D\big((P^l)_i, (Q^l)_i\big) - \mathrm{margin}\Big)

    for ``P`` of the embeddings and ``Q`` of the features; the diagonal counts. One call is one
    modality: add those of images and texts (as in the paper), or average them (as in its code).
    Unpaired rows take part by standing among the rows; all rows count. The method adds it, with a
    weight that may rise over the first steps, to InfoNCE at the same fixed temperature, without a
    learned scale.

    Args:
        embeddings: ``(n, d)`` what the layer makes of the rows, any floating dtype.
        features: ``(n, e)`` frozen features of the same rows; a constant, no gradient.
        temperature: ``tau``, in units of cosine.
        levels: ``L``, powers of the similarities that are compared; those above 1 cost ``n^3``.
        weighting: ``w_l``: 1 (``"none"``) or ``1 / l`` (``"inverse"``).
        margin: divergence of a level, in nats, that is free.
        divergence: with ``M = (P + Q) / 2``, ``"js"``: ``(KL(P || M) + KL(Q || M)) / 2``, as in
            the paper, at most ``log 2``; ``"reverse"``: ``(KL(M || P) + KL(M || Q)) / 2``, as in
            the published code, with ``eps`` inside the logarithms of ``P`` and ``Q``: unbounded,
            and several times larger, so that a weight tuned for one is not one for the other: the
            published tables' weights, 0.1 to 1000, are of ``"reverse"`` with ``eps`` 1e-8.
        eps: of ``"reverse"``: 1e-8 and 1e-12 were both published.
        block: rows of the similarities that are held at once, forward and backward; all by
            default. For one level only.
        axis_name: inside ``shard_map``, the mesh axes over which the comparison is spread: rows are
            whole on every device, each compares its share of them with all, and the value is the
            same on all.

    Returns:
        Float32 scalar, in nats, not negative; 0 when similarities agree.

    Raises:
        ValueError: if the rows differ in number or are fewer than 2, or an option is out of range.

    References:
        F. Gröger et al., "With limited data for multimodal alignment, let the STRUCTURE guide
        you", NeurIPS 2025.
    """
    _check(embeddings, features, temperature, levels, weighting, margin, divergence, eps, block)
    ours, frozen = _centred(embeddings), jax.lax.stop_gradient(_centred(features))

    def distances(p, q):
        return _jensen_shannon(p, q) if divergence == "js" else _reverse(p, q, eps)

    mine, counts = _share(ours.shape[0], axis_name)
    here = (ours[mine], frozen[mine])

    def mean(values):
        total = jnp.sum(jnp.where(counts, values, 0.0))
        return (total if axis_name is None else jax.lax.psum(total, axis_name)) / ours.shape[0]

    if levels == 1:

        def rows_of(carry, rows):
            p = _similarities(rows[0], ours, temperature)
            q = _similarities(rows[1], frozen, temperature)
            return carry, distances(p, q)

        # Formed again for the gradient, or all of them would wait for it.
        rows_of = jax.checkpoint(rows_of)
        _, values = over_blocks(rows_of, (), here, block or len(mine))
        return jax.nn.relu(mean(values) - margin)

    p, q = (_similarities(rows, rows, temperature) for rows in (ours, frozen))
    p_power, q_power = p[mine], q[mine]
    total = jnp.asarray(0.0, jnp.float32)
    for level in range(1, levels + 1):
        if level > 1:
            p_power, q_power = _product(p_power, p), _product(q_power, q)
        weight = 1.0 if weighting == "none" else 1.0 / level
        total += weight * jax.nn.relu(mean(distances(p_power, q_power)) - margin)
    return total / levels


def _share(n: int, axis_name: AxisName | None) -> tuple[Int[Array, " k"], Bool[Array, " k"]]:
    """Which of ``n`` rows this device works on, and which of these are rows, not repetitions."""
    if axis_name is None:
        return jnp.arange(n), jnp.ones(n, bool)
    each = -(-n // jax.lax.axis_size(axis_name))
    mine = jax.lax.axis_index(axis_name) * each + jnp.arange(each, dtype=jnp.int32)
    return jnp.minimum(mine, n - 1), mine < n


def _check(embeddings, features, temperature, levels, weighting, margin, divergence, eps, block):
    n, frozen = jnp.shape(embeddings)[0], jnp.shape(features)[0]
    if n != frozen:
        raise ValueError(
            f"features must be those of the rows of embeddings: got {frozen} rows for {n}"
        )
    if n < 2:
        raise ValueError(f"embeddings must have at least 2 rows to compare, got {n}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if levels < 1:
        raise ValueError(f"levels must be at least 1, got {levels}")
    if weighting not in ("none", "inverse"):
        raise ValueError(f"weighting must be 'none' or 'inverse', got {weighting!r}")
    if not margin >= 0:
        raise ValueError(f"margin must not be negative, got {margin}")
    if divergence not in ("js", "reverse"):
        raise ValueError(f"divergence must be 'js' or 'reverse', got {divergence!r}")
    if not eps >= _SMALLEST_EPS:
        raise ValueError(f"eps must be at least {_SMALLEST_EPS}, got {eps}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if block is not None and levels > 1:
        raise ValueError(f"block needs levels=1: powers are of whole matrices, got levels={levels}")


def _centred(rows):
    rows = unit_rows(rows)
    return rows - jnp.mean(rows, axis=0, keepdims=True)


def _product(left, right):
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _similarities(rows, all_rows, temperature: float):
    return jax.nn.softmax(_product(rows, all_rows.T) / temperature, axis=1)


def _jensen_shannon(p, q):
    middle = 0.5 * (p + q)
    return 0.5 * jnp.sum(_relative(p, middle) + _relative(q, middle), axis=1)


def _relative(p, middle):
    """``p log(p / middle)``, by the ratio, which is exact near one; 0 where ``p`` is next to 0."""
    counts = p > _NOTHING
    ratio = jnp.where(counts, p, 1.0) / jnp.where(counts, middle, 1.0)
    return jnp.where(counts, p * jnp.log(ratio), 0.0)


def _reverse(p, q, eps: float):
    middle = 0.5 * (p + q)
    own = jnp.log(jnp.where(middle > _NOTHING, middle, 1.0))
    return jnp.sum(middle * (own - 0.5 * (jnp.log(p + eps) + jnp.log(q + eps))), axis=1)
