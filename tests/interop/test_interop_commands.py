"""``sotalign export`` and ``import-sail``, on runs that were trained."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from rich.console import Console
from test_sail import checkpoint, forward, saved
from tiny_runs import tiny

from sotalign_jax import commands, interop_commands
from sotalign_jax.features import open_features, write_store
from sotalign_jax.interop import head_steps
from sotalign_jax.models import Aligner

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    commands.train(tiny(objective="sail", seed=3), str(workdir), QUIET)
    return workdir


def test_a_run_for_pytorch(run, tmp_path):
    interop_commands.export_model(str(run), str(tmp_path / "heads"), QUIET)
    tensors = safetensors.numpy.load_file(tmp_path / "heads" / "model.safetensors")
    config = json.loads((tmp_path / "heads" / "config.json").read_text())
    aligner = Aligner.load(run / "aligner")
    for side in ("image", "text"):
        steps, own = head_steps(aligner, side)
        assert config[side]["steps"] == [list(step) for step in steps]
        for name, value in own.items():
            np.testing.assert_array_equal(tensors[name], value)
    recorded = json.loads((run / "aligner" / "aligner.json").read_text())["metadata"]
    assert config["metadata"]["features"] == recorded["features"]
    assert recorded["features"]["image"]["dim"] == aligner.image_dim
    card = (tmp_path / "heads" / "README.md").read_text()
    assert "# heads" in card and "- seed: 3" in card and "objective = " in card
    results = json.loads((run / "results.json").read_text())
    assert f"{100 * results['test']['mean_recall@10']:.1f}" in card
    with pytest.raises(ValueError, match=r"out: .* exists"):
        interop_commands.export_model(str(run), str(tmp_path / "heads"), QUIET)


def test_a_card_does_not_tell_where_things_lay(run, tmp_path):
    """Cards are passed on: of absolute paths the last part is left."""
    document = json.loads((run / "aligner" / "aligner.json").read_text())
    metadata = document["metadata"]
    metadata["data"] = "/home/me/features/image with /home/me/features/text, unpaired rows aligned"
    metadata["features"]["image"]["source"] = "/home/me/My Photos"
    metadata["features"]["text"]["source"] = "tables/captions.csv"
    metadata["config"]["data"]["files"]["image"] = "/home/me/features/image"
    (tmp_path / "aligner").mkdir()
    (tmp_path / "aligner" / "aligner.json").write_text(json.dumps(document))
    shutil.copy(run / "aligner" / "aligner.safetensors", tmp_path / "aligner")
    interop_commands.export_model(str(tmp_path), str(tmp_path / "heads"), QUIET)
    for name in ("README.md", "config.json"):
        text = (tmp_path / "heads" / name).read_text()
        assert "/home" not in text and "My Photos" in text and "tables/captions.csv" in text
        assert "…/image with …/text, unpaired rows aligned" in text


def test_the_teacher_of_a_run(run, tmp_path):
    interop_commands.export_model(str(run / "teacher"), str(tmp_path / "heads"), QUIET)
    card = (tmp_path / "heads" / "README.md").read_text()
    assert "- method: the linear teacher alone, cca\n" in card


def test_what_was_exported_can_be_inspected(run, tmp_path, capsys):
    interop_commands.export_model(str(run), str(tmp_path / "heads"), QUIET)
    commands.inspect([str(tmp_path / "heads")], Console(width=200))
    shown = capsys.readouterr().out
    assert "sotalign.heads" in shown and "layer_norm" in shown and "logit_scale" in shown
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match=r"other: config\.json is of no run; give features, an"):
        commands.inspect([str(tmp_path / "other")], QUIET)


def test_embeddings_of_the_test_pairs(run, tmp_path):
    interop_commands.export_embeddings(str(run), str(tmp_path / "index"), console=QUIET)
    commands.embed(str(run), out=str(tmp_path / "stores"), console=QUIET)
    for side in ("image", "text"):
        ours = open_features(tmp_path / "index", modality=side).array()
        theirs = open_features(tmp_path / "stores" / side).array()
        np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_embeddings_of_images_with_several_captions(run, tmp_path):
    rng = np.random.default_rng(0)
    aligner = Aligner.load(run / "aligner")
    image = rng.normal(size=(3, aligner.image_dim)).astype(np.float32)
    text = rng.normal(size=(5, aligner.text_dim)).astype(np.float32)
    owner = [0, 0, 1, 2, 2]
    write_store(tmp_path / "image", image, ids=["a", "b", "c"], dtype="float32")
    write_store(tmp_path / "text", text, ids=["abc"[i] for i in owner], dtype="float32")
    lines = [json.dumps(f"caption {i}") + "\n" for i in range(5)]
    (tmp_path / "text.captions.jsonl").write_text("".join(lines))
    given = (str(tmp_path / "image"), str(tmp_path / "text"))
    interop_commands.export_embeddings(str(run), str(tmp_path / "index"), *given, console=QUIET)
    found = open_features(tmp_path / "index", modality="image")
    np.testing.assert_allclose(found.array(), aligner.embed_image(image)[owner, :], atol=1e-3)
    assert found.ids.tolist() == ["a", "a", "b", "c", "c"]
    import pyarrow.parquet

    metadata = pyarrow.parquet.read_table(tmp_path / "index" / "metadata" / "metadata_0.parquet")
    assert metadata["caption"].to_pylist() == [f"caption {i}" for i in range(5)]


def test_another_width_is_told_before_rows_are_read(run, tmp_path):
    """By rows that could not be used if they were."""
    aligner = Aligner.load(run / "aligner")
    np.save(tmp_path / "image.npy", np.full((3, aligner.image_dim), np.nan, np.float32))
    np.save(tmp_path / "text.npy", np.zeros((3, aligner.text_dim + 1), np.float32))
    given = str(tmp_path / "image.npy"), str(tmp_path / "text.npy")
    message = f"text: .* has {aligner.text_dim + 1} columns, but the aligner takes"
    with pytest.raises(ValueError, match=message):
        interop_commands.export_embeddings(str(run), str(tmp_path / "a"), *given, console=QUIET)
    with pytest.raises(ValueError, match=message):
        commands.evaluate(str(run), *given, console=QUIET)


def test_heads_of_sail_become_an_aligner(tmp_path):
    tensors = checkpoint("star", np.random.default_rng(1))
    path = saved(tensors, tmp_path / "head.safetensors")
    interop_commands.import_sail(str(path), str(tmp_path / "aligner"), QUIET)
    rows = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float32)
    aligner = commands.load_aligner(str(tmp_path / "aligner"))
    np.testing.assert_allclose(
        aligner.embed_image(rows), forward("star", tensors, "vision", rows), atol=2e-5
    )
    interop_commands.export_model(str(tmp_path / "aligner"), str(tmp_path / "heads"), QUIET)
    card = (tmp_path / "heads" / "README.md").read_text()
    assert "- method: not recorded" in card
