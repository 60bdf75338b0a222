"""Spectral embedding by a network: SpectralNet, trained on graphs of batches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.fitted.graph import Prepared, neighbour_graph, prepared_by
from sotalign_jax.fitted.networks import Layers, apply_layers, drawn_batches, drawn_layers
from sotalign_jax.fitted.spectral import check_neighbours, drawn, varying_rows

__all__ = ["SpectralNet", "orthonormalizing", "rayleigh", "spectral_net"]

_HIGHEST = jax.lax.Precision.HIGHEST
# More than the rounding of a Gram matrix, which then has a Cholesky decomposition.
_SHIFT = 2e-6
# Share of the rows that is held out.
_VALIDATION = 0.1
# After 10 epochs without a lower loss on what is held out, the step is cut to a tenth.
_PLATEAU = optax.contrib.reduce_on_plateau(factor=0.1, patience=10)
# After two cuts.
_SMALLEST_STEP = 0.02


class SpectralNet(NamedTuple):
    """A network whose outputs are near the leading eigenvectors of the data's graph (a pytree).

    Attributes:
        center: ``(d,)``, subtracted from rows.
        scale: ``(1,)``, what they are then divided by.
        layers: ``"0"``, ``"1"``, ...: the weight and bias of a layer; LeakyReLU between them, tanh
            at the end.
        rotation: ``(k, k)`` what makes the outputs orthonormal and sorts them by smoothness.
    """

    center: Float[Array, "d"]
    scale: Float[Array, "1"]
    layers: Layers
    rotation: Float[Array, "k k"]

    @jax.jit
    def embed(self, rows: Float[ArrayLike, "n d"]) -> Float[Array, "n k"]:
        """Outputs for these rows, of mean square one over the rows it was fitted on.

        Args:
            rows: ``(n, d)`` float32.

        Returns:
            ``(n, k)`` float32.

        Raises:
            ValueError: rows of another width.
        """
        rows = jnp.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != len(self.center):
            raise ValueError(f"rows: got shape {rows.shape}; expected (n, {len(self.center)})")
        outputs = _outputs(self.layers, Prepared(self.center, self.scale)(rows))
        return jnp.matmul(outputs, self.rotation, precision=_HIGHEST)


def spectral_net(
    rows: Float[ArrayLike, "n d"],
    *,
    dim: int = 30,
    hidden: Sequence[int] = (256, 256),
    neighbours: int = 30,
    scale_neighbour: int = 15,
    epochs: int = 100,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    orthonormal: Literal["differentiated", "constant"] = "differentiated",
    landmarks: int = 2_000,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> SpectralNet:
    """Trains a network towards the leading eigenvectors of the graph Laplacian ``D - W``.

    Every step draws a batch, on whose graph its outputs are scored (`rayleigh`), and a second one,
    which says how to make them orthonormal first (`orthonormalizing`). Adam takes the step; a
    plateau of the loss on a tenth of the rows, 10 epochs long, cuts the learning rate to a tenth,
    and a second one ends the training early. At the end the outputs are made orthonormal over up to
    ``landmarks`` rows, and turned to the eigenvectors of ``Y^T L Y`` of their graph, ascending. All
    rows are held on the device.

    The defaults suit a few thousand rows on a CPU. Published: ``hidden=(4096, 4096, 1024)``,
    ``batch_size=5162`` (in the paper 4,096), ``learning_rate=1e-4``, ``orthonormal="constant"``.

    Args:
        rows: ``(n, d)`` rows to embed, any floating dtype.
        dim: number of outputs (default 30).
        hidden: widths of the hidden layers.
        neighbours: of each row in the graph of a batch, beside itself (default 30).
        scale_neighbour: which of the nearest sets the bandwidth, the row itself the first (default
            15).
        epochs: passes over nine tenths of the rows at most (default 100).
        batch_size: rows of a batch (default 512); all if there are fewer.
        learning_rate: of Adam (default 1e-3).
        orthonormal: what the gradient takes the second batch's matrix for: "differentiated"
            (default), a function of the network; or "constant", as published, where the step
            shrinks the outputs towards the only direction that costs nothing, the constant one, and
            on a few thousand rows learns little else.
        landmarks: rows that the outputs are made orthonormal and turned on (default 2,000).
        seed: of the start, the batches, and what is held out (default 0).
        progress: told the epochs done, and how many there may be.

    Returns:
        `SpectralNet`.

    Raises:
        ValueError: an argument is out of range, or rows are too few, all the same, or not finite.
        FloatingPointError: the loss stopped being finite, or outputs lost their rank.

    References:
        U. Shaham et al., "SpectralNet", ICLR 2018; SUE (Yacobi et al., arXiv 2505.21524).
    """
    rows = varying_rows(rows)
    held_out = max(2, int(_VALIDATION * len(rows)))
    size = min(batch_size, len(rows) - held_out)
    _check(dim, hidden, epochs, learning_rate, orthonormal, landmarks)
    check_neighbours(neighbours, scale_neighbour, min(size, landmarks), "a larger batch_size")
    if dim > size:
        raise ValueError(f"dim: got {dim}; the {size} rows of a batch cannot have so many outputs")

    rng = np.random.default_rng(seed)
    some = drawn(rows, landmarks, rng)
    order = rng.permutation(len(rows))
    prepared = prepared_by(some)
    validation = prepared(rows[np.sort(order[:held_out][:size])])
    training = prepared(rows[np.sort(order[held_out:])])
    options = _Options(neighbours, scale_neighbour, orthonormal == "constant")
    layers = drawn_layers(rng, (rows.shape[1], *hidden, dim))
    state = _State(layers, optax.scale_by_adam().init(layers), _PLATEAU.init({}))
    for epoch in range(epochs):
        batches = drawn_batches(rng, [len(training)] * 2, size)
        state, loss = _epoch(state, training, validation, batches, learning_rate, options)
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"spectral_net: the loss of epoch {epoch} of {epochs} is {loss}; lower "
                "learning_rate"
            )
        if progress is not None:
            progress(epoch + 1, epochs)
        if state.plateau.scale < _SMALLEST_STEP:
            break
    layers = state.layers

    reference = prepared(some)
    outputs = np.asarray(_outputs(layers, reference), np.float64)
    weights = np.asarray(
        neighbour_graph(reference, neighbours=neighbours, scale_neighbour=scale_neighbour).weights,
        np.float64,
    )
    rotation = jnp.asarray(_rotation(outputs, weights), jnp.float32)
    return SpectralNet(prepared.center, prepared.scale, layers, rotation)


def orthonormalizing(outputs: Float[ArrayLike, "n k"]) -> Float[Array, "k k"]:
    """The matrix ``sqrt(n) R^-1`` of ``outputs = Q R``, times which they are ``sqrt(n) Q``.

    R is found by Cholesky decompositions of the small Gram matrix, three times over, each of what
    the one before has left: as exact as Householder's, and no LAPACK call on the rows. Directions
    in which the outputs hardly vary, next to the others, stay small.

    Args:
        outputs: ``(n, k)`` float32.

    Returns:
        ``(k, k)``, upper triangular.

    References:
        T. Fukaya et al., "Shifted Cholesky QR", SIAM J. Sci. Comput. 2020.
    """
    outputs = jnp.asarray(outputs)
    n, k = outputs.shape
    whole = jnp.sqrt(float(n)) * jnp.eye(k)
    for _ in range(3):
        rows = jnp.matmul(outputs, whole, precision=_HIGHEST) / jnp.sqrt(float(n))
        gram = jnp.matmul(rows.T, rows, precision=_HIGHEST)
        shift = _SHIFT * jnp.trace(gram) * jnp.eye(k)
        upper = jnp.linalg.cholesky(gram + shift, upper=True)
        step = jax.scipy.linalg.solve_triangular(upper, jnp.eye(k))
        whole = jnp.matmul(whole, step, precision=_HIGHEST)
    return whole


def rayleigh(
    embeddings: Float[ArrayLike, "n k"], weights: Float[ArrayLike, "n m"]
) -> Float[Array, ""]:
    r"""How rough embeddings are over a graph: ``tr(Y^T (D - W) Y) / n``.

    .. math:: \frac{1}{2n} \sum_{ij} W_{ij} \|y_i - y_j\|^2

    Args:
        embeddings: ``(n, k)``.
        weights: ``(n, n)`` of the graph, symmetric.

    Returns:
        Scalar, not negative but for rounding.

    Raises:
        ValueError: the weights are not those of n rows.
    """
    embeddings, weights = jnp.asarray(embeddings), jnp.asarray(weights)
    n = embeddings.shape[0]
    if weights.shape != (n, n):
        raise ValueError(f"weights: got shape {weights.shape}; {n} embeddings need {(n, n)}")
    degree = jnp.sum(weights, axis=1)
    own = jnp.sum(degree * jnp.sum(embeddings * embeddings, axis=1))
    across = jnp.sum(embeddings * jnp.matmul(weights, embeddings, precision=_HIGHEST))
    return (own - across) / n


class _Options(NamedTuple):
    neighbours: int
    scale_neighbour: int
    constant: bool


class _State(NamedTuple):
    layers: Layers
    adam: Any
    plateau: Any


@functools.partial(jax.jit, static_argnames=("options",))
def _epoch(state: _State, training, validation, batches, learning_rate, options: _Options):
    """One pass over the training rows; the loss on the others says when to take smaller steps."""
    optimizer = optax.scale_by_adam()
    rate = learning_rate * state.plateau.scale

    def turning(layers, rows):
        turn = orthonormalizing(_outputs(layers, rows))
        return jax.lax.stop_gradient(turn) if options.constant else turn

    def score(layers, rows, turn):
        embeddings = jnp.matmul(_outputs(layers, rows), turn, precision=_HIGHEST)
        graph = neighbour_graph(
            rows, neighbours=options.neighbours, scale_neighbour=options.scale_neighbour
        )
        return rayleigh(embeddings, graph.weights)

    def step(carry, chosen):
        layers, adam = carry
        rows, others = training[chosen[0]], training[chosen[1]]
        loss, gradient = jax.value_and_grad(
            lambda layers: score(layers, rows, turning(layers, others))
        )(layers)
        updates, adam = optimizer.update(gradient, adam)
        layers = jax.tree.map(lambda value, update: value - rate * update, layers, updates)
        return (layers, adam), loss

    (layers, adam), losses = jax.lax.scan(step, (state.layers, state.adam), batches)
    held_out = score(layers, validation, turning(layers, training[batches[-1, 1]]))
    # It counts in integers and multiplies them with floats.
    with jax.numpy_dtype_promotion("standard"):
        _, plateau = _PLATEAU.update({}, state.plateau, value=held_out)
    return _State(layers, adam, plateau), jnp.mean(losses)


def _outputs(layers: Layers, rows):
    # Entries of the order of one, where rows have a length of one.
    rows = rows * jnp.sqrt(float(rows.shape[1]))
    return jnp.tanh(apply_layers(layers, rows, jax.nn.leaky_relu))


def _rotation(outputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What makes outputs orthonormal, and then diagonal in the Laplacian, ascending."""
    n = len(outputs)
    upper = np.linalg.qr(outputs, mode="r")
    size = np.abs(np.diag(upper))
    # Less is lost in the rounding of the outputs.
    if not size.min() > 1e-5 * size.max():
        raise FloatingPointError(
            f"spectral_net: the {len(size)} outputs lost their rank; lower learning_rate, ask for "
            "fewer dim, or use orthonormal='differentiated'"
        )
    turn = np.sqrt(n) * np.linalg.inv(upper)
    embeddings = outputs @ turn
    laplacian = embeddings.T @ (weights.sum(axis=1)[:, None] * embeddings - weights @ embeddings)
    _, vectors = np.linalg.eigh(laplacian)
    turn = turn @ vectors
    largest = np.abs(turn).argmax(axis=0)
    return turn * np.where(turn[largest, np.arange(len(size))] < 0, -1.0, 1.0)


def _check(dim, hidden, epochs, learning_rate, orthonormal, landmarks) -> None:
    for name, value in (("dim", dim), ("epochs", epochs), ("landmarks", landmarks)):
        if value < 1:
            raise ValueError(f"{name}: got {value}; must be at least 1")
    if not hidden or min(hidden) < 1:
        raise ValueError(
            f"hidden: got {tuple(hidden)}; one or more widths of at least 1 are needed"
        )
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate: got {learning_rate}; must be positive and finite")
    if orthonormal not in ("differentiated", "constant"):
        raise ValueError(
            f"orthonormal: got {orthonormal!r}; must be one of differentiated, constant"
        )
