"""An aligner's retrieval on tables of raw features."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sotalign_jax.evaluation import retrieval_metrics
from sotalign_jax.features import FeatureTable, Pairs
from sotalign_jax.models import Aligner

__all__ = ["CHUNK", "check_width", "embed_chunks", "embed_rows", "evaluate"]

CHUNK = 8_192


def evaluate(
    aligner: Aligner,
    pairs: Pairs,
    *,
    chunk_size: int = CHUNK,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """Retrieval of ``pairs`` by an aligner, from raw features; see `retrieval_metrics`."""
    check_width(aligner, "image", pairs.image)
    check_width(aligner, "text", pairs.text)
    image, text = (
        embed_rows(aligner, side, table, chunk_size=chunk_size, progress=progress)
        for side, table in (("image", pairs.image), ("text", pairs.text))
    )
    return retrieval_metrics(image, text, text_to_image=pairs.text_to_image)


def embed_rows(
    aligner: Aligner,
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
        ``(n, dim)`` float32 unit rows, on the host.

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
    aligner: Aligner,
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
        chunk_size: rows on device at a time.
        progress: told the rows of each chunk once whoever asked for it comes for the next.

    Yields:
        ``(c, dim)`` float32 unit rows, on the host, ``1 <= c <= chunk_size``.

    Raises:
        ValueError: features of another width than the aligner takes, before the first chunk.
    """
    check_width(aligner, side, table)
    graph, state = nnx.split(aligner)
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


def check_width(aligner: Aligner, side: str, table: FeatureTable) -> None:
    """Raises ValueError unless the aligner takes rows of this width on this side."""
    width = aligner.image_dim if side == "image" else aligner.text_dim
    if table.dim != width:
        raise ValueError(
            f"{side}: {table.name} has {table.dim} columns, but the aligner takes {width}"
        )


def _rounded(rows: int) -> int:
    """Up to the next power of two: few programs for many sizes."""
    return 1 << (rows - 1).bit_length()


@functools.partial(jax.jit, static_argnames=("graph", "side"))
def _embed(graph, side: str, state, rows: Array) -> Array:
    aligner: Aligner = nnx.merge(graph, state)
    return aligner.embed_image(rows) if side == "image" else aligner.embed_text(rows)
