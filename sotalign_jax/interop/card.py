"""A model card: what an aligner is, what it was made of, what it reached, how it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sotalign_jax.interop.heads import LOADER

__all__ = ["model_card"]

_RECALLS = tuple(f"{side}recall@{k}" for side in ("t2i/", "i2t/", "mean_") for k in (1, 5, 10))
_FEATURES = ("encoder", "pooling", "normalized", "dim", "source", "licence")


def model_card(
    document: Mapping[str, Any],
    results: Mapping[str, Any] | None = None,
    *,
    name: str = "aligner",
    changed: Mapping[str, Any] | None = None,
    loader: bool = True,
) -> str:
    """The card of a saved aligner, as Markdown with a header that model hubs read.

    Args:
        document: what its ``aligner.json`` holds.
        results: what ``results.json`` of its run holds; None where there is none.
        name: the title.
        changed: fields of the run's configuration that are not default, by name.
        loader: show how PyTorch loads it, for a folder of `export_heads`.

    Returns:
        The text; it states nothing that was not given.
    """
    metadata = document.get("metadata") or {}
    config = metadata.get("config") or {}
    kind = document.get("kind") or _method(config, trained="step" in metadata)
    lines = [
        "---",
        "library_name: sotalign_jax",
        "pipeline_tag: feature-extraction",
        "tags: [image-text-alignment, retrieval, sotalign]",
        "---",
        "",
        f"# {_line(name)}",
        "",
        f"Maps features of two frozen encoders, images of {document['image_dim']} columns and "
        f"texts of {document['text_dim']}, into one space of {document['dim']}. It holds no "
        "encoder: rows must come from the same two, pooled in the same way.",
        "",
        "## Features",
        "",
        *_features(metadata.get("features") or {}),
        "",
        "## Training",
        "",
        f"- method: {_line(kind)}" if kind else "- method: not recorded",
        f"- data: {_line(metadata.get('data') or 'not recorded')}",
    ]
    if results and "pairs" in results:
        lines.append(f"- pairs: {results['pairs']:,}; step selected: {results['selected_step']:,}")
    if "seed" in config:
        lines.append(f"- seed: {config['seed']}")
    lines.append(f"- written by sotalign_jax {document.get('sotalign_jax', 'of unknown version')}")
    if changed:
        lines += ["", "Fields of the configuration that are not default:", "", "```"]
        lines += [f"{field} = {json.dumps(value)}" for field, value in changed.items()]
        lines += ["```"]
    lines += ["", "## Held-out retrieval", "", *_scores(results or {})]
    lines += ["", "## Forward pass", "", "```", *document["recipe"].split("; "), "```"]
    if loader:
        lines += [
            "",
            "## Loading it with PyTorch",
            "",
            "```python",
            LOADER.rstrip(),
            "",
            'image_head, text_head = Head(".", "image"), Head(".", "text")',
            "similarity = image_head(image_features) @ text_head(text_features).T",
            "```",
        ]
    return "\n".join(lines) + "\n"


def _method(config: Mapping[str, Any], trained: bool) -> str:
    """In words; a teacher is saved with the configuration of the run that it is for."""
    if not config:
        return ""
    teacher = config["teacher"]["name"]
    if not trained:
        return f"the linear teacher alone, {teacher}"
    return (
        f"{config['objective']}, teacher {teacher}, layers from a {config['model']['init']} start"
    )


def _features(features: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of what is known of the features that it was trained on."""
    known = [
        name for name in _FEATURES if any(f.get(name) not in (None, "") for f in features.values())
    ]
    if not known:
        return ["Not recorded."]
    rows = [f"| | {' | '.join(known)} |", f"|{' --- |' * (len(known) + 1)}"]
    for side, values in features.items():
        cells = [_cell(values.get(name)) for name in known]
        rows.append(f"| {side} | {' | '.join(cells)} |")
    return rows


def _scores(results: Mapping[str, Any]) -> list[str]:
    splits = [name for name in ("val", "test") if name in results]
    if not splits:
        return ["Not recorded."]
    lines = ["In percent; `mean` is of both directions.", ""]
    lines += [f"| | {' | '.join(_RECALLS)} |", f"|{' --- |' * (len(_RECALLS) + 1)}"]
    for split in splits:
        counts = f"{results[split]['n_images']:g} images, {results[split]['n_texts']:g} texts"
        for key, label in (
            (split, f"{split}: {counts}"),
            (f"teacher_{split}", "its teacher alone"),
        ):
            if key in results:
                cells = [f"{100 * results[key][name]:.1f}" for name in _RECALLS]
                lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def _cell(value: Any) -> str:
    if value in (None, ""):
        return "unknown"
    return _line({True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value)


def _line(value: Any) -> str:
    """On one line, and harmless in a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
