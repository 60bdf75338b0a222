"""Transport of embeddings whose affinity matrix is never formed: recomputed block by block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ott.solvers.linear import acceleration

from sotalign_jax.numerics import MatmulPrecision, matmul, varying_like
from sotalign_jax.transport.geometry import HIGHEST, AxisName, Look, RowGeometry

__all__ = ["StreamedAffinity", "StreamedGeometry", "block_rows", "over_blocks"]

# On a CPU 16 to 256 rows cost no more time than the whole matrix, and 1,024 cost three times that.
_CPU_ROWS = 256
# Arrays of the size of a block alive at once: affinity, exponent, kernel, and one to spare.
_BLOCK_COPIES = 4


def block_rows(n: int, m: int, budget: float) -> int:
    """Rows of a block, so that the arrays of one block fit in ``budget`` bytes.

    Args:
        n: rows there are.
        m: columns there are.
        budget: bytes for the temporary arrays of one block, float32.

    Returns:
        Between 8 and ``n`` (fewer if there are fewer), a multiple of 8 where it is not ``n``.
    """
    rows = int(budget // (_BLOCK_COPIES * 4 * max(m, 1))) // 8 * 8
    if jax.default_backend() == "cpu":
        rows = min(rows, _CPU_ROWS)
    return max(1, min(n, max(8, rows)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamedAffinity:
    r"""The affinity ``image @ text.T`` as its two factors, read ``block`` rows at a time.

    With rows of unit length these are cosines. Memory is ``O((n + m) d + block m)``.

    Attributes:
        image: ``(n, d)`` rows.
        text: ``(m, d)`` rows.
        block: rows of the affinity that are formed at once; static.
        precision: of the product, for `numerics.matmul`; static.
    """

    # Not typed more closely: JAX rebuilds pytrees with other things than arrays in them.
    image: Any
    text: Any
    block: int = dataclasses.field(default=256, metadata={"static": True})
    precision: MatmulPrecision = dataclasses.field(default="float32", metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """Number of rows and of columns."""
        return self.image.shape[0], self.text.shape[0]

    @property
    def dtype(self):
        """The dtype of the rows."""
        return self.image.dtype

    def astype(self, dtype) -> StreamedAffinity:
        """The same with rows of another dtype."""
        return dataclasses.replace(
            self, image=self.image.astype(dtype), text=self.text.astype(dtype)
        )

    def of_rows(self, image: Float[Array, "k d"]) -> Float[Array, "k m"]:
        """The affinity of some rows."""
        return matmul(image, self.text.T, self.precision)


def over_blocks(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, rows: Any, block: int
) -> tuple[Any, Any]:
    """``lax.scan`` over blocks of rows; what does not fill a block is a shorter one at the end.

    Args:
        body: ``(carry, rows of a block) -> (carry, outputs of these rows)``.
        carry: at the start.
        rows: pytree of arrays that share the length of their first axis.
        block: rows of a block.

    Returns:
        The last carry, and the outputs of all rows.
    """
    n = jax.tree.leaves(rows)[0].shape[0]
    if n <= block:
        return body(carry, rows)
    whole = n // block * block
    blocks = jax.tree.map(lambda x: x[:whole].reshape(-1, block, *x.shape[1:]), rows)
    carry, out = jax.lax.scan(body, carry, blocks)
    out = jax.tree.map(lambda x: jnp.reshape(x, (whole, *x.shape[2:])), out)
    if whole == n:
        return carry, out
    carry, last = body(carry, jax.tree.map(lambda x: x[whole:], rows))
    return carry, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), out, last)


@jax.tree_util.register_pytree_node_class
class StreamedGeometry(RowGeometry):
    """`AffinityGeometry` for a `StreamedAffinity`: no ``(n, m)`` array, in any mode.

    A Sinkhorn iteration is one pass over the rows: a block of the kernel gives the row sums of its
    rows, hence their new scalings, and these at once their share of the next column sums. ``ott``'s
    step would form every block twice, so `iterate` orders the work itself; the update and the
    over-relaxation are ``ott``'s.

    Args:
        affinity: the two factors.
        epsilon: entropic regularisation, in units of the affinity.
        potentials: the absorbed ``(f, g)``, or ``None`` while none are.
        axis_name: mesh axes over which the rows are spread, inside ``shard_map``.
    """

    # A look comes with every pass, and costs nothing.
    pace = 2

    def __init__(self, affinity, epsilon, potentials=None, axis_name: AxisName | None = None):
        super().__init__(epsilon=epsilon)
        self.affinity = affinity
        self.potentials = potentials
        self.axis_name = axis_name

    def absorb(self, f: Float[Array, " n"], g: Float[Array, " m"]) -> StreamedGeometry:
        """The same geometry with the potentials ``(f, g)`` folded into its kernel."""
        return StreamedGeometry(self.affinity, self.epsilon, (f, g), self.axis_name)

    def placeable(self, a, b):
        """Which rows, and which columns, have no mass or finite embeddings."""
        rows, columns = (
            jnp.all(jnp.isfinite(factor), axis=1)
            for factor in (self.affinity.image, self.affinity.text)
        )
        if self.axis_name is not None:  # the same everywhere, which their type need not say
            columns = jax.lax.pmin(columns.astype(jnp.int32), self.axis_name) > 0
        return rows | (a == 0), columns | (b == 0)

    def first_look(self, u, v, a):
        """The plan at ``v``, and the column sums at ``u``."""
        _, carried, look = self._pass(u, v, a, jnp.zeros((), self.dtype))
        return look, carried

    def iterate(self, u, v, carried, a, b, weight, length):
        """``length`` passes over the rows; see `RowGeometry.iterate`."""
        momentum = acceleration.Momentum()

        def step(_, state):
            u, v, columns, _ = state
            v = momentum(weight, v, b / jnp.where(columns > 0, columns, 1.0), lse_mode=False)
            u, columns, look = self._pass(u, v, a, weight)
            return u, v, columns, look

        look = Look(u, u, v)  # replaced by the first pass
        return jax.lax.fori_loop(0, length, step, (u, v, carried, look))

    def _pass(self, u, v, a, weight):
        """Row update at ``v``: new scalings, column sums at them, and the plain plan."""
        if self.potentials is None:
            raise ValueError("absorb potentials first: this geometry has no kernel")
        f, g = self.potentials
        momentum = acceleration.Momentum()

        def block(columns, rows):
            image, f, u, a = rows
            kernel = jnp.exp(self._exponents(image, f, g, self.epsilon))
            sums = jnp.matmul(kernel, v, precision=HIGHEST)
            plain = a / jnp.where(sums > 0, sums, 1.0)
            u = momentum(weight, u, plain, lse_mode=False)
            both = jnp.matmul(jnp.stack([u, plain]), kernel, precision=HIGHEST)
            return columns + both, (u, plain, plain * sums)

        image = self.affinity.image
        start = varying_like(jnp.zeros((2, self.shape[1]), self.dtype), image, f, u, v)
        columns, (u, plain, rows) = over_blocks(block, start, (image, f, u, a), self.affinity.block)
        columns, plain_columns = self._reduced(columns)
        return u, columns, Look(plain, rows, v * plain_columns)

    def _log_sum_exp(self, f, g, eps, axis: int):
        image = self.affinity.image

        def rows_of(carry, rows):
            image, f = rows
            return carry, eps * jax.nn.logsumexp(self._exponents(image, f, g, eps), axis=1)

        def columns_of(total, rows):
            image, f = rows
            block = jax.nn.logsumexp(self._exponents(image, f, g, eps), axis=0)
            return jnp.logaddexp(total, block), ()

        if axis == 1:
            return over_blocks(rows_of, (), (image, f), self.affinity.block)[1]
        start = varying_like(jnp.full(self.shape[1], -jnp.inf, self.dtype), image, f, g)
        return eps * over_blocks(columns_of, start, (image, f), self.affinity.block)[0]

    def _exponents(self, image, f, g, eps):
        return (f[:, None] + g[None, :] + self.affinity.of_rows(image)) / eps

    def tree_flatten(self):
        """Children: affinity, epsilon, potentials; the axis is static."""
        return (self.affinity, self._epsilon_init, self.potentials), self.axis_name

    @classmethod
    def tree_unflatten(cls, aux_data, children):
        """Inverse of :meth:`tree_flatten`."""
        return cls(*children, axis_name=aux_data)
