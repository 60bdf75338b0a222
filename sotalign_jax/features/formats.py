"""Other people's feature files, opened as they are.

directory with manifest.json         a store of ours
directory with img_emb/, text_emb/   clip-retrieval
.npy                                 one array, memory-mapped
.npz                                 one of its arrays, ids from an array `ids`
.h5, .hdf5                           data set `embeddings`, ids from a data set `ids`
.safetensors                         one of its tensors, memory-mapped

Where a file holds several arrays, ``FILE:KEY`` names one of them, as in ``features.npz:image`` or
``features.h5:clip/text``.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterable

import numpy as np

from sotalign_jax.features.store import (
    BFLOAT16,
    MANIFEST,
    ArrayRows,
    FeatureTable,
    Manifest,
    MissingFileError,
    check_features,
    id_array,
    memory_map,
    open_store,
    to_float32,
)

__all__ = ["open_features", "split_key"]

SAFETENSORS_DTYPES = {
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
CLIP_FOLDERS = {"image": "img_emb", "text": "text_emb"}
# A colon after one of these suffixes begins a key; those of drive letters and of URLs do not.
KEYED = re.compile(r"\.(npz|h5|hdf5|safetensors|npy)(?=:)", re.IGNORECASE)


def open_features(
    path: str | os.PathLike,
    *,
    modality: str | None = None,
    key: str | None = None,
) -> FeatureTable:
    """Opens features in any format this package knows; see the list in the module's docstring.

    Nothing is read but headers and ids, except from ``.npz``, which cannot be read in part.

    In the clip-retrieval layout, shards ``img_emb/img_emb_N.npy`` or ``text_emb/text_emb_N.npy``
    are stacked in numeric order of N. Ids come from the column ``key`` of
    ``metadata/metadata_N.parquet``, else from ``image_path``; with neither, or without metadata,
    the rows have no ids and join by row order, as that layout means them.

    Args:
        path: a file or directory; ``FILE:KEY`` for one array of a ``.npz``, ``.h5`` or
            ``.safetensors`` file, unless a file of that whole name exists.
        modality: "image" or "text"; needed by the clip-retrieval layout, ignored by the others.
        key: the same name given for itself, with a path that is then taken as it stands. By
            default ``embeddings`` in HDF5 and the only 2-d floating array in the others.

    Returns:
        The rows, under the name of the path, with the key where there is one.

    Raises:
        MissingFileError: no such file or directory.
        ValueError: an unknown format, an unreadable file, no or several arrays to choose from,
            or an array that is not 2-d and floating. The message names the path.
    """
    if key is None:
        path, key = split_key(os.fspath(path))
    path = pathlib.Path(path)
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or directory")
    suffix = path.suffix.lower()
    if key is not None and (path.is_dir() or suffix == ".npy"):
        raise ValueError(f"key: {path} has no named arrays to choose {key!r} from")
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return open_store(path)
        if any((path / folder).is_dir() for folder in CLIP_FOLDERS.values()):
            return _open_clip_retrieval(path, modality)
        raise ValueError(f"{path}: neither a feature store nor a clip-retrieval directory")
    if suffix == ".npy":
        return FeatureTable.from_array(memory_map(path), name=str(path))
    if suffix == ".npz":
        return _open_npz(path, key)
    if suffix in (".h5", ".hdf5"):
        return _open_hdf5(path, key)
    if suffix == ".safetensors":
        return _open_safetensors(path, key)
    raise ValueError(
        f"{path}: unknown suffix {path.suffix!r}; known are .npy, .npz, .h5, .hdf5, "
        f".safetensors, and directories"
    )


def split_key(path: str) -> tuple[str, str | None]:
    """File and key of ``FILE:KEY``; the path as it is, and None, if it names no key."""
    splits = [(path[: m.end()], path[m.end() + 1 :]) for m in KEYED.finditer(path)]
    if not splits or os.path.exists(path):
        return path, None
    # Names of files may hold colons, and so may keys: the longest name that exists is the file.
    return next((s for s in reversed(splits) if os.path.exists(s[0])), splits[0])


def _choose(path: pathlib.Path, key: str | None, names: Iterable[str], fitting: list[str]) -> str:
    """The array to open: `key` if it exists, else the only fitting one, else an error."""
    listed = ", ".join(sorted(names)) or "none"
    if key is None:
        if len(fitting) != 1:
            count, hint = ("several", f", give one as {path}:KEY") if fitting else ("no", "")
            raise ValueError(f"{path}: {count} 2-d floating arrays{hint}; it holds: {listed}")
        return fitting[0]
    if key not in names:
        raise ValueError(f"{path}: no array {key!r}; it holds: {listed}")
    return key


def _open_npz(path: pathlib.Path, key: str | None) -> FeatureTable:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.files
            wanted = [name for name in names if key in (None, name) or name == "ids"]
            arrays = {name: file[name] for name in wanted}
    except Exception as error:  # zip, zlib and NumPy each have their own
        raise ValueError(f"{path}: not a readable .npz file ({error})") from None
    ids = arrays.pop("ids", None) if key != "ids" else None
    fitting = [name for name, a in arrays.items() if a.ndim == 2 and a.dtype.kind == "f"]
    key = _choose(path, key, names, fitting)
    return FeatureTable.from_array(arrays[key], ids=ids, name=f"{path}:{key}")


class _Hdf5Rows:
    """Rows of an HDF5 data set, read by slices and by sorted indices."""

    BLOCK = 16384

    def __init__(self, dataset, name: str):
        check_features(dataset.shape, dataset.dtype, name)
        self._dataset = dataset
        self.shape: tuple[int, int] = dataset.shape
        self.dtype: np.dtype = dataset.dtype

    def read(self, index: slice | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            return to_float32(self._dataset[index])
        # h5py wants indices that increase.
        rows, place = np.unique(index, return_inverse=True)
        out = np.empty((len(rows), self.shape[1]), np.float32)
        for block in np.unique(rows // self.BLOCK):
            low, high = np.searchsorted(rows, [block * self.BLOCK, (block + 1) * self.BLOCK])
            here = rows[low:high]
            if 8 * len(here) > here[-1] - here[0]:
                # Dense: reading what lies between costs less than h5py's point selection.
                slab = self._dataset[here[0] : here[-1] + 1]
                out[low:high] = to_float32(slab[here - here[0]])
            else:
                out[low:high] = to_float32(self._dataset[here])
        return out[place]


def _open_hdf5(path: pathlib.Path, key: str | None) -> FeatureTable:
    import h5py

    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: not a readable HDF5 file ({error})") from None
    # The file stays open as long as one of its data sets is held.
    hint = f"; give one as {path}:KEY" if key is None else ""
    key = "embeddings" if key is None else key
    if not key or not isinstance(dataset := file.get(key), h5py.Dataset):
        names: list[str] = []
        file.visit(names.append)
        held = ", ".join(n for n in names if isinstance(file.get(n), h5py.Dataset)) or "none"
        raise ValueError(f"{path}: no data set {key!r}; it holds: {held}{hint}")
    rows = _Hdf5Rows(dataset, f"{path}:{key}")
    ids = None
    if isinstance(stored := file.get("ids"), h5py.Dataset):
        ids = stored.asstr()[...] if h5py.check_string_dtype(stored.dtype) else stored[...]
    manifest = Manifest(rows=rows.shape[0], dim=rows.shape[1], dtype=rows.dtype.name)
    return FeatureTable([rows], ids=ids, name=f"{path}:{key}", manifest=manifest)


def _open_safetensors(path: pathlib.Path, key: str | None) -> FeatureTable:
    # The format is a length, a JSON header and raw little-endian arrays: mapping it ourselves keeps
    # the rows on disk, and bfloat16 (which NumPy lacks) readable.
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        start = 8 + length
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end > size:
            raise ValueError(f"{end} bytes expected, {size} found")
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not a readable .safetensors file ({error})") from None
    fitting = [
        name
        for name, entry in header.items()
        if len(entry["shape"]) == 2 and entry["dtype"] in SAFETENSORS_DTYPES
    ]
    key = _choose(path, key, header, fitting)
    name, entry = f"{path}:{key}", header[key]
    if entry["dtype"] not in SAFETENSORS_DTYPES:
        raise ValueError(
            f"{name}: features are float16, bfloat16, float32 or float64, got {entry['dtype']}"
        )
    dtype, shape = SAFETENSORS_DTYPES[entry["dtype"]], tuple(entry["shape"])
    if 0 in shape:
        array = np.empty(shape, dtype)
    else:
        array = np.memmap(path, dtype=np.uint8, mode="r", offset=start + entry["data_offsets"][0])
        array = array[: dtype.itemsize * int(np.prod(shape))].view(dtype).reshape(shape)
    return FeatureTable.from_array(array, name=name)


def _open_clip_retrieval(path: pathlib.Path, modality: str | None) -> FeatureTable:
    if modality not in CLIP_FOLDERS:
        raise ValueError(
            f"modality must be 'image' or 'text' for the clip-retrieval directory {path}, "
            f"got {modality!r}"
        )
    folder = CLIP_FOLDERS[modality]
    shards = _numbered(path / folder, rf"{folder}_(\d+)\.npy")
    if not shards:
        raise MissingFileError(f"{path / folder}: no {folder}_N.npy files")
    sources = [ArrayRows(memory_map(file), str(file)) for file in shards.values()]
    rows = sum(source.shape[0] for source in sources)
    manifest = Manifest(rows=rows, dim=sources[0].shape[1], dtype=sources[0].dtype.name)
    ids = None
    if metadata := _numbered(path / "metadata", r"metadata_(\d+)\.parquet"):
        if absent := sorted(set(shards) - set(metadata)):
            raise MissingFileError(
                f"{path / 'metadata'}: no metadata_N.parquet for shard {absent[0]}"
            )
        ids = _metadata_ids({metadata[n]: s.shape[0] for n, s in zip(shards, sources, strict=True)})
    return FeatureTable(sources, ids=ids, name=f"{path}:{modality}", manifest=manifest)


def _numbered(folder: pathlib.Path, pattern: str) -> dict[int, pathlib.Path]:
    """Files of a folder by the number in their name, in numeric order."""
    found: dict[int, pathlib.Path] = {}
    for file in sorted(folder.glob("*")):
        if match := re.fullmatch(pattern, file.name):
            number = int(match[1])
            if number in found:
                raise ValueError(f"{file}: has the same number as {found[number].name}")
            found[number] = file
    return dict(sorted(found.items()))


def _metadata_ids(files: dict[pathlib.Path, int]) -> np.ndarray | None:
    """Ids from parquet files (given with the rows each must have); None without an id column."""
    import pyarrow
    import pyarrow.parquet

    column, parts = None, []
    for file, rows in files.items():
        try:
            names = pyarrow.parquet.read_schema(file).names
            found = next((name for name in ("key", "image_path") if name in names), None)
            if not parts:
                column = found
            if found != column:
                raise ValueError(f"ids in {found}, in shards before it in {column}")
            table = pyarrow.parquet.read_table(file, columns=[] if column is None else [column])
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file}: not readable as metadata ({error})") from None
        if table.num_rows != rows:
            raise ValueError(f"{file}: {table.num_rows} rows, its shard has {rows}")
        if column is not None:
            if table[column].null_count:
                raise ValueError(f"{file}: column {column} has empty entries")
            parts.append(id_array(table[column].to_pylist(), f"{file}:{column}"))
    return None if column is None else np.concatenate(parts)
