"""Several runs, and what they say together."""

from sotalign_jax.sweeps.compare import compare
from sotalign_jax.sweeps.points import base_config, load_sweep
from sotalign_jax.sweeps.run import run_sweep

__all__ = ["base_config", "compare", "load_sweep", "run_sweep"]
