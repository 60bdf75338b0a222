"""S-CLIP: unpaired rows learn from the captions of the paired rows that they resemble."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from sotalign_jax.losses.affinity import cosine_affinity
from sotalign_jax.losses.contrastive import check_block
from sotalign_jax.numerics import MatmulPrecision, check_precision, unit_rows
from sotalign_jax.transport import StreamedAffinity, solve
from sotalign_jax.transport.geometry import AxisName
from sotalign_jax.transport.streamed import over_blocks

__all__ = ["pseudo_label", "pseudo_label_targets"]

Labels = Literal["hard", "soft", "ot"]


def pseudo_label(
    unpaired: Float[ArrayLike, "u d"],
    partners: Float[ArrayLike, "n d"],
    unpaired_view: Float[ArrayLike, "u e"],
    paired_view: Float[ArrayLike, "n e"],
    *,
    labels: Labels = "ot",
    scale: float | Float[ArrayLike, ""] = 20.0,
    label_scale: float | Float[ArrayLike, ""] | None = None,
    iterations: int | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 500,
    unpaired_mask: Bool[ArrayLike, " u"] | None = None,
    paired_mask: Bool[ArrayLike, " n"] | None = None,
    block: int | None = None,
    precision: MatmulPrecision = "float32",
    axis_name: AxisName | None = None,
) -> Float[Array, ""]:
    r"""Cross-entropy of one side's unpaired rows to the pseudo-labels that the pairs give them.

    .. math:: L = -\frac{1}{u} \sum_{q,i} T_{qi} \log \mathrm{softmax}_i
              (s \cos(\mathrm{unpaired}_q, \mathrm{partner}_i))

    with the targets ``T`` of :func:`pseudo_label_targets`. For unpaired images the partners are the
    paired texts and the views are of images; for unpaired texts it is the other way round. The
    original S-CLIP takes half of it, SOTAlign's variant the whole.

    Args:
        unpaired: ``(u, d)`` embeddings of the unpaired rows, any floating dtype.
        partners: ``(n, d)`` embeddings of the other side of the pairs.
        unpaired_view: ``(u, e)`` what unpaired rows are compared by: their frozen features
            (``unimodal``), or their embeddings (``joint``). No gradient.
        paired_view: ``(n, e)`` the same of their own side of the pairs. No gradient.
        labels: ``"hard"``, ``"soft"`` or ``"ot"``.
        scale: inverse temperature ``s``, positive (not its logarithm).
        label_scale: that of the targets; by default ``scale``, without gradient.
        iterations: for ``"ot"``, as for :func:`pseudo_label_targets`.
        threshold: likewise.
        max_iterations: likewise.
        unpaired_mask: ``(u,)``, False for rows that do not count (padding); all count by default.
        paired_mask: ``(n,)``, likewise, of the pairs.
        block: rows of logits and of targets that are held at once, forward and backward; all by
            default.
        precision: of the products of embeddings and of views, as for `siglip`.
        axis_name: inside ``shard_map``, the mesh axes over which the unpaired rows, their views and
            their mask are spread; pairs are whole on every device, and the value is the same on
            all.

    Returns:
        Float32 scalar, in nats, not negative; NaN where no plan exists.

    Raises:
        ValueError: if shapes do not fit or an option is unknown or out of range.

    References:
        S. Mo et al., "S-CLIP: semi-supervised vision-language learning using few specialist
        captions", NeurIPS 2023. SOTAlign, arXiv 2602.23353, section 6 (baselines).
    """
    for name, rows, view_name, view in (
        ("unpaired", unpaired, "unpaired_view", unpaired_view),
        ("partners", partners, "paired_view", paired_view),
    ):
        if jnp.shape(rows)[0] != jnp.shape(view)[0]:
            raise ValueError(
                f"{view_name} must be of the rows of {name}: got {jnp.shape(view)[0]} rows for "
                f"{jnp.shape(rows)[0]}"
            )
    _check_dim("partners", partners, "unpaired", unpaired)
    _check_dim("paired_view", paired_view, "unpaired_view", unpaired_view)
    _check_scale("scale", scale)
    _check_scale("label_scale", label_scale)
    _check_labels(labels)
    check_block(block)
    check_precision(precision)
    u, n = jnp.shape(unpaired)[0], jnp.shape(partners)[0]
    _check_some_rows(u, n)
    scale = jnp.asarray(scale, jnp.float32)
    label_scale = scale if label_scale is None else jnp.asarray(label_scale, jnp.float32)
    label_scale = jax.lax.stop_gradient(label_scale)
    affinity, views = (
        StreamedAffinity(unit_rows(rows), unit_rows(pairs), block or u, precision)
        for rows, pairs in ((unpaired, partners), (unpaired_view, paired_view))
    )
    views = jax.lax.stop_gradient(views)
    # Without blocks the cosines of the views are held, and serve both the plan and the targets.
    compared = views if block is not None else views.of_rows(views.image)
    potential = None
    if labels == "ot":
        a, b = _uniform(unpaired_mask, axis_name), _uniform(paired_mask, None)
        potential = solve(
            compared,
            1.0 / label_scale,
            a=a,
            b=b,
            threshold=threshold,
            max_iterations=max_iterations,
            iterations=iterations,
            axis_name=axis_name,
        ).g
    mask = jnp.ones(u, bool) if unpaired_mask is None else jnp.asarray(unpaired_mask)
    wanted = jnp.ones(n, bool) if paired_mask is None else jnp.asarray(paired_mask)

    def rows_of(carry, rows):
        unpaired, view, mask = rows
        cosines = view if block is None else views.of_rows(view)
        targets = _targets(cosines, labels, label_scale, potential, wanted)
        logits = jnp.where(wanted[None, :], scale * affinity.of_rows(unpaired), -jnp.inf)
        logs = jnp.where(wanted[None, :], jax.nn.log_softmax(logits, axis=1), 0.0)
        return carry, jnp.where(mask, -jnp.sum(targets * logs, axis=1), 0.0)

    if block is not None:
        rows_of = jax.checkpoint(rows_of)  # or the logits of all blocks would wait for the gradient
    seen = compared if block is None else views.image
    _, losses = over_blocks(rows_of, (), (affinity.image, seen, mask), affinity.block)
    total, count = jnp.sum(losses), jnp.sum(mask, dtype=jnp.float32)
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)
    return total / count


def pseudo_label_targets(
    unpaired: Float[ArrayLike, "u e"],
    paired: Float[ArrayLike, "n e"],
    *,
    labels: Labels = "ot",
    scale: float | Float[ArrayLike, ""] = 20.0,
    iterations: int | None = None,
    threshold: float = 1e-3,
    max_iterations: int = 500,
) -> Float[Array, "u n"]:
    r"""Which pairs each unpaired row resembles, as a distribution; always a constant.

    With ``K`` the cosines of unpaired and paired rows of one modality:

    * ``"hard"``: all on the most similar pair, the first of equals;
    * ``"soft"``: ``softmax_i(s K_qi)``;
    * ``"ot"``: the entropic plan of ``K`` with uniform marginals and regularisation ``1 / s``,
      its rows divided by their sums. So each pair is the label of equally many rows.

    Args:
        unpaired: ``(u, e)`` rows without a partner, any floating dtype.
        paired: ``(n, e)`` rows of the same modality that have one.
        labels: ``"hard"``, ``"soft"`` or ``"ot"``.
        scale: inverse temperature ``s``, positive; of no effect on ``"hard"``.
        iterations: for ``"ot"``: None solves for the plan that the paper defines; a number does
            that many Sinkhorn iterations, columns before rows. The published code does 10, after
            which columns are still unequal at large scales.
        threshold: for ``"ot"``: L1 marginal error at which a solve stops.
        max_iterations: for ``"ot"``: budget of a solve.

    Returns:
        ``(u, n)`` float32, rows that sum to one, under ``stop_gradient``; three such matrices are
        held. NaN where rows are NaN, and under ``jit`` where no plan exists.

    Raises:
        ValueError: if the dimensions differ, there are no rows, or an option is unknown or out of
            range; for ``"ot"`` outside of ``jit`` also where no plan exists.

    Note:
        All rows count, and all must be on one device. A plan that did not converge in its budget,
        which takes scales of some hundreds, is used as it is.

    References:
        S. Mo et al., "S-CLIP: semi-supervised vision-language learning using few specialist
        captions", NeurIPS 2023, section 4 (caption-level pseudo-labels).
    """
    _check_labels(labels)
    _check_scale("scale", scale)
    _check_some_rows(jnp.shape(unpaired)[0], jnp.shape(paired)[0])
    _check_dim("paired", paired, "unpaired", unpaired)
    affinity = jax.lax.stop_gradient(cosine_affinity(unpaired, paired))
    scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
    potential = None
    if labels == "ot":
        potential = solve(
            affinity,
            1.0 / scale,
            threshold=threshold,
            max_iterations=max_iterations,
            iterations=iterations,
        ).g
    wanted = jnp.ones(affinity.shape[1], bool)
    return jax.lax.stop_gradient(_targets(affinity, labels, scale, potential, wanted))


def _targets(
    cosines: Float[Array, "k n"],
    labels: str,
    scale: Float[Array, ""],
    potential: Float[Array, " n"] | None,
    wanted: Bool[Array, " n"],
) -> Float[Array, "k n"]:
    """The labels of some rows: all that a plan adds to their cosines is one number a pair."""
    if labels == "hard":
        bad = jnp.any(wanted[None, :] & jnp.isnan(cosines), axis=1, keepdims=True)
        best = jnp.argmax(jnp.where(wanted[None, :], cosines, -jnp.inf), axis=1)
        best = jax.nn.one_hot(best, cosines.shape[1], dtype=jnp.float32)
        # The largest of NaN is nothing, and must not look like a label.
        return jnp.where(bad, jnp.nan, best)
    if potential is not None:
        # Rows of a plan over their sums: the row potentials cancel.
        cosines = cosines + potential[None, :]
    return jax.nn.softmax(jnp.where(wanted[None, :], scale * cosines, -jnp.inf), axis=1)


def _uniform(mask, axis_name: AxisName | None):
    """The marginal that gives all rows which count the same mass; None where all do."""
    if mask is None:
        return None
    count = jnp.sum(mask, dtype=jnp.float32)
    return jnp.asarray(mask, jnp.float32) / (
        count if axis_name is None else jax.lax.psum(count, axis_name)
    )


def _check_labels(labels: str) -> None:
    if labels not in ("hard", "soft", "ot"):
        raise ValueError(f"labels must be 'hard', 'soft' or 'ot', got {labels!r}")


def _check_some_rows(unpaired: int, paired: int) -> None:
    for name, rows in (("unpaired", unpaired), ("paired", paired)):
        if rows < 1:
            raise ValueError(f"{name} must have at least one row, got none")


def _check_dim(name: str, rows, other_name: str, other) -> None:
    if jnp.shape(rows)[-1] != jnp.shape(other)[-1]:
        raise ValueError(
            f"{name} must have the dimension of {other_name}, {jnp.shape(other)[-1]}, got "
            f"{jnp.shape(rows)[-1]}"
        )


def _check_scale(name: str, scale) -> None:
    if scale is not None and not isinstance(scale, Tracer) and not float(scale) > 0:
        raise ValueError(f"{name} must be positive, got {scale}")
