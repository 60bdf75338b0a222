"""Sources that number their rows: what a row of any table means."""

from __future__ import annotations

import abc
import os
import posixpath
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from sotalign_jax.encoders.sources.base import Columns, Record, Source, field_of

__all__ = ["ROWS_PER_PART", "RangedSource", "RowSource", "without_suffix"]

ROWS_PER_PART = 65_536


class RangedSource(Source):
    """Items that are numbered, cut into parts of equal size.

    Args:
        path: as the user gave it.
        kind: which class of source.
        modality: ``"image"`` or ``"text"``.
        rows: how many there are.
        contents: as `Source`.
        columns: as the user gave them.
        rows_per_part: rows of each part but the last.

    Raises:
        ValueError: no rows, or parts without rows.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        modality: str,
        *,
        rows: int,
        contents: str,
        columns: Columns,
        rows_per_part: int,
    ):
        if rows_per_part < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_part}")
        if not rows:
            raise ValueError(f"{path}: has no rows")
        starts = range(0, rows, rows_per_part)
        parts = (f"rows {start} to {min(start + rows_per_part, rows) - 1}" for start in starts)
        super().__init__(path, kind, modality, parts, contents, columns)
        self._total, self._rows_per_part = rows, rows_per_part

    def rows(self, part: int) -> int | None:
        start, stop = self.range_of(part)
        return stop - start

    def settings(self) -> dict[str, Any]:
        return super().settings() | {"rows_per_shard": self._rows_per_part}

    def range_of(self, part: int) -> tuple[int, int]:
        """First row of a part, and one past its last."""
        start = part * self._rows_per_part
        return start, min(start + self._rows_per_part, self._total)


class RowSource(RangedSource):
    """Rows with a column of images (paths or bytes) or of captions.

    Args:
        path: as the user gave it.
        kind: which class of source.
        modality: ``"image"`` or ``"text"``.
        rows: how many there are.
        names: of the columns.
        paths: of them those that hold paths of images.
        folder: what relative paths of images are relative to.
        contents: as `Source`.
        columns: as the user gave them.
        rows_per_part: rows of each part but the last.
        lists: whether a row may hold a list of captions.

    Raises:
        ValueError: no rows, or a column that is needed or was asked for is not there.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        modality: str,
        *,
        rows: int,
        names: Collection[str],
        paths: Collection[str],
        folder: Path,
        contents: str,
        columns: Columns,
        rows_per_part: int,
        lists: bool = True,
    ):
        super().__init__(
            path,
            kind,
            modality,
            rows=rows,
            contents=contents,
            columns=columns,
            rows_per_part=rows_per_part,
        )
        self._folder, self._lists = folder, lists and modality == "text"
        self._caption = columns.caption or "caption"
        self._image = columns.image or "image"
        wanted = self._image if modality == "image" else self._caption
        asked = [name for name in (columns.id, columns.image, columns.caption) if name is not None]
        for name in (wanted, *asked):
            # Of a nested column, the outer one.
            if name not in names and name.partition(".")[0] not in names:
                role = "image" if modality == "image" else "caption"
                hint = f"; say which it is, as in --column={role}:NAME" if name == wanted else ""
                listed = ", ".join(map(repr, names)) or "none"
                raise ValueError(f"{path}: has no column {name!r}, it has {listed}{hint}")
        if columns.id is not None or "id" in names:
            self._id: str | None = columns.id or "id"
        else:
            self._id = None
        self._id_from_path = self._id is None and self._image in paths
        self._names, self._beside = names, ""

    @property
    def needed(self) -> list[str]:
        """The columns that are read."""
        names = [self._image if self.modality == "image" else self._caption]
        if self._id is not None:
            names.append(self._id)
        elif self._id_from_path:
            names.append(self._image)
        if self._beside:
            names.append(self._beside)
        return list(dict.fromkeys(names))

    def rows(self, part: int) -> int | None:
        return None if self._lists else super().rows(part)

    def read(self, part: int) -> Iterator[Record]:
        start, stop = self.range_of(part)
        for number, row in enumerate(self._read_rows(part, start, stop), start):
            if isinstance(row, str):
                yield Record(f"row {number}", None, row)
            else:
                yield from self._records(number, row)

    def values(self, column: str) -> Iterator[tuple[str, Any]]:
        """Another column, beside the ids that the items have.

        Args:
            column: its name; a dot leads into nested ones.

        Yields:
            An id and a value for each row.

        Raises:
            ValueError: no such column, or a row that cannot be read or has no id.
        """
        if column not in self._names and column.partition(".")[0] not in self._names:
            listed = ", ".join(map(repr, self._names)) or "none"
            raise ValueError(f"{self.path}: has no column {column!r}, it has {listed}")
        self._beside = column
        try:
            for part in range(len(self.parts)):
                start, stop = self.range_of(part)
                for number, row in enumerate(self._read_rows(part, start, stop), start):
                    if isinstance(row, str):
                        raise ValueError(f"{self.path}: row {number} cannot be read ({row})")
                    name, reason = self._id_of(number, row)
                    if reason:
                        raise ValueError(f"{self.path}: row {number}: {reason}")
                    yield name, field_of(row, column)
        finally:
            self._beside = ""

    @abc.abstractmethod
    def _read_rows(self, part: int, start: int, stop: int) -> Iterator[Mapping[str, Any] | str]:
        """The rows ``start .. stop - 1``, which make up a part; or why one cannot be read."""

    def _records(self, number: int, row: Mapping[str, Any]) -> Iterator[Record]:
        name, reason = self._id_of(number, row)
        if reason:
            yield Record(name, None, reason)
        elif self.modality == "text":
            yield from caption_records(name, field_of(row, self._caption))
        else:
            yield image_record(name, field_of(row, self._image), self._folder)

    def _id_of(self, number: int, row: Mapping[str, Any]) -> tuple[str, str]:
        if self._id is not None:
            return id_text(field_of(row, self._id), number)
        if self._id_from_path:
            value = field_of(row, self._image)
            if not isinstance(value, str) or not value:
                return f"row {number}", "no id: the row has no path of an image"
            return self._path_id(value), ""
        return str(number), ""

    def _path_id(self, value: str) -> str:
        # The id must not depend on where the command runs, as the path of the table may.
        path, folder = Path(value), os.path.abspath(self._folder)
        if path.is_absolute() and path.is_relative_to(folder):
            value = path.relative_to(folder).as_posix()
        return without_suffix(posixpath.normpath(value.replace("\\", "/")))


def without_suffix(name: str) -> str:
    """A path without its last suffix: the id of an image."""
    stem, _ = posixpath.splitext(name)
    return stem


def id_text(value: Any, number: int) -> tuple[str, str]:
    """An id as a string, and why it is none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    if isinstance(value, str) and value:
        return value, ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value), ""
    if value is None or value == "":
        return f"row {number}", "no id"
    return f"row {number}", f"no id: {type(value).__name__} is neither string nor integer"


def caption_records(name: str, value: Any) -> Iterator[Record]:
    """A record for each of the captions of an item; of one without, that it has none."""
    several = list(value) if isinstance(value, list | tuple) else [value]
    if not several:
        yield Record(name, None, "no caption")
    for caption in several:
        if isinstance(caption, bytes):
            try:
                caption = caption.decode("utf-8")
            except UnicodeDecodeError:
                yield Record(name, None, "not UTF-8")
                continue
        if caption is None:
            yield Record(name, None, "no caption")
        elif not isinstance(caption, str):
            yield Record(name, None, f"no caption: {type(caption).__name__} is not a string")
        else:
            yield Record(name, caption)


def image_record(name: str, value: Any, folder: Path) -> Record:
    """An image that a row holds: bytes, a path, or both as ``{"bytes", "path"}``."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return Record(name, value)
    if value is None or value == "":
        return Record(name, None, "no image")
    if not isinstance(value, str):
        return Record(name, None, f"no image: {type(value).__name__} is neither bytes nor a path")
    if "://" in value:
        return Record(name, None, "no image: a URL; download it and give its path")
    path = folder / value
    if "\\" in value and os.sep == "/" and not path.exists():
        # Of a table that was made on Windows; the id has slashes anyhow.
        path = folder / value.replace("\\", "/")
        if not path.exists():
            hint = "as it is written and with / for each backslash"
            return Record(name, None, f"not readable: No such file or directory, {hint}")
    return Record(name, path)
