"""Linear teachers: maps fitted on the pairs, and with `refit` on the unpaired rows as well."""

from sotalign_jax.numerics import Columns
from sotalign_jax.teachers.columns import (
    ColumnMoments,
    column_moments_of,
    columns_of,
    merge_column_moments,
)
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
from sotalign_jax.teachers.refit import refit

__all__ = [
    "ColumnMoments",
    "Columns",
    "LinearTeacher",
    "Moments",
    "cca",
    "column_moments_of",
    "columns_of",
    "contrastive",
    "empty_moments",
    "merge_column_moments",
    "merge_moments",
    "moments_of",
    "procrustes",
    "recentered",
    "refit",
    "update_moments",
]
