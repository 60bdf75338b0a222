"""SUE: spectral embeddings of each modality, CCA of few pairs, and an MMD residual network."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

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
    checked_rows,
    fitted_aligner,
    make_options,
    static_field,
)
from sotalign_jax.fitted.mmd import Residual, residual_map
from sotalign_jax.fitted.spectral import Nystrom, nystrom
from sotalign_jax.fitted.spectralnet import SpectralNet, spectral_net
from sotalign_jax.numerics import unit_rows
from sotalign_jax.teachers import cca, moments_of

__all__ = ["SUE", "SpectralCca", "Sue", "SueOptions", "spectral_cca", "sue"]


@dataclasses.dataclass(frozen=True)
class SueOptions(Options):
    """Options of `sue`.

    Attributes:
        embedding: of the rows of each modality: "nystrom" (default), the exact eigenvectors of a
            graph of up to ``landmarks`` rows; or "network", a SpectralNet, as published.
        spectral_dim: width of that embedding.
        neighbours: of each row in the graph, beside itself.
        scale_neighbour: whose median distance is the bandwidth, the row itself the first.
        landmarks: rows of the graph at most; of the "network", rows that it is turned on.
        normalize: scale rows to unit length before anything else (default; the published code does
            not).
        dim: number of CCA directions.
        ridge: lambda of the CCA, in units of the covariance of columns of mean square one.
        scaling: "correct" (default), which centres the embeddings on those of the pairs; or
            "published": see `spectral_cca`.
        hidden: widths of the network's hidden layers; "4096-4096-1024" as published.
        epochs: of its training, at most.
        batch_size: rows of its batches; 5,162 in the published code, 4,096 in the paper.
        learning_rate: of its Adam; 1e-4 as published.
        orthonormal: "differentiated" (default), or "constant" as published; see `spectral_net`.
        mmd_hidden: widths of the hidden layers of the residual network.
        mmd_epochs: of its training; 0 leaves it out.
        mmd_batch_size: rows of either modality in its batches.
        mmd_learning_rate: of its AdamW.
    """

    embedding: Literal["nystrom", "network"] = "nystrom"
    spectral_dim: int = 30
    neighbours: int = 30
    scale_neighbour: int = 15
    landmarks: int = 2_000
    normalize: bool = True
    dim: int = 8
    ridge: float = 1e-1
    scaling: Literal["correct", "published"] = "correct"
    hidden: str = "256-256"
    epochs: int = 100
    batch_size: int = 512
    learning_rate: float = 1e-3
    orthonormal: Literal["differentiated", "constant"] = "differentiated"
    mmd_hidden: str = "32-32"
    mmd_epochs: int = 100
    mmd_batch_size: int = 32
    mmd_learning_rate: float = 1e-3

    def check(self) -> None:
        for name in ("spectral_dim", "neighbours", "landmarks", "dim", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; must be at least 1")
        if not 2 <= self.scale_neighbour <= self.neighbours + 1:
            raise ValueError(
                f"scale_neighbour: got {self.scale_neighbour}; must lie between 2 and "
                f"{self.neighbours + 1}, neighbours and the row itself"
            )
        if self.dim > self.spectral_dim:
            raise ValueError(
                f"dim: got {self.dim}; must be at most spectral_dim, which is {self.spectral_dim}"
            )
        if not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise ValueError(f"ridge: got {self.ridge}; must be finite and at least 0")
        if self.mmd_epochs < 0:
            raise ValueError(f"mmd_epochs: got {self.mmd_epochs}; must be at least 0")
        for name in ("batch_size", "mmd_batch_size"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: got {getattr(self, name)}; must be at least 2")
        for name in ("learning_rate", "mmd_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}; must be positive and finite")
        for name in ("hidden", "mmd_hidden"):
            _widths(name, getattr(self, name))


@fitted_aligner
class Sue(FittedAligner):
    """What `sue` fits: cosines of spectral embeddings, seen along directions that pairs agree on.

    Attributes:
        image: arrays of the spectral embedding of images, a `Nystrom` or a `SpectralNet`.
        text: of texts.
        image_weight: ``(k, d)`` CCA directions of embedded images.
        text_weight: ``(k, d)`` of embedded texts.
        image_mean: ``(k,)``, subtracted from embedded images.
        text_mean: ``(k,)`` of texts.
        residual: layers of the network that then moves images.
        options: the options of the fit.
    """

    kind: ClassVar[str] = "sue"
    image: dict[str, Any]
    text: dict[str, Any]
    image_weight: Float[Array, "k d"]
    text_weight: Float[Array, "k d"]
    image_mean: Float[Array, "k"]
    text_mean: Float[Array, "k"]
    residual: dict[str, dict[str, Array]]
    options: SueOptions = static_field()

    @property
    def image_dim(self) -> int:
        return self.image["center"].shape[0]

    @property
    def text_dim(self) -> int:
        return self.text["center"].shape[0]

    @property
    def dim(self) -> int:
        return self.image_weight.shape[1]

    @property
    def unit(self) -> bool:
        return True

    @property
    def recipe(self) -> str:
        steps = ["for a row x of a side (image or text; its tensors start with the side's name)"]
        if self.options.normalize:
            steps.append("x = x / |x| (a row of zeros stays zero)")
        steps.append("z = (x - {side}.center) / {side}.scale")
        if self.options.embedding == "nystrom":
            steps += [
                "q_j = |z - {side}.landmarks_j|^2",
                f"p = q of the {self.options.neighbours + 1}-th nearest landmark",
                "r = p + 2e-6 (1 + p)",
                "w_j = ([q_j <= r] + [q_j <= {side}.radius_j]) exp(-q_j / {side}.bandwidth)",
                "y = sum_j w_j {side}.vectors_j / sum_j w_j",
            ]
        else:
            steps += [
                "h = z * sqrt(len(z))",
                "h = h @ {side}.layers.k.weight + {side}.layers.k.bias for k = 0, 1, ..., with a "
                "leaky ReLU (slope 0.01) between layers",
                "y = tanh(h) @ {side}.rotation",
            ]
        steps += [
            "u = (y - {side}_mean) @ {side}_weight",
            "for images u = u + MLP(u), layers residual.k with ReLU between",
            "embedding = u / |u|",
            "similarity = <image embedding, text embedding>",
        ]
        return "; ".join(steps)

    def _embed(self, side: str, rows: Float[Array, "n d"]) -> Float[Array, "n dim"]:
        mean, weight = getattr(self, f"{side}_mean"), getattr(self, f"{side}_weight")
        spectral = _spectral(getattr(self, side), rows, **_how(self.options))
        scores = jnp.matmul(spectral - mean[None, :], weight)
        return unit_rows(Residual(self.residual)(scores) if side == "image" else scores)


def sue(
    image: Float[ArrayLike, "n dx"],
    text: Float[ArrayLike, "n dy"],
    unpaired_image: Float[ArrayLike, "m dx"] | None = None,
    unpaired_text: Float[ArrayLike, "k dy"] | None = None,
    *,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Sue:
    """Spectral universal embedding: three stages, of which only the second reads pairs as pairs.

    1. All rows of a modality, paired or not, are embedded by the leading eigenvectors of their
       neighbour graph (`nystrom`, or the published `spectral_net`). Two encoders of the same
       things have similar graphs, hence similar embeddings, but for turns and signs.
    2. CCA of the pairs' embeddings finds the directions in which the two agree (`spectral_cca`).
    3. A residual network moves the images so that they are distributed like the texts
       (`residual_map`).

    Unpaired rows of both modalities should come from one distribution, as stages one and three
    have it that they do.

    Args:
        image: ``(n, dx)`` image rows of the pairs, any floating dtype.
        text: ``(n, dy)`` their text rows.
        unpaired_image: further image rows; None if there are none.
        unpaired_text: further text rows.
        seed: of everything that is drawn.
        progress: told the stage, and how much of it is done of how much there is.
        **options: see `SueOptions`.

    Returns:
        A `Sue`.

    Raises:
        ValueError: rows or options that cannot be used, or too few rows or pairs for them.
        FloatingPointError: a training diverged.

    References:
        A. Yacobi, N. Ben-Ari, R. Talmon and U. Shaham, "Learning shared representations from
        unpaired data", arXiv 2505.21524. The exact eigenvectors, the ridge, the centring, unit rows
        and the residual network's start at the identity are ours.
    """
    settings = make_options(SueOptions, options)
    image, text = checked_pairs(image, text)
    if len(image) <= settings.dim:
        raise ValueError(
            f"dim: got {settings.dim}; {len(image)} pairs support at most {len(image) - 1} "
            "directions"
        )
    sides = {
        "image": _together("image", image, unpaired_image),
        "text": _together("text", text, unpaired_text),
    }
    spectral, embedded = {}, {}
    for number, (side, rows) in enumerate(sides.items()):
        stage = None if progress is None else functools.partial(progress, f"embed {side}s")
        try:
            own = _by_chunks(unit_rows, rows) if settings.normalize else rows
            spectral[side] = _fit_spectral(own, settings, 2 * seed + number, stage)
        except (ValueError, FloatingPointError) as error:
            raise type(error)(f"{side}: {error}") from error
        embedded[side] = _by_chunks(
            functools.partial(_spectral, spectral[side], **_how(settings)), rows
        )
    directions = spectral_cca(
        embedded["image"][: len(image)],
        embedded["text"][: len(text)],
        dim=settings.dim,
        ridge=settings.ridge,
        scaling=settings.scaling,
    )
    residual = residual_map(
        (embedded["image"] - directions.image_mean) @ directions.image_weight,
        (embedded["text"] - directions.text_mean) @ directions.text_weight,
        hidden=_widths("mmd_hidden", settings.mmd_hidden),
        epochs=settings.mmd_epochs,
        batch_size=settings.mmd_batch_size,
        learning_rate=settings.mmd_learning_rate,
        seed=seed,
        progress=None if progress is None else functools.partial(progress, "move images"),
    )
    return Sue(
        image=spectral["image"],
        text=spectral["text"],
        image_weight=jnp.asarray(directions.image_weight, jnp.float32),
        text_weight=jnp.asarray(directions.text_weight, jnp.float32),
        image_mean=jnp.asarray(directions.image_mean, jnp.float32),
        text_mean=jnp.asarray(directions.text_mean, jnp.float32),
        residual=residual.layers,
        options=settings,
    )


SUE = Method(
    fit=sue,
    aligner=Sue,
    options=SueOptions,
    published={
        "embedding": "network",
        "normalize": False,
        "ridge": 0.0,
        "scaling": "published",
        "hidden": "4096-4096-1024",
        "batch_size": 5_162,
        "learning_rate": 1e-4,
        "orthonormal": "constant",
    },
    grid={
        "embedding": ("nystrom", "network"),
        "spectral_dim": (10, 30, 60, 100),
        "neighbours": (15, 30, 60),
        "dim": (4, 8, 16, 30),
        "ridge": (1e-2, 1e-1, 1.0),
        "mmd_epochs": (0, 100),
    },
    reads_unpaired=lambda options: True,
)


class SpectralCca(NamedTuple):
    """Directions in two spectral embeddings, float64 NumPy.

    Attributes:
        image_weight: ``(k, d)``; scores are ``(embeddings - image_mean) @ image_weight``.
        text_weight: ``(k, d)``.
        image_mean: ``(k,)``.
        text_mean: ``(k,)``.
    """

    image_weight: Float[np.ndarray, "k d"]
    text_weight: Float[np.ndarray, "k d"]
    image_mean: Float[np.ndarray, "k"]
    text_mean: Float[np.ndarray, "k"]


def spectral_cca(
    image: Float[ArrayLike, "n k"],
    text: Float[ArrayLike, "n l"],
    *,
    dim: int,
    ridge: float = 0.0,
    scaling: Literal["correct", "published"] = "correct",
) -> SpectralCca:
    """CCA of the embeddings of pairs.

    Args:
        image: ``(n, k)`` embedded images of the pairs.
        text: ``(n, l)`` embedded texts; row i belongs to image row i.
        dim: number of directions.
        ridge: lambda, see `sotalign_jax.teachers.cca`.
        scaling: "correct": scores of covariance one, of embeddings centred on their mean.
            "published": CCA of columns that were centred and divided by their standard deviations,
            whose directions then multiply embeddings that were neither; direction k has the length
            that a deflation by the ones before it gives it (scikit-learn's rotations): what is left
            of it beside them is 1 long.

    Returns:
        `SpectralCca`; "published" has means of zero.

    Raises:
        ValueError: the pairs differ in length, hold NaN, or support fewer directions.
    """
    image, text = (np.asarray(rows, np.float64) for rows in (image, text))
    if scaling not in ("correct", "published"):
        raise ValueError(f"scaling: got {scaling!r}; must be one of correct, published")
    if scaling == "published":
        image, text = _standardized(image), _standardized(text)
    moments = moments_of([(image, text)], normalize=False)
    teacher = cca(moments, ridge=ridge, dim=dim)
    left, right = (np.asarray(w, np.float64) for w in (teacher.image_weight, teacher.text_weight))
    if scaling == "correct":
        return SpectralCca(left, right, moments.image_mean, moments.text_mean)
    left, right = (w / np.abs(np.diag(np.linalg.qr(w, mode="r"))) for w in (left, right))
    return SpectralCca(left, right, np.zeros(len(left)), np.zeros(len(right)))


def _standardized(rows: np.ndarray) -> np.ndarray:
    deviation = rows.std(axis=0, ddof=1)
    return (rows - rows.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)


def _together(side: str, paired: np.ndarray, unpaired: ArrayLike | None) -> np.ndarray:
    """All rows of a side in float32, those of the pairs first."""
    rows = [paired]
    if unpaired is not None and len(np.asarray(unpaired)):
        rows.append(checked_rows(f"unpaired_{side}", unpaired, paired.shape[1]))
    with np.errstate(over="ignore"):
        # Once more: what was finite may be none in float32.
        return checked_rows(side, np.concatenate([part.astype(np.float32) for part in rows]))


def _fit_spectral(rows: np.ndarray, settings: SueOptions, seed: int, progress) -> dict[str, Any]:
    graph = {
        "dim": settings.spectral_dim,
        "neighbours": settings.neighbours,
        "scale_neighbour": settings.scale_neighbour,
        "landmarks": settings.landmarks,
        "seed": seed,
    }
    if settings.embedding == "nystrom":
        fitted = nystrom(rows, **graph)
        if progress is not None:
            progress(1, 1)
    else:
        fitted = spectral_net(
            rows,
            **graph,
            hidden=_widths("hidden", settings.hidden),
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            orthonormal=settings.orthonormal,
            progress=progress,
        )
    return fitted._asdict()


def _how(settings: SueOptions) -> dict[str, Any]:
    """What of the options says how rows are embedded: as static as it is little."""
    return {
        "network": settings.embedding == "network",
        "normalize": settings.normalize,
        "neighbours": settings.neighbours,
    }


@functools.partial(jax.jit, static_argnames=("network", "normalize", "neighbours"))
def _spectral(
    arrays: dict[str, Any],
    rows: Float[ArrayLike, "n d"],
    *,
    network: bool,
    normalize: bool,
    neighbours: int,
) -> Float[Array, "n k"]:
    """Raw rows in the spectral embedding that the arrays are of."""
    rows = unit_rows(rows) if normalize else jnp.asarray(rows)
    if network:
        return SpectralNet(**arrays).embed(rows)
    return Nystrom(**arrays).embed(rows, neighbours=neighbours)


def _by_chunks(function: Callable[[Any], Array], rows: np.ndarray) -> np.ndarray:
    chunks = [function(rows[start : start + CHUNK]) for start in range(0, len(rows), CHUNK)]
    return np.concatenate([np.asarray(chunk) for chunk in chunks])


def _widths(name: str, value: str) -> tuple[int, ...]:
    """The numbers of "256-128"."""
    try:
        widths = tuple(int(part) for part in value.split("-"))
    except ValueError:
        widths = ()
    if not widths or min(widths) < 1:
        raise ValueError(f"{name}: got {value!r}; must be widths of layers, such as '256-256'")
    return widths
