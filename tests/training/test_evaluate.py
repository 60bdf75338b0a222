"""Retrieval and embeddings of aligners of every kind, from tables of raw features."""

import json
import sys

import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from sotalign_jax import commands, features
from sotalign_jax.evaluation import retrieval_of_scores
from sotalign_jax.features import FeatureTable, Pairs
from sotalign_jax.fitted import fit
from sotalign_jax.models import Aligner, LayerConfig
from sotalign_jax.training import embed_rows, evaluate

N, DX, DY = 40, 6, 5
QUIET = Console(quiet=True)


def rows(n, seed):
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, 4))
    maps = np.random.default_rng(9).normal(size=(4, DX + DY))
    views = (latent @ maps + 0.3 * rng.normal(size=(n, DX + DY)) + 0.4).astype(np.float32)
    return views[:, :DX], views[:, DX:]


ALIGNERS = {
    "layers": lambda: Aligner(DX, DY, 4, layer=LayerConfig("linear"), rngs=nnx.Rngs(0)),
    "csa": lambda: fit("csa", *rows(N, 0)),
    "asif": lambda: fit("asif", *rows(N, 0), options={"neighbours": 6}),
}


@pytest.fixture(scope="module")
def held_out():
    """Thirteen images with 21 texts."""
    image, text = rows(21, 1)
    owner = np.r_[np.arange(13), [3, 3, 3, 0, 12, 7, 7, 1]]
    image, text = FeatureTable.from_array(image[:13]), FeatureTable.from_array(text)
    return Pairs(image, text, owner)


@pytest.mark.parametrize("kind", ALIGNERS)
def test_retrieval_is_by_the_aligners_own_similarity(kind, held_out):
    aligner = ALIGNERS[kind]()
    scores = np.asarray(aligner.similarity(held_out.image.array(), held_out.text.array()))
    expected = retrieval_of_scores(
        lambda i: scores[i], lambda t: scores.T[t], 13, 21, text_to_image=held_out.text_to_image
    )
    seen = []
    got = evaluate(aligner, held_out, progress=seen.append)
    assert got == pytest.approx(expected, abs=1e-12)
    assert sum(seen) == 13 + 21


def test_the_weights_of_csa_are_not_normalised_away(held_out):
    aligner = ALIGNERS["csa"]()
    image = embed_rows(aligner, "image", held_out.image)
    lengths = np.linalg.norm(image, axis=1)
    assert lengths.max() < 1 and np.ptp(lengths) > 0.02
    np.testing.assert_allclose(image, aligner.embed_image(held_out.image.array()), atol=1e-6)


@pytest.mark.parametrize("kind", ["layers", "asif"])
def test_wide_embeddings_are_made_by_blocks(kind, held_out, monkeypatch):
    aligner = ALIGNERS[kind]()
    whole = evaluate(aligner, held_out)
    module = sys.modules["sotalign_jax.training.evaluate"]  # its name is also a function's
    monkeypatch.setattr(module, "_HELD_VALUES", 34 * aligner.dim - 1)
    monkeypatch.setattr(module, "_CHUNK_VALUES", 5 * aligner.dim)
    shapes = []
    real = module._embed
    monkeypatch.setattr(
        module, "_embed", lambda *given: shapes.append(given[-1].shape[0]) or real(*given)
    )
    seen = []
    assert evaluate(aligner, held_out, progress=seen.append) == pytest.approx(whole, abs=1e-12)
    assert set(shapes) == {5}
    assert sum(seen) == 13 + 21 and max(seen) <= 5


@pytest.mark.parametrize("kind", ["csa", "asif"])
def test_commands_take_a_fitted_aligner(kind, held_out, tmp_path):
    aligner = ALIGNERS[kind]()
    aligner.save(tmp_path / "run" / "aligner", {"note": "fitted"})
    image, text = rows(15, 1)
    for side, table in (("image", image), ("text", text)):
        np.save(tmp_path / f"{side}.npy", table)
    paths = str(tmp_path / "image.npy"), str(tmp_path / "text.npy")
    owner = np.arange(15)
    pairs = Pairs(FeatureTable.from_array(image), FeatureTable.from_array(text), owner)
    scores = commands.evaluate(str(tmp_path / "run"), *paths, console=QUIET)
    assert scores == evaluate(aligner, pairs)
    stores = commands.embed(str(tmp_path / "run"), *paths, str(tmp_path / "out"), console=QUIET)
    for store, rows_of, embed in zip(
        stores, (image, text), (aligner.embed_image, aligner.embed_text), strict=True
    ):
        table = features.open_features(str(store))
        np.testing.assert_allclose(table.array(), embed(rows_of), atol=1e-6)
        assert table.manifest.normalized == (kind == "asif")
    commands.inspect([str(tmp_path / "run" / "aligner")], console=QUIET)
    with pytest.raises(ValueError, match=r"image: .* has 5 columns, but the aligner takes 6"):
        commands.evaluate(str(tmp_path / "run"), paths[1], paths[1], console=QUIET)


def test_a_saved_aligner_of_no_known_format_is_refused(tmp_path):
    (tmp_path / "aligner").mkdir()
    file = tmp_path / "aligner" / "aligner.json"
    for document in ({"format": "mine"}, ["mine"]):
        file.write_text(json.dumps(document))
        with pytest.raises(ValueError, match="not an aligner; its format must be"):
            commands.load_aligner(str(tmp_path))
