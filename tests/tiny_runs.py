"""Runs small enough to train in a test, and how to compare what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy

from sotalign_jax.config import Config, default_config

CONFIG_FILE = Path(__file__).parent / "tiny_config.py"


def tiny(**fields) -> Config:
    """A platonic world of 64 pairs, 40 steps; ``loss__alpha=1`` sets ``config.loss.alpha``."""
    config = default_config()
    config.data.name = "platonic"
    config.data.n_pairs = 64
    config.data.n_unpaired = 256
    config.data.platonic.n_val = 40
    config.data.platonic.n_test = 50
    config.teacher.dim = 8
    config.model.dim = 16
    config.batch.pairs = 48
    config.batch.unpaired = 64
    config.loss.alpha = 0.01
    config.optimizer.learning_rate = 1e-3
    config.steps = 40
    config.mesh.devices = 1  # of the eight that the tests have
    config.eval_every = 10
    config.checkpoint_every = 10
    for name, value in fields.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def from_teacher(**fields) -> Config:
    """The same from the teacher's start."""
    return tiny(model__init="teacher", model__layer_norm=False, **fields)


def tiny_comparison(**fields) -> Config:
    """Two methods from the teacher's start, one of them tuned over two points on another draw.

    AdamW: Lion moves by the sign of a gradient, which blows small differences up.
    """
    config = from_teacher(**({"optimizer__name": "adamw", "steps": 20} | fields))
    with config.unlocked():
        config.compare.seeds = (3,)
        config.compare.methods = {"sail": {"objective": "sail"}, "semi": {"objective": "sail_semi"}}
        config.compare.tune_seeds = (7,)
        config.compare.grids = {"sail": {"optimizer": {"learning_rate": (1e-3, 1e-2)}}}
    return config


def tensors(workdir: Path) -> dict[str, np.ndarray]:
    """The trained aligner's tensors, read without this package."""
    return safetensors.numpy.load_file(workdir / "aligner" / "aligner.safetensors")


def records(workdir: Path, *, times: bool = False) -> list[dict]:
    """The lines of ``metrics.jsonl``, without what the clock said."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [
        {name: v for name, v in json.loads(line).items() if times or not name.startswith("time/")}
        for line in lines
    ]


def results(workdir: Path) -> dict:
    """``results.json``, without what the clock said."""
    read = json.loads((workdir / "results.json").read_text())
    del read["seconds"]
    return read


def assert_same_outcome(one: Path, other: Path) -> None:
    """Parameters, metrics and results equal to the last bit."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=name)
    assert records(one) == records(other)
    assert results(one) == results(other)


def assert_same_parameters(one: Path, other: Path) -> None:
    """Parameters equal up to the rounding of sums that were added up in another order.

    By the length of their difference: AdamW divides by the root of a second moment, so that single
    entries whose gradient is nearly nothing differ by more.
    """
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    pairs = [(left[name].ravel(), right[name].ravel()) for name in left]
    values, others = (
        np.concatenate(parts).astype(np.float64) for parts in zip(*pairs, strict=True)
    )
    assert np.linalg.norm(values - others) <= 1e-5 * np.linalg.norm(values)
    assert np.abs(values - others).max() <= 1e-4
