"""An aligner's retrieval on tables of raw features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sotalign_jax.evaluation import retrieval_metrics, retrieval_of_scores
from sotalign_jax.features import FeatureTable, Pairs
from sotalign_jax.fitted import FittedAligner
from sotalign_jax.models import Aligner

__all__ = ["CHUNK", "check_width", "embed_chunks", "embed_rows", "evaluate"]

CHUNK = 8_192
# Queries ranked together.
_QUERIES = 1_024
# Numbers in the embeddings of a chunk, and of two tables that are held whole; 4 bytes each.
_CHUNK_VALUES = 2**26
_HELD_VALUES = 2**28


def evaluate(
    aligner: Aligner | FittedAligner,
    pairs: Pairs,
    *,
    chunk_size: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Retrieval of ``pairs`` by an aligner, from raw features; see `retrieval_metrics`.

    By the aligner's own similarity: inner products of its embeddings. Where embeddings are too wide
    for all of them to be held at once, they are made again whenever they are needed.
    """
    check_width(aligner, "image", pairs.image)
    check_width(aligner, "text", pairs.text)
    if (len(pairs.image) + len(pairs.text)) * aligner.dim > _HELD_VALUES:
        return _evaluate_by_blocks(aligner, pairs, chunk_size, progress)
    image, text = (
        embed_rows(aligner, side, table, chunk_size=chunk_size, progress=progress)
        for side, table in (("image", pairs.image), ("text", pairs.text))
    )
    return retrieval_metrics(
        image,
        text,
        text_to_image=pairs.text_to_image,
        # Those of an Aligner have unit length, up to rounding that ties are not to depend on.
        normalize=isinstance(aligner, Aligner),
    )


def _evaluate_by_blocks(
    aligner: Aligner | FittedAligner,
    pairs: Pairs,
    chunk_size: int,
    progress: Callable[[int], None] | None,
) -> dict[str, float]:
    """`evaluate`, with the embeddings of one chunk of queries and one of the gallery at a time."""
    size = _rows_at_once(aligner, chunk_size)
    graph, state = _split(aligner)

    def scores(side: str, queries: FeatureTable, other: str, gallery: FeatureTable):
        done = 0

        def of_rows(rows: np.ndarray) -> Array:
            nonlocal done
            embedded = _embed(graph, side, state, queries.take(rows))
            against = [
                jnp.matmul(embedded, jnp.asarray(part).T, precision=jax.lax.Precision.HIGHEST)
                for part in embed_chunks(aligner, other, gallery, chunk_size=size)
            ]
            if progress is not None and rows.max() >= done:
                progress(int(rows.max()) + 1 - done)
                done = int(rows.max()) + 1
            return jnp.concatenate(against, axis=1)

        return of_rows

    return retrieval_of_scores(
        scores("image", pairs.image, "text", pairs.text),
        scores("text", pairs.text, "image", pairs.image),
        len(pairs.image),
        len(pairs.text),
        text_to_image=pairs.text_to_image,
        chunk_size=min(size, _QUERIES),
    )


def embed_rows(
    aligner: Aligner | FittedAligner,
    side: str,
    table: FeatureTable,
    *,
    chunk_size: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "n dim"]:
    """All rows of a table, embedded chunk by chunk and held in memory together.

    Args:
        aligner: the model.
        side: ``"image"`` or ``"text"``.
        table: raw features.
        chunk_size: rows on device at a time.
        progress: told the rows of each chunk once it is done.

    Returns:
        ``(n, dim)`` float32 rows, on the host; of unit length unless the aligner weights them.

    Raises:
        ValueError: features of another width than the aligner takes.
    """
    out = np.empty((len(table), aligner.dim), np.float32)
    done = 0
    for rows in embed_chunks(aligner, side, table, chunk_size=chunk_size, progress=progress):
        out[done : done + len(rows)] = rows
        done += len(rows)
    return out


def embed_chunks(
    aligner: Aligner | FittedAligner,
    side: str,
    table: FeatureTable,
    *,
    chunk_size: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Float[np.ndarray, "c dim"]]:
    """The rows of a table, embedded one chunk after another; no more than a chunk is held.

    Args:
        aligner: the model.
        side: ``"image"`` or ``"text"``.
        table: raw features.
        chunk_size: rows on device at a time; fewer where the embeddings are very wide.
        progress: told the rows of each chunk once whoever asked for it comes for the next.

    Yields:
        ``(c, dim)`` float32 rows, on the host, ``1 <= c <= chunk_size``; of unit length unless the
        aligner weights them.

    Raises:
        ValueError: features of another width than the aligner takes, before the first chunk.
    """
    check_width(aligner, side, table)
    graph, state = _split(aligner)
    chunk_size = _rows_at_once(aligner, chunk_size)
    # Every chunk has one shape, so that one program serves all tables.
    padded_rows = min(chunk_size, _rounded(len(table)))

    def embedded() -> Iterator[np.ndarray]:
        for chunk in table.chunks(chunk_size):
            padded = np.zeros((padded_rows, table.dim), np.float32)
            padded[: len(chunk)] = chunk
            yield np.asarray(_embed(graph, side, state, padded))[: len(chunk)]
            if progress is not None:
                progress(len(chunk))

    return embedded()


def check_width(aligner: Aligner | FittedAligner, side: str, table: FeatureTable) -> None:
    """Raises ValueError unless the aligner takes rows of this width on this side."""
    width = aligner.image_dim if side == "image" else aligner.text_dim
    if table.dim != width:
        raise ValueError(
            f"{side}: {table.name} has {table.dim} columns, but the aligner takes {width}"
        )


def _rows_at_once(aligner: Aligner | FittedAligner, chunk_size: int) -> int:
    """No more than a chunk, and no more embeddings than fit into the memory of one."""
    return min(chunk_size, max(1, _CHUNK_VALUES // aligner.dim))


def _rounded(rows: int) -> int:
    """Up to the next power of two: few programs for many sizes."""
    return 1 << (rows - 1).bit_length()


def _split(aligner: Aligner | FittedAligner):
    """What is static of an aligner, and its arrays; a fitted one is a pytree, and has both."""
    return (None, aligner) if isinstance(aligner, FittedAligner) else nnx.split(aligner)


@functools.partial(jax.jit, static_argnames=("graph", "side"))
def _embed(graph, side: str, state, rows: Array) -> Array:
    aligner: Aligner | FittedAligner = state if graph is None else nnx.merge(graph, state)
    return aligner.embed_image(rows) if side == "image" else aligner.embed_text(rows)
