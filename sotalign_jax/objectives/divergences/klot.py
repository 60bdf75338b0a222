"""KLOT: the teacher's transport plan against the student's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sotalign_jax import losses
from sotalign_jax.features.batches import Batch
from sotalign_jax.objectives.base import (
    Divergence,
    LossSettings,
    Moment,
    Outcome,
    RowPotentials,
    counts,
    whole,
)

__all__ = ["KLOT"]


def _klot(
    image: Array, text: Array, batch: Batch, settings: LossSettings, moment: Moment
) -> tuple[Array, Outcome]:
    mask, _ = counts(image, settings.sizes[1], settings)
    _, text_mask = counts(text, settings.sizes[2], settings)
    text = whole(text, settings)

    def init(potential, share: float):
        # The first update of a balanced problem replaces the potentials of the columns.
        return None if potential is None else (share * potential, jnp.zeros(text.shape[0]))

    value, info = losses.klot(
        image,
        text,
        batch.teacher_image,
        whole(batch.teacher_text, settings),
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
    }
    potentials = RowPotentials(
        *(
            None if old is None else _centred(plan.f, mask, settings)
            for old, plan in zip(moment.start, info, strict=True)
        )
    )
    return value, Outcome(metrics, potentials)


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
