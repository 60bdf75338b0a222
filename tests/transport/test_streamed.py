"""Streamed plans against float64 NumPy run to convergence, whatever the block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.transport import StreamedAffinity, StreamedGeometry, solve
from sotalign_jax.transport.streamed import block_rows, over_blocks

N, M = 31, 18


def factors(n=N, m=M, d=12, seed=0):
    """Unit rows whose affinity has the structure of a teacher's: near-duplicates and outliers."""
    image, text = reference.cca_rows()
    draw = np.random.default_rng(seed)
    image, text = (rows[draw.permutation(len(rows))] for rows in (image, text))
    return tuple(reference.unit(r[:k, :d]).astype(np.float32) for r, k in ((image, n), (text, m)))


def streamed(block, **options):
    return StreamedAffinity(*map(jnp.asarray, factors(**options)), block)


def matrix(**options):
    image, text = factors(**options)
    return image.astype(np.float64) @ text.astype(np.float64).T


@pytest.mark.parametrize("block", [1, 7, 30, N, 64])
@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.5])
def test_equals_the_converged_plan(block, epsilon):
    plan = solve(streamed(block), epsilon, threshold=1e-5, max_iterations=5000)
    found = reference.plan_of(plan, matrix())
    assert bool(plan.converged)
    assert np.abs(found - reference.sinkhorn(matrix(), epsilon)).sum() < 2e-4
    rows, columns = reference.marginal_errors(found)
    rounding = 3e-7 / epsilon
    assert max(rows, columns) < 1e-5 + rounding
    np.testing.assert_allclose(plan.row_error, rows, atol=rounding)
    np.testing.assert_allclose(plan.column_error, columns, atol=rounding)


@pytest.mark.parametrize("count", [1, 2, 5, 6, 23])
@pytest.mark.parametrize("block", [8, 64])
def test_a_fixed_count_is_that_many_plain_iterations(count, block):
    plan = solve(streamed(block), 0.01, iterations=count, threshold=0.5)
    truth = reference.sinkhorn(matrix(), 0.01, iterations=count)
    assert int(plan.iterations) == count
    assert np.abs(reference.plan_of(plan, matrix()) - truth).sum() < 1e-4


@given(
    seed=st.integers(0, 1000), n=st.integers(1, 40), m=st.integers(1, 40), block=st.integers(1, 41)
)
@settings(max_examples=5, deadline=None)
def test_any_shape_and_block(seed, n, m, block):
    plan = solve(streamed(block, n=n, m=m, seed=seed), 0.05, threshold=1e-5, max_iterations=2000)
    found = reference.plan_of(plan, matrix(n=n, m=m, seed=seed))
    assert np.abs(found - reference.sinkhorn(matrix(n=n, m=m, seed=seed), 0.05)).sum() < 2e-4


@pytest.mark.parametrize("relaxation", [1.0, 1.7])
def test_weights_with_zeros(relaxation):
    a, b = np.arange(N) % 4.0, np.arange(M) % 3.0
    a, b = a / a.sum(), b / b.sum()
    plan = solve(
        streamed(8), 0.02, a=a, b=b, threshold=1e-5, relaxation=relaxation, max_iterations=2000
    )
    truth = reference.sinkhorn(matrix(), 0.02, a, b)
    found = np.asarray(plan.matrix(matrix()))
    assert bool(plan.converged)
    assert np.abs(found - truth).sum() < 1e-4
    assert np.all(found[a == 0] == 0) and np.all(found[:, b == 0] == 0)


def test_warm_start_saves_iterations():
    cold = solve(streamed(8), 0.01, threshold=1e-4)
    warm = solve(streamed(8), 0.01, threshold=1e-4, init=cold.potentials)
    assert int(warm.iterations) == 1 < int(cold.iterations)


@pytest.mark.parametrize("tau_a,tau_b", [(0.9, 0.9), (0.95, 1.0)])
def test_unbalanced_satisfies_its_optimality_conditions(tau_a, tau_b):
    epsilon = 0.05
    plan = solve(
        streamed(8), epsilon, tau_a=tau_a, tau_b=tau_b, threshold=1e-5, max_iterations=5000
    )
    found = reference.plan_of(plan, matrix())
    for axis, tau, f, size in ((1, tau_a, plan.f, N), (0, tau_b, plan.g, M)):
        price = 0.0 if tau == 1 else np.asarray(f, np.float64) * (1 - tau) / (tau * epsilon)
        np.testing.assert_allclose(found.sum(axis), np.exp(-price) / size, atol=2e-5)


def test_unbalanced_problems_are_not_spread():
    with pytest.raises(ValueError, match="axis_name: only balanced problems can be spread"):
        solve(streamed(8), 0.05, tau_a=0.9, axis_name="rows")


class TestHopeless:
    def test_nan_is_named(self):
        image, text = factors()
        image[3] = np.nan
        with pytest.raises(ValueError, match="affinity cannot be transported: row 3"):
            solve(StreamedAffinity(jnp.asarray(image), jnp.asarray(text), 8), 0.05)
        text[5, 2] = np.inf
        with pytest.raises(ValueError, match="column 5"):
            solve(StreamedAffinity(jnp.asarray(factors()[0]), jnp.asarray(text), 8), 0.05)

    def test_traced_nan_gives_nan(self):
        image, text = factors()
        text[5] = np.nan
        plan = jax.jit(lambda i, t: solve(StreamedAffinity(i, t, 8), 0.05))(image, text)
        assert np.isnan(plan.f).all() and np.isnan(plan.marginal_error)
        assert not bool(plan.converged)

    def test_nothing_is_absorbed_yet(self):
        geometry = StreamedGeometry(streamed(8), 0.05)
        with pytest.raises(ValueError, match="absorb potentials first"):
            geometry.first_look(jnp.ones(N), jnp.ones(M), jnp.ones(N))
        with pytest.raises(NotImplementedError, match="weighted log-sum-exp"):
            geometry.apply_lse_kernel(jnp.ones(N), jnp.ones(M), 0.05, vec=jnp.ones(M))


class TestMemory:
    def compiled(self, n, m, block):
        options = {"n": n, "m": m}
        image, text = (jnp.zeros(shape) for shape in ((options["n"], 16), (options["m"], 16)))
        f = jax.jit(lambda i, t: solve(StreamedAffinity(i, t, block), 0.05))
        return f.lower(image, text).compile()

    def test_no_array_of_rows_by_columns(self):
        text = self.compiled(211, 157, 16).as_text()
        assert "[16,157]" in text  # the blocks are there, so that the shapes are written like this
        assert "[211,157]" not in text and "[157,211]" not in text

    def test_grows_linearly(self):
        sizes = [1024, 2048, 4096, 8192]
        used = [self.compiled(n, n, 64).memory_analysis().temp_size_in_bytes for n in sizes]
        slopes = np.diff(used) / np.diff(sizes)
        np.testing.assert_allclose(slopes, slopes[0], rtol=0.1)
        assert used[-1] < 8192 * 8192 * 4 / 10


class TestBlocks:
    @pytest.mark.parametrize("n,block", [(1, 4), (4, 4), (9, 4), (3, 8)])
    def test_over_blocks_sees_every_row_once_in_order(self, n, block):
        rows = (jnp.arange(n), jnp.arange(2.0 * n).reshape(n, 2))

        def body(total, rows):
            assert len(rows[0]) <= block
            return total + rows[0].sum(), (rows[0] * 10, rows[1])

        total, (tens, same) = over_blocks(body, jnp.asarray(0), rows, block)
        assert int(total) == n * (n - 1) // 2
        np.testing.assert_array_equal(tens, 10 * np.arange(n))
        np.testing.assert_array_equal(same, rows[1])

    def test_block_rows_keep_to_the_budget(self):
        assert block_rows(10_000, 1_000, 16.0 * 1_000 * 64) == 64
        assert block_rows(10_000, 1_000, 16.0 * 1_000 * 71) == 64
        assert block_rows(10_000, 1_000, 1.0) == 8  # the least that is worth a matrix product
        assert block_rows(5, 1_000, 1e9) == 5
        assert block_rows(5, 0, 1e9) == 5
        assert block_rows(10_000, 1_000, 1e12) == 256  # more is slower on a CPU


@pytest.mark.parametrize(("seed", "threshold"), [(0, 1e-3), (1, 1e-2), (1, 1e-3), (2, 1e-3)])
def test_looking_more_often_does_not_make_it_slower(seed, threshold):
    """Clustered rows at a small epsilon, where over-relaxed errors rise and fall."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(12, 16))
    image, text = (
        reference.unit(centres[draw.integers(12, size=600)] + 0.4 * draw.normal(size=(600, 16)))
        for _ in range(2)
    )
    affinity = StreamedAffinity(
        jnp.asarray(image, jnp.float32), jnp.asarray(text, jnp.float32), block=200
    )
    options = {"threshold": threshold, "max_iterations": 2000}
    streamed = solve(affinity, 0.01, **options)
    dense = solve(affinity.of_rows(affinity.image), 0.01, **options)
    assert bool(streamed.converged)
    assert int(streamed.iterations) <= 1.3 * int(dense.iterations)
