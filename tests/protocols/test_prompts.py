"""Templates, class names and ids of prompts."""

import ast
import hashlib
import importlib.util
import json
import pathlib

import pytest

from sotalign_jax.protocols import PROTOCOLS, class_names, prompts, templates
from sotalign_jax.protocols.prompts import CLASSES, TEMPLATES, slug, split_prompt_ids


def installed(package, file):
    """A file of another package, which is not imported; skips where it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return pathlib.Path(spec.origin).parent / file


def test_there_are_as_many_as_people_count():
    assert TEMPLATES == {
        "imagenet": 80, "food101": 1, "cifar10": 18, "cifar100": 18, "aircraft": 2, "dtd": 8,
        "flowers102": 1,
    }  # fmt: skip
    for name, count in TEMPLATES.items():
        found = templates(name)
        assert len(set(found)) == count and all(text.count("{}") == 1 for text in found)
        protocol = PROTOCOLS[name]
        assert (protocol.templates, protocol.classes) == (count, CLASSES[name])
    with pytest.raises(ValueError, match="no data set 'pets'; there are imagenet, food101"):
        templates("pets")


def test_templates_of_imagenet_are_those_of_open_clip():
    """Read from its source: importing it needs PyTorch and more."""
    tree = ast.parse(installed("open_clip", "zero_shot_metadata.py").read_text())
    (assigned,) = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "OPENAI_IMAGENET_TEMPLATES"
    ]
    theirs = []
    for function in assigned.value.elts:
        parts = function.body.values  # of an f-string
        theirs.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in parts))
    assert templates("imagenet") == theirs


def test_templates_are_those_of_clip_benchmark():
    file = installed("clip_benchmark", "datasets/en_zeroshot_classification_templates.json")
    theirs = json.loads(file.read_text())
    names = {"imagenet": "imagenet1k", "aircraft": "fgvc_aircraft", "flowers102": "flowers"}
    for name in TEMPLATES:
        found = [text.replace("{c}", "{}") for text in theirs[names.get(name, name)]]
        assert templates(name) == found, name


def digest(lines):
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_templates_and_names_stay_as_they_were_found_to_be():
    """Digests taken when the two tests above passed, for where these packages are missing."""
    assert {name: digest(templates(name)) for name in TEMPLATES} == {
        "imagenet": "4f976686fb651bb5",
        "food101": "77a79bac7d9cf25b",
        "cifar10": "9bbf912e1144ca4c",
        "cifar100": "9bbf912e1144ca4c",
        "aircraft": "91522de75ad44711",
        "dtd": "1f6888d2130f62a4",
        "flowers102": "bfcd4bbb214d5015",
    }
    assert templates("food101") == ["a photo of {}, a type of food."]
    assert templates("flowers102") == ["a photo of a {}, a type of flower."]
    assert templates("imagenet")[0] == "a bad photo of a {}."
    assert digest(class_names("cifar100")[0]) == "60ae3a3ac1355fcf"


def test_curated_names_of_imagenet_from_open_clip():
    installed("open_clip", "zero_shot_metadata.py")
    names, source = class_names("imagenet")
    assert source == "open_clip"
    assert len(names) == 1_000 and len(set(names)) == 998
    assert names[0] == "tench" and names[1] == "goldfish" and names[999] == "toilet paper"


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("food101", "apple pie", "waffles"),
        ("dtd", "banded", "zigzagged"),
        ("flowers102", "pink primrose", "blackberry lily"),
    ],
)
def test_names_from_tensorflow_datasets(name, first, last):
    installed("tensorflow_datasets", "__init__.py")
    names, source = class_names(name)
    assert source in ("tensorflow_datasets", "clip_benchmark")
    assert (names[0], names[-1], len(names)) == (first, last, CLASSES[name])


def test_names_of_cifar_are_at_hand():
    names, source = class_names("cifar10")
    assert " ".join(names) == "airplane automobile bird cat deer dog frog horse ship truck"
    fine, _ = class_names("cifar100")
    assert source == "sotalign_jax" and fine == sorted(fine) and len(set(fine)) == 100
    assert fine[1] == "aquarium fish" and fine[99] == "worm"


def test_names_from_a_file(tmp_path):
    lines = tmp_path / "names.txt"
    lines.write_text("\ufeff" + "\n".join(f"707-3{i:02d}" for i in range(100)) + "\n", "utf-8")
    names, source = class_names("aircraft", str(lines))
    assert names[7] == "707-307" and source == str(lines)
    as_json = tmp_path / "names.json"
    as_json.write_text(json.dumps(["a_b"] * 10))
    assert class_names("cifar10", str(as_json))[0] == ["a b"] * 10
    for text, message in (
        ("a\nb\n", "2 names, but aircraft has 100 classes"),
        ("a\n\nb\n", "name 2 is empty or without a letter"),
        ("[1, 2]", "must be a list of names"),
        ("[1, ", "not a JSON list"),
    ):
        lines.write_text(text)
        with pytest.raises(ValueError, match=f"classnames: .*names.txt: {message}"):
            class_names("aircraft", str(lines))
    lines.write_bytes(b"\xff\xfea\n")
    with pytest.raises(ValueError, match=r"classnames: .*names\.txt: not text in UTF-8"):
        class_names("aircraft", str(lines))
    with pytest.raises(ValueError, match=r"none\.txt: no such file"):
        class_names("aircraft", str(tmp_path / "none.txt"))


def test_where_names_are_to_be_had_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError) as caught:
        class_names("aircraft")
    assert str(caught.value) == (
        "classnames: those of aircraft are not part of this package; give --classnames=FILE with "
        "100 names, one a line, in the order of the labels (data/variants.txt of the data set)"
    )
    with pytest.raises(ValueError, match="install open_clip_torch or clip_benchmark, or give"):
        class_names("imagenet")


def test_ids_of_prompts_name_class_and_template():
    found = list(prompts("dtd", ["Polka-Dotted", "two words", "x"]))
    assert len(found) == 24
    assert found[0] == ("0-polka_dotted/0", "a photo of a Polka-Dotted texture.")
    assert found[15] == ("1-two_words/7", "a photo of the two words object.")
    classes, numbers, slugs = split_prompt_ids([key for key, _ in found])
    assert classes.tolist() == [i for i in range(3) for _ in range(8)]
    assert numbers.tolist() == [*range(8)] * 3
    assert slugs == {0: "polka_dotted", 1: "two_words", 2: "x"}
    assert slug("Boeing 707-320 / B") == "boeing_707_320_b"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["goldfish/0"], "id 'goldfish/0' is not INDEX-NAME/TEMPLATE"),
        (["1-goldfish"], "id '1-goldfish' is not INDEX-NAME/TEMPLATE"),
        (["1-goldfish/0", "1-tench/1"], "id '1-tench/1': class 1 is 'goldfish' in another id"),
    ],
)
def test_other_ids_are_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        split_prompt_ids(ids)
