"""Which rows make up the batch of a step: the same on device, on the host, and after a restart.

A stream of ``rows`` rows is read in shuffled epochs. The order of an epoch is a function of the key
and the epoch alone, so the batch of any step can be had without the steps before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from sotalign_jax.features.store import FeatureTable

__all__ = [
    "Batch",
    "NeighbourRows",
    "Stream",
    "advance",
    "batch_rows",
    "drawn_neighbours",
    "first_order",
    "step_key",
    "stream_batches",
]

# Streams are numbered from 0; the random choices of a step have a number of their own, and so has
# the choice among neighbours of each side.
_STEP_NUMBER = 1_000
_NEIGHBOUR_NUMBERS = (1_001, 1_002)


class NeighbourRows(NamedTuple):
    """Of each pair its neighbours, as rows of a table; None of a side that has none.

    Attributes:
        image: ``(pairs, k)`` row numbers, those of the neighbours of the pair's image.
        text: those of its text.
    """

    image: Any = None
    text: Any = None


class Batch(NamedTuple):
    """The data sources, or one batch of them: all tables, or all arrays.

    Attributes:
        pairs_image: rows of the paired images.
        pairs_text: rows of the paired texts; row i belongs to image row i.
        unpaired_image: rows of the unpaired images.
        unpaired_text: rows of the unpaired texts, in no relation to the images.
        teacher_image: ``unpaired_image`` projected by the teacher; None where nobody asks.
        teacher_text: ``unpaired_text`` projected by the teacher.
        image_rows: which rows of their table ``unpaired_image`` are; None where it is all of them.
        neighbour_image: of a batch, one neighbour of each paired image, row by row; of the sources,
            the rows that are a neighbour of any. None where nobody asks.
        neighbour_text: the same of the texts.
        neighbours: of the sources, which rows of theirs belong to a pair; None of a batch.
    """

    pairs_image: Any
    pairs_text: Any
    unpaired_image: Any
    unpaired_text: Any
    teacher_image: Any = None
    teacher_text: Any = None
    image_rows: Any = None
    neighbour_image: Any = None
    neighbour_text: Any = None
    neighbours: NeighbourRows = NeighbourRows()


class Stream(NamedTuple):
    """How one source is read: ``size`` of its ``rows`` rows at a time, none twice in an epoch.

    The rows left over when ``size`` does not divide ``rows`` sit out that epoch. A source no larger
    than its batch is taken whole, in its own order.
    """

    rows: int
    size: int
    number: int  # tells the streams of a run apart

    @classmethod
    def of(cls, rows: int, size: int, number: int) -> Stream:
        """A stream whose batch is at most the whole source."""
        return cls(rows, min(rows, size), number)

    @property
    def whole(self) -> bool:
        """Whether every batch is the whole source."""
        return self.size == self.rows

    @property
    def epoch_steps(self) -> int:
        """Steps in an epoch."""
        return self.rows // self.size


def _order(stream: Stream, key: Array, step: Int[Array, ""] | int) -> Int[Array, " rows"]:
    """The order of the epoch that ``step`` falls in."""
    epoch_key = jax.random.fold_in(
        jax.random.fold_in(key, stream.number), step // stream.epoch_steps
    )
    return jax.random.permutation(epoch_key, stream.rows)


def first_order(stream: Stream, key: Array, step: Int[Array, ""] | int) -> Int[Array, " rows"]:
    """The order to start from at ``step``; nothing to carry for a stream taken whole."""
    return jnp.arange(0) if stream.whole else _order(stream, key, step)


def advance(stream: Stream, key: Array, step: Int[Array, ""], order: Array) -> Array:
    """The order at ``step``, given that of the step before: a new one where an epoch begins."""
    if stream.whole:
        return order
    return jax.lax.cond(
        step % stream.epoch_steps == 0, lambda: _order(stream, key, step), lambda: order
    )


def batch_rows(stream: Stream, order: Array, step: Int[Array, ""] | int) -> Int[Array, " size"]:
    """Indices of the rows of the batch of ``step``."""
    if stream.whole:
        return jnp.arange(stream.rows)
    start = (step % stream.epoch_steps) * stream.size
    return jax.lax.dynamic_slice(order, (start,), (stream.size,))


def step_key(key: Array, step: Int[Array, ""] | int) -> Array:
    """The key of the random choices of a step: a function of the run's data key and the step."""
    return jax.random.fold_in(jax.random.fold_in(key, _STEP_NUMBER), step)


def drawn_neighbours(
    neighbours: NeighbourRows,
    key: Array,
    step: Int[Array, ""] | int,
    pairs: Int[ArrayLike, " n"],
) -> NeighbourRows:
    """One neighbour of each pair of a batch, each of its ``k`` as likely; None of a side without.

    Args:
        neighbours: of all pairs.
        key: the run's data key.
        step: of the batch.
        pairs: its rows among the pairs.

    Returns:
        ``(n,)`` row numbers a side, a function of the key, the step and the pairs.
    """

    def draw(table, number: int):
        if table is None:
            return None
        rows = jnp.take(jnp.asarray(table), jnp.asarray(pairs), axis=0)
        # As `losses.choose_neighbours`, which this floor does not know.
        choice = step_key(jax.random.fold_in(key, number), step)
        at = jax.random.randint(choice, (rows.shape[0], 1), 0, rows.shape[1])
        return jnp.take_along_axis(rows, at, axis=1)[:, 0]

    return NeighbourRows(*map(draw, neighbours, _NEIGHBOUR_NUMBERS))


def stream_batches(
    tables: Batch,
    streams: tuple[Stream, Stream, Stream],
    key: Array,
    start: int,
    stop: int,
    *,
    shares: tuple[slice, slice, slice] = (slice(None), slice(None), slice(None)),
    threads: int = 4,
) -> Iterator[Batch]:
    """Batches of raw rows for the steps ``start .. stop - 1``, read ahead by background threads.

    Draws exactly the rows that :func:`batch_rows` draws on device. A source that is taken whole is
    read once: all batches share its rows, which cannot be written to.

    Args:
        tables: the sources, each a `FeatureTable`, and ``neighbours`` arrays; the teacher's fields
            are ignored.
        streams: of the pairs, the unpaired images and the unpaired texts.
        key: the run's data key.
        start: first step.
        stop: one past the last step.
        shares: which rows of a batch of each stream are wanted; all by default. Nothing else is
            read. A neighbour is wanted where its pair is.
        threads: reader threads, and batches held ready.

    Yields:
        A batch of float32 rows a step, None for a neighbour that nobody asks for; ``image_rows``
        are those of the whole batch.
    """
    if start >= stop:
        return
    # Lest choices of rows wait for the steps that an accelerator has yet to do.
    key = jax.device_put(key, _cpu())
    pairs, image, text = (_host_rows(stream, key) for stream in streams)
    sources = [
        _reader(tables.pairs_image, streams[0], shares[0]),
        _reader(tables.pairs_text, streams[0], shares[0]),
        _reader(tables.unpaired_image, streams[1], shares[1]),
        _reader(tables.unpaired_text, streams[2], shares[2]),
    ]

    def read(step: int) -> Batch:
        chosen = pairs(step)
        wanted = (chosen, chosen, image(step), text(step))
        rows = None if streams[1].whole else np.asarray(wanted[2], np.int32)
        four = [take(rows) for take, rows in zip(sources, wanted, strict=True)]
        return Batch(*four, image_rows=rows, **neighbours(step, chosen))

    draw = jax.jit(drawn_neighbours)

    def neighbours(step: int, chosen: np.ndarray) -> dict[str, np.ndarray]:
        if not jax.tree.leaves(tables.neighbours):
            return {}
        with jax.default_device(_cpu()):
            drawn = draw(tables.neighbours, key, step, chosen)
        found = {}
        for side, rows in drawn._asdict().items():
            if rows is not None:
                table = getattr(tables, f"neighbour_{side}")
                found[f"neighbour_{side}"] = table.take(np.asarray(rows)[shares[0]])
        return found

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    yield from grain.MapDataset.range(start, stop).map(read).to_iter_dataset(options)


def _reader(
    table: FeatureTable, stream: Stream, share: slice
) -> Callable[[np.ndarray], np.ndarray]:
    """How a share of chosen rows is had: read as it is asked for, or all of it here and now."""
    if not stream.whole:
        return lambda chosen: table.take(chosen[share])
    rows = table.read(share)
    rows.setflags(write=False)
    return lambda _: rows


def _host_rows(stream: Stream, key: Array) -> Callable[[int], np.ndarray]:
    """`batch_rows` on the host, remembering the orders of the epochs in flight."""

    @functools.lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        with jax.default_device(_cpu()):
            return np.asarray(_order(stream, key, epoch * stream.epoch_steps))

    def rows(step: int) -> np.ndarray:
        if stream.whole:
            return np.arange(stream.rows)
        epoch, slot = divmod(step, stream.epoch_steps)
        return order(epoch)[slot * stream.size : (slot + 1) * stream.size]

    return rows


def _cpu() -> Any:
    return jax.local_devices(backend="cpu")[0]
