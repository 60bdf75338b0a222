"""Each protocol by name: its counts, its refusal of others, and numbers by hand on a tiny case."""

import dataclasses

import numpy as np
import pytest
from identity import from_scores, identity, table

from sotalign_jax.features import FeatureTable
from sotalign_jax.protocols import PROTOCOLS, prompts
from sotalign_jax.protocols.classification import ClassificationProtocol
from sotalign_jax.protocols.compositional import ItemProtocol

# As their sources count them.
COUNTS = {
    "coco_val2017": "5,000 images and 25,000 texts",
    "coco_karpathy": "5,000 images and 25,010 texts",
    "flickr30k": "1,000 images and 5,000 texts",
    "cc3m_val": "up to 15,840 images and 15,840 texts",
    "sue400": "400 images and 400 texts",
    "winoground": "400 items of two images and two texts",
    "mmvp": "135 items of two images and two texts",
    "imagenet": "50,000 images of 1,000 classes and 80,000 prompts (80 a class)",
    "food101": "25,250 images of 101 classes and 101 prompts (1 a class)",
    "cifar10": "10,000 images of 10 classes and 180 prompts (18 a class)",
    "cifar100": "10,000 images of 100 classes and 1,800 prompts (18 a class)",
    "aircraft": "3,333 images of 100 classes and 200 prompts (2 a class)",
    "dtd": "1,880 images of 47 classes and 376 prompts (8 a class)",
    "flowers102": "6,149 images of 102 classes and 102 prompts (1 a class)",
}


def test_all_are_here():
    assert set(COUNTS) == set(PROTOCOLS)


@pytest.mark.parametrize("name", COUNTS)
def test_another_number_of_rows_is_refused_with_what_was_expected(name):
    protocol = PROTOCOLS[name]
    rows = 15_841 if name == "cc3m_val" else 7  # of which a few may be missing
    ids = [f"{row}" for row in range(rows)]
    texts = ids
    if isinstance(protocol, ClassificationProtocol):  # else prompts are what is wrong
        texts = [key for key, _ in prompts(name, [f"class {k}" for k in range(protocol.classes)])]
    with pytest.raises(ValueError) as caught:
        protocol.run(identity(2), table(ids, "mine"), table(texts, "mine too"))
    said = str(caught.value)
    assert said.startswith(f"{name}: expected {COUNTS[name]} ({protocol.split}), found {rows:,} ")
    assert "images in mine" in said


# Two images; a's and b's first and second captions, and a third of a.
SCORES = np.array(
    [
        # a0   a1    b0    b1    a2
        [0.30, 0.10, 0.25, 0.20, 0.40],
        [0.10, 0.35, 0.30, 0.10, 0.45],
    ]
)
OWNERS = ["a", "a", "b", "b", "a"]
# Without a2, which is above all: a0 and b0 find their images, a1 and b1 do not; a finds a0, b a1.
FIRST_TWO = {"t2i/recall@1": 2 / 4, "i2t/recall@1": 1 / 2, "n_texts": 4.0}
# One caption each: a0 and b0 find theirs, and so do a and b.
ONE = {"t2i/recall@1": 1.0, "i2t/recall@1": 1.0, "foscttm": 0.0, "n_texts": 2.0}
RETRIEVAL = {
    "coco_val2017": ({"texts": 4, "captions": 2}, [0, 1, 2, 3, 4], FIRST_TWO),
    "flickr30k": ({"texts": 4, "captions": 2}, [0, 1, 2, 3], FIRST_TWO),
    # With a2, which finds b; of a its own a2 is the best, of b too.
    "coco_karpathy": (
        {"texts": 5},
        [0, 1, 2, 3, 4],
        {"t2i/recall@1": 2 / 5, "i2t/recall@1": 1 / 2, "n_texts": 5.0},
    ),
    "cc3m_val": ({"texts": 3, "images": 3}, [0, 2], ONE),
    "sue400": ({"texts": 2}, [0, 2], ONE),
}


@pytest.mark.parametrize("name", RETRIEVAL)
def test_retrieval_by_hand(name):
    counts, columns, expected = RETRIEVAL[name]
    protocol = dataclasses.replace(PROTOCOLS[name], **{"images": 2, "members": ()} | counts)
    image, text = from_scores(SCORES[:, columns], ["a", "b"], [OWNERS[k] for k in columns])
    metrics = protocol.run(identity(2 + len(columns)), image, text)["metrics"]
    assert {key: metrics[key] for key in expected} == pytest.approx(expected)
    mean = (expected["t2i/recall@1"] + expected["i2t/recall@1"]) / 2
    assert metrics["mean_recall@1"] == pytest.approx(mean) and metrics["n_images"] == 2


# Images and captions 0/0, 0/1, 1/0, 1/1: the first item is right in all ways; in the second caption
# 1/1 scores higher with image 1/0, and image 1/0 with caption 1/1.
ITEMS = np.full((4, 4), 0.4)
ITEMS[0:2, 0:2] = [[0.3, 0.1], [0.0, 0.2]]
ITEMS[2:4, 2:4] = [[0.2, 0.3], [0.1, 0.2]]


@pytest.mark.parametrize("name", [n for n, p in PROTOCOLS.items() if isinstance(p, ItemProtocol)])
def test_items_by_hand(name):
    ids = ["0/0", "0/1", "1/0", "1/1"]
    small = {"items": 2} | ({"patterns": ("one", "two")} if name == "mmvp" else {})
    protocol = dataclasses.replace(PROTOCOLS[name], **small)
    metrics = protocol.run(identity(8), *from_scores(ITEMS, ids, ids))["metrics"]
    expected = (
        {"accuracy": 1 / 2, "pattern/one": 1.0, "pattern/two": 0.0}
        if name == "mmvp"
        else {"text_score": 1 / 2, "image_score": 1 / 2, "group_score": 1 / 2}
    )
    assert metrics == pytest.approx(expected | {"n_items": 2.0})


@pytest.mark.parametrize(
    "name", [n for n, p in PROTOCOLS.items() if isinstance(p, ClassificationProtocol)]
)
def test_classes_by_hand(name):
    """Of three classes the second has two images, one of which looks like the first."""
    x, y, z = np.eye(3, dtype=np.float32)
    protocol = dataclasses.replace(PROTOCOLS[name], images=4, classes=3, known={})
    keys = [key for key, _ in prompts(name, ["cat", "dog", "owl"])]
    assert len(keys) == 3 * protocol.templates
    image = FeatureTable.from_array([x, y, x, z], ids=["cat/0", "dog/0", "dog/1", "owl/0"])
    text = FeatureTable.from_array(np.repeat([x, y, z], protocol.templates, axis=0), ids=keys)
    metrics = protocol.run(identity(3), image, text)["metrics"]
    expected = {"top@1": 3 / 4, "mean_per_class_recall": (1 + 1 / 2 + 1) / 3}
    assert metrics == pytest.approx(expected | {"n_images": 4.0, "n_classes": 3.0})
