"""Semi-supervised alignment of frozen image and text encoders by optimal transport, in JAX."""

__version__ = "0.1.0"
