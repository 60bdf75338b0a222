"""The best and the worst retrievals of a trained aligner, as a part of the page of its run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sotalign_jax import training
from sotalign_jax.config import validate
from sotalign_jax.evaluation import Examples, retrieval_examples
from sotalign_jax.fitted import load_aligner
from sotalign_jax.models import Aligner
from sotalign_jax.reports.markup import Markup, tag
from sotalign_jax.reports.rows import View, view_rows
from sotalign_jax.reports.runs import Run

__all__ = ["examples_of"]

_COUNT, _SHOWN = 6, 5


def examples_of(run: Run) -> tuple[list[Markup], list[str]]:
    """Queries of both directions that the aligner of a run answers best and worst.

    Args:
        run: a finished run, whose data is where its configuration says.

    Returns:
        Parts of the page, and what could not be shown.

    Raises:
        ValueError: there is no aligner, no held-out pair, or data that cannot be read.
        OSError: a file that cannot be read.
    """
    directory = run.path / "aligner"
    if not (directory / "aligner.json").exists():
        raise ValueError("the run has saved no aligner yet")
    config = validate(dict(run.config))
    split, pairs = "test", training.load_test_pairs(config)
    if pairs is None:
        split, pairs = "val", training.load_splits(config).val
    if pairs is None:
        raise ValueError("the data has neither test nor validation pairs")
    aligner = load_aligner(directory)
    image, text = (
        training.embed_rows(aligner, side, table)
        for side, table in (("image", pairs.image), ("text", pairs.text))
    )
    found = {
        direction: retrieval_examples(
            image,
            text,
            text_to_image=pairs.text_to_image,
            direction=direction,
            normalize=isinstance(aligner, Aligner),
            count=_COUNT,
            shown=_SHOWN,
        )
        for direction in ("t2i", "i2t")
    }
    rows = {"image": [], "text": []}
    for direction, (best, worst) in found.items():
        query, gallery = ("text", "image") if direction == "t2i" else ("image", "text")
        for examples in (best, worst):
            rows[query].append(examples.query)
            rows[gallery] += [examples.found.ravel(), examples.own]
    images, texts, problems = view_rows(
        config,
        pairs,
        split,
        image=np.concatenate(rows["image"]).tolist(),
        text=np.concatenate(rows["text"]).tolist(),
    )
    parts = [
        tag(
            "p",
            f"Of the {len(pairs.image):,} images and {len(pairs.text):,} texts of the {split} "
            "pairs. The best queries are those whose partner stands clearest above all others, the "
            "worst those whose partner comes last. Framed: the partner. Numbers are similarities.",
            class_="note",
        )
    ]
    for direction, (best, worst) in found.items():
        way = "Text to image" if direction == "t2i" else "Image to text"
        queries, gallery = (texts, images) if direction == "t2i" else (images, texts)
        for name, examples in (("best", best), ("worst", worst)):
            parts.append(tag("h3", f"{way}: {name}"))
            items = [_example(examples, i, queries, gallery) for i in range(len(examples.query))]
            parts.append(tag("ul", *items, class_="examples", id=f"{name}-{direction}"))
    return parts, problems


def _example(
    examples: Examples, i: int, queries: Mapping[int, View], gallery: Mapping[int, View]
) -> Markup:
    query = tag(
        "div",
        tag("span", f"rank {examples.rank[i]:,.10g}", class_="rank"),
        tag("span", *queries[int(examples.query[i])].show(), class_="item query"),
    )
    columns = (examples.found[i], examples.score[i], examples.true[i])
    shown = list(zip(*(column.tolist() for column in columns), strict=True))
    if not examples.true[i].any():
        shown.append((int(examples.own[i]), float(examples.own_score[i]), True))
    items = [_item(gallery[row], score, own=own) for row, score, own in shown]
    return tag("li", query, tag("ol", *items))


def _item(view: View, score: float, *, own: bool) -> Markup:
    cosine = tag("span", f"{score:.3f}", class_="score")
    return tag("li", *view.show(), " ", cosine, class_="item own" if own else "item")
