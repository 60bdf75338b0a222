import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sotalign_jax.fitted.mmd import mmd, residual_map


def _mmd(x, y, multipliers=(0.5, 1.0, 2.0), scale=None):
    """The definition in float64; ``scale`` fixed where it is not to be differentiated."""
    both = np.concatenate([x, y])
    squares = np.square(both[:, None] - both[None]).sum(axis=2)
    count = len(both)
    scale = squares.sum() / (count**2 - count) if scale is None else scale
    kernel = sum(np.exp(-squares / (c * scale)) for c in multipliers)
    n = len(x)
    return kernel[:n, :n].mean() - 2 * kernel[:n, n:].mean() + kernel[n:, n:].mean(), scale


def _samples(n=11, m=8, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), 0.5 + 1.5 * rng.normal(size=(m, d))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_value_is_that_of_the_definition(offset):
    x, y = _samples()
    got = mmd((x + offset).astype(np.float32), (y + offset).astype(np.float32))
    np.testing.assert_allclose(got, _mmd(x, y)[0], rtol=1e-3 if offset else 1e-5)


def test_multipliers_are_those_given():
    x, y = _samples()
    got = mmd(x.astype(np.float32), y.astype(np.float32), multipliers=(0.3,))
    np.testing.assert_allclose(got, _mmd(x, y, (0.3,))[0], rtol=1e-5)


def test_gradient_is_that_of_finite_differences_with_the_scale_held():
    x, y = _samples()
    scale = _mmd(x, y)[1]
    got = jax.grad(lambda x: mmd(x, jnp.asarray(y, jnp.float32)))(jnp.asarray(x, jnp.float32))
    for i, j in ((0, 0), (3, 2), (10, 1)):
        step = np.zeros_like(x)
        step[i, j] = 1e-5
        up, down = (_mmd(x + s, y, scale=scale)[0] for s in (step, -step))
        np.testing.assert_allclose(got[i, j], (up - down) / 2e-5, rtol=1e-3, atol=1e-6)


def test_equal_samples_have_none_and_a_constant_has_a_gradient():
    x, _ = _samples()
    x = x.astype(np.float32)
    assert abs(float(mmd(x, x))) < 1e-6
    assert float(mmd(x, x + 1)) > 0.1
    same = jnp.ones((4, 2), jnp.float32)
    assert float(mmd(same, same)) == 0
    assert np.isfinite(jax.grad(lambda x: mmd(x, same))(same)).all()
    with pytest.raises(ValueError, match="y: 2 columns, but x has 3"):
        inspect.unwrap(mmd)(x, same)


def test_a_residual_map_brings_samples_together_that_it_has_not_seen():
    rng = np.random.default_rng(0)

    def draw(n, m):
        target = rng.normal(size=(m, 3)) * [1.0, 0.4, 1.0] + [1.0, 0.0, -1.0]
        return rng.normal(size=(n, 3)).astype(np.float32), target.astype(np.float32)

    moved = residual_map(*draw(600, 500), epochs=15, learning_rate=3e-3)
    x, y = draw(400, 400)
    assert float(mmd(moved(x), y)) < 0.15 * float(mmd(x, y))


def test_it_starts_as_the_identity_and_keeps_it_where_no_epoch_is_better():
    x, y = _samples(60, 50)
    rows = jnp.asarray(x, jnp.float32)
    np.testing.assert_array_equal(residual_map(x, y, epochs=0)(rows), rows)
    # A step so large that nothing after it is any good.
    np.testing.assert_array_equal(residual_map(x, y, epochs=3, learning_rate=1e6)(rows), rows)


def test_the_seed_decides_and_progress_is_told():
    x, y = _samples(60, 50)
    told = []
    progress = lambda done, total: told.append((done, total))  # noqa: E731
    one, again, other = (residual_map(x, y, epochs=3, seed=s, progress=progress) for s in (0, 0, 1))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(np.asarray(one.layers["0"]["weight"]) != np.asarray(other.layers["0"]["weight"]))
    assert told == [(1, 3), (2, 3), (3, 3)] * 3


def test_bad_input_is_named():
    x, y = _samples(20, 20)
    for bad, message in (
        ({"epochs": -1}, "epochs: got -1; must be at least 0"),
        ({"batch_size": 1}, "batch_size: got 1; must be at least 2"),
        ({"hidden": (0,)}, r"hidden: got \(0,\); one or more"),
        ({"learning_rate": float("nan")}, "learning_rate: got nan; must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            residual_map(x, y, **bad)
    with pytest.raises(ValueError, match="source: 3 rows; at least 4"):
        residual_map(x[:3], y)
    with pytest.raises(ValueError, match="target: row 0 holds NaN"):
        residual_map(x, y * np.nan)
    with pytest.raises(ValueError, match="target: 2 columns, but source has 3"):
        inspect.unwrap(residual_map)(x, y[:, :2])
