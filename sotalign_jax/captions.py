"""Tables of captions from the annotation files of data sets: ``{id, image, caption}``, a line each.

Such a table is what `sotalign encode` takes, of images and of texts alike, so that both come out
with ids that join. An image's id is its file's name without suffix, as a folder of images gives it;
of data that is a list of links, the number of the row in nine digits, which is the key that
img2dataset gives to what it downloads from that list in shards of 10,000. Captions of one image are
a list; white space around a caption is stripped.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from sotalign_jax.files import check_absent, replace_text_parts

__all__ = ["CAPTIONS", "CaptionTable", "read_captions_of", "write_captions"]

Record = dict[str, Any]
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class CaptionTable:
    """One split of one data set, as its authors give it.

    Attributes:
        name: what it is called on the command line.
        file: the annotation file it is read from.
        read: that file to records, given also the options of `write_captions`.
        records: how many come out: images, or rows of a list of links.
        captions: how many captions they have together.
        fewer: whether ``records`` and ``captions`` are upper bounds.
        folder: whether a directory of Parquet files will do as well.
    """

    name: str
    file: str
    read: Callable[[pathlib.Path, Mapping[str, str | None]], Iterator[Record]]
    records: int
    captions: int
    fewer: bool = False
    folder: bool = False


def read_captions_of(
    table: CaptionTable, annotations: str | os.PathLike, **options: str | None
) -> Iterator[Record]:
    """The records of an annotation file; their numbers are checked once all were read.

    Args:
        table: an entry of ``CAPTIONS``.
        annotations: its annotation file.
        **options: see `write_captions`.

    Yields:
        ``{"id", "image" or "url", "caption"}``.

    Raises:
        ValueError: not a file of that format, or another number of images or captions.
    """
    path = pathlib.Path(annotations)
    if not (path.is_file() or (table.folder and path.is_dir())):
        raise ValueError(
            f"annotations: {path}: no such file; {table.name} is read from {table.file}"
        )
    records = captions = 0
    try:
        for record in table.read(path, options):
            records += 1
            captions += len(record["caption"]) if isinstance(record["caption"], list) else 1
            yield record
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"annotations: {path}: not text in UTF-8 as {table.file}, unpacked ({error})"
        ) from None
    found, expected = (records, captions), (table.records, table.captions)
    if table.fewer and 0 < records <= table.records and captions <= table.captions:
        return
    if found != expected:
        raise ValueError(
            f"annotations: {path}: {records:,} records with {captions:,} captions, but "
            f"{table.name} has {'up to ' if table.fewer else ''}{table.records:,} with "
            f"{table.captions:,}; is it {table.file}, whole and of that split?"
        )


def write_captions(
    name: str,
    annotations: str | os.PathLike,
    out: str | os.PathLike,
    *,
    variant: str | None = None,
    urls: str | None = None,
) -> tuple[int, int]:
    """Writes the table of a data set.

    Args:
        name: a key of ``CAPTIONS``.
        annotations: its annotation file.
        out: the table, JSON lines; never written over.
        variant: of DreamLIP, which of its captions (default ``shortSV_captions``).
        urls: of DreamLIP, the table of CC3M: captions get the ids that their links have there, and
            are left out where it lacks them. By default ids are numbers of rows.

    Returns:
        How many records and how many captions.

    Raises:
        ValueError: an unknown name, a file that exists, an option of another data set, or as
            `read_captions_of`; nothing is then left under ``out``.
    """
    if name not in CAPTIONS:
        raise ValueError(f"captions: no {name!r}; there are {', '.join(CAPTIONS)}")
    if (variant is not None or urls is not None) and not name.startswith("dreamlip"):
        raise ValueError(f"--variant, --urls: are of dreamlip_cc3m, not of {name}")
    target = pathlib.Path(out)
    check_absent(target, what="file")
    counts = [0, 0]

    def lines() -> Iterator[str]:
        for record in read_captions_of(CAPTIONS[name], annotations, variant=variant, urls=urls):
            counts[0] += 1
            counts[1] += len(record["caption"]) if isinstance(record["caption"], list) else 1
            yield json.dumps(record) + "\n"

    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text_parts(target, lines())
    return counts[0], counts[1]


# ---- COCO and Flickr30k


def _coco(folder: str, most: int = 5) -> Callable[..., Iterator[Record]]:
    """COCO's own annotations: images by their ids, the first five (``most``) captions of each."""

    def read(path: pathlib.Path, options: Mapping[str, str | None]) -> Iterator[Record]:
        document = _json(path)
        try:
            files = {image["id"]: image["file_name"] for image in document["images"]}
            captions: dict[Any, list[str]] = {}
            for annotation in document["annotations"]:
                # In the order of the file, as pycocotools lists them.
                captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        except (KeyError, TypeError) as error:
            raise _not(path, "COCO captions: {images, annotations}", error) from None
        for number in sorted(files):
            if number in captions:
                yield _record(files[number], folder, captions[number][:most])

    return read


def _karpathy(splits: str, folder: str | None = None) -> Callable[..., Iterator[Record]]:
    """Karpathy's ``dataset_*.json``: all captions of the images of a split, in their order."""

    def read(path: pathlib.Path, options: Mapping[str, str | None]) -> Iterator[Record]:
        document = _json(path)
        try:
            for image in document["images"]:
                if image["split"] == splits:
                    captions = [sentence["raw"] for sentence in image["sentences"]]
                    yield _record(image["filename"], folder or image["filepath"], captions)
        except (KeyError, TypeError) as error:
            raise _not(path, "one of Karpathy's files: {images: [{split, ...}]}", error) from None

    return read


# ---- SUE's rows: one caption an image, the first 400 images for the test

_SUE_TEST = 400


def _flickr_tokens(test: bool) -> Callable[..., Iterator[Record]]:
    """``IMAGE.jpg#K``, a tab, a caption: the first caption of each image, in the file's order."""

    def read(path: pathlib.Path, options: Mapping[str, str | None]) -> Iterator[Record]:
        first: dict[str, str] = {}
        for number, line in enumerate(_lines(path), 1):
            name, tab, caption = line.rstrip("\r\n").partition("\t")
            file, mark, place = name.rpartition("#")
            if not (tab and mark and file and place.isdecimal()):
                raise ValueError(
                    f"annotations: {path}: line {number} is not IMAGE.jpg#K, a tab and a caption"
                )
            first.setdefault(file, caption)
        for file, caption in _part(first.items(), test):
            yield _record(file, "flickr30k-images", [caption])

    return read


def _coco_first(test: bool) -> Callable[..., Iterator[Record]]:
    """Of train2017 as many images as the paper has, by id, with the first caption of each."""

    def read(path: pathlib.Path, options: Mapping[str, str | None]) -> Iterator[Record]:
        rows = itertools.islice(_coco("train2017", 1)(path, options), _SUE_TEST + _SUE_COCO)
        yield from _part(rows, test)

    return read


# Of COCO: 10,000 unpaired items and 100 pairs, besides 400 for validation.
_SUE_COCO = 10_500


def _part(rows: Iterable[_T], test: bool) -> Iterator[_T]:
    return itertools.islice(rows, *((_SUE_TEST,) if test else (_SUE_TEST, None)))


# ---- lists of links


def _links(caption: int) -> Callable[..., Iterator[Record]]:
    """Two columns between a tab, a caption and a link; ``caption`` is the column of the first."""

    def read(path: pathlib.Path, options: Mapping[str, str | None]) -> Iterator[Record]:
        with open(path, encoding="utf-8", newline="\n") as lines:
            number = 0
            for line in lines:
                parts = line.rstrip("\r\n").split("\t")
                if len(parts) != 2:
                    raise ValueError(
                        f"annotations: {path}: line {number + 1} has {len(parts)} columns between "
                        "tabs, not a caption and a link"
                    )
                # The header that img2dataset needs may have been written into the file.
                if number == 0 and set(parts) == {"caption", "url"}:
                    continue
                yield _link(f"{number:09d}", parts[1 - caption], parts[caption])
                number += 1

    return read


_DREAMLIP = tuple(
    f"{length}{model}_captions" for model in ("IB", "SV", "LLA") for length in ("short", "long")
)


def _dreamlip(path: pathlib.Path, options: Mapping[str, str | None]) -> Iterator[Record]:
    """DreamLIP's synthetic captions beside their links."""
    column = options.get("variant") or "shortSV_captions"
    known = _ids_of_links(options["urls"]) if options.get("urls") else None
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        link = next((n for n in ("Image Path", "url") if n in (rows.fieldnames or ())), None)
        if link is None:
            raise ValueError(
                f"annotations: {path}: no column 'Image Path'; it has {rows.fieldnames}"
            )
        if column not in (rows.fieldnames or ()):
            raise ValueError(
                f"variant: {path} has no {column!r}; DreamLIP has raw_caption, "
                f"{', '.join(_DREAMLIP)}"
            )
        for number, row in enumerate(rows):
            if row[column] is None or row[link] is None:
                raise ValueError(f"annotations: {path}: row {number + 1} is cut short")
            name = f"{number:09d}" if known is None else known.get(row[link])
            if name is not None:
                yield _link(name, row[link], row[column])


def _ids_of_links(path: str | None) -> dict[str, str]:
    """Link -> id of a table that `write_captions` wrote."""
    found = {}
    try:
        with open(str(path), encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                found.setdefault(record["url"], record["id"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"urls: {path}: not a table of captions with links ({error})") from None
    return found


# ---- texts, and items of two


def _wikitext(path: pathlib.Path, options: Mapping[str, str | None]) -> Iterator[Record]:
    """WikiText's paragraphs: lines that are neither empty nor a heading."""
    for number, line in enumerate(_parquet_lines(path) if path.is_dir() else _lines(path)):
        text = line.strip()
        if text and not (text.startswith("= ") and text.endswith(" =")):
            yield {"id": f"{number:09d}", "caption": text}


def _lines(path: pathlib.Path) -> Iterator[str]:
    with open(path, encoding="utf-8", newline="\n") as lines:
        yield from lines


def _parquet_lines(folder: pathlib.Path) -> Iterator[str]:
    """The lines that the hub's Parquet files of the training split hold, a row each."""
    import pyarrow
    import pyarrow.parquet

    files = sorted(folder.glob("train-*.parquet"))
    if not files:
        raise ValueError(f"annotations: {folder}: has no train-*.parquet")
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as rows:
                for batch in rows.iter_batches(columns=["text"]):
                    yield from batch["text"].to_pylist()
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise ValueError(f"annotations: {file}: no Parquet file with texts ({error})") from None


def _winoground(path: pathlib.Path, options: Mapping[str, str | None]) -> Iterator[Record]:
    """Item k as images and captions ``k/0`` and ``k/1``."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(line for line in lines if line.strip()):
            try:
                item = json.loads(line)
                if item["id"] != number:
                    raise ValueError(f"id {item['id']}, not {number}")
                for part in (0, 1):
                    file = pathlib.PurePath(item[f"image_{part}"])
                    name = file.name if file.suffix else f"{file.name}.png"
                    record = _record(name, "images", [item[f"caption_{part}"]])
                    yield record | {"id": f"{number}/{part}"}
            except (KeyError, TypeError, ValueError) as error:
                raise _not(path, f"Winoground's examples.jsonl, line {number + 1}", error) from None


def _mmvp(path: pathlib.Path, options: Mapping[str, str | None]) -> Iterator[Record]:
    """Pair k, two questions one after the other, as images and captions ``k/0`` and ``k/1``."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file)
        next(rows, None)
        questions = [row for row in rows if row]
    for number, row in enumerate(questions):
        item, part = divmod(number, 2)
        if len(row) != 3 or not row[0].strip().isdecimal():
            raise ValueError(
                f"annotations: {path}: question {number + 1} is not a number, a type and a "
                "statement"
            )
        question, kind, statement = (cell.strip() for cell in row)
        if int(question) % 2 == part:
            raise ValueError(
                f"annotations: {path}: question {question} stands at place {number + 1}; a pair is "
                "an odd number and then an even one"
            )
        if kind != questions[item // 15 * 30][1].strip():
            raise ValueError(
                f"annotations: {path}: question {question} is of type {kind!r}, others of its "
                f"fifteen pairs of {questions[item // 15 * 30][1].strip()!r}"
            )
        record = _record(f"{question}.jpg", f"MLLM_VLM Images/{kind}", [f"a photo of {statement}"])
        yield record | {"id": f"{item}/{part}"}


def _record(file: str, folder: str, captions: list[str]) -> Record:
    texts = [caption.strip() for caption in captions]
    return {
        "id": pathlib.PurePosixPath(file).stem,
        "image": f"{folder}/{file}",
        "caption": texts[0] if len(texts) == 1 else texts,
    }


def _link(name: str, url: str, caption: str) -> Record:
    return {"id": name, "url": url, "caption": caption.strip()}


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"annotations: {path}: not JSON ({error})") from None


def _not(path: pathlib.Path, what: str, error: Exception) -> ValueError:
    return ValueError(f"annotations: {path}: not {what} ({type(error).__name__}: {error})")


_KARPATHY = "dataset_{}.json of Karpathy's caption_datasets.zip"
_COCO_FILE, _FLICKR_FILE = _KARPATHY.format("coco"), _KARPATHY.format("flickr30k")
_TOKENS = "results_20130124.token"
_SPLITS = {"train": (82_783, 414_113), "restval": (30_504, 152_634), "val": (5_000, 25_010)}
_FLICKR_SPLITS = {"train": 29_000, "val": 1_014, "test": 1_000}

CAPTIONS = {
    table.name: table
    for table in itertools.chain(
        (
            CaptionTable("coco_val2017", "captions_val2017.json", _coco("val2017"), 5_000, 25_000),
            CaptionTable(
                "coco_train2017", "captions_train2017.json", _coco("train2017"), 118_287, 591_435
            ),
        ),
        (
            CaptionTable(f"coco_karpathy_{split}", _COCO_FILE, _karpathy(split), *counts)
            for split, counts in (*_SPLITS.items(), ("test", (5_000, 25_010)))
        ),
        (
            CaptionTable(
                f"flickr30k_{split}",
                _FLICKR_FILE,
                _karpathy(split, "flickr30k-images"),
                images,
                5 * images,
            )
            for split, images in _FLICKR_SPLITS.items()
        ),
        (
            CaptionTable("cc3m_train", "Train_GCC-training.tsv", _links(0), 3_318_333, 3_318_333),
            CaptionTable(
                "cc3m_val", "Validation_GCC-1.1.0-Validation.tsv", _links(0), 15_840, 15_840
            ),
            CaptionTable("cc12m", "cc12m.tsv", _links(1), 12_423_374, 12_423_374),
            CaptionTable(
                "dreamlip_cc3m",
                "cc3m_3long_3short_1raw_captions_url.csv",
                _dreamlip,
                3_318_333,
                3_318_333,
                fewer=True,
            ),
            CaptionTable(
                "wikitext103",
                "wiki.train.raw",
                _wikitext,
                1_801_350,
                1_801_350,
                fewer=True,
                folder=True,
            ),
            CaptionTable("sue400_flickr30k", _TOKENS, _flickr_tokens(test=True), 400, 400),
            CaptionTable("sue_flickr30k", _TOKENS, _flickr_tokens(test=False), 31_383, 31_383),
            CaptionTable("sue400_coco", "captions_train2017.json", _coco_first(True), 400, 400),
            CaptionTable("sue_coco", "captions_train2017.json", _coco_first(False), 10_500, 10_500),
            CaptionTable("winoground", "examples.jsonl", _winoground, 800, 800),
            CaptionTable("mmvp", "Questions.csv", _mmvp, 270, 270),
        ),
    )
}
