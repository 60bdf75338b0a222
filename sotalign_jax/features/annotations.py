"""What a person can see of a row: its caption and a picture of it, kept beside the features.

Beside the features at ``data/coco`` (a store or another directory) or ``data/coco.npz`` may stand::

    data/coco.captions.jsonl    one JSON string a line, a line a row
    data/coco.thumbnails/       PNG, JPEG or WebP, one an image, named after its id
    data/coco.thumbnails.zip    or the same in an archive

Rows without ids have the number of the row for a name. An id may be a path, as ``animals/bear``,
and may have the suffix already, as ``000042.jpg``; the directory may be a link to the images.
Nothing here is needed to train.
"""

from __future__ import annotations

import json
import os
import pathlib
import zipfile
from collections.abc import Sequence

from sotalign_jax.features.formats import split_key
from sotalign_jax.features.store import FeatureTable

__all__ = ["read_captions", "read_thumbnails"]

SUFFIXES = ("", ".png", ".jpg", ".jpeg", ".webp")


def read_captions(
    path: str | os.PathLike, table: FeatureTable, rows: Sequence[int]
) -> dict[int, str]:
    """The captions of some rows.

    Args:
        path: of the features, as `open_features` takes it.
        table: rows of these features, selected in any way.
        rows: of ``table``.

    Returns:
        A caption for each of the rows; nothing where no captions are kept.

    Raises:
        ValueError: the file has not a line for each row of the features, or a line is no string.
    """
    file = _beside(path, ".captions.jsonl")
    if not file.is_file():
        return {}
    stored = table.stored_rows
    wanted = {int(stored[row]): row for row in rows}
    found, count = {}, 0
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            count += 1
            if number in wanted:
                found[number] = _caption(line, f"{file}:{number + 1}")
    if count != table.manifest.rows:
        raise ValueError(f"{file}: {count} captions for {table.manifest.rows} rows of features")
    return {row: found[int(stored[row])] for row in rows}


def _caption(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not a JSON string ({error})") from None
    if not isinstance(value, str):
        raise ValueError(f"{where}: must be a JSON string, got {type(value).__name__}")
    return value


def read_thumbnails(
    path: str | os.PathLike, table: FeatureTable, rows: Sequence[int]
) -> dict[int, bytes]:
    """The pictures of some rows.

    Args:
        path: of the features, as `open_features` takes it.
        table: rows of these features, selected in any way.
        rows: of ``table``.

    Returns:
        The files of those rows that have one.

    Raises:
        ValueError: an archive that cannot be read.
        OSError: a file that cannot be read.
    """
    of_row = table.stored_rows if table.ids is None else table.ids
    names = {row: str(of_row[row]) for row in rows}
    folder = _beside(path, ".thumbnails")
    if folder.is_dir():
        files = {row: _file(folder, name) for row, name in names.items()}
        return {row: file.read_bytes() for row, file in files.items() if file is not None}
    archive = _beside(path, ".thumbnails.zip")
    if not archive.is_file():
        return {}
    try:
        with zipfile.ZipFile(archive) as members:
            held = set(members.namelist())
            files = {
                row: next((name + s for s in SUFFIXES if name + s in held), None)
                for row, name in names.items()
            }
            return {row: members.read(file) for row, file in files.items() if file is not None}
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{archive}: not a readable zip archive ({error})") from None


def _beside(path: str | os.PathLike, suffix: str) -> pathlib.Path:
    """The file of that suffix that belongs to features."""
    features = pathlib.Path(split_key(os.fspath(path))[0])
    stem = features.name if features.is_dir() else features.stem
    return features.parent / f"{stem}{suffix}"


def _file(folder: pathlib.Path, name: str) -> pathlib.Path | None:
    """The picture of that name; none outside the folder, since ids are anybody's."""
    parts = pathlib.PurePath(name).parts
    if ".." in parts or pathlib.PurePath(name).is_absolute():
        return None
    files = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    return next((file for file in files if os.path.isfile(file)), None)
