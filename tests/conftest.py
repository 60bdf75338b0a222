"""Strict numerics for every test: silent promotion of ranks or dtypes is an error, and so is any
warning."""

import functools
import gc
from pathlib import Path

import jax
import optax
import pytest
from ott.geometry import epsilon_scheduler

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # for the tests of sharding; the rest uses the first
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def let_mix_dtypes(owner, name):
    """Exempts one function of another library, and nothing that it is called from."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def call(*arguments, **keywords):
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments, **keywords)

    setattr(owner, name, call)


# Both raise a float to the power of an integer count: Adam's, and the iteration of Sinkhorn.
let_mix_dtypes(optax.tree, "bias_correction")
let_mix_dtypes(epsilon_scheduler.Epsilon, "__call__")


@pytest.fixture
def rng():
    return jax.random.key(0)


# Each compiled program takes some of the memory maps that Linux allows a process, 65,530.
_MANY_MAPS = 25_000


@pytest.fixture(autouse=True, scope="module")
def few_compiled_programs():
    """Forgets compiled programs once there are many: a process that has too many aborts."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > _MANY_MAPS:
        jax.clear_caches()
        gc.collect()
