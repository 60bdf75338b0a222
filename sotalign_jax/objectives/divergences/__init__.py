"""Divergences from a teacher on unpaired rows, by the name that ``config.loss.divergence`` gives.

A further one is a file here and a line below.
"""

from sotalign_jax.objectives.base import Divergence
from sotalign_jax.objectives.divergences.cka import CKA
from sotalign_jax.objectives.divergences.info_nce import INFO_NCE
from sotalign_jax.objectives.divergences.klot import KLOT

__all__ = ["DIVERGENCES"]

DIVERGENCES: dict[str, Divergence] = {
    "klot": KLOT,
    "cka": CKA,
    "info_nce": INFO_NCE,
}
