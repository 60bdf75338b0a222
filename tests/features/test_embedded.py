import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.features import (
    check_finite,
    emoji,
    emoji_metadata,
    emoji_table,
    openclipart_metadata,
    openclipart_table,
)


def ids(features):
    assert features.ids is not None
    return features.ids.tolist()


def test_tables_and_their_captions():
    metadata = emoji_metadata()
    assert set(metadata) == {
        *("id", "character", "split", "family", "category", "label", "label_tags")
    }
    for what, dim in (("google", 1280), ("fluent3d", 1280), ("label", 384), ("label_tags", 384)):
        table = emoji_table(what)
        assert table.shape == (1344, dim)
        assert ids(table) == metadata["id"].tolist()
        check_finite(table)
        norms = np.linalg.norm(table.array(), axis=1)
        assert (abs(norms - 1).max() < 1e-3) == table.manifest.normalized
    row = ids(emoji_table("label")).index("1F37C")
    assert metadata["label"][row] == "baby bottle"
    assert metadata["character"][row] == "🍼"
    for what, dim in (("image", 1280), ("text", 384)):
        assert openclipart_table(what).shape == (3732, dim)
        assert ids(openclipart_table(what)) == openclipart_metadata()["id"].tolist()


def test_views_of_one_emoji_are_rows_of_one_number():
    """A drawing is nearer to the other vendor's drawing of the same emoji than to a random one."""
    for first, second, rate in (("google", "fluent3d", 0.2), ("label", "label_tags", 0.8)):
        left, right = emoji_table(first).array(), emoji_table(second).array()
        left /= np.linalg.norm(left, axis=1, keepdims=True)
        right /= np.linalg.norm(right, axis=1, keepdims=True)
        nearest = (left @ right.T).argmax(axis=1)
        assert (nearest == np.arange(1344)).mean() > rate


@settings(max_examples=20)
@given(
    st.integers(1, 800),
    st.integers(0, 2**32),
    st.sampled_from(["google", "fluent3d"]),
    st.sampled_from(["label_tags", "label"]),
)
def test_parts_share_no_emoji_and_no_family(n_pairs, seed, image, text):
    splits = emoji(n_pairs=n_pairs, seed=seed, image=image, text=text)
    assert splits.val is not None
    assert splits.test is not None
    parts = [set(ids(part.image)) for part in (splits.pairs, splits.val, splits.test)]
    pool = set(ids(splits.unpaired_image))
    assert [len(part) for part in (*parts, pool)] == [n_pairs, 144, 400, 800 - n_pairs]
    assert len(set.union(*parts, pool)) == 1344
    assert set(ids(splits.unpaired_text)) == pool
    for part in (splits.pairs, splits.val, splits.test):
        assert part.one_to_one
        assert ids(part.image) == ids(part.text)
    metadata = emoji_metadata()
    family = dict(zip(metadata["id"].tolist(), metadata["family"].tolist(), strict=True))
    train, val, test = ({family[i] for i in part} for part in (parts[0] | pool, parts[1], parts[2]))
    assert not (train & val or train & test or val & test)


def test_the_pool_has_both_vendors_and_both_captions():
    splits = emoji(n_pairs=300)
    for pool, views in (
        (splits.unpaired_image, ("google", "fluent3d")),
        (splits.unpaired_text, ("label", "label_tags")),
    ):
        assert len(pool) == 1000
        number = {name: row for row, name in enumerate(emoji_metadata()["id"].tolist())}
        rows = [number[name] for name in ids(pool)]
        found = np.stack([(emoji_table(v).take(rows) == pool.array()).all(axis=1) for v in views])
        assert found.any(axis=0).all()
        assert (found.sum(axis=1) >= 500).all()
    same = np.array(ids(splits.unpaired_image)) == np.array(ids(splits.unpaired_text))
    assert same.sum() < 14  # Poisson of mean 2: P < 1e-6


def test_the_requested_views_are_the_pairs():
    splits = emoji(n_pairs=5, image="fluent3d", text="label")
    number = {name: row for row, name in enumerate(emoji_metadata()["id"].tolist())}
    for part in (splits.pairs, splits.val, splits.test):
        assert part is not None
        rows = [number[name] for name in ids(part.image)]
        np.testing.assert_array_equal(part.image.array(), emoji_table("fluent3d").take(rows))
        np.testing.assert_array_equal(part.text.array(), emoji_table("label").take(rows))


def test_seed_and_prefix():
    first = emoji(n_pairs=100, seed=7)
    again, more, other = (
        emoji(n_pairs=100, seed=7),
        emoji(n_pairs=300, seed=7),
        emoji(n_pairs=100, seed=8),
    )
    assert ids(first.pairs.image) == ids(again.pairs.image) == ids(more.pairs.image)[:100]
    assert ids(first.unpaired_image) == ids(again.unpaired_image)
    assert ids(first.unpaired_text) == ids(again.unpaired_text)
    assert ids(first.pairs.image) != ids(other.pairs.image)


def test_openclipart_as_the_pool():
    splits = emoji(unpaired="openclipart")
    for pool, what in ((splits.unpaired_image, "image"), (splits.unpaired_text, "text")):
        assert sorted(ids(pool)) == sorted(ids(openclipart_table(what)))
    same = np.array(ids(splits.unpaired_image)) == np.array(ids(splits.unpaired_text))
    assert same.sum() < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_pairs": 801}, "n_pairs: 801 asked, the train split has 800"),
        ({"n_pairs": 0}, "n_pairs: 0 asked"),
        ({"image": "apple"}, "image must be one of google, fluent3d, got 'apple'"),
        ({"text": "tags"}, "text must be one of"),
        ({"unpaired": "cc3m"}, "unpaired must be one of"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        emoji(**options)


def test_unknown_tables():
    with pytest.raises(ValueError, match="what must be one of google, fluent3d, label_tags"):
        emoji_table("apple")
    with pytest.raises(ValueError, match="what must be one of image, text"):
        openclipart_table("both")
