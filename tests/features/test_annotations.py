"""Captions and thumbnails beside features of every kind."""

import json
import zipfile

import numpy as np
import pytest

from sotalign_jax import features
from sotalign_jax.features import open_features, read_captions, read_thumbnails

ROWS = np.arange(12, dtype=np.float32).reshape(6, 2)
IDS = ["a", "b", "deep/c", "d.jpg", "../e", "f"]


def store(path, ids=IDS):
    features.write_store(path, ROWS, ids=ids)
    return path


def array(path):
    np.save(path, ROWS)
    return path


def keyed(path):
    np.savez(path, image=ROWS, text=ROWS)
    return f"{path}:text"


def with_captions(path, captions):
    path.write_text("".join(f"{json.dumps(one)}\n" for one in captions))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (store, "coco.v2"),
        (array, "coco.v2.npy"),
        (keyed, "coco.v2.npz"),
        (lambda path: f"{store(path)}/", "coco.v2"),
    ],
)
def test_captions_stand_beside_features_of_any_kind(make, name, tmp_path):
    path = make(tmp_path / name)
    table = open_features(path)
    assert read_captions(path, table, [0, 3]) == {}
    with_captions(tmp_path / "coco.v2.captions.jsonl", [f"of {i}\n“ü”" for i in range(6)])
    assert read_captions(path, table, [5, 0]) == {5: "of 5\n“ü”", 0: "of 0\n“ü”"}


def test_rows_of_a_selection_keep_their_captions(tmp_path):
    path = store(tmp_path / "coco", ids=["x"] * 6)  # captions of one image share its id
    with_captions(tmp_path / "coco.captions.jsonl", map(str, range(6)))
    some = open_features(path).select([4, 1, 4, 0]).select([2, 1])
    assert some.stored_rows.tolist() == [4, 1]
    assert read_captions(path, some, [0, 1]) == {0: "4", 1: "1"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('"a"\n' * 5, r"captions.jsonl: 5 captions for 6 rows of features"),
        ('"a"\n' * 7, r"captions.jsonl: 7 captions for 6 rows"),
        ('"a"\n3\n' * 3, r"captions.jsonl:2: must be a JSON string, got int"),
        ("a\n" * 6, r"captions.jsonl:2: not a JSON string"),
    ],
)
def test_captions_that_do_not_fit_are_named(lines, message, tmp_path):
    path = store(tmp_path / "coco")
    (tmp_path / "coco.captions.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_captions(path, open_features(path), [1])


@pytest.mark.parametrize("kind", ["folder", "link", "zip"])
def test_thumbnails_are_found_by_id(kind, tmp_path):
    path = store(tmp_path / "coco")
    table = open_features(path)
    assert read_thumbnails(path, table, [0]) == {}
    folder = tmp_path / ("pictures" if kind == "link" else "coco.thumbnails")
    (folder / "deep").mkdir(parents=True)
    files = {"a.png": b"A", "b.JPG": b"no", "deep/c.jpeg": b"C", "d.jpg": b"D", "f": b"F"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (tmp_path / "e.png").write_bytes(b"outside")
    if kind == "link":
        (tmp_path / "coco.thumbnails").symlink_to(folder)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "coco.thumbnails.zip", "w") as archive:
            for name in files:
                archive.write(folder / name, name)
        (tmp_path / "coco.thumbnails").rename(tmp_path / "moved")
    found = read_thumbnails(path, table, range(6))
    assert found == {0: b"A", 2: b"C", 3: b"D", 5: b"F"}
    assert read_thumbnails(path, table.select([5, 2]), [1]) == {1: b"C"}


def test_without_ids_pictures_are_named_by_rows(tmp_path):
    path = array(tmp_path / "coco.npy")
    (tmp_path / "coco.thumbnails").mkdir()
    (tmp_path / "coco.thumbnails" / "4.webp").write_bytes(b"four")
    table = open_features(path).select([5, 4])
    assert read_thumbnails(path, table, [0, 1]) == {1: b"four"}


def test_ids_that_are_no_names_of_files_have_no_picture(tmp_path):
    ids = ["/etc/hosts", "", "x" * 5000, "nul\0", "..", "a/../../b"]
    path = store(tmp_path / "coco", ids=ids)
    (tmp_path / "coco.thumbnails").mkdir()
    (tmp_path / "b.png").write_bytes(b"outside")
    assert read_thumbnails(path, open_features(path), range(6)) == {}


def test_a_broken_archive_is_named(tmp_path):
    path = store(tmp_path / "coco")
    (tmp_path / "coco.thumbnails.zip").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"coco.thumbnails.zip: not a readable zip archive"):
        read_thumbnails(path, open_features(path), [0])
