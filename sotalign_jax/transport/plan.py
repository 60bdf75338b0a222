"""An entropic transport plan, held as its potentials, and the error of an ill-posed problem."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Plan", "Potentials", "ProblemError"]

Potentials = tuple[Float[ArrayLike, " n"], Float[ArrayLike, " m"]]


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
