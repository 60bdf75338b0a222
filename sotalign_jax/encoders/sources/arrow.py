"""Tables that pyarrow reads: Parquet files, and what Hugging Face's ``save_to_disk`` writes."""

from __future__ import annotations

import abc
import bisect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sotalign_jax.encoders.sources.base import Columns, fingerprint
from sotalign_jax.encoders.sources.rows import RowSource

__all__ = ["ParquetSource", "SavedDatasetSource", "parquet_files", "saved_split"]

# Rows that are made Python objects at once.
_ROWS = 256


class _ArrowSource(RowSource):
    """Rows of several files of one schema, one file after another."""

    def __init__(
        self,
        path: str,
        kind: str,
        modality: str,
        files: Sequence[Path],
        sizes: Sequence[int],
        schema: Any,
        folder: Path,
        columns: Columns,
        rows_per_part: int,
    ):
        import pyarrow

        self._files = tuple(files)
        self._starts = [0]
        for size in sizes:
            self._starts.append(self._starts[-1] + size)
        text = (pyarrow.types.is_string, pyarrow.types.is_large_string)
        super().__init__(
            path,
            kind,
            modality,
            rows=self._starts[-1],
            names=schema.names,
            paths=[field.name for field in schema if any(check(field.type) for check in text)],
            folder=folder,
            contents=fingerprint(
                [(f.name, n, f.stat().st_size) for f, n in zip(files, sizes, strict=True)]
                + [f"{field.name} {field.type}" for field in schema]
            ),
            columns=columns,
            rows_per_part=rows_per_part,
        )
        self._schema_names = schema.names

    @property
    def _read_columns(self) -> list[str]:
        """The columns that are read, of nested ones the outer ones."""
        names = self._schema_names
        outer = (n if n in names else n.partition(".")[0] for n in self.needed)
        return list(dict.fromkeys(outer))

    def _read_rows(self, part: int, start: int, stop: int) -> Iterator[Mapping[str, Any] | str]:
        first = bisect.bisect_right(self._starts, start) - 1
        for number, file in enumerate(self._files[first:], first):
            offset = self._starts[number]
            if offset >= stop:
                break
            end = min(stop, self._starts[number + 1])
            if end > max(start, offset):
                yield from self._read_file(file, max(start, offset) - offset, end - offset)

    @abc.abstractmethod
    def _read_file(self, file: Path, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        """The rows ``start .. stop - 1`` of a file."""


class ParquetSource(_ArrowSource):
    """One Parquet file, or several of one schema, read by row groups.

    Args:
        path: as the user gave it.
        modality: ``"image"`` or ``"text"``.
        files: in their order.
        folder: what paths of images are relative to.
        columns: what they are called.
        rows_per_part: rows of each part but the last.

    Raises:
        ValueError: a file that is no Parquet, files of different columns, a column is missing.
    """

    def __init__(
        self,
        path: str,
        modality: str,
        files: Sequence[Path],
        folder: Path,
        columns: Columns,
        rows_per_part: int,
    ):
        sizes, first = [], None
        for file in files:
            with _opened(file) as opened:
                schema = opened.schema_arrow.remove_metadata()
                sizes.append(opened.metadata.num_rows)
            first = schema if first is None else first
            if schema.names != first.names:
                raise ValueError(f"{file}: has other columns than {files[0].name}")
        super().__init__(
            path, "parquet", modality, files, sizes, first, folder, columns, rows_per_part
        )

    def _read_file(self, file: Path, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        import pyarrow

        with _opened(file) as opened:
            groups, offset, skip = [], 0, 0
            for group in range(opened.num_row_groups):
                rows = opened.metadata.row_group(group).num_rows
                if offset + rows > start and offset < stop:
                    skip = skip if groups else start - offset
                    groups.append(group)
                offset += rows
            left = stop - start
            try:
                for batch in opened.iter_batches(_ROWS, groups, columns=self._read_columns):
                    batch = batch.slice(min(skip, batch.num_rows))
                    skip -= min(skip, _ROWS)
                    rows = batch.slice(0, left).to_pylist()
                    left -= len(rows)
                    yield from rows
                    if not left:
                        return
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{file}: not readable as Parquet ({error})") from None


def _opened(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not readable as Parquet ({error})") from None


class SavedDatasetSource(_ArrowSource):
    """A split as ``datasets.Dataset.save_to_disk`` leaves it; read without `datasets`.

    Args:
        path: as the user gave it.
        modality: ``"image"`` or ``"text"``.
        folder: the directory that has ``state.json``.
        columns: what they are called.
        rows_per_part: rows of each part but the last.

    Raises:
        ValueError: a file that is missing or is no Arrow stream, or a column is missing.
    """

    def __init__(
        self, path: str, modality: str, folder: Path, columns: Columns, rows_per_part: int
    ):
        state = folder / "state.json"
        try:
            listed = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
            files = [folder / entry["filename"] for entry in listed]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{state}: does not list the files of a data set ({error!r})"
            ) from None
        sizes, first = [], None
        for file in files:
            schema, batches = _stream(file)
            sizes.append(sum(batch.num_rows for batch in batches))
            first = schema if first is None else first
        if first is None:
            raise ValueError(f"{state}: lists no files")
        super().__init__(
            path, "saved", modality, files, sizes, first, folder, columns, rows_per_part
        )

    def _read_file(self, file: Path, start: int, stop: int) -> Iterator[Mapping[str, Any]]:
        offset = 0
        for batch in _stream(file)[1]:
            low, high = max(start - offset, 0), min(stop - offset, batch.num_rows)
            offset += batch.num_rows
            chosen = batch.select(self._read_columns) if high > low else batch
            for first in range(low, high, _ROWS):
                yield from chosen.slice(first, min(_ROWS, high - first)).to_pylist()
            if offset >= stop:
                return


def _stream(file: Path) -> tuple[Any, Iterator[Any]]:
    """Schema and record batches of an Arrow stream, mapped into memory."""
    import pyarrow

    def batches(reader) -> Iterator[Any]:
        try:
            yield from reader
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file}: not readable as an Arrow stream ({error})") from None

    try:
        reader = pyarrow.ipc.open_stream(pyarrow.memory_map(str(file)))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not readable as an Arrow stream ({error})") from None
    return reader.schema, batches(reader)


def saved_split(path: Path, split: str | None) -> Path:
    """The directory of one split of what ``save_to_disk`` wrote.

    Args:
        path: of a data set, or of a dictionary of them.
        split: which of the dictionary; None where there is one.

    Returns:
        A directory with ``state.json``.

    Raises:
        ValueError: several splits and none named, or none of that name.
    """
    listing = path / "dataset_dict.json"
    if not listing.is_file():
        if split is not None:
            raise ValueError(f"split: {path} is one data set, without splits")
        return path
    try:
        names = list(json.loads(listing.read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{listing}: does not list splits ({error!r})") from None
    return path / choose_split(path, names, split)


def choose_split(path: Any, names: Sequence[str], split: str | None) -> str:
    """The split that was asked for, or the only one there is."""
    listed = ", ".join(names) or "none"
    if split is None:
        if len(names) != 1:
            raise ValueError(f"{path}: say which split, as in --split=NAME; it has {listed}")
        return names[0]
    if split not in names:
        raise ValueError(f"split: {path} has no {split!r}, it has {listed}")
    return split


def parquet_files(path: Path, split: str | None) -> list[Path]:
    """The Parquet files of one split below a directory, as a hub or a converter lays them out.

    ``data/train-00000-of-00002.parquet`` and ``train/0000.parquet`` are of the split ``train``,
    files with other names directly in the directory of none.

    Args:
        path: the directory.
        split: which; None where there is one.

    Returns:
        The files, in the order of their names.

    Raises:
        ValueError: no files, several splits and none named, none of that name, several folders with
            one of that name, or a file of its numbered ones is missing.
    """
    found: dict[tuple[str, str], list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        below = file.relative_to(path)
        if any(part.startswith(".") for part in below.parts):
            continue
        folder = below.parent.as_posix()
        if match := re.fullmatch(r"(.+?)-(\d+)-of-(\d+)(-\w+)?\.parquet", file.name):
            found.setdefault((folder, match[1]), []).append(file)
        else:
            found.setdefault((folder, below.parent.name), []).append(file)
    if not found:
        raise ValueError(f"{path}: no Parquet files below it")
    names = list(dict.fromkeys(name or "(no name)" for _, name in found))
    wanted = choose_split(path, names, split)
    chosen = [key for key in found if (key[1] or "(no name)") == wanted]
    if len(chosen) > 1:
        folders = ", ".join(folder for folder, _ in chosen)
        raise ValueError(
            f"{path}: has the split {wanted!r} in {folders}; give one of these folders"
        )
    files = found[chosen[0]]
    numbers = [re.search(r"-(\d+)-of-(\d+)", file.name) for file in files]
    for at, match in enumerate(numbers):
        if match and (int(match[1]) != at or int(match[2]) != len(files)):
            raise ValueError(
                f"{files[at].parent}: of {int(match[2])} files of the split {wanted!r} there are "
                f"{len(files)}"
            )
    return files
