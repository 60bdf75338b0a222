"""Zero-shot classification: ImageNet, Food-101, CIFAR-10 and -100, FGVC-Aircraft, DTD, Flowers-102.

The texts are the prompts of `sotalign_jax.protocols.prompts`, encoded. An image's label is what
`read_labels` found for its id, or without a file of labels the id up to its first slash, as folders
of classes give it (``goldfish/0001``). A label is a class's number from 0 or its name; ImageNet's
may be WordNet ids (``n01443537``), whose order is that of the classes.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sotalign_jax.evaluation import class_embeddings, classification_metrics
from sotalign_jax.features import FeatureTable
from sotalign_jax.models import Aligner
from sotalign_jax.protocols.base import Progress, Protocol, Rows, listed
from sotalign_jax.protocols.prompts import CLASSES, TEMPLATES, slug, split_prompt_ids
from sotalign_jax.protocols.published import BENCHMARK, SAIL
from sotalign_jax.training.evaluate import embed_chunks

__all__ = ["CLASSIFICATION", "ClassificationProtocol", "read_labels"]

_WORDNET = re.compile(r"n\d{8}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassificationProtocol(Protocol):
    """Images that are given the class whose prompts they are nearest to.

    Attributes:
        images: how many there are.
        classes: how many there are.
        templates: prompts of each class.
        known: ends of ids that images of this split have, and the classes of these images, by which
            another order of the classes is told.
        order: what to do about another order.
    """

    images: int
    classes: int
    templates: int
    known: Mapping[str, int] = dataclasses.field(default_factory=dict)
    order: str = ""

    @property
    def expected(self) -> str:
        """See `Protocol`."""
        prompts = self.classes * self.templates
        return (
            f"{self.images:,} images of {self.classes:,} classes and {prompts:,} prompts "
            f"({self.templates} a class)"
        )

    def select(
        self, image: FeatureTable, text: FeatureTable, labels: Mapping[str, str] | None = None
    ) -> Rows:
        """See `Protocol`; ``labels`` are those of images by id, instead of folders."""
        owner, slugs = self._prompts(text)
        return Rows(image, text, more=(owner, self._labels(image, slugs, labels)))

    def _score(self, aligner, rows: Rows, progress: Progress | None) -> dict[str, float]:
        owner, labels = rows.more
        classes = class_embeddings(
            embed_chunks(aligner, "text", rows.text, progress=progress),
            owner,
            self.classes,
            normalize=isinstance(aligner, Aligner) or aligner.unit,
        )
        chunks = embed_chunks(aligner, "image", rows.image, progress=progress)
        return classification_metrics(chunks, classes, labels)

    def _prompts(self, text: FeatureTable) -> tuple[np.ndarray, list[str]]:
        """The class of each prompt, and the classes' slugs."""
        ids = self.ids_of("text", text)
        try:
            owner, numbers, slugs = split_prompt_ids(ids.tolist())
        except ValueError as error:
            raise self.refuse(f"but in {text.name} {error}") from None
        self.check_unique("text", text, ids)
        if sorted(slugs) != list(range(self.classes)):
            raise self.refuse(
                f"found prompts of {len(slugs):,} classes, {min(slugs)} to {max(slugs)}, in "
                f"{text.name}",
                "write them anew by `sotalign data prompts`",
            )
        counts = np.bincount(owner, minlength=self.classes)
        # Ids are unique: as many numbers of the right range are all of them.
        wrong = np.flatnonzero(counts != self.templates)
        if len(wrong) or numbers.max() >= self.templates:
            worst = int(wrong[0]) if len(wrong) else int(owner[np.argmax(numbers)])
            raise self.refuse(
                f"found {int(counts[worst])} prompts of class {worst} in {text.name}, numbered up "
                f"to {int(numbers[owner == worst].max())}",
                "write them anew by `sotalign data prompts`",
            )
        return owner, [slugs[index] for index in range(self.classes)]

    def _labels(
        self, image: FeatureTable, slugs: list[str], given: Mapping[str, str] | None
    ) -> np.ndarray:
        """The class of each image."""
        ids = self.ids_of("image", image)
        self.check_count("image", image, self.images)
        self.check_unique("image", image, ids)
        if given is not None:
            unknown = [name for name in ids.tolist() if name not in given]
            if unknown:
                raise self.refuse(
                    f"but {listed(np.array(unknown))} of image ids in {image.name} have no label",
                    f"labels are of ids as {next(iter(given))!r}" if given else "",
                )
            words = [given[name] for name in ids.tolist()]
        else:
            flat = [name for name in ids.tolist() if "/" not in name]
            if flat:
                raise self.refuse(
                    f"but {listed(np.array(flat))} of image ids in {image.name} name no folder",
                    "give --labels=FILE with id and label, or ids CLASS/NAME",
                )
            words = [name.split("/", 1)[0] for name in ids.tolist()]
        labels = self._numbers(words, slugs)
        counts = np.bincount(labels, minlength=self.classes)
        if not counts.all():
            raise self.refuse(
                f"but no image of {image.name} is of class {int(np.argmin(counts))} "
                f"({slugs[int(np.argmin(counts))]})"
            )
        self._check_order(image, ids, labels)
        return labels

    def _check_order(self, image: FeatureTable, ids: np.ndarray, labels: np.ndarray) -> None:
        """Refuses labels that count the classes in another order."""
        for end, expected in self.known.items():
            for row in np.flatnonzero(np.char.endswith(ids.astype(str), end)):
                if labels[row] != expected:
                    raise self.refuse(
                        f"but image {str(ids[row])!r} in {image.name} has label {labels[row]} and "
                        f"is of class {expected}",
                        self.order,
                    )

    def _numbers(self, words: list[str], slugs: list[str]) -> np.ndarray:
        different = sorted(set(words))
        if all(word.isdecimal() for word in different):
            numbers = np.array([int(word) for word in words])
            if numbers.max() >= self.classes:
                starts = "they start at 1; " if numbers.min() == 1 else ""
                order = f"; {self.order}" if self.order else ""
                raise self.refuse(
                    f"found labels {numbers.min()} to {numbers.max()}",
                    f"{starts}numbers of classes go from 0 to {self.classes - 1}{order}",
                )
            return numbers
        if all(map(_WORDNET.fullmatch, different)):
            if len(different) != self.classes:
                raise self.refuse(f"found {len(different):,} WordNet ids among the labels")
            place = {word: number for number, word in enumerate(different)}
        else:
            place = {}
            for number, name in enumerate(slugs):
                # A name that two classes have is the name of neither.
                place[name] = number if name not in place else -1
            wanted = {word: place.get(slug(word)) for word in different}
            unknown = [word for word, number in wanted.items() if number is None]
            if unknown:
                raise self.refuse(
                    f"but {listed(np.array(unknown))} of the labels are not among the classes",
                    f"a label is a class's number or its name, as {slugs[0]!r}",
                )
            if twice := [word for word, number in wanted.items() if number == -1]:
                raise self.refuse(
                    f"but two classes are called {twice[0]!r}", "give numbers or WordNet ids"
                )
            place = {word: number for word, number in wanted.items() if number is not None}
        return np.array([place[word] for word in words])


def read_labels(path: str) -> dict[str, str]:
    """Labels of images by id.

    Args:
        path: a CSV file with a header ``id,label``, or JSON lines ``{"id": ..., "label": ...}``.

    Returns:
        id -> label, as text.

    Raises:
        ValueError: no such file, no such columns, a line that is not JSON, or an id with two
            labels.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"labels: {path}: no such file")
    found: dict[str, str] = {}
    try:
        for number, row in enumerate(_label_rows(file), 1):
            if not isinstance(row, dict) or row.get("id") is None or row.get("label") is None:
                raise ValueError(f"labels: {path}: row {number} has no id or no label")
            name, label = str(row["id"]), str(row["label"])
            if found.setdefault(name, label) != label:
                raise ValueError(f"labels: {path}: {name!r} has labels {found[name]!r}, {label!r}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"labels: {path}: not CSV or JSON lines in UTF-8 ({error})") from None
    if not found:
        raise ValueError(f"labels: {path}: no labels in it")
    return found


def _label_rows(file: pathlib.Path) -> Iterator[Any]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if file.suffix.lower() not in (".jsonl", ".ndjson"):
            yield from csv.DictReader(lines)
            return
        for number, line in enumerate(lines, 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"labels: {file}:{number}: not JSON ({error})") from None


def _protocol(
    name: str,
    title: str,
    split: str,
    images: int,
    remark: str = "",
    **more: Any,
) -> ClassificationProtocol:
    return ClassificationProtocol(
        name=name,
        title=title,
        split=split,
        rule="each prompt through the text head to unit length, mean over templates to unit "
        "length; the nearest class",
        ids="CLASS/NAME of images (or any, with a file of labels), INDEX-NAME/TEMPLATE of prompts",
        source="CLIP's templates, Radford et al. 2021",
        shown={"top@1": "top-1", "top@5": "top-5", "mean_per_class_recall": "mean per class"},
        published=BENCHMARK[name] + SAIL.get(name, ()),
        remark=remark,
        images=images,
        classes=CLASSES[name],
        templates=TEMPLATES[name],
        **more,
    )


CLASSIFICATION = (
    _protocol(
        "imagenet",
        "ImageNet-1k",
        "validation split of ILSVRC 2012",
        50_000,
        known={f"ILSVRC2012_val_0000000{k}": n for k, n in ((1, 65), (2, 970), (3, 230), (4, 809))},
        order="classes are in the order of their WordNet ids, the development kit numbers them in "
        "another: label by WordNet ids",
    ),
    _protocol("food101", "Food-101", "test split", 25_250),
    _protocol("cifar10", "CIFAR-10", "test split", 10_000),
    _protocol("cifar100", "CIFAR-100", "test split, the 100 fine labels", 10_000),
    _protocol(
        "aircraft",
        "FGVC-Aircraft",
        "test split, the 100 variants",
        3_333,
        "its validation split has 3,333 images too; others report the mean per class",
    ),
    _protocol(
        "dtd",
        "DTD",
        "test split of partition 1",
        1_880,
        "its training and validation splits have 1,880 images too",
    ),
    _protocol("flowers102", "Flowers-102", "test split", 6_149, "others report the mean per class"),
)
