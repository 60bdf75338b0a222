"""``sotalign encode``: its flags, what it says, and the commands of its documentation."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tiny_encoder import encoder, png

from sotalign_jax import encode_commands, features, main

DOCUMENT = Path(__file__).parents[2] / "docs/encode.md"


@pytest.fixture
def here(here, monkeypatch, tmp_path):
    """The command in this process and in an empty directory: (exit status, output, errors)."""
    monkeypatch.chdir(tmp_path)
    return here


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(), re.M | re.S)


def prepare(root):
    """The files that the documentation speaks of."""
    (root / "my_encoder.py").write_text(blocks("python")[0])
    for folder in ("photos", "archives", "hub/data"):
        (root / folder).mkdir(parents=True)
    shop = []
    for n in range(5):
        (root / f"photos/{n}.png").write_bytes(png(n))
        titles = [f"title {n}", f"other {n}"]
        shop.append({"sku": n, "file": f"photos/{n}.png", "about": {"titles": titles}})
    (root / "captions.csv").write_text(
        "image,caption\n" + "".join(f"{n}.png,caption {n}\n" for n in range(5))
    )
    (root / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in shop))
    table = pa.table({"text": ["a", "b"]})
    for split in ("train", "test"):
        pa.parquet.write_table(table, root / f"hub/data/{split}-00000-of-00001.parquet")
    for n in range(2):
        with tarfile.open(root / f"archives/data-{n:04d}.tar", "w") as archive:
            info = tarfile.TarInfo(f"{n}.png")
            info.size = len(png(n))
            archive.addfile(info, io.BytesIO(png(n)))


def test_the_commands_of_the_documentation(here, tmp_path):
    prepare(tmp_path)
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert len(lines) == 9
    said = {}
    for line in lines:
        command, *words = shlex.split(line)
        assert command == "sotalign"
        fast = ["--workers=0"] if words[0] == "encode" else []
        status, out, err = here(*words, *fast)
        assert (status, err) == (0, ""), err
        said[words[-1].rpartition("/")[2] + words[-3][-3:]] = out
    pairs = features.pair(
        features.open_features("features/image"), features.open_features("features/text")
    )
    assert len(pairs.image) == len(pairs.text) == 5
    pairs = features.pair(
        features.open_features("features/shop_image"), features.open_features("features/shop_text")
    )
    np.testing.assert_array_equal(pairs.text_to_image, np.arange(10) // 2)
    assert "1 parts are left, 4 rows so far; the same command goes on" in said["parts0:2"]
    assert "5 text rows, 256 columns, 0 items left out: features/parts" in said["parts2:3"]
    assert len(features.open_features("features/archives")) == 2
    assert not list((tmp_path / "features").glob(".*"))
    exec(blocks("python")[1], {})
    assert features.open_store("features/by_hand").shape == (5, 256)


def test_what_was_left_out_is_said(here, tmp_path):
    (tmp_path / "my_encoder.py").write_text(blocks("python")[0])
    (tmp_path / "t.txt").write_text("one\n\n\ntwo\n")
    words = ["encode", "--texts=t.txt", "--encoder=my_encoder:text", "--out=o", "--workers=0"]
    for _ in range(2):  # what is there already is said again
        status, out, err = here(*words, "--dtype=float32", "--licence=CC0")
        assert status == 0 and err == ""
        assert "2 text rows, 256 columns, 2 items left out: o" in out
        assert "left out: 2 empty caption" in out and "o.skipped.jsonl" in out
        assert "WARNING: 50.0% of the items were left out" in out
    assert features.open_store("o").manifest.licence == "CC0"
    status, out, err = here(*words)
    assert status == 2 and "dtype is 'float32' there and 'float16' now" in err


def test_named_encoders_get_options_and_texts_in_groups(here, tmp_path, monkeypatch):
    given = []

    def load_encoder(name, modality, *, batch_size=1, pooling="cls"):
        given.append((name, modality, batch_size, pooling))
        return encoder(modality)

    towers = types.SimpleNamespace(load_encoder=load_encoder)
    monkeypatch.setitem(sys.modules, "sotalign_jax.encoders.towers", towers)
    (tmp_path / "t.txt").write_text("one\n")
    words = ["encode", "--texts=t.txt", "--encoder=some/model", "--workers=0", "--batch_size=8"]
    status, _, err = here(*words, "--out=o", "--option=poling=mean")
    assert status == 2 and "--option: there is no 'poling'; there are batch_size, pooling" in err
    status, _, err = here(*words, "--out=o", "--option=pooling=mean")
    assert (status, err) == (0, "")
    here(*words, "--out=p", "--option=batch_size=3")
    assert given == [("some/model", "text", 8, "mean"), ("some/model", "text", 3, "cls")]
    settings = json.loads((tmp_path / "o.encode.json").read_text())["settings"]
    assert settings["batch_size"] == 8 * 16


def test_a_host_of_a_tpu_is_by_itself_before_an_encoder_is_read(here, tmp_path, monkeypatch):
    calls = []

    def load(*_):
        calls.append("load")
        return encoder("text"), 1

    monkeypatch.setattr(encode_commands, "use_own_host", lambda: calls.append("own host"))
    monkeypatch.setattr(encode_commands, "load", load)
    (tmp_path / "t.txt").write_text("one\n")
    words = ["--texts=t.txt", "--encoder=some/model", "--out=o", "--workers=0"]
    assert here("encode", *words)[0] == 0 and calls == ["own host", "load"]


def test_it_ends_as_interrupted(here, tmp_path, monkeypatch):
    (tmp_path / "my_encoder.py").write_text(blocks("python")[0])
    (tmp_path / "t.txt").write_text("one\n")
    for error, expected in (
        (encode_commands.Interrupted("stopped by SIGTERM; the same command goes on"), 75),
        (KeyboardInterrupt(), 130),
    ):

        def stop(*_, error=error, **__):
            raise error

        monkeypatch.setattr(encode_commands, "extract", stop)
        words = ["--texts=t.txt", "--encoder=my_encoder:text", "--out=o"]
        status, out, _ = here("encode", *words)
        assert status == expected and "the same command goes on" in out


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "--images, --texts: give one of them"),
        (["--images=a", "--texts=b"], "--images, --texts: give one of them"),
        (["--texts=t.txt"], "--out: this command needs it"),
        (["--texts=t.txt", "--out=o"], "--encoder: this command needs it"),
        (["--texts=u.txt", "--out=o", "--encoder=e:f"], "u.txt: no such file or directory"),
        (["--texts=t.txt", "--out=o", "--encoder=e:f"], "encoder: e cannot be imported"),
        (["--texts=t.txt", "--out=o", "--encoder=e:f", "--shards=2"], "--shards: must be a:b"),
        (
            ["--texts=t.txt", "--out=o", "--encoder=e:f", "--column=x:y"],
            "--column: must be id:NAME",
        ),
        (
            ["--texts=t.txt", "--out=o", "--encoder=e:f", "--option=x"],
            "--option: must be NAME=VALUE",
        ),
        (["--texts=t.txt", "--out=o", "--encoder=e:f", "--kind=xls"], "flag --kind=xls"),
        (["--texts=t.txt", "--out=o", "--encoder=e:f", "--workers=a"], "flag --workers=a"),
        (["t.txt"], "t.txt: unexpected; flags are written --name=value"),
    ],
)
def test_words_that_are_refused(here, tmp_path, words, message):
    (tmp_path / "t.txt").write_text("one\n")
    status, _, err = here("encode", *words)
    assert status == 2 and message in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["t.txt"]


def test_what_can_be_known_is_said_before_an_encoder_is_read(here, tmp_path, monkeypatch):
    def load(*_):
        raise AssertionError("an encoder is read")

    monkeypatch.setattr(encode_commands, "load", load)
    (tmp_path / "t.txt").write_text("one\n")
    (tmp_path / "there").mkdir()
    (tmp_path / "o.captions.jsonl").write_text("mine")
    words = ["encode", "--texts=t.txt", "--encoder=nv-embed-v2"]
    for more, message in (
        (["--out=p", "--shards=0:2"], "shards: 0:2 is no range of the 1 parts"),
        (["--out=p", "--workers=-1"], "workers must not be negative"),
        (["--out=p", "--batch_size=0"], "batch_size must be at least 1"),
        (["--out=p", "--background=0,0,0"], "--background: is of images"),
        (["--out=there"], "there exists; give another out"),
        (["--out=o"], "o.captions.jsonl exists and would be replaced"),
        (["--out=gs://bucket/o"], "is not a name for a new directory"),
    ):
        status, _, err = here(*words, *more)
        assert status == 2 and message in err, err


def test_a_log_says_how_fast_a_long_part_is(here, tmp_path, monkeypatch):
    (tmp_path / "my_encoder.py").write_text(blocks("python")[0])
    (tmp_path / "t.jsonl").write_text('{"caption": ["one", "two", "three"]}\n')
    words = ["encode", "--texts=t.jsonl", "--encoder=my_encoder:text", "--workers=0"]
    for seconds, lines in ((60.0, 1), (0.0, 3)):
        monkeypatch.setattr(encode_commands, "_SECONDS_A_LINE", seconds)
        status, out, _ = here(*words, "--batch_size=1", f"--out=o{lines}")
        assert status == 0 and len(re.findall(r"parts 0/1  rows/s [\d,]+$", out, re.M)) == lines
        assert len(re.findall(r"parts 1/1  rows/s", out)) == 1


def test_a_packaged_encoder_that_is_none(here, tmp_path):
    (tmp_path / "t.txt").write_text("one\n")
    status, _, err = here("encode", "--texts=t.txt", "--encoder=packaged:minilm", "--out=o")
    assert status == 2 and "none of the packaged text encoders: packaged:all-minilm-l6-v2" in err


@pytest.mark.slow
def test_workers_find_a_module_of_the_working_directory(tmp_path):
    """As the console script starts, which does not look there by itself."""
    (tmp_path / "own.py").write_text(
        "import numpy\n"
        "from sotalign_jax.encoders import Description\n"
        "class Pre:\n"
        "    def __call__(self, item):\n"
        "        return {'n': numpy.array(len(item))}\n"
        "class Own:\n"
        "    description = Description('own', 'text', '', True)\n"
        "    preprocess = Pre()\n"
        "    def encode(self, batch):\n"
        "        return numpy.array([[one['n']] for one in batch], numpy.float32)\n"
    )
    (tmp_path / "t.txt").write_text("one\nthree\n")
    words = ["encode", "--texts=t.txt", "--encoder=own:Own", "--out=o", "--workers=1"]
    root = Path(main.__file__).parents[1]
    subprocess.run(
        [sys.executable, "-P", "-m", "sotalign_jax", *words],
        check=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert features.open_store(tmp_path / "o").array().tolist() == [[3], [5]]
