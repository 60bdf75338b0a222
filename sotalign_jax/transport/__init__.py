"""Entropic optimal transport on ``ott``: affinities in, plans out."""

from sotalign_jax.transport.geometry import AffinityGeometry
from sotalign_jax.transport.plan import Plan, ProblemError, solve

__all__ = ["AffinityGeometry", "Plan", "ProblemError", "solve"]
