"""How alike two spaces see the same items: mutual nearest neighbours, and centred kernel alignment.

Both compare an image encoder with a text encoder on pairs, before anything is trained. Both depend
on which and on how many rows are compared: only numbers of equal n, and of equal k, are comparable.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from sotalign_jax.evaluation.rows import checked_rows
from sotalign_jax.numerics import matmul, unit_rows, unit_rows64

__all__ = ["linear_cka", "mutual_knn"]


def mutual_knn(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m e"],
    *,
    k: int = 10,
    metric: str = "cosine",
    permutations: int = 200,
    seed: int = 0,
    chunk_size: int = 1024,
) -> dict[str, float]:
    """Share of an item's k nearest neighbours that its image and its text have in common.

    An item is not its own neighbour. Of equally near ones some are drawn, for images and texts
    apart: taken by their row number, ties would be what the two have in common. The score grows
    with k / n and with the number of encoders or layers that were tried, so it comes with what it
    is when the texts are shuffled among the images: on average exactly k / (n - 1), with a spread
    that depends on how often the same rows are neighbours (hubs), drawn here.

    Args:
        image: ``(n, d)`` image features, n >= k + 2, of any floating dtype and any row length.
        text: ``(n, e)`` text features; row i belongs to image row i.
        k: neighbours (default 10, the literature's).
        metric: ``"cosine"`` (default), or ``"euclidean"`` on rows as they are.
        permutations: shuffles of the texts for the null (default 200), at least 2; the smallest
            possible p is 1 / (permutations + 1).
        seed: of the shuffles and of the choice among equals (default 0).
        chunk_size: rows whose neighbours are looked for at a time (default 1024); memory grows as
            chunk_size x n x 4 bytes. The result does not depend on it.

    Returns:
        Floats: ``score`` in [0, 1]; ``chance`` = k / (n - 1); ``null_mean`` and ``null_sd`` over
        the shuffles; ``z`` = (score - chance) / null_sd, NaN where all shuffles score the same;
        ``p``, share of shuffles that score as high, the unshuffled one among them; ``n``, ``k``.

    Raises:
        ValueError: features are no matrices, hold NaN or infinity or differ in length; n, k,
            ``permutations`` or ``chunk_size`` is too small; an unknown ``metric``.

    References:
        M. Huh et al., "The platonic representation hypothesis", ICML 2024, for the score (they
        clip features at a quantile first; here they are taken as they are).
    """
    for name, value, least in (
        ("k", k, 1),
        ("permutations", permutations, 2),
        ("chunk_size", chunk_size, 1),
    ):
        if value < least:
            raise ValueError(f"{name}={value}: must be at least {least}")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    image, text = _checked_pairs(image, text, least=k + 2)
    n = len(image)
    rng = np.random.default_rng(seed)
    how = (k, metric, chunk_size)
    # An edge from i to its neighbour j as one number, so that common edges are common numbers.
    image_edges, text_edges = (
        np.stack([np.repeat(np.arange(n), k), _drawn_neighbours(rows, rng, *how).ravel()])
        for rows in (image, text)
    )
    known = np.sort(image_edges[0] * n + image_edges[1])

    def common(order: np.ndarray) -> float:
        edges = order[text_edges[0]] * n + order[text_edges[1]]
        found = known[np.minimum(np.searchsorted(known, edges), len(known) - 1)] == edges
        return float(found.mean())

    score, chance = common(np.arange(n)), k / (n - 1)
    null = np.array([common(rng.permutation(n)) for _ in range(permutations)])
    spread = float(null.std(ddof=1))
    return {
        "score": score,
        "chance": chance,
        "null_mean": float(null.mean()),
        "null_sd": spread,
        "z": (score - chance) / spread if spread > 0 else float("nan"),
        "p": float((1 + np.sum(null >= score)) / (1 + permutations)),
        "n": float(n),
        "k": float(k),
    }


def _checked_pairs(image, text, least: int) -> tuple[np.ndarray, np.ndarray]:
    image, text = checked_rows(image, "image", least), checked_rows(text, "text", least)
    if len(image) != len(text):
        raise ValueError(
            f"text: {len(text)} rows, but image has {len(image)}; row i of one must belong to row "
            "i of the other"
        )
    return image, text


def _drawn_neighbours(
    rows: np.ndarray, rng: np.random.Generator, k: int, metric: str, chunk_size: int
) -> Int[np.ndarray, "n k"]:
    """`_neighbours` in an order of the rows that is drawn, since ties go to the first."""
    order = rng.permutation(len(rows))
    found = np.empty((len(rows), k), np.int64)
    found[order] = order[_neighbours(rows[order], k, metric, chunk_size)]
    return found


def _neighbours(rows: np.ndarray, k: int, metric: str, chunk_size: int) -> Int[np.ndarray, "n k"]:
    """The k nearest other rows of every row, nearest first."""
    n = len(rows)
    if metric == "cosine":
        points, penalty = unit_rows(rows), jnp.zeros(n)
    else:
        # About their mean, and at a scale of one: distances are differences of squares.
        centred = rows - rows.mean(axis=0, dtype=np.float64)
        scale = np.abs(centred).max()
        points = centred / (scale if scale > 0 else 1.0)
        penalty = jnp.asarray(np.square(points).sum(axis=1) / 2, jnp.float32)
        points = jnp.asarray(points, jnp.float32)
    chunk = min(chunk_size, n)
    queries = np.pad(np.arange(n, dtype=np.int32), (0, -n % chunk))
    found = [
        np.asarray(_neighbours_of_chunk(points, penalty, queries[start : start + chunk], k))
        for start in range(0, n, chunk)
    ]
    return np.concatenate(found)[:n].astype(np.int64)


@functools.partial(jax.jit, static_argnames="k")
def _neighbours_of_chunk(
    points: Float[Array, "n d"],
    penalty: Float[Array, "n"],
    queries: Int[np.ndarray | Array, "c"],
    k: int,
) -> Int[Array, "c k"]:
    """The k highest of inner product minus penalty, without the query itself."""
    scores = matmul(points[queries], points.T) - penalty[None, :]
    own = jnp.arange(len(points))[None, :] == queries[:, None]
    return jax.lax.top_k(jnp.where(own, -jnp.inf, scores), k)[1]


def linear_cka(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m e"],
    *,
    normalize: bool = True,
    chunk_size: int = 1024,
) -> dict[str, float]:
    r"""Centred kernel alignment of image and text features, linear kernels, biased and unbiased.

    With :math:`K = A A^T`, :math:`L = B B^T` of centred rows, and T = <K, L>, the biased HSIC is T
    and the unbiased one

    .. math:: \Big(T - \frac{n}{n - 2} \sum_i K_{ii} L_{ii}
              + \frac{\mathrm{tr} K \, \mathrm{tr} L}{(n - 1)(n - 2)}\Big) \Big/ \big(n (n - 3)\big)

    which is that of Song et al. for rows about their mean; CKA is HSIC(K, L) over the root of
    HSIC(K, K) HSIC(L, L). The biased one tends to 1 as dimensions outgrow rows, whatever the rows;
    the unbiased one averages 0 where rows have nothing to do with each other, and may be negative.

    Args:
        image: ``(n, d)`` image features, n >= 4, of any floating dtype.
        text: ``(n, e)`` text features; row i belongs to image row i.
        normalize: scale rows to unit length first, as the method does (default True).
        chunk_size: rows of kernel matrices held at a time (default 1024), where n is so small that
            T is had from those; else it is had from a ``d x e`` product. Memory: float64 copies of
            the features, and 16 x chunk_size x n or 8 x max(d, e)^2 bytes.

    Returns:
        Floats ``biased`` in [0, 1], ``unbiased`` (NaN where the unbiased HSIC of a side with itself
        is not positive), ``n``.

    Raises:
        ValueError: features are no matrices, hold NaN or infinity, differ in length, are fewer than
            4, or are all equal; ``chunk_size`` is below 1.

    References:
        S. Kornblith et al., "Similarity of neural network representations revisited", ICML 2019.
        L. Song et al., "Feature selection via dependence maximization", JMLR 2012, equation (5).
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size}: must be at least 1")
    image, text = _checked_pairs(image, text, least=4)
    a, b = (_centred(rows, normalize, name) for rows, name in ((image, "image"), (text, "text")))
    cross, left, right = (
        _hsic(first, second, chunk_size) for first, second in ((a, b), (a, a), (b, b))
    )
    biased, unbiased = (
        cross[kind] / np.sqrt(left[kind] * right[kind])
        if min(left[kind], right[kind]) > 0
        else float("nan")
        for kind in (0, 1)
    )
    return {"biased": float(biased), "unbiased": float(unbiased), "n": float(len(a))}


def _centred(rows: np.ndarray, normalize: bool, name: str) -> np.ndarray:
    rows = unit_rows64(rows) if normalize else rows.astype(np.float64)
    largest = np.abs(rows).max()
    rows = rows - rows.mean(axis=0)
    if np.abs(rows).max() <= 64 * np.finfo(np.float64).eps * largest:
        raise ValueError(f"{name}: all rows are equal; CKA needs rows that differ")
    # Of no consequence for the ratio; keeps products of four entries within range.
    return rows / np.abs(rows).max()


def _hsic(a: np.ndarray, b: np.ndarray, chunk_size: int) -> tuple[float, float]:
    """Biased (up to its factor) and unbiased HSIC of centred rows."""
    n, d, e = len(a), a.shape[1], b.shape[1]
    if d * e <= n * (d + e):
        total = np.square(a.T @ b).sum()
    else:
        total = sum(
            np.sum((a[start : start + chunk_size] @ a.T) * (b[start : start + chunk_size] @ b.T))
            for start in range(0, n, chunk_size)
        )
    p, q = np.square(a).sum(axis=1), np.square(b).sum(axis=1)
    own = n / (n - 2) * np.sum(p * q)
    unbiased = total - own + p.sum() * q.sum() / ((n - 1) * (n - 2))
    # A difference that is all rounding counts as none.
    if abs(unbiased) <= 64 * np.finfo(np.float64).eps * own:
        unbiased = 0.0
    return float(total), float(unbiased / (n * (n - 3)))
