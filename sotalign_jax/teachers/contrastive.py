"""A linear teacher trained by gradient on the pairs alone."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.losses import info_nce, siglip
from sotalign_jax.numerics import Columns, standardized_rows, unit_rows, unit_rows64
from sotalign_jax.teachers.linear import LinearTeacher
from sotalign_jax.teachers.moments import checked_pairs, standardized_rows64

__all__ = ["contrastive"]


def contrastive(
    image: Float[ArrayLike, "n dx"],
    text: Float[ArrayLike, "m dy"],
    *,
    dim: int,
    loss: Literal["siglip", "info_nce"] = "siglip",
    steps: int = 2000,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-5,
    batch_size: int | None = None,
    scale: float = 20.0,
    bias: float = -10.0,
    seed: int = 0,
    init: LinearTeacher | None = None,
    image_columns: Columns | None = None,
    text_columns: Columns | None = None,
) -> LinearTeacher:
    """Linear maps trained on the pairs with SigLIP or InfoNCE, by Lion under one compiled scan.

    Minimises the loss of ``(unit_rows(image) - image_mean) @ Wx`` against the same of the texts,
    both L2-normalised inside the loss. The logarithm of the logit scale is learned, and SigLIP's
    bias; the learning rate warms up linearly over the first tenth of the steps and falls to 0 by a
    cosine.

    Args:
        image: ``(n, dx)`` raw image features of the pairs.
        text: ``(n, dy)`` raw text features; row i belongs to image row i.
        dim: dimension of the shared space.
        loss: "siglip" (default; mean over all n x n logits) or "info_nce".
        steps: gradient steps (default 2000).
        learning_rate: peak step of Lion (default 1e-4).
        weight_decay: decoupled, on all parameters (default 1e-5).
        batch_size: pairs a step, drawn without replacement; default all of them.
        scale: logit scale at the start (default 20).
        bias: logit bias at the start (default -10); info_nce has none.
        seed: of the random start and of the batches (default 0).
        init: start from this teacher's weights, and keep its means and columns; default
            Xavier-uniform weights and the means of the pairs.
        image_columns: standardise the columns of unit image rows by these; see `columns_of`.
        text_columns: the same for texts.

    Returns:
        A `LinearTeacher` whose ``correlations`` are ones.

    Raises:
        ValueError: an argument is out of range, the pairs differ in length or hold NaN, ``init``
            has other dimensions, or columns are given beside it.
        FloatingPointError: the loss or the weights stopped being finite (the step is named).

    References:
        SOTAlign (arXiv 2602.23353), section 4, contrastive teacher; SAIL (CVPR 2025) for the start
        of scale and bias; Lion (Chen et al., 2023).
    """
    image, text = checked_pairs(image, text, "image", "text")
    n, dx = image.shape
    dy = text.shape[1]
    if loss not in ("siglip", "info_nce"):
        raise ValueError(f"loss={loss!r}: unknown; 'siglip' or 'info_nce'")
    if n < 2:
        raise ValueError(f"image: {n} pairs; a contrastive loss needs at least 2")
    for name, value in (("dim", dim), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    for name, value in (("learning_rate", learning_rate), ("scale", scale)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: must be positive and finite")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay}: must be finite and at least 0")
    size = n if batch_size is None else batch_size
    if not 2 <= size <= n:
        raise ValueError(f"batch_size={batch_size}: must be between 2 and the {n} pairs")

    start_key, batch_key = jax.random.split(jax.random.key(seed))
    if init is None:
        xavier = jax.nn.initializers.glorot_uniform()
        image_key, text_key = jax.random.split(start_key)
        image_weight = xavier(image_key, (dx, dim), jnp.float32)
        text_weight = xavier(text_key, (dy, dim), jnp.float32)
        image_mean, text_mean = (
            jnp.asarray(standardized_rows64(unit_rows64(rows), columns).mean(axis=0), jnp.float32)
            for rows, columns in ((image, image_columns), (text, text_columns))
        )
    else:
        if image_columns is not None or text_columns is not None:
            raise ValueError("init: brings columns of its own; leave image_columns, text_columns")
        shapes = init.image_weight.shape, init.text_weight.shape
        if shapes != ((dx, dim), (dy, dim)):
            raise ValueError(
                f"init: weights {shapes[0]} and {shapes[1]}; "
                f"these pairs and dim={dim} need {(dx, dim)} and {(dy, dim)}"
            )
        image_weight, text_weight, image_mean, text_mean, _, image_columns, text_columns = init

    parameters = {
        "image_weight": image_weight,
        "text_weight": text_weight,
        "log_scale": jnp.log(jnp.float32(scale)),
    }
    if loss == "siglip":
        parameters["bias"] = jnp.float32(bias)
    with jax.default_matmul_precision("highest"):
        parameters, losses = _train(
            parameters,
            standardized_rows(unit_rows(image), image_columns) - image_mean[None, :],
            standardized_rows(unit_rows(text), text_columns) - text_mean[None, :],
            batch_key,
            loss=loss,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            batch_size=size,
        )
    bad = np.flatnonzero(~np.isfinite(np.asarray(losses)))
    if len(bad):
        raise FloatingPointError(
            f"contrastive: the loss at step {bad[0]} of {steps} is {losses[bad[0]]}; "
            "lower learning_rate"
        )
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(parameters)):
        raise FloatingPointError(
            f"contrastive: the last step, {steps - 1} of {steps}, left weights that are not "
            "finite; lower learning_rate"
        )
    return LinearTeacher(
        parameters["image_weight"],
        parameters["text_weight"],
        image_mean,
        text_mean,
        jnp.ones(dim, jnp.float32),
        image_columns,
        text_columns,
    )


@functools.partial(
    jax.jit, static_argnames=("loss", "steps", "learning_rate", "weight_decay", "batch_size")
)
def _train(
    parameters: dict[str, Float[Array, "..."]],
    image: Float[Array, "n dx"],
    text: Float[Array, "n dy"],
    key: jax.Array,
    *,
    loss: str,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
) -> tuple[dict[str, Float[Array, "..."]], Float[Array, "steps"]]:
    """All steps in one scan; returns the trained parameters and the loss before each step."""
    warmup = max(1, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(
        learning_rate / warmup, learning_rate, warmup, max(steps, warmup + 1)
    )
    # optax counts in integers and multiplies them with floats: a cast, where dtypes are strict.
    optimizer = optax.lion(
        lambda count: schedule(jnp.asarray(count, jnp.float32)), weight_decay=weight_decay
    )

    def loss_of(parameters, image, text):
        image, text = image @ parameters["image_weight"], text @ parameters["text_weight"]
        scale = jnp.exp(parameters["log_scale"])
        if loss == "siglip":
            return siglip(image, text, scale=scale, bias=parameters["bias"])
        return info_nce(image, text, scale=scale)

    def step(state, number):
        parameters, optimizer_state = state
        batch_image, batch_text = image, text
        if batch_size < len(image):
            draw = jax.random.fold_in(key, number)
            rows = jax.random.choice(draw, len(image), (batch_size,), replace=False)
            batch_image, batch_text = image[rows], text[rows]
        value, gradient = jax.value_and_grad(loss_of)(parameters, batch_image, batch_text)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, parameters)
        return (jax.tree.map(jnp.add, parameters, updates), optimizer_state), value

    start = parameters, optimizer.init(parameters)
    (parameters, _), losses = jax.lax.scan(step, start, jnp.arange(steps))
    return parameters, losses
