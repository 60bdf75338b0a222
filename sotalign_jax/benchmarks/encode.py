"""How fast `sotalign encode` is, against the loop that one would write without it.

``python -m sotalign_jax.benchmarks.encode --encoder=NAME --texts=PATH`` (or ``--images=PATH``; by
default the captions of the embedded data) encodes the same items in several ways: in a loop, where
one process reads, prepares and encodes batch after batch in the order of the source, with PyTorch;
and by `sotalign_jax.encoders.extract`, with each backend. The table tells rows per second from
start to end, files written, workers started; not the loading of the model and, with torchax, not
its compilation, which a first run does. It also tells the smallest cosine of a row with that of the
loop. Measure on an idle machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from sotalign_jax.encode_commands import load
from sotalign_jax.encoders.extract import extract
from sotalign_jax.encoders.sources import Source, open_source
from sotalign_jax.encoders.towers import load_encoder
from sotalign_jax.encoders.workers import Workers
from sotalign_jax.features import open_store
from sotalign_jax.features.embedded import emoji_metadata, openclipart_metadata
from sotalign_jax.files import replace_text

__all__ = ["WAYS", "main", "run", "write_captions"]

WAYS = ("loop", "torch", "torchax")


def write_captions(path: str | os.PathLike) -> None:
    """The captions of the embedded data, 6,420 of them, as ``.jsonl``."""
    emoji = emoji_metadata()
    columns = (emoji["label"], emoji["label_tags"], openclipart_metadata()["text"])
    with open(path, "w", encoding="utf-8") as file:
        for number, caption in enumerate(itertools.chain(*columns)):
            file.write(json.dumps({"id": str(number), "caption": str(caption)}) + "\n")


def run(
    source: Source,
    name: str,
    *,
    ways: Sequence[str] = WAYS,
    batch_size: int = 64,
    workers: int | None = None,
    workdir: str | os.PathLike,
) -> dict[str, Any]:
    """Encode a source in several ways.

    Args:
        source: of images or texts.
        name: of the encoder, as for `load_encoder`; no function.
        ways: of `WAYS`; the first is what the others are compared with.
        batch_size: items that go through the model at once.
        workers: processes that prepare items, of all but the loop; by default as `extract` has it.
        workdir: directory that the stores are written to.

    Returns:
        A JSON-able dict: ``rows``; of each way ``seconds``; and ``cosine``, the smallest of a row
        with that of the first way.

    Raises:
        ValueError: an unknown way, or what `load_encoder` and `extract` raise.
    """
    if unknown := [way for way in ways if way not in WAYS]:
        raise ValueError(f"ways: there is no {unknown[0]!r}; there are {', '.join(WAYS)}")
    seconds: dict[str, float] = {}
    cosine: dict[str, float] = {}
    first: np.ndarray | None = None
    for way in ways:
        home = pathlib.Path(workdir) / way
        home.mkdir(parents=True)
        if way == "loop":
            rows, seconds[way] = _loop(source, name, batch_size)
        else:
            encoder, at_once = load(name, source.modality, batch_size, {"backend": way})
            for target in ("compiled", "timed") if way == "torchax" else ("timed",):
                start = time.perf_counter()
                extract(
                    source,
                    encoder,
                    home / target,
                    dtype="float32",
                    batch_size=at_once,
                    workers=workers,
                )
                seconds[way] = time.perf_counter() - start
            rows = open_store(home / "timed").array()
        first = rows if first is None else first
        if rows.shape != first.shape:
            raise ValueError(f"ways: {way} gives rows of {rows.shape}, {ways[0]} of {first.shape}")
        cosine[way] = _smallest_cosine(rows, first)
    return {
        "rows": 0 if first is None else len(first),
        "encoder": name,
        "seconds": seconds,
        "cosine": cosine,
    }


def _loop(source: Source, name: str, batch_size: int) -> tuple[np.ndarray, float]:
    """Rows as a plain loop makes them, and how long it took."""
    encoder = load_encoder(name, source.modality, backend="torch", batch_size=batch_size)
    start = time.perf_counter()
    with Workers(encoder.preprocess, source.modality, 0) as prepare:
        records = itertools.chain.from_iterable(map(source.read, range(len(source.parts))))
        items = (one.inputs for one in prepare.prepare(records, batch_size))
        good = (one for one in items if one is not None)
        rows = [encoder.encode(batch) for batch in _batches(good, batch_size)]
    return np.concatenate(rows), time.perf_counter() - start


def _batches(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    items = iter(items)
    return iter(lambda: list(itertools.islice(items, size)), [])


def _smallest_cosine(rows: np.ndarray, others: np.ndarray) -> float:
    a, b = rows.astype(np.float64), others.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return float(((a * b).sum(axis=1) / norms).min())


def _table(report: dict[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("seconds", "rows/s", "times the first", "smallest cosine"):
        table.add_column(name, justify="right")
    base = next(iter(report["seconds"].values()))
    for way, seconds in report["seconds"].items():
        rate = f"{report['rows'] / seconds:,.1f}"
        cosine = f"{report['cosine'][way]:.7f}"
        table.add_row(way, f"{seconds:.1f}", rate, f"{base / seconds:.2f}", cosine)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: encode, print one table, and with ``--json`` write the numbers.

    Args:
        arguments: command-line arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sotalign_jax.benchmarks.encode",
        description="Rows per second of `sotalign encode`, against a plain loop.",
    )
    parser.add_argument("--encoder", default="packaged:all-minilm-l6-v2", help="a name or a path")
    items = parser.add_mutually_exclusive_group()
    items.add_argument("--images", help="folder, table or archives; see docs/encode.md")
    items.add_argument("--texts", help="likewise; by default the embedded captions")
    parser.add_argument("--ways", default=",".join(WAYS), help="the first is compared with")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, help="processes that prepare items")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.resolve().parent}")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            path, modality = options.images or options.texts, "image" if options.images else "text"
            if path is None:
                path = os.path.join(temporary, "captions.jsonl")
                write_captions(path)
            report = run(
                open_source(path, modality),
                options.encoder,
                ways=options.ways.split(","),
                batch_size=options.batch_size,
                workers=options.workers,
                workdir=pathlib.Path(temporary) / "stores",
            )
    except (ValueError, OSError, ImportError) as error:
        parser.error(str(error))
    device = jax.devices()[0].device_kind
    load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    title = (
        f"{report['rows']:,} {modality}s, {options.encoder}, on {device}, {os.cpu_count()} CPUs, "
        f"load average {'unknown' if load_average is None else f'{load_average:.1f}'}"
    )
    Console(width=max(120, Console().width)).print(_table(report, title))
    if options.json is not None:
        report |= {"device": device, "load_average": load_average, "jax": jax.__version__}
        replace_text(options.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
