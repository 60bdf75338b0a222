"""What one side's features look like: lengths, dead columns, directions that say it all."""

import operator
from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from sotalign_jax.evaluation.rows import CHUNK, checked_rows
from sotalign_jax.numerics import unit_rows64

__all__ = ["feature_health"]

_EPS32 = float(np.finfo(np.float32).eps)


def feature_health(
    rows: Float[ArrayLike, "n d"], *, directions: Sequence[int] = (1, 10, 100)
) -> dict[str, float]:
    """Numbers that show broken or lopsided features before they are trained on.

    Lengths and columns are those of the rows as they are; all else is of rows scaled to unit
    length, as the method sees them. Rows are read in two passes of chunks. Time ``O(n d min(n,
    d))`` and, for the spectrum, ``O(min(n, d)^3)``; memory ``8 min(n, d)^2`` bytes, and where
    n < d a float64 copy of the rows. A sample of some thousand rows tells as much as all.

    Args:
        rows: ``(n, d)`` features, n >= 2, of any floating dtype.
        directions: numbers of leading principal directions whose share of the variance is reported
            (default 1, 10, 100).

    Returns:
        Floats:

        * ``rows``, ``dim``; ``zero_rows``;
        * ``norm_min``, ``norm_median``, ``norm_max``;
        * ``dead_columns``, zero in every row, and ``constant_columns``, of one value in every row
          (dead ones among them);
        * ``largest_column``: share of the squared length that the heaviest column has, in the mean
          over rows; 1 / dim where all weigh the same;
        * ``mean_cosine`` of two different rows; near 1 where all rows point one way;
        * ``rank``: principal directions whose deviation is above rounding of float32, d times its
          epsilon of the largest; at most min(n - 1, d);
        * ``effective_rank``: exponential of the entropy of the shares of variance;
        * ``variance_share@k``: share of the variance in the first k directions, for every k.

        Where rows do not vary, the ranks are 0 and the shares NaN.

    Raises:
        ValueError: no matrix, fewer than 2 rows, NaN or infinity; a number of directions below 1.

    References:
        O. Roy and M. Vetterli, "The effective rank", EUSIPCO 2007.
        K. Ethayarajh, "How contextual are contextualized word representations?", EMNLP 2019, for
        the mean cosine.
    """
    ks = [operator.index(k) for k in directions]
    if any(k < 1 for k in ks):
        raise ValueError(f"directions={ks}: each must be at least 1")
    rows = checked_rows(rows, "rows", least=2)
    n, dim = rows.shape
    parts = [slice(start, start + CHUNK) for start in range(0, n, CHUNK)]

    norms = np.empty(n)
    low, high = np.full(dim, np.inf), np.full(dim, -np.inf)
    total, squares = np.zeros(dim), np.zeros(dim)
    for at in parts:
        part = rows[at].astype(np.float64)
        norms[at] = np.linalg.norm(part, axis=1)
        low, high = np.minimum(low, part.min(axis=0)), np.maximum(high, part.max(axis=0))
        unit = unit_rows64(part)
        total, squares = total + unit.sum(axis=0), squares + np.square(unit).sum(axis=0)
    variances = _spectrum(rows, parts, total / n)
    shares = variances / variances.sum() if variances.sum() > 0 else np.full(1, np.nan)
    positive = shares[shares > 0]
    # A direction's deviation against the largest, and rounding of float32 against that.
    floor = (dim * _EPS32) ** 2 * variances[0]
    nonzero = int(np.sum(norms > 0))
    metrics = {
        "rows": n,
        "dim": dim,
        "zero_rows": n - nonzero,
        "norm_min": norms.min(),
        "norm_median": np.median(norms),
        "norm_max": norms.max(),
        "dead_columns": np.sum((low == 0) & (high == 0)),
        "constant_columns": np.sum(low == high),
        "largest_column": squares.max() / nonzero if nonzero else np.nan,
        "mean_cosine": (np.square(total).sum() - squares.sum()) / (n * (n - 1)),
        "rank": np.sum(variances > floor),
        "effective_rank": np.exp(-np.sum(positive * np.log(positive))) if len(positive) else 0,
    }
    metrics |= {f"variance_share@{k}": shares[:k].sum() for k in ks}
    return {name: float(value) for name, value in metrics.items()}


def _spectrum(rows: np.ndarray, parts: list[slice], mean: np.ndarray) -> np.ndarray:
    """Sums of squares along the principal directions of the unit rows, largest first."""
    n, dim = rows.shape
    if n < dim:
        centred = unit_rows64(rows) - mean
        scatter = centred @ centred.T
    else:
        scatter = np.zeros((dim, dim))
        for at in parts:
            centred = unit_rows64(rows[at]) - mean
            scatter += centred.T @ centred
    values = np.linalg.eigvalsh(scatter)[::-1]
    # What rounding leaves of rows that are all equal.
    rounding = 64 * np.finfo(np.float64).eps * n * float(np.square(mean).sum())
    return np.where(values > rounding, values, 0.0)
