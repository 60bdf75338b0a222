"""Rows that occur twice: within one set, or in two that should share none."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from sotalign_jax.evaluation.rows import checked_rows, checked_sides
from sotalign_jax.numerics import matmul, unit_rows, unit_rows64

__all__ = ["Duplicates", "find_duplicates"]

# One minus cosine: above what rounding a row to bfloat16 does to it (some 1.3e-6), and what the
# float32 search can tell.
SAME = 1e-5


class Duplicates(NamedTuple):
    """Rows that have a double elsewhere.

    Attributes:
        same: ``(s,)`` int64, rows that are another row again, up to their length and to storage in
            half precision (cosine of at least 1 - 1e-5).
        near: ``(r,)`` int64, rows whose cosine to another reaches the bound; `same` among them.
        partner: ``(n,)`` int64, of each row the most similar one, the first of equals; -1 where
            there is none to compare with.
        cosine: ``(n,)`` float64 cosine to the partner; -1 where there is none.
    """

    same: Int[np.ndarray, "s"]
    near: Int[np.ndarray, "r"]
    partner: Int[np.ndarray, "n"]
    cosine: Float[np.ndarray, "n"]


def find_duplicates(
    rows: Float[ArrayLike, "n d"],
    others: Float[ArrayLike, "m e"] | None = None,
    *,
    near: float = 0.99,
    chunk_size: int = 1024,
) -> Duplicates:
    """Rows that are, or nearly are, a row of another set; or an earlier row of their own.

    Rows are scaled to unit length first; a row of zeros is nobody's double.

    Args:
        rows: ``(n, d)`` features, each of which is looked for.
        others: ``(m, d)`` features of the same encoder to look in. None (default): each row is
            looked for among the rows before it, so that `same` is what to drop.
        near: cosine from which on a row counts as near, in (0, 1 - 1e-5] (default 0.99). What it
            means depends on the encoder: where all rows are alike, so are strangers.
        chunk_size: rows looked for at a time (default 1024); memory grows as chunk_size x
            max(n, m) x 4 bytes, beside float32 copies of both sets. The result does not depend
            on it.

    Returns:
        `Duplicates`.

    Raises:
        ValueError: features are no matrices, have no row, hold NaN or infinity or differ in
            dimension; ``near`` or ``chunk_size`` is out of range.
    """
    if not 0 < near <= 1 - SAME:
        raise ValueError(f"near={near}: a cosine in (0, {1 - SAME}] is needed")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
    if others is None:
        rows = checked_rows(rows, "rows")
        gallery = rows
    else:
        rows, gallery = checked_sides(rows, others, ("rows", "others"))
    n = len(rows)
    chunk = min(chunk_size, n)
    queries = np.pad(np.arange(n, dtype=np.int32), (0, -n % chunk))
    # Rows from this one on are not looked in.
    ends = queries if others is None else np.full_like(queries, len(gallery))
    points = unit_rows(rows)
    targets = points if others is None else unit_rows(gallery)
    found = [
        _nearest_of_chunk(points[queries[at]], targets, ends[at])
        for at in (slice(start, start + chunk) for start in range(0, n, chunk))
    ]
    partner = np.concatenate([np.asarray(part) for part in found])[:n].astype(np.int64)
    cosine = np.full(n, -1.0)
    for start in range(0, n, chunk):
        at = np.arange(start, min(start + chunk, n))
        at = at[partner[at] >= 0]
        product = unit_rows64(rows[at]) * unit_rows64(gallery[partner[at]])
        cosine[at] = product.sum(axis=1)
    return Duplicates(
        np.flatnonzero(cosine >= 1 - SAME), np.flatnonzero(cosine >= near), partner, cosine
    )


@jax.jit
def _nearest_of_chunk(
    queries: Float[Array, "c d"],
    gallery: Float[Array, "m d"],
    ends: Int[np.ndarray | Array, "c"],
) -> Int[Array, "c"]:
    """The gallery row of highest inner product before each end; -1 where the end is 0."""
    scores = matmul(queries, gallery.T)
    allowed = jnp.arange(len(gallery))[None, :] < ends[:, None]
    best = jnp.argmax(jnp.where(allowed, scores, -jnp.inf), axis=1)
    return jnp.where(ends > 0, best, -1)
