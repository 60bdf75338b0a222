"""Features on disk: a directory of row shards with a manifest, seen as one lazy table.

A store is a directory::

    manifest.json         what the rows are (`Manifest`)
    features-00000.npy    the rows, in shards, memory-mapped when read
    features-00001.npy
    ids.jsonl             one JSON string a line, if the rows have ids

Everything that reads features, whatever the format, hands out a `FeatureTable`.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
from jaxtyping import Float32, Int
from numpy.typing import ArrayLike

from sotalign_jax.files import flush_files

__all__ = [
    "BadRows",
    "FeatureTable",
    "Manifest",
    "MissingFileError",
    "check_finite",
    "concat",
    "find_bad_rows",
    "open_store",
    "refuse_bad_rows",
    "write_store",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
IDS = "ids.jsonl"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": BFLOAT16, "float32": np.dtype(np.float32)}


class MissingFileError(ValueError, FileNotFoundError):
    """A file or directory that was asked for does not exist."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the rows of a table are, as far as it is known; the empty manifest knows nothing.

    Attributes:
        encoder: name of the encoder that made the rows, ``""`` if unknown.
        pooling: how its tokens became one row ("cls", "mean", ...), ``""`` if unknown.
        dim: columns.
        dtype: number format on disk, "float16", "bfloat16" or "float32".
        rows: rows on disk, over all shards.
        normalized: whether rows have unit length; None if unknown.
        source: what was encoded, and where it came from.
        licence: licence of the source.
        shards: file name and rows of each shard, in row order.
        ids: file name of the ids, None if the rows have none.
        format_version: version of the layout.
    """

    encoder: str = ""
    pooling: str = ""
    dim: int = 0
    dtype: str = ""
    rows: int = 0
    normalized: bool | None = None
    source: str = ""
    licence: str = ""
    shards: tuple[tuple[str, int], ...] = ()
    ids: str | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The manifest as indented JSON; shards as a list of ``{"file", "rows"}``."""
        fields = dataclasses.asdict(self)
        fields["shards"] = [{"file": file, "rows": rows} for file, rows in self.shards]
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = MANIFEST) -> "Manifest":
        """Reads what `to_json` wrote.

        Args:
            text: the JSON.
            name: what to call it in error messages.

        Returns:
            The manifest.

        Raises:
            ValueError: not JSON, a field missing or unknown, or a version this code cannot read.
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: not a JSON manifest ({error})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{name}: expected a JSON object, got {type(fields).__name__}")
        version = fields.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"{name}: format_version is {version}, this code reads 1")
        known = {field.name for field in dataclasses.fields(cls)}
        if wrong := sorted(known ^ set(fields)):
            raise ValueError(f"{name}: fields missing or unknown: {', '.join(wrong)}")
        try:
            shards = tuple((str(s["file"]), int(s["rows"])) for s in fields.pop("shards"))
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"{name}: shards must be a list of {{file, rows}}") from None
        return cls(**fields, shards=shards)


@runtime_checkable
class Rows(Protocol):
    """A block of rows that can be read in part; what a `FeatureTable` is made of."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, index: slice | np.ndarray) -> np.ndarray:
        """The rows of a slice, or of an array of valid indices in any order, as float32."""
        ...


class ArrayRows:
    """Rows of a NumPy array, usually a memory map."""

    def __init__(self, array: np.ndarray, name: str):
        check_features(array.shape, array.dtype, name)
        self._array = array
        self.shape: tuple[int, int] = array.shape
        self.dtype = array.dtype

    def read(self, index: slice | np.ndarray) -> np.ndarray:
        return to_float32(np.asarray(self._array[index]))


def to_float32(array: np.ndarray) -> np.ndarray:
    """A float32 copy; float64 beyond its range becomes Inf, which `check_finite` reports."""
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def check_features(shape: Sequence[int], dtype: np.dtype, name: str) -> None:
    """Raises a ValueError naming `name` unless shape and dtype are those of features."""
    if len(shape) != 2:
        raise ValueError(
            f"{name}: features are 2-d (rows, dim), got {len(shape)}-d of shape {tuple(shape)}"
        )
    if dtype != BFLOAT16 and dtype.kind != "f":
        raise ValueError(f"{name}: features are float16, bfloat16, float32 or float64, got {dtype}")
    if shape[1] == 0:
        raise ValueError(f"{name}: features need at least one column, got shape {tuple(shape)}")


class FeatureTable:
    """Rows of features, read only when asked for; immutable.

    The rows lie in one or several sources (memory-mapped shards, a data set of an HDF5 file, an
    array); a selection picks some of them, in any order, without copying. Whatever the number
    format on disk, rows come out as float32.

    Args:
        sources: blocks of rows, stacked in this order; all of one width.
        ids: a string for each row, or None.
        name: what to call the table in error messages: a path, or "emoji image test".
        manifest: what is known of the rows on disk.

    Raises:
        ValueError: no source, sources of different width, or a wrong number of ids.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        *,
        ids: Sequence[str] | np.ndarray | None = None,
        name: str = "features",
        manifest: Manifest | None = None,
    ):
        if not sources:
            raise ValueError(f"{name}: a table needs at least one source of rows")
        if len(widths := {source.shape[1] for source in sources}) > 1:
            raise ValueError(f"{name}: sources differ in dim: {sorted(widths)}")
        self._sources = tuple(sources)
        self._offsets = np.cumsum([0, *(source.shape[0] for source in sources)], dtype=np.int64)
        self._selection: np.ndarray | None = None
        self._ids = None if ids is None else id_array(ids, name)
        self.name = name
        self.manifest = Manifest() if manifest is None else manifest
        if self._ids is not None and len(self._ids) != len(self):
            raise ValueError(f"{name}: {len(self._ids)} ids for {len(self)} rows")

    @classmethod
    def from_array(
        cls,
        array: ArrayLike,
        ids: Sequence[str] | np.ndarray | None = None,
        name: str = "array",
        manifest: Manifest | None = None,
    ) -> "FeatureTable":
        """A table over an array in memory or a memory map; the array is not copied.

        Args:
            array: ``(rows, dim)``, float16, bfloat16, float32 or float64.
            ids: a string for each row, or None.
            name: what to call the table in error messages.
            manifest: what is known of the rows; by default their shape and dtype.

        Returns:
            The table.

        Raises:
            ValueError: not 2-d, not floating, or a wrong number of ids.
        """
        rows = ArrayRows(np.asarray(array), name)
        if manifest is None:
            manifest = Manifest(rows=rows.shape[0], dim=rows.shape[1], dtype=rows.dtype.name)
        return cls([rows], ids=ids, name=name, manifest=manifest)

    def __len__(self) -> int:
        if self._selection is not None:
            return len(self._selection)
        return int(self._offsets[-1])

    def __repr__(self) -> str:
        ids = "" if self._ids is None else ", ids"
        return f"FeatureTable({self.name!r}: {len(self)} x {self.dim}, {self.dtype}{ids})"

    @property
    def dim(self) -> int:
        """Columns."""
        return self._sources[0].shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """``(rows, dim)``."""
        return len(self), self.dim

    @property
    def dtype(self) -> np.dtype:
        """Number format on disk; float32 where sources differ."""
        dtypes = {source.dtype for source in self._sources}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    @functools.cached_property
    def ids(self) -> np.ndarray | None:
        """``(rows,)`` strings, or None if the rows have no ids."""
        if self._ids is None or self._selection is None:
            return self._ids
        ids = self._ids[self._selection]
        ids.setflags(write=False)
        return ids

    def select(self, indices: ArrayLike, name: str | None = None) -> "FeatureTable":
        """The table of some rows, in the order given; nothing is read, selections compose.

        Args:
            indices: ``(k,)`` row numbers in ``[0, len(self))``; repeats are allowed.
            name: what to call the new table; by default as this one.

        Returns:
            A table of ``k`` rows over the same sources.

        Raises:
            ValueError: indices not 1-d integers.
            IndexError: an index out of range.
        """
        rows = self._valid(indices)
        table = object.__new__(FeatureTable)
        table._sources, table._offsets, table._ids = self._sources, self._offsets, self._ids
        table._selection = rows if self._selection is None else self._selection[rows]
        table.name = self.name if name is None else name
        table.manifest = self.manifest
        return table

    def take(self, indices: ArrayLike) -> Float32[np.ndarray, "k d"]:
        """Reads some rows, in the order given.

        Args:
            indices: ``(k,)`` row numbers in ``[0, len(self))``; repeats are allowed.

        Returns:
            ``(k, dim)`` float32, a fresh array.

        Raises:
            ValueError: indices not 1-d integers.
            IndexError: an index out of range.
        """
        return self._gather(self._valid(indices))

    def chunks(self, size: int = 8192) -> Iterator[Float32[np.ndarray, "c d"]]:
        """Reads the rows in order, `size` at a time (the last chunk may be smaller).

        Args:
            size: rows a chunk, at least 1.

        Yields:
            ``(c, dim)`` float32 arrays, ``1 <= c <= size``.

        Raises:
            ValueError: `size` below 1.
        """
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        starts = range(0, len(self), size)
        return (self.read(slice(start, start + size)) for start in starts)

    @property
    def stored_rows(self) -> Int[np.ndarray, " n"]:
        """Which row of the sources, stacked, each row is."""
        return np.arange(len(self)) if self._selection is None else self._selection

    def disk_order(self) -> Int[np.ndarray, " n"]:
        """Indices of all rows in the order in which they are stored."""
        if self._selection is None:
            return np.arange(len(self))
        return np.argsort(self._selection, kind="stable")

    def array(self) -> Float32[np.ndarray, "n d"]:
        """All rows as one float32 array in memory."""
        return self.read(slice(None))

    def read(self, index: slice | np.ndarray) -> np.ndarray:
        """The rows of a contiguous slice or of an array of valid indices, as float32."""
        if not isinstance(index, slice):
            return self._gather(index)
        start, stop, _ = index.indices(len(self))
        if self._selection is not None:
            return self._gather(np.arange(start, stop))
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        parts = []
        for source, offset in zip(self._sources[first:], self._offsets[first:-1], strict=True):
            if offset >= stop:
                break
            parts.append(source.read(slice(max(start - int(offset), 0), stop - int(offset))))
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, self._empty()])

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        if self._selection is not None:
            rows = self._selection[rows]
        if len(self._sources) == 1:
            return self._sources[0].read(rows)
        shard = np.searchsorted(self._offsets, rows, side="right") - 1
        out = np.empty((len(rows), self.dim), np.float32)
        for number in np.unique(shard):
            here = shard == number
            out[here] = self._sources[number].read(rows[here] - self._offsets[number])
        return out

    def _empty(self) -> np.ndarray:
        return np.empty((0, self.dim), np.float32)

    def _valid(self, indices: Any) -> np.ndarray:
        rows = np.asarray(indices)
        if rows.ndim != 1 or (rows.dtype.kind not in "iu" and rows.size):
            raise ValueError(
                f"indices: expected 1-d integers for {self.name}, "
                f"got {rows.dtype} of shape {rows.shape}"
            )
        rows = rows.astype(np.int64)
        outside = (rows < 0) | (rows >= len(self))
        if outside.any():
            raise IndexError(
                f"indices: {rows[outside][0]} is out of range for {self.name} with {len(self)} rows"
            )
        return rows


def id_array(ids: Iterable[Any], name: str) -> np.ndarray:
    """Ids (strings, bytes or integers) as a read-only 1-d array of strings."""
    array = ids if isinstance(ids, np.ndarray) else np.array(list(ids))
    if array.dtype.kind == "O":
        values = [v.decode() if isinstance(v, bytes) else str(v) for v in array.ravel().tolist()]
        array = np.array(values, dtype=str).reshape(array.shape)
    elif array.dtype.kind == "S":
        array = np.char.decode(array, "utf-8")
    elif array.dtype.kind in "iuT" or array.size == 0:
        array = array.astype(str)
    if array.ndim != 1 or array.dtype.kind != "U":
        raise ValueError(
            f"{name}: ids must be 1-d strings or integers, got {array.dtype} of shape {array.shape}"
        )
    array = array.view()
    array.setflags(write=False)
    return array


def concat(tables: Sequence[FeatureTable], name: str | None = None) -> FeatureTable:
    """Stacks tables below one another; nothing is read.

    Args:
        tables: at least one table; all of one dim, and all with ids or all without.
        name: what to call the result; by default the names joined by " + ".

    Returns:
        A table of ``sum(len(t) for t in tables)`` rows.

    Raises:
        ValueError: no table, different dims, or only some tables with ids.
    """
    if not tables:
        raise ValueError("tables: nothing to concatenate")
    name = " + ".join(table.name for table in tables) if name is None else name
    first = tables[0]
    for table in tables:
        if table.dim != first.dim:
            raise ValueError(
                f"tables: dims differ, {first.name} has {first.dim}, {table.name} has {table.dim}"
            )
        if (table.ids is None) != (first.ids is None):
            with_ids, without = (first, table) if table.ids is None else (table, first)
            raise ValueError(f"tables: {with_ids.name} has ids, {without.name} has none")
    ids = [table.ids for table in tables if table.ids is not None]
    rows = sum(len(table) for table in tables)
    return FeatureTable(
        tables,
        ids=np.concatenate(ids) if ids else None,
        name=name,
        manifest=Manifest(rows=rows, dim=first.dim, dtype=first.dtype.name),
    )


class BadRows(NamedTuple):
    """Rows of a table that hold NaN or Inf.

    Attributes:
        count: how many.
        first: number of the first of them; the length of the table if there is none.
    """

    count: int
    first: int


def find_bad_rows(table: FeatureTable, part: int = 0, parts: int = 1) -> BadRows:
    """Reads one of several parts of a table once and looks for NaN and Inf.

    Args:
        table: the rows to check.
        part: which part, from 0; every row belongs to exactly one.
        parts: how many there are, contiguous in the order of the disk.

    Returns:
        The `BadRows` of that part, numbered as in the whole table.

    Raises:
        ValueError: no such part.
    """
    if not 0 <= part < parts:
        raise ValueError(f"part: must be at least 0 and less than parts ({parts}), got {part}")
    # In the order of the disk, whatever the order of the selection: each block is read once.
    order = table.disk_order()[len(table) * part // parts : len(table) * (part + 1) // parts]
    size = _chunk_rows(table.dim)
    bad, first = 0, len(table)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        wrong = rows[~np.isfinite(table.take(rows)).all(axis=1)]
        bad += len(wrong)
        first = min(first, int(wrong.min(initial=first)))
    return BadRows(bad, first)


def check_finite(table: FeatureTable, name: str | None = None) -> None:
    """Reads a table once and raises if it holds NaN or Inf.

    Args:
        table: the rows to check.
        name: what to call them in the message; by default the table's own name.

    Raises:
        ValueError: naming the table, how many rows are bad, and the first one (and its id).
    """
    refuse_bad_rows(table, find_bad_rows(table), name)


def refuse_bad_rows(table: FeatureTable, found: BadRows, name: str | None = None) -> None:
    """Raises if bad rows were found in a table.

    Args:
        table: the rows that were checked.
        found: what `find_bad_rows` found in all parts of it together.
        name: as for `check_finite`.

    Raises:
        ValueError: naming the table, how many rows are bad, and the first one (and its id).
    """
    if found.count:
        which = "" if table.ids is None else f" (id {str(table.ids[found.first])!r})"
        raise ValueError(
            f"{name or table.name}: {found.count} of {len(table)} rows hold NaN or Inf; "
            f"the first is row {found.first}{which}"
        )


def _chunk_rows(dim: int) -> int:
    """Rows that make about 16 MiB of float32."""
    return max(1, 2**22 // dim)


def memory_map(path: pathlib.Path) -> np.ndarray:
    """The array of a ``.npy`` file, memory-mapped, or a ValueError that names the file."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise MissingFileError(f"{path}: no such file") from None
    except (ValueError, EOFError, OSError) as error:
        # An array without rows cannot be mapped, but is read as well.
        try:
            return np.load(path, allow_pickle=False)
        except (ValueError, EOFError, OSError):
            raise ValueError(f"{path}: not a readable .npy array ({error})") from None


def write_store(
    directory: str | os.PathLike,
    chunks: FeatureTable | ArrayLike | Iterable[ArrayLike],
    *,
    ids: Iterable[str] | None = None,
    encoder: str = "",
    pooling: str = "",
    normalized: bool | None = None,
    source: str = "",
    licence: str = "",
    dtype: str = "float16",
    rows_per_shard: int = 65536,
    overwrite: bool = False,
) -> FeatureTable:
    """Writes features as a store and opens it.

    Chunks are written as they come, so that what is held in memory is one chunk. The store is
    built in a hidden directory beside `directory` and renamed when it is whole, the manifest
    written last: a crash leaves no half-written store under the name asked for. A store that is
    overwritten moves to a hidden name beside it and is deleted once the new one is in place.

    Ids go to a text file, one JSON string a line. A ``.npy`` of unicode would cost four bytes a
    character at the width of the longest id; lines cost what they hold, and may contain any
    character.

    Args:
        directory: where to; parents are made.
        chunks: an array or table ``(rows, dim)``, or an iterable of such arrays of one dim.
        ids: an id for each row; by default those of `chunks` if it is a table, else none.
        encoder: see `Manifest`, as for the next four.
        pooling: see `Manifest`.
        normalized: see `Manifest`.
        source: see `Manifest`.
        licence: see `Manifest`.
        dtype: "float16" (default), "bfloat16" or "float32". NumPy's format has no bfloat16: its
            shards hold the same two bytes as uint16, and the manifest says what they are.
        rows_per_shard: rows of each shard but the last.
        overwrite: replace a store that is there. Anything else is never replaced.

    Returns:
        The store, opened.

    Raises:
        ValueError: `directory` exists, `dtype` unknown, no rows, chunks that are not 2-d floats
            of one dim, a wrong number of ids, or a value too large for `dtype`.
    """
    target = pathlib.Path(directory)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard must be at least 1, got {rows_per_shard}")
    check_target(target, overwrite)
    blocks: Any = chunks
    if isinstance(chunks, FeatureTable):
        ids = chunks.ids if ids is None else ids
        blocks = chunks.chunks(_chunk_rows(chunks.dim))
    elif hasattr(chunks, "ndim"):
        blocks = [chunks]

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    partial.mkdir()
    try:
        shards, dim = _write_shards(partial, blocks, DTYPES[dtype], rows_per_shard)
        rows = sum(count for _, count in shards)
        if ids is not None:
            strings = id_array(ids, "ids")
            if len(strings) != rows:
                raise ValueError(f"ids: {len(strings)} ids for {rows} rows")
            with open(partial / IDS, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(string) + "\n" for string in strings.tolist())
        manifest = Manifest(
            encoder=encoder,
            pooling=pooling,
            dim=dim,
            dtype=dtype,
            rows=rows,
            normalized=normalized,
            source=source,
            licence=licence,
            shards=shards,
            ids=None if ids is None else IDS,
        )
        (partial / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        flush_files(partial)
        move_into_place(partial, target, overwrite)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_store(target)


def check_target(target: pathlib.Path, overwrite: bool) -> None:
    """Raises a ValueError where a store may not be written: see `write_store`."""
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"directory: {target} exists; choose another, or pass overwrite=True")
    if not (target / MANIFEST).is_file():
        raise ValueError(f"directory: {target} is not a feature store, so overwrite leaves it")


def move_into_place(partial: pathlib.Path, target: pathlib.Path, overwrite: bool) -> None:
    """Gives a store that is whole its name."""
    check_target(target, overwrite)
    if not target.exists():
        os.replace(partial, target)
        return
    # A directory cannot be replaced in one step: the old store stays beside it until the new one
    # is in place.
    old = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.old"
    os.replace(target, old)
    try:
        os.replace(partial, target)
    except OSError:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


class ShardWriter:
    """One ``.npy`` file of rows that are written as they come; how many is filled in at the end.

    Args:
        path: the file.
        dim: columns.
        dtype: of the store, one of `DTYPES`.
    """

    def __init__(self, path: pathlib.Path, dim: int, dtype: np.dtype):
        self.path, self.rows = path, 0
        self._dim, self._dtype = dim, _stored(dtype)
        self._file = open(path, "wb")  # noqa: SIM115
        self._write_header()

    def write(self, rows: np.ndarray) -> None:
        """Appends rows, as `cast_rows` gives them."""
        self._file.write(np.ascontiguousarray(rows).data)
        self.rows += len(rows)

    def close(self) -> None:
        """Completes the file."""
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def abandon(self) -> None:
        """Lets go of the file, whatever is in it."""
        self._file.close()

    def _write_header(self) -> None:
        # NumPy pads the header so that the number of rows can be rewritten in place.
        shape = (self.rows, self._dim)
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


def _write_shards(
    directory: pathlib.Path, chunks: Iterable, dtype: np.dtype, rows_per_shard: int
) -> tuple[tuple[tuple[str, int], ...], int]:
    """Writes chunks to numbered shards; returns (file, rows) of each, and the dim."""
    shards: list[tuple[str, int]] = []
    dim, done = None, 0
    shard: ShardWriter | None = None
    try:
        for number, chunk in enumerate(chunks):
            array = np.asarray(chunk)
            check_features(array.shape, array.dtype, f"chunk {number}")
            if dim is None:
                dim = array.shape[1]
            if array.shape[1] != dim:
                raise ValueError(f"chunk {number}: dim is {array.shape[1]}, chunk 0 has {dim}")
            array = cast_rows(array, dtype, lambda row, done=done: f"chunks: row {done + row}")
            done += len(array)
            while len(array):
                if shard is None:
                    shard = ShardWriter(directory / shard_name(len(shards)), dim, dtype)
                part, array = np.split(array, [rows_per_shard - shard.rows])
                shard.write(part)
                if shard.rows == rows_per_shard:
                    shard.close()
                    shards.append((shard.path.name, shard.rows))
                    shard = None
        if dim is None or not done:
            raise ValueError("chunks: no rows to write")
        if shard is not None:
            shard.close()
            shards.append((shard.path.name, shard.rows))
    finally:
        if shard is not None:
            shard.abandon()
    return tuple(shards), dim


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"features-{number:05d}.npy"


def _stored(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.uint16) if dtype == BFLOAT16 else dtype


def cast_rows(array: np.ndarray, dtype: np.dtype, where: Callable[[int], str]) -> np.ndarray:
    """Rows in the number format of a store, bfloat16 as uint16.

    Args:
        array: ``(n, dim)``.
        dtype: one of `DTYPES`.
        where: what to call row i in the message.

    Returns:
        ``(n, dim)``.

    Raises:
        ValueError: a value is too large for ``dtype``.
    """
    limit = float(ml_dtypes.finfo(dtype).max)
    size = np.abs(array, dtype=np.float64 if array.dtype == np.float64 else np.float32)
    over = ((size > limit) & np.isfinite(size)).any(axis=1)
    if over.any():
        row = int(over.argmax())
        larger = "bfloat16 or float32" if dtype == np.float16 else "float32"
        hint = f"; store as {larger}" if dtype != np.float32 else ""
        raise ValueError(
            f"{where(row)} holds a value of size {size[row].max():.6g}, "
            f"{dtype.name} ends at {limit:.6g}{hint}"
        )
    cast = array.astype(dtype)
    return cast.view(np.uint16) if dtype == BFLOAT16 else cast


def open_store(directory: str | os.PathLike) -> FeatureTable:
    """Opens a store and checks its shards against the manifest; rows stay on disk.

    Args:
        directory: what `write_store` wrote.

    Returns:
        The table, memory-mapped.

    Raises:
        MissingFileError: no directory, manifest, shard or ids file of that name.
        ValueError: a file that does not agree with the manifest.
    """
    root = pathlib.Path(directory)
    if not root.is_dir():
        raise MissingFileError(f"{root}: no such directory")
    path = root / MANIFEST
    if not path.is_file():
        raise MissingFileError(f"{root}: no {MANIFEST}, so this is not a feature store")
    manifest = Manifest.from_json(path.read_text(encoding="utf-8"), str(path))
    if manifest.dtype not in DTYPES:
        raise ValueError(f"{path}: dtype {manifest.dtype!r} is not one of {', '.join(DTYPES)}")
    if not manifest.shards:
        raise ValueError(f"{path}: lists no shards")
    dtype = DTYPES[manifest.dtype]
    sources = []
    for file, rows in manifest.shards:
        array = memory_map(root / file)
        if array.dtype != _stored(dtype) or array.shape != (rows, manifest.dim):
            raise ValueError(
                f"{root / file}: holds {array.dtype} of shape {array.shape}, the manifest says "
                f"{_stored(dtype)} of shape {(rows, manifest.dim)}"
            )
        sources.append(ArrayRows(array.view(dtype), str(root / file)))
    if (total := sum(rows for _, rows in manifest.shards)) != manifest.rows:
        raise ValueError(f"{path}: says {manifest.rows} rows, its shards have {total}")
    ids = None if manifest.ids is None else _read_ids(root / manifest.ids)
    return FeatureTable(sources, ids=ids, name=str(root), manifest=manifest)


def _read_ids(path: pathlib.Path) -> np.ndarray:
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file, though the manifest names it")
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        return id_array(json.loads(f"[{','.join(lines)}]"), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not one JSON string a line ({error})") from None
