"""The geometry of an affinity matrix, in the two forms that a Sinkhorn step can use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ott.geometry import geometry

__all__ = ["AffinityGeometry"]


@jax.tree_util.register_pytree_node_class
class AffinityGeometry(geometry.Geometry):
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

    References:
        B. Schmitzer, "Stabilized sparse scaling algorithms for entropy regularized transport
        problems", SIAM J. Sci. Comput. 41(3), 2019.
    """

    def __init__(self, affinity, epsilon, kernel=None):
        super().__init__(kernel_matrix=kernel, epsilon=epsilon)
        self.affinity = affinity

    @property
    def cost_matrix(self) -> Float[Array, "n m"]:
        """The cost that ``ott`` minimises: minus the affinity."""
        return -self.affinity

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self.affinity.shape

    @property
    def dtype(self):
        """The dtype of the affinity, and of every potential."""
        return self.affinity.dtype

    def absorb(self, f: Float[Array, " n"], g: Float[Array, " m"]) -> AffinityGeometry:
        """The same geometry with the potentials ``(f, g)`` folded into its kernel."""
        return AffinityGeometry(self.affinity, self.epsilon, self.transport_from_potentials(f, g))

    def apply_kernel(self, vec, eps=None, axis: int = 0):
        """``vec @ G`` (axis 0) or ``G @ vec`` (axis 1).

        The products are written this way round because a transposed copy of ``G`` costs twenty
        times the product itself on a CPU. ``eps`` is fixed by the absorbed kernel and ignored.
        """
        del eps
        kernel = self._kernel_matrix
        if kernel is None:
            raise ValueError("absorb potentials first: this geometry has no kernel")
        precision = jax.lax.Precision.HIGHEST
        if axis == 0:
            return jnp.matmul(vec, kernel, precision=precision)
        return jnp.matmul(kernel, vec, precision=precision)

    def _center(self, f, g):
        return f[:, None] + g[None, :] + self.affinity

    def tree_flatten(self):
        """Children: affinity, epsilon, kernel."""
        return (self.affinity, self._epsilon_init, self._kernel_matrix), None

    @classmethod
    def tree_unflatten(cls, aux_data, children):
        """Inverse of :meth:`tree_flatten`."""
        del aux_data
        return cls(*children)
