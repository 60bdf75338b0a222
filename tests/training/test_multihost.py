"""Several processes train as one does, survive the loss of one, and go on as another number."""

import signal
import time

import local_processes
import numpy as np
import pytest
from local_processes import finish
from tiny_runs import CONFIG_FILE, assert_same_parameters, records, results

# AdamW: Lion moves by the sign of a gradient, which hides small differences and blows up others.
FIELDS = (
    "optimizer.name=adamw",
    "loss.alpha=1.0",
    "loss.iterations=20",
    "steps=60",
    "mesh.devices=0",
)


def start(workdir, processes=1, devices=1, flags=()):
    """``train`` in so many processes of so many devices."""
    fields = [f"--config.{field}" for field in (*FIELDS, *flags)]
    return local_processes.start(
        "train",
        f"--config={CONFIG_FILE}:teacher",
        f"--workdir={workdir}",
        *fields,
        processes=processes,
        devices=devices,
    )


def wait_for_checkpoint(workdir, group):
    deadline = time.monotonic() + 180
    while next(workdir.glob("checkpoints/[0-9]*/_CHECKPOINT_METADATA"), None) is None:
        assert all(process.poll() is None for process in group), finish(group)
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_close(one, other):
    assert_same_parameters(one, other)
    assert [r["step"] for r in records(one)] == [r["step"] for r in records(other)]
    losses = [[r["train/loss"] for r in records(run)] for run in (one, other)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    for metric, value in results(one)["test"].items():
        np.testing.assert_allclose(results(other)["test"][metric], value, atol=0.021)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, one device, never interrupted."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(workdir))
    return workdir


@pytest.mark.slow
def test_killing_one_process_ends_both_and_the_same_command_resumes(alone, tmp_path):
    group = start(tmp_path / "run", processes=2, devices=2)
    wait_for_checkpoint(tmp_path / "run", group)
    group[1].send_signal(signal.SIGKILL)
    # The other one ends by an error of its connection, or jax ends it once the heartbeat is missed.
    finish(group, statuses=(-signal.SIGKILL, -signal.SIGABRT, 1, 2))
    assert not (tmp_path / "run" / "results.json").exists(), "it was over before the signal"
    finish(start(tmp_path / "run", processes=2, devices=2))
    assert_close(alone, tmp_path / "run")


def test_sigterm_to_one_stops_all_and_one_device_goes_on(alone, tmp_path):
    """Rows from disk, so that each process reads its share."""
    flags = ("data.resident=never",)
    group = start(tmp_path / "run", processes=2, devices=2, flags=flags)
    wait_for_checkpoint(tmp_path / "run", group)
    group[1].send_signal(signal.SIGTERM)
    outputs = finish(group)
    assert not (tmp_path / "run" / "results.json").exists(), "it was over before the signal"
    assert all("the same command goes on from step" in output for output in outputs)
    finish(start(tmp_path / "run", flags=flags))
    assert_close(alone, tmp_path / "run")
    assert len((tmp_path / "run" / "provenance.jsonl").read_text().splitlines()) == 2
