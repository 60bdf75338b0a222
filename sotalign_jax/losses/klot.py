r"""KLOT: the Kullback-Leibler divergence between a teacher's and a student's transport plan."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from sotalign_jax.losses.affinity import check_same_dim, check_same_rows
from sotalign_jax.numerics import (
    MatmulPrecision,
    check_precision,
    matmul,
    unit_rows,
    varying_like,
    varying_over,
)
from sotalign_jax.transport import Plan, ProblemError, StreamedAffinity, solve
from sotalign_jax.transport.geometry import AxisName
from sotalign_jax.transport.plan import Potentials
from sotalign_jax.transport.streamed import block_rows, over_blocks

__all__ = ["KLOTInfo", "klot", "klot_from_affinity"]

Threshold = float | Float[ArrayLike, ""]

# Matrices of n x m float32 that the dense form holds at its fullest (value and gradient, compiled).
_DENSE_COPIES = 5
_GIB = 2**30
_STREAM_SHARE = 1 / 16


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
    a: Float[ArrayLike, " n"] | None = None,
    b: Float[ArrayLike, " m"] | None = None,
    threshold: Threshold | tuple[Threshold, Threshold] = 1e-3,
    max_iterations: int = 500,
    iterations: int | None = None,
    init: tuple[Potentials | None, Potentials | None] | None = None,
    memory: Literal["dense", "streamed", "auto"] = "auto",
    memory_gib: float = 4.0,
    precision: MatmulPrecision = "float32",
    axis_name: AxisName | None = None,
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
        a: ``(n,)`` weights of the images, of total mass 1; uniform by default. A finite row of
            weight zero (padding) changes nothing and gets no gradient.
        b: ``(m,)`` weights of the texts, likewise.
        threshold: L1 marginal error at which both Sinkhorn solves stop, or one for each plan,
            ``(student, teacher)``: the student's gets very small in a few iterations more.
        max_iterations: budget of each solve.
        iterations: a fixed number of plain iterations instead (the paper uses 100).
        init: potentials to start from, ``(student, teacher)``, each ``(f, g)`` or ``None``; for
            instance ``info.potentials`` of an earlier call.
        memory: ``"dense"`` holds ``n x m`` matrices, and is the faster where they fit;
            ``"streamed"`` holds none, forward or backward, and forms each block of affinities anew
            for every Sinkhorn iteration; ``"auto"`` is dense where five such matrices (float32)
            fit in ``memory_gib``.
        memory_gib: what the matrices, or the blocks (a sixteenth of it), may take of one device.
        precision: of the products of embeddings, forward and backward. ``"bfloat16_3x"`` sums three
            products of bfloat16 parts, for accelerators whose float32 products are slow: cosines
            are off by some ``2e-7``, and a plan misses its marginals by about ``4e-7 / epsilon``
            more than its errors say. One bfloat16 product is not offered: its plans miss them by
            1 to 5 per cent.
        axis_name: inside ``shard_map``, the mesh axes over which the images are spread:
            ``image``, ``teacher_image`` and ``a`` are this device's ``n`` rows, texts are whole on
            every device, and the value is the same on all. Scalars and one or two column vectors
            travel in an iteration, and the gradient of ``text`` once.

    Returns:
        ``(value, info)``: the divergence, float32 scalar, differentiable once with respect to
        ``image`` and ``text``; and a :class:`KLOTInfo` with iterations and marginal errors.

    Raises:
        ValueError: if shapes do not fit or an argument is out of range.
        NotImplementedError: on second-order differentiation, or on differentiation with respect
            to an epsilon or the threshold.

    Note:
        On a mesh use ``AxisType.Auto`` axes: ``jax.make_mesh`` makes explicit ones by default. With
        ``shard_map(check_vma=False)`` and ``axis_name``, take the gradient outside ``shard_map``:
        JAX then multiplies gradients taken inside by the number of devices.

    References:
        SOTAlign, arXiv 2602.23353, section 5, equation (11) and theorem 5.1 (whose main text
        prints the wrong epsilon in the gradient: it is the student's).
    """
    check_same_rows(image, text, teacher_image, teacher_text)
    check_precision(precision)
    shape = (jnp.shape(image)[0], jnp.shape(text)[0])
    block = dense_or_block(memory, memory_gib, *shape)
    image, text = unit_rows(image), unit_rows(text)
    if axis_name is not None:
        # Each device has its share of the gradient of the texts: the transpose adds them up.
        text = varying_over(text, axis_name)
    check_same_dim(teacher_image, teacher_text)
    check_same_dim(image, text)

    def affinity(rows, columns):
        streamed = StreamedAffinity(rows, columns, block or shape[0], precision)
        return streamed if block else streamed.of_rows(rows)

    return _divergence(
        affinity(image, text),
        affinity(unit_rows(teacher_image), unit_rows(teacher_text)),
        regularisation=(epsilon, teacher_epsilon),
        marginals=(a, b),
        threshold=threshold,
        static=(max_iterations, iterations, axis_name),
        init=init,
    )


def klot_from_affinity(
    affinity: Float[ArrayLike, "n m"],
    teacher_affinity: Float[ArrayLike, "n m"],
    *,
    epsilon: float | Float[ArrayLike, ""] = 0.05,
    teacher_epsilon: float | Float[ArrayLike, ""] = 0.01,
    a: Float[ArrayLike, " n"] | None = None,
    b: Float[ArrayLike, " m"] | None = None,
    threshold: Threshold | tuple[Threshold, Threshold] = 1e-3,
    max_iterations: int = 500,
    iterations: int | None = None,
    init: tuple[Potentials | None, Potentials | None] | None = None,
    axis_name: AxisName | None = None,
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
        a: ``(n,)`` weights of the rows, as for :func:`klot`.
        b: ``(m,)`` weights of the columns.
        threshold: L1 marginal error at which the solves stop, as for :func:`klot`.
        max_iterations: budget of each solve.
        iterations: a fixed number of plain iterations instead.
        init: potentials to start from, as for :func:`klot`.
        axis_name: inside ``shard_map``, the mesh axes over which the rows are spread.

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
    return _divergence(
        affinity.astype(jnp.float32),
        teacher_affinity.astype(jnp.float32),
        regularisation=(epsilon, teacher_epsilon),
        marginals=(a, b),
        threshold=threshold,
        static=(max_iterations, iterations, axis_name),
        init=init,
    )


def dense_or_block(memory: str, memory_gib: float, n: int, m: int) -> int:
    """Rows of a streamed block, or 0 for the dense form; see `klot` for ``memory``."""
    if memory not in ("dense", "streamed", "auto"):
        raise ValueError(f"memory must be 'dense', 'streamed' or 'auto', got {memory!r}")
    if not memory_gib > 0:
        raise ValueError(f"memory_gib must be positive, got {memory_gib}")
    fits = _DENSE_COPIES * 4 * n * m <= memory_gib * _GIB
    if memory == "dense" or (memory == "auto" and fits):
        return 0
    return block_rows(n, m, _STREAM_SHARE * memory_gib * _GIB)


def _divergence(student, teacher, *, regularisation, marginals, threshold, static, init):
    epsilon, teacher_epsilon = regularisation
    a, b = marginals
    thresholds = threshold if isinstance(threshold, tuple | list) else (threshold, threshold)
    out: Any = _klot(
        static,
        student,
        jax.lax.stop_gradient(teacher),
        _constant(epsilon, "epsilon"),
        _constant(teacher_epsilon, "teacher_epsilon"),
        (_constant(a, "a"), _constant(b, "b")),
        tuple(_constant(value, "threshold") for value in thresholds),
        jax.lax.stop_gradient((None, None) if init is None else tuple(init)),
    )
    value, info = out
    axis_name = static[2]
    if axis_name is not None:
        value = jax.lax.psum(value, axis_name)
    return value, jax.lax.stop_gradient(info)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _klot(static, student, teacher, epsilon, teacher_epsilon, marginals, threshold, init):
    info = _solve_both(
        static, student, teacher, epsilon, teacher_epsilon, marginals, threshold, init
    )
    return _contrast(student, teacher, info, with_gradient=False)[0], info


def _klot_fwd(static, student, teacher, epsilon, teacher_epsilon, marginals, threshold, init):
    student = jax.tree.map(_first_order_only, student)
    info = _solve_both(
        static, student, teacher, epsilon, teacher_epsilon, marginals, threshold, init
    )
    value, gradient = _contrast(student, teacher, info, with_gradient=True)
    return (value, info), gradient


def _klot_bwd(static, gradient, cotangents):
    del static
    scaled = jax.tree.map(lambda leaf: cotangents[0] * leaf, gradient)
    return (scaled, None, None, None, None, None, None)


_klot.defvjp(_klot_fwd, _klot_bwd)


def _solve_both(static, student, teacher, epsilon, teacher_epsilon, marginals, threshold, init):
    max_iterations, iterations, axis_name = static
    plans = []
    for name, affinity, regularisation, stop, start in (
        ("student", student, epsilon, threshold[0], init[0]),
        ("teacher", teacher, teacher_epsilon, threshold[1], init[1]),
    ):
        try:
            # Profiles tell the two solves apart by this name.
            with jax.named_scope(f"{name}_plan"):
                plan = solve(
                    affinity,
                    regularisation,
                    a=marginals[0],
                    b=marginals[1],
                    threshold=stop,
                    max_iterations=max_iterations,
                    iterations=iterations,
                    init=start,
                    axis_name=axis_name,
                )
        except ProblemError as error:
            raise ProblemError(f"{name} plan: {error}") from error
        plans.append(plan)
    return KLOTInfo(*plans)


@functools.partial(jax.jit, static_argnames=("with_gradient",))
def _contrast(student, teacher, info: KLOTInfo, with_gradient: bool):
    """The divergence over the rows at hand, and its gradient with respect to ``student``."""
    if isinstance(student, StreamedAffinity):
        return _contrast_streamed(student, teacher, info, with_gradient)
    log_student = info.student.log_matrix(student)
    log_teacher = info.teacher.log_matrix(teacher)
    value = jnp.sum(_row_divergences(log_student, log_teacher))
    if not with_gradient:
        return value, None
    return value, (jnp.exp(log_student) - jnp.exp(log_teacher)) / info.student.epsilon


def _contrast_streamed(
    student: StreamedAffinity, teacher: StreamedAffinity, info: KLOTInfo, with_gradient: bool
):
    """The same, a block at a time: with unit rows, ``dK/d image_i`` is ``text``."""

    def block(gradient, rows):
        image, teacher_image, f, teacher_f = rows
        log_student = info.student._replace(f=f).log_matrix(student.of_rows(image))
        log_teacher = info.teacher._replace(f=teacher_f).log_matrix(teacher.of_rows(teacher_image))
        values = _row_divergences(log_student, log_teacher)
        if not with_gradient:
            return gradient, (values, None)
        slope = (jnp.exp(log_student) - jnp.exp(log_teacher)) / info.student.epsilon
        gradient += matmul(slope.T, image, student.precision)
        return gradient, (values, matmul(slope, student.text, student.precision))

    rows = (student.image, teacher.image, info.student.f, info.teacher.f)
    start = varying_like(jnp.zeros_like(student.text), *rows, student.text, teacher.text)
    text, (values, image) = over_blocks(
        block, start if with_gradient else None, rows, student.block
    )
    value = jnp.sum(values)
    if not with_gradient:
        return value, None
    return value, dataclasses.replace(student, image=image, text=text)


def _row_divergences(log_student, log_teacher):
    """``sum_j P* (log P* - log P) - P* + P``: the divergence, row by row, no term negative.

    The two last terms cancel, since both plans end with exact rows. Kept entry by entry they make
    the sum exactly zero for equal plans and free of cancellation near them.
    """
    teacher = jnp.exp(log_teacher)
    # A forbidden entry has teacher mass 0 and log -inf on both sides.
    cross = jnp.where(teacher == 0, 0.0, teacher * (log_teacher - log_student))
    return jnp.sum(cross - teacher + jnp.exp(log_student), axis=1)


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
