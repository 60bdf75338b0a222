"""Sources of images and texts: folders, tables, archives and data sets of other libraries."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from sotalign_jax.encoders.sources import arrow, webdataset
from sotalign_jax.encoders.sources.base import MODALITIES, Columns, Record, Source
from sotalign_jax.encoders.sources.folder import FolderSource
from sotalign_jax.encoders.sources.rows import ROWS_PER_PART
from sotalign_jax.encoders.sources.text_files import TextFileSource
from sotalign_jax.encoders.sources.tfds import TfdsSource
from sotalign_jax.features.store import MissingFileError

__all__ = ["KINDS", "Columns", "Record", "Source", "kind_of", "open_source"]

KINDS = (
    *("folder", "csv", "tsv", "jsonl", "lines", "parquet"),
    *("webdataset", "tfds", "saved"),
)
_USUAL = Columns()
_TEXT_FILES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "lines",
}


def open_source(
    path: str | os.PathLike,
    modality: str,
    *,
    kind: str | None = None,
    columns: Columns = _USUAL,
    split: str | None = None,
    rows_per_shard: int = ROWS_PER_PART,
    quoted: bool = True,
) -> Source:
    """Opens images or texts; see `docs/encode.md` for what each kind is.

    Args:
        path: a file, a directory, a pattern of archives or Parquet files, or ``tfds:NAME``.
        modality: ``"image"`` or ``"text"``.
        kind: one of `KINDS`; by default found from the path and what is there.
        columns: what columns, fields or members are called.
        split: of data sets that have several.
        rows_per_shard: rows of a part, for all kinds but archives, of which each is a part.

        quoted: of CSV and TSV: whether a double quote at the start of a field begins one that may
            hold separators and line breaks; else it is a character like others.

    Returns:
        The source.

    Raises:
        MissingFileError: nothing is there.
        ValueError: an unknown or unfitting kind, no items, or a column is missing.
        ImportError: a library that this kind needs is not installed.
    """
    path = os.fspath(path)
    path = path.rstrip("/") or path  # with and without, it is the same source
    if modality not in MODALITIES:
        raise ValueError(f"modality must be 'image' or 'text', got {modality!r}")
    if kind is None:
        kind = kind_of(path, modality)
    elif kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if split is not None and kind not in ("parquet", "saved", "tfds"):
        raise ValueError(f"split: {path} is of kind {kind}, which has none")
    if kind == "tfds":
        return TfdsSource(path, modality, split, columns, rows_per_shard)
    there = Path(path)
    if kind == "webdataset":
        return webdataset.WebDatasetSource(path, modality, _archives(there), columns)
    if kind == "parquet":
        files, folder = _parquet(there, split)
        return arrow.ParquetSource(path, modality, files, folder, columns, rows_per_shard)
    if not there.exists():
        raise MissingFileError(f"{path}: no such file or directory")
    if there.is_dir() != (kind in ("folder", "saved")):
        what, right = ("directory", "file") if there.is_dir() else ("file", "directory")
        raise ValueError(f"{path}: is a {what}, {kind} is a {right}")
    if kind == "folder":
        return FolderSource(path, modality, columns, rows_per_shard)
    if kind == "saved":
        folder = arrow.saved_split(there, split)
        return arrow.SavedDatasetSource(path, modality, folder, columns, rows_per_shard)
    return TextFileSource(path, kind, modality, columns, rows_per_shard, quoted)


def kind_of(path: str, modality: str) -> str:
    """The kind of source that a path is, by its name or by what the directory holds.

    Raises:
        MissingFileError: nothing is there.
        ValueError: it does not tell.
    """
    if path.startswith("tfds:"):
        return "tfds"
    there = Path(path)
    name = there.name.lower()
    if there.is_dir():
        return _kind_of_directory(there, modality)
    if name.endswith(webdataset.SUFFIXES):
        return "webdataset"
    if name.endswith(".parquet"):
        return "parquet"
    if there.exists():
        if there.suffix.lower() in _TEXT_FILES:
            return _TEXT_FILES[there.suffix.lower()]
        known = ", ".join([*_TEXT_FILES, ".parquet", *webdataset.SUFFIXES])
        raise ValueError(
            f"{path}: unknown suffix {there.suffix!r}; known are {known}, and directories; say "
            f"what it is by --kind={'|'.join(KINDS)}"
        )
    raise MissingFileError(f"{path}: no such file or directory")


def _kind_of_directory(there: Path, modality: str) -> str:
    if (there / "state.json").is_file() or (there / "dataset_dict.json").is_file():
        return "saved"
    if (there / "features.json").is_file():
        return "tfds"
    if any(file.name.lower().endswith(webdataset.SUFFIXES) for file in there.iterdir()):
        return "webdataset"
    if any(there.rglob("*.parquet")):
        return "parquet"
    if modality == "image":
        return "folder"
    raise ValueError(
        f"{there}: holds no archives, Parquet files or data set to take texts from; give a "
        "table or a text file itself"
    )


def _archives(there: Path) -> list[Path]:
    if there.is_dir():
        suffixes = webdataset.SUFFIXES
        return sorted(file for file in there.iterdir() if file.name.lower().endswith(suffixes))
    return _files(str(there))


def _parquet(there: Path, split: str | None) -> tuple[list[Path], Path]:
    """The files, and what paths in them are relative to."""
    if there.is_dir():
        files = arrow.parquet_files(there, split)
        return files, files[0].parent
    if split is not None:
        raise ValueError(f"split: {there} is one split; give the directory to choose from")
    files = _files(str(there))
    return files, files[0].parent


def _files(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern) and "{" not in pattern and not Path(pattern).exists():
        raise MissingFileError(f"{pattern}: no such file")
    return [Path(pattern)] if Path(pattern).is_file() else webdataset.matching(pattern)
