"""Metrics files as they are found: long, cut off, odd."""

import json

import numpy as np
import pytest

from sotalign_jax.reports.series import MAX_POINTS, Series, read_series, thinned


def written(path, *lines):
    path.write_text(
        "".join(line if isinstance(line, str) else f"{json.dumps(line)}\n" for line in lines)
    )
    return path


def test_every_metric_is_a_curve_of_its_own_steps(tmp_path):
    file = written(
        tmp_path / "metrics.jsonl",
        {"step": 10, "train/loss": 1.5},
        {"step": 20, "train/loss": 1.0, "val/mean_recall@1": 0.25},
    )
    found = read_series(file)
    assert found["train/loss"].steps.tolist() == [10, 20]
    assert found["train/loss"].values.tolist() == [1.5, 1.0]
    assert found["val/mean_recall@1"].steps.tolist() == [20]


def test_what_is_no_record_is_passed_over(tmp_path):
    file = written(
        tmp_path / "metrics.jsonl",
        {"step": 30, "loss": 3},
        "\n",
        "[1, 2]\n",
        "not JSON\n",
        {"loss": 9.0},
        {"step": "ten", "loss": 9.0},
        {"step": 40, "loss": None, "name": "x", "flag": True, "nan": float("nan")},
        {"step": 50, "loss": float("inf"), "other": 5},
        {"step": 20, "loss": 2.0},
        {"step": 30, "loss": 4.0},  # a step done again counts as it was done last
        '{"step": 60, "loss": 1.',  # cut off
    )
    found = read_series(file)
    assert set(found) == {"loss", "other"}
    assert found["loss"].steps.tolist() == [20, 30] and found["loss"].values.tolist() == [2.0, 4.0]


def test_no_file_is_no_curve(tmp_path):
    assert read_series(tmp_path / "none.jsonl") == {}
    assert read_series(written(tmp_path / "empty.jsonl")) == {}


def test_bytes_that_are_no_text_do_not_end_it(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'\xff\xfe\x00\n{"step": 1, "loss": 2}\n')
    assert read_series(file)["loss"].values.tolist() == [2.0]


@pytest.mark.parametrize("count", [1, 2, 499, 500, 501, 502, 1000, 1003, 20_000])
def test_thinned_is_short_and_keeps_ends_order_and_extremes(count):
    rng = np.random.default_rng(count)
    series = Series(np.arange(count) * 10.0, rng.normal(size=count))
    series.values[count // 3] = 99.0  # a spike of one step
    found = thinned(series)
    assert (
        len(found.steps) == count if count <= MAX_POINTS else 400 < len(found.steps) <= MAX_POINTS
    )
    assert found.steps[0] == 0 and found.steps[-1] == series.steps[-1]
    assert (np.diff(found.steps) > 0).all()
    kept = (found.steps / 10).astype(int)
    np.testing.assert_array_equal(series.values[kept], found.values)
    assert found.values.max() == 99.0 and found.values.min() == series.values.min()
    # No stretch is left out.
    assert np.diff(kept).max(initial=0) <= max(1, 4 * count // MAX_POINTS + 2)


def test_a_huge_file_gives_short_curves(tmp_path):
    file = written(tmp_path / "metrics.jsonl", *({"step": i, "a": i % 7} for i in range(5000)))
    found = read_series(file)["a"]
    assert len(found.steps) <= MAX_POINTS and found.steps[-1] == 4999
