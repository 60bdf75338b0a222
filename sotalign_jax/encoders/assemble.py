"""The parts of an encoding to one feature store, and what belongs beside it."""

from __future__ import annotations

import collections
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

import sotalign_jax
from sotalign_jax.encoders.base import Description
from sotalign_jax.encoders.parts import WorkingDirectory, read_lines, to_json
from sotalign_jax.features.store import (
    IDS,
    MANIFEST,
    Manifest,
    move_into_place,
    shard_name,
)
from sotalign_jax.files import flush_files

__all__ = ["assemble", "beside"]

# Of what makes rows what they are, as far as it is in use.
_PACKAGES = ("jax", "numpy", "pillow", "timm", "tokenizers", "torch", "torchax", "transformers")
_MODULES = {"pillow": "PIL"}


def beside(out: Path, what: str) -> Path:
    """A file that belongs to a store: ``OUT.captions.jsonl`` and the like."""
    return out.with_name(f"{out.name}.{what}")


def assemble(
    home: WorkingDirectory,
    out: Path,
    names: Sequence[str],
    settings: dict[str, Any],
    description: Description,
    *,
    licence: str = "",
) -> dict[str, Any]:
    """Makes the store of parts that are all done, and removes the working directory.

    Rows are not copied where the disk can give a file two names. Of images that share an id the
    first stays.

    Args:
        home: holds all parts.
        out: the store, which must not exist.
        names: of the parts.
        settings: for ``OUT.encode.json``.
        description: of the encoder.
        licence: for the manifest.

    Returns:
        What ``OUT.encode.json`` says.

    Raises:
        ValueError: not a row in all parts, or parts of different dim.
    """
    text = description.modality == "text"
    store = home.path / "store"
    shutil.rmtree(store, ignore_errors=True)  # of a process that was killed
    store.mkdir()
    shards: list[tuple[str, int]] = []
    reasons: collections.Counter[str] = collections.Counter()
    seen: set[str] = set()
    seconds, dims = 0.0, set()
    with (
        _replacing(store / IDS, home) as ids,
        _replacing(beside(out, "skipped.jsonl"), home) as skipped,
        _replacing(beside(out, "captions.jsonl"), home)
        if text
        else contextlib.nullcontext() as captions,
    ):
        for number, name in enumerate(names):
            part, counts = home.part(number), home.summary(number)
            seconds += counts["seconds"]
            for line in read_lines(part / "skipped.jsonl"):
                reasons[kind_of_reason(line["reason"])] += 1
                skipped.write(json.dumps(line) + "\n")
            if not counts["rows"]:
                continue
            dims.add(counts["dim"])
            kept = np.ones(counts["rows"], bool)
            for row, name_of_row in enumerate(read_lines(part / "ids.jsonl")):
                if not text and name_of_row in seen:
                    kept[row] = False
                    line = {"id": name_of_row, "part": name, "reason": "duplicate id"}
                    reasons["duplicate id"] += 1
                    skipped.write(json.dumps(line) + "\n")
                    continue
                if not text:
                    seen.add(name_of_row)
                ids.write(json.dumps(name_of_row) + "\n")
            if captions is not None:
                with open(part / "captions.jsonl", encoding="utf-8") as lines:
                    shutil.copyfileobj(lines, captions)
            if kept.any():
                shards.append((shard_name(number), int(kept.sum())))
                _place(part / "features.npy", store / shard_name(number), kept)
    if not shards:
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
        raise ValueError(
            f"out: none of {sum(reasons.values())} items could be encoded "
            f"({listed or 'no items'}), see {beside(out, 'skipped.jsonl')}; remove {home.path} to "
            "begin again"
        )
    if len(dims) > 1:
        raise ValueError(f"encoder: gave parts of different dim, {sorted(dims)}")
    manifest = Manifest(
        encoder=description.name,
        pooling=description.pooling,
        dim=dims.pop(),
        dtype=settings["dtype"],
        rows=sum(rows for _, rows in shards),
        normalized=description.normalized,
        source=settings["source"]["path"],
        licence=licence,
        shards=tuple(shards),
        ids=IDS,
    )
    (store / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    report = {
        "settings": settings,
        "versions": _versions(),
        "rows": manifest.rows,
        "dim": manifest.dim,
        "skipped": dict(sorted(reasons.items())),
        "seconds": round(seconds, 3),
    }
    with _replacing(beside(out, "encode.json"), home) as file:
        file.write(to_json(report))
    flush_files(store)
    move_into_place(store, out, False)
    home.remove()
    return report


def kind_of_reason(reason: str) -> str:
    """What comes before the details."""
    return reason.partition(":")[0]


@contextlib.contextmanager
def _replacing(path: Path, home: WorkingDirectory) -> Iterator[IO[str]]:
    """A text file that takes its name once it is whole; until then it has another one."""
    partial = home.path / f"{path.name}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _place(source: Path, target: Path, kept: np.ndarray) -> None:
    """The rows of a part that are kept, as a shard."""
    if not kept.all():
        np.save(target, np.load(source, mmap_mode="r")[kept])
        return
    try:
        os.link(source, target)
    except OSError:  # a disk without links
        shutil.copyfile(source, target)


def _versions() -> dict[str, str]:
    found = {"sotalign_jax": sotalign_jax.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        if _MODULES.get(name, name) in sys.modules:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    return found
