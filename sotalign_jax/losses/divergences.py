"""The other divergences between a student's and a teacher's affinity."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.losses.affinity import check_same_rows, cosine_affinity
from sotalign_jax.numerics import unit_rows

__all__ = ["cka", "info_nce_divergence"]


def cka(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m d"],
    teacher_image: Float[ArrayLike, "n e"],
    teacher_text: Float[ArrayLike, "m e"],
) -> Float[Array, ""]:
    r"""One minus the centred kernel alignment of the student's and the teacher's affinity.

    .. math:: 1 - \frac{\langle H K H, H K^* H \rangle}{\|H K H\| \, \|H K^* H\|},
              \qquad H = I - 1 1^T / n

    With ``K = a b^T`` every inner product of two affinities is one of ``d x d`` matrices,
    ``<a b^T, a* b*^T> = <a^T a*, b^T b*>``: time ``O((n + m) d^2)`` and no ``n x m`` array.

    Args:
        image: ``(n, d)`` student embeddings, any floating dtype; rows are normalised here.
        text: ``(m, d)`` student embeddings.
        teacher_image: ``(n, e)`` teacher embeddings of the same images; a constant, no gradient.
        teacher_text: ``(m, e)`` teacher embeddings of the same texts; a constant, no gradient.

    Returns:
        Float32 scalar in [0, 2]; 0 when the centred affinities are proportional. NaN if one of
        them is constant, which has no direction.

    Raises:
        ValueError: if shapes do not fit.

    References:
        S. Kornblith et al., "Similarity of neural network representations revisited", ICML 2019.
        SOTAlign, arXiv 2602.23353, equation (9), which misprints H as I - 1 1^T.
    """
    check_same_rows(image, text, teacher_image, teacher_text)
    a, b = (_centred(rows) for rows in (image, text))
    ta, tb = (jax.lax.stop_gradient(_centred(rows)) for rows in (teacher_image, teacher_text))
    cross = _inner(a, ta, b, tb)
    # Two roots, because the product of two small squares would leave float32.
    return 1.0 - cross / (jnp.sqrt(_inner(a, a, b, b)) * jnp.sqrt(_inner(ta, ta, tb, tb)))


def _centred(rows):
    rows = unit_rows(rows)
    return rows - jnp.mean(rows, axis=0, keepdims=True)


def _inner(a, a2, b, b2):
    """``<a b^T, a2 b2^T>`` by ``d x e`` products, means for sums to stay near one."""
    precision = jax.lax.Precision.HIGHEST
    left = jnp.matmul(a.T, a2, precision=precision) / a.shape[0]
    right = jnp.matmul(b.T, b2, precision=precision) / b.shape[0]
    return jnp.sum(left * right)


def info_nce_divergence(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m d"],
    teacher_image: Float[ArrayLike, "n e"],
    teacher_text: Float[ArrayLike, "m e"],
    *,
    epsilon: float | Float[ArrayLike, ""] = 0.05,
    teacher_epsilon: float | Float[ArrayLike, ""] = 0.01,
    symmetric: bool = True,
) -> Float[Array, ""]:
    r"""Divergence of row softmaxes: generalised InfoNCE with soft teacher targets.

    .. math:: \frac{1}{n} \sum_i \mathrm{KL}\big(\mathrm{softmax}_j(K^*_{ij} / \epsilon^*)
              \,\|\, \mathrm{softmax}_j(K_{ij} / \epsilon)\big)

    and, if ``symmetric``, the average of that with the same over columns. ``teacher_epsilon=0`` is
    the limit: the target of a row is the teacher's arg-max (the first of equals), and the
    divergence is a cross-entropy. With ``K* = I`` it is plain InfoNCE at scale ``1 / epsilon``.

    Args:
        image: ``(n, d)`` student embeddings, any floating dtype; rows are normalised here.
        text: ``(m, d)`` student embeddings.
        teacher_image: ``(n, e)`` teacher embeddings of the same images; a constant, no gradient.
        teacher_text: ``(m, e)`` teacher embeddings of the same texts; a constant, no gradient.
        epsilon: temperature of the student's softmax, in units of cosine.
        teacher_epsilon: temperature of the teacher's softmax; 0, as a static float, for the
            arg-max.
        symmetric: average over both directions; else images against texts only.

    Returns:
        Float32 scalar, in nats, not negative.

    Raises:
        ValueError: if shapes do not fit or ``teacher_epsilon`` is negative.

    References:
        SOTAlign, arXiv 2602.23353, equation (10).
    """
    if isinstance(teacher_epsilon, int | float) and teacher_epsilon < 0:
        raise ValueError(f"teacher_epsilon must not be negative, got {teacher_epsilon}")
    check_same_rows(image, text, teacher_image, teacher_text)
    logits = cosine_affinity(image, text) / jnp.asarray(epsilon, jnp.float32)
    teacher = jax.lax.stop_gradient(cosine_affinity(teacher_image, teacher_text))
    value = _row_divergence(logits, teacher, teacher_epsilon)
    if symmetric:
        value = 0.5 * (value + _row_divergence(logits.T, teacher.T, teacher_epsilon))
    return value


def _row_divergence(logits, teacher, teacher_epsilon):
    log_student = jax.nn.log_softmax(logits, axis=1)
    if isinstance(teacher_epsilon, int | float) and teacher_epsilon == 0:
        target = jnp.argmax(teacher, axis=1)[:, None]
        return -jnp.mean(jnp.take_along_axis(log_student, target, axis=1))
    log_teacher = jax.nn.log_softmax(teacher / teacher_epsilon, axis=1)
    return jnp.mean(jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=1))
