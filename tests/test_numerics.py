import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.numerics import check_precision, matmul, unit_rows

ROWS = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float32, np.float64])
def test_unit_rows_of_every_dtype_are_float32(dtype):
    rows = ROWS.astype(dtype)
    unit = unit_rows(rows)
    assert unit.dtype == jnp.float32
    np.testing.assert_allclose(unit, reference.unit(rows), rtol=1e-6, atol=1e-7)


def test_float64_input_gives_float32_where_x64_is_on():
    with jax.enable_x64(True):
        assert unit_rows(ROWS.astype(np.float64)).dtype == jnp.float32


@settings(deadline=None, max_examples=25)
@given(exponent=st.floats(-30, 30))
def test_length_of_a_row_does_not_matter(exponent):
    scaled = (ROWS * 10.0**exponent).astype(np.float32)
    np.testing.assert_allclose(unit_rows(scaled), reference.unit(ROWS), rtol=2e-6, atol=1e-6)


def test_a_row_of_zeros_stays_and_has_no_gradient():
    rows = jnp.asarray(ROWS).at[2].set(0.0)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=rows.shape), jnp.float32)
    value, gradient = jax.value_and_grad(lambda r: jnp.sum(weights * unit_rows(r)))(rows)
    assert np.isfinite(value)
    np.testing.assert_array_equal(unit_rows(rows)[2], 0.0)
    np.testing.assert_array_equal(gradient[2], 0.0)
    assert np.isfinite(gradient).all() and np.abs(gradient[0]).sum() > 0


def test_gradient_against_finite_differences():
    weights = np.random.default_rng(1).normal(size=ROWS.shape)
    gradient = jax.grad(lambda r: jnp.sum(jnp.asarray(weights, jnp.float32) * unit_rows(r)))(ROWS)
    rows = ROWS.astype(np.float64)
    for i, j in [(0, 0), (1, 3), (4, 6)]:
        step = np.zeros_like(rows)
        step[i, j] = 1e-6
        difference = np.sum(weights * (reference.unit(rows + step) - reference.unit(rows - step)))
        np.testing.assert_allclose(gradient[i, j], difference / 2e-6, rtol=1e-4, atol=1e-6)


def test_a_nan_stays_visible():
    rows = ROWS.copy()
    rows[1, 1] = np.nan
    unit = np.asarray(unit_rows(rows))
    assert np.isnan(unit[1]).any() and np.isfinite(unit[[0, 2, 3, 4]]).all()


def bfloat16(x):
    """Rounded to bfloat16, as float64."""
    return np.asarray(x, np.float32).astype(jnp.bfloat16).astype(np.float64)


def by_parts(left, right):
    """The formula of ``"bfloat16_3x"``, its products and sums in float64."""
    (left, left_rest), (right, right_rest) = (
        (bfloat16(x), bfloat16(x - bfloat16(x))) for x in (left, right)
    )
    return left @ right + left @ right_rest + left_rest @ right


class TestMatmul:
    LEFT, RIGHT = (
        np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        for seed, shape in ((0, (40, 256)), (1, (256, 30)))
    )

    @pytest.mark.parametrize("compiled", [False, True])
    def test_three_products_are_those_of_the_formula(self, compiled):
        # No bit of the parts is dropped, and none is kept that they do not have: compiled or not.
        f = jax.jit(matmul, static_argnums=2) if compiled else matmul
        found = f(self.LEFT, self.RIGHT, "bfloat16_3x")
        size = np.abs(self.LEFT).astype(np.float64) @ np.abs(self.RIGHT)
        assert found.dtype == jnp.float32
        assert np.abs((found - by_parts(self.LEFT, self.RIGHT)) / size).max() < 1e-7

    def test_errors_are_those_that_are_promised(self):
        truth = self.LEFT.astype(np.float64) @ self.RIGHT
        size = np.abs(self.LEFT).astype(np.float64) @ np.abs(self.RIGHT)
        one = bfloat16(self.LEFT) @ bfloat16(self.RIGHT)
        three = np.asarray(matmul(self.LEFT, self.RIGHT, "bfloat16_3x"), np.float64)
        full = np.asarray(matmul(self.LEFT, self.RIGHT), np.float64)
        errors = [np.abs((product - truth) / size).max() for product in (one, three, full)]
        assert errors[0] > 30 * errors[1] > 30 * errors[2]
        # A rest is rounded by 2^-17 of the operand at most, and two rests are 2^-18 of the product.
        assert errors[1] < 3 * 2.0**-17

    def test_gradient_is_formed_in_the_same_way(self):
        cotangent = np.random.default_rng(2).normal(size=(40, 30)).astype(np.float32)
        _, pull = jax.vjp(lambda x, y: matmul(x, y, "bfloat16_3x"), self.LEFT, self.RIGHT)
        left, right = pull(jnp.asarray(cotangent))
        np.testing.assert_allclose(left, by_parts(cotangent, self.RIGHT.T), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(right, by_parts(self.LEFT.T, cotangent), rtol=1e-5, atol=1e-5)

    def test_vmap(self):
        stacked = jnp.stack([self.LEFT, 2 * self.LEFT])
        found = jax.vmap(lambda x: matmul(x, self.RIGHT, "bfloat16_3x"))(stacked)
        np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-6)

    def test_another_precision_is_named(self):
        with pytest.raises(ValueError, match="precision must be 'float32' or 'bfloat16_3x', got"):
            check_precision("bfloat16")  # a function's own signature stops it under pytest
