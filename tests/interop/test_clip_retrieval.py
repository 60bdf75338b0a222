"""clip-retrieval's layout, read back file by file."""

import tracemalloc

import numpy as np
import pyarrow.parquet
import pytest

from sotalign_jax.features import open_features
from sotalign_jax.interop import write_clip_retrieval

ROWS = 11


def rows(dim=3, count=ROWS):
    return np.arange(count * dim, dtype=np.float32).reshape(count, dim) / 8


def chunks(array, *sizes):
    return np.split(array, np.cumsum(sizes))


def test_shards_of_all_three_have_the_same_rows(tmp_path):
    image, text = rows(), -rows()
    ids = [f"{i // 2}.jpg" for i in range(ROWS)]
    captions = [f'über {i}, "quoted"' for i in range(ROWS)]
    shards = write_clip_retrieval(
        tmp_path / "out",
        chunks(image, 5, 0, 3),
        chunks(text, 1, 9),
        ids=ids,
        captions=captions,
        rows_per_shard=4,
    )
    assert shards == 3
    parts = [slice(0, 4), slice(4, 8), slice(8, 11)]
    for n, part in enumerate(parts):
        for folder, array in (("img_emb", image), ("text_emb", text)):
            found = np.load(tmp_path / "out" / folder / f"{folder}_{n}.npy")
            assert found.dtype == np.float16
            np.testing.assert_array_equal(found, array[part])
        table = pyarrow.parquet.read_table(tmp_path / "out" / "metadata" / f"metadata_{n}.parquet")
        assert table.to_pydict() == {"image_path": ids[part], "caption": captions[part]}
    opened = open_features(tmp_path / "out", modality="text")
    np.testing.assert_array_equal(opened.array(), text)
    assert opened.ids.tolist() == ids


def test_numbers_are_padded(tmp_path):
    write_clip_retrieval(
        tmp_path / "out", [rows()], [rows()], ids=list(map(str, range(ROWS))), rows_per_shard=1
    )
    names = sorted(file.name for file in (tmp_path / "out" / "img_emb").iterdir())
    assert names == [f"img_emb_{n:02d}.npy" for n in range(ROWS)]
    table = pyarrow.parquet.read_table(tmp_path / "out" / "metadata" / "metadata_00.parquet")
    assert table["caption"].to_pylist() == [""]


def test_memory_is_that_of_a_chunk(tmp_path):
    count, dim, size = 40_000, 256, 500
    block = np.ones((size, dim), np.float32)

    def side():
        for _ in range(count // size):
            yield block

    ids = list(map(str, range(count)))
    tracemalloc.start()
    try:
        write_clip_retrieval(tmp_path / "out", side(), side(), ids=ids, rows_per_shard=30_000)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # A shard is 15 MB in float16; the ids of one take their own, whatever the rows.
    assert most < 5e6 + 120 * count
    assert np.load(tmp_path / "out" / "text_emb" / "text_emb_1.npy").shape == (10_000, dim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "ids: no pairs"),
        ({"captions": ["one"]}, "captions: 1 for 11 pairs"),
        ({"image": [rows(count=10)]}, "img_emb: 10 rows for 11 pairs"),
        ({"text": [rows(count=12)]}, "text_emb: more than 11 rows for 11 pairs"),
        ({"text": [rows(), np.full((1, 3), 1e6)]}, "text_emb: row 11 holds what float16 cannot"),
        ({"image": [np.full((11, 3), np.nan)]}, "img_emb: row 0 holds"),
        ({"image": [rows(count=4), rows(4, 7)]}, "img_emb: row 4 has 4 columns, .* 3$"),
        ({"rows_per_shard": 0}, "rows_per_shard must be at least 1"),
    ],
)
def test_refusals_leave_nothing(change, message, tmp_path):
    given = {"image": [rows()], "text": [rows()], "ids": list(map(str, range(ROWS)))} | change
    with pytest.raises(ValueError, match=message):
        write_clip_retrieval(tmp_path / "out", given.pop("image"), given.pop("text"), **given)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_never_replaced(tmp_path):
    with pytest.raises(ValueError, match="exists"):
        write_clip_retrieval(tmp_path, [rows()], [rows()], ids=list(map(str, range(ROWS))))
