"""Pretrained towers to features: pictures and captions in, a feature store out."""

from sotalign_jax.encoders.base import Description, Encoder, Inputs, Preprocessor

__all__ = ["Description", "Encoder", "Inputs", "Preprocessor"]
