"""Tables and captions in text files: CSV, TSV, JSON lines, and a caption a line."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sotalign_jax.encoders.sources.base import Columns
from sotalign_jax.encoders.sources.rows import RowSource

__all__ = ["TextFileSource"]

_ENDED = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
# Bytes of a file that are looked at for its line ends.
_LOOKED_AT = 2**20

# Of an open file the rows from where it stands, and after each how many bytes were read.
Reader = Callable[[BinaryIO], Iterator[tuple[Mapping[str, Any] | str, int]]]


class TextFileSource(RowSource):
    """A text file, UTF-8 with or without a byte order mark.

    ``csv`` and ``tsv`` have a header; a field in double quotes may hold quotes (doubled), line
    breaks and separators. ``jsonl`` has an object a line, of which the first says what columns
    there are. ``lines`` has a caption a line, whose id is its number, from 0; an empty line is an
    empty caption.

    Opening it goes through it once, so that any part can be read without those before it.

    Args:
        path: the file.
        kind: ``"csv"``, ``"tsv"``, ``"jsonl"`` or ``"lines"``.
        modality: ``"image"`` or ``"text"``.
        columns: what they are called.
        rows_per_part: rows of each part but the last.
        quoted: whether double quotes at the start of a field of ``csv`` or ``tsv`` mean more than
            themselves.

    Raises:
        ValueError: a column is missing, or quotes that do not close.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        modality: str,
        columns: Columns,
        rows_per_part: int,
        quoted: bool = True,
    ):
        self._path = Path(path)
        if kind == "lines" and modality == "image":
            raise ValueError(f"{path}: a text file has no images; give a folder, table or archives")
        if rows_per_part < 1:
            raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_part}")
        names, start, self._reader = _open(self._path, kind, quoted)
        # Where each part starts.
        self._offsets, rows = [], 0
        for offset in self._row_starts(start):
            if rows % rows_per_part == 0:
                self._offsets.append(offset)
            rows += 1
        super().__init__(
            path,
            kind,
            modality,
            rows=rows,
            names=names,
            paths=names,
            folder=self._path.parent,
            contents=_digest(self._path) + ("" if quoted else " not quoted"),
            columns=columns,
            rows_per_part=rows_per_part,
            lists=kind == "jsonl",
        )

    def _row_starts(self, start: int) -> Iterator[int]:
        with open(self._path, "rb") as file:
            file.seek(start)
            for _, end in self._reader(file):
                yield start
                start = end

    def _read_rows(self, part: int, start: int, stop: int) -> Iterator[Mapping[str, Any] | str]:
        with open(self._path, "rb") as file:
            file.seek(self._offsets[part])
            for _, (row, _) in zip(range(stop - start), self._reader(file), strict=False):
                yield row


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _open(path: Path, kind: str, quoted: bool) -> tuple[tuple[str, ...], int, Reader]:
    """Names of the columns, where the first row starts, and what reads rows."""
    with open(path, "rb") as file:
        mark = 3 if file.read(3) == b"\xef\xbb\xbf" else 0
        file.seek(mark)
        if kind in ("lines", "jsonl"):
            start = file.read(_LOOKED_AT)
            file.seek(mark)
            if b"\r" in start.rstrip(b"\r") and b"\n" not in start:
                raise ValueError(
                    f"{path}: its lines end with a carriage return alone (\\r, as of old Macs); "
                    "make it \\n"
                )
        if kind == "lines":
            return ("caption",), mark, _lines
        if kind == "jsonl":
            first = next((row for row, _ in _objects(file) if not isinstance(row, str)), {})
            return tuple(first), mark, _objects
        header, start = next(_fields(file, path, kind, quoted), ((), 0))
        if isinstance(header, str) or len(set(header)) < len(header):
            raise ValueError(f"{path}: its first line must be a header of different names")
    names = tuple(header)

    def rows(file: BinaryIO) -> Iterator[tuple[Mapping[str, Any] | str, int]]:
        for fields, end in _fields(file, path, kind, quoted):
            if isinstance(fields, str):
                yield fields, end
            elif len(fields) != len(names):
                yield f"wrong row: {len(fields)} fields, the header has {len(names)}", end
            else:
                yield dict(zip(names, fields, strict=True)), end

    return names, start, rows


def _fields(
    file: BinaryIO, path: Path, kind: str, quoted: bool
) -> Iterator[tuple[list[str] | str, int]]:
    """The fields of each row (or why it cannot be read), and where it ends."""
    end, wrong = file.tell(), False

    def lines() -> Iterator[str]:
        nonlocal end, wrong
        for whole in file:
            # A bare \r ends a row too, unless it is quoted: then the reader asks for more.
            for line in _ENDED.findall(whole) if b"\r" in whole else (whole,):
                end += len(line)
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError:
                    wrong = True
                    text = line.decode("utf-8", errors="replace")
                yield text

    reader = csv.reader(
        lines(),
        delimiter="\t" if kind == "tsv" else ",",
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        strict=True,
    )
    try:
        for fields in reader:
            if fields:  # an empty line is no row
                yield ("not UTF-8" if wrong else fields), end
            wrong = False
    except csv.Error as error:
        raise ValueError(
            f"{path}: a quoted field that ends near byte {end} is not written as {kind.upper()} "
            f"({error}); quotes inside of one are doubled; --noquoted takes them "
            "as they are"
        ) from None


def _lines(file: BinaryIO) -> Iterator[tuple[Mapping[str, Any] | str, int]]:
    end = file.tell()
    for line in file:
        end += len(line)
        try:
            yield {"caption": line.decode("utf-8").rstrip("\r\n")}, end
        except UnicodeDecodeError:
            yield "not UTF-8", end


def _objects(file: BinaryIO) -> Iterator[tuple[Mapping[str, Any] | str, int]]:
    end = file.tell()
    for line in file:
        end += len(line)
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except UnicodeDecodeError:
            yield "not UTF-8", end
        except (ValueError, RecursionError):
            yield "not a JSON object", end
        else:
            yield (row if isinstance(row, dict) else "not a JSON object"), end
