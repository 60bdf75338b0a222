import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sotalign_jax.evaluation import (
    circular_wasserstein,
    distribution_shift,
    spherical_sliced_wasserstein,
)


def by_assignment(first, second, p):
    """Every sample repeated until both are equally many, then the cheapest matching."""
    size = np.lcm(len(first), len(second))
    x, y = (np.repeat(samples, size // len(samples)) for samples in (first, second))
    gap = np.abs(x[:, None] - y[None, :]) % 1
    cost = np.minimum(gap, 1 - gap) ** p
    rows, columns = linear_sum_assignment(cost)
    return cost[rows, columns].mean() ** (1 / p)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1.0, 1.5, 2.0, 3.0]),
    st.sampled_from([0.03, 0.3, 1.0]),
    st.integers(0, 1000),
)
def test_on_the_circle_by_assignment(n, m, p, spread, seed):
    rng = np.random.default_rng(seed)
    first = (rng.random((3, 1)) + spread * rng.random((3, n))) % 1
    second = (rng.random((3, 1)) + spread * rng.random((3, m))) % 1
    second[0, : min(n, m)] = first[0, : min(n, m)]  # shared samples: flat stretches
    found = circular_wasserstein(first, second, p=p)
    expected = [by_assignment(x, y, p) for x, y in zip(first, second, strict=True)]
    np.testing.assert_allclose(found, expected, atol=1e-7)
    np.testing.assert_allclose(circular_wasserstein(second, first, p=p), found, atol=1e-7)
    turned = circular_wasserstein(first + 0.37, second - 2.63, p=p)
    np.testing.assert_allclose(turned, found, atol=1e-7)


def test_on_the_circle_in_closed_form():
    # The short way round: 0.1 and 0.9 are 0.2 apart.
    assert circular_wasserstein(np.array([[0.1]]), np.array([[0.9]])) == pytest.approx([0.2])
    # A turn of evenly spread samples by less than half of their spacing.
    even = np.arange(8)[None] / 8
    for p in (1.0, 2.0):
        assert circular_wasserstein(even, even + 0.05, p=p) == pytest.approx([0.05])
    # One sample against two at a quarter turn either way.
    assert circular_wasserstein(np.zeros((1, 1)), np.array([[0.25, 0.75]])) == pytest.approx([0.25])
    # A point against the uniform law: W_2^2 = integral of t^2 over [-1/2, 1/2] = 1/12.
    fine = (np.arange(10_000)[None] + 0.5) / 10_000
    assert circular_wasserstein(np.array([[0.3]]), fine) == pytest.approx(
        [np.sqrt(1 / 12)], rel=1e-6
    )


def test_one_great_circle_is_that_circle():
    """In the plane the only great circle is the sphere itself, whichever frame is drawn."""
    rng = np.random.default_rng(1)
    first, second = rng.random(30), 0.4 * rng.random(17)
    planes = [
        np.stack([np.cos(2 * np.pi * t), np.sin(2 * np.pi * t)], axis=1) for t in (first, second)
    ]
    found = spherical_sliced_wasserstein(*planes, n_projections=3)
    assert found == pytest.approx(circular_wasserstein(first[None], second[None])[0], abs=1e-9)


def test_definition_one_plane_at_a_time():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=(20, 5)) + 1, rng.normal(size=(15, 5))
    planes = np.random.default_rng(7)
    costs = []
    for _ in range(12):
        frame = np.linalg.qr(planes.standard_normal((5, 2)))[0]
        angles = [
            np.angle((rows @ frame) @ np.array([1, 1j])) / (2 * np.pi) for rows in (first, second)
        ]
        costs.append(by_assignment(*angles, 2) ** 2)
    found = spherical_sliced_wasserstein(first, second, n_projections=12, seed=7)
    assert found == pytest.approx(np.sqrt(np.mean(costs)), abs=1e-9)


def test_planes_do_not_depend_on_the_block(monkeypatch):
    rng = np.random.default_rng(3)
    sides = rng.normal(size=(40, 6)), rng.normal(size=(30, 6)) + 0.5
    whole = spherical_sliced_wasserstein(*sides, n_projections=11)
    monkeypatch.setattr("sotalign_jax.evaluation.shift.BLOCK", 200)
    monkeypatch.setattr("sotalign_jax.evaluation.shift.CHUNK", 7)
    assert spherical_sliced_wasserstein(*sides, n_projections=11) == pytest.approx(whole, rel=1e-12)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000))
def test_row_order_row_length_and_sides_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(12, 4)), rng.normal(size=(9, 4)) + 1

    def distance(a, b):
        return spherical_sliced_wasserstein(a, b, n_projections=8)

    value = distance(first, second)
    assert value > 0
    assert distance(second, first) == pytest.approx(value, abs=1e-9)
    moved = first[rng.permutation(12)] * rng.uniform(0.1, 9, (12, 1))
    assert distance(moved, second) == pytest.approx(value, abs=1e-9)
    assert distance(first, moved) == pytest.approx(0, abs=1e-7)
    # As many copies of each row are the same law.
    assert distance(np.repeat(first, 3, axis=0), second) == pytest.approx(value, abs=1e-9)


def test_opposite_points_are_half_a_turn_apart():
    north = np.zeros((1, 7), np.float32)
    north[0, 0] = 1
    assert spherical_sliced_wasserstein(north, -north, n_projections=5) == pytest.approx(0.5)


def test_one_source_is_no_shift_and_two_are():
    rng = np.random.default_rng(4)
    first = rng.normal(size=(400, 16)) + 0.5
    options = {"n_projections": 50, "repeats": 5}
    same = distribution_shift(first, rng.normal(size=(900, 16)) + 0.5, **options)
    assert same["ratio"] == pytest.approx(1, abs=0.15)
    assert same["rows"] == 200
    other = distribution_shift(first, rng.normal(size=(900, 16)), **options)
    assert other["ratio"] > 1.5
    assert other["shift"] > same["shift"] + 3 * (same["shift_sd"] + other["shift_sd"])
    assert other["null"] == max(other["null_first"], other["null_second"])
    assert distribution_shift(first, first, max_rows=30, **options)["rows"] == 30


def test_more_rows_lower_the_null_but_not_the_shift():
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(2000, 8)) + 0.7, rng.normal(size=(2000, 8))
    few, many = (
        distribution_shift(first, second, max_rows=rows, n_projections=40, repeats=3)
        for rows in (50, 1000)
    )
    assert many["null"] < 0.4 * few["null"]
    assert many["shift"] == pytest.approx(few["shift"], rel=0.3)
    assert many["excess"] == pytest.approx(few["excess"], rel=0.2)
    assert many["excess"] ** 2 == pytest.approx(many["shift"] ** 2 - many["null"] ** 2)


def test_rows_of_zeros_are_left_out_and_rows_that_repeat_have_no_null():
    rng = np.random.default_rng(6)
    first, second = rng.normal(size=(40, 5)), rng.normal(size=(40, 5)) + 1
    options = {"n_projections": 10, "repeats": 2}
    gaps = np.insert(first, 3, 0, axis=0)
    with_gaps = distribution_shift(gaps, second, max_rows=10, **options)
    assert 0.5 < with_gaps["ratio"] < np.inf
    one, other = (np.tile(reference.unit(row[None]), (6, 1)) for row in (first[0], second[0]))
    apart = distribution_shift(one, other, **options)
    assert apart["null"] == pytest.approx(0, abs=1e-8)
    assert apart["ratio"] > 1e6
    assert distribution_shift(one, one, **options)["ratio"] == pytest.approx(1)


def test_bad_input_is_named():
    rng = np.random.default_rng(8)
    first, second = rng.normal(size=(9, 4)), rng.normal(size=(8, 4))
    zero = second.copy()
    zero[2] = 0
    broken = second.copy()
    broken[5, 1] = np.inf
    for measure in (spherical_sliced_wasserstein, distribution_shift):
        with pytest.raises(ValueError, match="second: row 5 holds NaN or infinity"):
            measure(first, broken)
        with pytest.raises(ValueError, match="second: dimension 3, but first has 4"):
            measure(first, second[:, :3])
        with pytest.raises(ValueError, match="n_projections=0: must be at least 1"):
            measure(first, second, n_projections=0)
        with pytest.raises(ValueError, match=r"p=0\.5: must be finite and at least 1"):
            measure(first, second, p=0.5)
        with pytest.raises(ValueError, match="first: dimension 1; great circles"):
            measure(first[:, :1], second[:, :1])
    with pytest.raises(ValueError, match="second: 1 rows of zeros have no direction"):
        spherical_sliced_wasserstein(first, zero)
    with pytest.raises(ValueError, match="second: 3 rows; at least 4"):
        distribution_shift(first, second[:3])
    with pytest.raises(ValueError, match="second: 0 rows that are not zero; at least 4"):
        distribution_shift(first, 0 * second)
    for name in ("max_rows", "repeats"):
        with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
            distribution_shift(first, second, **{name: 0})
    with pytest.raises(ValueError, match=r"first: shape \(3, 0\)"):
        circular_wasserstein(np.zeros((3, 0)), np.zeros((3, 1)))
    with pytest.raises(ValueError, match="second: holds NaN"):
        circular_wasserstein(np.zeros((3, 1)), np.full((3, 1), np.nan))
    with pytest.raises(ValueError, match="second: 2 circles, but first has 3"):
        circular_wasserstein(np.zeros((3, 1)), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="p=inf"):
        circular_wasserstein(np.zeros((3, 1)), np.zeros((3, 1)), p=np.inf)
