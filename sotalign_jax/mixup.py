"""Mixtures of pairs in latent space, for any loss on pairs: pure, a key and rows in, rows out."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

__all__ = ["fusemix"]


def fusemix(
    key: Key[Array, ""],
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "n e"],
    *,
    alpha: float | Float[ArrayLike, ""] = 1.0,
    partners: Literal["halves", "roll"] = "halves",
    per_row: bool = False,
) -> tuple[Float[Array, "k d"], Float[Array, "k e"]]:
    r"""FuseMix: frozen features of two pairs mixed in the same proportion on both sides.

    .. math:: \mathrm{image}'_i = \lambda\,\mathrm{image}_i + (1 - \lambda)\,\mathrm{image}_j,
              \qquad \mathrm{text}'_i = \lambda\,\mathrm{text}_i + (1 - \lambda)\,\mathrm{text}_j,
              \qquad \lambda \sim \mathrm{Beta}(\alpha, \alpha)

    Rows are mixed as they come, not scaled to unit length.

    Args:
        key: of the mixing proportions; a new one each step.
        image: ``(n, d)`` image features, any floating dtype.
        text: ``(n, e)`` text features; text ``i`` belongs to image ``i``.
        alpha: of the Beta distribution; 1 is uniform, towards 0 pairs are hardly mixed. Traced
            values are not checked.
        partners: ``"halves"``: pair ``i`` of the first half with pair ``i`` of the second, so that
            ``k = n / 2`` mixtures come out, as in FuseMix; ``"roll"``: with the pair half a batch
            further on, cyclically, ``k = n``, as in STRUCTURE's version.
        per_row: draw a proportion for each mixture, not one for all as both do.

    Returns:
        The ``(k, d)`` images and ``(k, e)`` texts, float32; text ``i`` belongs to image ``i``.

    Raises:
        ValueError: if image and text differ in number, there are fewer than 2 (or, for
            ``"halves"``, oddly many), or an option is unknown or out of range.

    References:
        N. Vouitsis et al., "Data-efficient multimodal fusion on a single GPU", CVPR 2024.
    """
    n = jnp.shape(image)[0]
    if jnp.shape(text)[0] != n:
        raise ValueError(
            f"image and text must pair row by row, got {n} and {jnp.shape(text)[0]} rows"
        )
    if n < 2:
        raise ValueError(f"image and text must have at least 2 rows to mix, got {n}")
    if not isinstance(alpha, Tracer) and not 0 < np.asarray(alpha) < np.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")
    if partners not in ("halves", "roll"):
        raise ValueError(f"partners must be 'halves' or 'roll', got {partners!r}")
    if partners == "halves" and n % 2:
        raise ValueError(f"partners='halves' needs an even number of rows, got {n}")
    half = n // 2
    mixtures = half if partners == "halves" else n
    share = jax.random.beta(key, alpha, alpha, (mixtures if per_row else 1, 1), jnp.float32)

    def mix(rows):
        rows = jnp.asarray(rows).astype(jnp.float32)
        # Shifted by half, the second half stands beside the first.
        return share * rows[:mixtures] + (1.0 - share) * jnp.roll(rows, -half, axis=0)[:mixtures]

    return mix(image), mix(text)
