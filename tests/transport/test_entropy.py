"""Sharpness of plans against float64 NumPy, in every form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sotalign_jax.transport import StreamedAffinity, perplexity, row_entropy, solve

N, M = 24, 19


def factors():
    image, text = reference.cca_rows()
    draw = np.random.default_rng(0)
    image, text = (rows[draw.permutation(len(rows))] for rows in (image, text))
    return tuple(reference.unit(r[:k, :12]).astype(np.float32) for r, k in ((image, N), (text, M)))


@functools.cache
def problem(epsilon=0.02):
    """Factors, their affinity in float64, and the plan."""
    image, text = factors()
    affinity = image.astype(np.float64) @ text.astype(np.float64).T
    return image, text, affinity, solve(jnp.asarray(affinity, jnp.float32), epsilon)


def entropies(plan):
    """Of the rows of a matrix, in float64."""
    share = plan / plan.sum(axis=1, keepdims=True)
    return -np.where(share > 0, share * np.log(np.where(share > 0, share, 1)), 0).sum(axis=1)


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 1.0])
def test_entropy_of_the_plan_in_float64(epsilon):
    image, text, affinity, plan = problem(epsilon)
    truth = entropies(reference.plan_of(plan, affinity))
    found = row_entropy(plan, jnp.asarray(affinity, jnp.float32))
    np.testing.assert_allclose(found, truth, atol=2e-6 / epsilon**0.5)
    # The row potentials drop out: single rows have the entropy that they have among all.
    np.testing.assert_allclose(row_entropy(plan, affinity[3:5].astype(np.float32)), found[3:5])
    for block in (1, 7, N, 64) if epsilon == 0.05 else (7,):
        streamed = StreamedAffinity(jnp.asarray(image), jnp.asarray(text), block)
        np.testing.assert_allclose(row_entropy(plan, streamed), found, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        perplexity(plan, affinity.astype(np.float32)), np.exp(truth.mean()), rtol=1e-4
    )


def test_limits_are_one_text_and_all_texts():
    affinity = jnp.asarray(np.eye(9), jnp.float32)
    assert perplexity(solve(affinity, 0.01), affinity) == pytest.approx(1.0, abs=1e-6)
    flat = jnp.zeros((5, 9))
    assert perplexity(solve(flat, 0.1), flat) == pytest.approx(9.0, rel=1e-6)


def test_forbidden_entries_and_columns_without_mass_count_for_nothing():
    _, _, affinity, _ = problem()
    affinity = affinity.astype(np.float32)
    affinity[:, :4] = np.where(np.arange(N)[:, None] % 2, -np.inf, affinity[:, :4])
    b = np.where(np.arange(M) == M - 1, 0, 1 / (M - 1)).astype(np.float32)
    plan = solve(jnp.asarray(affinity), 0.05, b=jnp.asarray(b))
    exponents = (np.asarray(plan.g, np.float64) + affinity) / 0.05
    kernel = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    np.testing.assert_allclose(row_entropy(plan, affinity), entropies(kernel), atol=1e-5)


def test_weights_leave_padding_out_whatever_it_holds():
    _, _, affinity, plan = problem()
    affinity = affinity.astype(np.float32)
    padded = np.concatenate([affinity, np.full((3, M), np.nan, np.float32)])
    weights = np.float32([1.0] * N + [0.0] * 3)
    assert perplexity(plan, padded, weights=weights) == pytest.approx(
        float(perplexity(plan, affinity)), rel=1e-6
    )
    weights = np.linspace(0, 1, N).astype(np.float32)
    truth = np.exp(np.average(np.asarray(row_entropy(plan, affinity)), weights=weights))
    assert perplexity(plan, affinity, weights=weights) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("memory", ["dense", "streamed"])
def test_rows_spread_over_devices_give_the_same(memory):
    image, text, affinity, plan = problem()
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("rows"), P(), P()), out_specs=P())
    def spread(image, text, plan):
        streamed = StreamedAffinity(image, text, 2)
        rows = streamed if memory == "streamed" else streamed.of_rows(image)
        return perplexity(plan, rows, axis_name="rows")

    plan = plan._replace(f=jnp.zeros(N))
    alone = perplexity(plan, affinity.astype(np.float32))
    assert spread(image, text, plan) == pytest.approx(float(alone), rel=1e-5)
