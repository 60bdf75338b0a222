"""Items to arrays, in worker processes: reading, decoding and preprocessing, in order."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sotalign_jax.encoders.base import Inputs, Preprocessor
from sotalign_jax.encoders.images import Colour, decode
from sotalign_jax.encoders.sources import Record

__all__ = ["Prepared", "Workers", "default_workers", "read_ahead"]

T = TypeVar("T")


class Prepared(NamedTuple):
    """An item on its way.

    Attributes:
        id: of the item.
        text: of a text, else None.
        inputs: for the encoder; None of an item that is left out.
        reason: why it is left out.
    """

    id: str
    text: str | None
    inputs: Inputs | None
    reason: str = ""


class _Failed(NamedTuple):
    """A preprocessor that fails in another way than it may."""

    message: str


def default_workers(modality: str) -> int:
    """Worker processes, if nobody says: one for each of the other processors, up to 16 or 2."""
    try:
        processors = len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        processors = os.cpu_count() or 1
    return max(1, min(processors - 1, 16 if modality == "image" else 2))


class Workers:
    """Processes that prepare items; a context manager.

    Args:
        preprocess: of the encoder; it must pickle.
        modality: ``"image"`` or ``"text"``.
        count: of processes; 0 prepares items in this one.
        background: of images, see `decode`.

    Raises:
        ValueError: a negative number, or a preprocessor that does not pickle.
    """

    def __init__(
        self,
        preprocess: Preprocessor,
        modality: str,
        count: int,
        *,
        background: Colour | None = None,
    ):
        if count < 0:
            raise ValueError(f"workers must not be negative, got {count}")
        self._preprocess, self._modality, self._count = preprocess, modality, count
        self._background = background
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        if not count:
            return
        try:
            pickled = pickle.dumps(preprocess)
        except Exception as error:  # whatever its parts raise
            raise ValueError(
                f"workers: the encoder's preprocessor cannot be sent to other processes ({error}); "
                "workers=0 does without them"
            ) from None
        self._pool = concurrent.futures.ProcessPoolExecutor(
            count,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(pickled, modality, background),
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def prepare(self, records: Iterator[Record], ahead: int) -> Iterator[Prepared]:
        """Prepares items, in their order.

        Args:
            records: of a source.
            ahead: how many to have in work before the first is asked for.

        Yields:
            An item a record.

        Raises:
            ValueError: the preprocessor failed on an item.
            ChildProcessError: a worker died.
        """
        size = max(1, min(64, ahead // (2 * max(1, self._count))))
        chunks = iter(lambda: list(itertools.islice(records, size)), [])
        for chunk, results in self._in_order(chunks, max(2, ahead // size)):
            for record, result in zip(chunk, results, strict=True):
                if isinstance(result, _Failed):
                    raise ValueError(f"{record.id!r}: the preprocessor fails ({result.message})")
                text = record.item if isinstance(record.item, str) else None
                if isinstance(result, str):
                    yield Prepared(record.id, text, None, result)
                else:
                    yield Prepared(record.id, text, result)

    def _in_order(
        self, chunks: Iterator[list[Record]], window: int
    ) -> Iterator[tuple[list[Record], Sequence[Any]]]:
        if self._pool is None:
            for chunk in chunks:
                how = (self._preprocess, self._modality, self._background)
                yield chunk, [_prepare(*how, one) for one in chunk]
            return
        running: collections.deque = collections.deque()
        try:
            for chunk in chunks:
                running.append((_light(chunk), self._pool.submit(_work, chunk)))
                if len(running) >= window:
                    done, future = running.popleft()
                    yield done, future.result()
            while running:
                done, future = running.popleft()
                yield done, future.result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "workers: one died, as of a lack of memory, or in a script that lacks "
                "`if __name__ == '__main__':`; the same command goes on; fewer workers need less"
            ) from None


def _light(chunk: list[Record]) -> list[Record]:
    """Records without the bytes of images."""
    return [one if isinstance(one.item, str) else one._replace(item=None) for one in chunk]


def _prepare(
    preprocess: Preprocessor, modality: str, background: Colour | None, record: Record
) -> Inputs | str | _Failed:
    """The arrays of an item, or why it is left out."""
    if record.reason:
        return record.reason
    try:
        item = _image(record.item, background) if modality == "image" else _text(record.item)
    except ValueError as error:
        return str(error)
    try:
        return preprocess(item)
    except ValueError as error:
        return f"cannot be encoded: {error}"
    except Exception as error:
        return _Failed(f"{type(error).__name__}: {error}")


def _image(item: Any, background: Colour | None) -> Any:
    if isinstance(item, Path):
        try:
            item = item.read_bytes()
        except OSError as error:
            raise ValueError(f"not readable: {error.strerror or error}") from None
        except ValueError as error:  # a path with a zero in it
            raise ValueError(f"not readable: {error}") from None
    return decode(item, background)


def _text(item: Any) -> str:
    if not item.strip():
        raise ValueError("empty caption")
    try:
        item.encode()
    except UnicodeEncodeError:
        raise ValueError("not Unicode: half of a surrogate pair") from None
    return item


# In a worker: what `_start` was given.
_given: tuple[Preprocessor, str, Colour | None] | None = None
_not_given = ""


def _start(pickled: bytes, modality: str, background: Colour | None) -> None:
    global _given, _not_given
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    signal.signal(signal.SIGTERM, _end_soon)
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module="PIL")  # of files that are odd, but can be read
    try:
        _given = pickle.loads(pickled), modality, background
    except Exception as error:  # said of the first item: here nobody would hear it
        _not_given = f"cannot be loaded in a worker, {type(error).__name__}: {error}"


def _end_soon(*_) -> None:
    # Schedulers send it to all processes at once. A worker that went first would look to its parent
    # as if it had died.
    time.sleep(1)
    os._exit(1)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: list[Record]) -> list[Inputs | str | _Failed]:
    if _given is None:
        return [_Failed(_not_given)] * len(chunk)
    return [_prepare(*_given, record) for record in chunk]


@contextlib.contextmanager
def read_ahead(values: Iterable[T], depth: int) -> Iterator[Iterator[T]]:
    """Draws from an iterator in a thread of its own, so that some values are always ready.

    Args:
        values: drawn from in one other thread; what it raises is raised here.
        depth: values held ready.

    Yields:
        The same values.
    """
    held: queue.Queue[Callable[[], T]] = queue.Queue(depth)
    stop = threading.Event()

    def put(give: Callable[[], T]) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                held.put(give, timeout=0.1)
                return

    def draw() -> None:
        try:
            for value in values:
                put(lambda value=value: value)
                if stop.is_set():
                    return
            put(_raiser(StopIteration()))
        except BaseException as error:  # whatever it is, it is the reader's affair
            put(_raiser(error))

    def read() -> Iterator[T]:
        while True:
            try:
                yield held.get()()
            except StopIteration:
                return

    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield read()
    finally:
        stop.set()
        thread.join()


def _raiser(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail
