"""Retrieval protocols: COCO, Flickr30k, CC3M's validation set, the 400 rows of SUE."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from sotalign_jax import features
from sotalign_jax.features import FeatureTable
from sotalign_jax.features.splits import counts_rows, numbered_otherwise, numbers_with_gaps
from sotalign_jax.protocols.base import Progress, Protocol, Rows, listed
from sotalign_jax.protocols.published import BENCHMARK, SAIL, published_rows
from sotalign_jax.training.evaluate import evaluate

__all__ = ["RETRIEVAL", "RetrievalProtocol"]

_COUNTED = (
    "ids of both tables count their rows: right only if a number means the same image in both"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalProtocol(Protocol):
    """Texts that find their image among all images, images that find one of their texts.

    Attributes:
        images: how many there are.
        texts: how many there are.
        captions: of each image; 0 where images have different numbers of them. With 1, tables
            without ids are joined by row.
        first_captions: texts beyond so many of an image are left out, those later in the table.
        fewer: whether rows may be missing, because links died; what is left is joined by id.
        members: images of this split by which it is told from others of its size, where all ids
            are names of files as ``names`` says; numbers alone are where most are missing.
        names: pattern of these names, whose last group is compared without zeros before it.
        others: which splits have its size.
    """

    images: int
    texts: int
    captions: int = 0
    first_captions: bool = False
    fewer: bool = False
    members: tuple[str, ...] = ()
    names: str = r"(?<!\d)(\d{12})$|^([1-9]\d{0,10})$"
    others: str = "val2017 and Karpathy's test and validation splits have 5,000 other images each"

    @property
    def expected(self) -> str:
        """See `Protocol`."""
        most = "up to " if self.fewer else ""
        return f"{most}{self.images:,} images and {self.texts:,} texts"

    def _score(self, aligner, rows: Rows, progress: Progress | None) -> dict[str, float]:
        return evaluate(aligner, features.pair(rows.image, rows.text), progress=progress)

    def select(self, image: FeatureTable, text: FeatureTable) -> Rows:
        """See `Protocol`."""
        if self.captions == 1 and image.ids is None and text.ids is None:
            return self._by_row(image, text)
        image_ids, text_ids = self.ids_of("image", image), self.ids_of("text", text)
        self.check_unique("image", image, image_ids)
        if self.captions == 1:
            self.check_unique("text", text, text_ids)
        if numbering := numbered_otherwise(image, text):
            raise self.refuse("but " + numbering)
        counted = counts_rows(image) and counts_rows(text)
        if self.fewer:
            return self._joined(image, text, counted)
        self.check_count("image", image, self.images)
        unknown = text_ids[~np.isin(text_ids, image_ids)]
        if len(unknown):
            raise self.refuse(
                f"but {listed(unknown)} of text ids in {text.name} are not those of an image in "
                f"{image.name}",
                f"image ids look like {str(image_ids[0])!r}; the texts may be of another split",
            )
        self._check_members(image, image_ids)
        notes = [_COUNTED] if counted else []
        if self.first_captions:
            kept, left_out = self._first(text, text_ids)
            notes = left_out + notes
            text, text_ids = text.select(kept), text_ids[kept]
        owner = np.searchsorted(np.sort(image_ids), text_ids)
        counts = np.bincount(owner, minlength=len(image_ids))
        if not counts.all():
            without = np.sort(image_ids)[counts == 0]
            raise self.refuse(
                f"but {listed(without)} of image ids in {image.name} have no text in {text.name}",
                "each image needs a caption",
            )
        wrong = np.sort(image_ids)[counts != self.captions] if self.captions else image_ids[:0]
        uneven = f"{listed(wrong)} of image ids do not have {self.captions} texts each"
        self.check_count("text", text, self.texts, uneven if len(wrong) else "")
        if len(wrong):
            raise self.refuse(f"but {uneven} in {text.name}")
        return Rows(image, text, tuple(notes))

    def _by_row(self, image: FeatureTable, text: FeatureTable) -> Rows:
        if len(image) != len(text):
            raise self.refuse(
                f"found {len(image):,} images and {len(text):,} texts",
                "without ids they are joined by row, one to one",
            )
        if len(image) > self.images or not self.fewer:
            self.check_count("image", image, self.images)
        notes = (*self._missing(len(image)), "joined by row: the tables have no ids")
        return Rows(image, text, notes)

    def _joined(self, image: FeatureTable, text: FeatureTable, counted: bool) -> Rows:
        """One to one; rows without a partner are left out."""
        image_ids, text_ids = self.ids_of("image", image), self.ids_of("text", text)
        # A larger table is another split, whose ids may well be the same numbers of rows.
        for side, table in (("image", image), ("text", text)):
            if len(table) > self.images:
                self.check_count(side, table, self.images)
        # What is missing must be seen in the ids: rows that were counted after a loss are others.
        whole = all(ids[-1] == str(len(ids) - 1) for ids in (image_ids, text_ids))
        if counted and whole and len(image) != len(text):
            raise self.refuse(
                f"found {len(image):,} images in {image.name} and {len(text):,} texts in "
                f"{text.name}, whose ids count the rows of each",
                "number them before rows are lost, or encode with a column of ids "
                "(--column=id:NAME)",
            )
        together = np.intersect1d(image_ids, text_ids)
        if len(together) < 2:
            raise self.refuse(
                f"but {image.name} and {text.name} share {len(together)} ids",
                f"the first are {str(image_ids[0])!r} and {str(text_ids[0])!r}",
            )
        notes = self._missing(len(together))
        for side, table in (("image", image), ("text", text)):
            if lost := len(table) - len(together):
                notes.append(f"{lost:,} of {len(table):,} {side}s have no partner and are left out")
        return Rows(
            image.select(np.flatnonzero(np.isin(image_ids, together))),
            text.select(np.flatnonzero(np.isin(text_ids, together))),
            (*notes, *([_COUNTED] if counted else [])),
        )

    def _missing(self, pairs: int) -> list[str]:
        if pairs == self.images:
            return []
        share = 100 * pairs / self.images
        return [f"{pairs:,} of {self.images:,} pairs ({share:.1f} %): the rest is missing"]

    def _first(self, text: FeatureTable, ids: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """Rows of the first texts of each image in the order of the table."""
        order = np.argsort(ids, kind="stable")
        ordered = ids[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        lengths = np.diff(np.r_[starts, len(ids)])
        place = np.empty(len(ids), np.int64)
        place[order] = np.arange(len(ids)) - np.repeat(starts, lengths)
        keep = np.flatnonzero(place < self.captions)
        if len(keep) == len(ids):
            return keep, []
        dropped, owners = len(ids) - len(keep), int(np.sum(lengths > self.captions))
        note = (
            f"{dropped} texts beyond the first {self.captions} of an image are left out, of "
            f"{owners} images"
        )
        return keep, [note]

    def _check_members(self, image: FeatureTable, ids: np.ndarray) -> None:
        """Refuses rows that have the right number and are another split."""
        if not self.members:
            return
        found = [re.search(self.names, name) for name in ids.tolist()]
        bare = any(match and match[0].isdecimal() and match[0][0] != "0" for match in found)
        if not all(found) or (bare and not numbers_with_gaps(image)):
            return  # not named after the files: nothing to tell by
        here = {match[match.lastindex or 0].lstrip("0") for match in found if match}
        absent = [name for name in self.members if name not in here]
        if absent:
            raise self.refuse(
                f"but image {absent[0]}, which belongs to it, is not in {image.name}", self.others
            )


_T2I, _I2T = "t2i/recall@", "i2t/recall@"
_COLUMNS = {
    f"{_T2I}1": "T2I R@1",
    f"{_T2I}5": "T2I R@5",
    f"{_T2I}10": "T2I R@10",
    f"{_I2T}1": "I2T R@1",
    f"{_I2T}5": "I2T R@5",
    f"{_I2T}10": "I2T R@10",
    "mean_recall@1": "mean R@1",
}
_RULE = (
    "recall@k: each text finds its image; each image finds any of its texts; all rows are gallery"
)
_FILE_NAMES = "those of the image files, without suffix; texts repeat their image's id"

_TEACHERS = published_rows(
    """
    teacher alone, Procrustes: 21.1
    teacher alone, CCA: 21.5
    teacher alone, contrastive: 24.2
    SOTAlign with the CCA teacher: 30.3
    """,
    ("mean_recall@1",),
    "SOTAlign, arXiv 2602.23353, table 1: DINOv3 ViT-L + NV-Embed-v2, CC3M",
)
_SUE = published_rows(
    """
    COCO, 100 pairs, CSA: 1.0 1.3
    COCO, 100 pairs, contrastive: 5.8 8.5
    COCO, 100 pairs, SUE: 18.3 21.5
    COCO, 100 pairs, SOTAlign, SUE's MLP and 8 columns: 28.8 27.0
    COCO, 100 pairs, SOTAlign: 35.0 35.8
    Flickr30k, 500 pairs, CSA: 0.8 1.3
    Flickr30k, 500 pairs, contrastive: 9.8 9.5
    Flickr30k, 500 pairs, SUE: 22.0 19.8
    Flickr30k, 500 pairs, SOTAlign, SUE's MLP and 8 columns: 48.8 48.5
    Flickr30k, 500 pairs, SOTAlign: 63.3 59.8
    Polyvore, 500 pairs, CSA: 1.0 1.3
    Polyvore, 500 pairs, contrastive: 11.5 13.8
    Polyvore, 500 pairs, SUE: 20.8 22.8
    Polyvore, 500 pairs, SOTAlign, SUE's MLP and 8 columns: 39.8 41.0
    Polyvore, 500 pairs, SOTAlign: 55.3 55.3
    """,
    (f"{_T2I}5", f"{_I2T}5"),
    "SOTAlign, arXiv 2602.23353, table 6",
)

RETRIEVAL = (
    RetrievalProtocol(
        name="coco_val2017",
        title="COCO val2017",
        split="COCO val2017, the first five captions of each image",
        rule=_RULE,
        ids=_FILE_NAMES,
        source="captions_val2017.json; the protocol of the SOTAlign paper",
        shown=_COLUMNS,
        published=BENCHMARK["coco_val2017"] + _TEACHERS,
        remark="not comparable with Karpathy's test split, which has other images",
        images=5_000,
        texts=25_000,
        captions=5,
        first_captions=True,
        members=("139", "581781"),
    ),
    RetrievalProtocol(
        name="coco_karpathy",
        title="COCO, Karpathy's test split",
        split="Karpathy's test split of COCO, images of val2014, all captions",
        rule=_RULE,
        ids=_FILE_NAMES,
        source="dataset_coco.json, Karpathy and Fei-Fei, CVPR 2015",
        shown=_COLUMNS,
        published=SAIL["coco_karpathy"],
        remark="not comparable with COCO val2017, which has other images; SOTAlign reports that",
        images=5_000,
        texts=25_010,
        members=("391895",),
    ),
    RetrievalProtocol(
        name="flickr30k",
        title="Flickr30k",
        split="Karpathy's test split of Flickr30k",
        rule=_RULE,
        ids=_FILE_NAMES,
        source="dataset_flickr30k.json, Karpathy and Fei-Fei, CVPR 2015",
        shown=_COLUMNS,
        published=BENCHMARK["flickr30k"] + SAIL["flickr30k"],
        images=1_000,
        texts=5_000,
        captions=5,
        members=("1007129816", "1009434119"),
        # As in Flickr30k, Flickr8k or COCO.
        names=r"(?:^|/)([1-9]\d{4,11}(?:_[0-9a-f]{8,10})?|(?:COCO_\w+_)?\d{12})$",
        others="Flickr8k's test split and a fifth of COCO's have 1,000 images with five texts too",
    ),
    RetrievalProtocol(
        name="cc3m_val",
        title="CC3M validation",
        split="CC3M's validation split, one caption an image",
        rule="recall@k, one to one",
        ids="the same of an image and its caption, each once",
        source="Validation_GCC-1.1.0-Validation.tsv, Sharma et al., ACL 2018",
        shown=_COLUMNS,
        remark="for choosing hyper-parameters; figures of different numbers of rows do not compare",
        images=15_840,
        texts=15_840,
        captions=1,
        fewer=True,
    ),
    RetrievalProtocol(
        name="sue400",
        title="SUE's 400 rows",
        split="the first 400 rows of a data set, one caption an image",
        rule="recall@k, one to one, 400 candidates",
        ids="the same of an image and its caption, each once",
        source="Yacobi et al., arXiv 2505.21524",
        shown=_COLUMNS,
        published=_SUE,
        images=400,
        texts=400,
        captions=1,
    ),
)
