"""What each kind of source holds, in which order, and what it says of what it cannot read."""

import gzip
import io
import json
import shutil
import tarfile
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from rich.console import Console
from tiny_encoder import png

from sotalign_jax.data_commands import labels
from sotalign_jax.encoders.sources import Columns, kind_of, open_source, tfds
from sotalign_jax.encoders.sources.webdataset import expand
from sotalign_jax.features import MissingFileError

QUIET = Console(quiet=True)


def items(source):
    """All records: (id, item or reason)."""
    records = [record for part in range(len(source.parts)) for record in source.read(part)]
    return [(record.id, record.reason or record.item) for record in records]


def texts(path, **options):
    return items(open_source(path, "text", **options))


def images(path, **options):
    return items(open_source(path, "image", **options))


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, data in members:
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


# Folders


def test_a_folder_has_its_images_in_the_order_of_their_paths(tmp_path):
    for name in ("b/2.PNG", "b/10.png", "a.jpg", "ü.webp", "b/.hidden.png", ".git/x.png", "n.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = images(tmp_path)
    assert images(f"{tmp_path}/") == found
    assert open_source(f"{tmp_path}/", "image").settings()["path"] == str(tmp_path)
    assert found == [
        ("a", tmp_path / "a.jpg"),
        ("b/10", tmp_path / "b/10.png"),
        ("b/2", tmp_path / "b/2.PNG"),
        ("ü", tmp_path / "ü.webp"),
    ]
    cut = open_source(tmp_path, "image", rows_per_shard=3)
    assert len(cut.parts) == 2 and [cut.rows(part) for part in (0, 1)] == [3, 1]
    assert items(cut) == found


def test_links_in_a_folder_are_followed_once(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(b"")
    (tmp_path / "images/again").symlink_to(tmp_path / "images")
    (tmp_path / "root").symlink_to(tmp_path / "images")
    assert [name for name, _ in images(tmp_path / "root")] == ["a"]


# Tables


def test_csv_with_all_that_fields_may_hold(tmp_path):
    table = tmp_path / "t.csv"
    table.write_bytes(
        b"\xef\xbb\xbfimage,caption\r\n"
        b'a/1.jpg,"two\r\nlines, ""quoted"""\r\n'
        b"\r\n"
        b"2.jpg,\xc3\xbcber \xe6\x97\xa5\r\n"
        b"3.jpg,bad \xff\r\n"
        b"4.jpg\r\n"
        b"5.jpg,\r\n"
        b"6.tar.jpg,last"
    )
    expected = [
        ("a/1", 'two\r\nlines, "quoted"'),
        ("2", "über 日"),
        ("row 2", "not UTF-8"),
        ("row 3", "wrong row: 1 fields, the header has 2"),
        ("5", ""),
        ("6.tar", "last"),
    ]
    assert texts(table) == expected
    for rows in (1, 2, 4):  # a part can be read without those before it
        source = open_source(table, "text", rows_per_shard=rows)
        assert items(source) == expected
        assert [r.id for r in source.read(len(source.parts) - 1)][-1] == "6.tar"
    assert images(table)[0] == ("a/1", tmp_path / "a/1.jpg")


def test_quotes_that_are_characters(tmp_path):
    (tmp_path / "t.tsv").write_text('caption\n"one" and two\n"three\n')
    with pytest.raises(ValueError, match=r"not written as TSV .*--noquoted takes them as they are"):
        texts(tmp_path / "t.tsv")
    expected = [("0", '"one" and two'), ("1", '"three')]
    assert texts(tmp_path / "t.tsv", quoted=False) == expected


def test_the_id_is_a_column_or_the_path_of_the_image_or_the_row(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("id,image,caption\nx,1.jpg,one\n,2.jpg,two\n")
    assert texts(tmp_path / "a.csv") == [("x", "one"), ("row 1", "no id")]
    (tmp_path / "b.csv").write_text(f"image,caption\n.\\c\\..\\1.jpg,one\n{tmp_path}/d/2.jpg,two\n")
    assert texts(tmp_path / "b.csv") == [("1", "one"), ("d/2", "two")]
    monkeypatch.chdir(tmp_path)
    assert texts("b.csv") == [("1", "one"), ("d/2", "two")]
    (tmp_path / "c.tsv").write_text("caption\tn\none\t7\ntwo\t8\n")
    assert texts(tmp_path / "c.tsv") == [("0", "one"), ("1", "two")]
    named = Columns(id="n")
    assert texts(tmp_path / "c.tsv", columns=named) == [("7", "one"), ("8", "two")]
    # An integer in another kind of table is the same id.
    (tmp_path / "d.jsonl").write_text('{"n": 7, "caption": "one"}\n')
    assert texts(tmp_path / "d.jsonl", columns=named) == [("7", "one")]


def test_json_lines(tmp_path):
    table = tmp_path / "t.jsonl"
    lines = [
        '{"id": "a", "caption": ["one", "two"], "info": {"alt": "first"}}',
        "",
        '{"id": "b", "caption": "three\\nlines", "info": {"alt": "second"}}',
        "[1]",
        "{broken",
        '{"id": "c", "caption": []}',
        '{"id": "d"}',
        '{"id": "e", "caption": [5, null, "six"]}',
        '{"id": 1.5, "caption": "x"}',
    ]
    table.write_text("\n".join(lines))
    assert texts(table) == [
        ("a", "one"),
        ("a", "two"),
        ("b", "three\nlines"),
        ("row 2", "not a JSON object"),
        ("row 3", "not a JSON object"),
        ("c", "no caption"),
        ("d", "no caption"),
        ("e", "no caption: int is not a string"),
        ("e", "no caption"),
        ("e", "six"),
        ("row 7", "no id: float is neither string nor integer"),
    ]
    nested = texts(table, columns=Columns(caption="info.alt"))
    assert nested[:2] == [("a", "first"), ("b", "second")]


def test_a_caption_a_line(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"one, two\n\n\xff\nlast\r\n")
    expected = [("0", "one, two"), ("1", ""), ("row 2", "not UTF-8"), ("3", "last")]
    assert texts(tmp_path / "t.txt") == expected


def test_images_of_a_table_that_are_none(tmp_path):
    (tmp_path / "t.jsonl").write_text(
        '{"image": "1.jpg"}\n{"image": ""}\n{"image": "http://a/b.jpg"}\n{"image": 5}\n'
    )
    assert images(tmp_path / "t.jsonl") == [
        ("1", tmp_path / "1.jpg"),
        ("row 1", "no id: the row has no path of an image"),
        ("http:/a/b", "no image: a URL; download it and give its path"),
        ("row 3", "no id: the row has no path of an image"),
    ]


@pytest.mark.parametrize(
    "name,text,message",
    [
        ("t.csv", "", "has no rows"),
        ("t.csv", "id,caption\n", "has no rows"),
        (
            "t.csv",
            "id,text\n1,a\n",
            "no column 'caption', it has 'id', 'text'; .*--column=caption:",
        ),
        ("t.csv", "id,id\n1,a\n", "first line must be a header of different names"),
        ("t.csv", 'id,caption\n1,"a"b\n2,c\n', "quoted field .* is not written as CSV"),
        ("t.csv", 'id,caption\n1,"a\n2,c\n', "quoted field .* is not written as CSV"),
        ("t.jsonl", "", "has no rows"),
        ("t.jsonl", '{"text": "a"}', "has no column 'caption', it has 'text'"),
        ("t.jsonl", "no JSON", "has no column 'caption', it has none"),
        ("t.txt", "", "has no rows"),
    ],
)
def test_tables_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(tmp_path / name, "text")
    assert str(tmp_path / name) in str(caught.value)


def test_a_column_that_was_asked_for_must_be_there(tmp_path):
    (tmp_path / "t.csv").write_text("id,caption\n1,a\n")
    with pytest.raises(ValueError, match="has no column 'key'"):
        open_source(tmp_path / "t.csv", "text", columns=Columns(id="key"))


# Parquet, and data sets on disk


def test_parquet_is_read_by_row_groups(tmp_path):
    ids = [f"i{n}" for n in range(1000)]
    captions = [[f"a{n}", f"b{n}"] if n % 3 else [f"a{n}"] for n in range(1000)]
    table = pa.table({"id": ids, "caption": captions, "other": np.zeros(1000)})
    pa.parquet.write_table(table, tmp_path / "t.parquet", row_group_size=300)
    expected = [(i, text) for i, several in zip(ids, captions, strict=True) for text in several]
    assert texts(tmp_path / "t.parquet") == expected
    for rows in (70, 299, 300, 512, 601):
        source = open_source(tmp_path / "t.parquet", "text", rows_per_shard=rows)
        assert items(source) == expected
        assert source.rows(0) is None  # nobody knows how many captions there are


def test_a_directory_of_parquet_files_as_a_hub_has_them(tmp_path):
    held = [{"bytes": png(n), "path": "x.png"} for n in range(5)]
    for number, rows in enumerate((held[:2], held[2:])):
        table = pa.table({"image": rows, "text": [str(n) for n in range(len(rows))]})
        (tmp_path / "data").mkdir(exist_ok=True)
        pa.parquet.write_table(table, tmp_path / f"data/train-0000{number}-of-00002-ab1.parquet")
    expected = [(str(n), held[n]["bytes"]) for n in range(5)]
    assert kind_of(str(tmp_path), "image") == "parquet"
    assert images(tmp_path) == images(tmp_path, split="train") == expected
    assert images(tmp_path, rows_per_shard=2) == expected
    found = texts(tmp_path, columns=Columns(caption="text"))
    assert found == [(str(n), text) for n, text in enumerate("01012")]
    with pytest.raises(ValueError, match=r"split: .* has no 'test', it has train"):
        images(tmp_path, split="test")

    pa.parquet.write_table(table, tmp_path / "data/test-00000-of-00001.parquet")
    with pytest.raises(ValueError, match=r"say which split, .*; it has test, train"):
        images(tmp_path)
    assert len(images(tmp_path, split="test")) == 3
    (tmp_path / "data/train-00000-of-00002-ab1.parquet").unlink()
    with pytest.raises(ValueError, match="of 2 files of the split 'train' there are 1"):
        images(tmp_path, split="train")


def test_parquet_that_cannot_be_read(tmp_path):
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"t\.parquet: not readable as Parquet"):
        texts(tmp_path / "t.parquet")
    for name in ("a", "b"):
        pa.parquet.write_table(
            pa.table({"caption": ["x"], name: [1]}), tmp_path / f"{name}.parquet"
        )
    with pytest.raises(ValueError, match=r"b\.parquet: has other columns than a\.parquet"):
        texts(f"{tmp_path}/[ab].parquet")


def save_to_disk(folder, parts, schema):
    """The files that `datasets.Dataset.save_to_disk` writes, as far as they are read."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(parts):05d}.arrow" for n in range(len(parts))]
    for name, rows in zip(names, parts, strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            for start in range(0, len(rows), 2):
                stream.write_batch(pa.RecordBatch.from_pylist(rows[start : start + 2], schema))
    state = {"_data_files": [{"filename": name} for name in names], "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    features = {"image": {"_type": "Image"}, "caption": {"_type": "Value", "dtype": "string"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("caption", pa.string()),
    ]
)


def test_what_save_to_disk_writes(tmp_path):
    rows = [{"image": {"bytes": png(n), "path": None}, "caption": f"caption {n}"} for n in range(6)]
    rows.append({"image": {"bytes": None, "path": "there.png"}, "caption": None})
    save_to_disk(tmp_path / "d/train", [rows[:5], [], rows[5:]], SCHEMA)
    expected = [(str(n), png(n)) for n in range(6)]
    expected.append(("6", tmp_path / "d/train/there.png"))
    for rows_per_shard in (1, 2, 3, 100):
        assert images(tmp_path / "d/train", rows_per_shard=rows_per_shard) == expected
    assert texts(tmp_path / "d/train")[5:] == [("5", "caption 5"), ("6", "no caption")]

    save_to_disk(tmp_path / "d/test", [rows[:1]], SCHEMA)
    (tmp_path / "d/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert images(tmp_path / "d", split="train") == expected
    with pytest.raises(ValueError, match=r"say which split, .*; it has train, test"):
        images(tmp_path / "d")
    with pytest.raises(ValueError, match=r"split: .* is one data set, without splits"):
        images(tmp_path / "d/test", split="train")

    file = tmp_path / "d/test/data-00000-of-00001.arrow"
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(ValueError, match="not readable as an Arrow stream"):
        images(tmp_path / "d/test")
    file.unlink()
    with pytest.raises(ValueError, match="not readable as an Arrow stream"):
        images(tmp_path / "d/test")
    (tmp_path / "d/test/state.json").write_text("{}")
    with pytest.raises(ValueError, match="does not list the files"):
        images(tmp_path / "d/test")


# Archives


MEMBERS = [
    ("__meta__/__meta__.json", "{}"),
    ("a/000.jpg", b"first"),
    ("a/000.txt", "one"),
    ("a/000.json", '{"caption": "other", "n": 5, "all": ["x", "y"]}'),
    ("a/001.seg.png", b"mask"),
    ("a/001.PNG", b"second"),
    ("a/001.json", '{"caption": "two"}'),
    ("a/.hidden.jpg", b"x"),
    ("b.c/002.json", '{"caption": ["three", "four"]}'),
    ("003.webp", b"fourth"),
    ("003.txt", b"\xff"),
]


@pytest.mark.parametrize("suffix,mode", [(".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz")])
def test_samples_of_archives(tmp_path, suffix, mode):
    path = tmp_path / f"t{suffix}"
    write_tar(path, MEMBERS, mode)
    missing = "no image: no member jpg, jpeg, png, webp"
    assert images(path) == [
        ("a/000", b"first"),
        ("a/001", b"second"),
        ("b.c/002", missing),
        ("003", b"fourth"),
    ]
    assert texts(path) == [
        ("a/000", "one"),
        ("a/001", "two"),
        ("b.c/002", "three"),
        ("b.c/002", "four"),
        ("003", "not UTF-8"),
    ]


def test_names_that_begin_at_the_folder(tmp_path):
    write_tar(tmp_path / "t.tar", [("./a/0.jpg", b"a"), ("./1.jpg", b"b")])
    assert images(tmp_path / "t.tar") == [("a/0", b"a"), ("1", b"b")]


def test_samples_of_one_key_are_not_mixed(tmp_path):
    several = [("0.jpg", b"a"), ("0.txt", "one"), ("0.jpg", b"b"), ("0.txt", "two"), ("1.jpg", b"")]
    write_tar(tmp_path / "t.tar", several)
    assert images(tmp_path / "t.tar") == [("0", b"a"), ("0", b"b"), ("1", b"")]
    assert texts(tmp_path / "t.tar") == [("0", "one"), ("0", "two"), ("1", "no caption")]


def test_what_is_read_of_samples_can_be_named(tmp_path):
    write_tar(tmp_path / "t.tar", MEMBERS)
    found = images(tmp_path / "t.tar", columns=Columns(image="seg.png"))
    assert found[1] == ("a/001", b"mask") and found[0][1] == "no image: no member seg.png"
    found = texts(tmp_path / "t.tar", columns=Columns(id="n", caption="all"))
    assert found[:2] == [("5", "x"), ("5", "y")] and found[2] == ("a/001", "no id")


def test_the_archives_that_a_pattern_names(tmp_path):
    for n in range(12):
        write_tar(tmp_path / f"d-{n:04d}.tar", [(f"{n}.txt", f"caption {n}")])
    expected = [(str(n), f"caption {n}") for n in range(12)]
    for pattern in ("d-{0000..0011}.tar", "d-*.tar", "d-0{000,001,002,003}.tar", ""):
        source = open_source(f"{tmp_path}/{pattern}", "text")
        assert source.kind == "webdataset"
        count = 4 if "," in pattern else 12
        assert items(source) == expected[:count]
        assert source.parts == tuple(f"d-{n:04d}.tar" for n in range(count))
    with pytest.raises(ValueError, match="braces inside of braces"):
        open_source(f"{tmp_path}/{{a,{{b,c}}}}.tar", "text")
    with pytest.raises(ValueError, match=r"d-0012\.tar: no such file, though .*0012"):
        open_source(f"{tmp_path}/d-{{0000..0012}}.tar", "text")
    with pytest.raises(ValueError, match=r"e-\*\.tar: matches no files"):
        open_source(f"{tmp_path}/e-*.tar", "text")
    with pytest.raises(MissingFileError, match=r"e\.tar: no such file"):
        open_source(f"{tmp_path}/e.tar", "text")


def test_braces():
    assert expand("a{8..11}") == ["a8", "a9", "a10", "a11"]
    assert expand("{08..11}{x,y}") == [n + s for n in ("08", "09", "10", "11") for s in "xy"]
    assert expand("a") == ["a"]


@pytest.mark.parametrize("cut", range(0, 7 * 512 + 1, 256))
def test_a_cut_archive_keeps_what_came_before_the_cut(tmp_path, cut):
    members = [(f"{n}.jpg", bytes([n]) * 300) for n in range(3)]
    write_tar(tmp_path / "t.tar", members)
    data = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(data[:cut])
    found = images(tmp_path / "t.tar")
    # A member is a block of a header and one of data, and needs 300 bytes of the latter; the mark
    # of the end is one more block.
    whole = sum(cut >= n * 1024 + 512 + 300 for n in range(3))
    assert found[:whole] == [(str(n), bytes([n]) * 300) for n in range(whole)]
    if cut >= 3 * 1024 + 512:
        assert len(found) == whole
    else:
        ((after, reason),) = found[whole:]
        assert after == (f"after {whole - 1}" if whole else "after the start")
        assert reason.startswith("broken archive: ")


def test_a_sample_that_is_cut_before_its_image_is_no_sample_without_one(tmp_path):
    write_tar(tmp_path / "t.tar", [("0.jpg", "a"), ("1.cls", "b"), ("1.jpg", "c" * 2000)])
    data = (tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(data[:3000])  # in the data of the third member
    (first, (name, reason)) = images(tmp_path / "t.tar")
    assert first == ("0", b"a") and name == "after 1" and reason.startswith("broken archive: ")


def test_archives_with_rubbish(tmp_path):
    write_tar(tmp_path / "t.tar", [(f"{n}.jpg", bytes([n]) * 300) for n in range(3)])
    data = bytearray((tmp_path / "t.tar").read_bytes())
    data[1024:1100] = b"\x55" * 76  # the header of the second member
    (tmp_path / "t.tar").write_bytes(data)
    found = images(tmp_path / "t.tar")
    assert found[0] == ("0", b"\0" * 300) and found[1][1].startswith("broken archive: ")
    (tmp_path / "n.tar").write_bytes(b"no archive" * 100)
    assert images(tmp_path / "n.tar")[0][1].startswith("broken archive: ")
    with gzip.open(tmp_path / "z.tar.gz", "wb") as file:
        file.write((tmp_path / "t.tar").read_bytes())
    data = (tmp_path / "z.tar.gz").read_bytes()
    (tmp_path / "z.tar.gz").write_bytes(data[: len(data) // 2])
    assert images(tmp_path / "z.tar.gz")[-1][1].startswith("broken archive: ")
    # Cut in a field of the header that has its length in front.
    (tmp_path / "h.tar.gz").write_bytes(b"\x1f\x8b\x08\x04" + bytes(6))
    reason = "broken archive: the header of gzip breaks off"
    assert images(tmp_path / "h.tar.gz") == [("after the start", reason)]


# tensorflow-datasets


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set of five images and captions, prepared as ArrayRecord."""
    library = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("array_record")

    class Tiny(library.core.GeneratorBasedBuilder):
        VERSION = library.core.Version("1.0.0")
        pkg_dir_path = Path(__file__).parent

        def _info(self):
            features = library.features.FeaturesDict(
                {
                    "image": library.features.Image(shape=(None, None, 3)),
                    "caption": library.features.Text(),
                    "captions": library.features.Sequence({"text": library.features.Text()}),
                    "n": library.features.Scalar(np.int64),
                }
            )
            return library.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(5), "test": self._generate_examples(1)}

        def _generate_examples(self, count):
            for n in range(count):
                texts = [{"text": f"a{n}"}, {"text": f"b{n}"}]
                yield (
                    n,
                    {
                        "image": io.BytesIO(png(n)),
                        "caption": f"über {n}",
                        "captions": texts,
                        "n": n,
                    },
                )

    root = tmp_path_factory.mktemp("tfds")
    builder = Tiny(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


def test_data_sets_of_tfds(prepared):
    named = Columns(id="n")
    assert kind_of(str(prepared), "image") == "tfds"
    found = images(prepared, split="train", columns=named)
    assert sorted(found) == [(str(n), png(n)) for n in range(5)]
    assert images(prepared, split="train", columns=named, rows_per_shard=2) == found
    assert [name for name, _ in images(prepared, split="train")] == list("01234")
    found = texts(prepared, split="train", columns=named)
    assert sorted(found) == [(str(n), f"über {n}") for n in range(5)]
    nested = texts(prepared, split="test", columns=Columns(id="n", caption="captions.text"))
    assert nested == [("0", "a0"), ("0", "b0")]
    with pytest.raises(ValueError, match="say which split"):
        texts(prepared)
    with pytest.raises(ValueError, match=r"has no column 'title', it has .*'caption'"):
        texts(prepared, split="test", columns=Columns(caption="title"))
    with pytest.raises(ValueError, match=r"column 'caption' is .* no Image"):
        images(prepared, split="test", columns=Columns(image="caption"))


def test_labels_have_the_ids_of_the_images(prepared, tmp_path):
    count = labels(str(prepared), str(tmp_path / "labels.jsonl"), "n", QUIET, split="train")
    assert count == 5
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [name for name, _ in images(prepared, split="train")]
    pictures = dict(images(prepared, split="train"))
    assert {name: pictures[name] for name in pictures} == {
        line["id"]: png(line["label"]) for line in lines
    }
    with pytest.raises(ValueError, match="exists; give another file"):
        labels(str(prepared), str(tmp_path / "labels.jsonl"), "n", QUIET, split="train")


def test_labels_of_tables(tmp_path):
    (tmp_path / "shop.csv").write_text("image,kind,id\na/1.png,größe 1,x\na/2.png,two,y\n")
    found = tmp_path / "labels.jsonl"
    labels(str(tmp_path / "shop.csv"), str(found), "kind", QUIET)
    assert [json.loads(line) for line in found.read_text().splitlines()] == [
        {"id": "x", "label": "größe 1"},
        {"id": "y", "label": "two"},
    ]
    table = pa.table({"image": ["a/1.png", "a/2.png"], "label": [3, 0], "other": [0.5, 1.5]})
    pyarrow.parquet.write_table(table, tmp_path / "shop.parquet")
    found.unlink()
    labels(str(tmp_path / "shop.parquet"), str(found), console=QUIET)
    assert [json.loads(line) for line in found.read_text().splitlines()] == [
        {"id": "a/1", "label": 3},
        {"id": "a/2", "label": 0},
    ]
    found.unlink()
    for column, message in {
        "price": r"has no column 'price', it has .*'label'",
        "other": r"other of 'a/1' is 0\.5; must be text or a number",
    }.items():
        with pytest.raises(ValueError, match=message):
            labels(str(tmp_path / "shop.parquet"), str(found), column, QUIET)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "1.png").write_bytes(png(1))
    with pytest.raises(ValueError, match="is read as folder, which has no columns of labels"):
        labels(str(tmp_path / "folder"), str(found), console=QUIET)
    assert not found.exists()


def test_data_sets_that_are_not_array_records(prepared, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    (record,) = copy.glob("tiny-test.array_record*")
    record.write_bytes(record.read_bytes()[:300])
    with pytest.raises(ValueError, match="copy: row 0 cannot be read"):
        texts(copy, split="test")
    info = (copy / "dataset_info.json").read_text()
    (copy / "dataset_info.json").write_text(info.replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"not stored as ArrayRecord, .*'array_record'"):
        texts(copy, split="test")


def test_a_data_set_of_tfds_is_the_same_in_every_process(prepared, monkeypatch):
    found = []
    build = tfds._builder
    for order in (sorted, lambda names: sorted(names, reverse=True)):

        def ordered(*given, order=order):
            builder, named = build(*given)
            features = {name: builder.info.features[name] for name in order(builder.info.features)}
            info = types.SimpleNamespace(
                features=features, splits=builder.info.splits, full_name=builder.info.full_name
            )
            return types.SimpleNamespace(
                info=info, as_data_source=builder.as_data_source, data_dir=builder.data_dir
            ), named

        monkeypatch.setattr(tfds, "_builder", ordered)
        source = open_source(prepared, "text", split="train")
        found.append((source.settings(), items(source)))
    assert found[0] == found[1]


def test_data_sets_that_tfds_does_not_have(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="must be tfds:NAME"):
        texts("tfds:")
    with pytest.raises(
        ValueError, match="tfds:no_such/train: tensorflow-datasets cannot load no_such"
    ):
        texts("tfds:no_such/train")
    with pytest.raises(ValueError, match="not a data set that tensorflow-datasets wrote"):
        texts(tmp_path, kind="tfds")


# Which kind a path is


def test_the_kind_is_found_or_said(tmp_path):
    (tmp_path / "table.dat").write_text("caption\na\n")
    with pytest.raises(ValueError, match=r"unknown suffix '\.dat'; .*--kind=folder"):
        texts(tmp_path / "table.dat")
    assert texts(tmp_path / "table.dat", kind="csv") == [("0", "a")]
    with pytest.raises(ValueError, match="kind must be one of folder, csv"):
        texts(tmp_path / "table.dat", kind="xls")
    with pytest.raises(ValueError, match="is a file, folder is a directory"):
        images(tmp_path / "table.dat", kind="folder")
    with pytest.raises(ValueError, match="is a directory, csv is a file"):
        texts(tmp_path, kind="csv")
    with pytest.raises(ValueError, match=r"table\.dat is of kind csv, which has none"):
        texts(tmp_path / "table.dat", kind="csv", split="train")
    for path in (tmp_path / "nothing", tmp_path / "nothing.csv", tmp_path / "nothing.parquet"):
        with pytest.raises(MissingFileError, match="nothing"):
            texts(path)


def test_what_has_nothing_of_the_modality(tmp_path):
    with pytest.raises(ValueError, match="no images below it"):
        images(tmp_path)
    with pytest.raises(ValueError, match="holds no archives, Parquet files or data set"):
        texts(tmp_path)
    (tmp_path / "t.txt").write_text("a\n")
    with pytest.raises(ValueError, match="a text file has no images"):
        images(tmp_path / "t.txt")
    with pytest.raises(ValueError, match="a folder of images has no texts"):
        texts(tmp_path, kind="folder")
    with pytest.raises(ValueError, match="no archives"):
        texts(tmp_path, kind="webdataset")
    with pytest.raises(ValueError, match="rows_per_shard must be at least 1"):
        texts(tmp_path / "t.txt", rows_per_shard=0)
    with pytest.raises(ValueError, match="modality must be 'image' or 'text'"):
        open_source(tmp_path, "audio")


@pytest.mark.parametrize("rows_per_shard", [1, 2, 9])
def test_csv_rows_end_with_any_line_end(tmp_path, rows_per_shard):
    expected = [("0", "a\rb"), ("1", "c"), ("2", "d"), ("3", "e")]
    for end in ("\n", "\r\n", "\r"):
        rows = ["id,caption", '0,"a\rb"', "1,c", "2,d", "3,e"]
        for last in (end, ""):
            (tmp_path / "t.csv").write_bytes((end.join(rows) + last).encode())
            found = texts(tmp_path / "t.csv", rows_per_shard=rows_per_shard)
            assert found == expected, (end, last)
    (tmp_path / "t.csv").write_bytes(b"id,caption\r\n0,a\rb\r\n1,c\r\n")
    wrong = ("row 1", "wrong row: 1 fields, the header has 2")
    assert texts(tmp_path / "t.csv") == [("0", "a"), wrong, ("1", "c")]


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
def test_a_file_of_one_line_by_its_line_ends_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b'{"caption": "a"}\r{"caption": "b"}\r')
    with pytest.raises(ValueError, match=r"lines end with a carriage return alone \(\\r, as"):
        texts(tmp_path / name)
    (tmp_path / name).write_bytes(b'{"caption": "a"}\r')
    assert texts(tmp_path / name) in ([("0", "a")], [("0", '{"caption": "a"}')])


def test_paths_of_windows_are_found_or_explained(tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.png", "b\\c.png"):
        (tmp_path / name).write_bytes(png(0))
    names = ["photos\\a.png", "b\\c.png", "C:\\photos\\a.png"]
    (tmp_path / "t.csv").write_text("image\n" + "".join(f"{name}\n" for name in names))
    hint = "as it is written and with / for each backslash"
    assert images(tmp_path / "t.csv") == [
        ("photos/a", tmp_path / "photos/a.png"),
        ("b/c", tmp_path / names[1]),  # a file may be called so
        ("C:/photos/a", f"not readable: No such file or directory, {hint}"),
    ]


def test_a_source_that_changed_has_other_settings(tmp_path):
    def settings():
        return open_source(tmp_path / "t.csv", "text").settings()

    (tmp_path / "t.csv").write_text("caption\na\n")
    before = settings()
    assert settings() == before and json.loads(json.dumps(before)) == before
    (tmp_path / "t.csv").write_text("caption\na\nb\n")
    assert settings() != before


def test_archives_that_changed_have_other_settings(tmp_path):
    found = []
    for names in ("0", "01"):
        write_tar(tmp_path / "t.tar", [(f"{n}.txt", "a" * 9999) for n in names])
        found.append(open_source(tmp_path / "t.tar", "text").settings())
    assert found[0] != found[1]


def test_parquet_that_changed_has_other_settings(tmp_path):
    found = []
    for caption in ("a", "another"):
        pa.parquet.write_table(pa.table({"caption": [caption]}), tmp_path / "t.parquet")
        found.append(open_source(tmp_path / "t.parquet", "text").settings())
    assert found[0] != found[1]
