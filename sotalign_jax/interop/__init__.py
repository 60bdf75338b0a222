"""Aligners and embeddings in other people's formats, and a card that describes a model."""

from sotalign_jax.interop.card import model_card
from sotalign_jax.interop.clip_retrieval import write_clip_retrieval
from sotalign_jax.interop.heads import LOADER, export_heads, head_steps
from sotalign_jax.interop.sail import read_sail_heads

__all__ = [
    "LOADER",
    "export_heads",
    "head_steps",
    "model_card",
    "read_sail_heads",
    "write_clip_retrieval",
]
