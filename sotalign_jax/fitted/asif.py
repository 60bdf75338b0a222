"""ASIF: an image and a text are alike if they resemble the same pairs, each in its own modality."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.fitted.base import (
    CHUNK,
    FittedAligner,
    Method,
    Options,
    checked_pairs,
    fitted_aligner,
    make_options,
    mean_row,
    static_field,
)
from sotalign_jax.numerics import unit_rows, unit_rows64

__all__ = ["ASIF", "Asif", "AsifOptions", "asif"]

_EPS = float(np.finfo(np.float64).eps)
# Similarities that are held at a time beside those that are returned.
_BLOCK = 2**24


@dataclasses.dataclass(frozen=True)
class AsifOptions(Options):
    """Options of `asif`.

    ``neighbours=0, power=1, center="pairs"`` is the dense variant without powers, "anchors".

    Attributes:
        neighbours: how many of a row's similarities to the pairs are kept, the highest; 0 keeps
            all. Those that tie with the last are kept too, so that the order of the pairs does not
            matter.
        power: what they are raised to, a whole number.
        center: "none" (default), or the rows whose mean is subtracted from rows of unit length,
            which then have unit length again: "pairs" or "unpaired".
    """

    neighbours: int = 800
    power: int = 8
    center: Literal["none", "pairs", "unpaired"] = "none"

    def check(self) -> None:
        if self.neighbours < 0:
            raise ValueError(
                f"neighbours: got {self.neighbours}; must be positive, or 0 for all pairs"
            )
        if self.power < 1:
            raise ValueError(f"power: got {self.power}; must be at least 1")


@fitted_aligner
class Asif(FittedAligner):
    """What `asif` fits: a row's similarities to the pairs, sparse, raised to a power, of length 1.

    Embeddings have a column a pair, so that those of many rows are best made by chunks. Where all
    similarities are kept as they are, they are never formed: with ``A^T B = U S V^T`` of the pairs'
    rows A and B, an image x and a text y have the similarity ``(x A^T)(y B^T)^T / (|x A^T| |y
    B^T|)``, where ``x U sqrt(S)`` and ``y V sqrt(S)`` have the same inner product, and ``|x A^T| =
    |x R|`` for any R with ``R R^T = A^T A``.

    Attributes:
        image_map: ``(dx, m)`` the unit image rows of the pairs as columns, or ``U sqrt(S)``.
        text_map: ``(dy, m)`` of texts.
        image_mean: ``(dx,)``, subtracted from unit rows; None with ``center="none"``.
        text_mean: ``(dy,)`` of texts.
        image_root: ``(dx, dx)`` R, where ``image_map`` is no table of rows; otherwise None.
        text_root: ``(dy, dy)`` of texts.
        options: the options of the fit.
    """

    kind: ClassVar[str] = "asif"
    image_map: Float[Array, "dx m"]
    text_map: Float[Array, "dy m"]
    image_mean: Float[Array, "dx"] | None = None
    text_mean: Float[Array, "dy"] | None = None
    image_root: Float[Array, "dx dx"] | None = None
    text_root: Float[Array, "dy dy"] | None = None
    options: AsifOptions = static_field()

    @property
    def image_dim(self) -> int:
        return self.image_map.shape[0]

    @property
    def text_dim(self) -> int:
        return self.text_map.shape[0]

    @property
    def dim(self) -> int:
        return self.image_map.shape[1]

    @property
    def unit(self) -> bool:
        return self.image_root is None

    @property
    def recipe(self) -> str:
        steps = [
            "for a row x of a side (image or text; its tensors start with the side's name)",
            "x = x / |x| (a row of zeros stays zero)",
        ]
        if self.image_mean is not None:
            steps.append("x = x - {side}_mean, x = x / |x|")
        steps.append("s = x @ {side}_map")
        if self.image_root is not None:
            steps.append("embedding = s / |x @ {side}_root|")
        else:
            if 0 < self.options.neighbours < self.dim:
                steps.append(f"s = s where it is among the {self.options.neighbours} highest, or 0")
            steps.append(f"s = s ** {self.options.power}")
            steps.append("embedding = s / |s|")
        steps.append("similarity = <image embedding, text embedding>")
        return "; ".join(steps)

    def _embed(self, side: str, rows: Float[Array, "n d"]) -> Float[Array, "n dim"]:
        mapping, mean, root = (getattr(self, f"{side}_{name}") for name in ("map", "mean", "root"))
        rows = unit_rows(rows)
        if mean is not None:
            rows = unit_rows(rows - mean[None, :])
        if root is not None:
            length = jnp.linalg.norm(jnp.matmul(rows, root), axis=1, keepdims=True)
            return jnp.matmul(rows, mapping) / jnp.where(length > 0, length, 1.0)
        # Sorting takes more memory than what comes out.
        block = max(1, _BLOCK // self.dim)
        if len(rows) <= block:
            return self._relative(jnp.matmul(rows, mapping))

        def one(row: Float[Array, "d"]) -> Float[Array, "m"]:
            return self._relative(jnp.matmul(row[None, :], mapping))[0]

        return jax.lax.map(one, rows, batch_size=block)

    def _relative(self, similarities: Float[Array, "n m"]) -> Float[Array, "n m"]:
        """The similarities of rows to the pairs, after all that is done to them."""
        kept, power = self.options.neighbours, self.options.power
        if 0 < kept < self.dim:
            last = jax.lax.top_k(similarities, kept)[0][:, -1:]
            similarities = jnp.where(similarities >= last, similarities, 0.0)
        # By the largest, or powers of small numbers would be nothing.
        largest = jnp.max(jnp.abs(similarities), axis=1, keepdims=True)
        return unit_rows((similarities / jnp.where(largest > 0, largest, 1.0)) ** power)


def asif(
    image: Float[ArrayLike, "n dx"],
    text: Float[ArrayLike, "m dy"],
    unpaired_image: Float[ArrayLike, "p ex"] | None = None,
    unpaired_text: Float[ArrayLike, "q ey"] | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Asif:
    """ASIF: rows described by their similarities to the pairs, which both modalities share.

    A row's cosines with the pairs of its own modality, all but the highest set to 0, are raised to
    a power and scaled to unit length; the similarity of an image and a text is the inner product
    of what came out. Nothing is fitted: the pairs are kept.

    An even power makes negative cosines positive, as in the published code; where there are fewer
    than about twice as many pairs as ``neighbours``, so that such cosines are among those kept,
    take fewer neighbours.

    Args:
        image: ``(n, dx)`` image rows of the pairs, any floating dtype.
        text: ``(n, dy)`` their text rows.
        unpaired_image: further image rows, read only for the means of ``center="unpaired"``.
        unpaired_text: further text rows, likewise.
        seed: nothing here is random; there for the sake of the other methods.
        **options: see `AsifOptions`.

    Returns:
        An `Asif`.

    Raises:
        ValueError: rows or options that cannot be used; rows of which centring leaves nothing.

    References:
        Norelli et al., ASIF: Coupled Data Turns Unimodal Models to Multimodal Without Training,
        NeurIPS 2023; Moschella et al., Relative Representations Enable Zero-Shot Latent Space
        Communication, ICLR 2023.
    """
    del seed
    settings = make_options(AsifOptions, options)
    image, text = checked_pairs(image, text)
    sides = {"image": image, "text": text}
    tables = sides
    if settings.center == "unpaired":
        tables = {"unpaired_image": unpaired_image, "unpaired_text": unpaired_text}
    means: dict[str, np.ndarray | None] = {"image": None, "text": None}
    if settings.center != "none":
        for (side, rows), (name, table) in zip(sides.items(), tables.items(), strict=True):
            means[side] = _mean(name, table, rows.shape[1])
    dense = settings.neighbours == 0 or settings.neighbours >= len(image)
    if dense and settings.power == 1 and len(image) > max(image.shape[1], text.shape[1]):
        arrays = _products(image, text, means)
    else:
        arrays = {
            f"{side}_map": np.concatenate(
                [chunk.astype(np.float32) for chunk in _prepared(rows, means[side])]
            ).T
            for side, rows in sides.items()
        }
    arrays |= {f"{side}_mean": mean for side, mean in means.items() if mean is not None}
    return Asif(
        options=settings,
        **{name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()},
    )


ASIF = Method(
    fit=asif,
    aligner=Asif,
    options=AsifOptions,
    published={},
    grid={"neighbours": (50, 100, 200, 400, 800, 1_600), "power": (1, 2, 4, 6, 8, 12)},
    reads_unpaired=lambda options: options.center == "unpaired",
)


def _mean(name: str, rows: ArrayLike | None, dim: int) -> np.ndarray:
    mean = mean_row(name, rows, dim)
    # A mean of unit rows has length 1 if they are all the same.
    if 1 - mean @ mean < 1e-12:
        raise ValueError(f"{name}: all rows point the same way; centring leaves nothing of them")
    return mean


def _prepared(rows: np.ndarray, mean: np.ndarray | None) -> Iterator[np.ndarray]:
    """Rows as they are compared, in float64 by chunks: unit rows, centred and unit rows again."""
    for start in range(0, len(rows), CHUNK):
        chunk = unit_rows64(rows[start : start + CHUNK])
        yield chunk if mean is None else unit_rows64(chunk - mean)


def _products(
    image: np.ndarray, text: np.ndarray, means: Mapping[str, np.ndarray | None]
) -> dict[str, np.ndarray]:
    """The maps and roots of `Asif`, from sums of products alone."""
    image_gram, text_gram, cross = (
        np.zeros((left.shape[1], right.shape[1]))
        for left, right in ((image, image), (text, text), (image, text))
    )
    for left, right in zip(
        _prepared(image, means["image"]), _prepared(text, means["text"]), strict=True
    ):
        image_gram += left.T @ left
        text_gram += right.T @ right
        cross += left.T @ right
    left, values, right = np.linalg.svd(cross, full_matrices=False)
    kept = values > values[0] * max(cross.shape) * _EPS
    root = np.sqrt(values[kept])
    return {
        "image_map": left[:, kept] * root,
        "text_map": right[kept].T * root,
        "image_root": _root(image_gram),
        "text_root": _root(text_gram),
    }


def _root(gram: np.ndarray) -> np.ndarray:
    """R with ``R R^T`` the given matrix."""
    values, vectors = np.linalg.eigh(gram)
    return vectors * np.sqrt(np.maximum(values, 0.0))
