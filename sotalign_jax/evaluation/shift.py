"""How far the rows of one source lie from those of another: spherical sliced Wasserstein."""

import math

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from sotalign_jax.evaluation.rows import CHUNK, checked_sides
from sotalign_jax.numerics import unit_rows64

__all__ = ["circular_wasserstein", "distribution_shift", "spherical_sliced_wasserstein"]

# Numbers (projections x rows) held at a time; some ten arrays of that many.
BLOCK = 2**20
# Angles held at once, all planes of a reading of the rows: the rows are read as few times as this
# allows. With the projections that they come from, 1.5 GiB.
ANGLES = 2**26
# Distances, in turns, that count as 0.
ROUNDING = 1e-9


def circular_wasserstein(
    first: Float[ArrayLike, "l n"], second: Float[ArrayLike, "k m"], *, p: float = 2.0
) -> Float[np.ndarray, "l"]:
    r"""Wasserstein distances between samples on circles of circumference 1, exact for any n and m.

    With quantile functions continued over the circle, F^-1(t + 1) = F^-1(t) + 1,

    .. math:: W_p^p = \min_s \int_0^1 |F^{-1}(t) - G^{-1}(t - s)|^p \, dt,

    convex and piecewise linear in s. Its slope changes sign at a multiple of gcd(n, m) / (n m),
    which is found by bisection in integers.

    Args:
        first: ``(l, n)`` samples on l circles, in turns; whole turns do not matter.
        second: ``(l, m)`` samples on the same circles; n and m may differ.
        p: exponent of the distance along the circle, at least 1 (default 2).

    Returns:
        ``(l,)`` float64 distances, in turns, at most 0.5.

    Raises:
        ValueError: samples are no finite matrices of equally many non-empty rows, or p is below 1.

    References:
        J. Delon, J. Salomon and A. Sobolevski, "Fast transport optimization for Monge costs on the
        circle", SIAM J. Applied Mathematics 2010.
    """
    if not 1 <= p < np.inf:
        raise ValueError(f"p={p}: must be finite and at least 1")
    x, y = (np.asarray(samples, np.float64) for samples in (first, second))
    for name, samples in (("first", x), ("second", y)):
        if samples.ndim != 2 or samples.shape[1] == 0:
            raise ValueError(f"{name}: shape {samples.shape}; circles by samples, (l, n)")
        if not np.isfinite(samples).all():
            raise ValueError(f"{name}: holds NaN or infinity; every sample must be finite")
    if len(x) != len(y):
        raise ValueError(f"second: {len(y)} circles, but first has {len(x)}")
    if x.shape[1] < y.shape[1]:
        x, y = y, x  # the bisection goes over the samples of y
    x, y = (np.sort(samples % 1.0, axis=1) for samples in (x, y))
    n, m = x.shape[1], y.shape[1]
    step = math.gcd(n, m)

    # Masses and shifts in units of 1 / (n m): a sample of x has mass m, one of y has mass n.
    following = np.hstack([y[:, 1:], y[:, :1] + 1.0])
    ends = np.arange(1, m + 1) * n
    low = np.full((len(x), 1), -n * m // step)
    high = -low
    while (low < high).any():
        middle = (low + high) // 2
        at = _quantile(x, (ends + middle * step) // m)
        slope = np.sum(np.abs(at - y) ** p - np.abs(at - following) ** p, axis=1, keepdims=True)
        falls = (slope < 0) & (low < high)
        low, high = np.where(falls, middle + 1, low), np.where(falls, high, middle)
    shift = low * step

    edges = np.broadcast_to(np.arange(n) * m, x.shape)
    edges = np.sort(np.hstack([edges, (np.arange(m) * n + shift) % (n * m)]), axis=1)
    masses = np.diff(edges, axis=1, append=n * m) / (n * m)
    gaps = np.abs(_quantile(x, edges // m) - _quantile(y, (edges - shift) // n))
    return np.sum(masses * gaps**p, axis=1) ** (1 / p)


def _quantile(samples: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Sorted samples continued over the circle: one turn further after the last."""
    turn, place = np.divmod(index, samples.shape[1])
    return np.take_along_axis(samples, place, axis=1) + turn


def spherical_sliced_wasserstein(
    first: Float[ArrayLike, "n d"],
    second: Float[ArrayLike, "m e"],
    *,
    n_projections: int = 500,
    p: float = 2.0,
    seed: int = 0,
) -> float:
    """Distance of two sets of directions, from that of their projections on great circles.

    Rows are scaled to unit length, projected on a random plane and scaled to unit length there; the
    p-th root of the mean over planes of W_p^p is returned, with arcs in turns. This is SSW_p of
    Bonet et al., with the exact W_p of every circle. SOTAlign gives p = 2 and 500 projections, and
    cites the linearised variant of Liu et al., which is another number; which of the two its table
    shows is not known, so compare values of one variant only.

    Args:
        first: ``(n, d)`` features, d >= 2, of any row length but 0.
        second: ``(m, d)`` features of the same encoder; n and m may differ.
        n_projections: random planes (default 500).
        p: exponent, at least 1 (default 2).
        seed: of the planes (default 0); a common seed makes distances comparable more closely.

    Returns:
        The distance, in turns: 0 for equal sets, at most 0.5. Time ``O(n_projections (n + m)
        (d + log n m))``; memory float64 copies of some thousand rows, and at most 1.5 GiB of
        projections (or those of one plane).

    Raises:
        ValueError: features are no matrices, have no row, hold NaN, infinity or rows of zeros, or
            differ in dimension, or have one only; ``n_projections`` or ``p`` is below 1.

    References:
        C. Bonet et al., "Spherical sliced-Wasserstein", ICLR 2023.
        X. Liu et al., "Linear spherical sliced optimal transport", ICLR 2025: the other variant.
    """
    if n_projections < 1:
        raise ValueError(f"n_projections={n_projections}: must be at least 1")
    if not 1 <= p < np.inf:
        raise ValueError(f"p={p}: must be finite and at least 1")
    first, second = checked_sides(first, second, ("first", "second"))
    dim = first.shape[1]
    if dim < 2:
        raise ValueError("first: dimension 1; great circles need at least 2")
    for name, rows in (("first", first), ("second", second)):
        if zeros := sum(int(np.sum(~part.any(axis=1))) for part in _parts(rows)):
            raise ValueError(f"{name}: {zeros} rows of zeros have no direction; drop them")
    rng = np.random.default_rng(seed)
    at_once, block = (max(1, size // (len(first) + len(second))) for size in (ANGLES, BLOCK))
    total = 0.0
    for start in range(0, n_projections, at_once):
        # One plane after the other, so that the planes do not depend on the block.
        planes = [
            np.linalg.qr(rng.standard_normal((dim, 2)))[0]
            for _ in range(min(at_once, n_projections - start))
        ]
        frames = np.stack(planes, axis=1).reshape(dim, -1)
        one, other = _turns(first, frames), _turns(second, frames)
        for plane in range(0, len(planes), block):
            at = slice(plane, plane + block)
            total += float(np.sum(circular_wasserstein(one[at], other[at], p=p) ** p))
    return (total / n_projections) ** (1 / p)


def _parts(rows: np.ndarray):
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))


def _turns(rows: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """``(l, n)`` angles of the rows in each of l planes, in turns."""
    projected = np.concatenate([unit_rows64(part) @ frames for part in _parts(rows)])
    return np.arctan2(projected[:, 1::2], projected[:, ::2]).T / (2 * np.pi)


def distribution_shift(
    first: Float[ArrayLike, "n d"],
    second: Float[ArrayLike, "m e"],
    *,
    max_rows: int = 100_000,
    n_projections: int = 500,
    repeats: int = 20,
    p: float = 2.0,
    seed: int = 0,
) -> dict[str, float]:
    """The spherical sliced Wasserstein distance of two sources, beside that of halves of each.

    A distance of samples is never 0, and larger the fewer the rows: so each repeat draws two
    disjoint sets of equally many rows from both sources, and measures across the sources and within
    each, with the same planes. Rows of zeros are left out.

    Args:
        first: ``(n, d)`` features of one source, n >= 4: the paired images, say.
        second: ``(m, d)`` features of another, m >= 4: the unpaired images, say.
        max_rows: at most so many rows a set (default 100,000, the paper's); at most half of the
            smaller source are taken.
        n_projections: random planes a repeat (default 500, the paper's).
        repeats: draws (default 20, the paper's).
        p: exponent, at least 1 (default 2, the paper's).
        seed: of the draws and of the planes (default 0).

    Returns:
        Floats: ``shift`` and ``shift_sd`` over the repeats; ``null``, the mean distance of two sets
        of one source, the larger of both sources; ``null_first`` and ``null_second``, the two;
        ``ratio`` = shift / null, about 1 where the sources are alike, infinite where null is 0 and
        shift is not; ``excess``, the root of shift^2 - null^2 or 0, which depends less on how many
        rows there were; ``rows``, the size of a set.

    Raises:
        ValueError: as `spherical_sliced_wasserstein`; a source has fewer than 4 rows that are not
            zero; ``max_rows`` or ``repeats`` is below 1.

    References:
        SOTAlign, arXiv 2602.23353, which sums the distances of images and of texts.
    """
    for name, value in (("max_rows", max_rows), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    first, second = checked_sides(first, second, ("first", "second"), least=4)
    sources = []
    for name, rows in (("first", first), ("second", second)):
        kept = np.flatnonzero(np.concatenate([part.any(axis=1) for part in _parts(rows)]))
        if len(kept) < 4:
            raise ValueError(f"{name}: {len(kept)} rows that are not zero; at least 4 are needed")
        sources.append((rows, kept))
    size = min(max_rows, *(len(kept) // 2 for _, kept in sources))
    found = []
    for child in np.random.SeedSequence(seed).spawn(repeats):
        rng = np.random.default_rng(child)
        planes = int(rng.integers(2**32))
        (a, a_rest), (b, b_rest) = (
            np.split(rows[rng.choice(kept, 2 * size, replace=False)], 2) for rows, kept in sources
        )
        found.append(
            [
                spherical_sliced_wasserstein(
                    one, other, n_projections=n_projections, p=p, seed=planes
                )
                for one, other in ((a, b), (a, a_rest), (b, b_rest))
            ]
        )
    shift, null_first, null_second = np.mean(found, axis=0)
    null = max(null_first, null_second)
    # Sources of one row repeated have no distance within, up to rounding.
    apart = float("inf") if shift > ROUNDING else 1.0
    return {
        "shift": float(shift),
        "shift_sd": float(np.std(np.array(found)[:, 0], ddof=min(1, repeats - 1))),
        "null": float(null),
        "null_first": float(null_first),
        "null_second": float(null_second),
        "ratio": float(shift / null) if null > ROUNDING else apart,
        "excess": float(np.sqrt(max(shift**2 - null**2, 0.0))),
        "rows": float(size),
    }
