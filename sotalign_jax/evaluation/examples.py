"""Which queries a retrieval gets right, which it gets wrong, and what it gives for them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from sotalign_jax.evaluation.retrieval import text_owners
from sotalign_jax.numerics import unit_rows

__all__ = ["Examples", "Ranking", "rank_queries", "retrieval_examples"]

# Scores of a chunk of queries, in float32: 64 MiB.
_SCORES = 2**24
_CHUNK = 1024


class Ranking(NamedTuple):
    """How every query fares.

    Attributes:
        rank: of its best true candidate among the wrong ones, as `retrieval_metrics` counts: 1 is
            best, a tie counts half.
        margin: cosine of that candidate minus the cosine of the best wrong one.
    """

    rank: Float[np.ndarray, " q"]
    margin: Float[np.ndarray, " q"]


class Examples(NamedTuple):
    """Some queries, and what is nearest to them.

    Attributes:
        query: rows of the queries.
        rank: of the best true candidate of each.
        found: rows of the gallery, the nearest first.
        score: their cosines.
        true: which of them belong to the query.
        own: row of the best true candidate, found or not.
        own_score: its cosine.
    """

    query: Int[np.ndarray, " q"]
    rank: Float[np.ndarray, " q"]
    found: Int[np.ndarray, "q k"]
    score: Float[np.ndarray, "q k"]
    true: Bool[np.ndarray, "q k"]
    own: Int[np.ndarray, " q"]
    own_score: Float[np.ndarray, " q"]


def retrieval_examples(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m e"],
    *,
    text_to_image: Int[ArrayLike, "k"] | None = None,
    direction: str = "t2i",
    normalize: bool = True,
    count: int = 6,
    shown: int = 5,
) -> tuple[Examples, Examples]:
    """The queries that fare best, and those that fare worst.

    By rank, and of equal ranks by margin: the best are those whose partner stands clearest above
    all others, the worst those whose partner comes last.

    Args:
        image: ``(n, d)`` image embeddings, n >= 2.
        text: ``(m, d)`` text embeddings.
        text_to_image: as for `retrieval_metrics`.
        direction: queries are the texts ("t2i") or the images ("i2t").
        normalize: as for `retrieval_metrics`; cosines below are inner products without it.
        count: queries of each kind; where there are fewer than twice as many, no query is both.
        shown: candidates of each query.

    Returns:
        The best, the best first; and the worst, the worst first.

    Raises:
        ValueError: as `retrieval_metrics`; or a ``direction``, ``count`` or ``shown`` that is none.
    """
    for name, value in (("count", count), ("shown", shown)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    queries, gallery = _sides(image, text, text_to_image, direction, normalize)
    ranking = _ranked(queries, gallery)
    order = np.lexsort((-ranking.margin, ranking.rank))
    best = order[: min(count, -(-len(order) // 2))]
    worst = order[::-1][: min(count, len(order) - len(best))]

    def examples(rows: np.ndarray) -> Examples:
        scores = _products(queries.rows[rows], gallery.rows)
        true = queries.image[rows][:, None] == gallery.image[None, :]
        score, found = jax.lax.top_k(scores, min(shown, scores.shape[1]))
        own_scores = jnp.where(true, scores, -jnp.inf)
        return Examples(
            rows,
            ranking.rank[rows],
            np.asarray(found),
            np.asarray(score),
            np.take_along_axis(true, np.asarray(found), axis=1),
            np.asarray(own_scores.argmax(axis=1)),
            np.asarray(own_scores.max(axis=1)),
        )

    return examples(best), examples(worst)


def rank_queries(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m e"],
    *,
    text_to_image: Int[ArrayLike, "k"] | None = None,
    direction: str = "t2i",
    normalize: bool = True,
) -> Ranking:
    """Rank and margin of every query.

    Args:
        image: ``(n, d)`` image embeddings, n >= 2.
        text: ``(m, d)`` text embeddings.
        text_to_image: as for `retrieval_metrics`.
        direction: as for `retrieval_examples`.
        normalize: as for `retrieval_examples`.

    Returns:
        Of the texts ("t2i") or of the images ("i2t").

    Raises:
        ValueError: as `retrieval_metrics`, or another ``direction``.
    """
    return _ranked(*_sides(image, text, text_to_image, direction, normalize))


class _Side(NamedTuple):
    rows: jax.Array
    image: np.ndarray  # that each row belongs to


def _sides(image, text, text_to_image, direction: str, normalize: bool) -> tuple[_Side, _Side]:
    """Queries and gallery."""
    if direction not in ("t2i", "i2t"):
        raise ValueError(f"direction: must be 't2i' or 'i2t', got {direction!r}")
    owner = text_owners(image, text, text_to_image).astype(np.int32)
    image, text = (
        unit_rows(rows) if normalize else jnp.asarray(rows).astype(jnp.float32)
        for rows in (image, text)
    )
    images = _Side(image, np.arange(len(image), dtype=np.int32))
    texts = _Side(text, owner)
    return (texts, images) if direction == "t2i" else (images, texts)


def _products(queries: jax.Array, gallery: jax.Array) -> jax.Array:
    return jnp.matmul(queries, gallery.T, precision=jax.lax.Precision.HIGHEST)


def _ranked(queries: _Side, gallery: _Side) -> Ranking:
    """`_ranks_of_chunk` over all queries, the last chunk padded so that one program serves all."""
    total = len(queries.rows)
    chunk = min(_CHUNK, total, max(1, _SCORES // len(gallery.rows)))
    rows = np.pad(np.arange(total), (0, -total % chunk))
    parts = [
        _ranks_of_chunk(queries.rows[some], gallery.rows, queries.image[some], gallery.image)
        for some in rows.reshape(-1, chunk)
    ]
    doubled, margin = (
        np.concatenate([np.asarray(part) for part in both])[:total]
        for both in zip(*parts, strict=True)
    )
    return Ranking(1 + doubled / 2.0, margin)


@jax.jit
def _ranks_of_chunk(
    queries: Float[Array, "c d"],
    gallery: Float[Array, "g d"],
    query_image: Int[np.ndarray | Array, " c"],
    gallery_image: Int[np.ndarray | Array, " g"],
) -> tuple[Int[Array, " c"], Float[Array, " c"]]:
    """Twice the number of wrong candidates above the best true one, ties half; and the margin."""
    scores = _products(queries, gallery)
    true = query_image[:, None] == gallery_image[None, :]
    own = jnp.max(jnp.where(true, scores, -jnp.inf), axis=1, keepdims=True)
    points = 2 * (scores > own).astype(jnp.int32) + (scores == own).astype(jnp.int32)
    rival = jnp.max(jnp.where(true, -jnp.inf, scores), axis=1)
    return jnp.sum(jnp.where(true, 0, points), axis=1), own[:, 0] - rival
