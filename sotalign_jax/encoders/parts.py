"""The working directory of an encoding: what is asked, and the parts that are done.

.OUT.encode/
    settings.json           what is encoded, by what, how
    part-00000/             one directory a part, there once it is whole
        features.npy        its rows; absent if there are none
        ids.jsonl           an id a row
        captions.jsonl      a caption a row, of texts
        skipped.jsonl       an object an item that was left out
        part.json           counts
    part-00000.lock         held by the process that has the part in work
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from sotalign_jax.encoders.workers import Prepared
from sotalign_jax.features.store import DTYPES, ShardWriter, cast_rows
from sotalign_jax.files import flush_files, replace_text

__all__ = ["PartWriter", "WorkingDirectory", "read_lines"]

# Settings that were not recorded at first. Of an encoding that was begun without one nobody knows
# what it was, and it goes on.
_LATER = ("encoder.settings.files",)


class WorkingDirectory:
    """Where the parts of one encoding are collected; hidden beside its target.

    Args:
        out: the target.
    """

    def __init__(self, out: Path):
        self.path = out.with_name(f".{out.name}.encode")

    @property
    def exists(self) -> bool:
        return self.path.is_dir()

    def open(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Makes the directory, or checks that what is there is of the same settings.

        Returns:
            The settings as they are recorded there.

        Raises:
            ValueError: it is not; names the settings that differ.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.exists:
            # It appears with its settings in it, so that of two processes one makes it.
            made = self._another_name()
            made.mkdir()
            try:
                replace_text(made / "settings.json", to_json(settings))
                os.rename(made, self.path)
                return settings
            except OSError:
                if not self.exists:
                    raise
            finally:
                shutil.rmtree(made, ignore_errors=True)
        try:
            recorded = read_json(self.path / "settings.json")
        except FileNotFoundError:
            if self.exists:
                raise
            return settings  # another process has just put the store together
        compare_settings(recorded, settings, str(self.path))
        return recorded

    def look_again(self) -> None:
        """Has what other hosts did be seen here: over NFS, a directory is believed to be as it was
        for up to a minute, unless this host itself changes it."""
        with contextlib.suppress(OSError):  # all is done and the directory gone, or it is read-only
            made = self.path / f".look.{uuid.uuid4().hex[:8]}"
            made.mkdir()
            made.rmdir()

    def part(self, number: int) -> Path:
        """The directory of a part."""
        return self.path / f"part-{number:05d}"

    def lock(self, number: int) -> Path:
        """The lock of a part."""
        return self.path / f"part-{number:05d}.lock"

    def done(self, number: int) -> bool:
        """Whether a part is whole."""
        return self.part(number).is_dir()

    def summary(self, number: int) -> dict[str, Any]:
        """What `PartWriter` counted."""
        return read_json(self.part(number) / "part.json")

    def sweep_part(self, number: int) -> None:
        """Deletes what is left of a part that was not finished; for the holder of its lock."""
        for left in self.path.glob(f".{self.part(number).name}.*"):
            shutil.rmtree(left, ignore_errors=True)

    def remove(self) -> None:
        """Deletes the directory, all at once as far as others can see; and what kills left of it.

        Nothing if there is none.
        """
        if self.exists:  # else a disk that is read-only would refuse
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path, self._another_name())
        for gone in self.path.parent.glob(f"{glob.escape(self.path.name)}.{'[0-9a-f]' * 8}"):
            shutil.rmtree(gone, ignore_errors=True)

    def _another_name(self) -> Path:
        return self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex[:8]}")


class PartWriter:
    """Writes one part, under a hidden name until it is whole.

    Args:
        home: the working directory.
        number: of the part.
        name: of the part, for messages and the list of what is left out.
        dtype: of the store.
        text: whether there are captions.
    """

    def __init__(self, home: WorkingDirectory, number: int, name: str, dtype: str, text: bool):
        self._target, self._name, self._dtype = home.part(number), name, DTYPES[dtype]
        home.sweep_part(number)
        self._made = self._target.with_name(f".{self._target.name}.{uuid.uuid4().hex[:8]}")
        self._made.mkdir()
        self._shard: ShardWriter | None = None
        self._dim = 0
        self._rows, self.skipped = 0, 0
        self._files: list[IO[str]] = []
        self._ids = self._open("ids.jsonl")
        self._left_out = self._open("skipped.jsonl")
        self._captions = self._open("captions.jsonl") if text else None

    def _open(self, name: str) -> IO[str]:
        file = open(self._made / name, "w", encoding="utf-8")  # noqa: SIM115
        self._files.append(file)
        return file

    def skip(self, item: Prepared, reason: str) -> None:
        """Notes that an item is left out."""
        self.skipped += 1
        line = {"id": item.id, "part": self._name, "reason": reason}
        self._left_out.write(json.dumps(line) + "\n")

    def write(self, items: Sequence[Prepared], rows: np.ndarray) -> None:
        """Appends rows.

        Args:
            items: that were encoded.
            rows: ``(len(items), dim)``.

        Raises:
            ValueError: a value that is too large for the number format, or not a row for each item.
        """
        rows = np.asarray(rows)
        if rows.ndim != 2 or len(rows) != len(items) or not rows.shape[1]:
            raise ValueError(
                f"encoder: gives an array of shape {rows.shape} for {len(items)} items"
            )
        finite = np.asarray(np.isfinite(rows).all(axis=1))
        kept = [item for item, good in zip(items, finite, strict=True) if good]
        for item, good in zip(items, finite, strict=True):
            if not good:
                self.skip(item, "not finite: the encoder gave NaN or Inf")
        if not kept:
            return
        cast = cast_rows(
            rows[finite],
            self._dtype,
            lambda row: f"encoder: the features of {kept[row].id!r} ({self._name})",
        )
        if self._shard is None:
            self._dim = cast.shape[1]
            self._shard = ShardWriter(self._made / "features.npy", self._dim, self._dtype)
        elif cast.shape[1] != self._dim:
            raise ValueError(f"encoder: gives {cast.shape[1]} columns, and {self._dim} before")
        self._shard.write(cast)
        self._rows += len(kept)
        self._ids.writelines(json.dumps(item.id) + "\n" for item in kept)
        if self._captions is not None:
            self._captions.writelines(json.dumps(item.text) + "\n" for item in kept)

    def finish(self, seconds: float) -> None:
        """Gives the part its name."""
        self._close()
        counts = {"rows": self._rows, "dim": self._dim, "skipped": self.skipped, "seconds": seconds}
        (self._made / "part.json").write_text(to_json(counts), encoding="utf-8")
        flush_files(self._made)
        try:
            os.rename(self._made, self._target)
        except OSError:
            # Over NFS it may have been done by another host, unseen here; it is the same.
            if not self._target.is_dir():
                raise
            shutil.rmtree(self._made, ignore_errors=True)

    def abandon(self) -> None:
        """Deletes what was written."""
        self._close_anyhow()
        shutil.rmtree(self._made, ignore_errors=True)

    def _close(self) -> None:
        for file in self._files:
            file.close()
        if self._shard is not None:
            self._shard.close()
            self._shard = None

    def _close_anyhow(self) -> None:
        closes = [file.close for file in self._files]
        for close in [*closes, self._shard.abandon] if self._shard is not None else closes:
            with contextlib.suppress(OSError):  # as on a disk that is full
                close()


def compare_settings(recorded: Any, now: Mapping[str, Any], where: str) -> None:
    """Raises unless two encodings are the same.

    Raises:
        ValueError: names the settings that differ.
    """
    before, after = _flat(recorded), _flat(json.loads(json.dumps(now)))
    differing = [
        f"{name} is {_shown(before, name)} there and {_shown(after, name)} now"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not (name in _LATER and name not in before)
    ]
    if differing:
        raise ValueError(
            f"out: {where} holds another encoding ({'; '.join(differing[:3])}); give another out, "
            "or remove it"
        )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    found = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{name}.{key}" if name else key)
    return found


def _shown(values: dict[str, Any], name: str) -> str:
    return repr(values[name]) if name in values else "absent"


def to_json(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def read_json(path: Path) -> Any:
    """The value in a JSON file; ValueError that names the file if it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it") from None


def read_lines(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
