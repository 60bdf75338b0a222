"""Neighbour graphs with Gaussian weights: what spectral embeddings are the eigenvectors of."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

__all__ = [
    "Graph",
    "Prepared",
    "last_neighbour",
    "log_weights",
    "neighbour_graph",
    "prepared_by",
    "squared_distances",
]

_HIGHEST = jax.lax.Precision.HIGHEST
# Squared distances of rows whose mean square is 1 are no more exact than this in float32, and those
# of rows far out by as much times their size.
_ROUNDING = 2e-6


class Prepared(NamedTuple):
    """What moves rows so that their squared distances are exact and of the order of one.

    Attributes:
        center: ``(d,)``, subtracted from the rows.
        scale: ``(1,)``, what they are then divided by: the root of their mean squared length.
    """

    center: Float[Array, "d"]
    scale: Float[Array, "1"]

    def __call__(self, rows: Float[ArrayLike, "n d"]) -> Float[Array, "n d"]:
        """The rows, moved and scaled."""
        return (jnp.asarray(rows) - self.center[None, :]) / self.scale[None, :]


class Graph(NamedTuple):
    """A symmetric graph of rows, dense.

    Attributes:
        weights: ``(n, n)``, at most 1, zero between rows neither of which is a neighbour of the
            other; the diagonal is 1.
        radius: ``(n,)`` squared distance of each row's last neighbour.
        bandwidth: ``(1,)`` the squared distance at which a weight is ``1 / e``.
    """

    weights: Float[Array, "n n"]
    radius: Float[Array, "n"]
    bandwidth: Float[Array, "1"]


@jax.jit
def prepared_by(rows: Float[ArrayLike, "n d"]) -> Prepared:
    """What gives these rows a mean of zero and a mean squared length of one.

    Args:
        rows: ``(n, d)`` float32.

    Returns:
        `Prepared`; rows that are all the same are only centred.
    """
    rows = jnp.asarray(rows)
    center = jnp.mean(rows, axis=0)
    square = jnp.mean(jnp.sum(jnp.square(rows - center[None, :]), axis=1))
    return Prepared(center, jnp.sqrt(jnp.where(square > 0, square, 1.0))[None])


@functools.partial(jax.jit, static_argnames=("neighbours", "scale_neighbour"))
def neighbour_graph(
    rows: Float[ArrayLike, "n d"], *, neighbours: int = 30, scale_neighbour: int = 15
) -> Graph:
    r"""The graph in which every row is tied to its nearest rows, by how near they are.

    With ``N(i)`` row i and its ``neighbours`` nearest others,

    .. math:: A_{ij} = [j \in N(i)] \exp(-\|x_i - x_j\|^2 / \sigma^2),
              \qquad W = (A + A^T) / 2

    and ``sigma`` the median distance of the ``scale_neighbour``-th of the nearest, of whom the row
    itself is the first. All rows as far away as the last neighbour are neighbours, so that the
    order of the rows does not matter.

    Args:
        rows: ``(n, d)`` float32, `Prepared`.
        neighbours: of each row, beside itself; ``n - 1`` if there are fewer. A static int.
        scale_neighbour: which of the nearest sets the bandwidth. A static int.

    Returns:
        `Graph`, float32.

    References:
        U. Shaham et al., "SpectralNet", ICLR 2018, with the one bandwidth for all rows of SUE
        (Yacobi et al., arXiv 2505.21524).
    """
    rows = jnp.asarray(rows)
    count = min(neighbours, rows.shape[0] - 1) + 1
    squares = squared_distances(rows, rows)
    nearest = _nearest(squares, count)
    radius = _beyond(nearest[:, -1])
    distance = jnp.median(jnp.sqrt(nearest[:, min(scale_neighbour, count) - 1]))
    # Copies of a row have no distance but its rounding.
    bandwidth = jnp.maximum(jnp.square(distance), 10 * _ROUNDING)[None]
    weights = jnp.exp(log_weights(squares, radius, radius, bandwidth))
    # Not left to the rounding of a distance of zero.
    weights = jnp.fill_diagonal(weights, 1.0, inplace=False)
    return Graph(weights, radius, bandwidth)


def last_neighbour(squares: Float[Array, "n m"], neighbours: int) -> Float[Array, "n"]:
    """The ``radius`` that a graph of the second rows gives the first, from squared distances."""
    return _beyond(_nearest(squares, neighbours + 1)[:, -1])


def log_weights(
    squares: Float[Array, "n m"],
    radius: Float[Array, "n"],
    other_radius: Float[Array, "m"],
    bandwidth: Float[Array, "1"],
) -> Float[Array, "n m"]:
    """Logarithm of the weights between two sets of rows; minus infinity where there is no tie.

    Args:
        squares: ``(n, m)`` squared distances.
        radius: ``(n,)`` squared distance of the last neighbour of each of the first rows.
        other_radius: ``(m,)`` the same of the second.
        bandwidth: of the graph.

    Returns:
        ``(n, m)``, of the symmetric weights.
    """
    ties = 0.5 * (squares <= radius[:, None]).astype(squares.dtype)
    ties += 0.5 * (squares <= other_radius[None, :]).astype(squares.dtype)
    return jnp.log(ties) - squares / bandwidth[None, :]


def squared_distances(x: Float[Array, "n d"], y: Float[Array, "m d"]) -> Float[Array, "n m"]:
    """``|x_i - y_j|^2`` by one product; exact to rounding of the squared lengths."""
    lengths = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)[None, :]
    return jnp.maximum(lengths - 2.0 * jnp.matmul(x, y.T, precision=_HIGHEST), 0.0)


def _beyond(squares):
    """A little further, so that rounding does not decide whether the last neighbour is one."""
    return squares + _ROUNDING * (1.0 + squares)


def _nearest(squares, count: int):
    return -jax.lax.top_k(-squares, count)[0]
