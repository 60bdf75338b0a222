"""Cosine affinities, and the check that two sets of embeddings describe the same rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.numerics import unit_rows

__all__ = ["check_same_dim", "check_same_rows", "cosine_affinity"]


def cosine_affinity(
    image: Float[ArrayLike, "n d"], text: Float[ArrayLike, "m d"]
) -> Float[Array, "n m"]:
    """Cosines of all rows of ``image`` and ``text``, float32 at full matrix precision.

    Plain bfloat16 products are not enough: Sinkhorn at small epsilon never converges on them.
    """
    check_same_dim(image, text)
    return jnp.matmul(unit_rows(image), unit_rows(text).T, precision=jax.lax.Precision.HIGHEST)


def check_same_dim(image, text) -> None:
    """Raise unless image and text embeddings live in one space."""
    if jnp.shape(image)[-1] != jnp.shape(text)[-1]:
        raise ValueError(
            f"image and text embeddings must have one dimension, got {jnp.shape(image)[-1]} "
            f"and {jnp.shape(text)[-1]}"
        )


def check_same_rows(image, text, teacher_image, teacher_text) -> None:
    """Raise unless student and teacher embed equally many images, and equally many texts."""
    for side, student, teacher in (("image", image, teacher_image), ("text", text, teacher_text)):
        if jnp.ndim(student) != 2 or jnp.ndim(teacher) != 2:
            raise ValueError(f"{side} and teacher_{side} must be matrices of embeddings")
        if jnp.shape(student)[0] != jnp.shape(teacher)[0]:
            raise ValueError(
                f"teacher_{side} must embed the same rows as {side}: got "
                f"{jnp.shape(teacher)[0]} rows for {jnp.shape(student)[0]}"
            )
