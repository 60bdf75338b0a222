"""Alignment layers and the aligner: what is trained, saved and used."""

from sotalign_jax.models.aligner import Aligner, Preprocessing, TeacherWeights
from sotalign_jax.models.layers import MLP, LayerConfig, Linear, Star, make_layer

__all__ = [
    "MLP",
    "Aligner",
    "LayerConfig",
    "Linear",
    "Preprocessing",
    "Star",
    "TeacherWeights",
    "make_layer",
]
