"""How sharp a plan is: over how many texts it spreads an image."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.transport.geometry import AxisName
from sotalign_jax.transport.plan import Plan
from sotalign_jax.transport.streamed import StreamedAffinity, over_blocks

__all__ = ["perplexity", "row_entropy"]


@jax.jit
def row_entropy(
    plan: Plan, affinity: Float[ArrayLike, "k m"] | StreamedAffinity
) -> Float[Array, " k"]:
    r"""Entropy, in nats, of each row of a plan as a distribution over the columns.

    .. math:: H_i = -\sum_j p_{ij} \log p_{ij}, \qquad
        p_{ij} = P_{ij} \Big/ \sum_j P_{ij} \propto \exp\big((g_j + K_{ij}) / \epsilon\big)

    The row potentials drop out, so that the rows may be any of the plan's, or others.

    Args:
        plan: solved for this affinity, or for one with more rows.
        affinity: ``(k, m)``, a matrix, or a `StreamedAffinity`, of which no more than a block is
            formed.

    Returns:
        ``(k,)`` entropies between 0 and ``log m``, of the dtype of the plan.
    """

    def entropies(block: Float[Array, "c m"]) -> Float[Array, " c"]:
        log = (plan.g[None, :] + block.astype(plan.g.dtype)) / plan.epsilon
        log = log - jnp.max(log, axis=1, keepdims=True)
        kernel = jnp.exp(log)
        total = jnp.sum(kernel, axis=1)
        # A forbidden entry, and a column without mass, is minus infinity and adds nothing.
        mean = jnp.sum(jnp.where(kernel > 0, kernel * log, 0.0), axis=1) / total
        return jnp.log(total) - mean

    if not isinstance(affinity, StreamedAffinity):
        return entropies(jnp.asarray(affinity))

    def one(carry, image):
        return carry, entropies(affinity.of_rows(image))

    return over_blocks(one, (), affinity.image, affinity.block)[1]


@functools.partial(jax.jit, static_argnames=("axis_name",))
def perplexity(
    plan: Plan,
    affinity: Float[ArrayLike, "k m"] | StreamedAffinity,
    *,
    weights: Float[ArrayLike, " k"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""The effective number of texts that an image is coupled to: ``exp`` of the mean row entropy.

    1 where every image has one text, ``m`` where the plan knows nothing.

    Args:
        plan: as for `row_entropy`.
        affinity: as for `row_entropy`.
        weights: ``(k,)`` of the rows, not negative; by default all count the same. A row of weight
            zero (padding) does not count.
        axis_name: inside ``shard_map``, the mesh axes over which the rows are spread.

    Returns:
        A scalar.
    """
    entropy = row_entropy(plan, affinity)
    weights = jnp.ones_like(entropy) if weights is None else jnp.asarray(weights, entropy.dtype)
    sums = (jnp.sum(jnp.where(weights > 0, weights * entropy, 0.0)), jnp.sum(weights))
    if axis_name is not None:
        sums = jax.lax.psum(sums, axis_name)
    return jnp.exp(sums[0] / sums[1])
