"""Rows as the measures of this folder take them: checked, drawn, scaled to unit length."""

import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

__all__ = ["checked_rows", "checked_sides", "drawn_rows"]

# Rows looked at together where a pass over all of them needs no more.
CHUNK = 4096


def checked_rows(rows: Float[ArrayLike, "n d"], name: str, least: int = 1) -> np.ndarray:
    """The rows as a NumPy array, not copied where they are one, or an error that names them.

    Args:
        rows: ``(n, d)`` features.
        name: what the error calls them.
        least: how many rows the caller needs (default 1).

    Returns:
        ``(n, d)`` array of the dtype of ``rows``.

    Raises:
        ValueError: not a matrix, too few rows, or NaN or infinity.
    """
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name}: shape {rows.shape}; rows by dimensions, (n, d), are needed")
    if len(rows) < least:
        raise ValueError(f"{name}: {len(rows)} rows; at least {least} are needed")
    for start in range(0, len(rows), CHUNK):
        with np.errstate(over="ignore"):
            finite = np.isfinite(rows[start : start + CHUNK].astype(np.float32)).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{name}: row {start + int(np.argmin(finite))} holds NaN or infinity; every row "
                "must be finite in float32"
            )
    return rows


def checked_sides(
    first: Float[ArrayLike, "n d"],
    second: Float[ArrayLike, "m e"],
    names: tuple[str, str],
    least: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of rows of one space, as `checked_rows`.

    Args:
        first: ``(n, d)`` features.
        second: ``(m, d)`` features of the same encoder.
        names: what errors call them.
        least: how many rows of each the caller needs (default 1).

    Returns:
        Both as NumPy arrays.

    Raises:
        ValueError: as `checked_rows`, or the dimensions differ.
    """
    first, second = (
        checked_rows(rows, name, least) for rows, name in zip((first, second), names, strict=True)
    )
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"{names[1]}: dimension {second.shape[1]}, but {names[0]} has {first.shape[1]}; both "
            "must come from one encoder"
        )
    return first, second


def drawn_rows(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most ``count`` of the rows without repetition, in their order; all if they are fewer."""
    if len(rows) <= count:
        return rows
    return rows[np.sort(rng.choice(len(rows), count, replace=False))]
