"""What ``sotalign data list | describe | captions | prompts | labels`` do, and their flags.

And those by which ``sotalign evaluate`` is by a protocol.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sotalign_jax import commands, encode_commands, protocols
from sotalign_jax.captions import CAPTIONS, write_captions
from sotalign_jax.encoders.sources import open_source
from sotalign_jax.encoders.sources.rows import RowSource
from sotalign_jax.files import check_absent, replace_text_parts
from sotalign_jax.protocol_commands import run_protocol
from sotalign_jax.recipes import RECIPES, find_recipe
from sotalign_jax.training.metrics import make_console

__all__ = ["WORDS", "captions", "data", "describe", "evaluate", "labels", "list_data", "prompts"]

_ANNOTATIONS = flags.DEFINE_string("annotations", None, "Annotation file of a data set.")
_JSON = flags.DEFINE_bool("json", False, "Print JSON.")
_VARIANT = flags.DEFINE_string("variant", None, "Of DreamLIP, which of its captions.")
_URLS = flags.DEFINE_string("urls", None, "Of DreamLIP, the table of CC3M with its links.")
_CLASSNAMES = flags.DEFINE_string("classnames", None, "Class names, one a line, or a JSON list.")
_PROTOCOL = flags.DEFINE_string(
    "protocol", None, "Evaluate by this protocol; see docs/protocols.md."
)
_LABEL = flags.DEFINE_string("label", "label", "Column or feature that has the label of an image.")
_LABELS = flags.DEFINE_string("labels", None, "Labels of images: CSV or JSON lines, id and label.")

_USAGE = (
    "write sotalign data list | describe NAME | captions NAME --annotations=FILE --out=FILE.jsonl "
    "| prompts NAME --out=FILE.jsonl | labels PATH --out=FILE.jsonl"
)


def evaluate(workdir: str) -> dict[str, Any]:
    """By the flags: `commands.evaluate`, or with ``--protocol`` `run_protocol`."""
    image, text, out = (flags.FLAGS[name].value for name in ("image", "text", "out"))
    if _PROTOCOL.value is not None:
        return run_protocol(workdir, _PROTOCOL.value, image, text, out, _LABELS.value)
    if _LABELS.value is not None:
        raise ValueError("--labels: needs --protocol, one of zero-shot classification")
    return commands.evaluate(workdir, image, text, out)


def data(words: Sequence[str]) -> None:
    """The command by its words and flags."""
    match list(words):
        case ["list"]:
            list_data(as_json=_JSON.value)
        case ["describe", name]:
            describe(name, as_json=_JSON.value)
        case ["captions", name]:
            annotations = commands.needed("annotations")
            captions(name, annotations, commands.needed("out"), _VARIANT.value, _URLS.value)
        case ["prompts", name]:
            prompts(name, commands.needed("out"), _CLASSNAMES.value)
        case ["labels", path]:
            labels(path, commands.needed("out"), _LABEL.value, **encode_commands.source_options())
        case _:
            raise ValueError(_USAGE)


def list_data(*, as_json: bool = False, console: Console | None = None) -> None:
    """All data sets, the protocols on each, and what captions can be read of."""
    console = console or make_console()
    if as_json:
        _print_json(console, [recipe.to_dict() for recipe in RECIPES.values()])
        return
    table = Table(title="sotalign data describe NAME", title_justify="left")
    for head in ("name", "data", "protocols", "used for"):
        table.add_column(head, overflow="fold")
    for recipe in RECIPES.values():
        named = ", ".join(recipe.protocols)
        table.add_row(recipe.name, escape(recipe.title), named, escape(recipe.used_for))
    console.print(table)
    commands.say(console, f"captions are read of: {', '.join(CAPTIONS)}")


def describe(name: str, *, as_json: bool = False, console: Console | None = None) -> None:
    """One data set: source, licence, counts, files, traps and commands."""
    console = console or make_console()
    recipe = find_recipe(name)
    if as_json:
        _print_json(console, recipe.to_dict())
        return
    table = Table(title=escape(recipe.title), title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    facts = {
        "source": recipe.source,
        "licence": recipe.licence,
        "unverified": recipe.unverified,
        "used for": recipe.used_for,
        "tensorflow-datasets": recipe.tfds,
        "files": "\n".join(recipe.files),
        "protocols": "\n".join(f"{one}: {protocols.find(one).expected}" for one in recipe.protocols)
        or "none: data to train on",
        "traps": "\n".join(f"- {trap}" for trap in recipe.traps),
    }
    for label, text in facts.items():
        if text:
            table.add_row(label, escape(text))
    console.print(table)
    counts = Table("split", show_edge=False)
    for head in ("images", "texts"):
        counts.add_column(head, justify="right")
    counts.add_column("")
    for split in recipe.splits:
        numbers = ["" if n is None else f"{n:,}" for n in (split.images, split.texts)]
        counts.add_row(split.name, *numbers, escape(split.remark))
    console.print(counts)
    for command in (*recipe.prepare, *recipe.commands):
        commands.say(console, command)


def captions(
    name: str,
    annotations: str,
    out: str,
    variant: str | None = None,
    urls: str | None = None,
    console: Console | None = None,
) -> None:
    """Write the table of captions of a data set's annotation file."""
    records, texts = write_captions(name, annotations, out, variant=variant, urls=urls)
    commands.say(console or make_console(), f"{records:,} records with {texts:,} captions: {out}")


def prompts(
    name: str, out: str, classnames: str | None = None, console: Console | None = None
) -> None:
    """Write the prompts of a zero-shot data set, a line each."""
    check_absent(out, what="file")
    names, source = protocols.class_names(name, classnames)
    lines = [
        json.dumps({"id": key, "caption": caption}) + "\n"
        for key, caption in protocols.prompts(name, names)
    ]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    replace_text_parts(out, lines)
    commands.say(
        console or make_console(),
        f"{len(lines):,} prompts, {len(protocols.templates(name))} of each of {len(names):,} "
        f"classes (names from {source}): {out}",
    )


def labels(
    path: str,
    out: str,
    label: str = "label",
    console: Console | None = None,
    **options: Any,
) -> int:
    """Write the labels of a table's or data set's images, by the ids that `encode` gives them.

    Args:
        path: as ``--images`` of ``sotalign encode`` takes it: a table, or a data set of
            tensorflow-datasets or Hugging Face.
        out: JSON lines ``{"id", "label"}``.
        label: the column or feature.
        console: where to report.
        options: of `open_source`.

    Returns:
        The number of labels.

    Raises:
        ValueError: ``out`` exists, no such source or column, or a label that is neither text nor a
            whole number.
    """
    check_absent(out, what="file")
    source = open_source(path, "image", **options)
    if not isinstance(source, RowSource):
        raise ValueError(f"{path}: is read as {source.kind}, which has no columns of labels")
    lines = []
    for name, value in source.values(label):
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
            raise ValueError(f"{path}: {label} of {name!r} is {value!r}; must be text or a number")
        lines.append(json.dumps({"id": name, "label": value}, ensure_ascii=False) + "\n")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    replace_text_parts(out, lines)
    commands.say(console or make_console(), f"{len(lines):,} labels: {out}")
    return len(lines)


def _print_json(console: Console, value: Any) -> None:
    commands.say(console, json.dumps(value, indent=2, ensure_ascii=False))


# By the command's name, for `main`.
WORDS = {"data": data}
