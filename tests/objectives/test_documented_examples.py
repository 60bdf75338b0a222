"""The methods that docs/objectives.md writes as examples are files that do what it says."""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import reference
from step_runs import Run, check_value_and_gradient, embedded, named, prepared_rows, small
from tiny_runs import records

from sotalign_jax.config import ConfigError, validate
from sotalign_jax.objectives import DIVERGENCES, OBJECTIVES
from sotalign_jax.training import train

DOCUMENT = Path(__file__).parents[2] / "docs" / "objectives.md"


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Writes the file that the document shows under a name, imports it, and adds the line."""

    def register(name, registry):
        found = re.search(
            rf"<!-- example: {name} -->\n```python\n(.*?)```.*?\n    \"{name}\": (\w+),\n",
            DOCUMENT.read_text(encoding="utf-8"),
            re.DOTALL,
        )
        assert found is not None, f"{DOCUMENT} has no example {name}"
        path = tmp_path / f"{name}.py"
        path.write_text(found[1], encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        monkeypatch.setitem(registry, name, getattr(module, found[2]))

    return register


def softmax(scores):
    return np.exp(scores - reference.logsumexp(scores, 1)[:, None])


def smoothed(image, text, scale, smoothing):
    n = len(image)
    labels = (1 - smoothing) * np.eye(n) + smoothing / n
    scores = scale * reference.cosines(image, text)
    both = [np.log(softmax(scores)), np.log(softmax(scores.T))]
    return -np.mean([np.sum(labels * log) / n for log in both])


# 25 pairs, of which 3 devices have 9, 9 and 7.
THREE_STEPS = {
    "objective": "smoothed",
    "smoothed__smoothing": 0.3,
    "steps": 3,
    "log_every": 1,
    "eval_every": 0,
    "checkpoint_every": 0,
    "data__n_pairs": 25,
    "batch__pairs": 25,
}


def test_the_objective_trains(example):
    example("smoothed", OBJECTIVES)
    run = Run(small(**THREE_STEPS))
    check_value_and_gradient(
        run,
        lambda params: smoothed(*embedded(run, params, "pairs"), np.exp(params["log_scale"]), 0.3),
    )
    _, metrics = run.resident(1, 1, 1)
    assert metrics["train/smoothed"][2] < metrics["train/smoothed"][0]
    other = Run(small(**THREE_STEPS | {"smoothed__smoothing": 0.0}))
    assert jax.tree.structure(other.setup) == jax.tree.structure(run.setup)


@pytest.mark.slow
def test_the_objective_trains_on_a_mesh_from_a_config(example, tmp_path):
    example("smoothed", OBJECTIVES)
    _, metrics = Run(small(**THREE_STEPS)).resident(1, 1, 1)
    train(small(**THREE_STEPS, mesh__devices=3), tmp_path / "mesh", quiet=True)
    found = [record["train/smoothed"] for record in records(tmp_path / "mesh")]
    np.testing.assert_allclose(found, metrics["train/smoothed"], rtol=1e-3)


def test_the_divergence_trains(example):
    example("total_variation", DIVERGENCES)
    run = Run(
        small(loss__divergence="total_variation", loss__alpha=5.0, total_variation__temperature=0.2)
    )
    state, metrics = run.resident(3)
    given = [
        prepared_rows(run, "unpaired", side) @ np.asarray(getattr(run.teacher, f"{side}_weight"))
        for side in ("image", "text")
    ]
    mine = embedded(run, named(run.first.params), "unpaired")
    student, teacher = (softmax(reference.cosines(*sides) / 0.2) for sides in (mine, given))
    expected = 0.5 * np.abs(student - teacher).sum(1).mean()
    np.testing.assert_allclose(metrics["train/total_variation"][0], expected, rtol=1e-4)
    np.testing.assert_allclose(
        metrics["train/loss"],
        metrics["train/siglip"] + 5 * metrics["train/total_variation"],
        rtol=1e-5,
    )
    assert metrics["train/total_variation"][-1] < metrics["train/total_variation"][0]
    assert int(state.step) == 3


def test_options_of_the_examples_are_checked_like_all_others(example):
    example("smoothed", OBJECTIVES)
    example("total_variation", DIVERGENCES)
    for name, value, message in (
        ("smoothed__smoothing", 1.0, r"config.smoothed.smoothing: must lie in \[0, 1\), got 1.0"),
        ("smoothed__direction", "up", r"config.smoothed.direction: got 'up'; must be one of both"),
        ("total_variation__temperature", 0.0, r"config.total_variation.temperature: must be posi"),
    ):
        with pytest.raises(ConfigError, match=f"^{message}"):
            validate(small(**{name: value}))


def test_every_objective_and_its_options_are_documented():
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, objective in OBJECTIVES.items():
        assert f"| `{name}`" in text and f"\n## {name}\n" in text, name
        if objective.options is not None:
            section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
            # Options that differ in the side alone may share a row of the table.
            rows = " ".join(re.findall(r"^\| ([^|]*) \|", section, re.MULTILINE))
            for field in dataclasses.fields(objective.options):
                assert f"`{field.name}`" in rows, f"{name}.{field.name}"
    for name in DIVERGENCES:
        assert f"\n| `{name}` |" in text, name
