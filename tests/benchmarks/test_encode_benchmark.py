"""The benchmark of encoding: a tiny model, all ways, the same rows."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "encoders"))

import tiny_models

from sotalign_jax.benchmarks import encode
from sotalign_jax.encoders.sources import open_source

WAYS = [way for way in encode.WAYS if way == "loop" or way in tiny_models.BACKENDS]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tiny_models.library(tmp_path_factory)("bert")
    (folder / "modules.json").write_text(
        json.dumps([{"type": "a.Transformer", "path": ""}, {"type": "a.Pooling", "path": "1"}])
    )
    (folder / "1").mkdir()
    (folder / "1/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    return folder


def test_all_ways_give_the_same_rows(model, tmp_path, capsys):
    texts = tmp_path / "captions.txt"
    texts.write_text("".join(f"a {'cat ' * (n % 9)}on mat {n}\n" for n in range(40)))
    options = [f"--encoder={model}", f"--texts={texts}", "--batch_size=4", "--workers=0"]
    encode.main([*options, f"--ways={','.join(WAYS)}", f"--json={tmp_path / 'report.json'}"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == 40 and list(report["seconds"]) == WAYS
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert report["cosine"]["loop"] == pytest.approx(1)
    assert all(0.99999 < value < 1.00001 for value in report["cosine"].values())
    shown = capsys.readouterr().out
    assert "40 texts" in shown and all(way in shown for way in WAYS)


def test_the_embedded_captions(tmp_path):
    encode.write_captions(tmp_path / "captions.jsonl")
    source = open_source(tmp_path / "captions.jsonl", "text")
    found = list(source.read(0))
    assert len(found) > 6_000 and all(not record.reason for record in found)


def test_refusals(model, tmp_path, capsys):
    texts = tmp_path / "captions.txt"
    texts.write_text("a cat\n")
    for arguments, message in (
        ([f"--texts={texts}", f"--encoder={model}", "--ways=loop,jax"], "there is no 'jax'"),
        ([f"--texts={tmp_path / 'none.txt'}"], "none.txt"),
        ([f"--texts={texts}", f"--json={tmp_path / 'no' / 'a.json'}"], "--json: there is no direc"),
    ):
        with pytest.raises(SystemExit):
            encode.main(arguments)
        assert message in capsys.readouterr().err
