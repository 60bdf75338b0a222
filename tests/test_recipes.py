"""Recipes: the commands they print are ours, their facts those of the protocols and of TFDS."""

import importlib.util
import pathlib
import re
import shlex

import pytest
from absl import flags

from sotalign_jax import main
from sotalign_jax.captions import CAPTIONS
from sotalign_jax.protocols import PROTOCOLS
from sotalign_jax.protocols.prompts import TEMPLATES
from sotalign_jax.recipes import RECIPES, find_recipe

# Of `sotalign encode`, which has an argument parser of its own.
ENCODE = {"images", "texts", "encoder", "out", "workers", "dtype", "rows_per_shard", "shards"}


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
            assert given["encoder"] == ("dinov3-vitl16" if "images" in given else "nv-embed-v2")
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
    assert sorted(named) == sorted(set(PROTOCOLS) - {"sue400"})
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
    ):
        assert counts[key] == (CAPTIONS[name].records, CAPTIONS[name].captions), name
    of_sets = [split.images for split in RECIPES["classification"].splits]
    names = RECIPES["classification"].protocols
    assert of_sets == [PROTOCOLS[name].images for name in names]
    assert counts[("imagenet", "validation")][0] == PROTOCOLS["imagenet"].images


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
