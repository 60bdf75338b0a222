"""Training: the step, the loop and what it leaves on disk."""

from sotalign_jax.training.build import init_aligner
from sotalign_jax.training.data import fit_aligner, fit_teacher, load_splits, load_test_pairs
from sotalign_jax.training.evaluate import embed_chunks, embed_rows, evaluate
from sotalign_jax.training.loop import train
from sotalign_jax.training.many import together_key, train_many

__all__ = [
    "embed_chunks",
    "embed_rows",
    "evaluate",
    "fit_aligner",
    "fit_teacher",
    "init_aligner",
    "load_splits",
    "load_test_pairs",
    "together_key",
    "train",
    "train_many",
]
