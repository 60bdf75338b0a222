"""Numeric helpers that every floor needs."""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

__all__ = [
    "Columns",
    "MatmulPrecision",
    "check_precision",
    "matmul",
    "standardized_rows",
    "unit_rows",
    "unit_rows64",
    "varying_like",
    "varying_over",
]

MatmulPrecision = Literal["float32", "bfloat16_3x"]


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


def unit_rows64(rows: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length in float64 on the host; a row of zeros stays zero.

    Args:
        rows: ``(n, d)`` array of any floating dtype.

    Returns:
        ``(n, d)`` float64.
    """
    rows = rows.astype(np.float64, copy=False)
    scale = np.abs(rows).max(axis=1, keepdims=True)
    rows = rows / np.where(scale > 0, scale, 1.0)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 0, norm, 1.0)


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


def check_precision(precision: str) -> None:
    """Checks the name of a precision.

    Args:
        precision: what was asked for.

    Raises:
        ValueError: unless `matmul` knows it.
    """
    if precision not in ("float32", "bfloat16_3x"):
        raise ValueError(f"precision must be 'float32' or 'bfloat16_3x', got {precision!r}")


def matmul(
    left: Float[ArrayLike, "n d"],
    right: Float[ArrayLike, "d m"],
    precision: MatmulPrecision = "float32",
) -> Float[Array, "n m"]:
    r"""``left @ right`` of float32 matrices, in full or by three products of bfloat16 parts.

    With ``x = head + rest`` for both operands, ``"bfloat16_3x"`` is

    .. math:: \mathrm{head}\,\mathrm{head}' + \mathrm{head}\,\mathrm{rest}'
              + \mathrm{rest}\,\mathrm{head}'

    summed in float32: a relative error of about ``2^-16`` a term, where a single bfloat16 product
    has ``2^-8`` and float32 ``2^-24``. The parts are formed here and not left to the device, so
    that the numbers are those of this formula everywhere. Its gradient is formed in the same way,
    in reverse mode only (``jax.grad``, not ``jax.jvp``).

    Args:
        left: ``(n, d)`` float32.
        right: ``(d, m)`` float32.
        precision: ``"float32"`` or ``"bfloat16_3x"``.

    Returns:
        ``(n, m)`` float32.

    Raises:
        ValueError: for another precision.
    """
    check_precision(precision)
    if precision == "float32":
        return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
    # A custom gradient is not summed over the axes that only one operand varies over: make both.
    return _matmul_by_parts(varying_like(left, left, right), varying_like(right, left, right))


@jax.custom_vjp
def _matmul_by_parts(left, right):
    (left, left_rest), (right, right_rest) = _bfloat16_parts(left), _bfloat16_parts(right)
    product = functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    return product(left, right) + (product(left, right_rest) + product(left_rest, right))


def _matmul_fwd(left, right):
    return _matmul_by_parts(left, right), (left, right)


def _matmul_bwd(operands, cotangent):
    left, right = operands
    return _matmul_by_parts(cotangent, right.T), _matmul_by_parts(left.T, cotangent)


_matmul_by_parts.defvjp(_matmul_fwd, _matmul_bwd)


def _bfloat16_parts(x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """The leading bits of ``x``, and those that follow, each as bfloat16."""
    # Not by a cast there and back, which XLA may take for no cast at all: the rest would be zero.
    head = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    rest = jax.lax.reduce_precision(x - head, exponent_bits=8, mantissa_bits=7)
    return head.astype(jnp.bfloat16), rest.astype(jnp.bfloat16)


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
