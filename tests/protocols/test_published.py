"""Published figures against the papers, read a second time."""

import runpy
from pathlib import Path

from sotalign_jax.protocols import PROTOCOLS

SWEEPS = Path(__file__).parents[2] / "configs" / "sweeps"


def columns(name, *metrics):
    """The figures of a protocol's rows, by label."""
    return {
        row.label: tuple(row.percent[metric] for metric in metrics)
        for row in PROTOCOLS[name].published
        if set(metrics) <= set(row.percent)
    }


def test_coco_and_sue_are_as_in_the_sweeps():
    """Which were copied from the paper by themselves."""
    paper = runpy.run_path(str(SWEEPS / "table4_methods.py"))["_PAPER"]
    ours = columns("coco_val2017", "t2i/recall@1", "i2t/recall@1")
    assert list(ours.values()) == list(paper.values())
    assert [label.split()[0] for label in ours] == [
        "SAIL,", "SAIL,", "STRUCTURE,", "SAIL", "STRUCTURE", "NNCLR", "S-CLIP", "SOTAlign",
    ]  # fmt: skip
    paper = runpy.run_path(str(SWEEPS / "table6_single_dataset.py"))["_PAPER"]
    ours = columns("sue400", "i2t/recall@5", "t2i/recall@5")
    data = ("COCO, 100 pairs", "Flickr30k, 500 pairs", "Polyvore, 500 pairs")
    assert len(ours) == len(data) * len(paper)
    for method, of_data in paper.items():
        label = method.replace("MLP, d = 8", "SUE's MLP and 8 columns")
        assert tuple(ours[f"{one}, {label}"] for one in data) == of_data


def test_flickr_and_classification_column_by_column():
    four = ("t2i/recall@1", "t2i/recall@5", "i2t/recall@1", "i2t/recall@5")
    assert list(columns("flickr30k", *four).values()) == [
        (63.1, 87.2, 75.0, 94.4),
        (45.7, 75.1, 54.1, 81.2),
        (46.8, 74.9, 54.0, 82.9),
        (44.9, 74.2, 53.1, 82.1),
        (45.7, 74.9, 56.0, 83.3),
        (46.6, 75.3, 53.0, 82.1),
        (44.5, 74.4, 52.6, 82.3),
        (51.7, 79.2, 60.8, 85.7),
    ]
    recall_at_5 = columns("coco_val2017", "t2i/recall@5", "i2t/recall@5").values()
    t2i, i2t = zip(*recall_at_5, strict=True)
    assert t2i == (61.0, 44.3, 43.7, 43.6, 43.5, 44.4, 42.6, 49.8)
    assert i2t == (72.0, 51.7, 52.7, 51.7, 52.2, 52.2, 50.5, 59.4)
    top = {
        "imagenet": (56.4, 35.6, 38.2, 35.6, 36.8, 37.4, 36.4, 46.1),
        "food101": (63.9, 36.4, 38.5, 36.5, 37.6, 37.9, 35.3, 50.0),
        "cifar10": (97.8, 96.2, 96.7, 96.2, 96.5, 96.5, 95.9, 97.5),
        "cifar100": (82.3, 71.2, 72.2, 71.3, 70.8, 73.0, 69.3, 78.3),
        "aircraft": (9.7, 3.9, 5.4, 3.8, 4.9, 3.8, 4.4, 5.0),
        "dtd": (53.5, 36.8, 39.5, 35.9, 38.7, 38.8, 37.6, 42.4),
        "flowers102": (47.2, 24.1, 23.6, 21.1, 23.2, 24.6, 22.5, 30.1),
    }
    for name, column in top.items():
        assert tuple(v for (v,) in columns(name, "top@1").values())[:8] == column, name


def test_what_sails_own_paper_has():
    scores = columns("winoground", "text_score", "image_score", "group_score")
    assert scores == {
        "chance": (25.0, 25.0, 16.67),
        "SAIL, DINOv2-L + NV-Embed-v2, 23M pairs": (40.25, 18.75, 15.0),
        "SAIL, DINOv2-L + GTE-en-large, 23M pairs": (34.0, 13.25, 8.75),
    }
    assert list(columns("mmvp", "accuracy").values()) == [(25.0,), (28.9,), (22.2,)]
    both = ("t2i/recall@1", "i2t/recall@1")
    assert list(columns("coco_karpathy", *both).values()) == [(48.6, 62.4), (42.7, 54.1)]
    assert list(columns("flickr30k", *both).values())[8:] == [(75.7, 87.6), (68.9, 80.8)]
    assert list(columns("imagenet", "top@1").values())[8:] == [(73.4,), (65.4,)]
    mean = columns("coco_val2017", "mean_recall@1")
    assert list(mean.values()) == [(21.1,), (21.5,), (24.2,), (30.3,)]
