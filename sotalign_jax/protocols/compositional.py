"""Winoground and MMVP-VLM: two images and two captions at a time."""

from __future__ import annotations

import dataclasses

import numpy as np

from sotalign_jax.evaluation import mmvp_metrics, winoground_metrics
from sotalign_jax.features import FeatureTable
from sotalign_jax.protocols.base import Progress, Protocol, Rows, listed
from sotalign_jax.protocols.published import SAIL, published_rows
from sotalign_jax.training.evaluate import embed_chunks

__all__ = ["COMPOSITIONAL", "MMVP_PATTERNS", "ItemProtocol"]

# In the order of the questions, fifteen pairs each.
MMVP_PATTERNS = (
    "Orientation and Direction",
    "Presence of Specific Features",
    "State and Condition",
    "Quantity and Count",
    "Positional and Relational Context",
    "Color and Appearance",
    "Structural Characteristics",
    "Texts",
    "Viewpoint and Perspective",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ItemProtocol(Protocol):
    """Items of two images and two captions each.

    Attributes:
        items: how many there are.
        patterns: names of equal runs of items; without any, the scores are Winoground's.
    """

    items: int
    patterns: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """See `Protocol`."""
        return f"{self.items:,} items of two images and two texts"

    def select(self, image: FeatureTable, text: FeatureTable) -> Rows:
        """See `Protocol`; an item's two rows stand beside each other."""
        return Rows(self._ordered("image", image), self._ordered("text", text))

    def _score(self, aligner, rows: Rows, progress: Progress | None) -> dict[str, float]:
        first = 2 * np.arange(self.items)[:, None]
        # Image and caption of every combination stand in one row of two tables, so that embeddings
        # of any width are compared chunk by chunk.
        left = rows.image.select((first + np.array([0, 0, 1, 1])).ravel())
        right = rows.text.select((first + np.array([0, 1, 0, 1])).ravel())
        products = [
            np.einsum("nd,nd->n", a.astype(np.float64), b.astype(np.float64))
            for a, b in zip(
                embed_chunks(aligner, "image", left),
                embed_chunks(aligner, "text", right),
                strict=True,
            )
        ]
        scores = np.concatenate(products).reshape(-1, 2, 2)
        if progress is not None:
            progress(len(rows.image) + len(rows.text))
        if self.patterns:
            return mmvp_metrics(scores, self.patterns)
        return winoground_metrics(scores)

    def _ordered(self, side: str, table: FeatureTable) -> FeatureTable:
        """The rows of a table, item by item."""
        ids = self.ids_of(side, table)
        self.check_count(side, table, 2 * self.items)
        self.check_unique(side, table, ids)
        row_of = {name: row for row, name in enumerate(ids.tolist())}
        wanted = [f"{item}/{part}" for item in range(self.items) for part in (0, 1)]
        absent = [name for name in wanted if name not in row_of]
        if absent:
            raise self.refuse(
                f"but {listed(np.array(absent))} of {side} ids are not in {table.name}",
                f"ids must be {self.ids}; it has {str(ids[0])!r}",
            )
        return table.select(np.array([row_of[name] for name in wanted]))


_SCORES = ("text_score", "image_score", "group_score")

COMPOSITIONAL = (
    ItemProtocol(
        name="winoground",
        title="Winoground",
        split="all 400 items",
        rule="text, image and group score; own pairs strictly above the other two, a tie is wrong",
        ids="ITEM/0 and ITEM/1, ITEM from 0 to 399: caption ITEM/k belongs to image ITEM/k",
        source="Thrush et al., CVPR 2022; examples.jsonl",
        shown={"text_score": "text", "image_score": "image", "group_score": "group"},
        published=(
            *published_rows("chance: 25.0 25.0 16.67", _SCORES, "Thrush et al., CVPR 2022"),
            *SAIL["winoground"],
        ),
        items=400,
    ),
    ItemProtocol(
        name="mmvp",
        title="MMVP-VLM",
        split="all 135 pairs, nine patterns of 15",
        rule="a pair is right if each caption scores its own image strictly above the other; mean "
        "over patterns",
        ids="PAIR/0 and PAIR/1, PAIR from 0 to 134 in the order of Questions.csv: caption PAIR/k "
        "belongs to image PAIR/k",
        source="Tong et al., CVPR 2024; Questions.csv, captions after 'a photo of '",
        shown={"accuracy": "mean"} | {f"pattern/{name}": name for name in MMVP_PATTERNS},
        published=(
            *published_rows("chance: 25.0", ["accuracy"], "two captions with two choices each"),
            *SAIL["mmvp"],
        ),
        remark="patterns are named by the order of the pairs, as in the published script",
        items=135,
        patterns=MMVP_PATTERNS,
    ),
)
