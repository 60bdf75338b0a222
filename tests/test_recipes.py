"""Recipes: the commands they print are ours, their facts those of the protocols and of TFDS."""

import importlib.util
import os
import pathlib
import pickle
import re
import shlex
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import scipy.io
from absl import flags

from sotalign_jax import main
from sotalign_jax.captions import CAPTIONS
from sotalign_jax.encoders.sources import Columns, open_source
from sotalign_jax.protocols import PROTOCOLS, read_labels
from sotalign_jax.protocols.base import KNOWN_IMAGES, KNOWN_TEXTS
from sotalign_jax.protocols.classification import CLASSIFICATION
from sotalign_jax.protocols.prompts import TEMPLATES
from sotalign_jax.recipes import RECIPES, find_recipe

# Of `sotalign encode`, which has an argument parser of its own.
ENCODE = {"images", "texts", "encoder", "out", "workers", "dtype", "rows_per_shard", "shards"}
ENCODE |= {"column"}
# The paper's encoders, and those of SUE's code: (image, text).
ENCODERS = {"sue400": ("dinov2-vitb14", "all-minilm-l6-v2")}


@pytest.mark.parametrize("name", RECIPES)
def test_commands_are_those_of_this_program(name):
    made = set()
    for command in RECIPES[name].commands:
        program, *words = shlex.split(command)
        given = dict(word[2:].split("=", 1) for word in words if word.startswith("--"))
        plain = [word for word in words if not word.startswith("--")]
        assert program == "sotalign"
        if plain[0] == "encode":
            assert set(given) <= ENCODE and len(plain) == 1
            image, text = ENCODERS.get(name, ("dinov3-vitl16", "nv-embed-v2"))
            assert given["encoder"] == (image if "images" in given else text)
            assert given["out"].startswith("features/")
        elif plain[0] == "evaluate":
            assert given["protocol"] in RECIPES[name].protocols
            # What is evaluated was encoded by a command above.
            assert {given["image"], given["text"]} <= made
        else:
            assert plain[0] == "data" and plain[0] in main.WORDS
            assert (plain[2] in CAPTIONS) if plain[1] == "captions" else (plain[2] in TEMPLATES)
            if plain[1] == "captions":
                assert pathlib.PurePath(given["annotations"]).name in CAPTIONS[plain[2]].file
        if plain[0] != "encode":
            assert set(given) <= set(flags.FLAGS)
        made.add(given.get("out"))


def test_every_protocol_has_data_and_every_table_a_recipe():
    named = [protocol for recipe in RECIPES.values() for protocol in recipe.protocols]
    assert sorted(named) == sorted(PROTOCOLS)
    for protocol in PROTOCOLS:
        assert any(f"--protocol={protocol} " in one for one in find_recipe(protocol).commands)
    used = " ".join(command for recipe in RECIPES.values() for command in recipe.commands)
    missing = [name for name in CAPTIONS if f"data captions {name} " not in used]
    assert all(re.fullmatch(r"(coco_karpathy|flickr30k)_(train|val|restval)", m) for m in missing)
    with pytest.raises(ValueError, match="data: no 'coco2017'; there are cc3m, dreamlip_cc3m, cc1"):
        find_recipe("coco2017")


def test_counts_are_those_of_the_protocols_and_of_the_tables():
    counts = {
        (name, split.name): (split.images, split.texts)
        for name, recipe in RECIPES.items()
        for split in recipe.splits
    }
    for name, key in (
        ("cc3m_train", ("cc3m", "train")),
        ("cc3m_val", ("cc3m", "validation")),
        ("cc12m", ("cc12m", "train")),
        ("coco_karpathy_test", ("coco", "Karpathy test")),
        ("coco_karpathy_train", ("coco", "Karpathy train")),
        ("flickr30k_test", ("flickr30k", "test")),
        ("winoground", ("winoground", "test")),
        ("mmvp", ("mmvp", "all")),
        ("sue400_flickr30k", ("sue400", "Flickr30k test")),
        ("sue_flickr30k", ("sue400", "Flickr30k train")),
        ("sue400_coco", ("sue400", "COCO test")),
        ("sue_coco", ("sue400", "COCO train")),
    ):
        assert counts[key] == (CAPTIONS[name].records, CAPTIONS[name].captions), name
    assert counts["wikitext103", "train"] == (None, CAPTIONS["wikitext103"].captions)
    assert CAPTIONS["wikitext103"].records == 1_801_350
    for protocol in CLASSIFICATION:
        assert RECIPES[protocol.name].splits[-1].images == protocol.images


def test_numbers_of_other_splits_that_refusals_name():
    """Each is a number of rows that a recipe has, or a sum of such."""
    splits = [split for recipe in RECIPES.values() for split in recipe.splits]
    images, texts = (
        {getattr(split, side) for split in splits} - {None} for side in ("images", "texts")
    )
    train2014, val2014 = 82_783, 5_000 + 5_000 + 30_504
    derived = {
        29_000 + 1_014 + 1_000, 31_383 + 400,  # Flickr30k as Karpathy has it, and all
        5_000 - 48,  # val2017 with objects
        train2014, val2014, train2014 + 30_504,
        3 * 25_250, 4 * 25_250,  # Food-101: 750 and 250 of each class
        50_000 + 10_000,  # CIFAR
        3_333 + 1, 3_333 + 3_334,  # Aircraft: train, trainval
        2 * 1_880, 3 * 1_880,  # DTD
        1_020, 6_149 + 2 * 1_020,  # Flowers
        12_559, 100_000,  # CC3M's and ImageNet's test splits
    }  # fmt: skip
    assert set(KNOWN_IMAGES) <= images | derived
    assert set(KNOWN_TEXTS) <= texts | {25_000, 25_014, 1_000, 12_559}
    for number, name in ((12_559, "CC3M's test"), (3_760, "DTD"), (3_334, "Aircraft's training")):
        assert name in KNOWN_IMAGES[number]


def test_a_recipe_is_found_by_its_protocols_too():
    assert find_recipe("coco_karpathy") is find_recipe("coco") is RECIPES["coco"]
    assert find_recipe("cifar100").splits[0].remark == "100 of each of 100 classes"


def prepare(name, root, files):
    """The shell's commands of a recipe, on files as its data set has them."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    # As the interpreter of these tests.
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    for command in RECIPES[name].prepare:
        subprocess.run(command, shell=True, cwd=root, check=True, env={"PATH": path})


def ids_of(name, root):
    """Ids and pictures of the images that the recipe encodes."""
    (images,) = re.findall(r"--images=(\S+)", " ".join(RECIPES[name].commands))
    source = open_source(str(root / images), "image")
    return {record.id: record for part in range(len(source.parts)) for record in source.read(part)}


def labels_of(name, root):
    (labels,) = re.findall(r"--labels=(\S+)", " ".join(RECIPES[name].commands))
    return read_labels(str(root / labels))


def test_lists_of_food_and_textures_become_tables(tmp_path):
    prepare("food101", tmp_path, {
        "food-101/meta/test.txt": "apple_pie/1011328\nwaffles/7\n",
        "food-101/images/apple_pie/1.jpg": "",
    })  # fmt: skip
    assert list(ids_of("food101", tmp_path)) == ["apple_pie/1011328", "waffles/7"]
    prepare("dtd", tmp_path, {
        "dtd/labels/test1.txt": "banded/banded_0002.jpg\nzigzagged/zigzagged_0119.jpg\n",
        "dtd/images/banded/banded_0002.jpg": "",
    })  # fmt: skip
    assert list(ids_of("dtd", tmp_path)) == ["banded/banded_0002", "zigzagged/zigzagged_0119"]
    assert (tmp_path / "dtd" / "classes.txt").read_text() == "banded\nzigzagged\n"


def test_variants_of_aircraft(tmp_path):
    data = "fgvc-aircraft-2013b/data"
    prepare("aircraft", tmp_path, {
        f"{data}/images_variant_test.txt": "1514522 707-320\n0747566 Model B200\n",
        f"{data}/images/1514522.jpg": "",
    })  # fmt: skip
    assert list(ids_of("aircraft", tmp_path)) == ["1514522", "0747566"]
    assert labels_of("aircraft", tmp_path) == {"1514522": "707-320", "0747566": "Model B200"}


def test_flowers_by_their_test_rows_with_labels_from_0(tmp_path):
    (tmp_path / "jpg").mkdir()
    scipy.io.savemat(tmp_path / "setid.mat", {"tstid": np.array([[3, 1]])})
    scipy.io.savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[77, 5, 102]])})
    prepare("flowers102", tmp_path, {})
    assert list(ids_of("flowers102", tmp_path)) == ["image_00003", "image_00001"]
    assert labels_of("flowers102", tmp_path) == {"image_00003": "101", "image_00001": "76"}


def test_labels_of_imagenet_by_its_development_kit(tmp_path):
    """Whose numbers count the synsets in an order of its own."""
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    synsets = np.array(
        [(490, "n01751748", "sea snake"), (361, "n09193705", "alp"), (1, "n02119789", "kit fox")],
        dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)],
    )
    scipy.io.savemat(kit / "meta.mat", {"synsets": synsets[:, None]})
    prepare("imagenet", tmp_path, {
        f"{kit}/ILSVRC2012_validation_ground_truth.txt": "490\n361\n1\n490\n",
    })  # fmt: skip
    assert labels_of("imagenet", tmp_path) == {
        "ILSVRC2012_val_00000001": "n01751748",
        "ILSVRC2012_val_00000002": "n09193705",
        "ILSVRC2012_val_00000003": "n02119789",
        "ILSVRC2012_val_00000004": "n01751748",
    }


def test_polyvore_is_cut_after_400_rows(tmp_path):
    folder = tmp_path / "polyvore" / "data"
    folder.mkdir(parents=True)
    for part, rows in enumerate((range(15_000), range(15_000, 20_100))):
        texts = [f"item {row}" for row in rows]
        images = [{"bytes": b"%d" % row, "path": None} for row in rows]
        table = pyarrow.table({"image": images, "category": texts, "text": texts})
        pyarrow.parquet.write_table(table, folder / f"data-{part:05d}-of-00002.parquet")
    prepare("sue400", tmp_path, {})
    for name, first, rows in (("polyvore_test", 0, 400), ("polyvore", 400, 19_600)):
        image, text = (
            list(open_source(str(tmp_path / f"{name}.parquet"), side, columns=columns).read(0))
            for side, columns in (("image", Columns()), ("text", Columns(caption="text")))
        )
        assert [one.id for one in image] == [one.id for one in text]
        assert len(image) == rows
        assert (image[0].item, text[0].item) == (b"%d" % first, f"item {first}")


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_pictures_of_cifar_lie_in_folders_of_their_classes(name, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    file, key = {
        "cifar10": ("cifar-10-batches-py/test_batch", b"labels"),
        "cifar100": ("cifar-100-python/test", b"fine_labels"),
    }[name]
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    batch = {b"data": pixels.reshape(2, 3_072), key: [9, 3], b"coarse_labels": [0, 0]}
    prepare(name, tmp_path, {file: pickle.dumps(batch)})
    found = ids_of(name, tmp_path)
    assert list(found) == ["3/00001", "9/00000"]
    shown = np.asarray(pillow.open(tmp_path / f"{name}_test" / "9" / "00000.png"))
    np.testing.assert_array_equal(shown, pixels[0].transpose(1, 2, 0))


def test_names_and_versions_are_those_of_tensorflow_datasets():
    """By the source of its builders; importing some of them needs TensorFlow."""
    spec = importlib.util.find_spec("tensorflow_datasets")
    if spec is None or spec.origin is None:
        pytest.skip("tensorflow_datasets is not installed")
    root = pathlib.Path(spec.origin).parent
    files = {
        "imagenet2012": "datasets/imagenet2012/imagenet2012_dataset_builder.py",
        "food101": "image_classification/food101.py",
        "cifar10": "image_classification/cifar.py",
        "cifar100": "image_classification/cifar.py",
        "dtd": "image_classification/dtd.py",
        "oxford_flowers102": "datasets/oxford_flowers102/oxford_flowers102_dataset_builder.py",
        "coco_captions/2014": "object_detection/coco.py",
    }
    text = " ".join(recipe.tfds for recipe in RECIPES.values())
    named = dict(re.findall(r"([\w/]+):(\d+\.\d+\.\d+)", text))
    assert named.keys() == files.keys()
    for name, version in named.items():
        source = (root / files[name]).read_text()
        assert re.search(rf"""Version\(\s*['"]{re.escape(version)}['"]""", source) or (
            f"'{version}'" in source or f'"{version}"' in source
        ), name
