"""Several runs, and what they say together."""

from sotalign_jax.sweeps.compare import compare

__all__ = ["compare"]
