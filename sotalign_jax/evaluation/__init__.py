"""Measures of alignment, and of what there is to align: arrays in, numbers out."""

from sotalign_jax.evaluation.classification import class_embeddings, classification_metrics
from sotalign_jax.evaluation.compositional import mmvp_metrics, winoground_metrics
from sotalign_jax.evaluation.diagnosis import Finding, describe, diagnose
from sotalign_jax.evaluation.duplicates import Duplicates, find_duplicates
from sotalign_jax.evaluation.examples import Examples, Ranking, rank_queries, retrieval_examples
from sotalign_jax.evaluation.health import feature_health
from sotalign_jax.evaluation.retrieval import retrieval_metrics, retrieval_of_scores
from sotalign_jax.evaluation.shift import (
    circular_wasserstein,
    distribution_shift,
    spherical_sliced_wasserstein,
)
from sotalign_jax.evaluation.similarity import linear_cka, mutual_knn

__all__ = [
    "Duplicates",
    "Examples",
    "Finding",
    "Ranking",
    "circular_wasserstein",
    "class_embeddings",
    "classification_metrics",
    "describe",
    "diagnose",
    "distribution_shift",
    "feature_health",
    "find_duplicates",
    "linear_cka",
    "mmvp_metrics",
    "mutual_knn",
    "rank_queries",
    "retrieval_examples",
    "retrieval_metrics",
    "retrieval_of_scores",
    "spherical_sliced_wasserstein",
    "winoground_metrics",
]
