"""Archives in the layout of webdataset: the files of a sample lie together and share a name."""

from __future__ import annotations

import glob
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from tarfile import EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any

from sotalign_jax.encoders.sources.base import Columns, Record, Source, field_of, fingerprint
from sotalign_jax.encoders.sources.rows import caption_records, id_text

__all__ = ["SUFFIXES", "WebDatasetSource", "expand"]

SUFFIXES = (".tar", ".tar.gz", ".tgz")
_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "caption")
# The key is the path up to the first dot of the file's name, the rest says what the file is.
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)


class WebDatasetSource(Source):
    """Archives of samples; each is a part, and may be compressed by gzip.

    An image is a member with the suffix jpg, jpeg, png or webp; a text is one with txt or caption,
    else the field ``caption`` of the member json. The id is the key, the path up to the first dot
    of the file's name. A column that is named is looked for as a suffix first, then as a field.

    Args:
        path: as the user gave it.
        modality: ``"image"`` or ``"text"``.
        files: the archives, in their order.
        columns: what suffixes and fields are called.

    Raises:
        ValueError: no archives.
    """

    def __init__(self, path: str, modality: str, files: Sequence[Path], columns: Columns):
        self._files = tuple(files)
        if not files:
            raise ValueError(f"{path}: no archives ({', '.join(SUFFIXES)})")
        names = [file.name for file in files]
        if len(set(names)) < len(names):
            names = [str(file) for file in files]
        sizes = [file.stat().st_size for file in files]
        contents = fingerprint(zip(names, sizes, strict=True))
        super().__init__(path, "webdataset", modality, names, contents, columns)

    def read(self, part: int) -> Iterator[Record]:
        reading = _Reading(self._files[part], self._wanted)
        for key, members in reading:
            yield from self._records(key, members)
        if reading.problem:
            yield Record(f"after {reading.last or 'the start'}", None, reading.problem)

    def _wanted(self, suffix: str) -> bool:
        columns = self.columns
        if suffix == "json":
            return self.modality == "text" or columns.id is not None
        if self.modality == "image":
            return (
                suffix in ((columns.image,) if columns.image else _IMAGES) or suffix == columns.id
            )
        kinds = (columns.caption,) if columns.caption else _TEXTS
        return suffix in kinds or suffix == columns.id

    def _records(self, key: str, members: dict[str, bytes]) -> Iterator[Record]:
        fields: dict[str, Any] | None = None

        def field(name: str) -> Any:
            nonlocal fields
            if fields is None:
                fields = _json(members.get("json"))
            return field_of(fields, name)

        name, reason = key, ""
        if self.columns.id is not None:
            given = members.get(self.columns.id, field(self.columns.id))
            name, reason = id_text(given, 0)
            name = key if reason else name
        if reason:
            yield Record(name, None, reason)
        elif self.modality == "image":
            kinds = (self.columns.image,) if self.columns.image else _IMAGES
            found = next((members[kind] for kind in kinds if kind in members), None)
            missing = "" if found is not None else f"no image: no member {', '.join(kinds)}"
            yield Record(name, found, missing)
        else:
            kinds = (self.columns.caption,) if self.columns.caption else _TEXTS
            found = next((members[kind] for kind in kinds if kind in members), None)
            if found is None:
                found = field(self.columns.caption or "caption")
            yield from caption_records(name, found)


def _json(member: bytes | None) -> dict[str, Any]:
    try:
        value = json.loads(member or b"{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


class _Header(tarfile.TarInfo):
    """A header of an archive, which is told what ended it: `tarfile` itself forgets."""

    @classmethod
    def fromtarfile(cls, tarfile):
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            if isinstance(tarfile, _Archive):
                tarfile.ended_by = error
            raise


class _Archive(tarfile.TarFile):
    tarinfo = _Header
    ended_by: Exception | None = None


class _Reading:
    """The samples of one archive, as key and members by suffix; what is wrong with it at the end.

    Attributes:
        last: key of the last sample.
        problem: why the archive could not be read to its end.
    """

    def __init__(self, path: Path, wanted):
        self._path, self._wanted = path, wanted
        self.last, self.problem = "", ""

    def __iter__(self) -> Iterator[tuple[str, dict[str, bytes]]]:
        members: dict[str, bytes] = {}
        suffixes: set[str] = set()
        for key, suffix, data in self._members():
            # A file that the sample has already is of the next one, which has the same key.
            if key != self.last or suffix in suffixes:
                if self.last:
                    yield self.last, members
                self.last, members, suffixes = key, {}, set()
            suffixes.add(suffix)
            if data is not None:
                members[suffix] = data
        if self.last and (members or not self.problem):
            yield self.last, members

    def _members(self) -> Iterator[tuple[str, str, bytes | None]]:
        try:
            with self._opened() as archive:
                yield from self._files_of(archive)
                if not isinstance(archive.ended_by, EOFHeaderError):
                    self.problem = "broken archive: it ends without the mark of its end"
        except (tarfile.TarError, EOFError) as error:
            self.problem = f"broken archive: {error}"

    def _opened(self) -> _Archive:
        try:
            return _Archive.open(self._path, "r|*")
        except TypeError as error:  # as `tarfile` says that there are no more bytes
            raise tarfile.ReadError("the header of gzip breaks off") from error

    def _files_of(self, archive: tarfile.TarFile) -> Iterator[tuple[str, str, bytes | None]]:
        for member in archive:
            match = _NAME.fullmatch(member.name.removeprefix("./"))  # as of `tar -C FOLDER .`
            if not member.isfile() or match is None:
                continue
            key, suffix = match[1], match[2].lower()
            if key.startswith("__") and key.endswith("__"):
                continue  # what webdataset says about the archive
            file = archive.extractfile(member) if self._wanted(suffix) else None
            yield key, suffix, None if file is None else file.read()


def expand(pattern: str) -> list[str]:
    """The paths that braces stand for: ``a-{00..02}.tar`` is three, ``{a,b}.tar`` is two.

    Raises:
        ValueError: braces inside of braces.
    """
    if re.search(r"\{[^}]*\{", pattern):
        raise ValueError(f"{pattern}: braces inside of braces are not understood")
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inner = match[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        values = [f"{n:0{width}d}" for n in range(int(first), int(last) + 1)]
    else:
        values = inner.split(",")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for value in values for path in expand(before + value + after)]


def matching(pattern: str) -> list[Path]:
    """The files that braces and wildcards stand for.

    Raises:
        ValueError: a file that braces name is not there, or wildcards that match nothing.
    """
    found: list[Path] = []
    for path in expand(pattern):
        if glob.has_magic(path) and not Path(path).exists():
            matches = sorted(glob.glob(path, recursive=True))
            if not matches:
                raise ValueError(f"{path}: matches no files")
            found.extend(map(Path, matches))
        elif Path(path).is_file():
            found.append(Path(path))
        else:
            raise ValueError(f"{path}: no such file, though {pattern} names it")
    return found
