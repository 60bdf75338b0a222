"""Zero-shot classification from tables: ensembling by the head, labels by their rule, refusals."""

import dataclasses
from csv import field_size_limit

import numpy as np
import pytest
from flax import nnx
from identity import identity, table

from sotalign_jax import fitted
from sotalign_jax.features import FeatureTable
from sotalign_jax.models import Aligner, LayerConfig
from sotalign_jax.protocols import PROTOCOLS, prompts, read_labels

DTD, IMAGENET, AIRCRAFT = (PROTOCOLS[name] for name in ("dtd", "imagenet", "aircraft"))
NAMES = ["cat", "Sea Lion", "dog"]
SMALL = dataclasses.replace(DTD, images=12, classes=3)  # of 8 templates
KEYS = [key for key, _ in prompts("dtd", NAMES)]


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(12, 6)).astype(np.float32)
    texts = (rng.normal(size=(24, 5)) * rng.uniform(0.5, 20, size=(24, 1))).astype(np.float32)
    labels = np.arange(12) % 3
    folders = [f"{['cat', 'sea_lion', 'dog'][label]}/{row}" for row, label in enumerate(labels)]
    return images, texts, labels, folders


def expected_metrics(image, prompt_rows, labels, unit):
    """From embeddings, in float64."""
    image, prompt_rows = np.asarray(image, np.float64), np.asarray(prompt_rows, np.float64)
    if unit:
        prompt_rows = prompt_rows / np.linalg.norm(prompt_rows, axis=1, keepdims=True)
    classes = prompt_rows.reshape(3, 8, -1).mean(axis=1)
    if unit:
        classes /= np.linalg.norm(classes, axis=1, keepdims=True)
    right = np.argmax(image @ classes.T, axis=1) == labels
    recalls = [right[labels == index].mean() for index in range(3)]
    return {"top@1": right.mean(), "mean_per_class_recall": np.mean(recalls)}


@pytest.mark.parametrize("kind", ["layers", "csa"])
def test_prompts_are_averaged_behind_the_text_head(kind, world):
    _, texts, _, _ = world
    images = np.random.default_rng(8).normal(size=(240, 6)).astype(np.float32)
    labels = np.arange(240) % 3
    folders = [f"{['cat', 'sea_lion', 'dog'][label]}/{row}" for row, label in enumerate(labels)]
    if kind == "layers":
        aligner = Aligner(
            6, 5, 4, layer=LayerConfig("linear"), rngs=nnx.Rngs(3), text_mean=np.full(5, 0.2)
        )
    else:
        rng = np.random.default_rng(5)
        latent = rng.normal(size=(60, 3))
        aligner = fitted.fit(
            "csa",
            (latent @ rng.normal(size=(3, 6)) + rng.normal(size=(60, 6))).astype(np.float32),
            (latent @ rng.normal(size=(3, 5)) + rng.normal(size=(60, 5))).astype(np.float32),
        )
    mixed = np.random.default_rng(1).permutation(24)
    metrics = dataclasses.replace(SMALL, images=240).run(
        aligner,
        FeatureTable.from_array(images, ids=folders),
        FeatureTable.from_array(texts[mixed], ids=[KEYS[row] for row in mixed]),
    )["metrics"]
    embedded = aligner.embed_image(images), aligner.embed_text(texts)
    expected = expected_metrics(*embedded, labels, unit=kind == "layers")
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert expected != expected_metrics(*embedded, labels, unit=kind != "layers")
    assert 0 < metrics["top@1"] < 1 and metrics["n_images"] == 240 and metrics["n_classes"] == 3
    assert "top@5" not in metrics


def test_numbers_by_hand_of_classes_of_different_size():
    """Images of 2, 1 and 3; the prompts of the first two classes are the same, so that they tie."""
    ids = ["cat/0", "cat/1", "sea_lion/2", "dog/3", "dog/4", "dog/5"]
    x, y, z = np.eye(3, dtype=np.float32)
    image = FeatureTable.from_array([x, y, x, y, x, z], ids=ids)
    text = FeatureTable.from_array(np.repeat([x, x, y], 8, axis=0), ids=KEYS)
    protocol = dataclasses.replace(SMALL, images=6)
    # Right: cat/0, the first of two that tie, and dog/3. Of z all tie, and the first is taken.
    assert protocol.run(identity(3), image, text)["metrics"] == pytest.approx(
        {
            "top@1": 2 / 6,
            "mean_per_class_recall": (1 / 2 + 0 + 1 / 3) / 3,
            "n_images": 6.0,
            "n_classes": 3.0,
        }
    )


def test_averaging_features_before_the_head_is_something_else(world):
    _, texts, _, _ = world
    aligner = Aligner(
        6, 5, 4, layer=LayerConfig("linear"), rngs=nnx.Rngs(3), text_mean=np.full(5, 0.2)
    )
    after = np.asarray(aligner.embed_text(texts)).reshape(3, 8, -1).mean(axis=1)
    after /= np.linalg.norm(after, axis=1, keepdims=True)
    before = np.asarray(aligner.embed_text(texts.reshape(3, 8, -1).mean(axis=1)))
    assert np.abs(after - before).max() > 0.05


def run(ids, labels=None, protocol=SMALL):
    """Images that are the unit vectors of their class, with prompts that are as well."""
    rows = np.eye(3, dtype=np.float32)
    image = FeatureTable.from_array(rows[np.arange(12) % 3], ids=ids, name="I")
    text = FeatureTable.from_array(np.repeat(rows, 8, axis=0), ids=KEYS, name="T")
    options = {} if labels is None else {"labels": labels}
    return protocol.run(identity(3), image, text, **options)["metrics"]["top@1"]


def test_a_label_is_a_name_or_a_number_or_a_wordnet_id():
    flat = [f"image-{row}" for row in range(12)]
    for words in (("cat", "sea_lion", "dog"), ("Cat", "Sea lion", "DOG"), ("0", "1", "2"),
                  ("n00000003", "n01440764", "n99999999")):  # fmt: skip
        folders = [f"{words[row % 3]}/deep/{row}" for row in range(12)]
        assert run(folders) == 1
        assert run(flat, {name: words[row % 3] for row, name in enumerate(flat)}) == 1
    turned = [f"{(row + 1) % 3}/{row}" for row in range(12)]
    assert run(turned) == 0
    # A file of labels comes before folders, and may know more images.
    assert run(turned, {name: str(row % 3) for row, name in enumerate(turned)} | {"x": "9"}) == 1


def test_labels_are_read_from_csv_and_json_lines(tmp_path):
    csv, lines = tmp_path / "labels.csv", tmp_path / "labels.jsonl"
    csv.write_text('\ufeffid,label,split\n"a,b",cat,test\nc,dog,test\n', encoding="utf-8")
    lines.write_text('{"id": "a,b", "label": "cat"}\n{"id": "c", "label": 3}\n')
    assert read_labels(str(csv)) == {"a,b": "cat", "c": "dog"}
    assert read_labels(str(lines)) == {"a,b": "cat", "c": "3"}
    for file, text, message in (
        (csv, "name,label\na,b\n", "labels.csv: row 1 has no id or no label"),
        (csv, "id,label\n", "labels.csv: no labels in it"),
        (csv, "id,label\na,b\na,c\n", "labels.csv: 'a' has labels 'b', 'c'"),
        (csv, "id,label\na\n", "labels.csv: row 1 has no id or no label"),
        (lines, '{"id": "a"}\n', "labels.jsonl: row 1 has no id or no label"),
        (lines, "[1]\n", "labels.jsonl: row 1 has no id or no label"),
        (lines, '{"id": "a", "label": 1}\nx\n', "labels.jsonl:2: not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_labels(str(file))
    for file in (csv, lines):
        file.write_bytes(b"id,label\n\xff\xfe,1\n")
        with pytest.raises(
            ValueError, match=f"labels: .*{file.name}: not CSV or JSON lines in UTF"
        ):
            read_labels(str(file))
    csv.write_text("id,label\n" + "x" * 2_000 + ",1\n")
    limit = field_size_limit(1_000)
    try:
        with pytest.raises(ValueError, match=r"labels: .*csv: not CSV .* \(field larger than"):
            read_labels(str(csv))
    finally:
        field_size_limit(limit)
    with pytest.raises(ValueError, match=r"none\.csv: no such file"):
        read_labels(str(tmp_path / "none.csv"))


FOLDERS = [f"{['cat', 'sea_lion', 'dog'][row % 3]}/{row}" for row in range(12)]
EXPECTED = "dtd: expected 12 images of 3 classes and 24 prompts (8 a class) "


@pytest.mark.parametrize(
    ("image", "text", "labels", "found"),
    [
        (FOLDERS[:11], KEYS, None, "found 11 images in I"),
        ([*FOLDERS[:11], FOLDERS[0]], KEYS, None,
         "but 1 (first: 'cat/0') of image ids in I occur more than once; each must be there once"),
        ([*FOLDERS[:11], "flat"], KEYS, None,
         "but 1 (first: 'flat') of image ids in I name no folder; give --labels=FILE with id and "
         "label, or ids CLASS/NAME"),
        (FOLDERS, KEYS, {"cat/0": "cat"},
         "but 11 (first: 'sea_lion/1') of image ids in I have no label; labels are of ids as "
         "'cat/0'"),
        (FOLDERS, KEYS, {}, "but 12 (first: 'cat/0') of image ids in I have no label"),
        ([*FOLDERS[:11], "bird/1"], KEYS, None,
         "but 1 (first: 'bird') of the labels are not among the classes; a label is a class's "
         "number or its name, as 'cat'"),
        ([f"cat/{row}" for row in range(12)], KEYS, None,
         "but no image of I is of class 1 (sea_lion)"),
        ([f"{1 + row % 3}/{row}" for row in range(12)], KEYS, None,
         "found labels 1 to 3; they start at 1; numbers of classes go from 0 to 2"),
        ([f"n0000000{row % 2}/{row}" for row in range(12)], KEYS, None,
         "found 2 WordNet ids among the labels"),
        (FOLDERS, KEYS[:23], None,
         "found 7 prompts of class 2 in T, numbered up to 6; write them anew by `sotalign data "
         "prompts`"),
        (FOLDERS, [*KEYS[:23], "2-dog/8"], None,
         "found 8 prompts of class 2 in T, numbered up to 8; write them anew by `sotalign data "
         "prompts`"),
        (FOLDERS, KEYS[:16], None,
         "found prompts of 2 classes, 0 to 1, in T; write them anew by `sotalign data prompts`"),
        (FOLDERS, [*KEYS[:23], KEYS[0]], None,
         "but 1 (first: '0-cat/0') of text ids in T occur more than once; each must be there once"),
        (FOLDERS, [*KEYS[:23], "dog"], None,
         "but in T id 'dog' is not INDEX-NAME/TEMPLATE, as in '1-goldfish/79'; write the prompts "
         "by `sotalign data prompts` and encode that file"),
        (FOLDERS, [key.replace("dog", "cat") for key in KEYS], None,
         "but two classes are called 'cat'; give numbers or WordNet ids"),
    ],
)  # fmt: skip
def test_other_rows_are_refused(image, text, labels, found):
    if "two classes" in found:
        image = [name.replace("dog", "cat") for name in image]
    with pytest.raises(ValueError) as caught:
        SMALL.select(table(image, "I"), table(text, "T"), labels=labels)
    assert str(caught.value) == f"{EXPECTED}({DTD.split}), {found}"


def test_counts_of_the_real_splits():
    counts = {
        "imagenet": (50_000, 1_000, 80), "food101": (25_250, 101, 1), "cifar10": (10_000, 10, 18),
        "cifar100": (10_000, 100, 18), "aircraft": (3_333, 100, 2), "dtd": (1_880, 47, 8),
        "flowers102": (6_149, 102, 1),
    }  # fmt: skip
    for name, expected in counts.items():
        protocol = PROTOCOLS[name]
        assert (protocol.images, protocol.classes, protocol.templates) == expected
    keys = [key for key, _ in prompts("aircraft", [f"{i} x" for i in range(100)])]
    ids = [f"{row % 100}/{row}" for row in range(6_667)]
    with pytest.raises(ValueError) as caught:
        AIRCRAFT.select(table(ids, "I"), table(keys, "T"))
    assert str(caught.value) == (
        "aircraft: expected 3,333 images of 100 classes and 200 prompts (2 a class) (test split, "
        "the 100 variants), found 6,667 images in I; FGVC-Aircraft's trainval split has as many"
    )
    assert len(AIRCRAFT.select(table(ids[:3_333], "I"), table(keys, "T")).more[1]) == 3_333


def test_imagenet_by_wordnet_ids_at_its_full_size():
    """50,000 images and 80,000 prompts are selected in no time, classes by order of WordNet ids."""
    wordnet = [f"n{1_000_000 + 37 * index:08d}" for index in range(1_000)]
    of_row = np.random.default_rng(0).permutation(np.arange(50_000) % 1_000)
    ids = [f"{wordnet[index]}/{row}" for row, index in enumerate(of_row)]
    keys = [key for key, _ in prompts("imagenet", ["sunglasses"] * 1_000)]
    rows = IMAGENET.select(table(ids, "I"), table(keys, "T"))
    owner, labels = rows.more
    assert labels.tolist() == of_row.tolist()
    assert owner.tolist() == [row // 80 for row in range(80_000)]


def test_labels_in_the_order_of_the_development_kit_are_refused():
    """The first validation image is a sea snake: class 65 by WordNet ids, 490 of 1,000 there."""
    ids = [f"ILSVRC2012_val_{row + 1:08d}" for row in range(50_000)]
    first = [65, 970, 230, 809]
    right = [*first, *((np.arange(50_000 - 4)) % 1_000).tolist()]
    keys = [key for key, _ in prompts("imagenet", ["sunglasses"] * 1_000)]
    images, texts = table(ids, "I"), table(keys, "T")

    def select(numbers):
        given = {name: str(number) for name, number in zip(ids, numbers, strict=True)}
        return IMAGENET.select(images, texts, labels=given)

    assert select(right).more[1].tolist() == right
    expected = f"imagenet: expected {IMAGENET.expected} ({IMAGENET.split}), "
    for numbers, found in (
        ([490, *right[1:]],
         "but image 'ILSVRC2012_val_00000001' in I has label 490 and is of class 65; "),
        ([*right[:3], 808, *right[4:]],
         "but image 'ILSVRC2012_val_00000004' in I has label 808 and is of class 809; "),
        ([number + 1 for number in right],
         "found labels 1 to 1000; they start at 1; numbers of classes go from 0 to 999; "),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            select(numbers)
        assert str(caught.value) == (
            f"{expected}{found}classes are in the order of their WordNet ids, the development kit "
            "numbers them in another: label by WordNet ids"
        )
