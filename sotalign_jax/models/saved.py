"""Aligners on disk, of whatever kind: JSON and safetensors that are replaced in one piece."""

import json
import os
import shutil
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from sotalign_jax.files import flush_files

__all__ = [
    "CONFIG_FILE",
    "TENSORS_FILE",
    "json_metadata",
    "read_document",
    "read_tensors",
    "saved_format",
    "saved_path",
    "write_model",
]

TENSORS_FILE = "aligner.safetensors"
CONFIG_FILE = "aligner.json"


def json_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """A caller's metadata as JSON will give it back; ValueError if JSON cannot hold it."""
    try:
        return json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata: must be a dict that JSON can hold ({error})") from error


def write_model(
    directory: str | os.PathLike,
    document: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    versions: Collection[int],
) -> None:
    """Writes ``aligner.json`` and ``aligner.safetensors``, so that half of them is never seen.

    Both are written beside the target and then moved there in one piece. A model that stood there
    steps aside for that moment, where `saved_path` finds it should the process die just then.

    Args:
        directory: where to; parents are made. It may exist if it is empty, or holds a model of the
            same format and nothing else.
        document: what the JSON file says; its ``format`` tells one kind of model from another.
        tensors: by flat names.
        versions: the versions of the format that may be replaced.

    Raises:
        ValueError: the directory holds something else; it is left as it is.
        OSError: the files cannot be written; what stood there can still be loaded.
    """
    target = Path(directory).resolve()
    _check_replaceable(target, document["format"], versions)
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    previous = _previous(target)
    partial.mkdir()
    try:
        safetensors.numpy.save_file(dict(tensors), partial / TENSORS_FILE)
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")
        flush_files(partial)
        if target.exists():
            shutil.rmtree(previous, ignore_errors=True)
            os.rename(target, previous)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)


def saved_path(directory: str | os.PathLike) -> Path:
    """Where the model of a directory is: there, or aside if a process died while replacing it."""
    path = Path(directory).resolve()
    return _previous(path) if not path.exists() and _previous(path).exists() else path


def saved_format(directory: str | os.PathLike) -> str | None:
    """The format that the model of a directory says it has; None where it does not say so."""
    try:
        document = json.loads((saved_path(directory) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # reading it will tell
    return document.get("format") if isinstance(document, dict) else None


def read_document(path: Path, form: str, versions: Collection[int]) -> dict[str, Any]:
    """The JSON of a saved model, of a known format and version.

    Args:
        path: the model's directory, from `saved_path`.
        form: the format it must have.
        versions: the versions of it that can be read.

    Returns:
        The document.

    Raises:
        ValueError: the directory holds no model, or one of another format or version.
    """
    file = path / CONFIG_FILE
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"directory: {path} holds no aligner ({CONFIG_FILE} not found)") from error
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(document, dict) or document.get("format") != form:
        raise ValueError(f"{file}: not an aligner; its format must be {form!r}")
    if document.get("version") not in versions:
        raise ValueError(
            f"{file}: format version {document.get('version')!r}; this package reads "
            f"{' and '.join(map(str, versions))} (the file was written by sotalign_jax "
            f"{document.get('sotalign_jax', 'unknown')})"
        )
    return document


def read_tensors(file: Path, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """The tensors of a saved model: float32, those that are expected and no others.

    Args:
        file: the safetensors file.
        shapes: the shape of each tensor.

    Returns:
        The tensors by name.

    Raises:
        ValueError: tensors that are damaged, missing, unknown, or of the wrong shape or dtype.
    """
    try:
        tensors = safetensors.numpy.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    for problem, names in (
        ("missing", shapes.keys() - tensors.keys()),
        ("not part of this aligner", tensors.keys() - shapes.keys()),
    ):
        if names:
            raise ValueError(f"{file}: tensors {problem}: {', '.join(sorted(names))}")
    for name, tensor in tensors.items():
        if tensor.shape != tuple(shapes[name]) or tensor.dtype != np.float32:
            raise ValueError(
                f"{file}: {name} is {tensor.dtype} {tensor.shape}; "
                f"expected float32 {tuple(shapes[name])}"
            )
    return tensors


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _check_replaceable(target: Path, form: str, versions: Collection[int]) -> None:
    """Refuses to replace what is not ours."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"directory: {target} is a file; give a directory")
    names = {entry.name for entry in target.iterdir()}
    others = sorted(names - {TENSORS_FILE, CONFIG_FILE})
    if others:
        raise ValueError(
            f"directory: {target} holds other files ({', '.join(others[:3])}); give a new directory"
        )
    if names:
        read_document(target, form, versions)
