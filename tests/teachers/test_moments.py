import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.teachers import (
    empty_moments,
    merge_moments,
    moments_of,
    recentered,
    update_moments,
)


def _pairs(n, dx, dy, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dx)) + 0.5, rng.normal(size=(n, dy)) - 0.2


def _truth(image, text, image_centre=None, text_centre=None):
    """Two-pass moments in float64, straight from the definition."""
    image_centre = image.mean(axis=0) if image_centre is None else image_centre
    text_centre = text.mean(axis=0) if text_centre is None else text_centre
    a, b = image - image_centre, text - text_centre
    return len(image), image_centre, text_centre, a.T @ a, b.T @ b, a.T @ b


def _assert_close(moments, truth, rtol=1e-12):
    assert moments.count == truth[0]
    for got, expected in zip(moments[1:], truth[1:], strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * np.abs(expected).max())


def test_hand_made_numbers():
    image = np.array([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]])
    text = np.array([[1.0], [-7.0], [2.0]])
    moments = moments_of([(image, text)])
    # Unit rows: (.6, .8), (0, 1), (1, 0) and 1, -1, 1; means (1.6/3, 1.8/3) and 1/3.
    assert moments.count == 3
    np.testing.assert_allclose(moments.image_mean, [1.6 / 3, 0.6], rtol=1e-15)
    np.testing.assert_allclose(moments.text_mean, [1 / 3], rtol=1e-15)
    cross = 0.48 - 3 * (1.6 / 3) * 0.6
    image_scatter = [[1.36 - 1.6**2 / 3, cross], [cross, 1.64 - 1.8**2 / 3]]
    np.testing.assert_allclose(moments.image_scatter, image_scatter, rtol=1e-14)
    np.testing.assert_allclose(moments.text_scatter, [[8 / 3]], rtol=1e-14)
    np.testing.assert_allclose(
        moments.cross_scatter, [[1.6 - 1.6 / 3], [-0.2 - 1.8 / 3]], rtol=1e-14
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 40), max_size=6), st.integers(0, 99))
def test_chunking_does_not_matter(cuts, seed):
    image, text = _pairs(40, 5, 3, seed)
    edges = [0, *sorted(cuts), 40]
    chunks = [(image[a:b], text[a:b]) for a, b in itertools.pairwise(edges)]
    _assert_close(moments_of(chunks, normalize=False), _truth(image, text))


@settings(deadline=None, max_examples=40)
@given(st.permutations(range(6)), st.integers(1, 5))
def test_merge_order_and_grouping_do_not_matter(order, split):
    image, text = _pairs(60, 4, 6)
    parts = [moments_of([(image[i::6], text[i::6])], normalize=False) for i in range(6)]
    parts[2] = merge_moments(parts[2], empty_moments(4, 6))
    halves = []
    for half in (order[:split], order[split:]):
        whole = empty_moments(4, 6)
        for index in half:
            whole = merge_moments(whole, parts[index])
        halves.append(whole)
    _assert_close(merge_moments(*halves), _truth(image, text))


def test_huge_common_offset_keeps_its_digits():
    rng = np.random.default_rng(3)
    # Multiples of 2^-20 below 1: adding 1e6 to them is exact in float64.
    image = rng.integers(-(2**20), 2**20, size=(500, 4)) / 2**20
    text = rng.integers(-(2**20), 2**20, size=(500, 3)) / 2**20
    chunks = [(image[i : i + 70] + 1e6, text[i : i + 70] - 1e6) for i in range(0, 500, 70)]
    moments = moments_of(chunks, normalize=False)
    truth = np.cov(image, rowvar=False)
    np.testing.assert_allclose(moments.image_scatter / 499, truth, atol=1e-9)
    cross = np.cov(image, text, rowvar=False)[:4, 4:]
    np.testing.assert_allclose(moments.cross_scatter / 499, cross, atol=1e-9)
    shifted = image + 1e6
    textbook = shifted.T @ shifted - 500 * np.outer(shifted.mean(0), shifted.mean(0))
    assert np.abs(textbook / 499 - truth).max() > 1e-5  # what the offset does to the other formula


def test_update_leaves_its_argument_and_takes_rows_as_they_are():
    image, text = _pairs(30, 3, 4)
    before = update_moments(empty_moments(3, 4), image[:10], text[:10])
    copies = [np.copy(array) for array in before]
    after = update_moments(before, image[10:], text[10:])
    _assert_close(after, _truth(image, text))
    for array, copy in zip(before, copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    nothing = update_moments(before, image[:0], text[:0])
    _assert_close(nothing, copies, rtol=0)


def test_rows_are_scaled_to_unit_length_and_zero_rows_stay():
    image, text = _pairs(20, 3, 4)
    image[7] = 0
    scales = np.geomspace(1e-200, 1e200, 20)[:, None]
    unit_image = image / np.maximum(np.linalg.norm(image, axis=1, keepdims=True), 1e-300)
    unit_text = text / np.linalg.norm(text, axis=1, keepdims=True)
    _assert_close(moments_of([(image * scales, text)]), _truth(unit_image, unit_text))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_low_precision_features_are_summed_in_float64(dtype):
    image, text = (rows.astype(dtype) for rows in _pairs(300, 4, 4))
    moments = moments_of([(image, text)], normalize=False)
    _assert_close(moments, _truth(image.astype(np.float64), text.astype(np.float64)))


def test_recentered_is_the_scatter_about_the_new_centre():
    image, text = _pairs(25, 4, 3)
    moments = moments_of([(image, text)], normalize=False)
    image_centre, text_centre = np.array([1.0, -2.0, 0.0, 0.3]), np.array([0.1, 0.0, 5.0])
    moved = recentered(moments, image_centre, text_centre)
    _assert_close(moved, _truth(image, text, image_centre, text_centre))


def test_bad_input_is_named():
    image, text = _pairs(6, 3, 4)
    start = empty_moments(3, 4)
    broken = image.copy()
    broken[2, 1] = np.nan
    with pytest.raises(ValueError, match="image_chunk: holds NaN"):
        update_moments(start, broken, text)
    with pytest.raises(ValueError, match="text_chunk: holds NaN"):
        update_moments(start, image, text * np.inf)
    with pytest.raises(ValueError, match="text_chunk: 5 rows, but image_chunk has 6"):
        update_moments(start, image, text[:5])
    with pytest.raises(ValueError, match="image_chunk: 2 features, but the moments have 3"):
        update_moments(start, image[:, :2], text)
    with pytest.raises(ValueError, match="text_chunk: 3 features, but the moments have 4"):
        update_moments(start, image, text[:, :3])
    with pytest.raises(ValueError, match=r"chunks\[1\] text: holds NaN"):
        moments_of([(image, text), (image, text * np.nan)])
    with pytest.raises(ValueError, match=r"chunks\[0\] image: shape \(6,\)"):
        moments_of([(image[:, 0], text)])
    with pytest.raises(ValueError, match=r"chunks\[1\]: dimensions \(2, 4\) differ"):
        moments_of([(image, text), (image[:, :2], text)])
    with pytest.raises(ValueError, match="chunks: empty"):
        moments_of([])
    with pytest.raises(ValueError, match="dy=0"):
        empty_moments(3, 0)
    with pytest.raises(ValueError, match="b: dimensions"):
        merge_moments(start, empty_moments(4, 3))
    with pytest.raises(ValueError, match="text_mean: shape"):
        recentered(moments_of([(image, text)]), np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="image_mean: holds NaN"):
        recentered(moments_of([(image, text)]), np.full(3, np.nan), np.zeros(4))
