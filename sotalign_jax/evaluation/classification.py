"""Zero-shot classification: classes as means of their prompts, images by their nearest class."""

import operator
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Float32, Int

from sotalign_jax.numerics import unit_rows64

__all__ = ["class_embeddings", "classification_metrics"]


def class_embeddings(
    chunks: Iterable[Float[ArrayLike, "c d"]],
    class_of_row: Int[np.ndarray, " m"],
    n_classes: int,
    *,
    normalize: bool = True,
) -> Float32[np.ndarray, "classes d"]:
    """One embedding a class, from those of its prompts.

    With e_t the embedding of a class's prompt t by the text head,

        w = v / |v|,   v = mean over t of e_t / |e_t|

    This is not the embedding of the prompts' mean features: a head has a bias and may have a
    LayerNorm, and preprocessing scales rows before it subtracts a mean.

    Args:
        chunks: embeddings of prompts, together ``(m, d)``, in parts of any size; each is read once
            and not kept.
        class_of_row: ``(m,)`` class of each prompt, in [0, n_classes).
        n_classes: number of classes; each needs a prompt.
        normalize: False leaves both lengths out, for an aligner whose similarities are inner
            products: a class's score is then the mean of those of its prompts.

    Returns:
        ``(n_classes, d)`` float32; sums are made in float64.

    Raises:
        ValueError: more or fewer rows than classes of rows, a class out of range or without
            prompts, NaN or infinity, or prompts that cancel out or have no length.

    References:
        Radford et al., Learning transferable visual models from natural language supervision, ICML
        2021, section 3.1.4.
    """
    owner = np.asarray(class_of_row)
    if len(owner) and not (owner.min() >= 0 and owner.max() < n_classes):
        raise ValueError(
            f"class_of_row: classes {owner.min()} .. {owner.max()}, but there are {n_classes}"
        )
    counts = np.bincount(owner, minlength=n_classes)
    if (counts == 0).any():
        raise ValueError(f"class_of_row: class {int(np.argmin(counts))} has no prompt")
    sums, done = None, 0
    for chunk in chunks:
        rows = np.asarray(chunk, np.float64)
        if done + len(rows) > len(owner):
            raise ValueError(f"chunks: more rows than the {len(owner)} of class_of_row")
        if not np.isfinite(rows).all():
            raise ValueError("chunks: hold NaN or infinity; every embedding must be finite")
        if normalize:
            rows = unit_rows64(rows)
        if sums is None:
            sums = np.zeros((n_classes, rows.shape[1]))
        np.add.at(sums, owner[done : done + len(rows)], rows)
        done += len(rows)
    if sums is None or done != len(owner):
        raise ValueError(f"chunks: {done} rows, but class_of_row has {len(owner)}")
    means = sums / counts[:, None]
    if normalize:
        lengths = np.linalg.norm(means, axis=1)
        if (lengths < 1e-12).any():
            raise ValueError(
                f"chunks: the prompts of class {int(np.argmin(lengths))} have mean 0, no direction"
            )
        means = means / lengths[:, None]
    return means.astype(np.float32)


def classification_metrics(
    chunks: Iterable[Float[ArrayLike, "c d"]],
    classes: Float[ArrayLike, "classes d"],
    labels: Int[np.ndarray, " n"],
    *,
    ks: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Accuracy of images that take the class with the largest inner product.

    Of classes that tie, the first in the list comes first, as with an arg-max: the two pairs of
    ImageNet classes of one name ("sunglasses", "missile") tie in truth, and are not to be wrong for
    both.

    Args:
        chunks: image embeddings, together ``(n, d)``, in parts of any size; each is read once and
            not kept. Their lengths do not matter.
        classes: ``(n_classes, d)``, from `class_embeddings`.
        labels: ``(n,)`` true class of each image.
        ks: the k of top-k accuracy (default 1, 5); those of more classes than there are tell
            nothing and are left out.

    Returns:
        Fractions: ``top@k`` for every k; ``mean_per_class_recall``, the mean over classes of the
        share of a class's images that are given it; ``n_images``, ``n_classes``.

    Raises:
        ValueError: a label out of range, a class without images, a wrong number of rows, NaN or
            infinity, or a k below 1.
    """
    ks = [operator.index(k) for k in ks]
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={ks}: at least one k is needed, each at least 1")
    weights = jnp.asarray(classes, jnp.float32)
    n_classes = weights.shape[0]
    labels = np.asarray(labels)
    if len(labels) and not (labels.min() >= 0 and labels.max() < n_classes):
        raise ValueError(
            f"labels: {labels.min()} .. {labels.max()}, but there are {n_classes} classes"
        )
    counts = np.bincount(labels, minlength=n_classes)
    if (counts == 0).any():
        raise ValueError(f"labels: no image has class {int(np.argmin(counts))}")
    ranks, done = np.empty(len(labels), np.int64), 0
    for chunk in chunks:
        rows = jnp.asarray(chunk, jnp.float32)
        if done + len(rows) > len(labels):
            raise ValueError(f"chunks: more rows than the {len(labels)} of labels")
        if not jnp.isfinite(rows).all():
            raise ValueError("chunks: hold NaN or infinity; every embedding must be finite")
        own = labels[done : done + len(rows)]
        ranks[done : done + len(rows)] = _ranks(rows, weights, own.astype(np.int32))
        done += len(rows)
    if done != len(labels):
        raise ValueError(f"chunks: {done} rows, but {len(labels)} labels")
    metrics = {f"top@{k}": float(np.mean(ranks <= k)) for k in ks if k <= n_classes}
    right = np.bincount(labels, weights=ranks == 1, minlength=n_classes)
    metrics["mean_per_class_recall"] = float(np.mean(right / counts))
    metrics["n_images"], metrics["n_classes"] = float(len(labels)), float(n_classes)
    return metrics


@jax.jit
def _ranks(
    rows: Float[Array, "c d"],
    classes: Float[Array, "classes d"],
    labels: Int[np.ndarray | Array, "c"],
) -> Int[Array, "c"]:
    """Place of each row's own class, from 1."""
    scores = jnp.matmul(rows, classes.T, precision=jax.lax.Precision.HIGHEST)
    own = jnp.take_along_axis(scores, labels[:, None], axis=1)
    before = jnp.arange(classes.shape[0])[None, :] < labels[:, None]
    ahead = (scores > own) | ((scores == own) & before)
    return 1 + jnp.sum(ahead, axis=1)
