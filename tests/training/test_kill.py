"""SIGKILL at any moment, the same command again: the same parameters as an uninterrupted run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import CONFIG_FILE, assert_same_outcome, records

TESTS = Path(__file__).parents[1]


def start(workdir, arg, *flags):
    """``python -m sotalign_jax train`` in a process of its own."""
    command = [sys.executable, "-m", "sotalign_jax", "train", f"--config={CONFIG_FILE}{arg}"]
    return subprocess.Popen(
        [*command, f"--workdir={workdir}", "--config.steps=60", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(TESTS), "JAX_PLATFORMS": "cpu"},
    )


def finish(process):
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return output


def kill_when(process, happened, delay):
    """SIGKILL ``delay`` seconds after ``happened()``; True unless the run was over before."""
    deadline = time.monotonic() + 120
    while not happened():
        if process.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def has(workdir, pattern):
    return lambda: next(workdir.glob(pattern), None) is not None


def assert_survives(tmp_path, arg, flags, moments):
    through, cut = tmp_path / "through", tmp_path / "cut"
    finish(start(through, arg, *flags))
    killed = [
        kill_when(start(cut, arg, *flags), has(cut, pattern), delay) for pattern, delay in moments
    ]
    assert any(killed), "every run was over before its kill"
    last = finish(start(cut, arg, *flags))
    assert "aligner saved in" in last
    assert_same_outcome(cut, through)
    steps = [line["step"] for line in records(cut)]
    assert steps == list(range(10, 61, 10))


def test_killed_while_a_checkpoint_is_written(tmp_path):
    # The first kill falls into the write of the first checkpoint, the second of a later one.
    moments = [("checkpoints/*orbax-checkpoint-tmp*", 0.0), ("checkpoints/[2-5]0*tmp*", 0.005)]
    assert_survives(tmp_path, ":teacher", ["--config.select=best"], moments)


STARTS = {"random": "", "teacher": ":teacher"}
FLAGS = {
    "last": [],
    "best": ["--config.select=best"],
    "streamed": ["--config.data.resident=never"],
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("start_at", STARTS)
def test_killed_at_random_moments(tmp_path, start_at, flags):
    arg, flags = STARTS[start_at], FLAGS[flags]
    delays = np.random.default_rng(len(arg) + len(flags)).uniform(0, 0.3, size=6)
    patterns = [
        "config.json",
        "metrics.jsonl",
        "checkpoints/10*",
        "checkpoints/*tmp*",
        "checkpoints/[3-6]0",
        "aligner*",
    ]
    moments = [(pattern, float(delay)) for pattern, delay in zip(patterns, delays, strict=True)]
    assert_survives(tmp_path, arg, flags, moments)


@pytest.mark.slow
def test_killed_by_the_clock(tmp_path):
    moments = [("*", 0.2 * number) for number in range(12)]
    assert_survives(tmp_path, "", [], moments)
