"""Pretrained towers to features: pictures and captions in, a feature store out."""

from typing import TYPE_CHECKING, Any

from sotalign_jax.encoders.base import AsyncEncoder, Description, Encoder, Inputs, Preprocessor
from sotalign_jax.encoders.presets import PRESETS, Preset

if TYPE_CHECKING:
    from sotalign_jax.encoders.towers import load_encoder

__all__ = [
    "PRESETS",
    "AsyncEncoder",
    "Description",
    "Encoder",
    "Inputs",
    "Preprocessor",
    "Preset",
    "load_encoder",
]


def __getattr__(name: str) -> Any:
    # When it is asked for: worker processes import this package, and have no use for JAX.
    if name == "load_encoder":
        from sotalign_jax.encoders.towers import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
