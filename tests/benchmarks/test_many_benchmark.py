"""The benchmark of runs side by side: real processes, real parameters."""

import json
import os
import sys

import pytest
from tiny_runs import tiny

from sotalign_jax.benchmarks import many
from sotalign_jax.config import ConfigError, validate

TINY = {"loss__iterations": 20, "steps": 2, "log_every": 2, "eval_every": 0, "checkpoint_every": 0}


@pytest.mark.slow
@pytest.mark.parametrize("vary", ["seed", "alpha"])
def test_all_ways_end_with_the_same_parameters(vary, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    fields = {"optimizer__name": "adamw", "objective": "sotalign" if vary == "alpha" else "sail"}
    report = many.run(validate(tiny(**(TINY | fields))), 2, vary=vary, workdir=tmp_path)
    assert list(report["seconds"]) == list(many.WAYS)
    assert all(seconds > 0 for seconds in report["seconds"].values())
    assert 0 <= report["difference"] < 1e-5
    assert 0 <= report["largest"] < 1e-5
    assert report["optimizer"] == "adamw"
    seeds = [json.loads((tmp_path / "together" / f"run_{i}.json").read_text()) for i in (0, 1)]
    assert [one["seed"] for one in seeds] == ([0, 1] if vary == "seed" else [0, 0])


def test_a_process_that_fails_is_told(tmp_path):
    config = validate(tiny(data__name="files"))
    with pytest.raises(RuntimeError, match=r"(?s)status 2: .*config.data.files.image"):
        many.run(config, 2, workdir=tmp_path)


def test_refusals(tmp_path):
    config = validate(tiny(loss__alpha=0.0))
    with pytest.raises(ValueError, match="count must be at least 2, got 1"):
        many.run(config, 1, workdir=tmp_path)
    with pytest.raises(ValueError, match="vary must be 'seed' or 'alpha', got 'rate'"):
        many.run(config, 2, vary="rate", workdir=tmp_path)
    with pytest.raises(ConfigError, match=r"config\.loss\.alpha: is 0"):
        many.run(config, 2, vary="alpha", workdir=tmp_path)


def test_table(capsys):
    report = {
        "seconds": {"processes": 40.0, "one process": 20.0, "together": 10.0},
        "difference": 2.5e-7,
        "largest": 3.25e-6,
    }
    from rich.console import Console

    Console(width=100).print(many._table(report, "8 runs"))
    shown = capsys.readouterr().out
    for part in ("8 runs", "40.0", "1.000", "20.0", "0.500", "10.0", "0.250", "2.5e-07", "3.2e-06"):
        assert part in shown
