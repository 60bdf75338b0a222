import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.numerics import Columns, standardized_rows, unit_rows
from sotalign_jax.teachers import (
    cca,
    column_moments_of,
    columns_of,
    contrastive,
    merge_column_moments,
    moments_of,
    procrustes,
)


def _unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _rows(n, d, seed=0):
    """Rows whose columns differ in size by a factor of 100, about a mean that is not zero."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) * np.geomspace(0.05, 5, d) + 0.3


def _standardized(rows, pool, power):
    """The definition, in float64: unit rows, columns, unit rows."""
    unit, known = _unit(rows), _unit(pool)
    deviation = known.std(axis=0)
    scale = np.maximum(deviation, 0.05 * np.median(deviation)) ** power
    return _unit((unit - known.mean(axis=0)) / scale)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 30), max_size=5), st.integers(0, 99))
def test_chunks_and_merges_give_the_mean_and_deviation_of_all_rows(cuts, seed):
    rows = _rows(30, 5, seed)
    edges = [0, *sorted(cuts), 30]
    parts = [rows[a:b] for a, b in itertools.pairwise(edges)]
    moments = column_moments_of(parts)
    merged = column_moments_of(parts[-1:])
    for part in parts[:-1]:
        merged = merge_column_moments(merged, column_moments_of([part]))
    for found in (moments, merged):
        assert found.count == 30
        np.testing.assert_allclose(found.mean, _unit(rows).mean(axis=0), atol=1e-14)
        np.testing.assert_allclose(found.squares / 30, _unit(rows).var(axis=0), atol=1e-14)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_columns_divide_by_a_power_of_the_deviation(power):
    rows = _rows(200, 7)
    columns = columns_of(column_moments_of([rows]), power=power)
    unit = _unit(rows)
    np.testing.assert_allclose(columns.mean, unit.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(columns.scale, unit.std(axis=0) ** power, rtol=1e-6)
    if power == 1:
        scaled = (unit - columns.mean) / columns.scale
        np.testing.assert_allclose(scaled.std(axis=0), 1, rtol=1e-5)
    np.testing.assert_allclose(
        standardized_rows(unit_rows(rows), columns), _standardized(rows, rows, power), atol=1e-6
    )


def test_a_column_that_hardly_varies_counts_as_the_floor():
    rows = np.random.default_rng(0).normal(size=(50, 5))
    rows[:, 2] = 1e-9 * rows[:, 2]
    rows[:, 3] = 0.0
    columns = columns_of(column_moments_of([rows]), power=1.0, floor=0.1)
    deviation = _unit(rows).std(axis=0)
    floor = 0.1 * np.median(deviation)
    np.testing.assert_allclose(columns.scale[[2, 3]], floor, rtol=1e-6)
    np.testing.assert_allclose(columns.scale[[0, 1, 4]], deviation[[0, 1, 4]], rtol=1e-6)


def test_rows_at_the_mean_and_rows_of_zeros_stay_finite():
    columns = Columns(np.array([0.6, 0.8], np.float32), np.ones(2, np.float32))
    rows = np.array([[0.6, 0.8], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(standardized_rows(rows, columns), [[0, 0], [-0.6, -0.8]], atol=1e-6)
    unit = unit_rows(rows)
    assert standardized_rows(unit, None) is unit


def _pairs(n=60, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 4))
    image = z @ rng.normal(size=(4, 9)) * np.geomspace(0.05, 5, 9) + 0.2 * rng.normal(size=(n, 9))
    return image + 0.5, z @ rng.normal(size=(4, 6)) + 0.2 * rng.normal(size=(n, 6)) - 0.3


@pytest.mark.parametrize("fit", [procrustes, cca])
def test_a_teacher_of_standardised_moments_is_that_of_standardised_rows(fit):
    image, text = _pairs()
    columns = columns_of(column_moments_of([image]), power=0.5)
    chunks = [(image[:25], text[:25]), (image[25:], text[25:])]
    teacher = fit(moments_of(chunks, image_columns=columns), dim=4)._replace(image_columns=columns)
    by_hand = _standardized(image, image, 0.5)
    other = fit(moments_of([(by_hand, _unit(text))], normalize=False), dim=4)
    np.testing.assert_allclose(teacher.image_weight, other.image_weight, rtol=1e-3, atol=1e-4)
    a = (by_hand - by_hand.mean(axis=0)) @ np.asarray(other.image_weight, np.float64)
    np.testing.assert_allclose(teacher.project_image(image), a, rtol=1e-3, atol=1e-4)
    plain = fit(moments_of(chunks), dim=4)
    assert np.abs(np.asarray(teacher.affinity(image, text) - plain.affinity(image, text))).max() > (
        0.01
    )


def test_the_contrastive_teacher_trains_on_standardised_rows():
    image, text = _pairs()
    columns = columns_of(column_moments_of([image]), power=0.5)
    options = {"dim": 4, "steps": 20, "learning_rate": 1e-2}
    teacher = contrastive(image, text, image_columns=columns, **options)
    by_hand = _standardized(image, image, 0.5)
    np.testing.assert_allclose(teacher.image_mean, by_hand.mean(axis=0), atol=1e-6)
    other = contrastive(by_hand, text, **options)
    np.testing.assert_allclose(teacher.image_weight, other.image_weight, atol=1e-4)
    np.testing.assert_allclose(
        teacher.affinity(image, text), other.affinity(by_hand, text), atol=1e-3
    )
    again = contrastive(image, text, init=teacher, **options)
    assert again.image_columns is not None and again.text_columns is None
    with pytest.raises(ValueError, match="init: brings columns of its own"):
        contrastive(image, text, init=teacher, image_columns=columns, **options)


def test_bad_input_is_named():
    rows = _rows(20, 4)
    moments = column_moments_of([rows])
    for power in (0.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"power=.*must lie in \(0, 1\]"):
            columns_of(moments, power=power)
    with pytest.raises(ValueError, match=r"floor=0.0: must lie in \(0, 1\]"):
        columns_of(moments, power=0.5, floor=0.0)
    with pytest.raises(ValueError, match="moments: of 1 rows; deviations need at least 2"):
        columns_of(column_moments_of([rows[:1]]), power=0.5)
    same = np.full((30, 4), 0.1)
    same[:, 0] = np.arange(30)
    with pytest.raises(ValueError, match="moments: 4 of 4 columns do not vary"):
        columns_of(column_moments_of([same[:1], same[:1]]), power=0.5)
    with pytest.raises(ValueError, match="chunks: empty"):
        column_moments_of([])
    with pytest.raises(ValueError, match=r"chunks\[1\]: holds NaN or infinity"):
        column_moments_of([rows, rows * np.nan])
    with pytest.raises(ValueError, match=r"chunks\[0\]: shape \(20, 0\)"):
        column_moments_of([rows[:, :0]])
    with pytest.raises(ValueError, match="b: 3 columns differ from 4 of a"):
        column_moments_of([rows, rows[:, :3]])
    columns = columns_of(moments, power=0.5)
    with pytest.raises(ValueError, match=r"normalize: .*must be True"):
        moments_of([(rows, rows)], normalize=False, text_columns=columns)
    with pytest.raises(ValueError, match="columns: 4 of them, but the rows have 3"):
        moments_of([(rows[:, :3], rows)], image_columns=columns)
