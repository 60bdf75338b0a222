"""Numeric helpers that every floor needs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

__all__ = ["Columns", "standardized_rows", "unit_rows", "varying_like", "varying_over"]


class Columns(NamedTuple):
    """What standardises the columns of a side's unit rows.

    Attributes:
        mean: ``(d,)``, subtracted from unit rows.
        scale: ``(d,)`` positive numbers that they are then divided by.
    """

    mean: Float[ArrayLike, "d"]
    scale: Float[ArrayLike, "d"]


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


def standardized_rows(rows, columns: Columns | None) -> Float[Array, "n d"]:
    """Unit rows whose columns were standardised, scaled to unit length again, in float32.

    Args:
        rows: ``(n, d)`` rows of unit length.
        columns: what to subtract and to divide by; ``None`` returns ``rows`` as they are.

    Returns:
        ``(n, d)`` float32.
    """
    if columns is None:
        return rows
    mean, scale = (jnp.asarray(value, jnp.float32)[None, :] for value in columns)
    return unit_rows((rows - mean) / scale)


def varying_like(value, *references):
    """``value``, marked inside ``shard_map`` as varying over the mesh axes that references do.

    Loops want what they carry to vary over the same axes before and after a step; a constant varies
    over none. Outside ``shard_map``, or with ``check_vma=False``, ``value`` as it is.
    """
    value = jnp.asarray(value)
    axes = {axis for x in references for axis in jax.typeof(x).manual_axis_type.varying}
    return varying_over(value, tuple(sorted(axes)))


def varying_over(value, axes: str | tuple[str, ...]):
    """``value``, marked inside ``shard_map`` as varying over ``axes``; see `varying_like`.

    The transpose sums cotangents over the axes that were added: how the gradient of a replicated
    argument is to be had.
    """
    axes = (axes,) if isinstance(axes, str) else axes
    missing = tuple(a for a in axes if a not in jax.typeof(value).manual_axis_type.varying)
    return jax.lax.pcast(value, missing, to="varying") if missing else value
