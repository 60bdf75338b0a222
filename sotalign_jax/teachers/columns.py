"""Standardisation of feature columns, from moments in one pass: an extension, not in the paper.

Encoders put most of their variance into a few columns, and cosines see little else. Dividing a
column by a power of its standard deviation lets the others speak; the deviations need no pairs, so
the unpaired rows may tell them.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from sotalign_jax.numerics import Columns, unit_rows64

__all__ = ["ColumnMoments", "column_moments_of", "columns_of", "merge_column_moments"]

_EPS = float(np.finfo(np.float64).eps)


class ColumnMoments(NamedTuple):
    """Count, mean and squared deviations of every column of one side's rows, float64 NumPy.

    Attributes:
        count: number of rows seen.
        mean: ``(d,)`` mean row.
        squares: ``(d,)`` sum over rows of ``(row - mean)^2``.
    """

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    mean: Float[np.ndarray, "d"]
    squares: Float[np.ndarray, "d"]


def merge_column_moments(a: ColumnMoments, b: ColumnMoments) -> ColumnMoments:
    """The moments of two disjoint sets of rows together; see `merge_moments`.

    Args:
        a: moments of one set.
        b: moments of another, of the same dimension.

    Returns:
        `ColumnMoments` of the union.

    Raises:
        ValueError: the dimensions differ.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(
            f"b: {len(b.mean)} columns differ from {len(a.mean)} of a; one encoder per side"
        )
    if a.count == 0 or b.count == 0:
        return b if a.count == 0 else a
    count = int(a.count) + int(b.count)
    delta, share = b.mean - a.mean, b.count / count
    return ColumnMoments(
        count, a.mean + share * delta, a.squares + b.squares + a.count * share * delta**2
    )


def column_moments_of(chunks: Iterable[ArrayLike]) -> ColumnMoments:
    """The moments of the columns of unit rows, in one pass over chunks.

    Args:
        chunks: iterable of ``(n, d)`` raw features, n may differ by chunk and be 0.

    Returns:
        `ColumnMoments` of all rows, each scaled to unit length first.

    Raises:
        ValueError: no chunk at all, or one that is no matrix, has another width than those before
            it, or holds NaN or infinity (named by its number).
    """
    moments = None
    for number, chunk in enumerate(chunks):
        rows = np.asarray(chunk, np.float64)
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise ValueError(
                f"chunks[{number}]: shape {rows.shape}; rows by features, (n, d), are needed"
            )
        if not np.isfinite(rows).all():
            raise ValueError(f"chunks[{number}]: holds NaN or infinity; all must be finite")
        if len(rows):
            rows = unit_rows64(rows)
            mean = rows.mean(axis=0)
            one = ColumnMoments(len(rows), mean, np.square(rows - mean).sum(axis=0))
        else:
            one = ColumnMoments(0, np.zeros(rows.shape[1]), np.zeros(rows.shape[1]))
        moments = one if moments is None else merge_column_moments(moments, one)
    if moments is None:
        raise ValueError("chunks: empty; at least one (n, d) chunk is needed")
    return moments


def columns_of(moments: ColumnMoments, *, power: float, floor: float = 0.05) -> Columns:
    """What standardises columns with these moments: minus the mean, over ``deviation ** power``.

    A deviation below ``floor`` times the median over the columns counts as that much, so that
    columns which hardly vary are not blown up.

    Args:
        moments: of unit rows; of pairs and unpaired rows together, say.
        power: in (0, 1]; 1 gives all columns unit variance, 0.5 goes half of the way.
        floor: in (0, 1], in units of the median deviation (default 0.05).

    Returns:
        `Columns`, float32.

    Raises:
        ValueError: an argument is out of range, there are fewer than 2 rows, or more than half of
            the columns do not vary.
    """
    for name, value in (("power", power), ("floor", floor)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}={value}: must lie in (0, 1]")
    if moments.count < 2:
        raise ValueError(f"moments: of {moments.count} rows; deviations need at least 2")
    deviation = np.sqrt(moments.squares / moments.count)
    # The mean of equal numbers is exact to a few units in the last place.
    deviation[deviation <= 16 * _EPS * np.abs(moments.mean)] = 0.0
    median = float(np.median(deviation))
    if median == 0:
        raise ValueError(
            f"moments: {int(np.sum(deviation == 0))} of {len(deviation)} columns do not vary, so "
            "their median deviation is 0; drop them, or leave the columns as they are"
        )
    scale = np.maximum(deviation, floor * median) ** power
    return Columns(moments.mean.astype(np.float32), scale.astype(np.float32))
