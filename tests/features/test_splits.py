import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotalign_jax.features import FeatureTable, Pairs, Splits, join, pair, split_pairs
from sotalign_jax.features.splits import counts_rows, numbers_with_gaps


def table(ids, name, dim=2):
    """Rows whose first column is the number in the id, so that partners can be recognised."""
    values = np.zeros((len(ids), dim), np.float32)
    values[:, 0] = [int(i.split(".")[0]) for i in ids]
    return FeatureTable.from_array(values, ids=np.array(ids, dtype=str), name=name)


def plain(rows, name, dim=2):
    return FeatureTable.from_array(np.zeros((rows, dim)), name=name)


def corpus(images=30, texts_each=1):
    ids = [str(i) for i in range(images)]
    rng = np.random.default_rng(1)
    return (
        table(rng.permutation(ids).tolist(), "corpus image"),
        table(rng.permutation(ids * texts_each).tolist(), "corpus text", dim=3),
    )


def id_set(features):
    assert features.ids is not None
    return set(features.ids.tolist())


@given(st.permutations(range(9)), st.lists(st.integers(0, 11), max_size=15))
def test_join_finds_partners_whatever_the_order(images, texts):
    image = table([str(i) for i in images], "image")
    text = table([str(i) for i in texts], "text")
    shared = [i for i in texts if i in images]
    if not shared:
        with pytest.raises(ValueError, match="ids: "):
            join(image, text)
        return
    image_rows, text_rows = join(image, text)
    assert image_rows.dtype == text_rows.dtype == np.int64
    assert [texts[row] for row in text_rows] == shared
    assert [images[row] for row in image_rows] == shared


def test_join_by_rows():
    for on in ("auto", "rows"):
        image_rows, text_rows = join(plain(3, "i"), plain(3, "t"), on=on)
        assert image_rows.tolist() == text_rows.tolist() == [0, 1, 2]
    image_rows, text_rows = join(table(["1", "2"], "i"), table(["2", "1"], "t"), on="rows")
    assert image_rows.tolist() == text_rows.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("image", "text", "on", "message"),
    [
        (plain(3, "i"), plain(4, "t"), "auto", "pairs: .* i has 3 rows and t has 4"),
        (plain(3, "i"), table(["1"], "t"), "auto", "ids: t has ids and i has none"),
        (table(["1"], "i"), plain(3, "t"), "ids", "ids: i has ids and t has none"),
        (plain(3, "i"), plain(3, "t"), "ids", "on='ids': neither i nor t has ids"),
        (table(["7", "8", "7"], "i"), table(["8"], "t"), "auto", "'7' occurs more than once in i"),
        (table(["1"], "i"), table(["2", "3"], "t"), "auto", "share none; .* '1' and '2'"),
        (table(["1"], "i"), table([], "t"), "auto", "ids: nothing to join"),
        (plain(3, "i"), plain(3, "t"), "name", "on must be"),
    ],
)
def test_tables_that_do_not_join(image, text, on, message):
    with pytest.raises(ValueError, match=message):
        join(image, text, on=on)


def test_join_says_what_it_drops(caplog):
    with caplog.at_level(logging.WARNING):
        join(table(["1", "2", "3"], "img"), table(["3", "3", "4"], "txt"))
    assert "2 of 3 rows of img and 1 of 3 rows of txt" in caplog.text
    caplog.clear()
    join(table(["1", "2"], "img"), table(["2", "1", "1"], "txt"))
    assert not caplog.text


@pytest.mark.parametrize("turned", [False, True])
def test_join_warns_of_numbers_that_are_not_the_same_ids(turned, caplog):
    """COCO's images by their numbers, and a table of captions that counts its rows."""
    sides = [table(["3", "139", "285", "7007"], "a"), table([str(row) for row in range(300)], "b")]
    with caplog.at_level(logging.WARNING):
        rows = join(*(sides[::-1] if turned else sides))
    assert len(rows[0]) == 3
    assert (
        "join: ids of b count its rows, those of a are other numbers; encode b with a column of "
        "ids (--column=id:NAME), unless they are numbers of the same rows" in caplog.text
    )


def test_join_takes_numbers_that_may_well_be_the_same(caplog):
    rows = [str(row) for row in range(300)]
    shuffled = np.random.default_rng(0).permutation(rows).tolist()
    zeros = ["003", "139", "285"]
    for ids in (rows, rows[::2] + rows[1::2], shuffled[:200], [f"{row}.0" for row in rows] + ["1"]):
        with caplog.at_level(logging.WARNING):
            join(table(ids, "a"), table(rows, "b"))
    with caplog.at_level(logging.WARNING):
        join(table([*zeros, "7007"], "a"), table([*rows[:150], "003"], "b"))
        join(table(["3", "139", "7007"], "a"), table(["7007", "3"], "b"))
    assert "count" not in caplog.text and "dropped" in caplog.text
    # Zeros before them make names of them, which numbers of rows do not have.
    assert numbers_with_gaps(table(["3", "139", "7007"], "a"))
    assert not numbers_with_gaps(table(["0003", "0139", "7007"], "a"))
    assert counts_rows(table(["0", "1", "1", "3"], "a"))
    assert not counts_rows(table(["00", "01", "02"], "a"))


def test_pair_keeps_every_caption():
    pairs = pair(table(["5", "6", "7"], "i"), table(["7", "5", "7"], "t"))
    assert pairs.image.ids is not None
    assert pairs.image.ids.tolist() == ["5", "7"]
    assert pairs.text_to_image.tolist() == [1, 0, 1]
    assert not pairs.one_to_one
    assert len(pairs) == 3


def test_pair_of_single_captions_is_one_to_one():
    pairs = pair(table(["5", "6", "7"], "i"), table(["7", "5"], "t"))
    assert pairs.one_to_one
    np.testing.assert_array_equal(pairs.image.array(), pairs.text.array())


def test_pairs_check_their_index():
    with pytest.raises(ValueError, match=r"text_to_image: shape \(1,\) for 2 rows of t"):
        Pairs(plain(2, "i"), plain(2, "t"), np.array([0]))
    for wrong in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match=r"text_to_image: rows .* i has 2 rows"):
            Pairs(plain(2, "i"), plain(2, "t"), np.array(wrong))
    assert not Pairs(plain(2, "i"), plain(2, "t"), np.array([1, 0])).one_to_one
    assert not Pairs(plain(3, "i"), plain(2, "t"), np.array([0, 1])).one_to_one


def test_splits_check_their_tables():
    pairs = Pairs(plain(2, "i"), plain(2, "t", 3), np.arange(2))
    swapped = Pairs(plain(2, "i"), plain(2, "t", 3), np.array([1, 0]))
    with pytest.raises(ValueError, match="pairs: row i"):
        Splits(swapped, plain(1, "ui"), plain(1, "ut", 3))
    with pytest.raises(ValueError, match="dim: ut has 2 columns, t has 3"):
        Splits(pairs, plain(1, "ui"), plain(1, "ut"))
    test = Pairs(plain(2, "wide", 9), plain(2, "t", 3), np.arange(2))
    with pytest.raises(ValueError, match="dim: wide has 9 columns, i has 2"):
        Splits(pairs, plain(1, "ui"), plain(1, "ut", 3), test=test)


@given(
    st.integers(1, 30),
    st.sampled_from(["aligned", "disjoint"]),
    st.integers(1, 3),
    st.integers(0, 2**32),
)
def test_split_parts_share_no_item(n_pairs, mode, texts_each, seed):
    image, text = corpus(30, texts_each)
    pairs, free_image, free_text = split_pairs(image, text, n_pairs=n_pairs, mode=mode, seed=seed)
    assert pairs.one_to_one
    assert len(id_set(pairs.image)) == len(pairs) == n_pairs
    np.testing.assert_array_equal(pairs.image.array()[:, 0], pairs.text.array()[:, 0])
    rest = {str(i) for i in range(30)} - id_set(pairs.image)
    if mode == "aligned":
        assert id_set(free_image) == id_set(free_text) == rest
        assert len(free_image) == len(rest)
        assert len(free_text) == len(rest) * texts_each
    else:
        assert not id_set(free_image) & id_set(free_text)
        assert id_set(free_image) | id_set(free_text) == rest
        assert len(free_image) == (len(rest) + 1) // 2
        assert len(free_text) == len(rest) // 2 * texts_each


def test_alignment_is_hidden():
    """Row i of the images is the partner of row i of the texts no more often than by chance."""
    image, text = corpus(400)
    _, free_image, free_text = split_pairs(image, text, n_pairs=10, mode="aligned", seed=3)
    assert (free_image.ids == free_text.ids).sum() < 8  # Poisson of mean 1: P < 1e-5


def test_one_seed_one_split():
    image, text = corpus(40, 2)

    def ids(**options):
        pairs, free_image, free_text = split_pairs(image, text, **options)
        parts = (pairs.image, pairs.text.select([0]), free_image, free_text)
        return [part.ids.tolist() for part in parts if part.ids is not None]

    for mode in ("aligned", "disjoint"):
        first = ids(n_pairs=10, mode=mode, seed=5)
        assert ids(n_pairs=10, mode=mode, seed=5) == first
        assert ids(n_pairs=10, mode=mode, seed=6)[0] != first[0]
        assert ids(n_pairs=20, mode=mode, seed=5)[0][:10] == first[0]
        fewer = ids(n_pairs=10, n_unpaired=7, mode=mode, seed=5)
        assert fewer[:2] == first[:2]
        assert len(fewer[2]) == len(fewer[3]) == 7
        if mode == "disjoint":
            assert fewer[2] == first[2][:7]
            assert fewer[3] == first[3][:7]


def test_aligned_cap_keeps_the_same_items():
    image, text = corpus(40)
    _, free_image, free_text = split_pairs(image, text, n_pairs=10, n_unpaired=12, seed=0)
    assert id_set(free_image) == id_set(free_text)
    assert len(free_image) == 12


def test_a_random_caption_is_drawn():
    """Of each image's captions any may become the pair's text: 3 each, 60 images, all are seen."""
    image = table([str(i) for i in range(60)], "i")
    text = table([str(i) for i in range(60)] * 3, "t")
    numbers = np.arange(180, dtype=np.float32)[:, None]
    text = FeatureTable.from_array(numbers, ids=text.ids, name="t")
    pairs, _, _ = split_pairs(image, text, n_pairs=60, seed=0)
    caption = pairs.text.array()[:, 0] // 60
    assert set(caption.tolist()) == {0.0, 1.0, 2.0}


def test_other_corpora():
    image, text = corpus()
    others = {
        "unpaired_image": table([f"{i}.a" for i in range(20)], "ui"),
        "unpaired_text": table([f"{i}.b" for i in range(50)], "ut", dim=3),
    }
    pairs, free_image, free_text = split_pairs(
        image, text, n_pairs=30, mode="independent", exclude=["7.a"], **others
    )
    assert len(pairs) == 30
    assert id_set(free_image) == {f"{i}.a" for i in range(20)} - {"7.a"}
    assert id_set(free_text) == {f"{i}.b" for i in range(50)}
    _, fewer, _ = split_pairs(
        image, text, n_pairs=3, n_unpaired=5, mode="independent", exclude=["7.a"], **others
    )
    assert fewer.ids is not None
    assert free_image.ids is not None
    assert fewer.ids.tolist() == free_image.ids[:5].tolist()


def test_excluded_ids_are_nowhere():
    image, text = corpus(30, 2)
    held_out = [str(i) for i in range(10, 20)]
    pairs, free_image, free_text = split_pairs(image, text, n_pairs=15, exclude=held_out)
    assert not set(held_out) & (id_set(pairs.image) | id_set(free_image) | id_set(free_text))
    with pytest.raises(ValueError, match=r"n_pairs: 21 asked, .* have 20"):
        split_pairs(image, text, n_pairs=21, exclude=held_out)
    with pytest.raises(ValueError, match="exclude: i has no ids"):
        split_pairs(plain(3, "i"), plain(3, "t"), n_pairs=1, exclude=["1"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_pairs": 31}, "n_pairs: 31 asked, but corpus image and corpus text have 30"),
        ({"n_pairs": 0}, "n_pairs must be at least 1"),
        ({"n_pairs": 20, "n_unpaired": 11}, "n_unpaired: 11 asked, but corpus image has 10 rows"),
        ({"n_pairs": 20, "n_unpaired": 6, "mode": "disjoint"}, "n_unpaired: 6 asked, .* has 5"),
        ({"n_pairs": 1, "n_unpaired": -1}, "n_unpaired must not be negative"),
        ({"n_pairs": 1, "mode": "random"}, "mode must be"),
        ({"n_pairs": 1, "mode": "independent"}, "unpaired_image and unpaired_text must both"),
        ({"n_pairs": 1, "unpaired_image": plain(1, "u")}, "must both be given in mode"),
        (
            {
                "n_pairs": 1,
                "mode": "independent",
                "unpaired_image": plain(1, "u", 7),
                "unpaired_text": plain(1, "v", 3),
            },
            "dim: u has 7 columns, corpus image has 2",
        ),
    ],
)
def test_splits_that_cannot_be_drawn(options, message):
    with pytest.raises(ValueError, match=message):
        split_pairs(*corpus(), **options)
