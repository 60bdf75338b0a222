"""Digests of models: what they see of a change, and what they read of large files."""

import numpy as np
import pytest

from sotalign_jax.encoders import digests
from sotalign_jax.encoders.digests import digest_of_model


@pytest.fixture
def model(tmp_path):
    (tmp_path / "1_Pooling").mkdir()
    for name in ("config.json", "1_Pooling/config.json", "vocab.txt", "model.safetensors"):
        (tmp_path / name).write_bytes(name.encode() * 9)
    return tmp_path


def test_what_changes_a_digest(model):
    digest = digest_of_model(model)
    assert len(digest) == 16 and digest == digest_of_model(model)
    for name in ("README.md", ".hidden.json", "1_Pooling/note.md"):
        (model / name).write_text("more")
    (model / "checkpoint-5").mkdir()
    (model / "checkpoint-5/config.json").write_text("{}")
    assert digest_of_model(model) == digest
    for name in ("config.json", "1_Pooling/config.json", "vocab.txt", "model.safetensors"):
        before = (model / name).read_bytes()
        (model / name).write_bytes(before[:-1] + b"#")  # of the same size
        assert digest_of_model(model) != digest, name
        (model / name).write_bytes(before)
    (model / "vocab.txt").rename(model / "merges.txt")
    assert digest_of_model(model) != digest


def test_large_files_are_sampled(model, monkeypatch):
    monkeypatch.setattr(digests, "_WHOLE", 1000)
    monkeypatch.setattr(digests, "_START", 100)
    monkeypatch.setattr(digests, "_BLOCKS", 4)
    monkeypatch.setattr(digests, "_BLOCK", 10)
    assert list(digests._samples(1000)) == [(0, 1000)]
    assert list(digests._samples(1001)) == [(0, 100), (100, 10), (397, 10), (694, 10), (991, 10)]
    values = np.zeros(2000, np.uint8)
    found = set()
    for changed in (None, 0, 99, 1999, 105, 300):
        data = values.copy()
        if changed is not None:
            data[changed] = 1
        (model / "model.safetensors").write_bytes(data.tobytes())
        found.add(digest_of_model(model))
    assert len(found) == 5  # the last change falls between two blocks


def test_a_model_of_timm_in_a_directory_has_one(model):
    pytest.importorskip("torch")
    from sotalign_jax.encoders.timm_models import _files

    assert _files(f"local-dir:{model}") == {"files": digest_of_model(model)}
    assert _files("vit_tiny_patch16_224.augreg_in21k") == {}
