"""Heads of SAIL's layout: a forward pass of their own definition against what is read."""

import math

import numpy as np
import pytest
import safetensors.numpy

from sotalign_jax.interop import read_sail_heads
from sotalign_jax.models import Aligner


def checkpoint(kind, rng, *, dims=(6, 9), dim=4, hidden=(12, 18)):
    """Random tensors under the names that SAIL's modules have."""
    found = {"logit_scale": np.float32([math.log(17.0)]), "logit_bias": np.float32([-7.0])}

    def dense(name, d_in, d_out):
        found[f"{name}.weight"] = rng.normal(size=(d_out, d_in)).astype(np.float32)
        found[f"{name}.bias"] = rng.normal(size=d_out).astype(np.float32)

    for side, d_in, width in zip(("vision", "text"), dims, hidden, strict=True):
        found[f"{side}_layer_norm.weight"] = rng.normal(size=d_in).astype(np.float32)
        found[f"{side}_layer_norm.bias"] = rng.normal(size=d_in).astype(np.float32)
        name = f"{side}_mapping_network"
        if kind == "linear":
            dense(name, d_in, dim)
        elif kind == "mlp":
            dense(f"{name}.proj.0", d_in, width)
            dense(f"{name}.proj.2", width, dim)
        else:
            dense(f"{name}.f1", d_in, width)
            dense(f"{name}.f2", d_in, width)
            dense(f"{name}.g", width, dim)
    return found


def forward(kind, tensors, side, rows):
    """SAIL's head in float64, with the final length of 1 that its loss gives it."""
    t = {name: value.astype(np.float64) for name, value in tensors.items()}

    def dense(x, name):
        name = f"{side}_mapping_network{name}"
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    x = rows.astype(np.float64)
    x = x - x.mean(1, keepdims=True)
    x = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
    x = x * t[f"{side}_layer_norm.weight"] + t[f"{side}_layer_norm.bias"]
    if kind == "linear":
        x = dense(x, "")
    elif kind == "mlp":
        h = dense(x, ".proj.0")
        x = dense(h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2, ".proj.2")
    else:
        gate = np.clip(np.clip(dense(x, ".f1"), -1e3, 1e3), 0, 6)
        x = dense(gate * np.clip(dense(x, ".f2"), -1e3, 1e3), ".g")
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def saved(tensors, path):
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, path
    )
    return path


@pytest.mark.parametrize("kind", ["linear", "mlp", "star"])
def test_embeddings_and_logits_are_theirs(kind, tmp_path):
    rng = np.random.default_rng(0)
    tensors = checkpoint(kind, rng)
    aligner = read_sail_heads(saved(tensors, tmp_path / "head.safetensors"))
    image, text = rng.normal(size=(5, 6)) * 2, rng.normal(size=(7, 9)) * 2
    image, text = image.astype(np.float32), text.astype(np.float32)
    theirs = [forward(kind, tensors, *side) for side in (("vision", image), ("text", text))]
    np.testing.assert_allclose(aligner.embed_image(image), theirs[0], atol=2e-5)
    np.testing.assert_allclose(aligner.embed_text(text), theirs[1], atol=2e-5)
    logits = 17.0 * theirs[0] @ theirs[1].T - 7.0
    np.testing.assert_allclose(
        aligner.predict_proba(image, text), 1 / (1 + np.exp(-logits)), rtol=1e-3, atol=1e-7
    )
    assert aligner.training_prior is None


@pytest.mark.parametrize("wrap", ["bare", "state_dict", "module."])
def test_pytorch_files(wrap, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = checkpoint("linear", np.random.default_rng(1))
    state = {name: torch.from_numpy(value) for name, value in tensors.items()}
    if wrap == "module.":
        state = {f"module.{name}": value for name, value in state.items()}
    torch.save({"state_dict": state} if wrap == "state_dict" else state, tmp_path / "head.pt")
    one = read_sail_heads(tmp_path / "head.pt")
    other = read_sail_heads(saved(tensors, tmp_path / "head.safetensors"))
    rows = np.random.default_rng(2).normal(size=(3, 6)).astype(np.float32)
    np.testing.assert_array_equal(one.embed_image(rows), other.embed_image(rows))


@pytest.mark.parametrize("prefix", ["vlhead.", "module.vlhead."])
def test_names_of_a_whole_model_in_a_safetensors_file(prefix, tmp_path):
    tensors = checkpoint("mlp", np.random.default_rng(1))
    one = read_sail_heads(
        saved({f"{prefix}{k}": v for k, v in tensors.items()}, tmp_path / "whole.safetensors")
    )
    other = read_sail_heads(saved(tensors, tmp_path / "head.safetensors"))
    rows = np.random.default_rng(2).normal(size=(3, 6)).astype(np.float32)
    np.testing.assert_array_equal(one.embed_image(rows), other.embed_image(rows))


def broken(change):
    tensors = checkpoint("star", np.random.default_rng(3))
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("logit_bias"), "logit_bias: missing"),
        (lambda t: t.pop("text_layer_norm.bias"), r"text_layer_norm\.bias: missing"),
        (
            lambda t: t.update(
                {f"vision_model.{i}": np.zeros(2, np.float32) for i in range(1_000)}
            ),
            r"head.safetensors: 1000 tensors that we have no place for: vision_model\.0, "
            r"vision_model\.1, vision_model\.10, vision_model\.100 \.\.\.; save the two layer",
        ),
        (lambda t: t.pop("vision_mapping_network.f1.weight"), "is none of linear, mlp, star"),
        (
            lambda t: t.update({"vision_mapping_network.g.bias": np.zeros(3, np.float32)}),
            r"image\.output\.bias has shape \(3,\); \(4,\) would fit",
        ),
        (
            lambda t: t["vision_mapping_network.f2.bias"].fill(np.nan),
            r"image\.value\.bias is not finite",
        ),
        (lambda t: t.update(logit_scale=np.zeros(2, np.float32)), "must be one number"),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("vision")],
            "no vision_mapping_network; not SAIL heads",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_sail_heads(saved(broken(change), tmp_path / "head.safetensors"))


@pytest.mark.parametrize("kind", ["mlp", "star"])
def test_hidden_layers_of_one_width(kind, tmp_path):
    """Of both sides, though their inputs differ: neither is a multiple that the other has."""
    rng = np.random.default_rng(4)
    tensors = checkpoint(kind, rng, hidden=(10, 10))
    aligner = read_sail_heads(saved(tensors, tmp_path / "head.safetensors"))
    aligner.save(tmp_path / "aligner")
    again = Aligner.load(tmp_path / "aligner")
    for side, width in (("vision", 6), ("text", 9)):
        rows = rng.normal(size=(5, width)).astype(np.float32)
        expected = forward(kind, tensors, side, rows)
        for one in (aligner, again):
            embed = one.embed_image if side == "vision" else one.embed_text
            np.testing.assert_allclose(embed(rows), expected, atol=2e-5)


def test_hidden_widths_that_have_nothing_in_common(tmp_path):
    tensors = checkpoint("mlp", np.random.default_rng(4), hidden=(12, 20))
    with pytest.raises(ValueError, match="neither the same number nor the same multiple"):
        read_sail_heads(saved(tensors, tmp_path / "head.safetensors"))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_sail_heads(tmp_path / "head.pt")
    (tmp_path / "head.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_sail_heads(tmp_path / "head.safetensors")
    pytest.importorskip("torch")
    (tmp_path / "head.pt").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="not a checkpoint of tensors"):
        read_sail_heads(tmp_path / "head.pt")
