"""Tables of captions from tiny annotation files of the formats that data sets have."""

import csv
import dataclasses
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from sotalign_jax import captions
from sotalign_jax.captions import CAPTIONS, write_captions


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Writes an annotation file and reads it as a data set of other counts."""

    def make(name, text, records, texts, **options):
        monkeypatch.setitem(
            CAPTIONS, name, dataclasses.replace(CAPTIONS[name], records=records, captions=texts)
        )
        (tmp_path / "annotations").write_text(text, encoding="utf-8")
        out = tmp_path / "new" / "out.jsonl"
        assert write_captions(name, tmp_path / "annotations", out, **options) == (records, texts)
        (only,) = out.parent.iterdir()  # no temporary file is left
        return [json.loads(line) for line in only.read_text(encoding="utf-8").splitlines()]

    return make


COCO = {
    "images": [
        {"id": 785, "file_name": "000000000785.jpg"},
        {"id": 139, "file_name": "000000000139.jpg"},
        {"id": 632, "file_name": "000000000632.jpg"},
    ],
    "annotations": [
        *({"image_id": 785, "id": 900 - i, "caption": f" skier {i}\n"} for i in range(7)),
        {"image_id": 139, "id": 2, "caption": "a room “with” a clock"},
        *({"image_id": 632, "id": i, "caption": f"bed {i}"} for i in range(5)),
    ],
}


def test_coco_by_id_with_the_first_five_in_the_order_of_the_file(tiny):
    assert tiny("coco_val2017", json.dumps(COCO), 3, 11) == [
        {
            "id": "000000000139",
            "image": "val2017/000000000139.jpg",
            "caption": "a room “with” a clock",
        },
        {
            "id": "000000000632",
            "image": "val2017/000000000632.jpg",
            "caption": [f"bed {i}" for i in range(5)],
        },
        {
            "id": "000000000785",
            "image": "val2017/000000000785.jpg",
            "caption": [f"skier {i}" for i in range(5)],
        },
    ]


def karpathy(**more):
    images = [
        {"split": split, "filename": f"{name}.jpg", "sentences": [{"raw": text} for text in texts]}
        | more
        for split, name, texts in (
            ("test", "COCO_val2014_000000391895", ["A man. ", "Men."]),
            ("restval", "COCO_val2014_000000000042", ["A shoe"]),
            ("test", "COCO_val2014_000000000285", ["A bear, brown."]),
        )
    ]
    return json.dumps({"images": images, "dataset": "coco"})


def test_karpathys_splits_with_all_captions(tiny):
    assert tiny("coco_karpathy_test", karpathy(filepath="val2014"), 2, 3) == [
        {
            "id": "COCO_val2014_000000391895",
            "image": "val2014/COCO_val2014_000000391895.jpg",
            "caption": ["A man.", "Men."],
        },
        {
            "id": "COCO_val2014_000000000285",
            "image": "val2014/COCO_val2014_000000000285.jpg",
            "caption": "A bear, brown.",
        },
    ]


def test_flickrs_images_lie_in_one_folder(tiny):
    (first, _) = tiny("flickr30k_test", karpathy(), 2, 3)
    assert first["image"] == "flickr30k-images/COCO_val2014_000000391895.jpg"


@pytest.mark.parametrize("header", ["", "caption\turl\n"])
def test_lists_of_links_get_the_keys_of_img2dataset(header, tiny):
    text = header + 'a "quoted, caption\thttp://a/1.jpg\r\nsecond \u2028 one\thttp://b?x=1\n'
    assert tiny("cc3m_val", text, 2, 2) == [
        {"id": "000000000", "url": "http://a/1.jpg", "caption": 'a "quoted, caption'},
        {"id": "000000001", "url": "http://b?x=1", "caption": "second \u2028 one"},
    ]


def test_cc12m_has_the_link_first(tiny):
    assert tiny("cc12m", "http://a\tone\n", 1, 1) == [
        {"id": "000000000", "url": "http://a", "caption": "one"}
    ]


def dreamlip(tmp_path):
    file = tmp_path / "dreamlip"
    with open(file, "w", newline="", encoding="utf-8") as out:
        rows = csv.writer(out)
        rows.writerow(["Image Path", "raw_caption", "shortSV_captions", "longSV_captions"])
        rows.writerow(["http://b", "raw", "short, with a comma", "long\nin two lines"])
        rows.writerow(["http://dead", "raw", "unknown", "long"])
        rows.writerow(["http://a", "raw", "third", "x" * 200_000])
    return file.read_text(encoding="utf-8")


def test_dreamlip_by_rows_and_by_links(tiny, tmp_path):
    text = dreamlip(tmp_path)
    found = tiny("dreamlip_cc3m", text, 3, 3)
    assert [(row["id"], row["caption"]) for row in found] == [
        ("000000000", "short, with a comma"), ("000000001", "unknown"), ("000000002", "third"),
    ]  # fmt: skip
    links = tmp_path / "cc3m.jsonl"
    links.write_text('{"id": "000000007", "url": "http://a", "caption": ""}\n'
                     '{"id": "000000004", "url": "http://b", "caption": ""}\n'
                     '{"id": "000000009", "url": "http://b", "caption": "again"}\n')  # fmt: skip
    (tmp_path / "new" / "out.jsonl").unlink()
    found = tiny("dreamlip_cc3m", text, 2, 2, urls=str(links), variant="longSV_captions")
    assert [(row["id"], len(row["caption"])) for row in found] == [
        ("000000004", 17), ("000000007", 200_000),
    ]  # fmt: skip


def test_wikitext_without_headings_and_empty_lines(tiny):
    text = " \n = Robert Boulter = \n \n Robert is = an actor . \n\n = = Career = = \n In 2000\n"
    text += " = 2 x\n"
    assert tiny("wikitext103", text, 3, 3) == [
        {"id": "000000003", "caption": "Robert is = an actor ."},
        {"id": "000000006", "caption": "In 2000"},
        {"id": "000000007", "caption": "= 2 x"},
    ]


def test_wikitext_of_the_hub_is_the_same(tiny, tmp_path):
    lines = ["", " = Robert Boulter = \n", "", " Robert is = an actor . \n", "", " In 2000\n"]
    assert tiny("wikitext103", "\n" + "".join(lines[1:2]) + "\n" + "".join(lines[3:4]) + "\n"
                + "".join(lines[5:]), 2, 2)  # fmt: skip
    expected = (tmp_path / "new" / "out.jsonl").read_text()
    hub = tmp_path / "wikitext-103-raw-v1"
    hub.mkdir()
    for part, rows in enumerate((lines[:4], lines[4:])):
        table = pyarrow.table({"text": rows})
        pyarrow.parquet.write_table(table, hub / f"train-{part:05d}-of-00002.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["of a test"]}), hub / "test-00000.parquet")
    assert write_captions("wikitext103", hub, tmp_path / "hub.jsonl") == (2, 2)
    assert (tmp_path / "hub.jsonl").read_text() == expected
    (hub / "train-00001-of-00002.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet: no Parquet file with"):
        write_captions("wikitext103", hub, tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"annotations: .*new: has no train-\*\.parquet"):
        write_captions("wikitext103", tmp_path / "new", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"annotations: .*new: no such file; mmvp is read from"):
        write_captions("mmvp", tmp_path / "new", tmp_path / "a.jsonl")


def test_sue_takes_the_first_caption_of_the_first_400_images(tmp_path, monkeypatch):
    """In the order of the token file; the rest is to train on."""
    file = tmp_path / "results_20130124.token"
    names = [f"{number}.jpg" for number in (1000092795, 10002456, *range(7_000, 7_400))]
    lines = [f"{name}#{k}\tA man , {k} of {name} .\n" for name in names for k in range(5)]
    file.write_text("".join(lines), encoding="utf-8")
    table = CAPTIONS["sue_flickr30k"]
    monkeypatch.setitem(
        CAPTIONS, "sue_flickr30k", dataclasses.replace(table, records=2, captions=2)
    )
    read = {}
    for name, rows in (("sue400_flickr30k", 400), ("sue_flickr30k", 2)):
        out = tmp_path / f"{name}.jsonl"
        assert write_captions(name, file, out) == (rows, rows)
        read[name] = [json.loads(line) for line in out.read_text().splitlines()]
    assert read["sue400_flickr30k"][1] == {
        "id": "10002456",
        "image": "flickr30k-images/10002456.jpg",
        "caption": "A man , 0 of 10002456.jpg .",
    }
    together = [row["id"] for rows in read.values() for row in rows]
    assert together == [name.removesuffix(".jpg") for name in names]
    file.write_text("".join(lines) + "1.jpg\tno number\n")
    with pytest.raises(ValueError, match=r"line 2011 is not IMAGE\.jpg#K, a tab and a caption"):
        write_captions("sue400_flickr30k", file, tmp_path / "a.jsonl")


def test_sue_takes_coco_by_id(tmp_path):
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in range(10_910, 0, -1)]
    captions = [
        {"image_id": number, "caption": f"{k} of {number}"}
        for k in range(5)
        for number in range(1, 10_911)
    ]
    file = tmp_path / "captions_train2017.json"
    file.write_text(json.dumps({"images": images, "annotations": captions}))
    for name, first, rows in (("sue400_coco", 1, 400), ("sue_coco", 401, 10_500)):
        out = tmp_path / f"{name}.jsonl"
        assert write_captions(name, file, out) == (rows, rows)
        read = [json.loads(line) for line in out.read_text().splitlines()]
        assert [int(row["id"]) for row in read] == list(range(first, first + rows))
        assert read[0]["caption"] == f"0 of {first}"
        assert read[0]["image"] == f"train2017/{first:012d}.jpg"


def winoground(**change):
    items = [
        {
            "id": k,
            "image_0": f"ex_{k}_img_0",
            "image_1": f"images/ex_{k}_img_1.png",
            "caption_0": f"first {k}",
            "caption_1": f"second {k}",
            "tag": "",
        }
        for k in range(2)
    ]
    items[1] |= change
    return "".join(json.dumps(item) + "\n" for item in items)


def test_winoground_items(tiny):
    assert tiny("winoground", winoground(), 4, 4) == [
        {"id": f"{k}/{part}", "image": f"images/ex_{k}_img_{part}.png", "caption": f"{word} {k}"}
        for k in range(2)
        for part, word in enumerate(("first", "second"))
    ]


def questions(*more):
    rows = [
        (str(number), "Orientation" if number <= 30 else "Camera Perspective", f"thing, {number}")
        for number in range(1, 33)
    ]
    for place, row in more:
        rows[place] = row
    lines = ["Question ID,Type,Statement"]
    lines += [f'{number},{kind},"{statement}"' for number, kind, statement in rows]
    return "\r\n".join(lines) + "\r\n"


def test_mmvp_pairs_in_the_order_of_the_questions(tiny):
    found = tiny("mmvp", questions(), 32, 32)
    assert found[1] == {
        "id": "0/1",
        "image": "MLLM_VLM Images/Orientation/2.jpg",
        "caption": "a photo of thing, 2",
    }
    assert found[30]["id"] == "15/0" and found[30]["image"].endswith("Camera Perspective/31.jpg")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("coco_val2017", json.dumps(COCO),
         "3 records with 11 captions, but coco_val2017 has 5,000 with 25,000; is it "
         "captions_val2017.json, whole and of that split?"),
        ("coco_val2017", '{"images": 3}', "not COCO captions: {images, annotations}"),
        ("coco_val2017", "{", "not JSON"),
        ("flickr30k_val", karpathy(), "0 records with 0 captions, but flickr30k_val has 1,014"),
        ("coco_karpathy_test", karpathy(), "not one of Karpathy's files: {images: [{split, ...}]} "
         "(KeyError: 'filepath')"),
        ("cc3m_val", "one\ttwo\tthree\n", "line 1 has 3 columns between tabs, not a caption and"),
        ("cc3m_val", "a\tb\n" * 15_841, "15,841 records with 15,841 captions, but cc3m_val has"),
        ("dreamlip_cc3m", "url,raw\n1,2\n", "has no 'shortSV_captions'; DreamLIP has raw_caption, "
         "shortIB_captions, longIB_captions,"),
        ("dreamlip_cc3m", "a,b\n1,2\n", "no column 'Image Path'; it has ['a', 'b']"),
        ("dreamlip_cc3m", "url,shortSV_captions\n1\n", "row 1 is cut short"),
        ("dreamlip_cc3m", "url,shortSV_captions\n", "0 records with 0 captions, but dreamlip_cc3m "
         "has up to 3,318,333"),
        ("winoground", winoground(id=7), "not Winoground's examples.jsonl, line 2 (ValueError: id "
         "7, not 1)"),
        ("winoground", "{}\n", "not Winoground's examples.jsonl, line 1 (KeyError: 'id')"),
        ("mmvp", questions((2, ("4", "Orientation", "x"))), "question 4 stands at place 3; a pair "
         "is an odd number and then an even one"),
        ("mmvp", questions((3, ("4", "Color", "x"))), "question 4 is of type 'Color', others of "
         "its fifteen pairs of 'Orientation'"),
        ("mmvp", "h\n1,2\n", "question 1 is not a number, a type and a statement"),
    ],
)  # fmt: skip
def test_other_files_are_refused_and_leave_nothing(name, text, message, tmp_path):
    file = tmp_path / "annotations"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        write_captions(name, file, tmp_path / "out.jsonl")
    assert message in str(caught.value) and str(file) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["annotations"]


def test_arguments_are_checked_before_anything_is_read(tmp_path):
    out = tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="captions: no 'coco'; there are coco_val2017, coco_train"):
        write_captions("coco", tmp_path / "none", out)
    with pytest.raises(ValueError, match=r"none: no such file; cc12m is read from cc12m\.tsv"):
        write_captions("cc12m", tmp_path / "none", out)
    with pytest.raises(ValueError, match="--variant, --urls: are of dreamlip_cc3m, not of cc12m"):
        write_captions("cc12m", tmp_path / "none", out, variant="caption")
    file = tmp_path / "a"
    file.write_text("url,shortSV_captions\nu,c\n")
    with pytest.raises(ValueError, match=r"urls: .*none: not a table of captions with links"):
        write_captions("dreamlip_cc3m", file, out, urls=str(tmp_path / "none"))
    out.write_text("mine")
    with pytest.raises(ValueError, match=r"out: .*out\.jsonl exists"):
        write_captions("cc12m", file, out)
    assert out.read_text() == "mine"


def test_counts_are_those_that_people_know():
    counts = {name: (table.records, table.captions) for name, table in captions.CAPTIONS.items()}
    assert counts["coco_val2017"] == (5_000, 25_000)
    assert counts["coco_train2017"] == (118_287, 5 * 118_287)
    assert counts["coco_karpathy_test"] == (5_000, 25_010)
    of_2014 = [counts[f"coco_karpathy_{split}"] for split in ("train", "restval", "val", "test")]
    assert [sum(column) for column in zip(*of_2014, strict=True)] == [123_287, 616_767]
    of_flickr = [counts[f"flickr30k_{split}"] for split in ("train", "val", "test")]
    assert [sum(column) for column in zip(*of_flickr, strict=True)] == [31_014, 155_070]
    assert counts["cc3m_train"][0] == 3_318_333 and counts["cc3m_val"][0] == 15_840
    assert counts["winoground"] == (800, 800) and counts["mmvp"] == (270, 270)


@pytest.mark.parametrize("name", ["cc12m", "wikitext103", "winoground", "mmvp", "dreamlip_cc3m"])
def test_archives_are_to_be_unpacked(name, tmp_path):
    (tmp_path / "annotations").write_bytes(gzip.compress(b"caption\thttp://a\n"))
    with pytest.raises(ValueError) as caught:
        write_captions(name, tmp_path / "annotations", tmp_path / "out.jsonl")
    assert str(caught.value).startswith(
        f"annotations: {tmp_path / 'annotations'}: not text in UTF-8 as {CAPTIONS[name].file}, "
    )
    assert [path.name for path in tmp_path.iterdir()] == ["annotations"]
