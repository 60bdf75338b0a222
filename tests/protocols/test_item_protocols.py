"""Winoground and MMVP from tables of features."""

import dataclasses

import numpy as np
import pytest
from identity import from_scores, identity, table

from sotalign_jax import fitted
from sotalign_jax.features import FeatureTable
from sotalign_jax.protocols import PROTOCOLS

WINOGROUND, MMVP = PROTOCOLS["winoground"], PROTOCOLS["mmvp"]
SMALL = dataclasses.replace(WINOGROUND, items=3)

# Images and captions 0/0, 0/1, 1/0, ...; what belongs to other items is as high as can be and must
# not matter.
SCORES = np.full((6, 6), 0.35)
SCORES[0:2, 0:2] = [[0.3, 0.1], [0.0, 0.2]]  # text, image and group right
SCORES[2:4, 2:4] = [[0.2, 0.1], [0.25, 0.3]]  # text right; caption 1/0 prefers image 1/1
SCORES[4:6, 4:6] = [[0.2, 0.2], [0.1, 0.3]]  # a tie of image 2/0; captions find their images
IDS = [f"{item}/{part}" for item in range(3) for part in (0, 1)]


def test_numbers_by_hand_in_any_order_of_rows():
    image, text = from_scores(SCORES, IDS, IDS)
    expected = {"text_score": 2 / 3, "image_score": 2 / 3, "group_score": 1 / 3, "n_items": 3.0}
    result = SMALL.run(identity(12), image, text)
    assert result["metrics"] == pytest.approx(expected)
    mixed = np.random.default_rng(0).permutation(6)
    again = SMALL.run(identity(12), image.select(mixed), text.select(mixed[::-1]))
    assert again["metrics"] == result["metrics"]
    assert result["published"][0]["label"] == "chance"


def test_an_aligner_that_gives_all_images_one_embedding_scores_nothing():
    image, text = from_scores(SCORES, IDS, IDS)
    same = FeatureTable.from_array(np.ones((6, 12), np.float32), ids=IDS)
    assert SMALL.run(identity(12), same, text)["metrics"]["image_score"] == 0
    assert SMALL.run(identity(12), image, same)["metrics"]["text_score"] == 0


def test_patterns_are_by_the_order_of_the_pairs():
    protocol = dataclasses.replace(MMVP, items=3, patterns=("first", "second", "third"))
    metrics = protocol.run(identity(12), *from_scores(SCORES, IDS, IDS))["metrics"]
    assert metrics == pytest.approx(
        {
            "accuracy": 2 / 3,
            "pattern/first": 1.0,
            "pattern/second": 0.0,
            "pattern/third": 1.0,
            "n_items": 3.0,
        }
    )
    assert MMVP.items == 9 * 15
    # In the order of the published script.
    assert [name.split()[0] for name in MMVP.patterns] == [
        "Orientation", "Presence", "State", "Quantity", "Positional", "Color", "Structural",
        "Texts", "Viewpoint",
    ]  # fmt: skip


def test_weighted_embeddings_are_not_scaled_to_unit_length():
    rng = np.random.default_rng(1)
    views = (rng.normal(size=(46, 4)) @ rng.normal(size=(4, 11))).astype(np.float32)
    views += 0.5 * rng.normal(size=views.shape).astype(np.float32)
    aligner = fitted.fit("csa", views[:40, :6], views[:40, 6:])
    image = FeatureTable.from_array(views[40:, :6], ids=IDS)
    text = FeatureTable.from_array(views[40:, 6:], ids=IDS)
    scores = np.asarray(aligner.similarity(image.array(), text.array()))
    own = [scores[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] for i in range(3)]
    by_text = [s[0, 0] > s[0, 1] and s[1, 1] > s[1, 0] for s in own]
    by_image = [s[0, 0] > s[1, 0] and s[1, 1] > s[0, 1] for s in own]
    metrics = SMALL.run(aligner, image, text)["metrics"]
    assert metrics["text_score"] == pytest.approx(np.mean(by_text))
    assert metrics["image_score"] == pytest.approx(np.mean(by_image))


FULL = [f"{item}/{part}" for item in range(400) for part in (0, 1)]


@pytest.mark.parametrize(
    ("protocol", "image", "text", "found"),
    [
        (WINOGROUND, FULL[:-2], FULL, "found 798 images in I"),
        (WINOGROUND, FULL, FULL[:400], "found 400 texts in T"),
        (WINOGROUND, FULL, [*FULL[:-1], "0/0"],
         "but 1 (first: '0/0') of text ids in T occur more than once; each must be there once"),
        (WINOGROUND, [f"{i}" for i in range(800)], FULL,
         "but 800 (first: '0/0') of image ids are not in I; ids must be ITEM/0 and ITEM/1, ITEM "
         "from 0 to 399: caption ITEM/k belongs to image ITEM/k; it has '0'"),
        (MMVP, FULL, FULL, "found 800 images in I"),
    ],
)  # fmt: skip
def test_other_rows_are_refused(protocol, image, text, found):
    with pytest.raises(ValueError) as caught:
        protocol.select(table(image, "I"), table(text, "T"))
    expected = f"{protocol.name}: expected {protocol.expected} ({protocol.split}), {found}"
    assert str(caught.value) == expected


def test_items_are_named_in_the_refusal():
    assert WINOGROUND.expected == "400 items of two images and two texts"
    without = FeatureTable.from_array(np.ones((800, 2), np.float32), name="I")
    with pytest.raises(ValueError, match="winoground: I has no ids; image ids must be ITEM/0 and"):
        WINOGROUND.select(without, table(FULL, "T"))
