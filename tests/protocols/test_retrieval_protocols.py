"""Retrieval protocols: numbers by hand on tiny splits, refusals on splits of the real size."""

import dataclasses
import json

import numpy as np
import pytest
from identity import from_scores, identity, table

from sotalign_jax import evaluation, fitted, protocols
from sotalign_jax.features import FeatureTable, pair
from sotalign_jax.protocols import PROTOCOLS

COCO, KARPATHY, FLICKR, CC3M, SUE = (
    PROTOCOLS[name] for name in ("coco_val2017", "coco_karpathy", "flickr30k", "cc3m_val", "sue400")
)


def coco_ids(n=5_000):
    """Ids as those of val2017, the first and the last of which are known."""
    numbers = [139, *range(1_000, 1_000 + n - 2), 581781]
    return [f"{number:012d}" for number in numbers]


def tiny(protocol, **counts):
    return dataclasses.replace(protocol, members=(), **counts)


# ---- numbers


def test_first_captions_by_hand():
    """Three images with 2, 3 and 2 captions, of which the first two count; text order is mixed."""
    scores = [
        # a0   b0   c0   a1   b1   b2   c1
        [0.5, 0.1, 0.0, 0.2, 0.3, 0.6, 0.1],  # a: best own 0.5, rank 1; b2, which is above, is out
        [0.2, 0.1, 0.3, 0.1, 0.2, 0.7, 0.0],  # b: best own 0.2; c0 above, a0 ties: rank 2.5
        [0.1, 0.4, 0.2, 0.3, 0.0, 0.0, 0.1],  # c: best own 0.2; b0 and a1 above: rank 3
    ]
    image, text = from_scores(scores, ["a", "b", "c"], ["a", "b", "c", "a", "b", "b", "c"])
    protocol = tiny(COCO, images=3, texts=6, captions=2)
    result = protocol.run(identity(10), image, text)
    # Text to image, by column: a0 1, b0 2.5 (c above, a ties), c0 2, a1 2, b1 2, c1 1.5 (a ties).
    assert result["metrics"] == pytest.approx(
        {
            "i2t/recall@1": 1 / 3,
            "i2t/recall@5": 1.0,
            "i2t/recall@10": 1.0,
            "t2i/recall@1": 1 / 6,
            "t2i/recall@5": 1.0,
            "t2i/recall@10": 1.0,
            "mean_recall@1": (1 / 3 + 1 / 6) / 2,
            "mean_recall@5": 1.0,
            "mean_recall@10": 1.0,
            "t2i/median_rank": 2.0,
            "i2t/median_rank": 2.5,
            # Rivals above, of 2 wrong images and of 4 wrong texts.
            "foscttm": ((0 + 1.5 + 1 + 1 + 1 + 0.5) / 6 / 2 + (0 + 1 + 3.5 + 1.5 + 2 + 2.5) / 6 / 4)
            / 2,
            "n_images": 3.0,
            "n_texts": 6.0,
        },
        abs=1e-9,
    )
    assert result["notes"][0] == (
        "1 texts beyond the first 2 of an image are left out, of 1 images"
    )
    assert json.loads(json.dumps(result)) == result
    assert result["protocol"] == "coco_val2017"
    assert "SOTAlign" in [row["label"] for row in result["published"]]


def test_all_captions_count_without_a_cut():
    scores = np.random.default_rng(0).uniform(-0.2, 0.2, size=(4, 9))
    image, text = from_scores(scores, list("abcd"), list("abcdabcdb"))
    result = tiny(KARPATHY, images=4, texts=9).run(identity(13), image, text)
    expected = evaluation.retrieval_metrics(
        image.array(), text.array(), text_to_image=np.array([0, 1, 2, 3, 0, 1, 2, 3, 1])
    )
    assert result["metrics"] == expected
    assert result["notes"] == [KARPATHY.remark]


def test_missing_rows_of_cc3m_are_joined_by_id_and_told():
    scores = np.eye(4) / 2
    image, text = from_scores(scores, ["1", "2", "3", "9"], ["2", "4", "1", "3"])
    result = tiny(CC3M, images=5, texts=5).run(identity(8), image, text)
    assert result["metrics"]["n_images"] == result["metrics"]["n_texts"] == 3
    joined = pair(image.select([0, 1, 2]), text.select([0, 2, 3]))
    rows = joined.image.array(), joined.text.array()
    assert result["metrics"] == evaluation.retrieval_metrics(*rows)
    assert result["notes"][:3] == [
        "3 of 5 pairs (60.0 %): the rest is missing",
        "1 of 4 images have no partner and are left out",
        "1 of 4 texts have no partner and are left out",
    ]
    whole = tiny(CC3M, images=4, texts=4).run(identity(8), *from_scores(scores, "abcd", "abcd"))
    assert whole["notes"] == [CC3M.remark] and whole["metrics"]["mean_recall@1"] == 1


def test_one_to_one_tables_without_ids_are_joined_by_row():
    image, text = from_scores(np.eye(4) / 2, None, None)
    result = tiny(SUE, images=4, texts=4).run(identity(8), image, text)
    assert result["metrics"]["mean_recall@1"] == 1
    assert result["notes"] == ["joined by row: the tables have no ids"]
    fewer = tiny(CC3M, images=5, texts=5).run(identity(8), image, text)
    assert fewer["notes"][0] == "4 of 5 pairs (80.0 %): the rest is missing"


@pytest.mark.parametrize("kind", ["csa", pytest.param("asif", marks=pytest.mark.slow)])
def test_any_aligner_is_scored_by_its_own_similarity(kind):
    rng = np.random.default_rng(3)
    world = rng.normal(size=(60, 4))
    views = world @ rng.normal(size=(4, 11)) + 0.3 * rng.normal(size=(60, 11))
    views = views.astype(np.float32)
    options = {"neighbours": 6} if kind == "asif" else {}
    aligner = fitted.fit(kind, views[:40, :6], views[:40, 6:], options=options)
    ids = [f"{i}" for i in range(20)]
    image = FeatureTable.from_array(views[40:, :6], ids=ids)
    text = FeatureTable.from_array(views[40:, 6:][::-1], ids=ids[::-1])
    result = tiny(SUE, images=20, texts=20).run(aligner, image, text)
    scores = np.asarray(aligner.similarity(image.array(), text.array()[::-1]))
    expected = evaluation.retrieval_of_scores(
        lambda rows: scores[rows], lambda rows: scores.T[rows], 20, 20
    )
    assert result["metrics"] == pytest.approx(expected, abs=1e-9)


# ---- what is let through, at the real sizes


def test_the_known_splits_are_taken():
    ids = coco_ids()
    rows = COCO.select(table(ids, "i"), table(ids * 5, "t"))
    assert len(rows.text) == 25_000 and rows.notes == ()
    # 12 images have six captions and one has seven.
    rows = COCO.select(table(ids, "i"), table([*ids * 5, *ids[:13], ids[12]], "t"))
    assert len(rows.text) == 25_000
    assert rows.notes == ("14 texts beyond the first 5 of an image are left out, of 13 images",)
    assert list(rows.text.stored_rows) == list(range(25_000))
    karpathy = [f"COCO_val2014_{number:012d}" for number in (391895, *range(4_999))]
    rows = KARPATHY.select(table(karpathy, "i"), table([*karpathy * 5, *karpathy[:10]], "t"))
    assert len(rows.text) == 25_010
    flickr = [f"{number}" for number in range(1_000)]
    assert len(FLICKR.select(table(flickr, "i"), table(flickr * 5, "t")).text) == 5_000
    assert len(FLICKR.select(table(FLICKR_IDS, "i"), table(FLICKR_IDS * 5, "t")).text) == 5_000
    # Of the user's own, with nothing to tell by.
    for form in ("row-{}x", "{}", "image_{}", "1{:012d}"):
        own = [form.format(index) for index in range(5_000)]
        assert len(COCO.select(table(own, "i"), table(own * 5, "t")).image) == 5_000
    mixed = [f"{number}" for number in np.random.default_rng(0).permutation(5_000)]
    assert COCO.select(table(mixed, "i"), table(sorted(mixed) * 5, "t")).notes == ()
    some = [*(f"image_{index}" for index in range(4_999)), "000000000139"]
    assert len(COCO.select(table(some, "i"), table(some * 5, "t")).image) == 5_000


# ---- refusals


def refusal(protocol, image, text):
    with pytest.raises(ValueError) as caught:
        protocol.select(image, text)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{protocol.name}: ")
    return message


FLICKR_IDS = [f"{number}" for number in (1007129816, 1009434119, *range(36_979, 37_977))]
FLICKR8K_IDS = [f"{number}_e7944{number:05d}" for number in range(36_979, 37_979)]
KARPATHY_IDS = [f"COCO_val2014_{number:012d}" for number in (391895, *range(1, 5_000))]
NAMES = [f"{number}" for number in range(1, 1_015)]
EXPECTED = {
    "coco_val2017": "expected 5,000 images and 25,000 texts (COCO val2017, the first five captions "
    "of each image), ",
    "coco_karpathy": "expected 5,000 images and 25,010 texts (Karpathy's test split of COCO, "
    "images of val2014, all captions), ",
    "flickr30k": "expected 1,000 images and 5,000 texts (Karpathy's test split of Flickr30k), ",
    "cc3m_val": "expected up to 15,840 images and 15,840 texts (CC3M's validation split, one "
    "caption an image), ",
    "sue400": "expected 400 images and 400 texts (the first 400 rows of a data set, one caption an "
    "image), ",
}


@pytest.mark.parametrize(
    ("name", "image", "text", "found"),
    [
        ("flickr30k", NAMES, NAMES * 5, "found 1,014 images in I; Flickr30k's validation split has "
         "as many"),
        ("coco_val2017", NAMES[:1000], NAMES[:1000] * 5,
         "found 1,000 images in I; Flickr30k's test split has as many"),
        ("coco_val2017", coco_ids(), coco_ids(), "found 5,000 texts in T; one caption an image, or "
         "Flickr30k's test split"),
        ("coco_val2017", [*coco_ids()[1:], "x000000000007"], [*coco_ids()[1:], "x000000000007"] * 5,
         "but image 139, which belongs to it, is not in I; val2017 and Karpathy's test and "
         "validation splits have 5,000 other images each"),
        ("coco_val2017", [*coco_ids()[:-1], "000000000007"], [*coco_ids()[:-1], "000000000007"] * 5,
         "but image 581781, which belongs to it, is not in I; val2017 and Karpathy's test and "
         "validation splits have 5,000 other images each"),
        *(
            # Also by numbers alone, as `image_id` is in annotations.
            ("coco_karpathy", ids, ids * 5,
             "but image 391895, which belongs to it, is not in I; val2017 and Karpathy's test and "
             "validation splits have 5,000 other images each")
            for ids in (coco_ids(), [f"{int(name)}" for name in coco_ids()],
                        [f"COCO_val2014_{number:012d}" for number in range(1, 5_001)])
        ),
        ("coco_karpathy", KARPATHY_IDS,
         KARPATHY_IDS * 5, "found 25,000 texts in T; captions were cut to the first "
         "five of each image"),
        ("coco_karpathy", KARPATHY_IDS,
         [*KARPATHY_IDS * 5, *KARPATHY_IDS[:14]],
         "found 25,014 texts in T; all captions of COCO val2017, not cut to five"),
        ("flickr30k", [FLICKR_IDS[0], *FLICKR_IDS[2:], "99999"],
         [FLICKR_IDS[0], *FLICKR_IDS[2:], "99999"] * 5,
         "but image 1009434119, which belongs to it, is not in I; Flickr8k's test split and a "
         "fifth of COCO's have 1,000 images with five texts too"),
        *(
            ("flickr30k", ids, ids * 5,
             "but image 1007129816, which belongs to it, is not in I; Flickr8k's test split and a "
             "fifth of COCO's have 1,000 images with five texts too")
            for ids in ([*FLICKR_IDS[1:], "99999"], FLICKR8K_IDS,
                        KARPATHY_IDS[:1000])
        ),
        ("flickr30k", [*NAMES[:999], "1"], NAMES[:1000] * 5,
         "but 1 (first: '1') of image ids in I occur more than once; each must be there once"),
        ("flickr30k", NAMES[:1000], [*NAMES[:999] * 5, *"yyyxx"],
         "but 5 (first: 'y') of text ids in T are not those of an image in I; image ids look like "
         "'1'; the texts may be of another split"),
        ("flickr30k", NAMES[:1000], [*NAMES[:999] * 5, *["1"] * 5],
         "but 1 (first: '1000') of image ids in I have no text in T; each image needs a caption"),
        ("flickr30k", NAMES[:1000], [*NAMES[:1000] * 4, *["1"] * 1000],
         "but 1,000 (first: '1') of image ids do not have 5 texts each in T"),
        ("flickr30k", NAMES[:1000], [*NAMES[:1000] * 4, *NAMES[:999]],
         "found 4,999 texts in T; 1 (first: '1000') of image ids do not have 5 texts each"),
        ("cc3m_val", [f"{i}" for i in range(15_841)], [f"{i}" for i in range(15_841)],
         "found 15,841 images in I"),
        # Ids are numbers of rows in every split: many of another one join, and none belongs.
        ("cc3m_val", [f"{i}" for i in range(20_000)], [f"{i}" for i in range(15_000)],
         "found 20,000 images in I"),
        ("cc3m_val", [f"{i}" for i in range(9_000)], [f"{i}" for i in range(113_287)],
         "found 113,287 texts in T"),
        ("cc3m_val", ["a", "b"], ["c", "b"], "but I and T share 1 ids; the first are 'a' and 'c'"),
        ("cc3m_val", ["a", "b"], ["b", "b"],
         "but 1 (first: 'b') of text ids in T occur more than once; each must be there once"),
        ("sue400", NAMES[:399], NAMES[:399], "found 399 images in I"),
    ],
)  # fmt: skip
def test_other_rows_are_refused_with_what_they_may_be(name, image, text, found):
    message = refusal(PROTOCOLS[name], table(image, "I"), table(text, "T"))
    assert message == f"{name}: {EXPECTED[name]}{found}"


def test_numbers_of_rows_are_not_joined_with_numbers_of_images():
    """A table without ids counts its rows, 0, 1, ...; COCO's images are numbers, with gaps."""
    bare = [f"{int(name)}" for name in coco_ids()]
    rows = [f"{row}" for row in range(25_000)]
    cause = (
        "but ids of T count its rows, those of I are other numbers; encode T with a column of ids "
        "(--column=id:NAME), unless they are numbers of the same rows"
    )
    for name in ("coco_val2017", "cc3m_val"):
        message = refusal(PROTOCOLS[name], table(bare, "I"), table(rows, "T"))
        assert message == f"{name}: {EXPECTED[name]}{cause}"
    assert "but ids of I count its rows" in refusal(SUE, table(rows, "I"), table(bare[:400], "T"))
    # All of one table's numbers are in the other, so that the join itself would succeed.
    assert np.isin(bare[:1_000], rows).all()


def test_tables_that_count_their_rows_each_for_itself():
    eleven, fifteen = ([f"{row}" for row in range(n)] for n in (11_000, 15_840))
    assert refusal(CC3M, table(eleven, "I"), table(fifteen, "T")) == (
        f"cc3m_val: {EXPECTED['cc3m_val']}found 11,000 images in I and 15,840 texts in T, whose "
        "ids count the rows of each; number them before rows are lost, or encode with a column of "
        "ids (--column=id:NAME)"
    )
    note = (
        "ids of both tables count their rows: right only if a number means the same image in both"
    )
    assert note in CC3M.select(table(eleven, "I"), table(eleven, "T")).notes
    # What is missing shows in the numbers: these were counted before rows were lost.
    lost = [name for name in fifteen if not name.endswith("7")]
    rows = CC3M.select(table(lost, "I"), table(fifteen, "T"))
    assert len(rows.image) == len(rows.text) == len(lost) and note in rows.notes
    listed = [f"{row // 5}" for row in range(25_000)]
    rows = COCO.select(table([f"{row}" for row in range(5_000)], "I"), table(listed, "T"))
    assert rows.notes == (note,)


def test_tables_without_ids_must_have_the_number_of_rows():
    four, five = (FeatureTable.from_array(np.ones((n, 2), np.float32), name="I") for n in (4, 5))
    for protocol in (tiny(SUE, images=4, texts=4), tiny(CC3M, images=4, texts=4)):
        assert len(protocol.select(four, four).image) == 4
        message = refusal(protocol, five, five)
        assert message.endswith("found 5 images in I") and protocol.split in message
    assert refusal(tiny(SUE, images=5, texts=5), four, four).endswith("found 4 images in I")
    assert len(tiny(CC3M, images=5, texts=5).select(four, four).image) == 4


def test_tables_without_ids_are_refused_where_images_have_several_texts():
    image = FeatureTable.from_array(np.ones((1_000, 2), np.float32), name="I")
    text = FeatureTable.from_array(np.ones((5_000, 2), np.float32), name="T")
    assert (
        refusal(FLICKR, image, text) == f"flickr30k: I has no ids; image ids must be {FLICKR.ids}"
    )
    assert "T has no ids; text ids must be" in refusal(FLICKR, table(NAMES[:1000], "I"), text)
    one = FeatureTable.from_array(np.ones((400, 2), np.float32), name="I")
    assert refusal(SUE, one, text) == (
        f"sue400: {EXPECTED['sue400']}found 400 images and 5,000 texts; without ids they are "
        "joined by row, one to one"
    )
    assert "found 5,000 images in T" in refusal(SUE, text, text)


def test_width_and_finiteness_are_checked_before_anything_is_embedded():
    image, text = from_scores(np.eye(4) / 2, "abcd", "abcd")
    protocol = tiny(SUE, images=4, texts=4)
    with pytest.raises(ValueError, match="image: images has 8 columns, but the aligner takes 5"):
        protocol.run(identity(5), image, text)
    wide = FeatureTable.from_array(np.ones((4, 9), np.float32), ids=list("abcd"), name="wide")
    with pytest.raises(ValueError, match="text: wide has 9 columns, but the aligner takes 8"):
        protocol.run(identity(8), image, wide)
    infinite = FeatureTable.from_array(
        np.full((4, 8), np.inf, np.float32), ids=list("abcd"), name="images"
    )
    with pytest.raises(ValueError, match=r"images: 4 of 4 rows hold NaN or Inf"):
        protocol.run(identity(8), infinite, text)
    rows = text.array()
    rows[2, 1] = np.nan
    bad = FeatureTable.from_array(rows, ids=list("abcd"), name="texts")
    with pytest.raises(ValueError, match=r"texts: 1 of 4 rows hold NaN or Inf; .* \(id 'c'\)"):
        protocol.run(identity(8), image, bad)


def test_names_are_found_or_listed():
    assert protocols.find("sue400") is SUE
    with pytest.raises(ValueError, match="protocol: no 'coco'; there are coco_val2017, coco_karp"):
        protocols.find("coco")
    assert len(PROTOCOLS) == 14
    for name, protocol in PROTOCOLS.items():
        assert protocol.name == name and protocol.split and protocol.rule and protocol.source
        for row in protocol.published:
            assert set(row.percent) <= set(protocol.shown) and row.source
            assert all(0 <= value <= 100 for value in row.percent.values())
