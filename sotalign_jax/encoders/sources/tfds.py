"""Data sets that tensorflow-datasets wrote as ArrayRecord, which it reads without TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sotalign_jax.encoders.sources.arrow import choose_split
from sotalign_jax.encoders.sources.base import Columns, fingerprint
from sotalign_jax.encoders.sources.rows import RowSource

__all__ = ["TfdsSource"]

_NAME = re.compile(r"tfds:(?P<name>[^:/]+)(:(?P<config>[^/]+))?(/(?P<split>.+))?")


class TfdsSource(RowSource):
    """One split of a prepared data set; nothing is downloaded.

    Args:
        path: ``tfds:NAME[:CONFIG][/SPLIT]``, looked for where tensorflow-datasets keeps its data,
            or the directory of a version, as in ``coco_captions/2014/1.1.0``.
        modality: ``"image"`` or ``"text"``.
        split: which; None where there is one, or the path names it.
        columns: what they are called.
        rows_per_part: rows of each part but the last.

    Raises:
        ImportError: tensorflow-datasets is not installed.
        ValueError: no such data set, not prepared, not as ArrayRecord, or a column is missing.
    """

    def __init__(
        self, path: str, modality: str, split: str | None, columns: Columns, rows_per_part: int
    ):
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise ImportError(f"{path}: install the extra, sotalign-jax[tfds]") from error
        builder, named = _builder(tfds, path)
        if split is not None and named is not None and split != named:
            raise ValueError(f"split: {split!r}, but {path} names {named!r}")
        split = choose_split(path, list(builder.info.splits), split or named)
        # In an order of their own: that of a record varies from process to process.
        names = dict(sorted(builder.info.features.items()))
        # Files of images as they are: they are decoded where those of other sources are.
        skip = {
            name: tfds.decode.SkipDecoding()
            for name, feature in names.items()
            if isinstance(feature, tfds.features.Image)
        }
        image = columns.image or "image"
        if modality == "image" and image in names and image not in skip:
            raise ValueError(f"{path}: column {image!r} is {names[image]}, which is no Image")
        self._name = path
        try:
            self._rows = builder.as_data_source(split=split, decoders=skip)
        except (NotImplementedError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: not stored as ArrayRecord, which is what can be read without TensorFlow; "
                "prepare it again by tfds.builder(NAME, file_format='array_record')"
                f".download_and_prepare() ({str(error).splitlines()[0][:120]})"
            ) from None
        super().__init__(
            path,
            "tfds",
            modality,
            rows=len(self._rows),
            names=tuple(names),
            paths=(),
            folder=Path(builder.data_dir),
            contents=fingerprint([builder.info.full_name, split, len(self._rows), *names]),
            columns=columns,
            rows_per_part=rows_per_part,
        )

    def _read_rows(self, part: int, start: int, stop: int) -> Iterator[Mapping[str, Any] | str]:
        for number in range(start, stop):
            try:
                row = self._rows[number]
            except (ValueError, IndexError, RuntimeError, OSError) as error:
                raise ValueError(
                    f"{self._name}: row {number} cannot be read ({str(error).splitlines()[0]})"
                ) from None
            yield {name: _plain(value) for name, value in row.items()}


def _plain(value: Any) -> Any:
    """NumPy's scalars and arrays of strings as what other tables hold."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def _builder(tfds: Any, path: str) -> tuple[Any, str | None]:
    """The builder of a prepared data set, and the split that the path names."""
    if not path.startswith("tfds:"):
        try:
            return tfds.builder_from_directory(path), None
        except Exception as error:  # tfds, etils and protobuf each have their own
            raise ValueError(
                f"{path}: not a data set that tensorflow-datasets wrote; give the directory that "
                f"has dataset_info.json and features.json ({_first_line(error)})"
            ) from None
    match = _NAME.fullmatch(path)
    if match is None:
        raise ValueError(f"{path}: must be tfds:NAME[:CONFIG][/SPLIT]")
    name = match["name"] + (f"/{match['config']}" if match["config"] else "")
    try:
        builder = tfds.builder(name)
    except Exception as error:
        raise ValueError(
            f"{path}: tensorflow-datasets cannot load {name} ({_first_line(error)}); if it is "
            "prepared, give the directory of its version, as in coco_captions/2014/1.1.0"
        ) from None
    if not builder.info.splits:
        raise ValueError(
            f"{path}: not prepared in {builder.data_dir}; run tfds.builder({name!r}, "
            "file_format='array_record').download_and_prepare()"
        )
    return builder, match["split"]


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
