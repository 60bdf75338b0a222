"""Linear teachers: closed-form or trained maps fitted on the pairs alone."""

from sotalign_jax.teachers.contrastive import contrastive
from sotalign_jax.teachers.linear import LinearTeacher, cca, procrustes
from sotalign_jax.teachers.moments import (
    Moments,
    empty_moments,
    merge_moments,
    moments_of,
    recentered,
    update_moments,
)

__all__ = [
    "LinearTeacher",
    "Moments",
    "cca",
    "contrastive",
    "empty_moments",
    "merge_moments",
    "moments_of",
    "procrustes",
    "recentered",
    "update_moments",
]
