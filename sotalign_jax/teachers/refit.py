r"""A CCA teacher fitted again with its own transport plan: an extension, not in the paper.

A few hundred pairs leave most of a covariance unknown, and unpaired rows know it. Their plan under
the teacher is a soft pairing of them, which CCA can take in beside the true pairs.
"""

from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.numerics import Columns, unit_rows, unit_rows64
from sotalign_jax.teachers.linear import LinearTeacher, cca
from sotalign_jax.teachers.moments import Moments, standardized_rows64
from sotalign_jax.transport import Plan, StreamedAffinity, solve
from sotalign_jax.transport.geometry import HIGHEST
from sotalign_jax.transport.streamed import block_rows, over_blocks

__all__ = ["refit"]

_CHUNK = 8_192
# Matrices of n x m float32 alive at once while a dense plan is solved.
_DENSE_COPIES = 4
_GIB = 2**30
_STREAM_SHARE = 1 / 16


def refit(
    teacher: LinearTeacher,
    moments: Moments,
    image: Float[ArrayLike, "n dx"],
    text: Float[ArrayLike, "m dy"],
    *,
    weight: float = 0.3,
    epsilon: float = 0.02,
    rounds: int = 1,
    ridge: float = 0.1,
    ridge_on: Literal["covariance", "scatter"] = "covariance",
    weighted: bool = False,
    threshold: float = 1e-3,
    max_iterations: int = 2_000,
    memory_gib: float = 4.0,
) -> LinearTeacher:
    r"""CCA of the pairs and of the unpaired rows, these coupled by the teacher's transport plan.

    With P the entropic plan (total mass 1, uniform marginals) of the teacher's cosines between the
    unpaired rows, every covariance of the pairs becomes

    .. math::
        S_{xy} \leftarrow (1 - w) S_{xy} + w X^T P Y, \quad
        S_{xx} \leftarrow (1 - w) S_{xx} + w X^T X / n, \quad
        S_{yy} \leftarrow (1 - w) S_{yy} + w Y^T Y / m

    where the rows of X and Y, preprocessed like the pairs, are centred on their own means: P has
    exactly these covariances, so that the blend is the covariance of a mixture, with canonical
    correlations of at most 1. `cca` of the blend is the new teacher; it keeps the means of
    ``moments`` and the number of directions of ``teacher``. Another round does the same with the
    new teacher's plan.

    Args:
        teacher: whose plan couples the unpaired rows, and whose columns standardise them.
        moments: of the pairs, preprocessed by the same columns; `recentered` ones will do.
        image: ``(n, dx)`` raw features of the unpaired images, any floating dtype.
        text: ``(m, dy)`` raw features of the unpaired texts.
        weight: w in [0, 1), how much the unpaired rows count (default 0.3); 0 returns ``teacher``.
        epsilon: regularisation of the plan, in units of cosine (default 0.02).
        rounds: how often (default once).
        ridge: as for `cca`.
        ridge_on: as for `cca`; a scatter is that of the pairs.
        weighted: as for `cca`.
        threshold: L1 marginal error at which Sinkhorn stops (default 1e-3).
        max_iterations: its budget (default 2,000).
        memory_gib: what the plan may take of the device: where four ``n x m`` float32 matrices do
            not fit, it is solved and multiplied block by block and never formed. Beside it stand
            the projected rows, and the texts with their image under the plan.

    Returns:
        A `LinearTeacher`. Moments are summed in float64 on the host; the plan and its product with
        the texts are float32.

    Raises:
        ValueError: an argument is out of range; rows are too few, of another width or not finite;
            ``moments`` are not those that ``teacher`` was fitted on; or the plan did not converge
            within its budget, when nobody could tell what the blend would hold.
    """
    if not 0 <= weight < 1:
        raise ValueError(f"weight={weight}: must lie in [0, 1)")
    for name, value in (("epsilon", epsilon), ("threshold", threshold), ("memory_gib", memory_gib)):
        if not 0 < value < np.inf:
            raise ValueError(f"{name}={value}: must be positive and finite")
    for name, value in (("rounds", rounds), ("max_iterations", max_iterations)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if ridge_on not in ("covariance", "scatter"):
        raise ValueError(f"ridge_on={ridge_on!r}: unknown; 'covariance' or 'scatter'")
    if moments.count < 2:
        raise ValueError(f"moments: of {moments.count} pairs; a CCA needs at least 2")
    image = _checked("image", image, teacher.image_mean, moments.image_mean)
    text = _checked("text", text, teacher.text_mean, moments.text_mean)
    if weight == 0:
        return teacher

    dim, degrees = teacher.image_weight.shape[1], moments.count - 1
    if ridge_on == "scatter":
        ridge = ridge / degrees
    image_mean, image_covariance = _own_moments(image, teacher.image_columns)
    text_mean, text_covariance = _own_moments(text, teacher.text_columns)
    # How many directions can be real at most, which is all that `cca` asks a count for.
    count = moments.count + max(len(image), len(text))

    def blend(scatter, covariance):
        return (count - 1) * ((1 - weight) * scatter / degrees + weight * covariance)

    for _ in range(rounds):
        affinity, plan = _plan(teacher, image, text, epsilon, threshold, max_iterations, memory_gib)
        centred = np.concatenate(
            [rows.astype(np.float32) for rows in _rows64(text, teacher.text_columns, text_mean)]
        )
        mapped = np.asarray(_mapped(affinity, plan, jnp.asarray(centred)))
        cross, done = np.zeros((len(image_mean), len(text_mean))), 0
        for rows in _rows64(image, teacher.image_columns, image_mean):
            cross += rows.T @ mapped[done : done + len(rows)].astype(np.float64)
            done += len(rows)
        blended = Moments(
            count,
            moments.image_mean,
            moments.text_mean,
            blend(moments.image_scatter, image_covariance),
            blend(moments.text_scatter, text_covariance),
            blend(moments.cross_scatter, cross),
        )
        fitted = cca(blended, ridge=ridge, weighted=weighted, dim=dim)
        teacher = fitted._replace(
            image_columns=teacher.image_columns, text_columns=teacher.text_columns
        )
    return teacher


def _checked(name: str, rows, teacher_mean, mean: np.ndarray) -> np.ndarray:
    rows, teacher_mean = np.asarray(rows), np.asarray(teacher_mean)
    if mean.shape != teacher_mean.shape or not np.allclose(mean, teacher_mean, rtol=0, atol=1e-5):
        raise ValueError(
            f"moments: their {name}_mean is not the teacher's; both must come from the same pairs, "
            "preprocessed alike"
        )
    if rows.ndim != 2 or rows.shape[1] != len(mean):
        raise ValueError(f"{name}: shape {rows.shape}; the teacher takes (n, {len(mean)})")
    if len(rows) < 2:
        raise ValueError(f"{name}: {len(rows)} unpaired rows; a refit needs at least 2")
    if not np.isfinite(rows).all():
        raise ValueError(f"{name}: holds NaN or infinity; every feature must be finite")
    return rows


def _rows64(
    rows: np.ndarray, columns: Columns | None, mean: np.ndarray | float = 0.0
) -> Iterator[np.ndarray]:
    """Preprocessed rows minus ``mean`` in float64, a chunk at a time."""
    for start in range(0, len(rows), _CHUNK):
        chunk = unit_rows64(rows[start : start + _CHUNK].astype(np.float64))
        yield standardized_rows64(chunk, columns) - mean


def _own_moments(rows: np.ndarray, columns: Columns | None) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the preprocessed rows, and their covariance over n about it."""
    mean = np.sum([chunk.sum(axis=0) for chunk in _rows64(rows, columns)], axis=0) / len(rows)
    scatter = np.zeros((rows.shape[1], rows.shape[1]))
    for chunk in _rows64(rows, columns, mean):
        scatter += chunk.T @ chunk
    return mean, scatter / len(rows)


def _plan(
    teacher: LinearTeacher, image, text, epsilon, threshold, max_iterations, memory_gib
) -> tuple[StreamedAffinity, Plan]:
    n, m = len(image), len(text)
    affinity = StreamedAffinity(
        _embedded(teacher.project_image, image),
        _embedded(teacher.project_text, text),
        block_rows(n, m, _STREAM_SHARE * memory_gib * _GIB),
    )
    dense = _DENSE_COPIES * 4 * n * m <= memory_gib * _GIB
    plan = solve(
        affinity.of_rows(affinity.image) if dense else affinity,
        epsilon,
        threshold=threshold,
        max_iterations=max_iterations,
    )
    if not bool(plan.converged):
        raise ValueError(
            f"epsilon={epsilon}: the plan of the {n} x {m} unpaired rows has a marginal error of "
            f"{float(plan.marginal_error):.1e} after {max_iterations} iterations, not "
            f"{threshold:g}; raise epsilon or max_iterations"
        )
    return affinity, plan


def _embedded(project, rows: np.ndarray) -> Float[Array, "n d"]:
    starts = range(0, len(rows), _CHUNK)
    return jnp.concatenate([unit_rows(project(rows[k : k + _CHUNK])) for k in starts])


@jax.jit
def _mapped(
    affinity: StreamedAffinity, plan: Plan, text: Float[Array, "m dy"]
) -> Float[Array, "n dy"]:
    """``P @ text``, a block of rows of P at a time."""

    def block(carry, rows):
        image, f = rows
        coupling = plan._replace(f=f).matrix(affinity.of_rows(image))
        return carry, jnp.matmul(coupling, text, precision=HIGHEST)

    return over_blocks(block, (), (affinity.image, plan.f), affinity.block)[1]
