"""The aligner against NumPy, closed forms and a reader that has no JAX."""

import json
import math
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import sotalign_jax
from sotalign_jax.models import Aligner, LayerConfig, Preprocessing
from sotalign_jax.numerics import Columns

LAYERS = {
    "linear": LayerConfig("linear"),
    "matrix": LayerConfig("linear", layer_norm=False, bias=False),
    "mlp": LayerConfig("mlp", width_factor=2),
    "star": LayerConfig("star", width_factor=3, layer_norm=False),
}

# Written from the format's description alone: the recipe, in plain NumPy.
NUMPY_READER = """
import json, math, sys
import numpy as np
from safetensors.numpy import load_file

erf = np.vectorize(math.erf, otypes=[np.float64])

def embed(directory, side, raw):
    config = json.load(open(f"{directory}/aligner.json"))
    standardized = config.get("standardized", [])
    assert (config["format"], config["version"]) == ("sotalign_jax.aligner", 1 + bool(standardized))
    t = {k: v.astype(np.float64) for k, v in load_file(f"{directory}/aligner.safetensors").items()}
    x = raw.astype(np.float64)
    if config["normalize"]:
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    if side in standardized:
        x = (x - t[f"{side}_column_mean"]) / t[f"{side}_column_scale"]
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    x = x - t[f"{side}_mean"]
    if config["layer"]["layer_norm"]:
        x = x - x.mean(1, keepdims=True)
        x = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
        x = x * t[f"{side}.layer_norm.scale"] + t[f"{side}.layer_norm.bias"]

    def dense(x, name):
        return x @ t[f"{side}.{name}.kernel"] + t.get(f"{side}.{name}.bias", 0)

    kind = config["layer"]["kind"]
    if kind == "linear":
        x = dense(x, "linear")
    elif kind == "mlp":
        h = dense(x, "hidden")
        x = dense(h * (1 + erf(h / math.sqrt(2))) / 2, "output")
    else:
        g, v = (np.clip(dense(x, name), -1e3, 1e3) for name in ("gate", "value"))
        x = dense(np.clip(g, 0, 6) * v, "output")
    return x / np.linalg.norm(x, axis=1, keepdims=True)

if __name__ == "__main__":
    root = sys.argv[1]
    raw = np.load(f"{root}/raw.npz")
    for name in sys.argv[2:]:
        for side in ("image", "text"):
            np.save(f"{root}/{name}_{side}.npy", embed(f"{root}/{name}", side, raw[side]))
    assert "jax" not in sys.modules and "flax" not in sys.modules
"""


class Teacher(NamedTuple):
    image_weight: np.ndarray
    text_weight: np.ndarray
    image_mean: np.ndarray
    text_mean: np.ndarray


@pytest.fixture
def untyped():
    """No run-time type checks, as in a user's program: our own errors must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def features(n=6, image_dim=7, text_dim=5, seed=0):
    rng = np.random.default_rng(seed)
    image = 3 * rng.standard_normal((n, image_dim)) + 0.5
    text = 3 * rng.standard_normal((n, text_dim)) - 0.5
    return image.astype(np.float32), text.astype(np.float32)


def random_aligner(layer=LAYERS["linear"], seed=0, **options):
    """An aligner in which no number is zero or one, biases and gains included."""
    rng = np.random.default_rng(seed)
    options = {
        "image_mean": 0.1 * rng.standard_normal(7).astype(np.float32),
        "text_mean": 0.1 * rng.standard_normal(5).astype(np.float32),
    } | options
    aligner = Aligner(7, 5, 4, layer=layer, rngs=nnx.Rngs(seed), **options)
    for _, param in nnx.to_flat_state(nnx.state(aligner, nnx.Param)):
        noise = rng.standard_normal(param.shape).astype(np.float32)
        param[...] = param[...] + 0.3 * noise
    return aligner


def some_columns(dim, seed=1):
    rng = np.random.default_rng(seed)
    mean, scale = 0.2 * rng.standard_normal(dim), rng.uniform(0.1, 2.0, dim)
    return Columns(mean.astype(np.float32), scale.astype(np.float32))


def standardized64(rows, columns):
    return unit64((unit64(rows) - columns.mean) / columns.scale)


def unit64(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def random_teacher(seed=0, size=(30.0, 0.002)):
    rng = np.random.default_rng(seed)
    return Teacher(
        (size[0] * rng.standard_normal((7, 4))).astype(np.float32),
        (size[1] * rng.standard_normal((5, 4))).astype(np.float32),
        (0.1 * rng.standard_normal(7)).astype(np.float32),
        (0.1 * rng.standard_normal(5)).astype(np.float32),
    )


def teacher_affinity(teacher, image, text):
    image = unit64((unit64(image) - teacher.image_mean) @ teacher.image_weight.astype(np.float64))
    text = unit64((unit64(text) - teacher.text_mean) @ teacher.text_weight.astype(np.float64))
    return image @ text.T


# Forward pass


def test_preprocess_project_embed_by_hand():
    aligner = Aligner(
        2,
        2,
        2,
        layer=LayerConfig("linear", layer_norm=False),
        rngs=nnx.Rngs(0),
        image_mean=np.array([0.1, 0.2], np.float32),
    )
    aligner.image.linear.kernel[...] = jnp.array([[0.0, 2.0], [1.0, 0.0]], jnp.float32)
    aligner.image.linear.bias[...] = jnp.array([0.4, 0.0], jnp.float32)
    raw = np.array([[3.0, 4.0]], np.float32)  # unit (0.6, 0.8), minus mean (0.5, 0.6)
    preprocessed = aligner.preprocess_image(raw)
    np.testing.assert_allclose(preprocessed, [[0.5, 0.6]], rtol=1e-6)
    np.testing.assert_allclose(aligner.project_image(preprocessed), [[1.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(aligner.embed_image(raw), [[math.sqrt(0.5)] * 2], rtol=1e-6)
    # No mean was given for texts.
    np.testing.assert_allclose(aligner.preprocess_text(raw), [[0.6, 0.8]], rtol=1e-6)


def test_without_normalisation_only_the_mean_is_subtracted():
    image, text = features()
    aligner = random_aligner(normalize=False)
    mean = np.asarray(aligner.image_mean[...], np.float64)
    np.testing.assert_allclose(aligner.preprocess_image(image), image - mean, rtol=1e-5, atol=1e-6)
    mean = np.asarray(aligner.text_mean[...], np.float64)
    np.testing.assert_allclose(aligner.preprocess_text(text), text - mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_single_row_is_a_row_of_the_batch(name):
    image, text = features()
    aligner = random_aligner(LAYERS[name])
    assert aligner.embed_image(image[2]).shape == (4,)
    np.testing.assert_allclose(
        aligner.embed_image(image[2]), aligner.embed_image(image)[2], rtol=1e-5, atol=1e-6
    )
    full = np.asarray(aligner.similarity(image, text))
    for got, expected in (
        (aligner.similarity(image[2], text), full[2]),
        (aligner.similarity(image, text[1]), full[:, 1]),
        (aligner.similarity(image[2], text[1]), full[2, 1]),
    ):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
def test_any_floating_dtype_is_computed_in_float32(dtype):
    image, text = features()
    aligner = random_aligner()
    image, text = image.astype(dtype), text.astype(dtype)
    for embed, rows in ((aligner.embed_image, image), (aligner.embed_text, text)):
        got = embed(rows)
        assert got.dtype == jnp.float32
        # Only the rounding of the input counts, not that of the arithmetic.
        np.testing.assert_array_equal(got, embed(rows.astype(np.float32)))
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)


def test_half_precision_features_near_overflow():
    image = np.full((1, 7), 60000, np.float16)
    np.testing.assert_allclose(
        Aligner(7, 5, 4, layer=LAYERS["matrix"], rngs=nnx.Rngs(0)).preprocess_image(image),
        np.full((1, 7), 1 / math.sqrt(7)),
        rtol=1e-6,
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), size=st.floats(1e-6, 1e6))
def test_length_of_a_raw_row_does_not_matter(seed, size):
    image, _ = features(seed=seed)
    aligner = random_aligner()
    expected = aligner.embed_image(image)
    np.testing.assert_allclose(
        aligner.embed_image(image * np.float32(size)), expected, rtol=1e-4, atol=1e-5
    )


def test_jit_and_split():
    image, text = features()
    aligner = random_aligner(LAYERS["star"])
    expected = aligner.similarity(image, text)
    np.testing.assert_allclose(
        jax.jit(lambda model, a, b: model.similarity(a, b))(aligner, image, text),
        expected,
        rtol=1e-5,
        atol=1e-6,
    )
    graphdef, params, rest = nnx.split(aligner, nnx.Param, ...)
    assert {path[0] for path, _ in nnx.to_flat_state(rest)} == {"image_mean", "text_mean"}
    assert all(isinstance(v, Preprocessing) for _, v in nnx.to_flat_state(rest))

    @jax.jit
    def embed(params, rest, rows):
        return nnx.merge(graphdef, params, rest).embed_text(rows)

    np.testing.assert_allclose(embed(params, rest, text), aligner.embed_text(text), atol=1e-6)


def test_embedding_multiplies_at_the_highest_precision():
    image, text = features()
    aligner = random_aligner()
    ambient = str(jax.make_jaxpr(aligner.project_image)(image))
    assert "dot_general" in ambient and "HIGHEST" not in ambient
    for function in (aligner.embed_image, lambda rows: aligner.similarity(rows, text)):
        lines = str(jax.make_jaxpr(function)(image)).split("dot_general")[1:]
        assert lines and all("HIGHEST" in line for line in lines)


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_reaches_all_parameters_and_no_preprocessing(name):
    image, text = features(n=16)
    aligner = random_aligner(LAYERS[name], scale=4.0, bias=-1.0)

    def loss(model):
        return jnp.mean((model.predict_proba(image, text) - jnp.eye(16)) ** 2)

    gradient = jax.grad(loss)(aligner)
    for path, leaf in nnx.to_flat_state(nnx.state(gradient)):
        largest = float(np.abs(leaf[...]).max())
        if path[0] in ("image_mean", "text_mean"):
            assert largest == 0, path
        else:
            assert largest > 1e-7, path
    trained = nnx.to_flat_state(nnx.grad(loss)(aligner))
    assert {path for path, _ in trained} == {
        path for path, _ in nnx.to_flat_state(nnx.state(aligner, nnx.Param))
    }


def test_start_values():
    aligner = Aligner(7, 5, 4, layer=LAYERS["linear"], rngs=nnx.Rngs(0))
    np.testing.assert_allclose(aligner.log_scale[...], math.log(20), rtol=1e-6)
    np.testing.assert_allclose(aligner.scale, 20, rtol=1e-6)
    assert float(aligner.bias[...]) == -10
    assert aligner.training_prior is None


# From a teacher


@pytest.mark.parametrize("rescale", [True, False])
def test_from_teacher_keeps_the_affinity(rescale):
    teacher = random_teacher()
    image, text = features()
    aligner = Aligner.from_teacher(teacher, scale=15.0, bias=-8.0, prior=0.1, rescale=rescale)
    np.testing.assert_allclose(
        aligner.similarity(image, text), teacher_affinity(teacher, image, text), atol=2e-6
    )
    np.testing.assert_allclose(aligner.scale, 15, rtol=1e-6)
    assert float(aligner.bias[...]) == -8
    assert aligner.training_prior == 0.1
    np.testing.assert_array_equal(aligner.image.linear.bias[...], 0)
    assert aligner.text.layer_norm is None


@pytest.mark.parametrize("size", [1e-25, 1e-3, 1.0, 1e25])
def test_rescale_gives_the_size_of_a_fresh_layer(size):
    teacher = random_teacher(size=(size, 1.0))
    image, text = features()
    aligner = Aligner.from_teacher(teacher)
    for layer, d_in in ((aligner.image, 7), (aligner.text, 5)):
        kernel = np.asarray(layer.linear.kernel[...], np.float64)
        np.testing.assert_allclose(
            np.sqrt(np.mean(kernel**2)), math.sqrt(2 / (d_in + 4)), rtol=1e-5
        )
    np.testing.assert_allclose(
        aligner.similarity(image, text), teacher_affinity(teacher, image, text), atol=2e-6
    )


def test_without_rescale_the_weights_are_the_teachers():
    teacher = random_teacher()
    aligner = Aligner.from_teacher(teacher, rescale=False)
    np.testing.assert_array_equal(aligner.image.linear.kernel[...], teacher.image_weight)
    np.testing.assert_array_equal(aligner.text.linear.kernel[...], teacher.text_weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_weight": np.zeros((7, 4), np.float32)}, "teacher.image_weight: .*all zero"),
        ({"text_weight": np.full((5, 4), np.nan, np.float32)}, "teacher.text_weight: .*finite"),
        ({"text_weight": np.ones(5, np.float32)}, r"teacher.text_weight: .*\(5,\)"),
        ({"text_weight": np.ones((5, 3), np.float32)}, "teacher: .*4 columns.*3"),
        ({"image_mean": np.ones(6, np.float32)}, r"image_mean: .*\(6,\).*\(7,\)"),
    ],
)
def test_wrong_teacher(change, message):
    with pytest.raises(ValueError, match=message):
        Aligner.from_teacher(random_teacher()._replace(**change))


# Standardised columns


def test_columns_are_standardised_between_two_normalisations():
    image, text = features()
    columns = some_columns(7)
    aligner = random_aligner(image_columns=columns)
    mean = np.asarray(aligner.image_mean[...], np.float64)
    expected = standardized64(image, columns) - mean
    np.testing.assert_allclose(aligner.preprocess_image(image), expected, atol=1e-6)
    np.testing.assert_allclose(aligner.preprocess_image(image[3]), expected[3], atol=1e-6)
    np.testing.assert_array_equal(
        aligner.preprocess_text(text), random_aligner().preprocess_text(text)
    )
    assert aligner.standardized == ("image",)
    assert aligner.columns("text") is None
    np.testing.assert_array_equal(aligner.columns("image").scale, columns.scale)


def test_columns_are_preprocessing_and_get_no_gradient():
    image, text = features(n=16)
    aligner = random_aligner(text_columns=some_columns(5))
    _, _, rest = nnx.split(aligner, nnx.Param, ...)
    names = {path[0]: v for path, v in nnx.to_flat_state(rest)}
    assert names.keys() == {"image_mean", "text_mean", "text_column_mean", "text_column_scale"}
    assert all(isinstance(v, Preprocessing) for v in names.values())
    gradient = jax.grad(lambda model: model.similarity(image, text).sum())(aligner)
    found = {path[0]: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(gradient))}
    assert not np.any(found["text_column_scale"]) and not np.any(found["text_column_mean"])


def test_from_teacher_keeps_the_columns():
    class Standardized(NamedTuple):
        image_weight: np.ndarray
        text_weight: np.ndarray
        image_mean: np.ndarray
        text_mean: np.ndarray
        image_columns: Columns | None
        text_columns: Columns | None

    teacher, columns = random_teacher(), some_columns(7)
    image, text = features()
    aligner = Aligner.from_teacher(Standardized(*teacher, columns, None))
    a = (standardized64(image, columns) - teacher.image_mean) @ teacher.image_weight
    b = (unit64(text) - teacher.text_mean) @ teacher.text_weight.astype(np.float64)
    np.testing.assert_allclose(aligner.similarity(image, text), unit64(a) @ unit64(b).T, atol=2e-6)


@pytest.mark.parametrize("sides", [("image",), ("text",), ("image", "text")])
def test_a_saved_aligner_brings_its_columns(sides, tmp_path):
    image, text = features()
    sizes = {"image": 7, "text": 5}
    columns = {f"{side}_columns": some_columns(sizes[side]) for side in sides}
    aligner = random_aligner(**columns)
    aligner.save(tmp_path / "a")
    document = json.loads((tmp_path / "a" / "aligner.json").read_text())
    assert (document["version"], document["standardized"]) == (2, list(sides))
    assert "{side}_column_scale" in document["recipe"]
    loaded = Aligner.load(tmp_path / "a")
    assert loaded.standardized == sides
    np.testing.assert_array_equal(loaded.similarity(image, text), aligner.similarity(image, text))
    # Without its columns it would be another model.
    plain = np.asarray(random_aligner().similarity(image, text))
    assert np.abs(plain - aligner.similarity(image, text)).max() > 0.01


def test_an_aligner_of_before_there_were_columns_loads(tmp_path):
    rng = np.random.default_rng(4)
    tensors = {
        "image.linear.kernel": rng.standard_normal((7, 4)),
        "text.linear.kernel": rng.standard_normal((5, 4)),
        "image_mean": 0.1 * rng.standard_normal(7),
        "text_mean": 0.1 * rng.standard_normal(5),
        "log_scale": np.array(3.0),
        "bias": np.array(-10.0),
    }
    tensors = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    (tmp_path / "old").mkdir()
    safetensors.numpy.save_file(tensors, tmp_path / "old" / "aligner.safetensors")
    layer = {"kind": "linear", "layer_norm": False, "bias": False, "width_factor": None}
    document = {"format": "sotalign_jax.aligner", "version": 1, "image_dim": 7, "text_dim": 5}
    document |= {"dim": 4, "layer": layer, "normalize": True, "training_prior": None}
    (tmp_path / "old" / "aligner.json").write_text(json.dumps(document))
    loaded = Aligner.load(tmp_path / "old")
    image, text = features()
    old = Teacher(*(tensors[name] for name in list(tensors)[:4]))
    np.testing.assert_allclose(
        loaded.similarity(image, text), teacher_affinity(old, image, text), atol=2e-6
    )
    assert loaded.standardized == ()


def test_a_file_whose_columns_are_missing_or_unexpected_is_refused(tmp_path):
    random_aligner(image_columns=some_columns(7)).save(tmp_path / "a")
    for fields, message in (
        ({"standardized": ["text"]}, "tensors missing: text_column_mean, text_column_scale"),
        ({"standardized": ["image", "text"]}, "tensors missing: text_column"),
        ({"standardized": "image"}, "standardized: got 'image'"),
        ({"standardized": []}, r"standardized: got \[\]"),
        ({"standardized": "DROP"}, "field 'standardized' is missing"),
        ({"standardized": ["image"], "version": 1}, "not part of this aligner: image_column_mean"),
    ):
        edit_json(tmp_path / "a", **fields)
        with pytest.raises(ValueError, match=message):
            Aligner.load(tmp_path / "a")


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_columns": some_columns(5)}, r"image_columns.mean: got shape \(5,\).* \(7,\)"),
        (
            {"text_columns": Columns(np.zeros(5), np.array([1.0, 1, 0, 1, 1]))},
            "text_columns.scale: entries must be positive",
        ),
        (
            {"text_columns": Columns(np.full(5, np.nan), np.ones(5))},
            "text_columns.mean: entries must be finite",
        ),
        (
            {"image_columns": some_columns(7), "normalize": False},
            "image_columns: .*set normalize=True",
        ),
    ],
)
def test_wrong_columns(options, message):
    with pytest.raises(ValueError, match=message):
        random_aligner(**options)


# Probability


def gaussian_world(prior):
    """Cosines of true pairs ~ N(0.4, 0.1), of others ~ N(0.1, 0.1): the posterior is known.

    log p(s | pair)/p(s | other) = (0.4 - 0.1)/0.01 s - (0.4^2 - 0.1^2)/0.02 = 30 s - 7.5
    """
    aligner = Aligner(
        2,
        2,
        2,
        layer=LayerConfig("linear", layer_norm=False),
        rngs=nnx.Rngs(0),
        scale=30.0,
        bias=-7.5 + math.log(prior / (1 - prior)),
        prior=prior,
    )
    aligner.image.linear.kernel[...] = jnp.eye(2, dtype=jnp.float32)
    aligner.text.linear.kernel[...] = jnp.eye(2, dtype=jnp.float32)
    return aligner


def density(s, mean):
    return np.exp(-((s - mean) ** 2) / (2 * 0.1**2)) / (0.1 * math.sqrt(2 * math.pi))


def texts_at(cosines):
    return np.stack([cosines, np.sqrt(1 - cosines**2)], 1).astype(np.float32)


AXIS = np.array([1.0, 0.0], np.float32)


@pytest.mark.parametrize("prior", [None, 0.5, 0.9, 1e-4])
def test_probability_is_the_posterior_of_a_gaussian_world(prior):
    aligner = gaussian_world(0.01)
    s = np.linspace(-0.3, 0.8, 45)
    share = 0.01 if prior is None else prior
    true = share * density(s, 0.4) / (share * density(s, 0.4) + (1 - share) * density(s, 0.1))
    got = aligner.predict_proba(AXIS, texts_at(s), prior=prior)
    np.testing.assert_allclose(got, true, rtol=1e-4)


@pytest.mark.parametrize("prior", [0.01, 0.3, 0.8])
def test_mean_probability_is_the_share_of_true_pairs(prior):
    s = np.linspace(-0.6, 0.999, 4001)
    weight = (prior * density(s, 0.4) + (1 - prior) * density(s, 0.1)) * (s[1] - s[0])
    proba = np.asarray(gaussian_world(0.05).predict_proba(AXIS, texts_at(s), prior=prior))
    np.testing.assert_allclose(np.sum(weight * proba), prior, rtol=1e-3)


def test_probability_without_a_prior_is_siglips():
    image, text = features()
    aligner = random_aligner(scale=4.0, bias=-1.0)
    scale, bias = math.exp(float(aligner.log_scale[...])), float(aligner.bias[...])
    cosines = np.asarray(aligner.similarity(image, text), np.float64)
    got = aligner.predict_proba(image, text)
    assert got.shape == (6, 6)
    np.testing.assert_allclose(got, 1 / (1 + np.exp(-scale * cosines - bias)), rtol=1e-5)


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_prior_outside_its_range(prior):
    image, text = features()
    with pytest.raises(ValueError, match=r"prior: .*strictly in"):
        random_aligner(prior=0.5).predict_proba(image, text, prior=prior)
    with pytest.raises(ValueError, match=r"prior: .*strictly in"):
        random_aligner(prior=prior)


def test_prior_needs_the_prior_of_training():
    image, text = features()
    with pytest.raises(ValueError, match="training_prior"):
        random_aligner().predict_proba(image, text, prior=0.5)


# Files


@pytest.mark.parametrize("name", LAYERS)
def test_save_and_load_are_bitwise(name, tmp_path):
    image, text = features()
    aligner = random_aligner(LAYERS[name], prior=1 / 300, normalize=name != "mlp")
    aligner.save(tmp_path / "made" / "aligner", {"run": "a"})
    loaded = Aligner.load(tmp_path / "made" / "aligner")
    before = nnx.to_flat_state(nnx.state(aligner))
    after = nnx.to_flat_state(nnx.state(loaded))
    assert [path for path, _ in before] == [path for path, _ in after]
    for (path, old), (_, new) in zip(before, after, strict=True):
        assert type(old) is type(new), path
        assert new[...].dtype == jnp.float32, path
        np.testing.assert_array_equal(old[...], new[...])
    assert loaded.training_prior == 1 / 300
    assert loaded.layer == LAYERS[name]
    assert loaded.normalize == (name != "mlp")
    np.testing.assert_array_equal(
        loaded.predict_proba(image, text), aligner.predict_proba(image, text)
    )
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["aligner"]


def test_loaded_aligner_can_be_trained_on(tmp_path):
    image, text = features()
    random_aligner().save(tmp_path / "aligner")
    loaded = Aligner.load(tmp_path / "aligner")
    gradient = nnx.grad(lambda model: model.similarity(image, text).sum())(loaded)
    kernel = dict(nnx.to_flat_state(gradient))["image", "linear", "kernel"]
    assert np.abs(kernel[...]).max() > 0


def test_numpy_alone_reads_a_saved_aligner(tmp_path):
    image, text = features()
    np.savez(tmp_path / "raw.npz", image=image, text=text)
    aligners = {name: random_aligner(layer, seed=3) for name, layer in LAYERS.items()}
    aligners["raw"] = random_aligner(normalize=False)
    aligners["columns"] = random_aligner(image_columns=some_columns(7))
    aligners["both"] = random_aligner(
        LAYERS["star"], image_columns=some_columns(7), text_columns=some_columns(5)
    )
    for name, aligner in aligners.items():
        aligner.save(tmp_path / name)
    reader = tmp_path / "reader.py"
    reader.write_text(NUMPY_READER)
    subprocess.run([sys.executable, str(reader), str(tmp_path), *aligners], check=True)
    for name, aligner in aligners.items():
        for embed, rows, side in (
            (aligner.embed_image, image, "image"),
            (aligner.embed_text, text, "text"),
        ):
            expected = np.load(tmp_path / f"{name}_{side}.npy")
            np.testing.assert_allclose(embed(rows), expected, atol=5e-6, err_msg=f"{name} {side}")


def test_what_the_files_say(tmp_path):
    random_aligner(prior=0.25).save(tmp_path / "a", {"note": "für mich"})
    document = json.loads((tmp_path / "a" / "aligner.json").read_text(encoding="utf-8"))
    recipe = document.pop("recipe")
    assert document == {
        "format": "sotalign_jax.aligner",
        "version": 1,
        "sotalign_jax": sotalign_jax.__version__,
        "image_dim": 7,
        "text_dim": 5,
        "dim": 4,
        "layer": {"kind": "linear", "layer_norm": True, "bias": True, "width_factor": None},
        "normalize": True,
        "training_prior": 0.25,
        "metadata": {"note": "für mich"},
    }
    assert "\n" not in recipe
    for part in ("|x|", "{side}_mean", "layer_norm.scale", "1e-05", "linear.kernel + linear.bias"):
        assert part in recipe
    tensors = safetensors.numpy.load_file(tmp_path / "a" / "aligner.safetensors")
    layer = {"layer_norm.scale", "layer_norm.bias", "linear.kernel", "linear.bias"}
    assert tensors.keys() == {
        *(f"{side}.{name}" for side in ("image", "text") for name in layer),
        *("log_scale", "bias", "image_mean", "text_mean"),
    }
    assert tensors["text.linear.kernel"].shape == (5, 4)


@pytest.mark.parametrize(
    ("name", "parts", "absent"),
    [
        ("matrix", ["x @ linear.kernel;"], ["layer_norm", "linear.bias"]),
        ("mlp", ["h = x @ hidden.kernel + hidden.bias", "erf", "h @ output.kernel"], ["gate"]),
        ("star", ["clip(x @ gate.kernel", "1000", "h = g * v"], ["layer_norm"]),
    ],
)
def test_recipe_follows_the_layer(name, parts, absent, tmp_path):
    random_aligner(LAYERS[name], normalize=False).save(tmp_path / "a")
    recipe = json.loads((tmp_path / "a" / "aligner.json").read_text())["recipe"]
    assert "x = x / |x|" not in recipe.split("{side}_mean")[0]
    for part in parts:
        assert part in recipe
    for part in absent:
        assert part not in recipe


def test_saving_again_replaces(tmp_path):
    random_aligner(seed=0).save(tmp_path / "a")
    second = random_aligner(LAYERS["mlp"], seed=1)
    second.save(tmp_path / "a")
    loaded = Aligner.load(tmp_path / "a")
    np.testing.assert_array_equal(loaded.image.hidden.kernel[...], second.image.hidden.kernel[...])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_saving_into_an_empty_directory(tmp_path):
    (tmp_path / "a").mkdir()
    random_aligner().save(tmp_path / "a")
    assert Aligner.load(tmp_path / "a").dim == 4


@pytest.mark.parametrize("dies_at", ["write", "first rename", "second rename"])
def test_a_valid_aligner_can_be_loaded_whenever_saving_dies(dies_at, tmp_path, monkeypatch):
    first, second = random_aligner(seed=0), random_aligner(seed=1)
    first.save(tmp_path / "a")
    renames = []
    rename = os.rename

    def fragile_rename(source, target):
        renames.append(target)
        if len(renames) == {"first rename": 1, "second rename": 2}.get(dies_at):
            raise KeyboardInterrupt
        rename(source, target)

    def fragile_save_file(tensors, path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fragile_rename)
        if dies_at == "write":
            patch.setattr(safetensors.numpy, "save_file", fragile_save_file)
        with pytest.raises(KeyboardInterrupt):
            second.save(tmp_path / "a")
    loaded = Aligner.load(tmp_path / "a")
    np.testing.assert_array_equal(loaded.image.linear.kernel[...], first.image.linear.kernel[...])

    second.save(tmp_path / "a")
    loaded = Aligner.load(tmp_path / "a")
    np.testing.assert_array_equal(loaded.image.linear.kernel[...], second.image.linear.kernel[...])
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_is_not_an_aligner_is_not_replaced(tmp_path):
    aligner = random_aligner()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match=r"directory: .*file"):
        aligner.save(tmp_path / "file")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"directory: .*thesis.tex"):
        aligner.save(tmp_path / "full")
    aligner.save(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"directory: .*notes.txt"):
        aligner.save(tmp_path / "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "aligner.safetensors").write_text("mine")
    with pytest.raises(ValueError, match=r"directory: .*no aligner"):
        aligner.save(tmp_path / "other")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "aligner.json").write_text('{"format": "mine"}')
    with pytest.raises(ValueError, match="not an aligner"):
        aligner.save(tmp_path / "json")
    assert (tmp_path / "json" / "aligner.json").read_text() == '{"format": "mine"}'
    assert (tmp_path / "file").read_text() == "mine"
    assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "other" / "aligner.safetensors").read_text() == "mine"


@pytest.mark.parametrize("metadata", [{"a": object()}, {"a": math.nan}])
def test_metadata_must_be_json(metadata, tmp_path):
    with pytest.raises(ValueError, match=r"metadata: .*JSON"):
        random_aligner().save(tmp_path / "a", metadata)
    assert not list(tmp_path.iterdir())


def test_a_prior_set_late_is_checked_at_saving(tmp_path):
    aligner = random_aligner()
    aligner.training_prior = 300.0
    with pytest.raises(ValueError, match="training_prior: got 300"):
        aligner.save(tmp_path / "a")


def edit_json(path, **fields):
    document = json.loads((path / "aligner.json").read_text()) | fields
    document = {name: value for name, value in document.items() if value != "DROP"}
    (path / "aligner.json").write_text(json.dumps(document))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 3}, "version 3; this package reads 1 and 2"),
        ({"version": "DROP"}, "version None"),
        ({"format": "something"}, "not an aligner"),
        ({"dim": "DROP"}, "field 'dim' is missing"),
        ({"dim": "four"}, "dim: .*positive integer"),
        ({"normalize": "yes"}, "normalize: .*'yes'"),
        ({"training_prior": 2}, "prior: got 2"),
        ({"layer": {"kind": "conv"}}, "kind: unknown layer 'conv'"),
        ({"layer": {"depth": 3}}, "depth"),
        ({"dim": 5}, r"image.linear.bias is float32 \(4,\); expected float32 \(5,\)"),
    ],
)
def test_wrong_json(fields, message, tmp_path):
    random_aligner().save(tmp_path / "a")
    edit_json(tmp_path / "a", **fields)
    with pytest.raises(ValueError, match=message):
        Aligner.load(tmp_path / "a")


def test_wrong_tensors(tmp_path):
    random_aligner().save(tmp_path / "a")
    file = tmp_path / "a" / "aligner.safetensors"
    good = safetensors.numpy.load_file(file)

    def load_with(tensors):
        safetensors.numpy.save_file(tensors, file)
        return Aligner.load(tmp_path / "a")

    without = {name: value for name, value in good.items() if name != "text_mean"}
    with pytest.raises(ValueError, match="tensors missing: text_mean"):
        load_with(without)
    with pytest.raises(ValueError, match=r"not part of this aligner: image.extra"):
        load_with(good | {"image.extra": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match=r"bias is float32 \(1,\); expected float32 \(\)"):
        load_with(good | {"bias": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match="log_scale is float64"):
        load_with(good | {"log_scale": np.zeros((), np.float64)})
    assert load_with(good).dim == 4
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"aligner.safetensors: not a readable"):
        Aligner.load(tmp_path / "a")
    file.unlink()
    with pytest.raises(ValueError, match=r"aligner.safetensors: not a readable"):
        Aligner.load(tmp_path / "a")


def test_nothing_to_load(tmp_path):
    with pytest.raises(ValueError, match=r"directory: .*holds no aligner"):
        Aligner.load(tmp_path / "absent")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "aligner.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        Aligner.load(tmp_path / "a")


# Wrong input


def test_wrong_width_of_features():
    image, text = features()
    aligner = random_aligner()
    for call, message in (
        (lambda: aligner.embed_image(text), r"image: got shape \(6, 5\); expected \(n, 7\)"),
        (lambda: aligner.embed_text(image), r"text: got shape \(6, 7\); expected \(n, 5\)"),
        (lambda: aligner.preprocess_text(image[0]), r"text: got shape \(7,\).* \(5,\)"),
        (lambda: aligner.similarity(image, image), r"text: got shape"),
        (lambda: aligner.predict_proba(text, text), r"image: got shape"),
        (lambda: aligner.embed_image(image[None]), r"image: got shape \(1, 6, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale: got 0.0; .*positive"),
        ({"scale": math.inf}, "scale: .*finite"),
        ({"bias": math.nan}, "bias: .*finite"),
        ({"normalize": 1}, "normalize: got 1"),
        ({"image_mean": np.zeros(5, np.float32)}, r"image_mean: .*\(5,\).*\(7,\)"),
        ({"text_mean": np.full(5, np.inf, np.float32)}, "text_mean: .*finite"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        random_aligner(**options)


@pytest.mark.parametrize("name", ["image_dim", "text_dim", "dim"])
def test_wrong_dimensions(name):
    sizes = {"image_dim": 7, "text_dim": 5, "dim": 4} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: got 0"):
        Aligner(**sizes, layer=LAYERS["linear"], rngs=nnx.Rngs(0))
