"""A comparison in several processes is the one that a single process makes."""

import json
import signal
import time

import numpy as np
import pytest
from local_processes import finish, start
from rich.console import Console
from tiny_runs import CONFIG_FILE, assert_same_parameters, records, tiny_comparison

from sotalign_jax.sweeps import compare

RUNS = ("tuning/sail/point_0/seed_7", "tuning/sail/point_1/seed_7", "semi/seed_3", "sail/seed_3")


def starting(home, **fields):
    """The tiny comparison in two processes of one device each."""
    flags = [f"--config.{name}={value}" for name, value in ({"mesh.devices": 0} | fields).items()]
    return start(
        "compare", f"--config={CONFIG_FILE}:compare", f"--workdir={home}", *flags, processes=2
    )


def alone(home, **fields):
    """The same here, on one device."""
    return compare(tiny_comparison(**fields), home, console=Console(quiet=True))


def read(path):
    return json.loads(path.read_text())


def assert_same_comparison(home, other):
    for run in RUNS:
        assert_same_parameters(home / run, other / run)
        assert [r["step"] for r in records(home / run)] == [r["step"] for r in records(other / run)]
    assert read(home / "tuning.json") == read(other / "tuning.json")
    found, expected = (read(directory / "results.json") for directory in (home, other))
    assert found.keys() == expected.keys() == {"teacher", "sail", "semi"}
    for method, seeds in expected.items():
        for metric, value in seeds["3"].items():
            # One of the 50 test pairs may change places.
            np.testing.assert_allclose(found[method]["3"][metric], value, atol=0.021)
    assert read(home / "summary.json")["means"].keys() == expected.keys()


@pytest.mark.slow
def test_two_processes_make_the_comparison_of_one(tmp_path):
    home, other = tmp_path / "two", tmp_path / "one"
    first, second = finish(starting(home))
    alone(other)
    assert_same_comparison(home, other)
    assert "Held-out retrieval" in first and "on validation" in first and "seed 3  sail" in first
    assert "Held-out" not in second and "on validation" not in second and "seed 3" not in second
    hidden = {file.name for file in home.rglob(".*")}
    assert hidden <= {".lock"}  # no half-written file is left
    for run in (".", *RUNS):  # by one process, once
        assert len((home / run / "provenance.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_sigterm_to_one_process_stops_the_comparison_and_the_same_command_goes_on(tmp_path):
    home, other = tmp_path / "cut", tmp_path / "through"
    group = starting(home, steps=100)
    deadline = time.monotonic() + 180
    while next(home.glob("semi/seed_3/checkpoints/[0-9]*/_CHECKPOINT_METADATA"), None) is None:
        assert all(process.poll() is None for process in group), finish(group)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    group[1].send_signal(signal.SIGTERM)
    outputs = finish(group)
    assert not (home / "semi/seed_3/results.json").exists(), "it was over before the signal"
    assert not (home / "results.json").exists()
    stops = [line for text in outputs for line in text.splitlines() if "same command" in line]
    assert len(stops) == 2 and len(set(stops)) == 1  # at the same step
    assert stops[0].startswith("sotalign compare: stopped by SIGTERM")
    finish(starting(home, steps=100))
    alone(other, steps=100)
    assert_same_comparison(home, other)
    starts = [len((home / run / "provenance.jsonl").read_text().splitlines()) for run in RUNS]
    assert sorted(starts) == [1, 1, 1, 2]  # what was finished was not begun again

    # Done is done, for all of them: nothing is trained again.
    before = {file: file.stat().st_mtime_ns for file in home.glob("**/metrics.jsonl")}
    results = read(home / "results.json")
    first, _ = finish(starting(home, steps=100))
    assert "Held-out retrieval" in first and read(home / "results.json") == results
    assert before == {file: file.stat().st_mtime_ns for file in home.glob("**/metrics.jsonl")}
