"""The one numeric helper that every floor needs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["unit_rows"]


def unit_rows(rows) -> Float[Array, "n d"]:
    """Rows scaled to unit Euclidean length, in float32 whatever comes in.

    A row of zeros has no direction and stays zero (its cosine with anything is 0, its gradient 0).

    Args:
        rows: ``(n, d)`` array of any floating dtype.

    Returns:
        ``(n, d)`` float32.
    """
    rows = jnp.asarray(rows).astype(jnp.float32)
    # Scaling by the largest entry first keeps the squares of very large and very small rows finite.
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(rows), axis=-1, keepdims=True))
    scaled = rows / jnp.where(scale > 0, scale, 1.0)
    square = jnp.sum(scaled * scaled, axis=-1, keepdims=True)
    inverse = jnp.where(square > 0, jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return scaled * inverse
