r"""Entropic transport plans of an affinity matrix, solved by ``ott``'s Sinkhorn steps.

The driver here decides only *how* those steps are run: one stabilised (log-sum-exp) iteration,
after which the potentials are absorbed into a kernel, then blocks of scaling iterations on that
kernel, over-relaxed once a first plain block has come near the fixed point. A block whose error
grew is undone and repeated with less relaxation; with none, Sinkhorn never diverges.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int
from ott.problems.linear import linear_problem
from ott.solvers.linear import acceleration, sinkhorn

from sotalign_jax.transport.geometry import AffinityGeometry

__all__ = ["Plan", "ProblemError", "solve"]

Potentials = tuple[Float[ArrayLike, " n"], Float[ArrayLike, " m"]]

# Iterations between two looks at the marginal error. The error costs as much as one iteration.
_BLOCK = 5
# Absorb anew once a scaling has left [e^-10, e^10]: far inside what float32 can hold.
_ABSORB_BEYOND = 10.0
# Over-relaxation converges for weights below 2; close to 2 it only oscillates.
_MAX_RELAXATION = 1.95
# It is a local method: further from the fixed point than this L1 error it overshoots.
_RELAX_BELOW = 0.3
# Bounds, as exponents, on what an over-relaxed block may leave behind. A plain half-step changes
# no scaling by more than a marginal weight, so from here a plain block stays inside float32.
_SAFE_BEYOND = 20.0


class ProblemError(ValueError):
    """A transport problem that is ill-posed, or badly asked for; the message names the argument."""


class Plan(NamedTuple):
    r"""An entropic transport plan, held as its potentials.

    .. math:: P_{ij} = \exp\big((f_i + g_j + K_{ij}) / \epsilon\big), \qquad \sum_{ij} P_{ij} = 1

    Attributes:
        f: ``(n,)`` row potentials, in units of the affinity; the marginals are inside.
        g: ``(m,)`` column potentials. ``f`` and ``g`` are unique only up to a constant.
        epsilon: the regularisation that the plan was solved for.
        iterations: Sinkhorn iterations done.
        row_error: L1 distance of the plan's row sums to what they should be, at total mass 1.
        column_error: the same of the column sums.
        converged: whether both errors are below the threshold.
    """

    f: Float[Array, " n"]
    g: Float[Array, " m"]
    epsilon: Float[Array, ""]
    iterations: Int[Array, ""]
    row_error: Float[Array, ""]
    column_error: Float[Array, ""]
    converged: Bool[Array, ""]

    @property
    def potentials(self) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        """``(f, g)``, which ``solve(init=...)`` takes for a warm start."""
        return self.f, self.g

    @property
    def marginal_error(self) -> Float[Array, ""]:
        """The larger of the two L1 marginal errors."""
        return jnp.maximum(self.row_error, self.column_error)

    def log_matrix(self, affinity: Float[ArrayLike, "n m"]) -> Float[Array, "n m"]:
        """Logarithm of the plan, given the affinity that it was solved for."""
        affinity = jnp.asarray(affinity, self.f.dtype)
        return (self.f[:, None] + self.g[None, :] + affinity) / self.epsilon

    def matrix(self, affinity: Float[ArrayLike, "n m"]) -> Float[Array, "n m"]:
        """The plan as an ``(n, m)`` matrix, given the affinity that it was solved for."""
        return jnp.exp(self.log_matrix(affinity))


def solve(
    affinity: Float[ArrayLike, "n m"],
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
) -> Plan:
    r"""Entropic optimal transport plan of an affinity.

    .. math:: P = \arg\max_{P \ge 0,\; P 1 = a,\; P^T 1 = b} \; \langle P, K \rangle
              - \epsilon \langle P, \log P \rangle

    A balanced problem ends on a plain Sinkhorn update of the rows, so that the row sums are exact
    and the column error tells how far the plan is. Usable under ``jit`` and ``vmap``; not meant to
    be differentiated (:func:`sotalign_jax.losses.klot` has a closed gradient instead).

    Args:
        affinity: ``(n, m)``, larger is closer; any floating dtype, solved in float32 (float64 if
            it is float64 and x64 is on). ``-inf`` forbids an entry.
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
    affinity = jnp.asarray(affinity)
    dtype = jnp.float64 if affinity.dtype == jnp.float64 else jnp.float32
    affinity = affinity.astype(dtype)
    _check_arguments(affinity, epsilon, tau_a, tau_b, threshold, max_iterations, iterations)
    if not 1.0 <= relaxation < 2.0:
        raise ProblemError(f"relaxation must lie in [1, 2), got {relaxation}")
    n, m = affinity.shape
    a = _marginal("a", a, n, dtype, balanced=tau_a == 1.0 and tau_b == 1.0)
    b = _marginal("b", b, m, dtype, balanced=tau_a == 1.0 and tau_b == 1.0)
    _check_placeable(affinity, a, b)
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
    if tau_a == 1.0 and tau_b == 1.0:
        budget, relaxation = (max_iterations, relaxation) if iterations is None else (iterations, 1)
        return _solve_balanced(
            affinity, epsilon, a, b, f, threshold, budget, float(relaxation), iterations is not None
        )
    return _solve_unbalanced(
        affinity, epsilon, a, b, f, g, threshold, tau_a, tau_b, max_iterations, iterations
    )


class _State(NamedTuple):
    """Scalings on the absorbed kernel, and what the driver knows of their convergence."""

    u: Float[Array, " n"]
    v: Float[Array, " m"]
    error: Float[Array, ""]  # column error after a plain row update
    weight: Float[Array, ""]
    ceiling: Float[Array, ""]
    iterations: Int[Array, ""]


@functools.partial(jax.jit, static_argnames=("budget", "relaxation", "fixed"))
def _solve_balanced(affinity, epsilon, a, b, f, threshold, budget, relaxation, fixed) -> Plan:
    dtype = affinity.dtype
    geometry = AffinityGeometry(affinity, epsilon)
    feasible = _feasible(affinity, a, b)
    g = geometry.update_potential(f, jnp.zeros_like(b), jnp.log(b), axis=0)
    f = geometry.update_potential(f, g, jnp.log(a), axis=1)

    def finish(kernel: AffinityGeometry, v):
        """The plain row update on ``v``, and both marginals of the plan it ends in."""
        u = kernel.update_scaling(v, a, axis=1)
        return u, u * kernel.apply_kernel(v, axis=1), v * kernel.apply_kernel(u, axis=0)

    def look(kernel: AffinityGeometry, u, v):
        """Column error of the finished plan, and whether plain blocks can safely go on."""
        finished, _, columns = finish(kernel, v)
        safe = jnp.max(jnp.abs(_log(u) - _log(finished))) <= _SAFE_BEYOND
        safe &= jnp.all(columns >= b * jnp.exp(-_SAFE_BEYOND))
        return jnp.sum(jnp.abs(columns - b)), safe

    def run_block(kernel: AffinityGeometry, state: _State) -> _State:
        solver = sinkhorn.Sinkhorn(
            lse_mode=False, momentum=acceleration.Momentum(value=state.weight)
        )
        problem = linear_problem.LinearProblem(kernel, a=a, b=b)

        def step(i, scalings):
            new = solver.kernel_step(problem, sinkhorn.SinkhornState(scalings), i)
            return new.potentials

        length = jnp.minimum(_BLOCK, budget - state.iterations)
        u, v = jax.lax.fori_loop(0, length, step, (state.u, state.v))
        error, safe = look(kernel, u, v)
        # A plain block is always progress; an over-relaxed one may have overshot.
        keep = (safe & (error < state.error)) | (state.weight <= 1.0)
        weight, ceiling = _next_weight(state, error, length, keep, relaxation)
        return _State(
            u=jnp.where(keep, u, state.u),
            v=jnp.where(keep, v, state.v),
            error=jnp.where(keep, error, state.error),
            weight=weight,
            ceiling=ceiling,
            iterations=state.iterations + length,
        )

    def unfinished(state: _State):
        # A NaN error compares false, so that a hopeless problem stops at once.
        return (state.iterations < budget) & ((state.error >= threshold) | (fixed & _ok(state)))

    def absorb_and_run(carry):
        f, g, state, _ = carry
        kernel = geometry.absorb(f, g)
        u, v = jnp.ones_like(a), jnp.ones_like(b)
        error, _ = look(kernel, u, v)
        error = jnp.where(_ok(state), state.error, error)
        state = jax.lax.while_loop(
            lambda s: unfinished(s) & (_excursion(s) <= _ABSORB_BEYOND),
            lambda s: run_block(kernel, s),
            state._replace(u=u, v=v, error=error),
        )
        u, rows, columns = finish(kernel, state.v)
        row_error, column_error = jnp.sum(jnp.abs(rows - a)), jnp.sum(jnp.abs(columns - b))
        over_relaxed = f + epsilon * jnp.log(state.u)
        g = g + epsilon * jnp.log(state.v)
        # The finished row potential ends the plan; the over-relaxed one carries on the iteration.
        finished = f + epsilon * jnp.log(u)
        return over_relaxed, g, state, (finished, row_error, column_error)

    start = _State(
        u=jnp.ones_like(a),
        v=jnp.ones_like(b),
        error=jnp.asarray(jnp.inf, dtype),
        weight=jnp.asarray(1.0, dtype),
        ceiling=jnp.asarray(_MAX_RELAXATION if relaxation > 1 else 1.0, dtype),
        # A problem without a plan spends no iterations.
        iterations=jnp.where(feasible, 1, budget).astype(jnp.int32),
    )
    infinite = jnp.asarray(jnp.inf, dtype)
    carry = absorb_and_run((f, g, start, (f, infinite, infinite)))
    _, g, state, (f, row_error, column_error) = jax.lax.while_loop(
        lambda carry: unfinished(carry[2]), absorb_and_run, carry
    )
    return _checked(
        Plan(
            f=f,
            g=g,
            epsilon=epsilon,
            iterations=state.iterations,
            row_error=row_error,
            column_error=column_error,
            converged=(row_error < threshold) & (column_error < threshold),
        ),
        feasible,
    )


def _ok(state: _State):
    return jnp.isfinite(state.error)


def _log(scaling):
    """Logarithm of a scaling, 0 where it belongs to no mass."""
    return jnp.log(jnp.where(scaling > 0, scaling, 1.0))


def _excursion(state: _State):
    """How far, in the exponent, the scalings have left one."""
    return jnp.maximum(jnp.max(jnp.abs(_log(state.u))), jnp.max(jnp.abs(_log(state.v))))


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


def _feasible(affinity, a, b):
    """Whether every row and column that has mass can be placed."""
    rows = _placeable(affinity, b, axis=1) | (a == 0)
    columns = _placeable(affinity, a, axis=0) | (b == 0)
    return jnp.all(rows) & jnp.all(columns)


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


def _placeable(affinity, mass, axis: int):
    """Whether each row (axis 1) or column (axis 0) has a finite largest entry where mass can go."""
    mass = mass[None, :] if axis == 1 else mass[:, None]
    # max propagates NaN, and +inf and -inf are not finite either
    return jnp.isfinite(jnp.max(jnp.where(mass > 0, affinity, -jnp.inf), axis=axis))


@functools.partial(jax.jit, static_argnames=("tau_a", "tau_b", "max_iterations", "iterations"))
def _solve_unbalanced(
    affinity, epsilon, a, b, f, g, threshold, tau_a, tau_b, max_iterations, iterations
) -> Plan:
    """Log-sum-exp steps of ``ott``: absorption does not commute with ``tau < 1``."""
    geometry = AffinityGeometry(affinity, epsilon)
    problem = linear_problem.LinearProblem(geometry, a=a, b=b, tau_a=tau_a, tau_b=tau_b)
    solver = sinkhorn.Sinkhorn()
    budget = max_iterations if iterations is None else iterations

    def step(i, potentials):
        return solver.lse_step(problem, sinkhorn.SinkhornState(potentials), i).potentials

    def run_block(carry):
        f, g, done, _, _ = carry
        length = jnp.minimum(_BLOCK, budget - done)
        f, g = jax.lax.fori_loop(0, length, step, (f, g))
        rows = geometry.marginal_from_potentials(f, g, axis=1)
        columns = geometry.marginal_from_potentials(f, g, axis=0)
        row_error = jnp.sum(jnp.abs(rows - _unbalanced_target(a, f, tau_a, epsilon)))
        column_error = jnp.sum(jnp.abs(columns - _unbalanced_target(b, g, tau_b, epsilon)))
        return f, g, done + length, row_error, column_error

    def unfinished(carry):
        _, _, done, row_error, column_error = carry
        inexact = jnp.maximum(row_error, column_error) >= threshold
        return (done < budget) & (inexact | (iterations is not None))

    infinite = jnp.asarray(jnp.inf, affinity.dtype)
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
        _feasible(affinity, a, b),
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
    if affinity.ndim != 2 or 0 in affinity.shape:
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


def _marginal(name: str, marginal, size: int, dtype, balanced: bool):
    if marginal is None:
        return jnp.full(size, 1.0 / size, dtype)
    marginal = jnp.asarray(marginal, dtype)
    if marginal.shape != (size,):
        raise ProblemError(f"{name} must have shape ({size},), got {marginal.shape}")
    if _is_concrete(marginal):
        mass = float(jnp.sum(marginal))
        if not bool(jnp.all(marginal >= 0)):
            raise ProblemError(f"{name} must hold weights that are not negative and not NaN")
        if balanced and abs(mass - 1.0) > 1e-3:
            raise ProblemError(f"{name} must have total mass 1 in a balanced problem, got {mass:g}")
    return marginal


def _check_placeable(affinity, a, b):
    if not _is_concrete(affinity, a, b):
        return
    for axis, kind, own, other in ((1, "row", a, b), (0, "column", b, a)):
        bad = np.flatnonzero(~np.asarray(_placeable(affinity, other, axis) | (own == 0)))
        if bad.size:
            raise ProblemError(
                f"affinity cannot be transported: {kind} {bad[0]} ({bad.size} in all) has NaN, "
                "+inf or no finite entry; every row and column needs a finite largest entry"
            )
