"""Entropic optimal transport on ``ott``: affinities in, plans out."""

from sotalign_jax.transport.entropy import perplexity, row_entropy
from sotalign_jax.transport.geometry import AffinityGeometry
from sotalign_jax.transport.plan import Plan, ProblemError
from sotalign_jax.transport.sinkhorn import solve
from sotalign_jax.transport.streamed import StreamedAffinity, StreamedGeometry

__all__ = [
    "AffinityGeometry",
    "Plan",
    "ProblemError",
    "StreamedAffinity",
    "StreamedGeometry",
    "perplexity",
    "row_entropy",
    "solve",
]
