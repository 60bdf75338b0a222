"""Means and scatter matrices of paired features, in one pass over chunks, in float64 on the host.

Scatter matrices are merged with their means (never a raw sum of squares), so a large common offset
loses no digits, and two halves computed on two hosts merge into the whole.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from sotalign_jax.numerics import Columns, unit_rows64

__all__ = [
    "Moments",
    "empty_moments",
    "merge_moments",
    "moments_of",
    "recentered",
    "update_moments",
]


class Moments(NamedTuple):
    """Count, means and scatter (centred sums of products) of paired rows, all float64 NumPy.

    Attributes:
        count: number of pairs seen.
        image_mean: ``(dx,)`` mean image row, or the centre given to `recentered`.
        text_mean: ``(dy,)`` mean text row, or the centre given to `recentered`.
        image_scatter: ``(dx, dx)`` sum over pairs of ``(a - image_mean)(a - image_mean)^T``.
        text_scatter: ``(dy, dy)`` the same of the text rows.
        cross_scatter: ``(dx, dy)`` sum of ``(a - image_mean)(b - text_mean)^T``.
    """

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    image_mean: Float[np.ndarray, "dx"]
    text_mean: Float[np.ndarray, "dy"]
    image_scatter: Float[np.ndarray, "dx dx"]
    text_scatter: Float[np.ndarray, "dy dy"]
    cross_scatter: Float[np.ndarray, "dx dy"]


def empty_moments(dx: int, dy: int) -> Moments:
    """The moments of no pairs: the neutral element of `merge_moments`.

    Args:
        dx: dimension of the image features.
        dy: dimension of the text features.

    Returns:
        `Moments` with count 0 and zeros.

    Raises:
        ValueError: a dimension is below 1.
    """
    for name, dimension in (("dx", dx), ("dy", dy)):
        if dimension < 1:
            raise ValueError(f"{name}={dimension}: a feature dimension is at least 1")
    zeros = np.zeros
    return Moments(0, zeros(dx), zeros(dy), zeros((dx, dx)), zeros((dy, dy)), zeros((dx, dy)))


def merge_moments(a: Moments, b: Moments) -> Moments:
    """The moments of two disjoint sets of pairs together (pairwise update).

    With ``delta = b.mean - a.mean`` the scatters add up to ``a.scatter + b.scatter +
    (n_a n_b / n) delta delta^T``. Order and grouping do not matter beyond rounding. Both sides must
    be centred on their own means: merge first, then use `recentered`. Moments of several hosts are
    to be gathered as bytes, because JAX arrays would round them to float32.

    Args:
        a: moments of one set.
        b: moments of another, of the same dimensions.

    Returns:
        `Moments` of the union.

    Raises:
        ValueError: the dimensions differ.

    References:
        Chan, Golub and LeVeque, "Algorithms for computing the sample variance" (1983), eq. 1.5.
    """
    if a.cross_scatter.shape != b.cross_scatter.shape:
        raise ValueError(
            f"b: dimensions {b.cross_scatter.shape} differ from {a.cross_scatter.shape} of a; "
            "both must come from the same two encoders"
        )
    if a.count == 0:
        return b
    if b.count == 0:
        return a
    count = int(a.count) + int(b.count)
    image_delta, text_delta = b.image_mean - a.image_mean, b.text_mean - a.text_mean
    share = b.count / count
    weight = a.count * share
    return Moments(
        count,
        a.image_mean + share * image_delta,
        a.text_mean + share * text_delta,
        a.image_scatter + b.image_scatter + weight * np.outer(image_delta, image_delta),
        a.text_scatter + b.text_scatter + weight * np.outer(text_delta, text_delta),
        a.cross_scatter + b.cross_scatter + weight * np.outer(image_delta, text_delta),
    )


def update_moments(
    moments: Moments,
    image_chunk: Float[ArrayLike, "n dx"],
    text_chunk: Float[ArrayLike, "m dy"],
) -> Moments:
    """The moments after one more chunk of pairs, whose rows are taken as they are.

    Args:
        moments: the moments so far; `empty_moments` to begin.
        image_chunk: ``(n, dx)`` image rows of any floating dtype, n may be 0.
        text_chunk: ``(n, dy)`` text rows; row i belongs to image row i.

    Returns:
        New `Moments`; the argument is unchanged.

    Raises:
        ValueError: a chunk is not a matrix of the moments' width, holds NaN or infinity, or the two
            differ in length.
    """
    image, text = checked_pairs(image_chunk, text_chunk, "image_chunk", "text_chunk")
    for name, rows, mean in (
        ("image_chunk", image, moments.image_mean),
        ("text_chunk", text, moments.text_mean),
    ):
        if rows.shape[1] != len(mean):
            raise ValueError(f"{name}: {rows.shape[1]} features, but the moments have {len(mean)}")
    return merge_moments(moments, _moments_at_once(image, text))


def moments_of(
    chunks: Iterable[tuple[ArrayLike, ArrayLike]],
    normalize: bool = True,
    *,
    image_columns: Columns | None = None,
    text_columns: Columns | None = None,
) -> Moments:
    """The moments of all pairs, in one pass over chunks that need not fit in memory together.

    Args:
        chunks: iterable of ``(image (n, dx), text (n, dy))`` raw features; n may differ by chunk.
            All pairs at once are ``[(image, text)]``.
        normalize: scale every row to unit length first, as the method does (default True).
        image_columns: then standardise the columns of the images by these, and scale the rows to
            unit length again; what `columns_of` returns. None (default): leave the columns alone.
        text_columns: the same for texts.

    Returns:
        `Moments` of all rows.

    Raises:
        ValueError: no chunk at all, columns without ``normalize``, or a chunk that `update_moments`
            refuses (named by its number).

    References:
        SOTAlign (arXiv 2602.23353), stage one: unit rows, then the means of the pairs.
    """
    if not (normalize or (image_columns is None and text_columns is None)):
        raise ValueError("normalize: columns are standardised of unit rows; must be True")
    moments = None
    for number, (image, text) in enumerate(chunks):
        names = f"chunks[{number}] image", f"chunks[{number}] text"
        image, text = checked_pairs(image, text, *names)
        if normalize:
            image = standardized_rows64(unit_rows64(image), image_columns)
            text = standardized_rows64(unit_rows64(text), text_columns)
        chunk = _moments_at_once(image, text)
        if moments is not None and chunk.cross_scatter.shape != moments.cross_scatter.shape:
            raise ValueError(
                f"chunks[{number}]: dimensions {chunk.cross_scatter.shape} differ from "
                f"{moments.cross_scatter.shape} of the chunks before; one encoder per side"
            )
        moments = chunk if moments is None else merge_moments(moments, chunk)
    if moments is None:
        raise ValueError("chunks: empty; at least one (image, text) chunk is needed")
    return moments


def recentered(moments: Moments, image_mean: ArrayLike, text_mean: ArrayLike) -> Moments:
    """The same pairs with their scatter about other centres than their own means.

    With ``m`` the mean of the pairs and ``c`` the new centre, the scatter about ``c`` is that about
    ``m`` plus ``count (m - c)(m - c)^T``. Centring on the mean of all unpaired rows, which is
    known far better than that of a handful of pairs, is what makes even one pair informative.

    Args:
        moments: moments about the pairs' own means; they cannot be merged further afterwards.
        image_mean: ``(dx,)`` new centre, of rows preprocessed like the pairs (unit length).
        text_mean: ``(dy,)`` the same for texts.

    Returns:
        `Moments` whose ``image_mean`` and ``text_mean`` are the new centres.

    Raises:
        ValueError: a centre has another dimension than the moments, or is not finite.
    """
    centres = []
    for name, given, own in (
        ("image_mean", image_mean, moments.image_mean),
        ("text_mean", text_mean, moments.text_mean),
    ):
        centre = np.asarray(given, dtype=np.float64)
        if centre.shape != own.shape:
            raise ValueError(f"{name}: shape {centre.shape}, but the moments have {own.shape}")
        if not np.isfinite(centre).all():
            raise ValueError(f"{name}: holds NaN or infinity; it must be finite")
        centres.append(centre)
    image_shift, text_shift = moments.image_mean - centres[0], moments.text_mean - centres[1]
    return Moments(
        moments.count,
        centres[0],
        centres[1],
        moments.image_scatter + moments.count * np.outer(image_shift, image_shift),
        moments.text_scatter + moments.count * np.outer(text_shift, text_shift),
        moments.cross_scatter + moments.count * np.outer(image_shift, text_shift),
    )


def standardized_rows64(rows: np.ndarray, columns: Columns | None) -> np.ndarray:
    """`sotalign_jax.numerics.standardized_rows` in float64 on the host."""
    if columns is None:
        return rows
    mean, scale = (np.asarray(value, np.float64) for value in columns)
    if mean.shape != rows.shape[1:]:
        raise ValueError(f"columns: {len(mean)} of them, but the rows have {rows.shape[1]}")
    return unit_rows64((rows - mean) / scale)


def checked_pairs(
    image: ArrayLike, text: ArrayLike, image_name: str, text_name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Both sides as float64 matrices of equal length, or a ValueError that names the side."""
    image, text = np.asarray(image, dtype=np.float64), np.asarray(text, dtype=np.float64)
    for name, rows in ((image_name, image), (text_name, text)):
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise ValueError(f"{name}: shape {rows.shape}; rows by features, (n, d), are needed")
        if not np.isfinite(rows).all():
            raise ValueError(f"{name}: holds NaN or infinity; every feature must be finite")
    if len(image) != len(text):
        raise ValueError(
            f"{text_name}: {len(text)} rows, but {image_name} has {len(image)}; "
            "row i of one must belong to row i of the other"
        )
    return image, text


def _moments_at_once(image: np.ndarray, text: np.ndarray) -> Moments:
    """The moments of one chunk, by two passes over it."""
    if len(image) == 0:
        return empty_moments(image.shape[1], text.shape[1])
    image_mean, text_mean = image.mean(axis=0), text.mean(axis=0)
    image, text = image - image_mean, text - text_mean
    return Moments(
        len(image), image_mean, text_mean, image.T @ image, text.T @ text, image.T @ text
    )
