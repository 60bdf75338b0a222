"""Heads for PyTorch: the loader that is shown to users against the aligner itself."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sotalign_jax.fitted import asif, csa
from sotalign_jax.interop import LOADER, export_heads, head_steps
from sotalign_jax.models import Aligner, LayerConfig
from sotalign_jax.numerics import Columns
from sotalign_jax.teachers import cca, moments_of

LAYERS = {
    "linear": LayerConfig("linear"),
    "matrix": LayerConfig("linear", layer_norm=False, bias=False),
    "mlp": LayerConfig("mlp", width_factor=2),
    "star": LayerConfig("star", width_factor=3, layer_norm=False),
    "bare star": LayerConfig("star", width_factor=2, bias=False),
}


def aligner_of(layer, rng, *, normalize=True, columns=False):
    """Nothing at its initial value, so that every tensor counts."""

    def standard(dim):
        if not columns:
            return None
        return Columns(rng.normal(size=dim) * 0.1, rng.uniform(0.5, 2.0, size=dim))

    aligner = Aligner(
        6,
        9,
        4,
        layer=layer,
        normalize=normalize,
        image_mean=rng.normal(size=6).astype(np.float32) * 0.2,
        text_mean=rng.normal(size=9).astype(np.float32) * 0.2,
        image_columns=standard(6),
        text_columns=standard(9),
        rngs=nnx.Rngs(0),
        prior=0.01,
    )
    graph, params, rest = nnx.split(aligner, nnx.Param, ...)
    moved = [
        (path, variable.replace(variable[...] + rng.normal(size=variable.shape).astype(np.float32)))
        for path, variable in nnx.to_flat_state(params)
    ]
    return nnx.merge(graph, nnx.from_flat_state(moved), rest)


def numpy_head(steps, tensors, rows):
    """The steps by their definitions, in float64."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}
    x = rows.astype(np.float64)
    erf = np.vectorize(math.erf)
    for op, *names in steps:
        w = [t[name] for name in names]
        if op == "unit":
            norm = np.linalg.norm(x, axis=1, keepdims=True)
            x = x / np.where(norm > 0, norm, 1)
        elif op == "shift":
            x = x + w[0]
        elif op == "scale":
            x = x * w[0]
        elif op == "layer_norm":
            x = x - x.mean(1, keepdims=True)
            x = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * w[0] + w[1]
        elif op == "linear":
            x = x @ w[0].T + (w[1] if len(w) > 1 else 0)
        elif op == "gelu":
            x = x * (1 + erf(x / math.sqrt(2))) / 2
        elif op == "gated":
            a, b, c, d = w
            x = np.clip(x @ a.T + b, 0, 6) * np.clip(x @ c.T + d, -1000, 1000)
        else:
            raise AssertionError(op)
    return x


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_steps_are_the_aligner(name, columns):
    rng = np.random.default_rng(0)
    aligner = aligner_of(LAYERS[name], rng, columns=columns)
    for side, dim in (("image", 6), ("text", 9)):
        rows = rng.normal(size=(5, dim)).astype(np.float32) * 3
        rows[3] = 0
        steps, tensors = head_steps(aligner, side)
        assert {name for _, *names in steps for name in names} == tensors.keys()
        ours = np.asarray(getattr(aligner, f"embed_{side}")(rows))
        np.testing.assert_allclose(numpy_head(steps, tensors, rows), ours, atol=2e-5)


def test_rows_that_are_not_normalised():
    rng = np.random.default_rng(1)
    aligner = aligner_of(LAYERS["linear"], rng, normalize=False)
    rows = rng.normal(size=(5, 6)).astype(np.float32) * 3
    steps, tensors = head_steps(aligner, "image")
    assert steps[0][0] == "shift"
    np.testing.assert_allclose(
        numpy_head(steps, tensors, rows), np.asarray(aligner.embed_image(rows)), atol=2e-5
    )


def fitted_on(rng):
    image = rng.normal(size=(40, 6)).astype(np.float32)
    text = np.concatenate([image @ rng.normal(size=(6, 6)), rng.normal(size=(40, 3))], axis=1)
    return image, text.astype(np.float32)


@pytest.mark.parametrize("weights", ["correlation", "equal"])
def test_csa(weights):
    rng = np.random.default_rng(2)
    image, text = fitted_on(rng)
    aligner = csa(image, text, weights=weights)
    for side, rows in (("image", image), ("text", text)):
        steps, tensors = head_steps(aligner, side)
        ours = np.asarray(getattr(aligner, f"embed_{side}")(rows))
        np.testing.assert_allclose(numpy_head(steps, tensors, rows), ours, atol=2e-5)


def test_a_teacher():
    rng = np.random.default_rng(3)
    image, text = fitted_on(rng)
    aligner = Aligner.from_teacher(cca(moments_of([(image, text)]), dim=4))
    steps, tensors = head_steps(aligner, "text")
    ours = np.asarray(aligner.embed_text(text))
    np.testing.assert_allclose(numpy_head(steps, tensors, text), ours, atol=2e-5)


def test_what_is_no_chain_is_refused(tmp_path):
    image, text = fitted_on(np.random.default_rng(4))
    with pytest.raises(ValueError, match="aligner: asif is no chain of layers"):
        export_heads(asif(image, text), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_folder(tmp_path):
    rng = np.random.default_rng(5)
    aligner = aligner_of(LAYERS["mlp"], rng)
    folder = export_heads(aligner, tmp_path / "to" / "heads", card="# card\n", metadata={"a": [1]})
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert (config["format"], config["version"]) == ("sotalign.heads", 1)
    assert (config["image"]["dim"], config["text"]["dim"], config["dim"]) == (6, 9, 4)
    assert config["logit_scale"] == pytest.approx(float(aligner.scale))
    assert config["logit_bias"] == pytest.approx(float(aligner.bias[...]))
    assert config["training_prior"] == 0.01 and config["metadata"] == {"a": [1]}
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())
    with pytest.raises(ValueError, match=r"out: .*heads exists; give another directory"):
        export_heads(aligner, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["heads"]


@pytest.mark.parametrize("name", LAYERS)
def test_the_loader_gives_our_embeddings(name, tmp_path):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    aligner = aligner_of(LAYERS[name], rng, columns=name == "star")
    folder = export_heads(aligner, tmp_path / "heads")
    scope = {}
    exec(LOADER, scope)
    assert len([line for line in LOADER.splitlines() if line]) <= 23
    for side, dim in (("image", 6), ("text", 9)):
        head = scope["Head"](str(folder), side)
        rows = rng.normal(size=(5, dim)).astype(np.float32) * 3
        found = head(torch.from_numpy(rows))
        ours = np.asarray(getattr(aligner, f"embed_{side}")(rows))
        np.testing.assert_allclose(found.detach().numpy(), ours, atol=2e-5)
        assert all(p.requires_grad for p in head.parameters())  # it can be trained further


@pytest.mark.parametrize("normalize", [False, True])
def test_the_loader_takes_half_precision(normalize, tmp_path):
    """As features are stored; the squares of these rows add up to more than float16 holds."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(7)
    aligner = aligner_of(LAYERS["linear"], rng, normalize=normalize)
    folder = export_heads(aligner, tmp_path / "heads")
    scope = {}
    exec(LOADER, scope)
    rows = (rng.normal(size=(5, 9)) * 300).astype(np.float16)
    found = scope["Head"](str(folder), "text")(torch.from_numpy(rows))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(
        found.detach().numpy(), np.asarray(aligner.embed_text(rows)), atol=2e-5
    )


@pytest.mark.parametrize("page", ["README.md", "docs/interop.md"])
def test_pages_show_the_loader_that_is_tested(page):
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    shown = text.split("<!-- loader -->\n```python\n")[1].split("```\n<!-- /loader -->")[0]
    assert shown == LOADER
