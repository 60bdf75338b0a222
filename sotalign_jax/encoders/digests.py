"""Whether the files of a model are those that they were, found out without reading all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["digest_of_model"]

# Weights, what says how to use them, tokenizers, and code that comes with them.
_SUFFIXES = {
    *(".safetensors", ".bin", ".pt", ".pth", ".json", ".txt", ".model", ".spm", ".bpe"),
    *(".tiktoken", ".vocab", ".jinja", ".py"),
}
# Larger files are sampled: the start, which of safetensors is the header, and some blocks.
_WHOLE = 64 * 2**20
_START, _BLOCKS, _BLOCK = 2**20, 256, 4096


def digest_of_model(folder: Path) -> str:
    """A digest of the files of a model, in the layout of transformers or sentence-transformers.

    Of each file its name, its size and its bytes; of one of more than 64 MiB the first MiB and 256
    blocks that are spread evenly. A model that was trained further differs in almost all bytes of
    what was trained.

    Args:
        folder: the model's; of folders in it, those that are stages of sentence-transformers.

    Returns:
        16 hexadecimal digits.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for file in sorted(_files(folder), key=lambda file: file.relative_to(folder).as_posix()):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}\0{size}\0".encode(errors="replace"))
        with open(file, "rb") as opened:
            for start, count in _samples(size):
                opened.seek(start)
                digest.update(opened.read(count))
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    for file in (*folder.iterdir(), *folder.glob("[0-9]_*/*")):
        if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file():
            yield file


def _samples(size: int) -> Iterator[tuple[int, int]]:
    """Where to read, and how many bytes."""
    if size <= _WHOLE:
        yield 0, size
        return
    yield 0, _START
    for block in range(_BLOCKS):
        yield _START + (size - _START - _BLOCK) * block // (_BLOCKS - 1), _BLOCK
