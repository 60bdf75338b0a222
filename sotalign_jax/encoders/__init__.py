"""Pretrained towers to features: pictures and captions in, a feature store out."""

from sotalign_jax.encoders.base import Description, Encoder, Inputs, Preprocessor
from sotalign_jax.encoders.presets import PRESETS, Preset
from sotalign_jax.encoders.towers import load_encoder

__all__ = [
    "PRESETS",
    "Description",
    "Encoder",
    "Inputs",
    "Preprocessor",
    "Preset",
    "load_encoder",
]
