"""Canonical similarity analysis: cosines of CCA scores, weighted by their correlations."""

import dataclasses
import hashlib
import math
from typing import Any, ClassVar, Literal

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
from sotalign_jax.numerics import unit_rows
from sotalign_jax.teachers import (
    LinearTeacher,
    Moments,
    cca,
    empty_moments,
    merge_moments,
    moments_of,
    recentered,
)

__all__ = ["CSA", "Csa", "CsaOptions", "csa"]


@dataclasses.dataclass(frozen=True)
class CsaOptions(Options):
    """Options of `csa`.

    Attributes:
        dim: number of directions; 0 (default) takes as many as the pairs support, and leaves it to
            the weights to tell good ones from bad.
        ridge: lambda of the CCA, see `sotalign_jax.teachers.cca`; 0 is the published,
            unregularised CCA, which fits fewer pairs than dimensions perfectly and little else.
        ridge_on: what lambda is added to: "covariance" or "scatter".
        correlations: where the weights come from: "held_out" (default), the correlations of pairs
            that a direction was not fitted on; or "in_sample", those of the pairs that it was,
            which are far too high where pairs are few. Equal weights need none, and always have
            the latter.
        folds: into how many parts the pairs are cut for "held_out"; one CCA is fitted for each.
        weights: "correlation" (default), or "equal" for plain cosines.
        center: which rows the means are taken of: "pairs" (default) or "unpaired".
        normalize: scale rows to unit length before anything else (default; the published code does
            not).
    """

    dim: int = 0
    ridge: float = 1e-3
    ridge_on: Literal["covariance", "scatter"] = "covariance"
    correlations: Literal["held_out", "in_sample"] = "held_out"
    folds: int = 5
    weights: Literal["correlation", "equal"] = "correlation"
    center: Literal["pairs", "unpaired"] = "pairs"
    normalize: bool = True

    def check(self) -> None:
        if self.dim < 0:
            raise ValueError(f"dim: got {self.dim}; must be positive, or 0 for all there are")
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"ridge: got {self.ridge}; must be finite and at least 0")
        if self.folds < 2:
            raise ValueError(f"folds: got {self.folds}; must be at least 2, to hold one out")


@fitted_aligner
class Csa(FittedAligner):
    """What `csa` fits: ``sqrt(correlations) * u / |u|`` for the CCA scores u of a row.

    The inner product of an image and a text is ``sum_k correlations_k u_k v_k`` of unit scores u
    and v: no cosine, and at most the highest correlation.

    Attributes:
        image_weight: ``(dx, d)`` CCA directions of images.
        text_weight: ``(dy, d)`` of texts.
        image_mean: ``(dx,)``, subtracted from image rows (of unit length, with ``normalize``).
        text_mean: ``(dy,)`` of texts.
        correlations: ``(d,)`` in [0, 1], of the pairs along each direction.
        options: the options of the fit.
    """

    kind: ClassVar[str] = "csa"
    image_weight: Float[Array, "dx d"]
    text_weight: Float[Array, "dy d"]
    image_mean: Float[Array, "dx"]
    text_mean: Float[Array, "dy"]
    correlations: Float[Array, "d"]
    options: CsaOptions = static_field()

    @property
    def image_dim(self) -> int:
        return self.image_weight.shape[0]

    @property
    def text_dim(self) -> int:
        return self.text_weight.shape[0]

    @property
    def dim(self) -> int:
        return self.image_weight.shape[1]

    @property
    def unit(self) -> bool:
        return self.options.weights == "equal"

    @property
    def recipe(self) -> str:
        steps = ["for a row x of a side (image or text; its tensors start with the side's name)"]
        if self.options.normalize:
            steps.append("x = x / |x| (a row of zeros stays zero)")
        steps.append("u = (x - {side}_mean) @ {side}_weight")
        steps.append("embedding = u / |u|" + ("" if self.unit else " * sqrt(correlations)"))
        steps.append("similarity = <image embedding, text embedding>")
        return "; ".join(steps)

    def _embed(self, side: str, rows: Float[Array, "n d"]) -> Float[Array, "n dim"]:
        mean, weight = getattr(self, f"{side}_mean"), getattr(self, f"{side}_weight")
        if self.options.normalize:
            rows = unit_rows(rows)
        # Length 1 before the weights, which would otherwise cancel.
        scores = unit_rows(jnp.matmul(rows - mean[None, :], weight))
        return scores if self.unit else scores * jnp.sqrt(self.correlations)[None, :]


def csa(
    image: Float[ArrayLike, "n dx"],
    text: Float[ArrayLike, "m dy"],
    unpaired_image: Float[ArrayLike, "p ex"] | None = None,
    unpaired_text: Float[ArrayLike, "q ey"] | None = None,
    *,
    seed: int = 0,
    **options: Any,
) -> Csa:
    """Canonical similarity analysis of pairs: CCA, and cosines weighted by its correlations.

    With u and v the first ``dim`` CCA scores of an image and a text, each scaled to unit length,
    their similarity is ``sum_k rho_k u_k v_k``.

    By default rho_k is the correlation of the k-th direction on pairs that it was not fitted on:
    the pairs are cut into folds, a CCA of the others is fitted for each, and sums of products and
    of squares of its k-th scores are added up over the folds. Below 0 counts as 0. The fold of a
    pair depends on its image row and the seed alone, so the order of the pairs does not matter,
    and captions of one image are held out together.

    Args:
        image: ``(n, dx)`` image rows of the pairs, any floating dtype.
        text: ``(n, dy)`` their text rows.
        unpaired_image: further image rows, read only for the means of ``center="unpaired"``.
        unpaired_text: further text rows, likewise.
        seed: which pairs are held out together.
        **options: see `CsaOptions`.

    Returns:
        A `Csa`.

    Raises:
        ValueError: rows or options that cannot be used; fewer pairs than the options need; no
            direction that pairs agree on.

    References:
        Li, Chinchali and Topcu, CSA: Data-efficient Mapping of Unimodal Features to Multimodal
        Features, ICLR 2025. Ridge, held-out correlations and unit rows are ours.
    """
    settings = make_options(CsaOptions, options)
    image, text = checked_pairs(image, text)
    centres = None
    if settings.center == "unpaired":
        centres = tuple(
            mean_row(name, rows, own.shape[1], normalize=settings.normalize)
            for name, rows, own in (
                ("unpaired_image", unpaired_image, image),
                ("unpaired_text", unpaired_text, text),
            )
        )

    def fit(moments: Moments, dim: int = 0) -> tuple[LinearTeacher, Moments]:
        if centres is not None:
            moments = recentered(moments, *centres)
        teacher = cca(moments, ridge=settings.ridge, ridge_on=settings.ridge_on, dim=dim or None)
        return teacher, moments

    if settings.correlations == "in_sample" or settings.weights == "equal":
        teacher, moments = fit(_moments(image, text, settings)[0], settings.dim)
        correlations = _correlation(_sums(teacher, moments))
    else:
        teacher, correlations = _held_out(image, text, settings, seed, fit)
    correlations = np.clip(correlations, 0.0, 1.0)
    if settings.weights == "correlation" and not correlations.any():
        raise ValueError(
            f"correlations: those of {settings.correlations} pairs are all 0 or below, so that "
            "every similarity would be 0; give more pairs, a higher ridge, or weights='equal'"
        )
    return Csa(
        image_weight=teacher.image_weight,
        text_weight=teacher.text_weight,
        image_mean=teacher.image_mean,
        text_mean=teacher.text_mean,
        correlations=jnp.asarray(correlations, jnp.float32),
        options=settings,
    )


CSA = Method(
    fit=csa,
    aligner=Csa,
    options=CsaOptions,
    # dim was chosen for each data set: 200 for Flickr30k, 700 for ImageNet.
    published={"dim": 200, "ridge": 0.0, "correlations": "in_sample", "normalize": False},
    grid={
        "dim": (10, 25, 50, 100, 200, 350, 500, 700),
        "ridge": (1e-4, 1e-3, 1e-2, 1e-1),
    },
    reads_unpaired=lambda options: options.center == "unpaired",
)


def _held_out(
    image, text, settings: CsaOptions, seed: int, fit
) -> tuple[LinearTeacher, np.ndarray]:
    """The CCA of all pairs, and the correlations of pairs that were held out of others."""
    parts = _moments(image, text, settings, _folds(image, settings.folds, seed))
    sums = []
    for held in range(len(parts)):
        rest = _merged(part for number, part in enumerate(parts) if number != held)
        try:
            teacher, centred = fit(rest)
        except ValueError as error:
            raise ValueError(
                f"folds: got {settings.folds}; without one of them, {error}"
            ) from error
        moments = recentered(parts[held], centred.image_mean, centred.text_mean)
        sums.append(_sums(teacher, moments))
    supported = min(part.shape[1] for part in sums)
    if settings.dim > supported:
        raise ValueError(
            f"dim: got {settings.dim}; without one fold of {settings.folds}, the pairs support at "
            f"most {supported}; 0 takes them all"
        )
    dim = settings.dim or supported
    return fit(_merged(parts), dim)[0], _correlation(
        np.sum([part[:, :dim] for part in sums], axis=0)
    )


def _folds(image: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """``(n,)`` the fold of each pair, by a hash of its image row; folds differ by one image."""
    key = str(seed).encode()
    hashes = [hashlib.blake2b(_bytes(row), digest_size=8, key=key).digest() for row in image]
    distinct, number = np.unique(hashes, return_inverse=True)
    if len(distinct) < folds:
        raise ValueError(
            f"folds: got {folds}; the pairs have only {len(distinct)} different images; give fewer "
            "folds, more pairs, or correlations='in_sample'"
        )
    return number % folds


def _bytes(row: np.ndarray) -> bytes:
    """The same for equal rows of whatever dtype; adding 0 turns -0 into 0."""
    return (row.astype(np.float64) + 0.0).tobytes()


def _moments(
    image: np.ndarray, text: np.ndarray, settings: CsaOptions, folds: np.ndarray | None = None
) -> list[Moments]:
    """The moments of the pairs of each fold; of all pairs without folds."""
    if folds is None:
        folds = np.zeros(len(image), int)
    parts = [empty_moments(image.shape[1], text.shape[1])] * (int(folds.max()) + 1)
    for start in range(0, len(image), CHUNK):
        rows = slice(start, start + CHUNK)
        for number in range(len(parts)):
            mine = folds[rows] == number
            chunk = moments_of([(image[rows][mine], text[rows][mine])], settings.normalize)
            parts[number] = merge_moments(parts[number], chunk)
    return parts


def _merged(parts) -> Moments:
    total, *others = parts
    for part in others:
        total = merge_moments(total, part)
    return total


def _sums(teacher: LinearTeacher, moments: Moments) -> np.ndarray:
    """``(3, d)`` sums over pairs of u v, u u and v v, of scores u and v along each direction."""
    left, right = (np.asarray(w, np.float64) for w in (teacher.image_weight, teacher.text_weight))
    return np.stack(
        [
            np.sum(left * (moments.cross_scatter @ right), axis=0),
            np.sum(left * (moments.image_scatter @ left), axis=0),
            np.sum(right * (moments.text_scatter @ right), axis=0),
        ]
    )


def _correlation(sums: np.ndarray) -> np.ndarray:
    both, left, right = sums
    squares = left * right
    return np.where(squares > 0, both / np.sqrt(np.where(squares > 0, squares, 1.0)), 0.0)
