"""``python -m sotalign_jax`` is ``sotalign``."""

from sotalign_jax.main import run

run()
