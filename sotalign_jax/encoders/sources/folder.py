"""A folder of images, with all that is below it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from sotalign_jax.encoders.sources.base import Columns, Record, fingerprint
from sotalign_jax.encoders.sources.rows import RangedSource, without_suffix

__all__ = ["SUFFIXES", "FolderSource"]

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".jp2", ".avif"),
)


class FolderSource(RangedSource):
    """Files with a suffix of `SUFFIXES`, in the order of their names; the id is the path below.

    Hidden files and folders are left out, links are followed.

    Args:
        path: the folder.
        modality: ``"image"``.
        rows_per_part: images of each part but the last.

    Raises:
        ValueError: another modality, or no images.
    """

    def __init__(self, path: str, modality: str, columns: Columns, rows_per_part: int):
        if modality != "image":
            raise ValueError(
                f"{path}: a folder of images has no texts; give a table, a text file or archives"
            )
        if columns != Columns():
            raise ValueError("column: a folder of images has no columns")
        self._folder = Path(path)
        self._files = sorted(_images(path))
        if not self._files:
            raise ValueError(f"{path}: no images below it (known are {', '.join(SUFFIXES)})")
        super().__init__(
            path,
            "folder",
            modality,
            rows=len(self._files),
            contents=fingerprint(self._files),
            columns=columns,
            rows_per_part=rows_per_part,
        )

    def read(self, part: int) -> Iterator[Record]:
        start, stop = self.range_of(part)
        for file in self._files[start:stop]:
            yield Record(without_suffix(file), self._folder / file)


def _images(root: str) -> Iterator[str]:
    """Paths of images relative to the root, with slashes."""

    def fail(error: OSError):
        raise error

    seen: set[tuple[int, int]] = set()  # lest links lead in circles
    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield Path(folder, name).relative_to(root).as_posix()
