"""Nearest neighbours as further positives: NNCLR and DeCLIP with a table searched once."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key

from sotalign_jax.losses.contrastive import siglip
from sotalign_jax.numerics import MatmulPrecision, matmul, unit_rows
from sotalign_jax.transport.geometry import AxisName
from sotalign_jax.transport.streamed import over_blocks

__all__ = [
    "Neighbours",
    "Sliceable",
    "choose_neighbours",
    "nearest_neighbours",
    "neighbour_siglip",
]


@runtime_checkable
class Sliceable(Protocol):
    """A matrix whose rows can be had a slice at a time, as those of a file are."""

    @property
    def shape(self) -> tuple[int, int]: ...

    def __getitem__(self, index: slice) -> Any: ...


class Neighbours(NamedTuple):
    """The nearest rows of a table, nearest first.

    Attributes:
        rows: ``(q, k)`` their row numbers; every one is a row of the table.
        cosines: ``(q, k)`` their cosines with the query.
    """

    rows: Int[Array, "q k"]
    cosines: Float[Array, "q k"]


def neighbour_siglip(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m d"],
    *,
    text_neighbour: Float[ArrayLike, "m d"] | None = None,
    image_neighbour: Float[ArrayLike, "n d"] | None = None,
    text_weight: float | Float[Array, ""] = 1.0,
    image_weight: float | Float[Array, ""] = 1.0,
    scale: float | Float[ArrayLike, ""] = 20.0,
    bias: float | Float[ArrayLike, ""] = -10.0,
    normalization: Literal["mean", "rows"] = "mean",
    image_mask: Bool[ArrayLike, " n"] | None = None,
    text_mask: Bool[ArrayLike, " m"] | None = None,
    block: int | None = None,
    precision: MatmulPrecision = "float32",
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""SigLIP with the neighbours of the pairs in place of their own image or text.

    .. math:: w_\mathrm{text}\,\mathrm{SigLIP}(\mathrm{image}, \mathrm{text\ neighbour})
              + w_\mathrm{image}\,\mathrm{SigLIP}(\mathrm{image\ neighbour}, \mathrm{text})

    An image is to agree with a text like its own, and a text with an image like its own. This is
    added to ``siglip(image, text)``. Neighbours of other pairs are negatives, even where two pairs
    share one, as in the published code. The gradient goes through the neighbours' embeddings too;
    DeCLIP and NNCLR pass them through ``stop_gradient``.

    Args:
        image: ``(n, d)`` embeddings of the images of the pairs, any floating dtype.
        text: ``(m, d)`` embeddings of their texts, row by row; ``m = n`` but inside ``shard_map``.
        text_neighbour: ``(m, d)`` embeddings of one neighbour of each text, a text itself
            (:func:`nearest_neighbours` of frozen features, :func:`choose_neighbours`). None leaves
            the term out.
        image_neighbour: ``(n, d)`` embeddings of one neighbour of each image. None likewise.
        text_weight: of the first term; 0 leaves it out, where it is not traced.
        image_weight: of the second term.
        scale: logit scale, as for :func:`siglip`; and so are the other arguments.
        bias: logit bias.
        normalization: ``"mean"`` or ``"rows"``.
        image_mask: ``(n,)``, False for pairs that do not count.
        text_mask: ``(m,)``, likewise.
        block: rows of logits that are held at once.
        precision: of the products of embeddings.
        axis_name: inside ``shard_map``, the mesh axes over which the images, and their neighbours,
            are spread; texts and theirs are whole on every device.

    Returns:
        Float32 scalar, in nats.

    Raises:
        ValueError: if there are no neighbours, a weight is negative, shapes differ, or as for
            :func:`siglip`.

    References:
        D. Dwibedi et al., "With a little help from my friends" (NNCLR), ICCV 2021. Y. Li et al.,
        "Supervision exists everywhere" (DeCLIP), ICLR 2022. SOTAlign, arXiv 2602.23353, section 6
        (baselines).
    """
    if text_neighbour is None and image_neighbour is None:
        raise ValueError("text_neighbour or image_neighbour must be given, got neither")
    for name, weight in (("text_weight", text_weight), ("image_weight", image_weight)):
        if not isinstance(weight, Tracer) and not weight >= 0:
            raise ValueError(f"{name} must not be negative, got {weight}")
    for name, rows, neighbour in (
        ("text", text, text_neighbour),
        ("image", image, image_neighbour),
    ):
        if neighbour is not None and jnp.shape(neighbour)[0] != jnp.shape(rows)[0]:
            raise ValueError(
                f"{name}_neighbour must have one row for each {name}: got "
                f"{jnp.shape(neighbour)[0]} rows for {jnp.shape(rows)[0]}"
            )
    if axis_name is None and jnp.shape(image)[0] != jnp.shape(text)[0]:
        raise ValueError(
            f"image and text must pair row by row, got {jnp.shape(image)[0]} and "
            f"{jnp.shape(text)[0]} rows"
        )
    pair_loss = functools.partial(
        siglip,
        scale=scale,
        bias=bias,
        normalization=normalization,
        image_mask=image_mask,
        text_mask=text_mask,
        block=block,
        precision=precision,
        axis_name=axis_name,
    )
    value = jnp.asarray(0.0, jnp.float32)
    if text_neighbour is not None and _counts(text_weight):
        value += text_weight * pair_loss(image, text_neighbour)
    if image_neighbour is not None and _counts(image_weight):
        value += image_weight * pair_loss(image_neighbour, text)
    return value


def _counts(weight) -> bool:
    return isinstance(weight, Tracer) or bool(weight > 0)


def choose_neighbours(key: Key[Array, ""], rows: Int[ArrayLike, "q k"]) -> Int[Array, " q"]:
    """One of the neighbours of each row, each as likely: what a step takes as the positive.

    Args:
        key: of the choice; a new one each step.
        rows: ``(q, k)`` row numbers, as `Neighbours.rows`.

    Returns:
        ``(q,)`` row numbers.

    Raises:
        ValueError: if there is no neighbour to choose from.
    """
    rows = jnp.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] < 1:
        raise ValueError(f"rows must be (q, k) with at least one neighbour, got {rows.shape}")
    at = jax.random.randint(key, (rows.shape[0], 1), 0, rows.shape[1])
    return jnp.take_along_axis(rows, at, axis=1)[:, 0]


def nearest_neighbours(
    query: Float[ArrayLike, "q e"],
    table: Float[ArrayLike, "n e"] | Sliceable,
    k: int = 1,
    *,
    exclude: Int[ArrayLike, " q"] | None = None,
    duplicates: Literal["drop", "keep"] = "drop",
    view: Callable[[Any], Any] | None = None,
    block: int = 4096,
) -> Neighbours:
    """The ``k`` rows of a table with the largest cosines to each query: all compared, none missed.

    Called once, outside of ``jit``: the table, which may be a memory-mapped file or whatever gives
    slices of rows, is read twice from its first row to its last, and ``block`` rows of it are on
    the device at a time. Rows whose cosines are equal in float32 come in the order of the table.

    Args:
        query: ``(q, e)`` rows whose neighbours are sought, any floating dtype.
        table: ``(n, e)`` rows to find them in.
        k: neighbours of a query.
        exclude: ``(q,)`` the row of the table that is the query itself, or -1; never a neighbour.
        duplicates: ``"drop"``: rows of the table that equal the query (as float32) are none of its
            neighbours, and of rows that equal each other only the first is one: otherwise the
            neighbour of a common caption is that caption. Rows that differ in a bit are not equal:
            `sotalign_jax.evaluation.find_duplicates` finds those of almost equal direction.
            ``"keep"``: only ``exclude`` is left out, as in the published code.
        view: what of some rows is compared, ``(c, e)`` to ``(c, d)``, traceable: what an aligner
            makes of raw rows, say. By default the rows themselves. Which rows are duplicates is
            asked of the rows and not of their views.
        block: rows of the table, and queries, that are compared at once: memory is that of the
            queries, of ``block`` rows, and of a ``block x block`` matrix or three.

    Returns:
        The :class:`Neighbours`, ``k`` for each query.

    Raises:
        ValueError: if an array is traced, holds NaN, infinity or a row of zeros, or does not fit
            the others, or a query has fewer than ``k`` neighbours. All before the search.
    """
    if isinstance(query, Tracer) or isinstance(table, Tracer):
        raise ValueError(
            "query and table must be arrays with values: call nearest_neighbours outside of jit"
        )
    if duplicates not in ("drop", "keep"):
        raise ValueError(f"duplicates must be 'drop' or 'keep', got {duplicates!r}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    queries, whole = _sliceable(query), _sliceable(table)
    for name, rows in (("query", queries), ("table", whole)):
        if len(rows.shape) != 2:
            raise ValueError(f"{name} must be a matrix of rows, got shape {rows.shape}")
    (q, e), (n, table_e) = queries.shape, whole.shape
    if e != table_e:
        raise ValueError(f"table must have the dimension of query, {e}, got {table_e}")
    if not 1 <= k <= n:
        raise ValueError(f"k must lie between 1 and the {n} rows of table, got {k}")
    itself = _excluded(exclude, q, n)

    countable = np.ones(n, bool)
    drop = duplicates == "drop"
    query_digests = _checked_digests("query", queries, block, drop)
    table_digests = _checked_digests("table", whole, block, drop)
    if drop:
        first: dict[bytes, int] = {}
        first_of = np.array([first.setdefault(d, i) for i, d in enumerate(table_digests)])
        countable = first_of == np.arange(n)
        equal = np.array([first.get(digest, -1) for digest in query_digests], np.int32)
        itself = np.where(itself < 0, itself, first_of[itself]).astype(np.int32)
        itself = np.stack([equal, np.where(itself == equal, -1, itself)], axis=1)
    else:
        itself = itself[:, None]
    found = np.sum(countable) - np.sum(itself >= 0, axis=1)
    if found.min(initial=n) < k:
        worst = int(np.argmin(found))
        raise ValueError(
            f"k={k} is too large: of the {n} rows of table, {found[worst]} can be neighbours of "
            f"query row {worst}; the others are duplicates or excluded"
        )

    block = min(block, n)
    view = jnp.asarray if view is None else jax.jit(view)
    best = Neighbours(jnp.zeros((q, k), jnp.int32), jnp.full((q, k), -jnp.inf, jnp.float32))
    queries, itself = unit_rows(view(queries)), jnp.asarray(itself)
    for start in range(0, n, block):
        rows, counts = whole[start : start + block], countable[start : start + block]
        if len(rows) < block:  # so that one program serves all blocks
            missing = block - len(rows)
            rows = np.pad(np.asarray(rows), ((0, missing), (0, 0)))
            counts = np.pad(counts, (0, missing))
        best = _merged(best, queries, itself, view(rows), counts, np.int32(start))
    return best


def _sliceable(rows) -> Any:
    """``rows`` as they are where slices of them can be had, else as an array."""
    return rows if isinstance(rows, Sliceable) else np.asarray(rows)


def _excluded(exclude, q: int, n: int) -> np.ndarray:
    if exclude is None:
        return np.full(q, -1, np.int32)
    exclude = np.asarray(exclude)
    if exclude.shape != (q,):
        raise ValueError(f"exclude must have one entry a query, ({q},), got {exclude.shape}")
    if not np.issubdtype(exclude.dtype, np.integer):
        raise ValueError(f"exclude must be whole numbers, got {exclude.dtype}")
    outside = np.flatnonzero((exclude < -1) | (exclude >= n))
    if len(outside):
        raise ValueError(
            f"exclude must name rows of table, 0 to {n - 1}, or -1: entry {outside[0]} is "
            f"{exclude[outside[0]]}"
        )
    return exclude.astype(np.int32)


def _checked_digests(name: str, rows, block: int, digest: bool) -> list[bytes]:
    """A fingerprint of each row, if wanted; a ValueError for a row that has no direction."""
    digests = []
    for start in range(0, rows.shape[0], block):
        # Adding zero makes -0 a 0, which equals it.
        part = np.asarray(rows[start : start + block]).astype(np.float32) + np.float32(0)
        largest = np.max(np.abs(part), axis=1, initial=0)
        bad = np.flatnonzero(~(np.isfinite(largest) & (largest > 0)))
        if len(bad):
            raise ValueError(
                f"{name} row {start + bad[0]} has no direction: rows must be finite and not all "
                "zeros"
            )
        if digest:
            digests += [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in part]
    return digests


@jax.jit
def _merged(best: Neighbours, query, exclude, rows, countable, start) -> Neighbours:
    """The best of what was found so far and of further rows of the table."""
    rows = unit_rows(rows)
    block, k = rows.shape[0], best.rows.shape[1]
    numbers = start + jnp.arange(block, dtype=jnp.int32)

    def of_queries(carry, queries):
        query, exclude, best = queries
        cosines = matmul(query, rows.T)
        wanted = jnp.broadcast_to(countable[None, :], cosines.shape)
        for column in range(exclude.shape[1]):
            wanted &= numbers[None, :] != exclude[:, column : column + 1]
        cosines = jnp.where(wanted, cosines, -jnp.inf)
        # top_k gives the first of equals: those of earlier rows stand first.
        cosines, at = jax.lax.top_k(jnp.concatenate([best.cosines, cosines], axis=1), k)
        every = [best.rows, jnp.broadcast_to(numbers[None, :], wanted.shape)]
        found = jnp.take_along_axis(jnp.concatenate(every, axis=1), at, axis=1)
        return carry, Neighbours(found, cosines)

    return over_blocks(of_queries, (), (query, exclude, best), block)[1]
