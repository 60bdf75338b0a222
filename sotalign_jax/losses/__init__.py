"""Pure losses: arrays in, a scalar out; at home under ``jit``, ``grad`` and ``vmap``."""

from sotalign_jax.losses.affinity import cosine_affinity
from sotalign_jax.losses.contrastive import info_nce, one_sided_info_nce, siglip
from sotalign_jax.losses.divergences import cka, info_nce_divergence
from sotalign_jax.losses.klot import KLOTInfo, klot, klot_from_affinity
from sotalign_jax.losses.neighbours import (
    Neighbours,
    choose_neighbours,
    nearest_neighbours,
    neighbour_siglip,
)
from sotalign_jax.losses.pseudo_label import pseudo_label, pseudo_label_targets
from sotalign_jax.losses.structure import structure

__all__ = [
    "KLOTInfo",
    "Neighbours",
    "choose_neighbours",
    "cka",
    "cosine_affinity",
    "info_nce",
    "info_nce_divergence",
    "klot",
    "klot_from_affinity",
    "nearest_neighbours",
    "neighbour_siglip",
    "one_sided_info_nce",
    "pseudo_label",
    "pseudo_label_targets",
    "siglip",
    "structure",
]
