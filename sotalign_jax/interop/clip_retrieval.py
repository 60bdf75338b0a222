"""Embeddings in the layout that clip-retrieval and its index builders read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

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
    N is padded with zeros where there are several, so that file names sort as numbers do. Of the
    rows no more than a chunk is held in memory.

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
            captions, chunks that differ in columns, or a value that float16 cannot hold.
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
        for folder, chunks in (("img_emb", image), ("text_emb", text)):
            names = (f"{folder}_{number:0{digits}d}.npy" for number in range(shards))
            _write(chunks, [partial / folder / name for name in names], rows, rows_per_shard)
        for number in range(shards):
            part = slice(number * rows_per_shard, (number + 1) * rows_per_shard)
            here = [str(one) for one in ids[part]]
            said = [""] * len(here) if captions is None else list(captions[part])
            pyarrow.parquet.write_table(
                pyarrow.table({"image_path": here, "caption": said}),
                partial / "metadata" / f"metadata_{number:0{digits}d}.parquet",
            )
    return shards


def _write(chunks: Iterable[np.ndarray], files: Sequence[Path], rows: int, size: int) -> None:
    """Rows into files of that many, each of which is laid out before it is filled."""
    folder = files[0].parent.name
    done, open_file = 0, None
    for chunk in chunks:
        block = np.asarray(chunk)
        _check(block, folder, done)
        if done + len(block) > rows:
            raise ValueError(f"{folder}: more than {rows} rows for {rows} pairs")
        while len(block):
            number, at = divmod(done, size)
            if open_file is None or at == 0:
                shape = (min(size, rows - number * size), block.shape[1])
                open_file = np.lib.format.open_memmap(files[number], "w+", np.float16, shape)
            if block.shape[1] != open_file.shape[1]:
                raise ValueError(
                    f"{folder}: row {done} has {block.shape[1]} columns, those before it "
                    f"{open_file.shape[1]}"
                )
            part, block = np.split(block, [len(open_file) - at])
            open_file[at : at + len(part)] = part
            done += len(part)
            if at + len(part) == len(open_file):
                open_file.flush()
    if done != rows:
        raise ValueError(f"{folder}: {done} rows for {rows} pairs")


def _check(block: np.ndarray, folder: str, first: int) -> None:
    # NaN compares false.
    bad = ~(np.abs(block) <= _TOO_LARGE).all(axis=1)
    if bad.any():
        raise ValueError(f"{folder}: row {first + int(bad.argmax())} holds what float16 cannot")
