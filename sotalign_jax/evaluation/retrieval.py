"""Cross-modal retrieval: ranks counted in chunks, never an n x m matrix at once."""

import functools
import operator
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from sotalign_jax.numerics import unit_rows

__all__ = ["retrieval_metrics", "retrieval_of_scores", "text_owners"]

# Captions of one image handled beside each other; an image with more takes several rows.
_SLOTS = 8


def retrieval_metrics(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m e"],
    *,
    text_to_image: Int[ArrayLike, "k"] | None = None,
    normalize: bool = True,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Recall@k, median rank and FOSCTTM of image and text embeddings in a shared space.

    A query's rank is 1 + (wrong candidates that score strictly higher) + half of the wrong
    candidates that tie with the true one, so that embeddings which do not discriminate land in the
    middle of the gallery instead of on top. Text to image, every text is a query and its own image
    the one true candidate. Image to text, an image's rank is that of its best own caption among the
    texts that are not its own (any hit). The true pair's score is read from the same matrix product
    as its rivals', so exact duplicates tie exactly.

    Args:
        image: ``(n, d)`` image embeddings, n >= 2, of any floating dtype and any row length.
        text: ``(m, d)`` text embeddings.
        text_to_image: ``(m,)`` row of ``image`` that each text belongs to. Every image needs at
            least one text. Default: one to one, text i belongs to image i and n = m.
        normalize: rank by cosine (default); False ranks by inner products of the rows as they are.
        ks: the cut-offs k of recall@k (default 1, 5, 10).
        chunk_size: queries scored at a time (default 1024); memory grows as chunk_size x
            max(n, m) x 4 bytes. The result does not depend on it.

    Returns:
        Floats; recalls and FOSCTTM are fractions in [0, 1]:

        * ``t2i/recall@k``, ``i2t/recall@k`` and their mean ``mean_recall@k`` for every k;
        * ``t2i/median_rank``, ``i2t/median_rank``, 1 is best;
        * ``foscttm``: fraction of wrong candidates closer than the true partner, ties half,
          averaged over all (image, text) pairs and then over both directions; 0 is perfect, 0.5 is
          chance;
        * ``n_images``, ``n_texts``.

    Raises:
        ValueError: embeddings hold NaN or infinity or differ in dimension; fewer than 2 images;
            ``text_to_image`` has the wrong length, ids that are no integers or out of range, or
            leaves an image without text; a k or ``chunk_size`` is below 1.

    References:
        Karpathy and Fei-Fei (CVPR 2015) for the any-hit protocol; FOSCTTM after Liu et al. (WABI
        2019).
    """
    owner = text_owners(image, text, text_to_image)
    image, text = (
        unit_rows(rows) if normalize else jnp.asarray(rows).astype(jnp.float32)
        for rows in (image, text)
    )

    def rivals(queries, gallery, gallery_owner):
        return functools.partial(
            _rivals_of_chunk, queries, gallery, jnp.asarray(gallery_owner, jnp.int32)
        )

    texts, images = rivals(text, image, np.arange(len(image))), rivals(image, text, owner)
    return _metrics(texts, images, owner, len(image), ks, chunk_size)


def retrieval_of_scores(
    image_scores: Callable[[np.ndarray], Float[ArrayLike, "c m"]],
    text_scores: Callable[[np.ndarray], Float[ArrayLike, "c n"]],
    n: int,
    m: int,
    *,
    text_to_image: Int[ArrayLike, "k"] | None = None,
    ks: Sequence[int] = (1, 5, 10),
    chunk_size: int = 1024,
) -> dict[str, float]:
    """The metrics of `retrieval_metrics` by scores that are made for a few queries at a time.

    For similarities that are no inner products of short rows.

    Args:
        image_scores: given ``(c,)`` image rows, their ``(c, m)`` scores against all texts. It must
            score a row in the same way whichever rows come with it.
        text_scores: given ``(c,)`` text rows, their ``(c, n)`` scores against all images.
        n: number of images, at least 2.
        m: number of texts.
        text_to_image: see `retrieval_metrics`.
        ks: the cut-offs k of recall@k (default 1, 5, 10).
        chunk_size: queries scored at a time (default 1024). Rows come in ascending order; after
            the last row, row 0 fills the chunk up.

    Returns:
        As `retrieval_metrics`.

    Raises:
        ValueError: as `retrieval_metrics`; scores of another shape, or NaN or infinite.
    """
    owner = _check_owner(n, m, text_to_image)

    def rivals(name: str, scores, total: int, gallery_owner: np.ndarray):
        owners = jnp.asarray(gallery_owner, jnp.int32)

        def of_chunk(rows, rows_owner, targets):
            found = jnp.asarray(scores(rows))
            if found.shape != (len(rows), total):
                raise ValueError(
                    f"{name}: gave shape {found.shape} for {len(rows)} rows; ({len(rows)}, "
                    f"{total}) is needed"
                )
            if not jnp.isfinite(found).all():
                raise ValueError(f"{name}: gave NaN or infinity; every score must be finite")
            return _rivals_of_scores(found, owners, rows_owner, targets)

        return of_chunk

    texts = rivals("text_scores", text_scores, n, np.arange(n))
    images = rivals("image_scores", image_scores, m, owner)
    return _metrics(texts, images, owner, n, ks, chunk_size)


def _metrics(
    texts: Callable[..., Array],
    images: Callable[..., Array],
    owner: np.ndarray,
    n: int,
    ks: Sequence[int],
    chunk_size: int,
) -> dict[str, float]:
    """The metrics, from rivals of a chunk of text queries and of a chunk of image queries."""
    ks = [operator.index(k) for k in ks]
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={ks}: at least one cut-off is needed, each at least 1")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
    m = len(owner)
    t2i = _rivals(texts, np.arange(m), owner, owner[:, None], chunk_size)[:, 0]
    row_image, captions = _caption_rows(owner)
    i2t = _rivals(images, row_image, row_image, captions, chunk_size)

    t2i_rank = 1 + t2i
    i2t_rank = np.full(n, np.inf)
    np.minimum.at(i2t_rank, row_image, 1 + np.where(captions >= 0, i2t, np.inf).min(axis=1))
    wrong_texts = m - np.bincount(owner, minlength=n)
    i2t_fraction = (i2t / wrong_texts[row_image][:, None])[captions >= 0]

    metrics = {}
    for k in ks:
        metrics[f"t2i/recall@{k}"] = float(np.mean(t2i_rank <= k))
        metrics[f"i2t/recall@{k}"] = float(np.mean(i2t_rank <= k))
        metrics[f"mean_recall@{k}"] = (metrics[f"t2i/recall@{k}"] + metrics[f"i2t/recall@{k}"]) / 2
    metrics["t2i/median_rank"] = float(np.median(t2i_rank))
    metrics["i2t/median_rank"] = float(np.median(i2t_rank))
    metrics["foscttm"] = float((np.mean(t2i / (n - 1)) + np.mean(i2t_fraction)) / 2)
    metrics["n_images"], metrics["n_texts"] = float(n), float(m)
    return metrics


def text_owners(image, text, text_to_image) -> np.ndarray:
    """The owner (image row) of every text, or a ValueError that names the bad argument."""
    shapes = {}
    for name, rows in (("image", image), ("text", text)):
        rows = jnp.asarray(rows)
        shapes[name] = rows.shape
        if rows.ndim != 2:
            raise ValueError(f"{name}: shape {rows.shape}; rows by dimensions, (n, d), are needed")
        if not jnp.isfinite(rows).all():
            raise ValueError(f"{name}: holds NaN or infinity; every embedding must be finite")
    (n, d), (m, e) = shapes["image"], shapes["text"]
    if d != e:
        raise ValueError(f"text: dimension {e}, but image has {d}; embed both into one space")
    return _check_owner(n, m, text_to_image)


def _check_owner(n: int, m: int, text_to_image) -> np.ndarray:
    if n < 2:
        raise ValueError(f"image: {n} rows; retrieval needs at least 2 to choose from")
    if text_to_image is None:
        if n != m:
            raise ValueError(
                f"text_to_image: needed where {m} texts face {n} images; "
                "without it the two must be equally many, one to one"
            )
        return np.arange(n)
    owner = np.asarray(text_to_image)
    if owner.shape != (m,):
        raise ValueError(f"text_to_image: shape {owner.shape}; one image row per text, ({m},)")
    if not np.issubdtype(owner.dtype, np.integer):
        raise ValueError(f"text_to_image: dtype {owner.dtype}; row numbers must be integers")
    outside = np.flatnonzero((owner < 0) | (owner >= n))
    if len(outside):
        first = outside[0]
        raise ValueError(
            f"text_to_image: entry {first} is {owner[first]}, outside the image rows 0 to {n - 1}"
        )
    missing = np.flatnonzero(np.bincount(owner, minlength=n) == 0)
    if len(missing):
        raise ValueError(
            f"text_to_image: {len(missing)} images have no text (first: row {missing[0]}); "
            "drop them, each image needs at least one"
        )
    return owner.astype(np.int32)


def _caption_rows(owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Captions grouped by image into rows of equal width.

    Returns:
        ``(r,)`` the image of each row, and ``(r, s)`` its texts, -1 where there are fewer than s.
    """
    order = np.argsort(owner, kind="stable")
    counts = np.bincount(owner)
    slots = min(_SLOTS, int(counts.max()))
    rows_of = -(-counts // slots)
    position = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    row = np.repeat(np.cumsum(rows_of) - rows_of, counts) + position // slots
    captions = np.full((rows_of.sum(), slots), -1, np.int32)
    captions[row, position % slots] = order
    return np.repeat(np.arange(len(counts)), rows_of), captions


def _rivals(
    of_chunk: Callable[..., Array],
    rows: np.ndarray,
    rows_owner: np.ndarray,
    targets: np.ndarray,
    chunk_size: int,
) -> np.ndarray:
    """Rivals over all rows, the last chunk padded so that one program serves all."""
    total = len(rows)
    chunk = min(chunk_size, total)
    padding = -total % chunk
    rows, rows_owner = (np.pad(ids, (0, padding)).astype(np.int32) for ids in (rows, rows_owner))
    targets = np.pad(targets, ((0, padding), (0, 0)), constant_values=-1).astype(np.int32)
    doubled = [
        of_chunk(
            rows[start : start + chunk],
            rows_owner[start : start + chunk],
            targets[start : start + chunk],
        )
        for start in range(0, total, chunk)
    ]
    return np.concatenate([np.asarray(part) for part in doubled])[:total] / 2.0


@jax.jit
def _rivals_of_chunk(
    queries: Float[Array, "q d"],
    gallery: Float[Array, "g d"],
    gallery_owner: Int[Array, "g"],
    rows: Int[np.ndarray | Array, "c"],
    rows_owner: Int[np.ndarray | Array, "c"],
    targets: Int[np.ndarray | Array, "c s"],
) -> Int[Array, "c s"]:
    """`_count_rivals` by inner products."""
    scores = jnp.matmul(queries[rows], gallery.T, precision=jax.lax.Precision.HIGHEST)
    return _count_rivals(scores, gallery_owner, rows_owner, targets)


def _count_rivals(
    scores: Float[Array, "c g"],
    gallery_owner: Int[Array, "g"],
    rows_owner: Int[np.ndarray | Array, "c"],
    targets: Int[np.ndarray | Array, "c s"],
) -> Int[Array, "c s"]:
    """Twice the number of wrong gallery entries above each target, a tie counting half.

    Wrong for a query row are the gallery entries of another owner. Where a target is -1, the
    number means nothing.
    """
    wrong = gallery_owner[None, :] != rows_owner[:, None]

    def above(target):
        own = jnp.take_along_axis(scores, target[:, None], axis=1)
        points = 2 * (scores > own).astype(jnp.int32) + (scores == own).astype(jnp.int32)
        return jnp.sum(jnp.where(wrong, points, 0), axis=1)

    return jax.lax.map(above, targets.T).T


_rivals_of_scores = jax.jit(_count_rivals)
