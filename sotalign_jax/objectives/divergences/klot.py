"""KLOT: the teacher's transport plan against the student's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sotalign_jax import losses
from sotalign_jax.features.batches import Batch
from sotalign_jax.numerics import matmul, unit_rows
from sotalign_jax.objectives.base import (
    Divergence,
    LossSettings,
    Moment,
    Outcome,
    RowPotentials,
    counts,
    whole,
)
from sotalign_jax.transport import Plan, perplexity

__all__ = ["KLOT"]

# Images by which the sharpness of a plan is told.
_LOOKED_AT = 32


def _klot(
    image: Array, text: Array, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    mask, _ = counts(image, settings.sizes[1], settings)
    _, text_mask = counts(text, settings.sizes[2], settings)
    text, teacher_text = whole(text, settings), whole(batch.teacher_text, settings)

    def init(potential, share: float):
        # The first update of a balanced problem replaces the potentials of the columns.
        return None if potential is None else (share * potential, jnp.zeros(text.shape[0]))

    value, info = losses.klot(
        image,
        text,
        batch.teacher_image,
        teacher_text,
        epsilon=settings.epsilon,
        teacher_epsilon=settings.teacher_epsilon,
        a=None if mask is None else mask.astype(jnp.float32) / settings.sizes[1],
        b=None if text_mask is None else text_mask.astype(jnp.float32) / settings.sizes[2],
        threshold=settings.threshold,
        max_iterations=settings.max_iterations,
        iterations=settings.iterations or None,
        init=(
            init(moment.start.student, settings.warm_student),
            init(moment.start.teacher, settings.warm_teacher),
        ),
        memory=settings.memory,
        memory_gib=settings.memory_gib,
        precision=settings.precision,
        axis_name=settings.axis_name,
    )
    metrics = {
        "train/klot": value,
        "train/student_marginal_error": info.student.marginal_error,
        "train/teacher_marginal_error": info.teacher.marginal_error,
        "train/student_iterations": info.student.iterations.astype(jnp.float32),
        "train/teacher_iterations": info.teacher.iterations.astype(jnp.float32),
        "train/student_perplexity": _perplexity(info.student, image, text, settings),
        "train/teacher_perplexity": _perplexity(
            info.teacher, batch.teacher_image, teacher_text, settings
        ),
    }
    potentials = RowPotentials(
        *(
            None if old is None else _centred(plan.f, mask, settings)
            for old, plan in zip(moment.start, info, strict=True)
        )
    )
    return value, Outcome(metrics, potentials)


@jax.named_scope("sharpness")
def _perplexity(plan: Plan, image: Array, text: Array, settings: LossSettings) -> Array:
    """The sharpness of a plan, by the first images of the batch: all would cost a pass of its own.

    The same images on any number of devices, on the first of which they are.
    """
    rows = image.shape[0]
    image, text = jax.lax.stop_gradient((image[:_LOOKED_AT], text))
    weights = None
    if settings.axis_name is not None:
        first = jax.lax.axis_index(settings.axis_name) * rows
        here = first + jnp.arange(image.shape[0], dtype=jnp.int32)
        weights = (here < min(_LOOKED_AT, settings.sizes[1])).astype(jnp.float32)
    affinity = matmul(unit_rows(image), unit_rows(text).T, "float32")
    return perplexity(plan, affinity, weights=weights, axis_name=settings.axis_name)


def _centred(potential: Array, mask: Array | None, settings: LossSettings) -> Array:
    """Row potentials less their mean, as which they are the same whatever constant a solve chose.

    So potentials of rows that were last seen in different batches can start one solve together.
    Padding, and potentials of a problem that has no plan, are 0.
    """
    known = jnp.isfinite(potential) if mask is None else mask & jnp.isfinite(potential)
    total = jnp.sum(jnp.where(known, potential, 0.0))
    count = jnp.sum(known.astype(potential.dtype))
    if settings.axis_name is not None:
        total, count = jax.lax.psum((total, count), settings.axis_name)
    return jnp.where(known, potential - total / jnp.maximum(count, 1.0), 0.0)


KLOT = Divergence(_klot, potentials=True)
