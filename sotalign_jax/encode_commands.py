"""What ``sotalign encode`` does, and its flags."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from absl import flags
from rich.console import Console

from sotalign_jax.commands import say
from sotalign_jax.encoders.base import Encoder
from sotalign_jax.encoders.callables import load_callable
from sotalign_jax.encoders.extract import (
    Interrupted,
    Progress,
    Summary,
    check_request,
    extract,
)
from sotalign_jax.encoders.sources import KINDS, Columns, Source, open_source
from sotalign_jax.features.store import DTYPES
from sotalign_jax.training.distributed import use_own_host
from sotalign_jax.training.metrics import ProgressBar, make_console

__all__ = ["WORDS", "encode", "source_options"]

_IMAGES = flags.DEFINE_string("images", None, "Folder, table, archives or data set of images.")
_TEXTS = flags.DEFINE_string("texts", None, "Table, text file, archives or data set of captions.")
_ENCODER = flags.DEFINE_string("encoder", None, "Name, path or MODULE:FUNCTION of an encoder.")
_OPTION = flags.DEFINE_multi_string("option", [], "NAME=VALUE, an option of the encoder.")
_DTYPE = flags.DEFINE_enum("dtype", "float16", list(DTYPES), "Number format of the features.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Items that are encoded at once.")
_WORKERS = flags.DEFINE_integer("workers", None, "Processes that decode and preprocess.")
_ROWS_PER_SHARD = flags.DEFINE_integer("rows_per_shard", 65_536, "Rows of a part of the work.")
_SHARDS = flags.DEFINE_string("shards", None, "a:b, the parts a .. b-1, of several processes.")
_KIND = flags.DEFINE_enum("kind", None, KINDS, "What --images or --texts is; else it is found.")
_COLUMN = flags.DEFINE_multi_string("column", [], "id:NAME, image:NAME or caption:NAME.")
_SPLIT = flags.DEFINE_string("split", None, "Of a data set that has several.")
_QUOTED = flags.DEFINE_bool("quoted", True, "Whether fields of CSV and TSV may be quoted.")
_BACKGROUND = flags.DEFINE_string("background", None, "R,G,B behind what is transparent.")
_LICENCE = flags.DEFINE_string("licence", "", "Of the images or texts, for the manifest.")

_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
# Batches of texts that are sorted by length together.
_TEXT_BATCHES = 16
_LEFT = 75  # EX_TEMPFAIL of sysexits.h
_CTRL_C = 130  # as shells say it
# Between two lines of a log that say how fast a part is encoded.
_SECONDS_A_LINE = 60.0
# A share of items left out that is said aloud.
_LOUD = 0.01


def encode(words: Sequence[str], console: Console | None = None) -> int:
    """The command by its flags; the exit status."""
    if words:
        raise ValueError(f"{words[0]}: unexpected; flags are written --name=value")
    images, texts, out = _IMAGES.value, _TEXTS.value, flags.FLAGS.out
    if (images is None) == (texts is None):
        raise ValueError("--images, --texts: give one of them")
    if _ENCODER.value is None or out is None:
        raise ValueError(f"--{'encoder' if out else 'out'}: this command needs it")
    console = console or make_console()
    modality = "text" if images is None else "image"
    shards, background = _range(_SHARDS.value), _colour(_BACKGROUND.value)
    if background is not None and images is None:
        raise ValueError("--background: is of images")
    options = _options(_OPTION.value)
    source = open_source(images or texts or "", modality, **source_options())
    # Before an encoder of some gigabytes is read.
    check_request(source, out, batch_size=_BATCH_SIZE.value, workers=_WORKERS.value, shards=shards)
    use_own_host()
    encoder, at_once = load(_ENCODER.value, modality, _BATCH_SIZE.value, options)
    try:
        with _progress(console, source, shards) as progress:
            summary = extract(
                source,
                encoder,
                out,
                dtype=_DTYPE.value,
                batch_size=at_once,
                workers=_WORKERS.value,
                shards=shards,
                licence=_LICENCE.value,
                background=background,
                progress=progress,
            )
    except Interrupted as stop:
        say(console, f"sotalign encode: {stop}")
        return _LEFT
    except KeyboardInterrupt:
        say(console, "sotalign encode: stopped; the same command goes on")
        return _CTRL_C
    tell(console, summary, modality)
    return 0


def source_options() -> dict[str, Any]:
    """How a source is opened, by the flags."""
    return {
        "kind": _KIND.value,
        "columns": _columns(_COLUMN.value),
        "split": _SPLIT.value,
        "rows_per_shard": _ROWS_PER_SHARD.value,
        "quoted": _QUOTED.value,
    }


def load(name: str, modality: str, batch_size: int, options: dict[str, Any]) -> tuple[Encoder, int]:
    """The encoder of that name, and how many items to hand it at once."""
    if _CALLABLE.fullmatch(name) and not name.startswith(("timm:", "packaged:")):
        return load_callable(name, modality, **options), batch_size
    load_encoder = importlib.import_module("sotalign_jax.encoders.towers").load_encoder
    options = {"batch_size": batch_size} | options
    known = [n for n in inspect.signature(load_encoder).parameters if n not in ("name", "modality")]
    if unknown := [n for n in options if n not in known]:
        raise ValueError(f"--option: there is no {unknown[0]!r}; there are {', '.join(known)}")
    # It sorts texts by their length, so that those that it pads together need little of it.
    at_once = batch_size * _TEXT_BATCHES if modality == "text" else batch_size
    return load_encoder(name, modality, **options), at_once


def tell(console: Console, summary: Summary, modality: str) -> None:
    """Say what was written, what was left out, and where the list is."""
    if summary.parts_left:
        done = f"{summary.rows:,} rows so far"
        say(console, f"{summary.parts_left} parts are left, {done}; the same command goes on")
        return
    if not summary.complete:
        say(console, "all parts are done; another process is putting the store together")
        return
    skipped = sum(summary.skipped.values())
    say(
        console,
        f"{summary.rows:,} {modality} rows, {summary.dim:,} columns, {skipped:,} items left out: "
        f"{summary.out}",
    )
    for reason, count in sorted(summary.skipped.items(), key=lambda item: -item[1]):
        say(console, f"  left out: {count:,} {reason}")
    if skipped:
        listed = summary.out.with_name(f"{summary.out.name}.skipped.jsonl")
        say(console, f"  each with its reason in {listed}")
    share = skipped / (skipped + summary.rows)
    if share > _LOUD:
        say(console, f"WARNING: {100 * share:.1f}% of the items were left out")


@contextmanager
def _progress(console: Console, source: Source, shards: tuple[int, int] | None) -> Iterator[Any]:
    """A bar of records, or of parts where nobody knows how many records there are."""
    parts = range(*(shards or (0, len(source.parts))))
    counts = [source.rows(part) for part in parts if part < len(source.parts)]
    known = [count for count in counts if count is not None]
    by_rows = len(known) == len(counts)
    total = sum(known) if by_rows else len(counts)
    unit = f"{source.modality}s" if by_rows else "parts"
    bar = ProgressBar(console, total, 0, unit=unit)
    started, shown, before = time.monotonic(), -1, None
    said = started

    def show(progress: Progress) -> None:
        nonlocal shown, before, said
        if before is None:
            before = progress.records
        if progress.records == before:
            return
        at, now = progress.records if by_rows else progress.parts, time.monotonic()
        # A part may take hours: in a log, too, it is to be seen that they are not spent in vain.
        if at == shown and not console.is_terminal and now - said < _SECONDS_A_LINE:
            return
        shown, said = at, now
        rate = (progress.records - before) / max(now - started, 1e-9)
        bar.update(at, {"time/rows_per_second": rate})

    try:
        yield show
    finally:
        bar.close()


def _columns(given: Sequence[str]) -> Columns:
    found: dict[str, str] = {}
    for one in given:
        role, colon, name = one.partition(":")
        if role not in ("id", "image", "caption") or not colon or not name:
            raise ValueError(f"--column: must be id:NAME, image:NAME or caption:NAME, got {one!r}")
        if role in found:
            raise ValueError(f"--column: gives {role} twice")
        found[role] = name
    return Columns(**found)


def _options(given: Sequence[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not name or not equals:
            raise ValueError(f"--option: must be NAME=VALUE, got {one!r}")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _range(given: str | None) -> tuple[int, int] | None:
    if given is None:
        return None
    first, colon, last = given.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise ValueError(f"--shards: must be a:b, as in 0:8, got {given!r}")
    return int(first), int(last)


def _colour(given: str | None) -> tuple[int, int, int] | None:
    if given is None:
        return None
    parts = given.split(",")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) < 256 for p in parts):
        raise ValueError(f"--background: must be R,G,B, as in 255,255,255; got {given!r}")
    red, green, blue = map(int, parts)
    return red, green, blue


WORDS = {"encode": encode}
