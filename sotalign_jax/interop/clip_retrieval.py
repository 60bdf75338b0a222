"""Embeddings in the layout that clip-retrieval and its index builders read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from sotalign_jax.files import new_directory

__all__ = ["write_clip_retrieval"]

_TOO_LARGE = float(np.finfo(np.float16).max)


def write_clip_retrieval(
    directory: str | os.PathLike,
    image: Iterable[np.ndarray],
    text: Iterable[np.ndarray],
    *,
    ids: Sequence[str],
    captions: Sequence[str] | None = None,
    rows_per_shard: int = 1_000_000,
) -> int:
    """Write ``img_emb/img_emb_N.npy``, ``text_emb/text_emb_N.npy``, ``metadata_N.parquet``.

    Row i of all three is one pair; an image with five captions stands there five times. Rows are
    float16, as that tool writes them; the metadata have ``image_path`` (the id) and ``caption``.
    N is padded with zeros where there are several, so that file names sort as numbers do.

    Args:
        directory: where to; it must not exist.
        image: chunks ``(c, dim)`` of image embeddings, in the order of the pairs.
        text: chunks of text embeddings; they need not be cut as the others are.
        ids: of the image of each pair.
        captions: of each pair; by default empty strings.
        rows_per_shard: rows of each shard but the last.

    Returns:
        The number of shards.

    Raises:
        ValueError: the directory exists, no pairs, sides that differ in rows, a wrong number of
            captions, or a value that float16 cannot hold.
    """
    import pyarrow
    import pyarrow.parquet

    rows = len(ids)
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
    if rows == 0:
        raise ValueError("ids: no pairs to write")
    if captions is not None and len(captions) != rows:
        raise ValueError(f"captions: {len(captions)} for {rows} pairs")
    shards = -(-rows // rows_per_shard)
    digits = len(str(shards - 1))
    with new_directory(directory) as partial:
        for folder in ("img_emb", "text_emb", "metadata"):
            (partial / folder).mkdir()
        sides = {"img_emb": image, "text_emb": text}
        for folder, chunks in sides.items():
            done = 0
            for number, block in enumerate(_blocks(chunks, rows_per_shard)):
                _check(block, folder, done)
                name = f"{folder}_{number:0{digits}d}.npy"
                np.save(partial / folder / name, block.astype(np.float16))
                done += len(block)
            if done != rows:
                raise ValueError(f"{folder}: {done} rows for {rows} pairs")
        for number in range(shards):
            part = slice(number * rows_per_shard, (number + 1) * rows_per_shard)
            here = [str(one) for one in ids[part]]
            said = [""] * len(here) if captions is None else list(captions[part])
            pyarrow.parquet.write_table(
                pyarrow.table({"image_path": here, "caption": said}),
                partial / "metadata" / f"metadata_{number:0{digits}d}.parquet",
            )
    return shards


def _blocks(chunks: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Rows in blocks of that size, however they come."""
    waiting: list[np.ndarray] = []
    count = 0
    for chunk in chunks:
        rows = np.asarray(chunk)
        while count + len(rows) >= size:
            head, rows = np.split(rows, [size - count])
            yield np.concatenate([*waiting, head])
            waiting, count = [], 0
        if len(rows):
            waiting.append(rows)
            count += len(rows)
    if waiting:
        yield np.concatenate(waiting)


def _check(block: np.ndarray, folder: str, first: int) -> None:
    # NaN compares false.
    bad = ~(np.abs(block) <= _TOO_LARGE).all(axis=1)
    if bad.any():
        raise ValueError(f"{folder}: row {first + int(bad.argmax())} holds what float16 cannot")
