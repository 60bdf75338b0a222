import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sotalign_jax.losses import structure


def draw(n=9, d=4, e=6, seed=0):
    """Embeddings and features of rows of uneven lengths and with a common direction."""
    generator = np.random.default_rng(seed)
    parts = []
    for columns in (d, e):
        part = generator.normal(size=(n, columns)) + generator.normal(size=columns)
        parts.append((part * generator.uniform(0.1, 20, (n, 1))).astype(np.float32))
    return parts


def similarities_in_numpy(rows, temperature):
    rows = reference.unit(rows)
    rows = rows - rows.mean(0)
    scores = rows @ rows.T / temperature
    return np.exp(scores - reference.logsumexp(scores, 1)[:, None])


def kl_in_numpy(p, q):
    return np.sum(np.where(p > 0, p * (np.log(np.maximum(p, 1e-300)) - np.log(q)), 0.0)) / len(p)


def structure_in_numpy(
    embeddings,
    features,
    temperature=0.07,
    levels=1,
    weighting="none",
    margin=0.0,
    divergence="js",
    eps=1e-8,
):
    first = [similarities_in_numpy(rows, temperature) for rows in (embeddings, features)]
    total = 0.0
    for level in range(1, levels + 1):
        p, q = (np.linalg.matrix_power(matrix, level) for matrix in first)
        middle = (p + q) / 2
        if divergence == "js":
            value = (kl_in_numpy(p, middle) + kl_in_numpy(q, middle)) / 2
        else:
            value = (kl_in_numpy(middle, p + eps) + kl_in_numpy(middle, q + eps)) / 2
        total += max(0.0, value - margin) * (1.0 if weighting == "none" else 1 / level)
    return total / levels


def check_value_and_gradient(embeddings, features, block=None, **options):
    def loss(embeddings, features):
        return structure(embeddings, features, block=block, **options)

    value, gradients = jax.value_and_grad(loss, (0, 1))(embeddings, features)
    truth = structure_in_numpy(embeddings, features, **options)
    np.testing.assert_allclose(value, truth, rtol=1e-4, atol=1e-6)
    direction = np.random.default_rng(3).normal(size=embeddings.shape)
    ends = [
        structure_in_numpy(embeddings.astype(np.float64) + step * direction, features, **options)
        for step in (1e-5, -1e-5)
    ]
    slope = (ends[0] - ends[1]) / 2e-5
    along = np.sum(np.asarray(gradients[0], np.float64) * direction)
    assert abs(slope) > 1e-3, "a slope of nothing shows nothing"
    np.testing.assert_allclose(along, slope, rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(gradients[1], 0.0)


class TestStructure:
    @pytest.mark.parametrize("divergence", ["js", "reverse"])
    @pytest.mark.parametrize("temperature", [0.07, 0.5])
    def test_one_level(self, divergence, temperature):
        check_value_and_gradient(*draw(), temperature=temperature, divergence=divergence)

    @pytest.mark.parametrize("divergence", ["js", "reverse"])
    @pytest.mark.parametrize("weighting", ["none", "inverse"])
    def test_levels(self, divergence, weighting):
        check_value_and_gradient(
            *draw(), temperature=0.1, levels=3, weighting=weighting, divergence=divergence
        )

    @pytest.mark.parametrize("eps", [1e-8, 1e-12])
    def test_eps_counts_where_similarities_underflow(self, eps):
        check_value_and_gradient(*draw(), temperature=0.01, divergence="reverse", eps=eps)

    def test_margin(self):
        embeddings, features = draw()
        values = [structure_in_numpy(embeddings, features, 0.3, levels=level) for level in (1, 2)]
        second = 2 * values[1] - values[0]
        assert second < values[0], "powers forget"
        between = (values[0] + second) / 2
        check_value_and_gradient(embeddings, features, temperature=0.3, levels=2, margin=between)
        expected = (values[0] - between) / 2
        found = structure(embeddings, features, temperature=0.3, levels=2, margin=between)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        np.testing.assert_array_equal(structure(embeddings, features, margin=0.7), 0.0)

    @pytest.mark.parametrize("block", [1, 4, 9, 20])
    @pytest.mark.parametrize("divergence", ["js", "reverse"])
    def test_blocks(self, block, divergence):
        check_value_and_gradient(*draw(), block=block, divergence=divergence)

    def test_blocks_hold_no_matrix(self):
        embeddings, features = draw(n=211)
        f = jax.jit(jax.grad(lambda a, o: structure(a, o, block=16)))
        compiled = f.lower(embeddings, features).compile().as_text()
        assert "[16,211]" in compiled and "[211,211]" not in compiled

    @pytest.mark.parametrize("options", [{"block": 2}, {"levels": 2, "divergence": "reverse"}])
    def test_comparison_spread_over_devices(self, options):
        embeddings, features = draw(n=10)  # of which 4 devices have 3, 3, 3 and 1
        mesh = jax.make_mesh((4,), ("r",), axis_types=(AxisType.Auto,))
        spread = jax.shard_map(
            functools.partial(structure, axis_name="r", **options),
            mesh=mesh,
            in_specs=P(),
            out_specs=P(),
        )
        value, gradient = jax.jit(jax.value_and_grad(spread))(embeddings, features)
        one = jax.value_and_grad(functools.partial(structure, **options))(embeddings, features)
        np.testing.assert_allclose(value, one[0], rtol=1e-5)
        assert np.linalg.norm(gradient - one[1]) <= 1e-5 * np.linalg.norm(one[1])

    def test_two_opposite_rows_by_hand(self):
        # Rows e1 and -e1 have mean 0: similarities are +-1, their softmax (s, 1 - s). Rows that
        # are all alike are 0 once centred: their softmax is uniform.
        opposite, alike = np.float32([[2, 0], [-3, 0]]), np.float32([[1, 1], [1, 1]])
        s = 1 / (1 + np.exp(-2 / 0.5))
        p, q = np.array([s, 1 - s]), np.array([0.5, 0.5])
        m = (p + q) / 2
        js = (np.sum(p * np.log(p / m)) + np.sum(q * np.log(q / m))) / 2
        reverse = (np.sum(m * np.log(m / p)) + np.sum(m * np.log(m / q))) / 2
        for name, truth in (("js", js), ("reverse", reverse)):
            value = structure(opposite, alike, temperature=0.5, divergence=name)
            np.testing.assert_allclose(value, truth, rtol=1e-5)

    @pytest.mark.parametrize("eps,published", [(1e-8, 8.5), (1e-12, 13.1)])
    def test_disjoint_similarities(self, eps, published):
        # Four rows in opposite pairs: who is beside whom differs, so that with a small temperature
        # each row looks at two rows here, and at one of these and another there.
        ours = np.float32([[1, 0], [1, 0], [-1, 0], [-1, 0]])
        theirs = np.float32([[1, 0], [-1, 0], [1, 0], [-1, 0]])
        options = {"temperature": 1e-3}
        # P = (1/2, 1/2, 0, 0), Q = (1/2, 0, 1/2, 0): half of the mass is disjoint.
        half = structure(ours, theirs, **options)
        np.testing.assert_allclose(half, np.log(2) / 2, rtol=1e-5)
        value = structure(ours, theirs, **options, divergence="reverse", eps=eps)
        # Disjoint mass costs log(1/eps) / 2 - log 2, the figure published for one-hot rows.
        one_hot = 0.5 * np.log(1 / eps) - np.log(2)
        np.testing.assert_allclose(one_hot, published, atol=0.05)
        np.testing.assert_allclose(value, 0.5 * (one_hot + 0.5 * np.log(0.5)), rtol=1e-4)

    @pytest.mark.parametrize("divergence", ["js", "reverse"])
    @pytest.mark.parametrize("levels", [1, 3])
    def test_zero_at_equality(self, divergence, levels):
        features = draw()[1]
        rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))
        turned = (features @ rotation * 3).astype(np.float32)
        value, gradient = jax.value_and_grad(structure)(
            turned, features, divergence=divergence, levels=levels
        )
        np.testing.assert_allclose(value, 0.0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-4)

    @pytest.mark.parametrize("divergence", ["js", "reverse"])
    @pytest.mark.parametrize("temperature,levels", [(0.001, 1), (0.0078125, 1), (0.1, 1), (0.1, 2)])
    def test_laws(self, divergence, temperature, levels):
        @jax.jit
        def loss(embeddings, features):
            return structure(
                embeddings,
                features,
                temperature=temperature,
                divergence=divergence,
                levels=levels,
            )

        slope = jax.jit(jax.grad(loss))
        for seed in range(10):
            embeddings, features = draw(seed=seed)
            value = loss(embeddings, features)
            assert value > 0 and np.isfinite(slope(embeddings, features)).all()
            if divergence == "js":
                assert value <= np.log(2) + 1e-5
            order = np.random.default_rng(seed).permutation(9)
            same = (embeddings[order], features[order]), (embeddings * np.float32(7), features)
            for moved in same:
                np.testing.assert_allclose(loss(*moved), value, rtol=2e-3, atol=2e-5)
        swapped = structure(
            features, embeddings, temperature=temperature, divergence=divergence, levels=levels
        )
        np.testing.assert_allclose(swapped, value, rtol=2e-3, atol=2e-5)

    def test_order_of_one_side_counts(self):
        embeddings, features = draw()
        moved = structure(embeddings[::-1].copy(), features)
        assert abs(float(moved) - float(structure(embeddings, features))) > 0.01

    def test_vmap_jit_and_dtypes(self):
        batches = [draw(seed=seed) for seed in range(3)]
        values = jax.jit(jax.vmap(structure))(*map(np.stack, zip(*batches, strict=True)))
        truths = [structure_in_numpy(*parts) for parts in batches]
        np.testing.assert_allclose(values, truths, rtol=1e-4)
        for dtype in (jnp.bfloat16, np.float16, np.float64):
            parts = [part.astype(dtype) for part in batches[0]]
            value = structure(*parts)
            assert value.dtype == jnp.float32
            np.testing.assert_allclose(value, structure_in_numpy(*parts), rtol=1e-3)

    @pytest.mark.parametrize(
        "options,message",
        [
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"levels": 0}, "levels must be at least 1"),
            ({"weighting": "half"}, "weighting must be"),
            ({"margin": -0.1}, "margin must not be negative"),
            ({"divergence": "kl"}, "divergence must be"),
            ({"eps": 0.0}, "eps must be at least 1e-30"),
            ({"block": 0}, "block must be at least 1"),
            ({"block": 4, "levels": 2}, "block needs levels=1"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(structure)(*draw(), **options)

    def test_bad_rows(self):
        embeddings, features = draw()
        with pytest.raises(ValueError, match="features must be those of the rows"):
            inspect.unwrap(structure)(embeddings, features[:-1])
        with pytest.raises(ValueError, match="at least 2 rows"):
            structure(embeddings[:1], features[:1])
