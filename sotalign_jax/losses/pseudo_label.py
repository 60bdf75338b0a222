"""S-CLIP: unpaired rows learn from the captions of the paired rows that they resemble."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.losses.affinity import cosine_affinity
from sotalign_jax.transport import solve

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
    targets = pseudo_label_targets(
        unpaired_view,
        paired_view,
        labels=labels,
        scale=scale if label_scale is None else label_scale,
        iterations=iterations,
        threshold=threshold,
        max_iterations=max_iterations,
    )
    logits = jnp.asarray(scale, jnp.float32) * cosine_affinity(unpaired, partners)
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits, axis=1), axis=1))


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
    if labels not in ("hard", "soft", "ot"):
        raise ValueError(f"labels must be 'hard', 'soft' or 'ot', got {labels!r}")
    _check_scale("scale", scale)
    for name, rows in (("unpaired", unpaired), ("paired", paired)):
        if jnp.shape(rows)[0] < 1:
            raise ValueError(f"{name} must have at least one row, got none")
    _check_dim("paired", paired, "unpaired", unpaired)
    affinity = jax.lax.stop_gradient(cosine_affinity(unpaired, paired))
    scale = jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))
    if labels == "hard":
        best = jax.nn.one_hot(jnp.argmax(affinity, axis=1), affinity.shape[1], dtype=jnp.float32)
        # The largest of NaN is nothing, and must not look like a label.
        return jnp.where(jnp.isnan(affinity).any(axis=1, keepdims=True), jnp.nan, best)
    if labels == "soft":
        return jax.nn.softmax(scale * affinity, axis=1)
    plan = solve(
        affinity,
        1.0 / scale,
        threshold=threshold,
        max_iterations=max_iterations,
        iterations=iterations,
    )
    return jax.lax.stop_gradient(jax.nn.softmax(plan.log_matrix(affinity), axis=1))


def _check_dim(name: str, rows, other_name: str, other) -> None:
    if jnp.shape(rows)[-1] != jnp.shape(other)[-1]:
        raise ValueError(
            f"{name} must have the dimension of {other_name}, {jnp.shape(other)[-1]}, got "
            f"{jnp.shape(rows)[-1]}"
        )


def _check_scale(name: str, scale) -> None:
    if scale is not None and not isinstance(scale, Tracer) and not float(scale) > 0:
        raise ValueError(f"{name} must be positive, got {scale}")
