import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.evaluation import feature_health


def truth(rows, ks=(1, 10, 100)):
    """The definitions, from a full float64 singular value decomposition and a cosine matrix."""
    rows = np.asarray(rows, np.float64)
    n, d = rows.shape
    unit = reference.unit(rows)
    norms = np.linalg.norm(rows, axis=1)
    values = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False)
    shares = values**2 / np.sum(values**2)
    shares = shares[shares > 1e-20]
    cosines = unit @ unit.T
    expected = {
        "rows": n,
        "dim": d,
        "zero_rows": 0,
        "norm_min": norms.min(),
        "norm_median": np.median(norms),
        "norm_max": norms.max(),
        "dead_columns": np.sum(~rows.any(axis=0)),
        "constant_columns": np.sum(np.ptp(rows, axis=0) == 0),
        "largest_column": np.square(unit).mean(axis=0).max(),
        "mean_cosine": cosines[~np.eye(n, dtype=bool)].mean(),
        "rank": np.sum(values > values[0] * d * np.finfo(np.float32).eps),
        "effective_rank": np.exp(-np.sum(shares * np.log(shares))),
    }
    return expected | {f"variance_share@{k}": shares[:k].sum() for k in ks}


def world(n, d, rank, seed=0):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(n, rank)) @ rng.normal(size=(rank, d)) + 0.3
    return rows * rng.uniform(0.1, 9, (n, 1))


@pytest.mark.parametrize(("n", "d", "rank"), [(60, 9, 9), (60, 20, 5), (9, 40, 40), (2, 3, 3)])
@pytest.mark.parametrize("chunk", [7, 4096])
def test_numbers_against_their_definitions(n, d, rank, chunk, monkeypatch):
    monkeypatch.setattr("sotalign_jax.evaluation.health.CHUNK", chunk)
    rows = world(n, d, rank)
    rows[:, 1] = 0.0
    found = feature_health(rows)
    expected = truth(rows)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert isinstance(value, float)
        assert value == pytest.approx(expected[name], rel=1e-9, abs=1e-9), name
    assert found["dead_columns"] == found["constant_columns"] == 1


@pytest.mark.parametrize(("n", "d"), [(200, 20), (15, 20)])
def test_rank_sees_through_rounding_of_float32(n, d):
    rows = reference.unit(world(n, d, 4)).astype(np.float32)
    found = feature_health(rows)
    # Unit rows of a plane of dimension 4 and a shift, about their mean.
    assert found["rank"] == 5
    assert found["effective_rank"] < 5
    assert found["variance_share@10"] == pytest.approx(1)


def test_evenly_spread_rows_have_full_effective_rank():
    axes = np.vstack([np.eye(16), -np.eye(16)])
    found = feature_health(axes, directions=(1, 4, 16))
    assert found["rank"] == 16
    assert found["effective_rank"] == pytest.approx(16)
    assert [found[f"variance_share@{k}"] for k in (1, 4, 16)] == pytest.approx([1 / 16, 1 / 4, 1])
    assert found["largest_column"] == pytest.approx(1 / 16)
    # 32 rows, each with one opposite: 32 pairs of cosine -1, counted both ways, of 32 x 31.
    assert found["mean_cosine"] == pytest.approx(-1 / 31)


def test_one_large_column_and_a_common_direction_show():
    rows = np.random.default_rng(0).normal(size=(300, 64))
    plain = feature_health(rows)
    assert plain["mean_cosine"] == pytest.approx(0, abs=0.01)
    assert plain["largest_column"] < 0.03
    rows[:, 5] += 30
    found = feature_health(rows)
    assert found["largest_column"] > 0.9
    assert found["mean_cosine"] > 0.9
    assert found["constant_columns"] == 0
    rows[:, 7] = 2.5
    assert feature_health(rows)["constant_columns"] == 1
    assert feature_health(rows)["dead_columns"] == 0


@pytest.mark.parametrize(("n", "d"), [(30, 8), (8, 30)])
def test_rows_that_do_not_vary_have_no_rank(n, d):
    row = np.random.default_rng(1).normal(size=(1, d)).astype(np.float32)
    found = feature_health(np.tile(row, (n, 1)) * np.arange(1, n + 1)[:, None])
    assert found["rank"] == found["effective_rank"] == 0
    assert np.isnan(found["variance_share@1"])
    assert found["mean_cosine"] == pytest.approx(1)
    nothing = feature_health(np.zeros((n, d)))
    assert nothing["zero_rows"] == n
    assert nothing["dead_columns"] == d
    assert nothing["rank"] == 0
    assert np.isnan(nothing["largest_column"])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000))
def test_rotation_and_row_order_leave_directions_alone(seed):
    rng = np.random.default_rng(seed)
    rows = world(20, 6, 6, seed)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    before, after = feature_health(rows), feature_health(rows[rng.permutation(20)] @ rotation)
    for name in ("norm_median", "mean_cosine", "rank", "effective_rank", "variance_share@1"):
        assert after[name] == pytest.approx(before[name], rel=1e-9), name


def test_memory_maps_and_half_precision_are_taken(tmp_path):
    rows = world(40, 6, 6).astype(np.float16)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert feature_health(mapped) == feature_health(rows.astype(np.float32))


def test_bad_input_is_named():
    rows = world(10, 4, 4)
    with pytest.raises(ValueError, match=r"directions=\[0\]: each must be at least 1"):
        feature_health(rows, directions=[0])
    with pytest.raises(ValueError, match="rows: 1 rows; at least 2"):
        feature_health(rows[:1])
    rows[3, 2] = np.inf
    with pytest.raises(ValueError, match="rows: row 3 holds NaN or infinity"):
        feature_health(rows)


def test_rank_does_not_depend_on_how_many_rows_there_are():
    rng = np.random.default_rng(0)
    scales = np.r_[1.0, np.full(16, 0.02)]
    for n in (500, 50_000):
        rows = rng.normal(size=(n, 17)) * scales + 3
        assert feature_health(rows.astype(np.float32))["rank"] == 17
