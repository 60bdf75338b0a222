"""Small networks as plain arrays: how they start, what they compute, and batches for them."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

__all__ = ["Layers", "apply_layers", "drawn_batches", "drawn_layers"]

_HIGHEST = jax.lax.Precision.HIGHEST
# The weight and bias of layer "0", "1", ..., as what is saved names them.
Layers = dict[str, dict[str, Array]]


def drawn_layers(rng: np.random.Generator, widths: Sequence[int]) -> Layers:
    """Weights and biases as PyTorch starts them: uniform, up to the root of one over the inputs.

    Args:
        rng: source of the numbers, drawn on the host, where nothing is compiled for them.
        widths: of the input, the hidden layers, and the output.

    Returns:
        Float32 layers.
    """
    layers = {}
    for k, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        weight, bias = (
            rng.uniform(-(inputs**-0.5), inputs**-0.5, shape).astype(np.float32)
            for shape in ((inputs, outputs), (outputs,))
        )
        layers[str(k)] = {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)}
    return layers


def apply_layers(
    layers: Layers, rows: Float[Array, "n d"], activation: Callable[[Array], Array]
) -> Float[Array, "n k"]:
    """The output for these rows, with the activation between layers and not after the last."""
    for k in range(len(layers)):
        layer = layers[str(k)]
        rows = activation(rows) if k else rows
        rows = jnp.matmul(rows, layer["weight"], precision=_HIGHEST) + layer["bias"][None, :]
    return rows


def drawn_batches(rng: np.random.Generator, counts: Sequence[int], size: int) -> np.ndarray:
    """Batches of row numbers: one pass, in random order, over the shortest of several tables.

    Args:
        rng: source of the orders.
        counts: rows of each table.
        size: rows of a batch; what does not fill one is left out.

    Returns:
        ``(steps, tables, size)`` int32, drawn for each table by itself.
    """
    steps = min(counts) // size
    orders = [rng.permutation(count)[: steps * size].reshape(steps, size) for count in counts]
    return np.stack(orders, axis=1).astype(np.int32)
