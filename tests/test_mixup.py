import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sotalign_jax.mixup import fusemix


def draw(n=8):
    generator = np.random.default_rng(0)
    return tuple(generator.normal(size=(n, columns)).astype(np.float32) for columns in (5, 3))


def shares(mixed, rows, others):
    """The proportion that each mixture of two rows took of the first, and what it leaves open."""
    gaps = rows - others
    found = np.sum((mixed - others) * gaps, axis=1) / np.sum(gaps**2, axis=1)
    return found, np.abs(mixed - others - found[:, None] * gaps).max()


@pytest.mark.parametrize("partners,n", [("halves", 8), ("halves", 2), ("roll", 8), ("roll", 7)])
@pytest.mark.parametrize("per_row", [False, True])
def test_mixtures_of_the_same_pairs_in_the_same_proportion(rng, partners, n, per_row):
    sides = draw(n)
    mixed = fusemix(rng, *sides, partners=partners, per_row=per_row)
    others = (np.arange(n) + n // 2) % n
    count = n // 2 if partners == "halves" else n
    found = []
    for rows, mixture in zip(sides, mixed, strict=True):
        assert mixture.shape == (count, rows.shape[1]) and mixture.dtype == jnp.float32
        share, rest = shares(np.asarray(mixture), rows[:count], rows[others][:count])
        assert rest < 1e-5
        found.append(share)
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    assert np.all((found[0] > -1e-5) & (found[0] < 1 + 1e-5))
    spread = np.ptp(found[0])
    assert spread > 0.1 if per_row and count > 1 else spread < 1e-4


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_proportions_are_of_the_beta_distribution(rng, alpha):
    # The rows of the first half are 1 and of the second 0: a mixture is its own proportion.
    rows = np.repeat(np.float32([[1], [0]]), 20_000, axis=0)
    share, _ = fusemix(rng, rows, rows, alpha=alpha, per_row=True)
    np.testing.assert_allclose(np.mean(share), 0.5, atol=0.01)
    np.testing.assert_allclose(np.var(share), 1 / (4 * (2 * alpha + 1)), rtol=0.03)


def test_one_proportion_a_batch_and_a_new_one_a_key(rng):
    rows = np.float32([[1], [1], [0], [0]])
    keys = jax.random.split(rng, 2_000)
    share, _ = jax.jit(jax.vmap(lambda key: fusemix(key, rows, rows)))(keys)
    share = np.asarray(share)[:, :, 0]
    np.testing.assert_array_equal(share[:, 0], share[:, 1])
    # Uniform: a tenth of the draws in each tenth.
    np.testing.assert_allclose(np.histogram(share[:, 0], 10, (0, 1))[0] / 2_000, 0.1, atol=0.03)


def test_gradient_and_dtypes(rng):
    image, text = draw()

    def total(image):
        return jnp.sum(fusemix(rng, image, text)[0])

    gradient = np.asarray(jax.grad(total)(image))
    # The proportions of the two that make a mixture sum to one.
    np.testing.assert_allclose(gradient[:4] + gradient[4:], 1.0, rtol=1e-6)
    for dtype in (np.float16, jnp.bfloat16, np.float64):
        mixed = fusemix(rng, image.astype(dtype), text.astype(dtype))
        assert all(side.dtype == jnp.float32 for side in mixed)


@pytest.mark.parametrize(
    "n,m,options,message",
    [
        (8, 7, {}, "pair row by row, got 8 and 7"),
        (1, 1, {"partners": "roll"}, "at least 2 rows"),
        (7, 7, {}, "needs an even number of rows, got 7"),
        (8, 8, {"alpha": 0.0}, "alpha must be positive"),
        (8, 8, {"partners": "any"}, "partners must be"),
    ],
)
def test_bad_input(rng, n, m, options, message):
    image, text = draw(n)[0], draw(m)[1]
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(fusemix)(rng, image, text, **options)
