"""Geometries of an affinity: what Sinkhorn reads of it, held as a matrix or never formed."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import acceleration, sinkhorn

__all__ = ["AffinityGeometry", "AxisName", "Look", "RowGeometry"]

AxisName = str | tuple[str, ...]

HIGHEST = jax.lax.Precision.HIGHEST


class Look(NamedTuple):
    """The plan that a plain row update on the current column scalings ends in.

    Attributes:
        u: ``(n,)`` row scalings after that update.
        rows: ``(n,)`` row sums of the plan.
        columns: ``(m,)`` column sums of the plan.
    """

    u: Float[Array, " n"]
    rows: Float[Array, " n"]
    columns: Float[Array, " m"]


class RowGeometry(geometry.Geometry):
    """An ``ott`` geometry whose rows may be spread over devices, each holding all columns.

    Inside ``shard_map``, ``axis_name`` names the mesh axes over which the rows are spread: row
    vectors are local, column vectors are the same on every device, and all that travels is
    all-reduces of scalars and of column vectors, where rows are summed over.
    """

    affinity: Any  # with shape and dtype: a matrix, or what stands for one
    axis_name: AxisName | None = None
    # Plain iterations between two looks at the marginal error. (Over-relaxed ones go by five: their
    # error falls over a few iterations, but not from each to the next.)
    pace: int = 5

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self.affinity.shape

    @property
    def dtype(self):
        """The dtype of the affinity, and of every potential."""
        return self.affinity.dtype

    def sum_rows(self, values: Num[Array, " n"]) -> Num[Array, ""]:
        """Sum of a row vector."""
        return self._reduced(jnp.sum(values))

    def max_rows(self, values: Float[Array, " n"]) -> Float[Array, ""]:
        """Maximum of a row vector."""
        top = jnp.max(values)
        return top if self.axis_name is None else jax.lax.pmax(top, self.axis_name)

    def apply_lse_kernel(self, f, g, eps, vec=None, axis: int = 0):
        """``eps log sum exp((f + g + K) / eps)``, minus the potential that it does not sum over."""
        if vec is not None:
            raise NotImplementedError("weighted log-sum-exp is not offered by this geometry")
        total = self._log_sum_exp(f, g, eps, axis)
        if axis == 0 and self.axis_name is not None:
            top = jax.lax.pmax(total, self.axis_name)
            top = jnp.where(jnp.isfinite(top), top, 0.0)
            total = eps * jnp.log(self._reduced(jnp.exp((total - top) / eps))) + top
        remove = f if axis == 1 else g
        return total - jnp.where(jnp.isfinite(remove), remove, 0.0), jnp.ones(1, self.dtype)

    def _reduced(self, values):
        return values if self.axis_name is None else jax.lax.psum(values, self.axis_name)

    def _log_sum_exp(self, f, g, eps, axis: int):
        raise NotImplementedError

    def absorb(self, f: Float[Array, " n"], g: Float[Array, " m"]) -> RowGeometry:
        """The same geometry with the potentials ``(f, g)`` folded into its kernel."""
        raise NotImplementedError

    def placeable(self, a: Float[Array, " n"], b: Float[Array, " m"]):
        """Which rows, and which columns, have no mass or a finite largest entry to put it on."""
        raise NotImplementedError

    def first_look(self, u, v, a) -> tuple[Look, Any]:
        """The plan at the scalings ``(u, v)``, and what `iterate` wants handed back to it."""
        raise NotImplementedError

    def iterate(self, u, v, carried, a, b, weight, length) -> tuple[Any, Any, Any, Look]:
        """``length`` Sinkhorn iterations on the absorbed kernel, over-relaxed with ``weight``.

        Args:
            u: row scalings.
            v: column scalings.
            carried: of the call before, or of `first_look`.
            a: row marginal.
            b: column marginal.
            weight: 1 for plain iterations.
            length: how many, at least one; may be traced.

        Returns:
            ``(u, v, carried, look)`` after them.
        """
        raise NotImplementedError


@jax.tree_util.register_pytree_node_class
class AffinityGeometry(RowGeometry):
    r"""Entropic transport that maximises an affinity: an ``ott`` geometry with cost ``-affinity``.

    In log-sum-exp mode it is a dense ``ott`` geometry. In scaling mode its kernel is

    .. math:: G_{ij} = \exp\big((f_i + g_j + K_{ij}) / \epsilon\big)

    with potentials absorbed by :meth:`absorb` (Schmitzer 2019, section 3). Right after a Sinkhorn
    half-step no entry of ``G`` exceeds a marginal weight, so nothing overflows however small
    ``epsilon`` is, and a Sinkhorn iteration on ``G`` is two matrix-vector products.

    Args:
        affinity: ``(n, m)`` affinity, larger is closer; ``-inf`` forbids an entry.
        epsilon: entropic regularisation, in units of the affinity.
        kernel: ``(n, m)`` absorbed kernel, or ``None`` while no potentials are absorbed.
        axis_name: mesh axes over which the rows are spread, inside ``shard_map``.

    References:
        B. Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized transport
        problems", SIAM J. Sci. Comput. 41(3), 2019.
    """

    def __init__(self, affinity, epsilon, kernel=None, axis_name: AxisName | None = None):
        super().__init__(kernel_matrix=kernel, epsilon=epsilon)
        self.affinity = affinity
        self.axis_name = axis_name

    @property
    def cost_matrix(self) -> Float[Array, "n m"]:
        """The cost that ``ott`` minimises: minus the affinity."""
        return -self.affinity

    def absorb(self, f: Float[Array, " n"], g: Float[Array, " m"]) -> AffinityGeometry:
        """The same geometry with the potentials ``(f, g)`` folded into its kernel."""
        kernel = self.transport_from_potentials(f, g)
        return AffinityGeometry(self.affinity, self.epsilon, kernel, self.axis_name)

    def apply_kernel(self, vec, eps=None, axis: int = 0):
        """``vec @ G`` (axis 0) or ``G @ vec`` (axis 1).

        The products are written this way round because a transposed copy of ``G`` costs twenty
        times the product itself on a CPU. ``eps`` is fixed by the absorbed kernel and ignored.
        """
        del eps
        kernel = self._kernel_matrix
        if kernel is None:
            raise ValueError("absorb potentials first: this geometry has no kernel")
        if axis == 0:
            return self._reduced(jnp.matmul(vec, kernel, precision=HIGHEST))
        return jnp.matmul(kernel, vec, precision=HIGHEST)

    def placeable(self, a, b):
        """Which rows, and which columns, have no mass or a finite largest entry to put it on."""

        def largest(mass, axis: int):
            # max propagates NaN, and +inf and -inf are not finite either
            return jnp.max(jnp.where(mass > 0, self.affinity, -jnp.inf), axis=axis)

        columns = largest(a[:, None], 0)
        if self.axis_name is not None:
            columns = jax.lax.pmax(columns, self.axis_name)
        rows = jnp.isfinite(largest(b[None, :], 1)) | (a == 0)
        return rows, jnp.isfinite(columns) | (b == 0)

    def first_look(self, u, v, a):
        """The plan at ``v``; nothing needs to be carried."""
        del u
        sums = self.apply_kernel(v, axis=1)
        plain = a / jnp.where(sums > 0, sums, 1.0)
        return Look(plain, plain * sums, v * self.apply_kernel(plain, axis=0)), ()

    def iterate(self, u, v, carried, a, b, weight, length):
        """``length`` of ``ott``'s scaling steps; see `RowGeometry.iterate`."""
        solver = sinkhorn.Sinkhorn(lse_mode=False, momentum=acceleration.Momentum(value=weight))
        problem = linear_problem.LinearProblem(self, a=a, b=b)

        def step(i, scalings):
            return solver.kernel_step(problem, sinkhorn.SinkhornState(scalings), i).potentials

        u, v = jax.lax.fori_loop(0, length, step, (u, v))
        look, _ = self.first_look(u, v, a)
        return u, v, carried, look

    def _log_sum_exp(self, f, g, eps, axis: int):
        return self._softmax(f, g, eps, None, axis)[0]

    def _center(self, f, g):
        return f[:, None] + g[None, :] + self.affinity

    def tree_flatten(self):
        """Children: affinity, epsilon, kernel; the axis is static."""
        return (self.affinity, self._epsilon_init, self._kernel_matrix), self.axis_name

    @classmethod
    def tree_unflatten(cls, aux_data, children):
        """Inverse of :meth:`tree_flatten`."""
        return cls(*children, axis_name=aux_data)
