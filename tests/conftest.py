"""Strict numerics for every test: silent promotion of ranks or dtypes is an error, and so is any
warning."""

import functools
import gc
import sys
from pathlib import Path

import jax
import optax
import pytest
from absl import flags
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
def here(capsys, monkeypatch):
    """A command of `sotalign` in this process: (exit status, standard output, standard error)."""
    from sotalign_jax import main

    def run(entry, flags_parser):
        sys.exit(entry(flags_parser(sys.argv)))

    monkeypatch.setattr(main.app, "run", run)

    def call(*arguments):
        _forget_flags()
        monkeypatch.setattr(sys, "argv", ["sotalign", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main.run()
        out, err = capsys.readouterr()
        return caught.value.code, out, err

    yield call
    _forget_flags()


def _forget_flags():
    """All flags of this package, and those that a config file has made, as in a new process."""
    flags.FLAGS.unparse_flags()
    for module, found in flags.FLAGS.flags_by_module_dict().items():
        for flag in found if module.startswith("sotalign_jax") else ():
            if not flag.name.startswith("config."):
                flag.unparse()
    flags.FLAGS["verbosity"].unparse()
    for name in [one for one in flags.FLAGS if one.startswith("config.")]:
        delattr(flags.FLAGS, name)


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
