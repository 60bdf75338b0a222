"""Items to features on disk, part by part; what was killed goes on where it stopped."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import functools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from sotalign_jax.encoders.assemble import assemble, beside
from sotalign_jax.encoders.base import AsyncEncoder, Encoder
from sotalign_jax.encoders.images import Colour
from sotalign_jax.encoders.parts import PartWriter, WorkingDirectory, compare_settings, read_json
from sotalign_jax.encoders.sources import Source
from sotalign_jax.encoders.workers import Prepared, Workers, default_workers, read_ahead
from sotalign_jax.features.store import DTYPES, MANIFEST
from sotalign_jax.files import lock

__all__ = ["Interrupted", "Progress", "Summary", "check_request", "extract"]

# Batches that are held ready for the encoder, beside those that the workers have in hand.
_AHEAD = 2


class Interrupted(Exception):
    """An encoding stopped because of SIGTERM; started again it goes on."""


class Progress(NamedTuple):
    """How far this process is.

    Attributes:
        parts: of its range that are done, by this process or before it.
        records: of these parts and of the one in work, those that were left out among them.
    """

    parts: int
    records: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What came of a call.

    Attributes:
        out: the feature store.
        complete: whether it is there; else some parts are not done.
        parts_left: parts that are not done, of all.
        rows: of the store; until it is there, of the parts that are done.
        dim: columns; 0 until there is a row.
        skipped: how many items were left out, by the kind of problem; empty until it is there.
        seconds: that this call took.
    """

    out: Path
    complete: bool
    parts_left: int
    rows: int
    dim: int
    skipped: dict[str, int]
    seconds: float


def extract(
    source: Source,
    encoder: Encoder,
    out: str | os.PathLike,
    *,
    dtype: str = "float16",
    batch_size: int = 64,
    workers: int | None = None,
    shards: tuple[int, int] | None = None,
    licence: str = "",
    background: Colour | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Encodes all items of a source into a feature store.

    The parts of the source are encoded one by one into a hidden directory beside ``out``, and the
    store is put together once all are there. The same call goes on after a kill; the files come out
    the same, byte for byte, on the same machine. Several processes may call it at once: each part
    is done by one of them, and the last to finish puts the store together.

    Items that cannot be read or encoded, rows that are not finite, and images whose id was there
    before are left out and listed in ``OUT.skipped.jsonl``. Captions go to ``OUT.captions.jsonl``,
    and how it was done to ``OUT.encode.json``.

    Args:
        source: of the encoder's modality.
        encoder: what makes rows.
        out: the feature store; it must not exist, unless it is what this call would make.
        dtype: ``"float16"`` (default), ``"bfloat16"`` or ``"float32"``.
        batch_size: items that are encoded at once. No batch reaches over the end of a part.
        workers: processes that read, decode and preprocess; 0 for none; by default one for each
            processor but one, up to 16 for images and 2 for texts. They import the script that is
            run, which must be guarded by ``if __name__ == "__main__":``.
        shards: the first part of this process, and one past its last; by default all.
        licence: of the items, for the manifest.
        background: colour, 0 to 255 each, that transparent images are laid over; None drops their
            alpha channel.
        progress: called with a `Progress` at the start and after every batch.

    Returns:
        A `Summary`.

    Raises:
        ValueError: an argument out of range, ``out`` exists, what was begun there has other
            settings, no item could be encoded, or a value too large for ``dtype``.
        OSError: a file that cannot be read or written, or a worker that died.
        Interrupted: the process got SIGTERM (in its main thread).
    """
    started = time.monotonic()
    target = Path(out)
    first, last = check_request(
        source,
        out,
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        shards=shards,
        background=background,
    )
    if (modality := encoder.description.modality) != source.modality:
        raise ValueError(
            f"encoder: is for {modality}s, {source.path} is read as {source.modality}s"
        )
    settings = _settings(source, encoder, dtype, batch_size)
    if source.modality == "image":
        settings["background"] = None if background is None else list(background)
    home = WorkingDirectory(target)
    if not _is_done(home, target, settings):
        count = default_workers(source.modality) if workers is None else workers
        run = _Run(home, source, encoder, dtype, batch_size, progress)
        workers_of = functools.partial(Workers, encoder.preprocess, source.modality)
        pools = workers_of(count, background=background)
        with _sigterm_raises(), _full_disk_said(target), pools as pool:
            if not home.exists and not _is_done(home, target, settings):
                _check_names_are_free(target, source.modality)
            settings = home.open(settings)
            # Another process may have put the store together since this one looked for it.
            if not _is_done(home, target, settings):
                run.encode(pool, first, last)
                home.look_again()
        parts = range(len(source.parts))
        left = [n for n in parts if not home.done(n)]
        counts = _counts(home, parts)
        if left and home.exists:
            rows, dim = sum(c["rows"] for c in counts), max((c["dim"] for c in counts), default=0)
            seconds = time.monotonic() - started
            return Summary(target, False, len(left), rows, dim, {}, seconds)
        with _sigterm_raises(), _full_disk_said(target), _assembling(home) as mine:
            if mine:
                assemble(home, target, source.parts, settings, encoder.description, licence=licence)
    if not (target / MANIFEST).is_file():  # another process is at it
        return Summary(target, False, 0, 0, 0, {}, time.monotonic() - started)
    report = read_json(beside(target, "encode.json"))
    seconds = time.monotonic() - started
    return Summary(target, True, 0, report["rows"], report["dim"], report["skipped"], seconds)


def check_request(
    source: Source,
    out: str | os.PathLike,
    *,
    dtype: str = "float16",
    batch_size: int = 64,
    workers: int | None = None,
    shards: tuple[int, int] | None = None,
    background: Colour | None = None,
) -> tuple[int, int]:
    """What of a call of `extract` can be checked before there is an encoder.

    Args:
        source: as for `extract`.
        out: likewise.
        dtype: likewise.
        batch_size: likewise.
        workers: likewise.
        shards: likewise.
        background: likewise.

    Returns:
        The range of parts.

    Raises:
        ValueError: an argument out of range, or ``out`` cannot become the store.
    """
    target = Path(out)
    if "://" in os.fspath(out) or target.name in ("", ".."):
        raise ValueError(f"out: {out} is not a name for a new directory on a mounted disk")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must not be negative, got {workers}")
    if background is not None and not all(0 <= value <= 255 for value in background):
        raise ValueError(f"background must be three numbers of 0 to 255, got {background}")
    first, last = shards or (0, len(source.parts))
    if not 0 <= first < last <= len(source.parts):
        raise ValueError(
            f"shards: {first}:{last} is no range of the {len(source.parts)} parts of {source.path} "
            "(numbered from 0)"
        )
    # In this order: the store of another process is there before its working directory is gone.
    if not WorkingDirectory(target).exists and not target.exists():
        _check_names_are_free(target, source.modality)
    if target.exists():
        _check_is_store(target)
    else:
        there = next(folder for folder in target.absolute().parents if folder.exists())
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"out: {out} cannot be made, nothing can be written in {there}")
    return first, last


def _settings(source: Source, encoder: Encoder, dtype: str, batch_size: int) -> dict[str, Any]:
    settings = {
        "source": source.settings(),
        "encoder": dataclasses.asdict(encoder.description),
        "dtype": dtype,
        "batch_size": batch_size,
    }
    try:
        return json.loads(json.dumps(settings))
    except TypeError as error:
        raise ValueError(f"encoder: its description is not JSON ({error})") from None


def _is_done(home: WorkingDirectory, target: Path, settings: dict[str, Any]) -> bool:
    """Whether the store of these settings is there; what is left of its making is removed.

    Raises:
        ValueError: something else is there.
    """
    if not target.exists():
        return False
    report = _check_is_store(target)
    compare_settings(read_json(report).get("settings"), settings, str(target))
    home.remove()
    return True


def _check_is_store(target: Path) -> Path:
    """The report of what stands there; ValueError where it is no store that was encoded."""
    report = beside(target, "encode.json")
    if not (target / MANIFEST).is_file() or not report.is_file():
        raise ValueError(f"out: {target} exists; give another out, or remove it")
    return report


def _counts(home: WorkingDirectory, parts: Iterable[int]) -> list[dict[str, Any]]:
    """Of the parts that are done; fewer if another process has just put the store together."""
    found = []
    for part in parts:
        if home.done(part):
            with contextlib.suppress(FileNotFoundError):
                found.append(home.summary(part))
    return found


def _check_names_are_free(target: Path, modality: str) -> None:
    names = ["skipped.jsonl", "encode.json", *(["captions.jsonl"] if modality == "text" else [])]
    for path in (beside(target, name) for name in names):
        if path.exists():
            raise ValueError(f"out: {path} exists and would be replaced; give another out")


@contextlib.contextmanager
def _assembling(home: WorkingDirectory) -> Iterator[bool]:
    """Whether this process is to put the store together; where others have, there is no more to."""
    with ExitStack() as stack:
        try:
            mine = stack.enter_context(lock(home.path / "assemble.lock"))
        except FileNotFoundError:
            mine = False
        yield mine and home.exists


@contextlib.contextmanager
def _full_disk_said(target: Path) -> Iterator[None]:
    """Inside, a full disk says whose it is, and that nothing is lost; Linux names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        why = f"{error.strerror}; once there is room for it, the same command goes on"
        raise OSError(error.errno, why, str(error.filename or target)) from error


class _Begun(NamedTuple):
    part: int


class _Ended(NamedTuple):
    part: int


_Step = _Begun | list[Prepared] | _Ended


class _Run:
    """One process at work on a range of parts."""

    def __init__(
        self,
        home: WorkingDirectory,
        source: Source,
        encoder: Encoder,
        dtype: str,
        batch_size: int,
        progress: Callable[[Progress], None] | None,
    ):
        self._home, self._source, self._encoder = home, source, encoder
        self._dtype, self._batch_size, self._progress = dtype, batch_size, progress
        self._locks: dict[int, ExitStack] = {}
        self._mine: set[int] = set()

    def encode(self, pool: Workers, first: int, last: int) -> None:
        """Encodes the parts of the range that are neither done nor in another process's hands."""
        writer: PartWriter | None = None
        began = 0.0
        before = _counts(self._home, range(first, last))
        parts, records = len(before), sum(part["rows"] + part["skipped"] for part in before)
        if self._progress is not None:
            self._progress(Progress(parts, records))
        try:
            with read_ahead(self._steps(pool, first, last), _AHEAD) as steps:
                for step, rows in self._begun(steps):
                    if isinstance(step, _Begun):
                        name = self._source.parts[step.part]
                        text = self._source.modality == "text"
                        writer = PartWriter(self._home, step.part, name, self._dtype, text)
                        began = time.monotonic()
                    elif isinstance(step, _Ended):
                        assert writer is not None
                        writer.finish(time.monotonic() - began)
                        writer = None
                        self._locks.pop(step.part).close()
                        parts += 1
                    else:
                        assert writer is not None
                        for item in step:
                            if item.inputs is None:
                                writer.skip(item, item.reason)
                        if rows is not None:
                            writer.write([one for one in step if one.inputs is not None], rows())
                        records += len(step)
                    if self._progress is not None:
                        self._progress(Progress(parts, records))
        finally:
            if writer is not None:
                writer.abandon()
            for part, held in self._locks.items():
                self._home.sweep_part(part)  # a signal may have come before there was a writer
                held.close()

    def _begun(self, steps: Iterator[_Step]) -> Iterator[tuple[_Step, Callable[[], Any] | None]]:
        """Steps, and of items what gives their rows, once the next ones are begun with.

        So a device has work while the rows of one batch are fetched and written, and while the next
        is put together. Where an encoder must be waited for, nothing is held back.
        """
        encoder = self._encoder
        ahead = 1 if isinstance(encoder, AsyncEncoder) else 0
        waiting: collections.deque[tuple[_Step, Callable[[], Any] | None]] = collections.deque()
        begun = 0
        try:
            for step in steps:
                batch = step if isinstance(step, list) else []
                inputs = [item.inputs for item in batch if item.inputs is not None]
                rows = None
                if inputs and isinstance(encoder, AsyncEncoder):
                    rows = encoder.submit(inputs)
                elif inputs:
                    rows = functools.partial(encoder.encode, inputs)
                waiting.append((step, rows))
                begun += rows is not None
                while waiting and (begun > ahead or waiting[0][1] is None):
                    begun -= waiting[0][1] is not None
                    yield waiting.popleft()
        except (ValueError, OSError):
            yield from waiting  # of the steps: what came before the one that fails is done
            raise
        yield from waiting

    def _steps(self, pool: Workers, first: int, last: int) -> Iterator[_Step]:
        """What there is to do, drawn in a thread that is ahead of the encoder."""
        found = True
        while found:  # once more, for parts whose process has died since
            found = False
            for part in range(first, last):
                if not self._take(part):
                    continue
                found = True
                yield _Begun(part)
                yield from self._batches(pool, part)
                yield _Ended(part)

    def _take(self, part: int) -> bool:
        """Whether this process has the part from now on."""
        if part in self._mine or self._home.done(part):
            return False
        with ExitStack() as stack:
            try:
                free = stack.enter_context(lock(self._home.lock(part)))
            except FileNotFoundError:  # all is done, and the directory gone
                return False
            if free:
                self._home.look_again()
            if not free or self._home.done(part) or not self._home.exists:
                return False
            self._locks[part] = stack.pop_all()
        self._mine.add(part)
        return True

    def _batches(self, pool: Workers, part: int) -> Iterator[list[Prepared]]:
        """Items of a part, as many as hold a full batch that can be encoded."""
        items: list[Prepared] = []
        good = 0
        for item in pool.prepare(self._source.read(part), _AHEAD * self._batch_size):
            items.append(item)
            good += item.inputs is not None
            if good == self._batch_size or len(items) >= 8 * self._batch_size:
                yield items
                items, good = [], 0
        if items:
            yield items


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM ends what the main thread is doing, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while it is cleaned up
        raise Interrupted("stopped by SIGTERM; the same command goes on")

    earlier = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        # None: the handler was not one of Python's, which could put it back.
        signal.signal(signal.SIGTERM, earlier or signal.SIG_DFL)
