import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotalign_jax.features import MissingFileError, open_features, write_store

h5py = pytest.importorskip("h5py")
pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
safetensors = pytest.importorskip("safetensors.numpy")


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(23, 5)).astype(np.float32)


def test_npy(values, tmp_path):
    for dtype in (np.float16, np.float32, np.float64):
        np.save(tmp_path / "a.npy", values.astype(dtype))
        table = open_features(tmp_path / "a.npy")
        assert table.dtype == dtype
        assert table.name == str(tmp_path / "a.npy")
        assert table.ids is None
        np.testing.assert_array_equal(table.array(), values.astype(dtype).astype(np.float32))
        np.testing.assert_array_equal(table.take([7, 0, 7]), table.array()[[7, 0, 7]])
    np.save(tmp_path / "a.npy", np.asfortranarray(values))
    np.testing.assert_array_equal(open_features(tmp_path / "a.npy").array(), values)


def test_npy_without_rows_is_an_empty_table(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((0, 4), np.float32))
    assert open_features(str(tmp_path / "a.npy")).shape == (0, 4)


def test_store_directory(values, tmp_path):
    write_store(tmp_path / "s", values, dtype="float32")
    np.testing.assert_array_equal(open_features(tmp_path / "s").array(), values)


def test_npz(values, tmp_path):
    ids = np.array([f"r{i}" for i in range(23)])
    np.savez(tmp_path / "one.npz", features=values, ids=ids, labels=np.arange(23))
    table = open_features(tmp_path / "one.npz")
    np.testing.assert_array_equal(table.array(), values)
    assert table.ids is not None
    assert table.ids.tolist() == ids.tolist()

    np.savez_compressed(tmp_path / "two.npz", image=values, text=-values)
    np.testing.assert_array_equal(open_features(tmp_path / "two.npz", key="text").array(), -values)
    with pytest.raises(ValueError, match=r"several .* as .*two.npz:KEY; it holds: image, text"):
        open_features(tmp_path / "two.npz")
    with pytest.raises(ValueError, match=r"two.npz: no array 'audio'; it holds: image, text"):
        open_features(tmp_path / "two.npz", key="audio")
    np.savez(tmp_path / "none.npz", labels=np.arange(3))
    with pytest.raises(ValueError, match=r"none.npz: no 2-d floating arrays"):
        open_features(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"none.npz:labels: features are 2-d"):
        open_features(tmp_path / "none.npz", key="labels")


@pytest.fixture
def several(values, tmp_path):
    """The same two arrays, and ids, in each format that names its arrays."""
    arrays = {"image": values, "text:v2": -values}
    ids = np.array([f"r{i}" for i in range(23)])
    np.savez(tmp_path / "a.npz", **arrays, ids=ids)
    safetensors.save_file(arrays, tmp_path / "a.safetensors")
    with h5py.File(tmp_path / "a.H5", "w") as file:
        for name, array in arrays.items():
            file[name] = array
        file["deep/er"] = 2 * values
        file["ids"] = ids.tolist()
    return tmp_path


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors", "a.H5"])
def test_a_path_may_name_one_array_of_several(values, several, name, monkeypatch):
    for key, expected in (("image", values), ("text:v2", -values)):
        path = f"{several / name}:{key}"
        table = open_features(path)
        np.testing.assert_array_equal(table.array(), expected)
        assert table.name == path  # and can be opened by it
        assert (table.ids is None) == (name == "a.safetensors")
    np.testing.assert_array_equal(open_features(several / f"{name}:image").array(), values)
    monkeypatch.chdir(several)
    np.testing.assert_array_equal(open_features(f"{name}:image").array(), values)
    held = "it holds: .*image, .*text:v2"
    for key in ("audio", "", "image:"):
        with pytest.raises(ValueError, match=rf"{name}: no .* '{key}'; {held}$"):
            open_features(f"{name}:{key}")
    with pytest.raises(ValueError, match=held) as caught:
        open_features(name)
    assert f"give one as {name}:KEY" in str(caught.value)


def test_a_path_may_name_a_data_set_in_a_group(values, several):
    table = open_features(several / "a.H5:deep/er")
    np.testing.assert_array_equal(table.array(), 2 * values)
    for key in ("deep", "er"):
        message = f"no data set '{key}'; it holds: deep/er, ids, image, text:v2$"
        with pytest.raises(ValueError, match=message):
            open_features(several / f"a.H5:{key}")


def test_a_file_whose_name_holds_a_colon_is_that_file(values, several):
    write_store(several / "a.npz:text:v2", 3 * values, dtype="float32")
    np.testing.assert_array_equal(open_features(several / "a.npz:text:v2").array(), 3 * values)
    np.savez(several / "b:c.npz:d.npz", image=values, text=-values)
    path = several / "b:c.npz:d.npz:text"
    np.testing.assert_array_equal(open_features(path).array(), -values)
    np.save(several / "e:f.npy", values)
    np.testing.assert_array_equal(open_features(several / "e:f.npy").array(), values)
    # A key of its own leaves the path as it stands.
    with pytest.raises(MissingFileError, match=r"a.npz:text: no such file"):
        open_features(several / "a.npz:text", key="image")


def test_a_colon_elsewhere_is_no_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "C").mkdir()
    for path, missing in (
        (r"C:\data\a.npz", r"C:\data\a.npz"),
        (r"C:\data\a.npz:image", r"C:\data\a.npz"),
        ("gs://bucket/a.npz", "gs:/bucket/a.npz"),
        ("gs://bucket/a.npz:image", "gs:/bucket/a.npz"),
        ("store:image", "store:image"),
        ("a.npz:b.npz:image", "a.npz"),
    ):
        with pytest.raises(MissingFileError) as caught:
            open_features(path)
        assert str(caught.value) == f"{missing}: no such file or directory"
    np.save(tmp_path / "a.npy", np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match=r"key: a.npy has no named arrays to choose 'image' from"):
        open_features("a.npy:image")


@pytest.mark.parametrize("chunks", [None, (4, 5)])
@pytest.mark.parametrize("suffix", [".h5", ".hdf5"])
def test_hdf5(values, tmp_path, suffix, chunks):
    path = tmp_path / f"a{suffix}"
    ids = [f"ü{i}" for i in range(23)]
    with h5py.File(path, "w") as file:
        file.create_dataset("embeddings", data=values.astype(np.float16), chunks=chunks)
        file["ids"] = ids
        file["other"] = -values
    table = open_features(path)
    half = values.astype(np.float16).astype(np.float32)
    assert table.dtype == np.float16
    np.testing.assert_array_equal(table.array(), half)
    np.testing.assert_array_equal(np.concatenate(list(table.chunks(4))), half)
    assert table.ids is not None
    assert table.ids.tolist() == ids
    np.testing.assert_array_equal(open_features(path, key="other").array(), -values)


@pytest.mark.parametrize("ids", [np.arange(23), np.array([b"%d" % i for i in range(23)])])
def test_hdf5_ids_of_other_types(values, tmp_path, ids):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["embeddings"], file["ids"] = values, ids
    table = open_features(tmp_path / "a.h5")
    assert table.ids is not None
    assert table.ids.tolist() == [str(i) for i in range(23)]


@pytest.fixture(scope="module")
def tall(tmp_path_factory):
    """40,000 rows: more than two of the blocks in which HDF5 is read."""
    path = tmp_path_factory.mktemp("tall") / "tall.h5"
    values = np.arange(40_000, dtype=np.float32)[:, None] * [1, -1]
    with h5py.File(path, "w") as file:
        file.create_dataset("embeddings", data=values, dtype="f4", chunks=(512, 2))
    return open_features(path), values


@given(
    st.lists(st.integers(0, 39_999), max_size=20),
    st.integers(0, 39_999),
    st.integers(1, 300),
)
def test_hdf5_takes_any_rows_in_any_order(tall, scattered, start, count):
    """Sparse, dense, repeated, unsorted, over block borders."""
    table, values = tall
    rows = np.concatenate([scattered, np.arange(start, min(start + count, 40_000))[::-1]])
    rows = rows.astype(np.int64)
    np.testing.assert_array_equal(table.take(rows), values[rows])
    np.testing.assert_array_equal(table.select(rows).array(), values[rows])


def test_hdf5_that_cannot_be_opened(values, tmp_path):
    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as file:
        file["features"] = values
    with pytest.raises(ValueError, match=r"a.h5: no data set 'embeddings'; it holds: features"):
        open_features(path)
    (tmp_path / "b.h5").write_text("not HDF5")
    with pytest.raises(ValueError, match=r"b.h5: not a readable HDF5"):
        open_features(tmp_path / "b.h5")


def test_safetensors(values, tmp_path):
    path = tmp_path / "a.safetensors"
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64):
        tensors = {"x": values.astype(dtype), "count": np.arange(3), "odd": np.zeros(1, np.int8)}
        safetensors.save_file(tensors, path, metadata={"made": "here"})
        table = open_features(path)
        assert table.dtype == dtype
        np.testing.assert_array_equal(table.array(), values.astype(dtype).astype(np.float32))
        np.testing.assert_array_equal(table.take([22, 3]), table.array()[[22, 3]])


def test_safetensors_with_several_tensors(values, tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.save_file({"image": values, "text": -values, "n": np.zeros((2, 2), int)}, path)
    np.testing.assert_array_equal(open_features(path, key="text").array(), -values)
    with pytest.raises(ValueError, match=r"a.safetensors: several .* image, n, text"):
        open_features(path)
    with pytest.raises(ValueError, match=r"a.safetensors: no array 'video'"):
        open_features(path, key="video")
    with pytest.raises(ValueError, match=r"a.safetensors:n: features are float16.* got I64"):
        open_features(path, key="n")


def test_safetensors_that_are_broken(values, tmp_path):
    path = tmp_path / "a.safetensors"
    safetensors.save_file({"x": values}, path)
    whole = path.read_bytes()
    for broken in (b"", whole[:4], whole[:20], whole[:-1], b"\x02" + bytes(7) + b"[]"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a.safetensors: not a readable .safetensors"):
            open_features(path)


def write_clip(root, values, shards, pattern="{}", columns=("key", "image_path", "caption")):
    """The layout clip-retrieval writes: float16 shards and parquet metadata."""
    parts = dict(zip(shards, np.array_split(np.arange(len(values)), len(shards)), strict=True))
    for folder in ("img_emb", "text_emb", "metadata"):
        (root / folder).mkdir(parents=True)
    for shard, rows in parts.items():
        number = pattern.format(shard)
        np.save(root / "img_emb" / f"img_emb_{number}.npy", values[rows].astype(np.float16))
        np.save(root / "text_emb" / f"text_emb_{number}.npy", -values[rows].astype(np.float16))
        data = {
            "image_path": [f"/img/{i}.jpg" for i in rows],
            "caption": [f"caption {i}" for i in rows],
            "key": [f"{i:09d}" for i in rows],
        }
        table = pyarrow.table({name: data[name] for name in columns})
        parquet.write_table(table, root / "metadata" / f"metadata_{number}.parquet")


@pytest.mark.parametrize("pattern", ["{}", "{:04d}"])
def test_clip_retrieval(values, tmp_path, pattern):
    shards = [2, 9, 10, 11]  # as text, 10 sorts before 2
    write_clip(tmp_path / "c", values, shards, pattern)
    half = values.astype(np.float16).astype(np.float32)
    for modality, truth in (("image", half), ("text", -half)):
        table = open_features(tmp_path / "c", modality=modality)
        np.testing.assert_array_equal(table.array(), truth)
        assert table.ids is not None
        assert table.ids.tolist() == [f"{i:09d}" for i in range(23)]


def test_clip_retrieval_ids_from_what_there_is(values, tmp_path):
    write_clip(tmp_path / "paths", values, [0, 1], columns=("image_path", "caption"))
    table = open_features(tmp_path / "paths", modality="text")
    assert table.ids is not None
    assert table.ids[22] == "/img/22.jpg"
    write_clip(tmp_path / "none", values, [0, 1], columns=("caption",))
    assert open_features(tmp_path / "none", modality="text").ids is None


def test_clip_retrieval_that_is_broken(values, tmp_path):
    root = tmp_path / "c"
    write_clip(root, values, [0, 1])
    for modality in (None, "audio"):
        with pytest.raises(ValueError, match="modality must be 'image' or 'text'"):
            open_features(root, modality=modality)
    meta = root / "metadata" / "metadata_1.parquet"
    parquet.write_table(pyarrow.table({"key": ["a", "b"]}), meta)
    with pytest.raises(ValueError, match=r"metadata_1.parquet: 2 rows, its shard has 11"):
        open_features(root, modality="image")
    parquet.write_table(pyarrow.table({"image_path": ["a"] * 11}), meta)
    with pytest.raises(ValueError, match=r"metadata_1.parquet: .*ids in image_path"):
        open_features(root, modality="image")
    parquet.write_table(pyarrow.table({"key": ["a"] * 10 + [None]}), meta)
    with pytest.raises(ValueError, match=r"metadata_1.parquet: column key has empty entries"):
        open_features(root, modality="image")
    meta.write_text("not parquet")
    with pytest.raises(ValueError, match=r"metadata_1.parquet: not readable as metadata"):
        open_features(root, modality="image")
    meta.unlink()
    with pytest.raises(MissingFileError, match=r"no metadata_N.parquet for shard 1"):
        open_features(root, modality="image")
    np.save(root / "img_emb" / "img_emb_01.npy", values)
    with pytest.raises(ValueError, match=r"img_emb_1.npy: has the same number as img_emb_01.npy"):
        open_features(root, modality="image")
    for file in (root / "img_emb").iterdir():
        file.unlink()
    with pytest.raises(MissingFileError, match=r"img_emb: no img_emb_N.npy files"):
        open_features(root, modality="image")


def test_clip_retrieval_shards_of_different_width(values, tmp_path):
    write_clip(tmp_path / "c", values, [0, 1])
    np.save(tmp_path / "c" / "img_emb" / "img_emb_1.npy", values[12:, :3])
    with pytest.raises(ValueError, match=r"c:image: sources differ in dim: \[3, 5\]"):
        open_features(tmp_path / "c", modality="image")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), "features are 2-d .* 1-d"),
        (np.zeros((2, 2, 2)), "features are 2-d .* 3-d"),
        (np.zeros((2, 2), np.int64), "features are .* got int64"),
    ],
)
def test_arrays_that_are_no_features(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=f"a.npy: {message}"):
        open_features(tmp_path / "a.npy")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["embeddings"] = array
    with pytest.raises(ValueError, match=f"a.h5:embeddings: {message}"):
        open_features(tmp_path / "a.h5")


def test_paths_that_cannot_be_opened(values, tmp_path):
    with pytest.raises(MissingFileError, match=r"absent.npy: no such file"):
        open_features(tmp_path / "absent.npy")
    with pytest.raises(FileNotFoundError):
        open_features(tmp_path / "absent.npy")
    (tmp_path / "a.pt").write_text("")
    with pytest.raises(ValueError, match=r"a.pt: unknown suffix '.pt'; known are .npy"):
        open_features(tmp_path / "a.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: neither a feature store nor"):
        open_features(tmp_path / "empty")
    for name in ("a.npy", "a.npz"):
        (tmp_path / name).write_text("nothing of the kind")
        with pytest.raises(ValueError, match=f"{name}: not a readable"):
            open_features(tmp_path / name)
    np.save(tmp_path / "b.npy", values)
    with pytest.raises(ValueError, match=r"key: .*b.npy has no named arrays"):
        open_features(tmp_path / "b.npy", key="x")
    np.save(tmp_path / "c.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"c.npy: not a readable"):
        open_features(tmp_path / "c.npy")
