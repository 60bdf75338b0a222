"""Published figures, in percent, each with the table it stands in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

__all__ = ["BENCHMARK", "FOUR_RECALLS", "SAIL", "Published", "published_rows"]

FOUR_RECALLS = ("t2i/recall@1", "t2i/recall@5", "i2t/recall@1", "i2t/recall@5")


@dataclasses.dataclass(frozen=True)
class Published:
    """A row of somebody's table.

    Attributes:
        label: the method, and what sets it apart.
        percent: metric -> its value in percent.
        source: where it stands.
    """

    label: str
    percent: Mapping[str, float]
    source: str


def published_rows(table: str, metrics: Sequence[str], source: str) -> tuple[Published, ...]:
    """The rows of a table.

    Args:
        table: a line a row, ``label: number number ...``.
        metrics: what the numbers are, in their order.
        source: where they stand.
    """
    rows = []
    for line in table.strip().splitlines():
        label, numbers = line.strip().split(":")
        values = map(float, numbers.split())
        rows.append(Published(label, dict(zip(metrics, values, strict=True)), source))
    return tuple(rows)


# Recalls of COCO val2017 and of Flickr30k in the order of FOUR_RECALLS, then top-1 of seven.
_COLUMNS = (
    *(("coco_val2017", metric) for metric in FOUR_RECALLS),
    *(("flickr30k", metric) for metric in FOUR_RECALLS),
    *(
        (name, "top@1")
        for name in ("imagenet", "food101", "cifar10", "cifar100", "aircraft", "dtd", "flowers102")
    ),
)
_TABLE = published_rows(
    """
    SAIL, 1M pairs:       35.5 61.0 45.5 72.0 63.1 87.2 75.0 94.4 56.4 63.9 97.8 82.3  9.7 53.5 47.2
    SAIL, 10k pairs:      21.0 44.3 27.4 51.7 45.7 75.1 54.1 81.2 35.6 36.4 96.2 71.2  3.9 36.8 24.1
    STRUCTURE, 10k pairs: 21.0 43.7 28.7 52.7 46.8 74.9 54.0 82.9 38.2 38.5 96.7 72.2  5.4 39.5 23.6
    SAIL + unpaired:      20.7 43.6 26.5 51.7 44.9 74.2 53.1 82.1 35.6 36.5 96.2 71.3  3.8 35.9 21.1
    STRUCTURE + unpaired: 20.9 43.5 28.0 52.2 45.7 74.9 56.0 83.3 36.8 37.6 96.5 70.8  4.9 38.7 23.2
    NNCLR:                21.3 44.4 27.9 52.2 46.6 75.3 53.0 82.1 37.4 37.9 96.5 73.0  3.8 38.8 24.6
    S-CLIP:               20.4 42.6 27.8 50.5 44.5 74.4 52.6 82.3 36.4 35.3 95.9 69.3  4.4 37.6 22.5
    SOTAlign:             26.5 49.8 34.1 59.4 51.7 79.2 60.8 85.7 46.1 50.0 97.5 78.3  5.0 42.4 30.1
    """,
    [f"{protocol}:{metric}" for protocol, metric in _COLUMNS],
    "SOTAlign, arXiv 2602.23353, tables 4, 5, 9, 10: DINOv3 ViT-L + NV-Embed-v2, CC3M",
)
# Protocol -> the rows of the paper's comparison of methods.
BENCHMARK = {
    protocol: tuple(
        Published(
            row.label,
            {m: row.percent[f"{p}:{m}"] for p, m in _COLUMNS if p == protocol},
            row.source,
        )
        for row in _TABLE
    )
    for protocol, _ in _COLUMNS
}


def _sail(metrics: Sequence[str], nv_embed: str, gte: str) -> tuple[Published, ...]:
    return published_rows(
        f"""
        SAIL, DINOv2-L + NV-Embed-v2, 23M pairs: {nv_embed}
        SAIL, DINOv2-L + GTE-en-large, 23M pairs: {gte}
        """,
        metrics,
        "SAIL, Zhang et al., CVPR 2025",
    )


_RECALLS = ("t2i/recall@1", "i2t/recall@1")
# Protocol -> the rows of SAIL's own paper.
SAIL = {
    "coco_karpathy": _sail(_RECALLS, "48.6 62.4", "42.7 54.1"),
    "flickr30k": _sail(_RECALLS, "75.7 87.6", "68.9 80.8"),
    "winoground": _sail(
        ("text_score", "image_score", "group_score"), "40.25 18.75 15.0", "34.0 13.25 8.75"
    ),
    "mmvp": _sail(("accuracy",), "28.9", "22.2"),
    "imagenet": _sail(("top@1",), "73.4", "65.4"),
}
