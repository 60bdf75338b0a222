"""Prompts of zero-shot classification: templates, class names, and the ids that tie them together.

A prompt's id is ``INDEX-NAME/TEMPLATE``, as ``1-goldfish/79``: the class's number from 0, its name
in lower case with an underscore for whatever is no letter or digit, and the template's number from
0. So encoded prompts carry the list of classes with them.
"""

from __future__ import annotations

import ast
import functools
import importlib.resources
import importlib.util
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

__all__ = [
    "CLASSES",
    "TEMPLATES",
    "class_key",
    "class_names",
    "prompts",
    "read_class_names",
    "slug",
    "split_prompt_ids",
    "templates",
]

# Zero-shot data set -> number of templates and of classes.
TEMPLATES = {
    "imagenet": 80,
    "food101": 1,
    "cifar10": 18,
    "cifar100": 18,
    "aircraft": 2,
    "dtd": 8,
    "flowers102": 1,
}
CLASSES = {
    "imagenet": 1_000,
    "food101": 101,
    "cifar10": 10,
    "cifar100": 100,
    "aircraft": 100,
    "dtd": 47,
    "flowers102": 102,
}


@functools.cache
def _packaged() -> dict[str, Any]:
    file = importlib.resources.files("sotalign_jax.protocols") / "data" / "zero_shot.json"
    return json.loads(file.read_text(encoding="utf-8"))


def templates(name: str) -> list[str]:
    """The templates of a data set, ``{}`` where the class name goes.

    Args:
        name: a key of ``TEMPLATES``.

    Returns:
        As many as ``TEMPLATES`` says.

    Raises:
        ValueError: an unknown name.
    """
    _check_name(name)
    found = _packaged()["templates"][name]
    assert len(found) == TEMPLATES[name] and all(t.count("{}") == 1 for t in found)
    return found


def class_names(name: str, file: str | None = None) -> tuple[list[str], str]:
    """The class names of a data set, in the order of its labels, and where they are from.

    Those of CIFAR are part of this package. The others are read from a package that has them and is
    installed, which is not imported: ImageNet's curated names from open_clip_torch or
    clip_benchmark, Flowers' from clip_benchmark or tensorflow-datasets (which differ in a few
    names), Food-101's and DTD's from tensorflow-datasets. FGVC-Aircraft's come with its images.

    Args:
        name: a key of ``CLASSES``.
        file: read these instead: a name a line, or a JSON list.

    Returns:
        ``(names, source)``, as many names as ``CLASSES`` says.

    Raises:
        ValueError: an unknown name, no package that has the names, or another number of them.
    """
    _check_name(name)
    if file is not None:
        return read_class_names(file, name), file
    if name in _packaged()["classnames"]:
        return list(_packaged()["classnames"][name]), "sotalign_jax"
    for package, path, read in _SHIPPED.get(name, ()):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        source = pathlib.Path(spec.origin).parent / path
        if source.is_file():
            return _checked(read(source.read_text(encoding="utf-8")), name, str(source)), package
    have = " or ".join(_DISTRIBUTIONS[package] for package, _, _ in _SHIPPED.get(name, ()))
    raise ValueError(
        f"classnames: those of {name} are not part of this package; "
        + (f"install {have}, or " if have else "")
        + f"give --classnames=FILE with {CLASSES[name]} names, one a line, in the order of the "
        + "labels"
        + (" (data/variants.txt of the data set)" if name == "aircraft" else "")
    )


def read_class_names(file: str, name: str) -> list[str]:
    """Class names of a file: one a line, or a JSON list.

    Args:
        file: its path.
        name: of the data set, a key of ``CLASSES``.

    Returns:
        The names, underscores as spaces.

    Raises:
        ValueError: no such file, no list of strings, an empty name, or another number of names.
    """
    path = pathlib.Path(file)
    if not path.is_file():
        raise ValueError(f"classnames: {file}: no such file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"classnames: {file}: not text in UTF-8 ({error})") from None
    if text.lstrip().startswith("["):
        try:
            found = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"classnames: {file}: not a JSON list ({error})") from None
    else:
        found = text.strip().splitlines()
    return _checked(found, name, file)


def prompts(name: str, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The prompts of a data set.

    Args:
        name: a key of ``TEMPLATES``.
        names: class names in the order of the labels, from `class_names`.

    Yields:
        ``(id, caption)``, template by template for one class after the other.
    """
    for index, one in enumerate(names):
        for number, template in enumerate(templates(name)):
            yield f"{class_key(index, one)}/{number}", template.replace("{}", one)


def slug(name: str) -> str:
    """A class name as a word: ``"polka-dotted"`` is ``polka_dotted``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def class_key(index: int, name: str) -> str:
    """What stands for a class in ids of prompts."""
    return f"{index}-{slug(name)}"


def split_prompt_ids(ids: Sequence[str]) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Reads the ids of prompts.

    Args:
        ids: as `prompts` makes them.

    Returns:
        ``(classes, templates, slugs)``: numbers of each row, and the slug of each class.

    Raises:
        ValueError: an id of another form, or two slugs of one class.
    """
    classes, numbers = np.empty(len(ids), np.int64), np.empty(len(ids), np.int64)
    slugs: dict[int, str] = {}
    for row, name in enumerate(ids):
        match = re.fullmatch(r"(\d+)-([^/]*)/(\d+)", name)
        if match is None:
            raise ValueError(
                f"id {name!r} is not INDEX-NAME/TEMPLATE, as in '1-goldfish/79'; write the prompts "
                "by `sotalign data prompts` and encode that file"
            )
        classes[row], numbers[row] = int(match[1]), int(match[3])
        if slugs.setdefault(int(match[1]), match[2]) != match[2]:
            raise ValueError(
                f"id {name!r}: class {match[1]} is {slugs[int(match[1])]!r} in another id"
            )
    return classes, numbers, slugs


def _check_name(name: str) -> None:
    if name not in TEMPLATES:
        raise ValueError(f"prompts: no data set {name!r}; there are {', '.join(TEMPLATES)}")


def _checked(found: Any, name: str, source: str) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"classnames: {source}: must be a list of names")
    names = [one.strip().replace("_", " ") for one in found]
    if not all(map(slug, names)):
        empty = next(i for i, one in enumerate(names) if not slug(one))
        raise ValueError(f"classnames: {source}: name {empty + 1} is empty or without a letter")
    if len(names) != CLASSES[name]:
        raise ValueError(
            f"classnames: {source}: {len(names)} names, but {name} has {CLASSES[name]} classes"
        )
    return names


def _assigned(variable: str) -> Callable[[str], list[str]]:
    """Reads a list that a module assigns, without running the module."""

    def read(text: str) -> list[str]:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name) and target.id == variable and node.value:
                    return list(ast.literal_eval(node.value))
        raise ValueError(f"classnames: no list {variable} in the installed package")

    return read


def _of_benchmark(key: str) -> Callable[[str], list[str]]:
    return lambda text: json.loads(text)[key]


# What a package is called where it is installed from.
_DISTRIBUTIONS = {
    "open_clip": "open_clip_torch",
    "clip_benchmark": "clip_benchmark",
    "tensorflow_datasets": "tensorflow-datasets",
}
_BENCHMARK_FILE = "datasets/en_classnames.json"
# Data set -> packages, in order of preference: (package, file in it, how to read it).
_SHIPPED: dict[str, tuple[tuple[str, str, Callable[[str], list[str]]], ...]] = {
    "imagenet": (
        ("open_clip", "zero_shot_metadata.py", _assigned("IMAGENET_CLASSNAMES")),
        ("clip_benchmark", _BENCHMARK_FILE, _of_benchmark("imagenet1k")),
    ),
    "flowers102": (
        ("clip_benchmark", _BENCHMARK_FILE, _of_benchmark("flowers")),
        (
            "tensorflow_datasets",
            "datasets/oxford_flowers102/oxford_flowers102_dataset_builder.py",
            _assigned("_NAMES"),
        ),
    ),
    "food101": (
        ("tensorflow_datasets", "image_classification/food-101_classes.txt", str.splitlines),
    ),
    "dtd": (
        ("tensorflow_datasets", "image_classification/dtd_key_attributes.txt", str.splitlines),
    ),
}
