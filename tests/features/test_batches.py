"""Which rows a step reads: epochs, restarts, and the host against the device."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.features import FeatureTable
from sotalign_jax.features.batches import (
    Batch,
    Stream,
    advance,
    batch_rows,
    first_order,
    stream_batches,
)

STEPS = 12
SIZES = st.sampled_from((1, 3, 4, 7))
ROWS = st.sampled_from((4, 10, 12))


@functools.partial(jax.jit, static_argnums=0)
def _twelve_steps(stream, key, start):
    def one(order, step):
        order = advance(stream, key, step, order)
        return order, batch_rows(stream, order, step)

    return jax.lax.scan(one, first_order(stream, key, start), start + jnp.arange(STEPS))[1]


def device_rows(stream, key, start, stop):
    """Rows of the steps ``start .. stop - 1``, carried from step to step as training does."""
    assert stop - start <= STEPS
    return np.asarray(_twelve_steps(stream, key, start))[: stop - start]


def numbered(rows, offset):
    """A table whose row i holds the number ``offset + i``."""
    return FeatureTable.from_array(np.arange(offset, offset + rows, dtype=np.float32)[:, None])


def tables_of(streams):
    return Batch(*(numbered(streams[i].rows, o) for i, o in ((0, 0), (0, 500), (1, 0), (2, 0))))


def streamed_rows(streams, key, start, stop):
    """Rows that `stream_batches` reads, one list of four arrays a step."""
    tables = tables_of(streams)
    offsets = (0, 500, 0, 0)
    return [
        [part[:, 0].astype(int) - offset for part, offset in zip(batch[:4], offsets, strict=True)]
        for batch in stream_batches(tables, streams, key, start, stop)
    ]


@settings(max_examples=15, deadline=None)
@given(rows=ROWS, size=SIZES, epoch=st.integers(0, 9))
def test_an_epoch_visits_no_row_twice_and_each_once_if_the_batch_divides_the_rows(
    rows, size, epoch
):
    stream = Stream.of(rows, size, 1)
    start = epoch * stream.epoch_steps
    batches = device_rows(stream, jax.random.key(3), start, start + stream.epoch_steps)
    assert {len(batch) for batch in batches} == {min(rows, size)}
    visited = np.concatenate(batches)
    assert len(np.unique(visited)) == len(visited)
    assert visited.min() >= 0 and visited.max() < rows
    if rows % stream.size == 0:
        np.testing.assert_array_equal(np.sort(visited), np.arange(rows))


@settings(max_examples=15, deadline=None)
@given(rows=ROWS, size=SIZES, step=st.integers(1, 8))
def test_a_restart_at_any_step_draws_the_rows_of_an_uninterrupted_run(rows, size, step):
    stream, key = Stream.of(rows, size, 2), jax.random.key(7)
    through = device_rows(stream, key, 0, step + 3)[step:]
    restarted = device_rows(stream, key, step, step + 3)
    np.testing.assert_array_equal(through, restarted)


@settings(max_examples=8, deadline=None)
@given(sizes=st.tuples(SIZES, SIZES, SIZES), start=st.integers(0, 9))
def test_the_host_reads_the_rows_that_the_device_draws(sizes, start):
    streams = tuple(
        Stream.of(rows, n, i) for i, rows, n in zip(range(3), (9, 17, 20), sizes, strict=True)
    )
    key = jax.random.key(1)
    host = streamed_rows(streams, key, start, start + 6)
    for batch, rows in zip(
        stream_batches(tables_of(streams), streams, key, start, start + 6), host, strict=True
    ):
        if streams[1].whole:
            assert batch.image_rows is None
        else:
            np.testing.assert_array_equal(batch.image_rows, rows[2])
    for i, stream in enumerate(streams):
        expected = list(device_rows(stream, key, start, start + 6))
        # Both sides of the pairs are read by the first stream.
        for part in (0, 1) if i == 0 else (i + 1,):
            np.testing.assert_array_equal([batch[part] for batch in host], expected)


def test_epochs_differ_and_so_do_streams_and_keys():
    stream = Stream(12, 3, 1)
    key = jax.random.key(0)

    def epoch(stream, key, number):
        return np.concatenate(device_rows(stream, key, 4 * number, 4 * number + 4))

    first = epoch(stream, key, 0)
    for other in (
        epoch(stream, key, 1),
        epoch(stream._replace(number=2), key, 0),
        epoch(stream, jax.random.key(1), 0),
        np.arange(12),
    ):
        assert (first != other).any()


def test_left_over_rows_sit_out_one_epoch_only():
    stream = Stream(10, 4, 0)
    seen = [
        set(np.concatenate(device_rows(stream, jax.random.key(0), 2 * e, 2 * e + 2)))
        for e in range(12)
    ]
    assert all(len(epoch) == 8 for epoch in seen)
    assert set.union(*seen) == set(range(10))


@pytest.mark.parametrize("size", [6, 100])
def test_a_source_no_larger_than_its_batch_is_read_whole_and_in_order(size):
    stream = Stream.of(6, size, 0)
    assert stream == Stream(6, 6, 0) and stream.whole
    for step in (0, 1, 5):
        np.testing.assert_array_equal(
            device_rows(stream, jax.random.key(0), step, step + 1), [range(6)]
        )
    streams = (stream, Stream.of(0, size, 1), Stream.of(0, size, 2))
    for batch in streamed_rows(streams, jax.random.key(0), 3, 5):
        np.testing.assert_array_equal(batch[0], range(6))
        assert len(batch[2]) == len(batch[3]) == 0


class Counted:
    """Rows that count how often each was read."""

    def __init__(self, rows):
        self.array = np.arange(rows, dtype=np.float32)[:, None]
        self.shape, self.dtype = self.array.shape, self.array.dtype
        self.reads = np.zeros(rows, int)
        self.lock = threading.Lock()

    def read(self, index):
        with self.lock:
            self.reads[index] += 1
        return self.array[index].copy()


def test_a_source_taken_whole_is_read_once():
    sources = [Counted(rows) for rows in (6, 6, 10, 3)]
    tables = Batch(*(FeatureTable([source]) for source in sources))
    streams = (Stream.of(6, 8, 0), Stream.of(10, 5, 1), Stream.of(3, 3, 2))
    batches = list(stream_batches(tables, streams, jax.random.key(0), 4, 12))
    assert len(batches) == 8
    for number in (0, 1, 3):
        np.testing.assert_array_equal(sources[number].reads, 1)
        for batch in batches:
            np.testing.assert_array_equal(batch[number], sources[number].array)
            assert not batch[number].flags.writeable
    # Four epochs of two batches.
    np.testing.assert_array_equal(sources[2].reads, 4)


def test_every_row_is_drawn_equally_often_at_every_place():
    # 4,000 batches of 2 of 5 rows: each row is expected 800 times first; sd 25.
    stream = Stream(5, 2, 0)
    draw = jax.jit(
        jax.vmap(
            lambda step: batch_rows(stream, first_order(stream, jax.random.key(5), step), step)
        )
    )
    firsts = np.asarray(draw(np.arange(4_000)))[:, 0]
    assert np.abs(np.bincount(firsts, minlength=5) - 800).max() < 130


def test_nothing_to_read_gives_no_batch():
    streams = (Stream.of(4, 2, 0),) * 3
    assert streamed_rows(streams, jax.random.key(0), 5, 5) == []


def test_batches_are_float32_rows_of_stored_tables():
    table = FeatureTable.from_array(np.ones((6, 3), np.float16))
    streams = tuple(Stream.of(6, 2, number) for number in range(3))
    (batch,) = stream_batches(Batch(*[table] * 4), streams, jax.random.key(0), 0, 1)
    assert all(part.dtype == np.float32 and part.shape == (2, 3) for part in batch[:4])
    assert batch.teacher_image is None and batch.teacher_text is None
