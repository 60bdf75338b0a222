r"""Entropic transport plans of an affinity matrix, solved by ``ott``'s Sinkhorn steps.

The driver here decides only *how* those steps are run: one stabilised (log-sum-exp) iteration,
after which the potentials are absorbed into a kernel, then blocks of scaling iterations on that
kernel, over-relaxed once a first plain block has come near the fixed point. A block whose error
grew is undone and repeated with less relaxation; with none, Sinkhorn never diverges.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn

from sotalign_jax.numerics import varying_like
from sotalign_jax.transport.geometry import AffinityGeometry, AxisName, Look, RowGeometry
from sotalign_jax.transport.plan import Plan, Potentials, ProblemError
from sotalign_jax.transport.streamed import StreamedAffinity, StreamedGeometry

__all__ = ["solve"]

# Absorb anew once a scaling has left [e^-10, e^10]: far inside what float32 can hold.
_ABSORB_BEYOND = 10.0
# Over-relaxation converges for weights below 2; close to 2 it only oscillates.
_MAX_RELAXATION = 1.95
# It is a local method: further from the fixed point than this L1 error it overshoots.
_RELAX_BELOW = 0.3
# Bounds, as exponents, on what an over-relaxed block may leave behind. A plain half-step changes
# no scaling by more than a marginal weight, so from here a plain block stays inside float32.
_SAFE_BEYOND = 20.0


def solve(
    affinity: Float[ArrayLike, "n m"] | StreamedAffinity,
    epsilon: float | Float[ArrayLike, ""],
    *,
    a: Float[ArrayLike, " n"] | None = None,
    b: Float[ArrayLike, " m"] | None = None,
    tau_a: float = 1.0,
    tau_b: float = 1.0,
    threshold: float | Float[ArrayLike, ""] = 1e-3,
    max_iterations: int = 500,
    iterations: int | None = None,
    init: Potentials | None = None,
    relaxation: float = 1.7,
    axis_name: AxisName | None = None,
) -> Plan:
    r"""Entropic optimal transport plan of an affinity.

    .. math:: P = \arg\max_{P \ge 0,\; P 1 = a,\; P^T 1 = b} \; \langle P, K \rangle
              - \epsilon \langle P, \log P \rangle

    A balanced problem ends on a plain Sinkhorn update of the rows, so that the row sums are exact
    and the column error tells how far the plan is. Usable under ``jit`` and ``vmap``; not meant to
    be differentiated (:func:`sotalign_jax.losses.klot` has a closed gradient instead).

    Args:
        affinity: ``(n, m)``, larger is closer; any floating dtype, solved in float32 (float64 if
            it is float64 and x64 is on). ``-inf`` forbids an entry. Or a `StreamedAffinity`, of
            which no ``(n, m)`` array is ever formed.
        epsilon: regularisation, in units of the affinity; positive.
        a: ``(n,)`` row marginal of total mass 1; uniform by default. Zeros are allowed.
        b: ``(m,)`` column marginal of total mass 1; uniform by default. Zeros are allowed.
        tau_a: how firmly the row marginal holds, in (0, 1]. 1 is exact; below it the marginal is
            paid for by ``rho KL`` with ``rho = epsilon tau / (1 - tau)``. A static float.
        tau_b: the same for the column marginal.
        threshold: stop once the L1 marginal error (total mass 1) is below this.
        max_iterations: give up after this many iterations (``converged`` is then False).
        iterations: do exactly this many plain iterations instead, as the paper does (100).
        init: potentials ``(f, g)`` to start from, for instance ``Plan.potentials`` of a related
            problem. Only ``f`` matters to a balanced problem: the first update replaces ``g``.
        relaxation: weight of the over-relaxed blocks, in [1, 2); later blocks raise it to what the
            observed rate of convergence allows (Young's relation). 1 turns it off.
        axis_name: inside ``shard_map``, the mesh axes over which the rows are spread. ``affinity``,
            ``a`` and ``f`` are then those of this device's ``n`` rows, everything else is the same
            on all devices, and what travels is column vectors. Balanced problems only.

    Returns:
        The :class:`Plan`. Where no plan exists (a row of ``-inf``, a NaN) and the input is traced,
        the potentials and errors are NaN and ``converged`` is False.

    Raises:
        ValueError: for a bad argument, named in the message. A row or column that cannot be placed
            is found only if ``affinity`` is concrete.

    References:
        M. Cuturi, "Sinkhorn distances", NeurIPS 2013. B. Schmitzer 2019 (absorption).
        A. Thibault et al., "Overrelaxed Sinkhorn-Knopp algorithm for regularized optimal
        transport", Algorithms 14(5), 2021. D. M. Young, "Iterative solution of large linear
        systems", 1971, section 6.
    """
    if not isinstance(affinity, StreamedAffinity):
        affinity = jnp.asarray(affinity)
    dtype = jnp.float64 if affinity.dtype == jnp.float64 else jnp.float32
    affinity = affinity.astype(dtype)
    _check_arguments(affinity, epsilon, tau_a, tau_b, threshold, max_iterations, iterations)
    if not 1.0 <= relaxation < 2.0:
        raise ProblemError(f"relaxation must lie in [1, 2), got {relaxation}")
    n, m = affinity.shape
    balanced = tau_a == 1.0 and tau_b == 1.0
    if axis_name is not None and not balanced:
        raise ProblemError(
            "axis_name: only balanced problems can be spread over devices, got "
            f"tau_a={tau_a}, tau_b={tau_b}"
        )
    a = _marginal("a", a, n, dtype, balanced, axis_name)
    b = _marginal("b", b, m, dtype, balanced, None)
    if init is None:
        f, g = jnp.zeros(n, dtype), jnp.zeros(m, dtype)
    else:
        f, g = (jnp.asarray(potential, dtype) for potential in init)
        if f.shape != (n,) or g.shape != (m,):
            raise ProblemError(
                f"init must be potentials of shapes ({n},) and ({m},), got {f.shape} and {g.shape}"
            )
    # Rows and columns without mass must not count in the first update of the others.
    f, g = jnp.where(a > 0, f, -jnp.inf), jnp.where(b > 0, g, -jnp.inf)
    epsilon = jnp.asarray(epsilon, dtype)
    threshold = jnp.asarray(threshold, dtype)
    if isinstance(affinity, StreamedAffinity):
        geometry = StreamedGeometry(affinity, epsilon, axis_name=axis_name)
    else:
        geometry = AffinityGeometry(affinity, epsilon, axis_name=axis_name)
    _check_placeable(geometry, a, b)
    if balanced:
        budget, relaxation = (max_iterations, relaxation) if iterations is None else (iterations, 1)
        return _solve_balanced(
            geometry, a, b, f, threshold, budget, float(relaxation), iterations is not None
        )
    return _solve_unbalanced(
        geometry, a, b, f, g, threshold, tau_a, tau_b, max_iterations, iterations
    )


class _State(NamedTuple):
    """Scalings on the absorbed kernel, and what the driver knows of their convergence."""

    u: Float[Array, " n"]
    v: Float[Array, " m"]
    carried: Any  # the geometry's own
    look: Look
    error: Float[Array, ""]  # column error after a plain row update
    weight: Float[Array, ""]
    ceiling: Float[Array, ""]
    iterations: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("budget", "relaxation", "fixed"))
def _solve_balanced(geometry: RowGeometry, a, b, f, threshold, budget, relaxation, fixed) -> Plan:
    dtype, epsilon = geometry.dtype, jnp.asarray(geometry.epsilon)
    feasible = _feasible(geometry, a, b)
    g = geometry.update_potential(f, jnp.zeros_like(b), jnp.log(b), axis=0)
    f = geometry.update_potential(f, g, jnp.log(a), axis=1)

    def column_error(look: Look):
        return jnp.sum(jnp.abs(look.columns - b))

    def safe(u, look: Look):
        """Whether plain blocks can go on from here inside float32."""
        near = geometry.max_rows(jnp.abs(_log(u) - _log(look.u))) <= _SAFE_BEYOND
        return near & jnp.all(look.columns >= b * jnp.exp(-_SAFE_BEYOND))

    def run_block(kernel: RowGeometry, state: _State) -> _State:
        pace = jnp.where(state.weight > 1.0, RowGeometry.pace, kernel.pace)
        length = jnp.minimum(pace, budget - state.iterations)
        u, v, carried, look = kernel.iterate(
            state.u, state.v, state.carried, a, b, state.weight, length
        )
        error = column_error(look)
        # A plain block is always progress; an over-relaxed one may have overshot.
        keep = (safe(u, look) & (error < state.error)) | (state.weight <= 1.0)
        weight, ceiling = _next_weight(state, error, length, keep, relaxation)
        new = (u, v, carried, look, error)
        u, v, carried, look, error = jax.tree.map(
            lambda new, old: jnp.where(keep, new, old), new, tuple(state[:5])
        )
        return _State(u, v, carried, look, error, weight, ceiling, state.iterations + length)

    def unfinished(state: _State):
        # A NaN error compares false, so that a hopeless problem stops at once.
        return (state.iterations < budget) & ((state.error >= threshold) | (fixed & _ok(state)))

    def excursion(state: _State):
        """How far, in the exponent, the scalings have left one."""
        rows = geometry.max_rows(jnp.abs(_log(state.u)))
        return jnp.maximum(rows, jnp.max(jnp.abs(_log(state.v))))

    def absorb_and_run(f, g, error, weight, ceiling, iterations):
        kernel = geometry.absorb(f, g)
        u, v = varying_like(jnp.ones_like(a), f), varying_like(jnp.ones_like(b), g)
        look, carried = kernel.first_look(u, v, a)
        error = jnp.where(jnp.isfinite(error), error, column_error(look))
        state = jax.lax.while_loop(
            lambda s: unfinished(s) & (excursion(s) <= _ABSORB_BEYOND),
            lambda s: run_block(kernel, s),
            _State(u, v, carried, look, error, weight, ceiling, iterations),
        )
        # The over-relaxed potentials carry on the iteration; the finished row potential ends it.
        relaxed = f + epsilon * jnp.log(state.u)
        finished = f + epsilon * jnp.log(state.look.u)
        return relaxed, g + epsilon * jnp.log(state.v), finished, state

    def again(carry):
        f, g, _, state = carry
        return absorb_and_run(f, g, state.error, state.weight, state.ceiling, state.iterations)

    def scalar(value, kind=dtype):
        return varying_like(jnp.asarray(value, kind), g)

    carry = absorb_and_run(
        f,
        g,
        error=scalar(jnp.inf),
        weight=scalar(1.0),
        ceiling=scalar(_MAX_RELAXATION if relaxation > 1 else 1.0),
        # A problem without a plan spends no iterations.
        iterations=scalar(jnp.where(feasible, 1, budget), jnp.int32),
    )
    _, g, f, state = jax.lax.while_loop(lambda carry: unfinished(carry[-1]), again, carry)
    row_error = geometry.sum_rows(jnp.abs(state.look.rows - a))
    # Measured on the plan that is returned, not on what it was before it was absorbed anew.
    columns = column_error(state.look)
    return _checked(
        Plan(
            f=f,
            g=g,
            epsilon=epsilon,
            iterations=state.iterations,
            row_error=row_error,
            column_error=columns,
            converged=(row_error < threshold) & (columns < threshold),
        ),
        feasible,
    )


def _ok(state: _State):
    return jnp.isfinite(state.error)


def _log(scaling):
    """Logarithm of a scaling, 0 where it belongs to no mass."""
    return jnp.log(jnp.where(scaling > 0, scaling, 1.0))


def _next_weight(state: _State, error, length, keep, relaxation):
    """Weight of the next block and its ceiling, given the error of the block just done.

    With contraction ``rate`` per iteration at weight ``w > 1 - rate``, Young's relation gives the
    squared spectral radius of plain half-steps, hence the best weight ``2 / (1 + sqrt(1 - r))``.
    """
    weight = state.weight
    rate = (error / state.error) ** (1.0 / jnp.maximum(length, 1).astype(error.dtype))
    plain_rate = jnp.clip((rate + weight - 1.0) ** 2 / (rate * weight**2), 0.0, 0.9999)
    best = jnp.where(rate > weight - 1.0, 2.0 / (1.0 + jnp.sqrt(1.0 - plain_rate)), weight)
    ceiling = jnp.where(keep, state.ceiling, jnp.maximum(1.0, weight - 0.2))
    proposal = jnp.where(keep & jnp.isfinite(best), jnp.maximum(best, relaxation), 1.0)
    proposal = jnp.where(keep, proposal, ceiling)
    proposal = jnp.where(jnp.where(keep, error, state.error) < _RELAX_BELOW, proposal, 1.0)
    return jnp.minimum(proposal, ceiling), ceiling


def _feasible(geometry: RowGeometry, a, b):
    """Whether every row and column that has mass can be placed."""
    rows, columns = geometry.placeable(a, b)
    return (geometry.sum_rows((~rows).astype(jnp.int32)) == 0) & jnp.all(columns)


def _checked(plan: Plan, feasible) -> Plan:
    """NaN instead of finite numbers where there is no plan."""
    ok = feasible & jnp.isfinite(plan.row_error) & jnp.isfinite(plan.column_error)
    nan = jnp.asarray(jnp.nan, plan.f.dtype)
    return plan._replace(
        f=jnp.where(ok, plan.f, nan),
        g=jnp.where(ok, plan.g, nan),
        row_error=jnp.where(ok, plan.row_error, nan),
        column_error=jnp.where(ok, plan.column_error, nan),
        converged=plan.converged & ok,
    )


@functools.partial(jax.jit, static_argnames=("tau_a", "tau_b", "max_iterations", "iterations"))
def _solve_unbalanced(
    geometry: RowGeometry, a, b, f, g, threshold, tau_a, tau_b, max_iterations, iterations
) -> Plan:
    """Log-sum-exp steps of ``ott``: absorption does not commute with ``tau < 1``."""
    epsilon = jnp.asarray(geometry.epsilon)
    problem = linear_problem.LinearProblem(geometry, a=a, b=b, tau_a=tau_a, tau_b=tau_b)
    solver = sinkhorn.Sinkhorn()
    budget = max_iterations if iterations is None else iterations

    def step(i, potentials):
        return solver.lse_step(problem, sinkhorn.SinkhornState(potentials), i).potentials

    def run_block(carry):
        f, g, done, _, _ = carry
        # Not the geometry's own: here every look is two more log-sum-exp passes.
        length = jnp.minimum(RowGeometry.pace, budget - done)
        f, g = jax.lax.fori_loop(0, length, step, (f, g))
        rows = geometry.marginal_from_potentials(f, g, axis=1)
        columns = geometry.marginal_from_potentials(f, g, axis=0)
        row_error = geometry.sum_rows(jnp.abs(rows - _unbalanced_target(a, f, tau_a, epsilon)))
        column_error = jnp.sum(jnp.abs(columns - _unbalanced_target(b, g, tau_b, epsilon)))
        return f, g, done + length, row_error, column_error

    def unfinished(carry):
        _, _, done, row_error, column_error = carry
        inexact = jnp.maximum(row_error, column_error) >= threshold
        return (done < budget) & (inexact | (iterations is not None))

    f, g, infinite = (
        varying_like(x, *jax.tree.leaves(geometry))
        for x in (f, g, jnp.asarray(jnp.inf, geometry.dtype))
    )
    f, g, done, row_error, column_error = jax.lax.while_loop(
        unfinished, run_block, (f, g, jnp.asarray(0, jnp.int32), infinite, infinite)
    )
    return _checked(
        Plan(
            f=f,
            g=g,
            epsilon=epsilon,
            iterations=done,
            row_error=row_error,
            column_error=column_error,
            converged=(row_error < threshold) & (column_error < threshold),
        ),
        _feasible(geometry, a, b),
    )


def _unbalanced_target(marginal, potential, tau: float, epsilon):
    """What optimality asks of a relaxed marginal: ``a exp(-f / rho)``."""
    if tau == 1.0:
        return marginal
    rho = epsilon * tau / (1.0 - tau)
    return jnp.where(marginal > 0, marginal * jnp.exp(-potential / rho), 0.0)


def _is_concrete(*arrays) -> bool:
    return not any(isinstance(array, Tracer) for array in arrays)


def _check_arguments(affinity, epsilon, tau_a, tau_b, threshold, max_iterations, iterations):
    if len(affinity.shape) != 2 or 0 in affinity.shape:
        raise ProblemError(f"affinity must be a (n, m) matrix with entries, got {affinity.shape}")
    for name, value in (("epsilon", epsilon), ("threshold", threshold)):
        if _is_concrete(value) and not (np.ndim(value) == 0 and 0 < float(value) < np.inf):
            raise ProblemError(f"{name} must be a positive number, got {value}")
    for name, tau in (("tau_a", tau_a), ("tau_b", tau_b)):
        if not 0.0 < tau <= 1.0:
            raise ProblemError(f"{name} must lie in (0, 1], got {tau}")
    for name, count in (("max_iterations", max_iterations), ("iterations", iterations)):
        if count is not None and count < 1:
            raise ProblemError(f"{name} must be at least 1, got {count}")


def _marginal(name: str, marginal, size: int, dtype, balanced: bool, axis_name):
    if marginal is None:
        parts = 1 if axis_name is None else jax.lax.axis_size(axis_name)
        return jnp.full(size, 1.0 / (size * parts), dtype)
    marginal = jnp.asarray(marginal, dtype)
    if marginal.shape != (size,):
        raise ProblemError(f"{name} must have shape ({size},), got {marginal.shape}")
    if axis_name is None and _is_concrete(marginal):
        mass = float(jnp.sum(marginal))
        if not bool(jnp.all(marginal >= 0)):
            raise ProblemError(f"{name} must hold weights that are not negative and not NaN")
        if balanced and abs(mass - 1.0) > 1e-3:
            raise ProblemError(f"{name} must have total mass 1 in a balanced problem, got {mass:g}")
    return marginal


def _check_placeable(geometry: RowGeometry, a, b):
    if geometry.axis_name is not None or not _is_concrete(*jax.tree.leaves(geometry), a, b):
        return
    for kind, fine in zip(("row", "column"), geometry.placeable(a, b), strict=True):
        bad = np.flatnonzero(~np.asarray(fine))
        if bad.size:
            raise ProblemError(
                f"affinity cannot be transported: {kind} {bad[0]} ({bad.size} in all) has NaN, "
                "+inf or no finite entry; every row and column needs a finite largest entry"
            )
