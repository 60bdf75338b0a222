r"""KLOT: the Kullback-Leibler divergence between a teacher's and a student's transport plan."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.losses.affinity import check_same_rows, cosine_affinity
from sotalign_jax.transport import Plan, ProblemError, solve
from sotalign_jax.transport.plan import Potentials

__all__ = ["KLOTInfo", "klot", "klot_from_affinity"]

Threshold = float | Float[ArrayLike, ""]


class KLOTInfo(NamedTuple):
    """What the two solves behind a KLOT value did.

    Attributes:
        student: plan of the student's affinity.
        teacher: plan of the teacher's affinity.
    """

    student: Plan
    teacher: Plan

    @property
    def potentials(self) -> tuple[Potentials, Potentials]:
        """Both pairs of potentials, which ``klot(init=...)`` takes for a warm start."""
        return self.student.potentials, self.teacher.potentials


def klot(
    image: Float[ArrayLike, "n d"],
    text: Float[ArrayLike, "m d"],
    teacher_image: Float[ArrayLike, "n e"],
    teacher_text: Float[ArrayLike, "m e"],
    *,
    epsilon: float | Float[ArrayLike, ""] = 0.05,
    teacher_epsilon: float | Float[ArrayLike, ""] = 0.01,
    threshold: Threshold | tuple[Threshold, Threshold] = 1e-3,
    max_iterations: int = 500,
    iterations: int | None = None,
    init: tuple[Potentials | None, Potentials | None] | None = None,
) -> tuple[Float[Array, ""], KLOTInfo]:
    r"""KLOT between the cosine affinities of a student's and of a teacher's embeddings.

    .. math::
        \mathrm{KLOT}(K \,\|\, K^*) = \mathrm{KL}\big(\mathrm{OT}_{\epsilon^*}(K^*) \,\|\,
        \mathrm{OT}_\epsilon(K)\big), \qquad K_{ij} = \cos(\mathrm{image}_i, \mathrm{text}_j)

    Images and texts need not correspond, nor be equally many. Rows are normalised here. The plans
    have total mass 1, so the value lies between 0 and about ``log(n m)``, in nats.

    Args:
        image: ``(n, d)`` student embeddings of the images, any floating dtype.
        text: ``(m, d)`` student embeddings of the texts.
        teacher_image: ``(n, e)`` teacher embeddings of the same images; a constant, no gradient.
        teacher_text: ``(m, e)`` teacher embeddings of the same texts; a constant, no gradient.
        epsilon: regularisation of the student's plan, in units of cosine.
        teacher_epsilon: regularisation of the teacher's plan.
        threshold: L1 marginal error at which both Sinkhorn solves stop, or one for each plan,
            ``(student, teacher)``: the student's gets very small in a few iterations more.
        max_iterations: budget of each solve.
        iterations: a fixed number of plain iterations instead (the paper uses 100).
        init: potentials to start from, ``(student, teacher)``, each ``(f, g)`` or ``None``; for
            instance ``info.potentials`` of an earlier call.

    Returns:
        ``(value, info)``: the divergence, float32 scalar, differentiable once with respect to
        ``image`` and ``text``; and a :class:`KLOTInfo` with iterations and marginal errors.

    Raises:
        ValueError: if shapes do not fit or an argument is out of range.
        NotImplementedError: on second-order differentiation, or on differentiation with respect
            to an epsilon or the threshold.

    Note:
        Inside ``shard_map`` pass ``check_vma=False`` (ott's loops do not track varying axes), and
        on a mesh use ``AxisType.Auto`` axes: ``jax.make_mesh`` makes explicit ones by default.

    References:
        SOTAlign, arXiv 2602.23353, section 5, equation (11) and theorem 5.1 (whose main text
        prints the wrong epsilon in the gradient: it is the student's).
    """
    check_same_rows(image, text, teacher_image, teacher_text)
    return klot_from_affinity(
        cosine_affinity(image, text),
        cosine_affinity(teacher_image, teacher_text),
        epsilon=epsilon,
        teacher_epsilon=teacher_epsilon,
        threshold=threshold,
        max_iterations=max_iterations,
        iterations=iterations,
        init=init,
    )


def klot_from_affinity(
    affinity: Float[ArrayLike, "n m"],
    teacher_affinity: Float[ArrayLike, "n m"],
    *,
    epsilon: float | Float[ArrayLike, ""] = 0.05,
    teacher_epsilon: float | Float[ArrayLike, ""] = 0.01,
    threshold: Threshold | tuple[Threshold, Threshold] = 1e-3,
    max_iterations: int = 500,
    iterations: int | None = None,
    init: tuple[Potentials | None, Potentials | None] | None = None,
) -> tuple[Float[Array, ""], KLOTInfo]:
    r"""KLOT between two affinity matrices; see :func:`klot` for the arguments they share.

    The gradient is closed form; nothing is differentiated through Sinkhorn:

    .. math:: \frac{\partial\,\mathrm{KLOT}}{\partial K} = (P - P^*) / \epsilon

    The value is unchanged when a constant, or a constant a row or a column, is added to either
    affinity. ``-inf`` in both affinities forbids an entry.

    Args:
        affinity: ``(n, m)`` affinity of the student, larger is closer, any floating dtype.
        teacher_affinity: ``(n, m)`` affinity of the teacher; a constant, no gradient.
        epsilon: regularisation of the student's plan, in units of ``affinity``.
        teacher_epsilon: regularisation of the teacher's plan.
        threshold: L1 marginal error at which the solves stop, as for :func:`klot`.
        max_iterations: budget of each solve.
        iterations: a fixed number of plain iterations instead.
        init: potentials to start from, as for :func:`klot`.

    Returns:
        ``(value, info)`` as for :func:`klot`.

    Raises:
        ValueError: if the shapes differ, an argument is out of range, or (with concrete input) an
            affinity cannot be transported.
        NotImplementedError: as for :func:`klot`.

    References:
        SOTAlign, arXiv 2602.23353, theorem 5.1 and appendix C.4.
    """
    affinity, teacher_affinity = jnp.asarray(affinity), jnp.asarray(teacher_affinity)
    if affinity.shape != teacher_affinity.shape:
        raise ValueError(
            f"teacher_affinity must have the shape of affinity {affinity.shape}, "
            f"got {teacher_affinity.shape}"
        )
    student_init, teacher_init = (None, None) if init is None else init
    thresholds = threshold if isinstance(threshold, tuple | list) else (threshold, threshold)
    out: Any = _klot(
        (max_iterations, iterations),
        affinity.astype(jnp.float32),
        jax.lax.stop_gradient(teacher_affinity.astype(jnp.float32)),
        _constant(epsilon, "epsilon"),
        _constant(teacher_epsilon, "teacher_epsilon"),
        tuple(_constant(value, "threshold") for value in thresholds),
        jax.lax.stop_gradient((student_init, teacher_init)),
    )
    value, info = out
    return value, jax.lax.stop_gradient(info)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _klot(budget, affinity, teacher_affinity, epsilon, teacher_epsilon, threshold, init):
    info = _solve_both(
        budget, affinity, teacher_affinity, epsilon, teacher_epsilon, threshold, init
    )
    return _value(affinity, teacher_affinity, info), info


def _klot_fwd(budget, affinity, teacher_affinity, epsilon, teacher_epsilon, threshold, init):
    affinity = _first_order_only(affinity)
    info = _solve_both(
        budget, affinity, teacher_affinity, epsilon, teacher_epsilon, threshold, init
    )
    value = _value(affinity, teacher_affinity, info)
    return (value, info), _gradient(affinity, teacher_affinity, info)


def _klot_bwd(budget, gradient, cotangents):
    del budget
    return (cotangents[0] * gradient, None, None, None, None, None)


_klot.defvjp(_klot_fwd, _klot_bwd)


def _solve_both(budget, affinity, teacher_affinity, epsilon, teacher_epsilon, threshold, init):
    plans = []
    for name, matrix, regularisation, stop, start in (
        ("student", affinity, epsilon, threshold[0], init[0]),
        ("teacher", teacher_affinity, teacher_epsilon, threshold[1], init[1]),
    ):
        try:
            plan = solve(
                matrix,
                regularisation,
                threshold=stop,
                max_iterations=budget[0],
                iterations=budget[1],
                init=start,
            )
        except ProblemError as error:
            raise ProblemError(f"{name} plan: {error}") from error
        plans.append(plan)
    return KLOTInfo(*plans)


@jax.jit
def _value(affinity, teacher_affinity, info: KLOTInfo):
    """``sum P* (log P* - log P) - P* + P``: the divergence, in a form no term of which is negative.

    The two last terms cancel, since both plans end with exact rows. Kept entry by entry they make
    the sum exactly zero for equal plans and free of cancellation near them.
    """
    log_student = info.student.log_matrix(affinity)
    log_teacher = info.teacher.log_matrix(teacher_affinity)
    teacher = jnp.exp(log_teacher)
    # A forbidden entry has teacher mass 0 and log -inf on both sides.
    cross = jnp.where(teacher == 0, 0.0, teacher * (log_teacher - log_student))
    return jnp.sum(jnp.sum(cross - teacher + jnp.exp(log_student), axis=1))


@jax.jit
def _gradient(affinity, teacher_affinity, info: KLOTInfo):
    difference = info.student.matrix(affinity) - info.teacher.matrix(teacher_affinity)
    return difference / info.student.epsilon


def _not_differentiable(message: str):
    """An identity that raises ``NotImplementedError(message)`` when differentiated."""

    @jax.custom_jvp
    def identity(x):
        return x

    @identity.defjvp
    def _(primals, tangents):
        raise NotImplementedError(message)

    return identity


_first_order_only = _not_differentiable(
    "klot has a closed first-order gradient only; second-order differentiation (hessian, grad of "
    "grad) would have to differentiate through Sinkhorn, which this loss never does"
)


def _constant(value, name: str):
    """``value`` as it is, or an error when somebody differentiates with respect to it."""
    if not isinstance(value, jax.Array):
        return value
    return _not_differentiable(f"klot is not differentiable with respect to {name}")(value)
