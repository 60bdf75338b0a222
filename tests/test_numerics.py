import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.numerics import unit_rows

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
