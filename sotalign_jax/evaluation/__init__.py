"""Measures of alignment: arrays in, a dict of numbers out."""

from sotalign_jax.evaluation.retrieval import retrieval_metrics

__all__ = ["retrieval_metrics"]
