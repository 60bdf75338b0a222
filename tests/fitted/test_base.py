"""What all fitted aligners share: names, options, files."""

import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import sotalign_jax
from sotalign_jax.fitted import FITTED, csa, fit, load, reads_unpaired
from sotalign_jax.fitted.base import FittedAligner, Options, fitted_aligner, static_field
from sotalign_jax.models import Aligner, LayerConfig

SUE = {"spectral_dim": 5, "dim": 3, "neighbours": 9, "scale_neighbour": 5, "mmd_epochs": 1}
CASES = {
    "csa": ("csa", {"folds": 2}),
    "csa equal": ("csa", {"weights": "equal", "correlations": "in_sample"}),
    "asif": ("asif", {"neighbours": 5}),
    "asif centred": ("asif", {"neighbours": 5, "power": 3, "center": "pairs"}),
    "asif dense": ("asif", {"neighbours": 0, "power": 1, "center": "unpaired"}),
    "sue": ("sue", SUE),
    "sue network": ("sue", {**SUE, "embedding": "network", "hidden": "8-5", "epochs": 2}),
}


def rows(n=30, seed=0):
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, 4))
    maps = np.random.default_rng(5).normal(size=(4, 11))
    views = (latent @ maps + 0.3 * rng.normal(size=(n, 11)) + 0.2).astype(np.float32)
    return views[:, :6], views[:, 6:]


@functools.cache
def fitted_case(case):
    name, options = CASES[case]
    return fit(name, *rows(), *rows(50, seed=1), options=options)


@pytest.mark.parametrize("case", CASES)
def test_save_and_load_are_bitwise(case, tmp_path):
    aligner, test = fitted_case(case), rows(9, seed=2)
    aligner.save(tmp_path / "made" / "aligner", {"note": "für mich"})
    loaded = load(tmp_path / "made" / "aligner")
    assert type(loaded) is type(aligner) and loaded.options == aligner.options
    assert jax.tree.structure(loaded) == jax.tree.structure(aligner)
    for one, other in zip(jax.tree.leaves(aligner), jax.tree.leaves(loaded), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(loaded.similarity(*test), aligner.similarity(*test))
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["aligner"]
    document = json.loads((tmp_path / "made" / "aligner" / "aligner.json").read_text("utf-8"))
    assert document["format"] == "sotalign_jax.fitted" and document["version"] == 1
    assert document["kind"] == CASES[case][0] == aligner.kind
    assert document["options"] == dataclasses.asdict(aligner.options)
    assert document["metadata"] == {"note": "für mich"}
    assert document["sotalign_jax"] == sotalign_jax.__version__
    assert [document[name] for name in ("image_dim", "text_dim", "dim")] == [6, 5, aligner.dim]
    assert "\n" not in document["recipe"]


def numpy_sue(t, options, side, x):
    z = (x - t[f"{side}.center"]) / t[f"{side}.scale"]
    if options["embedding"] == "nystrom":
        q = np.square(z[:, None] - t[f"{side}.landmarks"]).sum(axis=2)
        r = np.sort(q, axis=1)[:, options["neighbours"], None]
        r = r + 2e-6 * (1 + r)
        w = (q <= r) * 1.0 + (q <= t[f"{side}.radius"])
        w *= np.exp(-q / t[f"{side}.bandwidth"])
        y = w @ t[f"{side}.vectors"] / w.sum(axis=1, keepdims=True)
    else:
        h = z * np.sqrt(z.shape[1])
        for k in range(3):
            h = np.where(h > 0, h, 0.01 * h) if k else h
            h = h @ t[f"{side}.layers.{k}.weight"] + t[f"{side}.layers.{k}.bias"]
        y = np.tanh(h) @ t[f"{side}.rotation"]
    u = (y - t[f"{side}_mean"]) @ t[f"{side}_weight"]
    if side == "text":
        return u
    h = u
    for k in range(3):
        h = np.maximum(h, 0) if k else h
        h = h @ t[f"residual.{k}.weight"] + t[f"residual.{k}.bias"]
    return u + h


def numpy_reader(directory, side, raw):
    """Written from the recipes alone."""
    document = json.loads((directory / "aligner.json").read_text())
    t = safetensors.numpy.load_file(directory / "aligner.safetensors")
    t = {name: value.astype(np.float64) for name, value in t.items()}
    options = document["options"]

    def unit(x):
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    x = unit(raw.astype(np.float64))
    if document["kind"] == "csa":
        u = unit((x - t[f"{side}_mean"]) @ t[f"{side}_weight"])
        return u if options["weights"] == "equal" else u * np.sqrt(t["correlations"])
    if document["kind"] == "sue":
        return unit(numpy_sue(t, options, side, x))
    if f"{side}_mean" in t:
        x = unit(x - t[f"{side}_mean"])
    s = x @ t[f"{side}_map"]
    if f"{side}_root" in t:
        return s / np.linalg.norm(x @ t[f"{side}_root"], axis=1, keepdims=True)
    if 0 < options["neighbours"] < s.shape[1]:
        s = np.where(s >= -np.sort(-s)[:, options["neighbours"] - 1, None], s, 0)
    return unit(s ** options["power"])


@pytest.mark.parametrize("case", CASES)
def test_numpy_alone_reads_a_saved_aligner(case, tmp_path):
    aligner, (image, text) = fitted_case(case), rows(9, seed=2)
    aligner.save(tmp_path / "a")
    for side, embed, raw in (
        ("image", aligner.embed_image, image),
        ("text", aligner.embed_text, text),
    ):
        expected = numpy_reader(tmp_path / "a", side, raw)
        np.testing.assert_allclose(embed(raw), expected, atol=1e-5, err_msg=side)


@pytest.mark.parametrize("case", ["csa", "asif dense"])
def test_an_aligner_is_a_pytree_and_takes_single_rows(case):
    aligner, (image, text) = fitted_case(case), rows(9, seed=2)
    jitted = jax.jit(lambda a, r: a.embed_image(r))(aligner, image)
    np.testing.assert_allclose(jitted, aligner.embed_image(image), atol=1e-6)
    np.testing.assert_allclose(aligner.embed_text(text[0]), aligner.embed_text(text)[0], atol=1e-6)
    assert aligner.similarity(image[0], text).shape == (9,)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(aligner))
    with pytest.raises(ValueError, match=r"image: got shape \(9, 5\); expected \(n, 6\) or \(6,\)"):
        aligner.embed_image(text)


def test_embedding_multiplies_at_the_highest_precision():
    aligner, (image, _) = fitted_case("csa"), rows(9, seed=2)
    assert "HIGHEST" in str(jax.make_jaxpr(lambda r: aligner.embed_image(r))(image))


# ---- names and options


def test_every_method_is_registered_under_its_kind():
    assert list(FITTED) == sorted(FITTED)
    for name, method in FITTED.items():
        assert method.aligner.kind == name
        defaults = dataclasses.asdict(method.options())
        assert method.published.keys() <= defaults.keys() and method.grid.keys() <= defaults.keys()
        method.options(**method.published)
        for option, values in method.grid.items():
            assert len(set(values)) == len(values) > 1
            for value in values:
                method.options(**{option: value})


def test_fit_calls_the_method_and_hides_what_it_does_not_read():
    train = rows()
    by_name = fit("csa", *train, options={"folds": 3}, seed=4)
    direct = csa(*train, folds=3, seed=4)
    np.testing.assert_array_equal(by_name.correlations, direct.correlations)
    broken = np.full((5, 6), np.nan, np.float32)
    assert not reads_unpaired("csa") and reads_unpaired("asif", {"center": "unpaired"})
    np.testing.assert_array_equal(
        fit("csa", *train, broken, broken, options={"folds": 3}, seed=4).correlations,
        direct.correlations,
    )
    with pytest.raises(ValueError, match="unpaired_image: row 0 holds NaN"):
        fit("csa", *train, broken, train[1], options={"center": "unpaired"})
    for call in (lambda: fit("cas", *train), lambda: reads_unpaired("cas")):
        with pytest.raises(ValueError, match="name: got 'cas'; must be one of asif, csa, sue"):
            call()
    with pytest.raises(ValueError, match="fold: no such option; known are dim"):
        reads_unpaired("csa", {"fold": 2})


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "docs" / "fitted.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/fitted.md", "exec"), {})
    assert capsys.readouterr().out.startswith("(50, 50)\nCsaOptions(dim=0, ridge=0.001, ")


# ---- files


@dataclasses.dataclass(frozen=True)
class NestOptions(Options):
    size: int = 1


@fitted_aligner
class Nest(FittedAligner):
    """Arrays in dicts, as those of a network are."""

    kind: ClassVar[str] = "nest"
    layers: dict
    options: NestOptions = static_field()
    image_dim = text_dim = dim = 2
    unit = False
    recipe = "as it comes"

    def _embed(self, side, rows):
        return rows @ self.layers[side]["0"]["kernel"]


def test_fields_may_be_nested_dicts(tmp_path, monkeypatch):
    method = FITTED["csa"]._replace(aligner=Nest, options=NestOptions)
    monkeypatch.setitem(FITTED, "nest", method)
    kernel = jnp.arange(4.0).reshape(2, 2)
    layers = {"image": {"0": {"kernel": kernel}}, "text": {"0": {"kernel": -kernel}}}
    Nest(layers=layers, options=NestOptions()).save(tmp_path / "a")
    tensors = safetensors.numpy.load_file(tmp_path / "a" / "aligner.safetensors")
    assert set(tensors) == {"layers.image.0.kernel", "layers.text.0.kernel"}
    loaded = load(tmp_path / "a")
    np.testing.assert_array_equal(loaded.layers["text"]["0"]["kernel"], -kernel)
    np.testing.assert_array_equal(loaded.embed_image(np.eye(2)), kernel)


def test_what_is_no_fitted_aligner_is_not_replaced(tmp_path):
    aligner = fitted_case("csa")
    layers = Aligner(6, 5, 4, layer=LayerConfig("linear"), rngs=nnx.Rngs(0))
    layers.save(tmp_path / "layers")
    with pytest.raises(
        ValueError, match=r"not an aligner; its format must be 'sotalign_jax.fitted"
    ):
        aligner.save(tmp_path / "layers")
    assert Aligner.load(tmp_path / "layers").dim == 4
    with pytest.raises(ValueError, match=r"its format must be 'sotalign_jax.fitted'"):
        load(tmp_path / "layers")
    aligner.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"its format must be 'sotalign_jax.aligner'"):
        layers.save(tmp_path / "a")
    fitted_case("asif").save(tmp_path / "a")
    assert load(tmp_path / "a").kind == "asif"
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"directory: .*notes.txt"):
        aligner.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"metadata: .*JSON"):
        aligner.save(tmp_path / "b", {"a": float("nan")})
    assert {path.name for path in tmp_path.iterdir()} == {"a", "layers"}
    with pytest.raises(ValueError, match=r"directory: .*holds no aligner"):
        load(tmp_path / "none")


DROP = object()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 2}, "format version 2; this package reads 1"),
        ({"kind": "sea"}, "kind 'sea' is unknown; known are asif, csa, sue"),
        ({"kind": DROP}, "kind None is unknown"),
        ({"kind": "asif"}, "neighbours|no such option"),
        ({"options": DROP}, "field 'options' is missing"),
        ({"options": {"ridge": -1.0}}, "ridge: got -1.0; must be finite"),
        ({"options": {"ridge": "big"}}, "ridge: got 'big'; must be of type float"),
        ({"options": 3}, "aligner.json: "),
        ({"tensors": {}}, "tensors not part of this aligner: correlations"),
        ({"tensors": [3]}, "aligner.json: "),
        ({"dim": 4}, "dim is 4, but the tensors have 5"),
        ({"image_dim": DROP}, "field 'image_dim' is missing"),
    ],
)
def test_wrong_json(fields, message, tmp_path):
    fitted_case("csa").save(tmp_path / "a")
    file = tmp_path / "a" / "aligner.json"
    document = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in document.items() if v is not DROP}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a")


def test_wrong_tensors(tmp_path):
    fitted_case("csa").save(tmp_path / "a")
    file, json_file = (tmp_path / "a" / f"aligner.{end}" for end in ("safetensors", "json"))
    good, document = safetensors.numpy.load_file(file), json.loads(json_file.read_text())

    def load_with(tensors, *, said=False):
        shapes = {name: value.shape for name, value in tensors.items()} if said else None
        json_file.write_text(json.dumps(document | ({"tensors": shapes} if said else {})))
        safetensors.numpy.save_file(tensors, file)
        return load(tmp_path / "a")

    without = {name: value for name, value in good.items() if name != "text_mean"}
    with pytest.raises(ValueError, match=r"tensors missing: text_mean"):
        load_with(without)
    with pytest.raises(ValueError, match=r"aligner.json: tensors missing: text_mean"):
        load_with(without, said=True)
    with pytest.raises(ValueError, match=r"aligner.json: tensors not part of this aligner: more"):
        load_with(good | {"more": np.zeros(2, np.float32)}, said=True)
    with pytest.raises(ValueError, match=r"text_mean is float32 \(4,\); expected float32 \(5,\)"):
        load_with(good | {"text_mean": np.zeros(4, np.float32)})
    with pytest.raises(ValueError, match="text_mean is float64"):
        load_with(good | {"text_mean": np.zeros(5)})
    assert load_with(good).kind == "csa"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"aligner.safetensors: not a readable"):
        load(tmp_path / "a")


def test_every_method_and_its_options_are_documented():
    home = Path(__file__).parents[2]
    text = (home / "docs" / "fitted.md").read_text(encoding="utf-8")
    default = (home / "configs" / "default.py").read_text(encoding="utf-8")
    for name, method in FITTED.items():
        (section,) = re.findall(rf"^## {name}: .*?(?=^## )", text, re.MULTILINE | re.DOTALL)
        # Options have rows of a table; a few are told in words, and the grid names no further ones.
        words, _, grid = section.partition("\nGrid: ")
        for field in dataclasses.fields(method.options):
            assert f"`{field.name}`" in words, f"{name}.{field.name}"
        assert grid, name
        assert re.search(rf"#.*\b{name} \(", default), name
