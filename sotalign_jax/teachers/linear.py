"""Closed-form linear teachers, fitted on the moments of the pairs alone."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.numerics import Columns, standardized_rows, unit_rows
from sotalign_jax.teachers.moments import Moments

__all__ = ["LinearTeacher", "cca", "procrustes"]

_EPS = float(np.finfo(np.float64).eps)
_HIGHEST = jax.lax.Precision.HIGHEST


class LinearTeacher(NamedTuple):
    """Two linear maps into a shared space, with the centring that they were fitted with (a pytree).

    Attributes:
        image_weight: ``(dx, d)`` float32; column k is the k-th image direction.
        text_weight: ``(dy, d)`` float32.
        image_mean: ``(dx,)`` float32, subtracted from unit image rows.
        text_mean: ``(dy,)`` float32, subtracted from unit text rows.
        correlations: ``(d,)`` float32 in [0, 1], how strongly the pairs agree along each direction
            (`cca`: regularised canonical correlations; `procrustes`: correlations of the projected
            pairs; `contrastive`: ones, as a trained map has no such reading).
        image_columns: what standardises the columns of unit image rows, which then have unit length
            again, before the mean is subtracted; None (default): nothing does. See `columns_of`.
        text_columns: the same for texts.
    """

    image_weight: Float[Array, "dx d"]
    text_weight: Float[Array, "dy d"]
    image_mean: Float[Array, "dx"]
    text_mean: Float[Array, "dy"]
    correlations: Float[Array, "d"]
    image_columns: Columns | None = None
    text_columns: Columns | None = None

    def project_image(self, image: Float[ArrayLike, "n dx"]) -> Float[Array, "n d"]:
        """Image rows in the shared space: ``(unit_rows(image) - image_mean) @ image_weight``.

        With ``image_columns`` the unit rows are standardised by column and unit rows again first.

        Args:
            image: ``(n, dx)`` raw features of any floating dtype.

        Returns:
            ``(n, d)`` float32, not normalised.

        Raises:
            ValueError: another width than the teacher was fitted on.
        """
        return _project("image", image, self.image_columns, self.image_mean, self.image_weight)

    def project_text(self, text: Float[ArrayLike, "n dy"]) -> Float[Array, "n d"]:
        """Text rows in the shared space: ``(unit_rows(text) - text_mean) @ text_weight``.

        With ``text_columns`` the unit rows are standardised by column and unit rows again first.

        Args:
            text: ``(n, dy)`` raw features of any floating dtype.

        Returns:
            ``(n, d)`` float32, not normalised.

        Raises:
            ValueError: another width than the teacher was fitted on.
        """
        return _project("text", text, self.text_columns, self.text_mean, self.text_weight)

    def affinity(
        self, image: Float[ArrayLike, "n dx"], text: Float[ArrayLike, "m dy"]
    ) -> Float[Array, "n m"]:
        """Cosines of the projected rows: the teacher's affinity K*.

        Args:
            image: ``(n, dx)`` raw image features.
            text: ``(m, dy)`` raw text features.

        Returns:
            ``(n, m)`` float32 in [-1, 1]; a row that projects to zero has cosine 0.

        Raises:
            ValueError: another width than the teacher was fitted on.
        """
        image, text = unit_rows(self.project_image(image)), unit_rows(self.project_text(text))
        return jnp.matmul(image, text.T, precision=_HIGHEST)


def procrustes(moments: Moments, *, dim: int | None = None) -> LinearTeacher:
    """The orthogonal maps under which the pairs agree best.

    ``A^T B = U S V^T`` for centred unit rows A, B; the weights are the leading columns of U and V,
    which maximise ``tr(Wx^T A^T B Wy)`` among matrices with orthonormal columns.

    Args:
        moments: of the pairs; about their own means, or `recentered`.
        dim: number of directions; default as many as the data support, the rank of ``A^T B``
            (never more than dx, dy, or the number of pairs, less one about their own means).

    Returns:
        A `LinearTeacher`; ``correlations`` are those of the projected pairs, in the order of the
        singular values. The largest entry of each image direction is positive.

    Raises:
        ValueError: ``moments`` hold no usable pair, NaN, or one pair about its own mean; ``dim`` is
            below 1 or more than the data support.

    References:
        SOTAlign (arXiv 2602.23353), section 4 (Procrustes teacher); Schönemann (1966).
    """
    image_noise, text_noise = _check_moments(moments)
    image, values, text = _svd(moments.cross_scatter)
    image_total = max(float(np.trace(moments.image_scatter)), 0.0)
    text_total = max(float(np.trace(moments.text_scatter)), 0.0)
    noise = np.sqrt(image_total * text_noise) + np.sqrt(image_noise * text_total)
    noise += max(moments.cross_scatter.shape) * _EPS * np.sqrt(image_total * text_total)
    rank = min(int(np.sum(values > noise)), int(moments.count))
    if rank == 0:
        raise ValueError(
            "moments: images and texts of the pairs do not vary together; no direction to fit"
        )
    dim = _check_dim(dim, rank, f"{moments.count} pairs, cross scatter of rank {rank}")
    image, text, values = image[:, :dim], text[:, :dim], values[:dim]
    image_power = np.sum(image * (moments.image_scatter @ image), axis=0)
    text_power = np.sum(text * (moments.text_scatter @ text), axis=0)
    return _teacher(moments, image, text, values / np.sqrt(image_power * text_power))


def cca(
    moments: Moments,
    *,
    ridge: float = 0.1,
    ridge_on: Literal["covariance", "scatter"] = "covariance",
    weighted: bool = False,
    dim: int | None = None,
) -> LinearTeacher:
    """Ridge canonical correlation analysis of the pairs.

    With covariances ``Sxx, Syy, Sxy`` over n - 1 of centred unit rows and
    ``(Sxx + ridge I)^-1/2 Sxy (Syy + ridge I)^-1/2 = U S V^T``, the weights are
    ``Wx = (Sxx + ridge I)^-1/2 U`` and ``Wy = (Syy + ridge I)^-1/2 V``, so that
    ``Wx^T (Sxx + ridge I) Wx = I`` and ``Wx^T Sxy Wy = diag(S)``. Directions in which the pairs do
    not vary are left out before anything is inverted; ``ridge=0`` is therefore the pseudo-inverse
    CCA, which with fewer pairs than dimensions fits them perfectly and generalises badly.

    The trace of a covariance of unit rows is at most 1, so the default ridge outweighs all but the
    first few eigenvalues: such a CCA stands close to `procrustes`.

    Args:
        moments: of two or more pairs; about their own means, or `recentered`.
        ridge: lambda >= 0, in units of a covariance of unit rows (default 0.1, the paper's).
        ridge_on: what lambda is added to: the "covariance" over n - 1 (default; the authors' code),
            or the "scatter" ``A^T A`` (the paper's appendix C), which equals a covariance ridge of
            ``ridge / (n - 1)``. The weights are in covariance units either way.
        weighted: multiply both projections by the root of the canonical correlations, which gives
            directions that agree more a larger say in the cosine (default False).
        dim: number of directions; default as many as the data support, the smaller rank of the two
            covariances (never more than dx, dy, or the number of pairs, less one about their own
            means).

    Returns:
        A `LinearTeacher`; ``correlations`` are S, in descending order. The largest entry of each
        image direction is positive.

    Raises:
        ValueError: ``moments`` hold fewer than two pairs, NaN, or no variation on one side;
            ``ridge`` is negative or not finite; ``ridge_on`` is unknown; ``dim`` is below 1 or more
            than the data support.

    References:
        SOTAlign (arXiv 2602.23353), section 4 and appendix C; weighting after CSA (Li et al., ICLR
        2025), there applied after normalisation.
    """
    if ridge_on not in ("covariance", "scatter"):
        raise ValueError(f"ridge_on={ridge_on!r}: unknown; 'covariance' or 'scatter'")
    if not (np.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge={ridge}: must be finite and at least 0")
    if moments.count == 1:
        raise ValueError(
            "moments: cca needs at least 2 pairs, got 1; use procrustes on recentered moments"
        )
    image_noise, text_noise = _check_moments(moments)
    degrees = moments.count - 1
    if ridge_on == "scatter":
        ridge = ridge / degrees
    image_white = _whitener(moments.image_scatter, image_noise, moments.count, ridge)
    text_white = _whitener(moments.text_scatter, text_noise, moments.count, ridge)
    ranks = image_white.shape[1], text_white.shape[1]
    dim = _check_dim(
        dim, min(ranks), f"{moments.count} pairs, image rank {ranks[0]}, text rank {ranks[1]}"
    )
    image, values, text = _svd(image_white.T @ (moments.cross_scatter / degrees) @ text_white)
    correlations = np.clip(values[:dim], 0.0, 1.0)
    image, text = image_white @ image[:, :dim], text_white @ text[:, :dim]
    if weighted:
        image, text = image * np.sqrt(correlations), text * np.sqrt(correlations)
    return _teacher(moments, image, text, correlations)


def _project(
    name: str, rows, columns: Columns | None, mean: jax.Array, weight: jax.Array
) -> jax.Array:
    rows = jnp.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] != mean.shape[0]:
        raise ValueError(f"{name}: shape {rows.shape}; the teacher takes (n, {mean.shape[0]})")
    rows = standardized_rows(unit_rows(rows), columns)
    return jnp.matmul(rows - mean[None, :], weight, precision=_HIGHEST)


def _check_moments(moments: Moments) -> tuple[float, float]:
    """The rounding noise in the traces of both scatters, of moments that can be fitted."""
    for name, value in zip(moments._fields, moments, strict=True):
        if not np.isfinite(value).all():
            raise ValueError(f"moments: {name} holds NaN or infinity; every feature must be finite")
    if moments.count < 1:
        raise ValueError("moments: hold no pairs; at least one is needed")
    noises = []
    for name, mean, scatter in (
        ("image", moments.image_mean, moments.image_scatter),
        ("text", moments.text_mean, moments.text_scatter),
    ):
        # A deviation from the mean is exact to a few units in the last place of the mean.
        noise = moments.count * len(mean) * (16 * _EPS * np.abs(mean).max()) ** 2
        if np.trace(scatter) <= len(mean) * noise:
            if moments.count == 1:
                raise ValueError(
                    "moments: nothing is left of one pair about its own mean; recentre it on other "
                    "means, of the unpaired rows, with recentered(moments, image_mean, text_mean)"
                )
            raise ValueError(
                f"moments: all {moments.count} {name} rows are the same; they must vary"
            )
        noises.append(float(noise))
    return noises[0], noises[1]


def _check_dim(dim: int | None, supported: int, why: str) -> int:
    if dim is None:
        return supported
    if dim < 1:
        raise ValueError(f"dim={dim}: must be at least 1, or None for all that the pairs support")
    if dim > supported:
        raise ValueError(
            f"dim={dim}: the pairs support at most {supported} ({why}); None takes them all"
        )
    return dim


def _whitener(scatter: np.ndarray, noise: float, count: int, ridge: float) -> np.ndarray:
    """``(dx, r)``: eigenvectors of the covariance's range, over the roots of eigenvalue + ridge."""
    values, vectors = np.linalg.eigh(scatter)
    floor = max(len(scatter) * _EPS * float(values[-1]), noise)
    # No more than `count` directions can be real, whatever rounding has left above the floor.
    kept = np.flatnonzero(values > floor)[-count:]
    return vectors[:, kept] / np.sqrt(values[kept] / (count - 1) + ridge)


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin SVD as columns: ``matrix = left @ diag(values) @ right.T``."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return left, values, right.T


def _teacher(
    moments: Moments, image: np.ndarray, text: np.ndarray, correlations: np.ndarray
) -> LinearTeacher:
    """The fitted teacher in float32, each direction's sign fixed by its largest image entry."""
    largest = np.abs(image).argmax(axis=0)
    sign = np.where(image[largest, np.arange(image.shape[1])] < 0, -1.0, 1.0)
    arrays = image * sign, text * sign, moments.image_mean, moments.text_mean
    return LinearTeacher(
        *(jnp.asarray(array, jnp.float32) for array in arrays),
        correlations=jnp.asarray(np.clip(correlations, 0.0, 1.0), jnp.float32),
    )
