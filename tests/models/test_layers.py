"""Alignment layers against NumPy in float64, and the published parameter counts."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from sotalign_jax.models import MLP, LayerConfig, Linear, Star, make_layer

erf = np.vectorize(math.erf, otypes=[np.float64])


@pytest.fixture
def untyped():
    """No run-time type checks, as in a user's program: our own errors must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def parameters(layer):
    """Parameters by dotted name, in float64."""
    return {
        ".".join(path): np.asarray(variable[...], np.float64)
        for path, variable in nnx.to_flat_state(nnx.state(layer))
    }


def randomised(layer, seed=1, size=0.5):
    """The same layer with every parameter drawn at random, biases and gains included."""
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(size * rng.standard_normal(leaf.shape), jnp.float32),
        nnx.state(layer),
    )
    nnx.update(layer, state)
    return layer


def numpy_forward(kind, p, x):
    x = np.asarray(x, np.float64)
    if "layer_norm.scale" in p:
        centred = x - x.mean(1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
        x = x * p["layer_norm.scale"] + p["layer_norm.bias"]

    def dense(rows, name):
        return rows @ p[f"{name}.kernel"] + p.get(f"{name}.bias", 0.0)

    if kind == "linear":
        return dense(x, "linear")
    if kind == "mlp":
        hidden = dense(x, "hidden")
        return dense(hidden * 0.5 * (1 + erf(hidden / math.sqrt(2))), "output")
    gate = np.clip(dense(x, "gate"), -1e3, 1e3)
    value = np.clip(dense(x, "value"), -1e3, 1e3)
    return dense(np.clip(gate, 0, 6) * value, "output")


@pytest.mark.parametrize("kind", ["linear", "mlp", "star"])
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_that_of_numpy(kind, layer_norm, bias):
    config = LayerConfig(kind, layer_norm=layer_norm, bias=bias)
    layer = randomised(make_layer(config, 7, 5, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(2).standard_normal((6, 7)).astype(np.float32) + 0.3
    p = parameters(layer)
    assert ("layer_norm.scale" in p) == layer_norm
    assert any(name.endswith(".bias") for name in p if "layer_norm" not in name) == bias
    expected = numpy_forward(kind, p, x)
    got = layer(jnp.asarray(x))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


def test_star_is_clamped():
    layer = randomised(Star(3, 2, layer_norm=False, rngs=nnx.Rngs(0)))
    x = 1e5 * np.random.default_rng(3).standard_normal((4, 3)).astype(np.float32)
    p = parameters(layer)
    assert np.abs(x @ p["value.kernel"]).max() > 1e4  # the clamp is active
    expected = numpy_forward("star", p, x)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-5, atol=0.1)


def test_layer_norm_survives_a_large_mean():
    layer = Linear(64, 64, bias=False, rngs=nnx.Rngs(0))
    layer.linear.kernel[...] = jnp.eye(64, dtype=jnp.float32)
    x = (1000 + np.random.default_rng(4).standard_normal((5, 64))).astype(np.float32)
    exact = x.astype(np.float64)
    exact = exact - exact.mean(1, keepdims=True)
    exact /= np.sqrt((exact**2).mean(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layer(jnp.asarray(x)), exact, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "mlp", "star"])
def test_initialisation(kind):
    d_in, d_out = 96, 64
    layer = make_layer(LayerConfig(kind), d_in, d_out, rngs=nnx.Rngs(5))
    for name, value in parameters(layer).items():
        if name == "layer_norm.scale":
            np.testing.assert_array_equal(value, 1)
        elif name.endswith("bias"):
            np.testing.assert_array_equal(value, 0)
        else:
            limit = math.sqrt(6 / sum(value.shape))
            assert 0.98 * limit < np.abs(value).max() <= limit * (1 + 1e-6)
            np.testing.assert_allclose(value.std(), limit / math.sqrt(3), rtol=0.05)


@pytest.mark.parametrize(
    ("kind", "d_in", "count"),
    [
        # By hand: gain and offset, matrices, biases; BASELINES rounds these to 2.1M .. 302.1M.
        ("linear", 2048, 2 * 2048 + 2048 * 1024 + 1024),
        ("linear", 4096, 2 * 4096 + 4096 * 1024 + 1024),
        ("star", 2048, 2 * 2048 + 2 * (2048 * 16384 + 16384) + 16384 * 1024 + 1024),
        ("star", 4096, 2 * 4096 + 2 * (4096 * 32768 + 32768) + 32768 * 1024 + 1024),
        ("mlp", 2048, 2 * 2048 + (2048 * 8192 + 8192) + 8192 * 1024 + 1024),
    ],
)
def test_parameter_counts(kind, d_in, count):
    layer = nnx.eval_shape(lambda: make_layer(LayerConfig(kind), d_in, 1024, rngs=nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(layer))) == count
    published = {("linear", 2048): 2.1, ("linear", 4096): 4.2}
    published |= {("star", 2048): 83.9, ("star", 4096): 302.1}
    if (kind, d_in) in published:
        assert round(count / 1e6, 1) == published[kind, d_in]


@pytest.mark.parametrize(
    ("kind", "factor", "hidden"),
    [("mlp", None, 40), ("mlp", 2, 20), ("mlp", 0.25, 2), ("mlp", 0.01, 1), ("star", None, 80)],
)
def test_width_factor(kind, factor, hidden):
    layer = make_layer(LayerConfig(kind, width_factor=factor), 10, 3, rngs=nnx.Rngs(0))
    assert parameters(layer)["output.kernel"].shape == (hidden, 3)


def test_given_hidden_width():
    assert parameters(MLP(4, 3, hidden=9, rngs=nnx.Rngs(0)))["hidden.kernel"].shape == (4, 9)
    assert parameters(Star(4, 3, hidden=9, rngs=nnx.Rngs(0)))["gate.kernel"].shape == (4, 9)


def test_config_goes_through_json():
    config = LayerConfig("star", layer_norm=False, bias=False, width_factor=2.5)
    assert LayerConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "conv"}, "kind: .*'conv'.*linear, mlp, star"),
        ({"layer_norm": "yes"}, "layer_norm: .*'yes'"),
        ({"bias": 1}, "bias: .*1"),
        ({"kind": "linear", "width_factor": 2}, "width_factor: .*linear"),
        ({"kind": "mlp", "width_factor": 0}, "width_factor: .*positive"),
        ({"kind": "mlp", "width_factor": float("inf")}, "width_factor: .*finite"),
        ({"kind": "star", "width_factor": "8"}, "width_factor: .*number"),
        ({"kind": "star", "width_factor": True}, "width_factor: .*number"),
        ({"kind": "linear", "hidden": 3}, "hidden: got 3; it is for mlp and star"),
        ({"kind": "mlp", "hidden": 3, "width_factor": 2}, "hidden: .*without a width_factor"),
        ({"kind": "star", "hidden": 0}, "hidden: .*positive integer"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_wrong_config(options, message):
    with pytest.raises(ValueError, match=message):
        LayerConfig(**options)


@pytest.mark.parametrize("kind", ["linear", "mlp", "star"])
@pytest.mark.parametrize(("d_in", "d_out", "name"), [(0, 3, "d_in"), (3, -1, "d_out")])
def test_wrong_sizes(kind, d_in, d_out, name):
    with pytest.raises(ValueError, match=f"{name}: .*positive integer"):
        make_layer(LayerConfig(kind), d_in, d_out, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("layer", [MLP, Star])
def test_wrong_hidden(layer):
    with pytest.raises(ValueError, match=r"hidden: got 0"):
        layer(3, 3, hidden=0, rngs=nnx.Rngs(0))
