"""Where items come from: a source has parts in a fixed order, and reads one part at a time."""

from __future__ import annotations

import abc
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Columns", "Record", "Source", "field_of", "fingerprint"]

MODALITIES = ("image", "text")


class Record(NamedTuple):
    """One item of a source.

    Attributes:
        id: of the item; several texts may have the id of one image.
        item: the bytes of an image file, the path of one, or a text; None if it cannot be had.
        reason: why it cannot be had, in the form ``kind of problem: details``.
    """

    id: str
    item: bytes | Path | str | None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Columns:
    """What the columns (fields, members) of a source are called; None takes the usual names.

    Attributes:
        id: of the id. Without one it is the path of the image, without suffix; else the row.
        image: of the image.
        caption: of the text.
    """

    id: str | None = None
    image: str | None = None
    caption: str | None = None


class Source(abc.ABC):
    """Items of one modality.

    Args:
        path: as the user gave it.
        kind: which class of source, as ``kind=`` names it.
        modality: ``"image"`` or ``"text"``.
        parts: a name for each part, in their order.
        contents: a digest of what the source holds, as far as it can be told without reading all.
        columns: as the user gave them.

    Raises:
        ValueError: an unknown modality.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        modality: str,
        parts: Iterable[str],
        contents: str,
        columns: Columns,
    ):
        if modality not in MODALITIES:
            raise ValueError(f"modality must be 'image' or 'text', got {modality!r}")
        self.path, self.kind, self.modality = path, kind, modality
        self.parts = tuple(parts)
        self.columns = columns
        self._contents = contents

    @abc.abstractmethod
    def read(self, part: int) -> Iterator[Record]:
        """The records of one part, in order, the same each time.

        Raises:
            ValueError: the part cannot be read at all; names the file.
            OSError: the same.
        """

    def rows(self, part: int) -> int | None:
        """Records of a part, where their number is known without reading it."""
        del part
        return None

    def settings(self) -> dict[str, Any]:
        """What tells this source from another one, as JSON takes it."""
        return {
            "path": self.path,
            "kind": self.kind,
            "modality": self.modality,
            "parts": len(self.parts),
            "columns": dataclasses.asdict(self.columns),
            "contents": self._contents,
        }


def fingerprint(values: Iterable[Any]) -> str:
    """A digest of values that JSON takes or `str` tells apart, in their order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(str(value).encode("utf-8", errors="surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def field_of(row: Mapping[str, Any], name: str) -> Any:
    """A field of a nested record: ``captions.text`` is each caption's text; None if absent.

    Args:
        row: the record.
        name: of the field; a name that has a dot itself is found as it is.

    Returns:
        The value, a list where there is a list on the way.
    """
    if name in row:
        return row[name]
    first, dot, rest = name.partition(".")
    if not dot or first not in row:
        return None
    inner = row[first]
    if isinstance(inner, Mapping):
        return field_of(inner, rest)
    if isinstance(inner, list | tuple):
        return [field_of(one, rest) for one in inner if isinstance(one, Mapping)]
    return None
