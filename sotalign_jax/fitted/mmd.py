"""Maximum mean discrepancy, and a residual network that makes it small."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.fitted.base import checked_rows
from sotalign_jax.fitted.graph import squared_distances
from sotalign_jax.fitted.networks import Layers, apply_layers, drawn_batches, drawn_layers

__all__ = ["Residual", "mmd", "residual_map"]

MULTIPLIERS = (0.5, 1.0, 2.0)
# Rows a side that are held out at most: their kernel is formed whole.
_MOST_HELD_OUT = 1_000
_WEIGHT_DECAY = 1e-2


class Residual(NamedTuple):
    """``x + MLP(x)`` with ReLU between the layers (a pytree).

    Attributes:
        layers: ``"0"``, ``"1"``, ...: the weight and bias of a layer.
    """

    layers: Layers

    @jax.jit
    def __call__(self, rows: Float[ArrayLike, "n d"]) -> Float[Array, "n d"]:
        """The rows, moved."""
        rows = jnp.asarray(rows)
        return rows + apply_layers(self.layers, rows, jax.nn.relu)


def mmd(
    x: Float[ArrayLike, "n d"],
    y: Float[ArrayLike, "m d"],
    *,
    multipliers: Sequence[float] = MULTIPLIERS,
) -> Float[Array, ""]:
    r"""Squared maximum mean discrepancy of two samples, the biased estimate.

    .. math:: \overline{k(X, X)} - 2 \overline{k(X, Y)} + \overline{k(Y, Y)}, \qquad
              k(x, y) = \sum_c \exp(-\|x - y\|^2 / (c s))

    with ``s`` the mean squared distance between different rows of both samples together, a constant
    for the gradient.

    Args:
        x: ``(n, d)`` float32.
        y: ``(m, d)``.
        multipliers: ``c`` (default 1/2, 1 and 2).

    Returns:
        Float32 scalar, zero for equal samples and not negative but for rounding.

    Raises:
        ValueError: the widths differ.

    References:
        A. Gretton et al., "A kernel two-sample test", JMLR 2012; SUE (Yacobi et al., arXiv
        2505.21524) for the bandwidths.
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: {y.shape[1]} columns, but x has {x.shape[1]}")
    return _mmd(x, y, tuple(multipliers))


@functools.partial(jax.jit, static_argnames=("multipliers",))
def _mmd(x, y, multipliers: tuple[float, ...]):
    n, both = x.shape[0], jnp.concatenate([x, y])
    # Distances do not see where the rows are, but their rounding does.
    both -= jax.lax.stop_gradient(jnp.mean(both, axis=0, keepdims=True))
    squares = squared_distances(both, both)
    count = both.shape[0]
    scale = jax.lax.stop_gradient(jnp.sum(squares)) / (count * count - count)
    scale = jnp.where(scale > 0, scale, 1.0)
    kernel = jnp.zeros_like(squares)
    for c in multipliers:
        kernel += jnp.exp(-squares / (c * scale))
    return jnp.mean(kernel[:n, :n]) - 2.0 * jnp.mean(kernel[:n, n:]) + jnp.mean(kernel[n:, n:])


def residual_map(
    source: Float[ArrayLike, "n d"],
    target: Float[ArrayLike, "m d"],
    *,
    hidden: Sequence[int] = (32, 32),
    epochs: int = 100,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Residual:
    """Trains a `Residual` that gives one sample the distribution of another, by their `mmd`.

    It starts as the identity, and what is returned is the best on a tenth of either sample, held
    out, after any epoch or at the start: no worse there than doing nothing. Batches of the two are
    drawn independently; an epoch is one pass over the shorter.

    Args:
        source: ``(n, d)`` rows to move.
        target: ``(m, d)`` rows to be like; no row belongs to another.
        hidden: widths of the hidden layers (default 32, 32; in the paper, but not its code, three
            blocks 128 wide).
        epochs: 100 by default; 0 returns the identity.
        batch_size: rows of either in a batch (default 32).
        learning_rate: of AdamW (default 1e-3), with a weight decay of 0.01.
        seed: of the start, the batches, and what is held out (default 0).
        progress: told the epochs done, and how many there are.

    Returns:
        `Residual`.

    Raises:
        ValueError: an argument is out of range, or a sample too small or not finite.
        FloatingPointError: no epoch had a finite discrepancy.

    References:
        SUE (Yacobi et al., arXiv 2505.21524), third stage.
    """
    sides = []
    for name, given in (("source", source), ("target", target)):
        rows = checked_rows(name, np.asarray(given, np.float32))
        if len(rows) < 4:
            raise ValueError(f"{name}: {len(rows)} rows; at least 4 are needed")
        sides.append(rows)
    dim = sides[0].shape[1]
    if sides[1].shape[1] != dim:
        raise ValueError(f"target: {sides[1].shape[1]} columns, but source has {dim}")
    if epochs < 0:
        raise ValueError(f"epochs: got {epochs}; must be at least 0")
    if batch_size < 2:
        raise ValueError(f"batch_size: got {batch_size}; must be at least 2")
    if not hidden or min(hidden) < 1:
        raise ValueError(
            f"hidden: got {tuple(hidden)}; one or more widths of at least 1 are needed"
        )
    if not 0 < learning_rate < float("inf"):
        raise ValueError(f"learning_rate: got {learning_rate}; must be positive and finite")

    rng = np.random.default_rng(seed)
    start = _identity(rng, (dim, *hidden, dim))
    if epochs == 0:
        return start
    training, held_out = [], []
    for rows in sides:
        count = min(max(2, len(rows) // 10), _MOST_HELD_OUT)
        order = rng.permutation(len(rows))
        held_out.append(jnp.asarray(rows[np.sort(order[:count])]))
        training.append(jnp.asarray(rows[np.sort(order[count:])]))
    size = min(batch_size, *(len(rows) for rows in training))
    optimizer = optax.adamw(learning_rate, weight_decay=_WEIGHT_DECAY)
    state = start, optimizer.init(start), start, mmd(*held_out)
    first = state[3]
    for epoch in range(epochs):
        batches = drawn_batches(rng, [len(rows) for rows in training], size)
        state = _epoch(state, *training, *held_out, batches, learning_rate)
        if progress is not None:
            progress(epoch + 1, epochs)
    if not np.isfinite(first) or not np.isfinite(state[3]):
        raise FloatingPointError(f"residual_map: a discrepancy of {first} at the start")
    return state[2]


def _identity(rng: np.random.Generator, widths: Sequence[int]) -> Residual:
    layers = drawn_layers(rng, widths)
    last = str(len(layers) - 1)
    return Residual({**layers, last: jax.tree.map(jnp.zeros_like, layers[last])})


@jax.jit
def _epoch(state, source, target, held_source, held_target, batches, learning_rate):
    """One pass over the shorter sample, and the best so far."""
    residual, optimizer_state, best, best_value = state
    optimizer = optax.adamw(learning_rate, weight_decay=_WEIGHT_DECAY)

    def step(state, rows):
        residual, optimizer_state = state
        gradient = jax.grad(lambda r: mmd(r(source[rows[0]]), target[rows[1]]))(residual)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, residual)
        return (jax.tree.map(jnp.add, residual, updates), optimizer_state), None

    (residual, optimizer_state), _ = jax.lax.scan(step, (residual, optimizer_state), batches)
    value = mmd(residual(held_source), held_target)
    # False where the value is NaN: what stopped being finite is never the best.
    better = value < best_value
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), residual, best)
    return residual, optimizer_state, best, jnp.where(better, value, best_value)
