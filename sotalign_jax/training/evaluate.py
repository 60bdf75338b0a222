"""An aligner's retrieval on tables of raw features."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sotalign_jax.evaluation import retrieval_metrics
from sotalign_jax.features import FeatureTable, Pairs
from sotalign_jax.models import Aligner

__all__ = ["check_width", "embed_rows", "evaluate"]


def evaluate(aligner: Aligner, pairs: Pairs, *, chunk_size: int = 8_192) -> dict[str, float]:
    """Retrieval of ``pairs`` by an aligner, from raw features; see `retrieval_metrics`."""
    return retrieval_metrics(
        embed_rows(aligner, "image", pairs.image, chunk_size=chunk_size),
        embed_rows(aligner, "text", pairs.text, chunk_size=chunk_size),
        text_to_image=pairs.text_to_image,
    )


def embed_rows(
    aligner: Aligner,
    side: str,
    table: FeatureTable,
    *,
    chunk_size: int = 8_192,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "n dim"]:
    """All rows of a table, embedded chunk by chunk.

    Args:
        aligner: the model.
        side: ``"image"`` or ``"text"``.
        table: raw features.
        chunk_size: rows on device at a time.
        progress: told the number of rows done, after each chunk.

    Returns:
        ``(n, dim)`` float32 unit rows, on the host.

    Raises:
        ValueError: features of another width than the aligner takes.
    """
    check_width(aligner, side, table)
    graph, state = nnx.split(aligner)
    out = np.empty((len(table), aligner.dim), np.float32)
    done = 0
    for chunk in table.chunks(chunk_size):
        # Every chunk has one shape, so that one program serves all tables.
        padded = np.zeros((min(chunk_size, _rounded(len(table))), table.dim), np.float32)
        padded[: len(chunk)] = chunk
        out[done : done + len(chunk)] = _embed(graph, side, state, padded)[: len(chunk)]
        done += len(chunk)
        if progress is not None:
            progress(done)
    return out


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
