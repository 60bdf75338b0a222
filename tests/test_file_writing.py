"""Files are whole, the old or the new, whatever stops the writing."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from flax import nnx

from sotalign_jax import features, files
from sotalign_jax.benchmarks import klot
from sotalign_jax.files import flush_files, replace_text, replace_text_parts
from sotalign_jax.models import Aligner, LayerConfig
from sotalign_jax.training import metrics, workdir


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "a.json"
    for text in ("first\n", "für später ∅\n", ""):
        replace_text(path, text)
        assert path.read_bytes() == text.encode("utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_what_stood_there_survives_a_failure(tmp_path, monkeypatch, broken):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(files.os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_what_stood_there_survives_parts_that_cannot_be_made(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("old")

    def parts(last):
        yield "one\n"
        if last is None:
            raise ValueError("row 2")
        yield last

    with pytest.raises(ValueError, match="row 2"):
        replace_text_parts(path, parts(None))
    assert path.read_text() == "old"
    replace_text_parts(path, parts("two\n"))
    assert path.read_text() == "one\ntwo\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_what_stood_there_survives_a_kill_in_the_middle(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    code = (
        "import os, signal\n"
        "from sotalign_jax import files\n"
        "files.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"files.replace_text({str(path)!r}, 'new' * 100_000)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_contents_reach_the_disk_before_the_name_does(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace", "rename"):
        real = getattr(os, name)

        def call(*arguments, name=name, real=real):
            done.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    replace_text(tmp_path / "a.txt", "a")
    assert done == ["fsync", "replace"]

    done.clear()
    features.write_store(tmp_path / "store", np.ones((5, 2), np.float32), rows_per_shard=3)
    # Two shards and the manifest.
    assert done == ["fsync"] * 3 + ["replace"]

    done.clear()
    aligner = Aligner(3, 2, 2, layer=LayerConfig("linear"), rngs=nnx.Rngs(0))
    aligner.save(tmp_path / "aligner")
    assert done == ["fsync"] * 2 + ["rename"]

    done.clear()
    workdir.write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    metrics.MetricWriter(tmp_path / "metrics.jsonl").close()
    assert len(metrics._run_id(tmp_path)) == 16
    assert done == ["fsync", "replace"] * 3
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'


def test_the_benchmark_replaces_its_report_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("old")
    report = {"n": 7, "contenders": ["one"], "forms": []}
    monkeypatch.setattr(klot, "run", lambda n, **_: report)
    monkeypatch.setattr(klot, "_table", lambda report: str(report))
    synced = []
    monkeypatch.setattr(files.os, "fsync", synced.append)
    klot.main(["--n", "7", "--json", str(path)])
    assert json.loads(path.read_text()) == report
    assert len(synced) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_flushing_a_directory_leaves_its_files_as_they_were(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * i)
    flush_files(tmp_path)
    assert [(tmp_path / f"{i}").read_bytes() for i in range(3)] == [b"", b"\1", b"\2\2"]
