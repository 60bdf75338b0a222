"""Checkpoints are written in the background: nothing of them is lost, torn or chosen too early."""

import asyncio
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint._src.serialization import jax_array_handlers
from tiny_runs import assert_same_outcome, records, tiny

from sotalign_jax import training
from sotalign_jax.training import loop
from sotalign_jax.training.checkpoints import Checkpoints
from sotalign_jax.training.devices import AXIS
from sotalign_jax.training.distributed import Preempted
from sotalign_jax.training.step import TrainState

EMPTY = dict.fromkeys(TrainState._fields, ())


def full():
    return OSError(28, "No space left on device")


def state_of(step, size=1_000, sharding=None):
    params = {"kernel": jnp.arange(size, dtype=jnp.float32), "bias": jnp.full(3, 0.5, jnp.float32)}
    state = TrainState(**EMPTY | {"params": params, "step": jnp.int32(step)})
    return state if sharding is None else jax.device_put(state, sharding)


@functools.partial(jax.jit, donate_argnums=0)
def donating(state):
    params = jax.tree.map(lambda x: 1.5 * x + 1, state.params)
    return state._replace(params=params, step=state.step + 1)


class Gate:
    """Holds back every write of arrays until it is opened, or makes it fail."""

    def __init__(self, write):
        self._write = write
        self.open = threading.Event()
        self.reached = threading.Event()
        self.error: Exception | None = None

    async def __call__(self, *arguments, **keywords):
        self.reached.set()
        while not self.open.is_set():
            await asyncio.sleep(0.001)
        if self.error is not None:
            raise self.error
        return await self._write(*arguments, **keywords)


@pytest.fixture
def gate(monkeypatch):
    name = "_async_serialize_replica_slices"
    gate = Gate(getattr(jax_array_handlers, name))
    monkeypatch.setattr(jax_array_handlers, name, gate)
    yield gate
    gate.open.set()


def mesh_sharding(devices):
    mesh = jax.make_mesh(
        (devices,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    return jax.NamedSharding(mesh, jax.P())


@pytest.mark.parametrize(("devices", "size"), [(1, 2_000_000), (2, 2_000_000), (2, 2_000_001)])
def test_steps_during_a_write_do_not_change_what_is_written(devices, size, gate, tmp_path):
    """An even size is written in parts by both devices, an odd one by the first."""
    sharding = None if devices == 1 else mesh_sharding(devices)
    state = donating(state_of(0, size, sharding))
    expected = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
    checkpoints = Checkpoints(tmp_path, keep_best=False)
    checkpoints.save(state)
    like = state_of(0, size, sharding)
    for _ in range(20):
        state = jax.block_until_ready(donating(state))
    assert gate.reached.wait(60) and not (tmp_path / "1").exists()
    gate.open.set()
    restored = checkpoints.restore(like, 1)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert int(state.step) == 21
    checkpoints.close()


def test_what_is_being_written_is_waited_for(gate, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_best=True)
    seen = {}
    for name in ("latest", "best"):
        gate.open.clear()
        gate.reached.clear()
        checkpoints.save(state_of(len(seen) + 1), 0.5 + len(seen))
        assert gate.reached.wait(60)
        thread = threading.Thread(
            target=lambda name=name: seen.update({name: getattr(checkpoints, name)})
        )
        thread.start()
        thread.join(0.2)
        assert thread.is_alive(), f"{name} was read while the checkpoint was being written"
        gate.open.set()
        thread.join(60)
    assert seen == {"latest": 1, "best": 2}
    assert {path.name for path in tmp_path.iterdir()} == {"2"}
    # Two at once: the second waits for the first, and both are there.
    for step in (3, 4):
        checkpoints.save(state_of(step), 0.1)
    checkpoints.close()
    assert {path.name for path in tmp_path.iterdir()} == {"2", "4"}


def test_a_write_that_failed_is_an_error_of_the_next_call(gate, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_best=True)
    gate.open.set()
    checkpoints.save(state_of(1), 0.5)
    checkpoints.wait()
    for step, call in enumerate(
        (lambda: checkpoints.latest, lambda: checkpoints.best, checkpoints.wait, checkpoints.close)
    ):
        gate.error = full()
        checkpoints.save(state_of(2 + step), 0.9)
        message = rf"that of step {2 + step} could not be written to .*No space left on device"
        with pytest.raises(OSError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    gate.error = None
    again = Checkpoints(tmp_path, keep_best=True)
    assert (again.latest, again.best) == (1, 1)
    np.testing.assert_array_equal(again.restore(state_of(0), 1).params["bias"], 0.5)
    again.close()


def test_a_failed_write_stops_training_and_the_run_goes_on_from_the_one_before(
    gate, tmp_path, monkeypatch
):
    config = tiny(objective="sail", select="best")
    gate.open.set()
    training.train(config, tmp_path / "through", quiet=True)
    save = Checkpoints.save

    def arming(self, state, value=None):
        self.wait()
        if int(state.step) == 20:
            gate.error = full()
        save(self, state, value)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", arming)
        with pytest.raises(OSError, match="checkpoints: that of step 20 could not be written"):
            training.train(config, tmp_path / "cut", quiet=True)
    assert [line["step"] for line in records(tmp_path / "cut")] == [10, 20, 30]
    assert not (tmp_path / "cut" / "results.json").exists()
    gate.error = None
    training.train(config, tmp_path / "cut", quiet=True)
    assert_same_outcome(tmp_path / "cut", tmp_path / "through")


def test_another_error_is_not_taken_for_that_of_the_write(gate, tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_best=False)
    gate.open.set()
    gate.error = full()
    checkpoints.save(state_of(1))
    with pytest.raises(OSError, match=r"step 1 could not be written.*No space left"):
        try:
            raise FloatingPointError("loss is nan")
        finally:
            checkpoints.close()


def test_sigterm_returns_only_with_a_complete_checkpoint(gate, tmp_path, monkeypatch):
    """The write is opened by a timer: whoever did not wait would be back before."""
    opened = []

    def agreed(self, step):
        if step == 20:
            timer = threading.Timer(0.5, lambda: (opened.append(True), gate.open.set()))
            timer.start()
            gate.open.clear()
            return True
        gate.open.set()
        return False

    monkeypatch.setattr(loop.PreemptionWatch, "agreed", agreed)
    gate.open.set()
    config = tiny(objective="sail", checkpoint_every=0, eval_every=0)
    with pytest.raises(Preempted, match="from step 20"):
        training.train(config, tmp_path, quiet=True)
    assert opened and (tmp_path / "checkpoints" / "20").is_dir()
    assert Checkpoints(tmp_path / "checkpoints", keep_best=False).latest == 20
