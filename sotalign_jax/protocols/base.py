"""What a protocol is, and the checks that all of them make."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from sotalign_jax.features import FeatureTable, check_finite
from sotalign_jax.fitted import FittedAligner
from sotalign_jax.models import Aligner
from sotalign_jax.protocols.published import Published
from sotalign_jax.training.evaluate import check_width

__all__ = ["Progress", "Protocol", "Rows", "listed"]

Progress = Callable[[int], None]

# What tables of these many rows mostly are; for a message, never to decide anything.
KNOWN_IMAGES = {
    1_014: "Flickr30k's validation split has as many",
    29_000: "Flickr30k's training split has as many",
    31_014: "all of Flickr30k in Karpathy's file has as many",
    31_783: "all of Flickr30k has as many",
    4_952: "these are val2017 without its 48 images without objects",
    40_504: "all of COCO val2014 has as many",
    82_783: "COCO train2014 has as many",
    113_287: "Karpathy's train and restval splits have as many",
    118_287: "COCO train2017 has as many",
    12_559: "CC3M's test split has as many",
    3_318_333: "CC3M's training split has as many",
    12_423_374: "CC12M has as many",
    1_281_167: "ImageNet's training split has as many",
    100_000: "ImageNet's test split, whose labels are not public, has as many",
    75_750: "Food-101's training split has as many",
    101_000: "all of Food-101 has as many",
    60_000: "training and test split together have as many",
    50_000: "CIFAR's training and ImageNet's validation split have as many",
    10_000: "CIFAR's test split has as many",
    3_334: "FGVC-Aircraft's training split has as many; val has 3,333, as test",
    6_667: "FGVC-Aircraft's trainval split has as many",
    5_640: "all of DTD has as many",
    3_760: "DTD's training and validation splits together have as many",
    1_020: "the training or validation split of Flowers-102 has as many",
    8_189: "all of Flowers-102 has as many",
    1_000: "Flickr30k's test split has as many",
    5_000: "COCO val2017 and Karpathy's COCO splits have as many",
}
KNOWN_TEXTS = {
    25_000: "captions were cut to the first five of each image",
    25_010: "all captions of Karpathy's COCO test or validation split",
    25_014: "all captions of COCO val2017, not cut to five",
    3_318_333: "the captions of CC3M's training split",
    12_559: "the captions of CC3M's test split",
    5_070: "the captions of Flickr30k's validation split",
    5_000: "one caption an image, or Flickr30k's test split",
    1_000: "one caption an image",
}


class Rows(NamedTuple):
    """What a protocol scores, once its rows were found to be the right ones.

    Attributes:
        image: these images and no others.
        text: these texts and no others.
        notes: what was left out.
        more: what else the protocol needs to know of the rows.
    """

    image: FeatureTable
    text: FeatureTable
    notes: tuple[str, ...] = ()
    more: Any = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol(abc.ABC):
    """A test that everybody means by its name: which rows, how many, and how they are scored.

    Attributes:
        name: what it is called on the command line.
        title: what people call it.
        split: which rows of which data.
        rule: how they are scored, in a line.
        ids: what ids of images and texts must be.
        source: where the data and the rule come from.
        shown: the metrics of the printed table, each with the head of its column.
        published: rows of published tables on these rows.
        remark: what to know before comparing; ``""`` for nothing.
    """

    name: str
    title: str
    split: str
    rule: str
    ids: str
    source: str
    shown: Mapping[str, str]
    published: tuple[Published, ...] = ()
    remark: str = ""

    @property
    @abc.abstractmethod
    def expected(self) -> str:
        """The counts in words: ``"5,000 images, 25,000 texts"``."""

    @abc.abstractmethod
    def select(self, image: FeatureTable, text: FeatureTable, **options: Any) -> Rows:
        """The rows of the protocol, by their ids and numbers; features are not read.

        Args:
            image: all images given.
            text: all texts given.
            **options: as for `run`.

        Raises:
            ValueError: as `run`.
        """

    @abc.abstractmethod
    def _score(
        self, aligner: Aligner | FittedAligner, rows: Rows, progress: Progress | None
    ) -> dict[str, float]:
        """The metrics."""

    def run(
        self,
        aligner: Aligner | FittedAligner,
        image: FeatureTable,
        text: FeatureTable,
        *,
        progress: Progress | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Scores an aligner, once the rows are found to be those of the protocol.

        Args:
            aligner: trained, fitted, or a teacher.
            image: raw image features, with ids as in ``ids``.
            text: raw text features, likewise.
            progress: told the rows of each chunk once it is embedded.
            **options: ``labels`` of a zero-shot classification: image id -> label.

        Returns:
            ``protocol``, ``split``, ``rule``, ``metrics`` (fractions), ``notes`` (what was left out
            or is to be known), ``published``: all as JSON takes it.

        Raises:
            ValueError: rows that are not those of the protocol, in number or by id, whose width is
                not the aligner's, or that hold NaN or Inf; the message says what was expected and
                what it may be.
        """
        check_width(aligner, "image", image)
        check_width(aligner, "text", text)
        rows = self.select(image, text, **options)
        check_finite(rows.image)
        check_finite(rows.text)
        metrics = self._score(aligner, rows, progress)
        return {
            "protocol": self.name,
            "split": self.split,
            "rule": self.rule,
            "metrics": metrics,
            "notes": [*rows.notes, *([self.remark] if self.remark else [])],
            "published": [dataclasses.asdict(row) for row in self.published],
        }

    def refuse(self, found: str, cause: str = "") -> ValueError:
        """The error that says what was expected, what was found, and what it may be."""
        tail = f"; {cause}" if cause else ""
        return ValueError(f"{self.name}: expected {self.expected} ({self.split}), {found}{tail}")

    def check_count(
        self, side: str, table: FeatureTable, expected: int, otherwise: str = ""
    ) -> None:
        """Raises the refusal unless a table has as many rows as expected.

        ``otherwise`` is what to say of a number that is not known from elsewhere.
        """
        if len(table) == expected:
            return
        known = (KNOWN_IMAGES if side == "image" else KNOWN_TEXTS).get(len(table), otherwise)
        raise self.refuse(f"found {len(table):,} {side}s in {table.name}", known)

    def ids_of(self, side: str, table: FeatureTable) -> np.ndarray:
        """The ids of a table, or the refusal of one that has none."""
        if table.ids is None:
            raise ValueError(f"{self.name}: {table.name} has no ids; {side} ids must be {self.ids}")
        return table.ids

    def check_unique(self, side: str, table: FeatureTable, ids: np.ndarray) -> None:
        """Raises the refusal if an id occurs more than once."""
        unique, counts = np.unique(ids, return_counts=True)
        if (counts > 1).any():
            raise self.refuse(
                f"but {listed(unique[counts > 1])} of {side} ids in {table.name} occur more than "
                "once",
                "each must be there once",
            )


def listed(values: np.ndarray) -> str:
    """How many, and the first: ``"3 (first: 'a')"``."""
    return f"{len(values):,} (first: {str(values[0])!r})" if len(values) else "none"
