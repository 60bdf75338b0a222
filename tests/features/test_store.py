import json
import os

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotalign_jax.features import (
    BadRows,
    FeatureTable,
    MissingFileError,
    check_finite,
    concat,
    find_bad_rows,
    open_store,
    refuse_bad_rows,
    write_store,
)

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}


def numbered(rows, dim=3, dtype=np.float32):
    """Row i is i + [0, 0.25, 0.5, ...], exact in every format for small tables."""
    return (np.arange(rows)[:, None] + np.arange(dim) / 4).astype(dtype)


@pytest.fixture
def store(tmp_path):
    """Seven rows with ids in shards of three."""
    ids = [f"id {i}" for i in range(7)]
    return write_store(
        tmp_path / "s", numbered(7), ids=ids, dtype="float32", encoder="e", rows_per_shard=3
    )


def test_rows_come_back_from_every_dtype(tmp_path):
    values = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
    for name, dtype in DTYPES.items():
        table = write_store(tmp_path / name, values, dtype=name, rows_per_shard=4)
        assert table.array().dtype == np.float32
        np.testing.assert_array_equal(table.array(), values.astype(dtype).astype(np.float32))
        assert table.dtype == dtype
        assert table.manifest.dtype == name
        assert sorted(os.listdir(tmp_path / name)) == [
            "features-00000.npy",
            "features-00001.npy",
            "features-00002.npy",
            "manifest.json",
        ]


def test_shards_are_plain_npy_files(store, tmp_path):
    shards = [np.load(tmp_path / "s" / f"features-{i:05d}.npy") for i in range(3)]
    assert [len(shard) for shard in shards] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(shards), numbered(7))


def test_bfloat16_is_stored_as_its_two_bytes(tmp_path):
    write_store(tmp_path / "s", np.array([[1.0, -2.0]], np.float32), dtype="bfloat16")
    stored = np.load(tmp_path / "s" / "features-00000.npy")
    np.testing.assert_array_equal(stored, np.array([[0x3F80, 0xC000]], np.uint16))


def test_manifest_says_what_was_written(tmp_path):
    facts = {"encoder": "DINOv3", "pooling": "cls", "normalized": True, "source": "CC3M"}
    table = write_store(
        tmp_path / "s", numbered(5), ids=list("abcde"), licence="MIT", rows_per_shard=2, **facts
    )
    on_disk = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert on_disk == {
        **facts,
        "licence": "MIT",
        "dim": 3,
        "rows": 5,
        "dtype": "float16",
        "ids": "ids.jsonl",
        "format_version": 1,
        "shards": [
            {"file": "features-00000.npy", "rows": 2},
            {"file": "features-00001.npy", "rows": 2},
            {"file": "features-00002.npy", "rows": 1},
        ],
    }
    assert table.manifest.encoder == "DINOv3"
    assert table.manifest.normalized is True


def test_ids_keep_any_character(tmp_path):
    ids = ["a b", 'quo"te', "new\nline", "\u2028", "🍼", "back\\slash", ""]
    table = write_store(tmp_path / "s", numbered(7), ids=ids)
    assert table.ids is not None
    assert table.ids.tolist() == ids


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(1, 9))
def test_shards_do_not_depend_on_chunks(tmp_path_factory, sizes, rows_per_shard):
    directory = tmp_path_factory.mktemp("chunks") / "s"
    values = numbered(sum(sizes))
    chunks = iter(np.split(values, np.cumsum(sizes)))
    if not len(values):
        with pytest.raises(ValueError, match="chunks: no rows"):
            write_store(directory, chunks, dtype="float32")
        return
    table = write_store(directory, chunks, dtype="float32", rows_per_shard=rows_per_shard)
    np.testing.assert_array_equal(table.array(), values)
    whole, rest = divmod(len(values), rows_per_shard)
    assert [rows for _, rows in table.manifest.shards] == [rows_per_shard] * whole + [rest] * (
        rest > 0
    )


def test_writing_holds_one_chunk_at_a_time(tmp_path):
    """Each chunk is on its way to disk before the next one is asked for."""

    def chunks():
        for start in range(0, 40_000, 10_000):
            partial = [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]
            written = sum(f.stat().st_size for p in partial for f in p.iterdir())
            assert written >= start * 8 - 65_536  # less what the file object buffers
            yield np.full((10_000, 2), start, np.float32)

    assert len(write_store(tmp_path / "s", chunks(), dtype="float32")) == 40_000


def test_a_table_is_copied_with_its_ids(store, tmp_path):
    copy = write_store(tmp_path / "copy", store.select([5, 1]), dtype="float32")
    np.testing.assert_array_equal(copy.array(), numbered(7)[[5, 1]])
    assert copy.ids is not None
    assert copy.ids.tolist() == ["id 5", "id 1"]


def test_an_existing_directory_is_refused(store, tmp_path):
    before = {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()}
    with pytest.raises(ValueError, match=r"directory: .* exists"):
        write_store(tmp_path / "s", numbered(2))
    assert {p.name: p.read_bytes() for p in (tmp_path / "s").iterdir()} == before


def test_overwrite_replaces_a_store_and_nothing_else(store, tmp_path):
    table = write_store(tmp_path / "s", numbered(2), overwrite=True)
    assert len(table) == 2
    assert sorted(os.listdir(tmp_path / "s")) == ["features-00000.npy", "manifest.json"]
    assert os.listdir(tmp_path) == ["s"]
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not a feature store"):
        write_store(notes, numbered(2), overwrite=True)
    assert (notes / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_things_as_they_were(tmp_path, existing):
    if existing:
        write_store(tmp_path / "s", numbered(7), dtype="float32")

    def chunks():
        yield numbered(4)
        raise RuntimeError("the encoder ran out of memory")

    with pytest.raises(RuntimeError):
        write_store(tmp_path / "s", chunks(), overwrite=True)
    assert os.listdir(tmp_path) == (["s"] if existing else [])
    if existing:
        np.testing.assert_array_equal(open_store(tmp_path / "s").array(), numbered(7))


@pytest.mark.parametrize(
    ("dtype", "value", "hint"),
    [
        ("float16", 65505.0, "bfloat16 or float32"),
        ("float16", -1e6, "bfloat16 or float32"),
        ("bfloat16", 3.4e38, "float32"),
    ],
)
def test_overflow_names_the_row_and_a_larger_format(tmp_path, dtype, value, hint):
    values = numbered(6)
    values[4, 1] = value
    with pytest.raises(ValueError, match=f"row 4 .*{dtype}.*store as {hint}$"):
        write_store(tmp_path / "s", np.split(values, 2), dtype=dtype)


def test_the_largest_half_is_no_overflow(tmp_path):
    table = write_store(tmp_path / "s", np.array([[65504.0, -65504.0]]))
    np.testing.assert_array_equal(table.array(), [[65504.0, -65504.0]])


@pytest.mark.parametrize(
    ("chunks", "options", "message"),
    [
        (np.zeros((2, 3), np.int32), {}, "chunk 0: .*int32"),
        (np.zeros(3), {}, "chunk 0: .*1-d"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], {}, "chunk 1: dim is 4, chunk 0 has 3"),
        ([], {}, "chunks: no rows"),
        (np.zeros((2, 3)), {"dtype": "int8"}, "dtype must be one of float16"),
        (np.zeros((2, 3)), {"rows_per_shard": 0}, "rows_per_shard must be"),
        (np.zeros((2, 3)), {"ids": ["a"]}, "ids: 1 ids for 2 rows"),
    ],
)
def test_bad_input_to_write(tmp_path, chunks, options, message):
    with pytest.raises(ValueError, match=message):
        write_store(tmp_path / "s", chunks, **options)
    assert not list(tmp_path.iterdir())


def test_open_store_names_what_is_wrong(store, tmp_path):
    root = tmp_path / "s"
    manifest = (root / "manifest.json").read_text()
    shard = root / "features-00001.npy"

    with pytest.raises(MissingFileError, match="no such directory"):
        open_store(tmp_path / "absent")
    with pytest.raises(MissingFileError, match="not a feature store"):
        open_store(tmp_path)

    np.save(shard, numbered(2))
    with pytest.raises(ValueError, match=r"features-00001.npy: .*\(2, 3\).*\(3, 3\)"):
        open_store(root)
    np.save(shard, numbered(3, dim=4))
    with pytest.raises(ValueError, match=r"features-00001.npy: .*\(3, 4\).*\(3, 3\)"):
        open_store(root)
    np.save(shard, numbered(3, dtype=np.float64))
    with pytest.raises(ValueError, match=r"features-00001.npy: holds float64"):
        open_store(root)
    shard.write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"features-00001.npy: not a readable"):
        open_store(root)
    shard.unlink()
    with pytest.raises(MissingFileError, match=r"features-00001.npy: no such file"):
        open_store(root)

    np.save(shard, numbered(3))
    for wrong, message in [
        (manifest.replace('"rows": 7', '"rows": 8'), "says 8 rows, its shards have 7"),
        (manifest.replace('"format_version": 1', '"format_version": 2'), "format_version is 2"),
        (manifest.replace('"float32"', '"float8"'), "dtype 'float8'"),
        (manifest.replace('"pooling"', '"pool"'), "fields missing or unknown: pool, pooling"),
        (manifest[:20], "not a JSON manifest"),
        ("[]", "expected a JSON object"),
    ]:
        assert wrong != manifest
        (root / "manifest.json").write_text(wrong)
        with pytest.raises(ValueError, match=f"manifest.json: .*{message}"):
            open_store(root)

    (root / "manifest.json").write_text(manifest)
    (root / "ids.jsonl").write_text('"only one"\n')
    with pytest.raises(ValueError, match="1 ids for 7 rows"):
        open_store(root)
    (root / "ids.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match=r"ids.jsonl: not one JSON string a line"):
        open_store(root)
    (root / "ids.jsonl").unlink()
    with pytest.raises(MissingFileError, match=r"ids.jsonl"):
        open_store(root)


def test_rows_stay_on_disk_until_asked_for(store, tmp_path):
    """A value changed in the file after opening is seen: nothing had been copied."""
    selected = store.select([6, 4])
    with open(tmp_path / "s" / "features-00001.npy", "r+b") as file:
        file.seek(-2 * 3 * 4, os.SEEK_END)
        file.write(np.float32(99).tobytes())
    assert selected.array()[1, 0] == 99


@given(st.data())
def test_selections_compose(data):
    table = concat([FeatureTable.from_array(numbered(n, dim=2)) for n in (3, 1, 4)])
    truth = np.concatenate([numbered(n, dim=2) for n in (3, 1, 4)])
    for _ in range(data.draw(st.integers(0, 3))):
        rows = st.lists(st.integers(0, len(table) - 1), max_size=12) if len(table) else st.just([])
        chosen = data.draw(rows)
        table = table.select(chosen)
        truth = truth[np.asarray(chosen, dtype=int)]
    size = data.draw(st.integers(1, 9))
    chunks = list(table.chunks(size))
    assert table.shape == truth.shape
    np.testing.assert_array_equal(table.array(), truth)
    np.testing.assert_array_equal(np.concatenate([truth[:0], *chunks]), truth)
    assert all(len(chunk) == size for chunk in chunks[:-1])
    assert all(chunk.dtype == np.float32 for chunk in chunks)
    assert len(chunks) == -(-len(truth) // size)
    if len(truth):
        back = np.arange(len(truth))[::-1]
        np.testing.assert_array_equal(table.take(back), truth[::-1])


def test_ids_follow_the_selection(store):
    table = store.select([6, 0, 6]).select([2, 1])
    assert table.ids is not None
    assert table.ids.tolist() == ["id 6", "id 0"]
    assert store.select([]).shape == (0, 3)


def test_what_a_table_hands_out_is_not_the_table(store):
    array = numbered(4)
    for table in (store, FeatureTable.from_array(array)):
        first = table.array()
        first[:] = -1
        table.take([0])[:] = -1
        next(table.chunks(2))[:] = -1
        np.testing.assert_array_equal(table.take([0]), numbered(1))
    assert store.ids is not None
    with pytest.raises(ValueError, match="read-only"):
        store.ids[0] = "x"


@pytest.mark.parametrize("indices", [[7], [-1], np.array([0, 2**40])])
def test_indices_out_of_range(store, indices):
    for method in (store.take, store.select):
        with pytest.raises(IndexError, match=r"indices: -?\d+ is out of range for .* 7 rows"):
            method(indices)
    with pytest.raises(IndexError, match="out of range"):
        store.select([0, 1]).take([2])


@pytest.mark.parametrize("indices", [[[1]], [0.0], [True, False]])
def test_indices_of_the_wrong_kind(store, indices):
    with pytest.raises(ValueError, match="indices: expected 1-d integers"):
        store.take(indices)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros(3), "mine: .*1-d"),
        (np.zeros((1, 2, 3)), "mine: .*3-d"),
        (np.zeros((2, 3), int), "mine: .*int64"),
        (np.zeros((2, 0)), "mine: .*at least one column"),
    ],
)
def test_arrays_that_are_no_features(array, message):
    with pytest.raises(ValueError, match=message):
        FeatureTable.from_array(array, name="mine")


def test_tables_that_cannot_be_made(store):
    with pytest.raises(ValueError, match="mine: 2 ids for 3 rows"):
        FeatureTable.from_array(numbered(3), ids=["a", "b"], name="mine")
    with pytest.raises(ValueError, match="mine: ids must be 1-d strings"):
        FeatureTable.from_array(numbered(1), ids=np.array([[1.5]]), name="mine")
    with pytest.raises(ValueError, match="size must be at least 1"):
        store.chunks(0)


def test_concat(store):
    more = FeatureTable.from_array(
        numbered(2).astype(np.float16), ids=np.array([10, 11]), name="more"
    )
    both = concat([store.select([1]), more])
    np.testing.assert_array_equal(both.array(), np.concatenate([numbered(7)[[1]], numbered(2)]))
    assert both.ids is not None
    assert both.ids.tolist() == ["id 1", "10", "11"]
    assert both.dtype == np.float32
    with pytest.raises(ValueError, match="tables: nothing"):
        concat([])
    with pytest.raises(ValueError, match="dims differ, more has 3, wide has 5"):
        concat([more, FeatureTable.from_array(np.zeros((1, 5)), name="wide")])
    with pytest.raises(ValueError, match="more has ids, plain has none"):
        concat([FeatureTable.from_array(numbered(1), name="plain"), more])


def test_check_finite_counts_and_names():
    values = np.zeros((9000, 600), np.float32)  # more than one chunk
    ids = [f"x{i}" for i in range(9000)]
    table = FeatureTable.from_array(values, ids=ids, name="emoji")
    check_finite(table)
    values[7500, 3] = np.nan
    values[8999] = np.inf
    with pytest.raises(ValueError, match=r"^emoji: 2 of 9000 .* row 7500 \(id 'x7500'\)$"):
        check_finite(table)
    with pytest.raises(ValueError, match=r"^images: 1 of 1 rows .* row 0$"):
        check_finite(FeatureTable.from_array(values[[7500]]), "images")


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_every_row_is_checked_in_exactly_one_part(parts):
    rng = np.random.default_rng(parts)
    values = np.zeros((50, 4), np.float32)
    bad = rng.choice(50, size=9, replace=False)
    values[bad, rng.integers(4, size=9)] = np.nan
    read = []
    whole = FeatureTable.from_array(values)
    table = whole.select(rng.permutation(50)[:40])
    take = FeatureTable.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FeatureTable, "take", lambda self, rows: read.extend(rows) or take(self, rows)
        )
        found = [find_bad_rows(table, part, parts) for part in range(parts)]
    assert sorted(read) == list(range(40))
    wrong = np.flatnonzero(np.isnan(table.array()).any(axis=1))
    assert sum(one.count for one in found) == len(wrong)
    assert min(one.first for one in found) == wrong[0]
    with pytest.raises(ValueError, match=f"part: must be at least 0 and less than parts .{parts}"):
        find_bad_rows(table, parts, parts)
    # A caller that knows already has nothing read again.
    with pytest.raises(ValueError, match=f"array: {len(wrong)} of 40 rows .* row {wrong[0]}$"):
        refuse_bad_rows(table, BadRows(len(wrong), int(wrong[0])))
    assert len(read) == 40


def test_doubles_beyond_float32_are_found():
    table = FeatureTable.from_array(np.array([[1e300, 0.0]]), name="big")
    with pytest.raises(ValueError, match="big: 1 of 1"):
        check_finite(table)
