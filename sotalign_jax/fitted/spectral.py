"""Spectral embedding by eigenvectors of a graph, carried over to rows that are not in it."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.fitted.base import checked_rows
from sotalign_jax.fitted.graph import (
    Prepared,
    last_neighbour,
    log_weights,
    neighbour_graph,
    prepared_by,
    squared_distances,
)
from sotalign_jax.transport.streamed import over_blocks

__all__ = ["Nystrom", "check_neighbours", "drawn", "nystrom", "varying_rows"]

_HIGHEST = jax.lax.Precision.HIGHEST
# Rows whose distances to all landmarks are held at once.
_BLOCK = 256
# The extension divides by the eigenvalue of the walk, and with it the rounding of the weights.
_SMALLEST_EIGENVALUE = 1e-2


class Nystrom(NamedTuple):
    """Leading eigenvectors of a random walk on landmarks, which extend to any row (a pytree).

    Attributes:
        center: ``(d,)``, subtracted from rows.
        scale: ``(1,)``, what they are then divided by.
        landmarks: ``(m, d)`` float32 rows of the graph, so moved and scaled.
        radius: ``(m,)`` squared distance of the last neighbour of each.
        bandwidth: ``(1,)`` of the Gaussian weights.
        vectors: ``(m, k)`` the eigenvectors at the landmarks, each over its eigenvalue.
        eigenvalues: ``(k,)`` of the walk ``D^-1 W``, descending from 1; those of the normalised
            Laplacian are one minus these.
    """

    center: Float[Array, "d"]
    scale: Float[Array, "1"]
    landmarks: Float[Array, "m d"]
    radius: Float[Array, "m"]
    bandwidth: Float[Array, "1"]
    vectors: Float[Array, "m k"]
    eigenvalues: Float[Array, "k"]

    @functools.partial(jax.jit, static_argnames=("neighbours",))
    def embed(self, rows: Float[ArrayLike, "n d"], *, neighbours: int = 30) -> Float[Array, "n k"]:
        r"""The eigenvectors at these rows.

        .. math:: \psi(x) = \frac{1}{\mu} \frac{\sum_j w(x, x_j) \psi_j}{\sum_j w(x, x_j)}

        with the weights that the graph would have: at a landmark this is its own entry. A row far
        from all landmarks is like the nearest.

        Args:
            rows: ``(n, d)`` float32.
            neighbours: what the graph was made with.

        Returns:
            ``(n, k)`` float32.

        Raises:
            ValueError: rows of another width.
        """
        rows, prepared = jnp.asarray(rows), Prepared(self.center, self.scale)
        if rows.ndim != 2 or rows.shape[1] != self.landmarks.shape[1]:
            raise ValueError(
                f"rows: got shape {rows.shape}; expected (n, {self.landmarks.shape[1]})"
            )

        def embedded(carry, block):
            squares = squared_distances(prepared(block), self.landmarks)
            radius = last_neighbour(squares, neighbours)
            weights = log_weights(squares, radius, self.radius, self.bandwidth)
            # The quotient of sums, whatever their scale: far from all landmarks both underflow.
            walk = jax.nn.softmax(weights, axis=1)
            return carry, jnp.matmul(walk, self.vectors, precision=_HIGHEST)

        return over_blocks(embedded, (), rows, _BLOCK)[1]


def nystrom(
    rows: Float[ArrayLike, "n d"],
    *,
    dim: int = 30,
    neighbours: int = 30,
    scale_neighbour: int = 15,
    landmarks: int = 2_000,
    seed: int = 0,
) -> Nystrom:
    """Spectral embedding by the exact eigenvectors of `neighbour_graph`, on some of the rows.

    The eigenvectors ``D^-1 W psi = mu psi`` are those of the normalised Laplacian ``1 - D^-1/2 W
    D^-1/2``, times ``D^-1/2``: constant on every connected part where ``mu = 1``. They are scaled
    to ``psi^T D psi = tr(D)``, so that their mean square over the graph is one, and the largest
    entry of each is positive. The first is the constant where the graph is connected.

    Args:
        rows: ``(n, d)`` rows to embed, any floating dtype.
        dim: number of eigenvectors (default 30).
        neighbours: of each row in the graph, beside itself (default 30).
        scale_neighbour: which of the nearest sets the bandwidth, the row itself the first (default
            15).
        landmarks: rows of the graph at most (default 2,000); of more rows, so many drawn without
            repetition. Eigenvectors take time cubic in them: 2,000 about 3 s, 4,000 half a minute.
        seed: of the draw (default 0).

    Returns:
        `Nystrom`. Weights are float32, eigenvectors float64 on the host until they are scaled.

    Raises:
        ValueError: an argument is out of range, rows are too few, all the same, or not finite, or
            the graph has fewer than ``dim`` eigenvectors that can be extended.

    References:
        Y. Bengio et al., "Out-of-sample extensions for LLE, Isomap, MDS, eigenmaps, and spectral
        clustering", NeurIPS 2003; J. Shi and J. Malik, "Normalized cuts", 2000.
    """
    rows = varying_rows(rows)
    check_neighbours(neighbours, scale_neighbour, min(landmarks, len(rows)), "landmarks")
    chosen = drawn(rows, landmarks, np.random.default_rng(seed))
    if not 1 <= dim < len(chosen):
        raise ValueError(
            f"dim: got {dim}; must lie between 1 and {len(chosen) - 1}, rows of the graph"
        )
    prepared = prepared_by(chosen)
    chosen = prepared(jnp.asarray(chosen))
    graph = neighbour_graph(chosen, neighbours=neighbours, scale_neighbour=scale_neighbour)
    weights = np.asarray(graph.weights, np.float64)
    degree = weights.sum(axis=1)
    root = np.sqrt(degree)
    values, vectors = np.linalg.eigh(weights / root[:, None] / root[None, :])
    values, vectors = values[::-1][:dim], vectors[:, ::-1][:, :dim]
    if values[-1] < _SMALLEST_EIGENVALUE:
        usable = int(np.sum(values >= _SMALLEST_EIGENVALUE))
        raise ValueError(f"dim: got {dim}; only {usable} eigenvectors can be extended to new rows")
    vectors = vectors / root[:, None] * np.sqrt(degree.sum())
    largest = np.abs(vectors).argmax(axis=0)
    vectors *= np.where(vectors[largest, np.arange(dim)] < 0, -1.0, 1.0)
    return Nystrom(
        prepared.center,
        prepared.scale,
        chosen,
        graph.radius,
        graph.bandwidth,
        jnp.asarray(vectors / values, jnp.float32),
        jnp.asarray(values, jnp.float32),
    )


def varying_rows(rows: ArrayLike) -> np.ndarray:
    """Rows as a float32 matrix on the host, or a ValueError where they cannot be embedded."""
    with np.errstate(over="ignore"):
        rows = checked_rows("rows", np.asarray(rows, np.float32))
    if (rows == rows[:1]).all():
        raise ValueError(f"rows: all {len(rows)} are the same; they must vary")
    return rows


def check_neighbours(neighbours: int, scale_neighbour: int, rows: int, what: str) -> None:
    """Raises ValueError unless a graph of so many rows can have these neighbours."""
    if neighbours < 1:
        raise ValueError(f"neighbours: got {neighbours}; must be at least 1")
    if rows <= neighbours:
        raise ValueError(
            f"neighbours: got {neighbours}; a graph of {rows} rows needs more of them than that; "
            f"lower it, or give more rows or {what}"
        )
    if not 2 <= scale_neighbour <= neighbours + 1:
        raise ValueError(
            f"scale_neighbour: got {scale_neighbour}; must lie between 2 and {neighbours + 1}, the "
            "row itself being the first"
        )


def drawn(rows: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most ``count`` of the rows, drawn without repetition, in their order."""
    if len(rows) <= count:
        return rows
    return rows[np.sort(rng.choice(len(rows), count, replace=False))]
