"""Methods against each other: the files written, restarts, and tuning."""

import functools
import json
import statistics
import sys

import numpy as np
import pytest
from rich.console import Console
from tiny_runs import tiny

from sotalign_jax.config import ConfigError, validate
from sotalign_jax.sweeps import compare as compare_function
from sotalign_jax.sweeps.compare import compare
from sotalign_jax.training import build, loop

# The package exports a function of the same name.
module = sys.modules["sotalign_jax.sweeps.compare"]

# In the order of the alphabet, in which a ConfigDict lists them.
METHODS = {
    "sail": {"objective": "sail"},
    "sail_from_teacher": {"objective": "sail", "model": {"init": "teacher", "layer_norm": False}},
    "semi": {"objective": "sail_semi", "steps": 10},
}


def comparison(methods=METHODS, seeds=(3, 5), **fields):
    config = tiny(steps=20, **{name: v for name, v in fields.items() if name != "compare"})
    with config.unlocked():
        config.compare.methods = methods
        config.compare.seeds = seeds
        for name, value in fields.get("compare", {}).items():
            config.compare[name] = value
    return config


def quiet():
    return Console(quiet=True, width=200)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    home = tmp_path_factory.mktemp("compare") / "home"
    return home, compare(comparison(), home, console=quiet())


@functools.cache
def some_inputs():
    return loop.load_inputs(validate(tiny()))


def planted(monkeypatch, score, calls=None):
    """`train` that trains nothing; ``score(config)`` is every metric there is."""

    def train(config, path, **options):
        if calls is not None:
            calls.append((str(path), config))
        value = score(config)
        names = [f"{s}recall@{k}" for s in ("t2i/", "i2t/", "mean_") for k in (1, 5, 10)]
        metrics = dict.fromkeys(names, value)
        return {
            "test": metrics,
            "val": metrics,
            "teacher_test": dict.fromkeys(names, 0.25),
            "seconds": 0.0,
        }

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(build, "load_inputs", lambda config: some_inputs())


def test_results_are_method_seed_metrics_of_the_runs_below(compared):
    home, returned = compared
    written = json.loads((home / "results.json").read_text())
    assert written == returned
    means = [
        np.mean([metrics["mean_recall@1"] for metrics in seeds.values()])
        for seeds in returned.values()
    ]
    assert sorted(returned) == ["sail", "sail_from_teacher", "semi", "teacher"]
    assert means == sorted(means)  # the best method last
    for method, seeds in returned.items():
        assert list(seeds) == ["3", "5"]
        for seed, metrics in seeds.items():
            folder = "sail" if method == "teacher" else method
            run = json.loads((home / folder / f"seed_{seed}" / "results.json").read_text())
            assert metrics == run["teacher_test" if method == "teacher" else "test"]
            assert 0 <= metrics["t2i/recall@1"] <= metrics["t2i/recall@10"] <= 1
    recorded = json.loads((home / "semi" / "seed_5" / "config.json").read_text())
    assert (recorded["steps"], recorded["seed"], recorded["objective"]) == (10, 5, "sail_semi")


def test_summary_holds_means_spreads_and_paired_differences(compared):
    home, results = compared
    summary = json.loads((home / "summary.json").read_text())
    for method in results:
        values = [results[method][seed]["i2t/recall@5"] for seed in ("3", "5")]
        found = summary["means"][method]["i2t/recall@5"]
        assert found["mean"] == pytest.approx(sum(values) / 2)
        assert found["sd"] == pytest.approx(statistics.stdev(values))
    worse, *_, better = results
    deltas = [
        results[better][seed]["mean_recall@10"] - results[worse][seed]["mean_recall@10"]
        for seed in ("3", "5")
    ]
    found = summary["differences"][f"{better} - {worse}"]["mean_recall@10"]
    assert found["mean"] == pytest.approx(sum(deltas) / 2)
    assert found["sd"] == pytest.approx(statistics.stdev(deltas))
    assert (found["min"], found["max"]) == pytest.approx((min(deltas), max(deltas)))
    assert len(summary["differences"]) == 6  # each of four against those before it


def test_started_again_finished_runs_are_not_repeated(compared, monkeypatch):
    home, results = compared
    monkeypatch.setattr(loop, "load_inputs", lambda config: pytest.fail("read the data"))
    monkeypatch.setattr(build, "load_inputs", lambda config: pytest.fail("read the data"))
    assert compare(comparison(), home, console=quiet()) == results


def test_a_comparison_that_was_killed_goes_on(compared, tmp_path, monkeypatch):
    results = compared[1]

    class Killed(BaseException):
        pass

    train, started = module.train, []

    def until_killed(config, path, **options):
        started.append(path)
        if len(started) == 3:
            raise Killed
        return train(config, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", until_killed)
        with pytest.raises(Killed):
            compare(comparison(), tmp_path / "home", console=quiet())
    assert not (tmp_path / "home" / "results.json").exists()
    assert compare(comparison(), tmp_path / "home", console=quiet()) == results


def test_the_table_shows_every_method_and_the_differences(monkeypatch, tmp_path, capsys):
    scores = {("sail", 3): 0.4, ("sail", 5): 0.5, ("sotalign", 3): 0.6, ("sotalign", 5): 0.6}
    planted(monkeypatch, lambda config: scores[config.objective, config.seed])
    methods = {"base": {"objective": "sail"}, "ours": {"objective": "sotalign"}}
    compare(comparison(methods), tmp_path / "home", console=Console(width=200))
    shown = capsys.readouterr().out
    assert "45.0±7.1" in shown and "60.0±0.0" in shown and "25.0±0.0" in shown
    assert "+15.0±7.1" in shown and "(+10.0, +20.0)" in shown  # ours - base, draw by draw


def test_methods_of_a_seed_share_their_inputs(monkeypatch, tmp_path):
    planted(monkeypatch, lambda config: 0.5)
    loaded = []

    def load(config):
        loaded.append((config.seed, config.data.n_pairs))
        return some_inputs()

    monkeypatch.setattr(build, "load_inputs", load)
    methods = {"a": {}, "b": {"steps": 10}, "c": {"data": {"n_pairs": 32}}}
    compare(comparison(methods), tmp_path / "home", console=quiet())
    assert loaded == [(3, 64), (3, 32), (5, 64), (5, 32)]


def test_another_teacher_alone_is_a_row(tmp_path):
    plain = {"ridge": 1e-3, "refit": {"weight": 0.0}}
    start = {"init": "teacher", "layer_norm": False}
    methods = {
        "cca_pairs": {"teacher": plain, "steps": 0},
        "from_pairs": {"teacher": plain, "objective": "sail"},
        "from_teacher": {"objective": "sail"},
    }
    home = tmp_path / "home"
    config = comparison(
        methods,
        seeds=(3,),
        teacher__refit__weight=0.3,
        teacher__refit__epsilon=0.1,
        teacher__standardize__image=0.5,
        **{f"model__{name}": value for name, value in start.items()},
    )
    results = compare(config, home, console=quiet())
    runs = {
        name: json.loads((home / name / "seed_3" / "results.json").read_text()) for name in methods
    }
    # The row is the teacher that the other method of these fields started from, and not the
    # comparison's own.
    assert results["cca_pairs"]["3"] == runs["from_pairs"]["teacher_test"]
    assert results["teacher"]["3"] == runs["from_teacher"]["teacher_test"]
    assert results["cca_pairs"]["3"] != results["teacher"]["3"]
    assert runs["cca_pairs"]["selected_step"] == 0
    assert results["from_pairs"]["3"] != results["cca_pairs"]["3"]
    # Done is done: nothing is trained or read again.
    assert compare(config, home, console=quiet()) == results


def test_methods_with_a_teacher_of_their_own_share_it_with_their_likes_alone(monkeypatch, tmp_path):
    planted(monkeypatch, lambda config: 0.5)
    loaded = []

    def load(config):
        loaded.append((config.seed, config.teacher.refit.weight, config.teacher.ridge))
        return some_inputs()

    monkeypatch.setattr(build, "load_inputs", load)
    own = {"teacher": {"refit": {"weight": 0.0}}}
    methods = {"a": {}, "b": own, "c": own | {"steps": 10}, "d": {"teacher": {"ridge": 0.5}}}
    config = comparison(methods, seeds=(3,), teacher__refit__weight=0.3)
    results = compare(config, tmp_path / "home", console=quiet())
    assert loaded == [(3, 0.3, 0.1), (3, 0.0, 0.1), (3, 0.3, 0.5)]
    assert results["teacher"]["3"]["mean_recall@1"] == 0.25


def test_tuning_takes_the_point_that_is_best_on_validation(monkeypatch, tmp_path):
    # In the mean over both tuning seeds alpha 0.1 wins, though alpha 1 has the best single draw.
    scores = {(0.01, 7): 0.2, (0.01, 8): 0.2, (0.1, 7): 0.5, (0.1, 8): 0.5}
    scores |= {(1.0, 7): 0.9, (1.0, 8): 0.0}
    calls = []
    planted(monkeypatch, lambda c: scores.get((c.loss.alpha, c.seed), 0.3), calls)
    config = comparison(
        {"tuned": {"objective": "sotalign"}, "a_plain": {"objective": "sail"}},
        compare={"tune_seeds": (7, 8), "grids": {"tuned": {"loss": {"alpha": (0.01, 0.1, 1.0)}}}},
    )
    compare(config, tmp_path / "home", console=quiet())
    tuned = json.loads((tmp_path / "home" / "tuning.json").read_text())
    assert tuned["tuned"] == {"objective": "sotalign", "loss": {"alpha": 0.1}}
    assert tuned["a_plain"] == {"objective": "sail"}
    final = [
        (c.loss.alpha, c.objective, c.seed) for path, c in calls if "/home/tuning/" not in path
    ]
    best, plain = (0.1, "sotalign"), (0.01, "sail")
    assert final == [(*plain, 3), (*best, 3), (*plain, 5), (*best, 5)]
    assert len(calls) == 6 + 4


@pytest.mark.parametrize(
    ("methods", "more", "message"),
    [
        ({}, {}, "config.compare.methods: names no method"),
        (
            {"good": {}, "bad": {"loss": {"alhpa": 1.0}}},
            {},
            r"config.compare.methods.bad.loss.alhpa: no such field; did you mean loss.alpha",
        ),
        ({"good": {}, "bad": {"steps": "many"}}, {}, "config.compare.methods.bad.steps: .* int"),
        ({"good": {}, "bad": {"steps": -1}}, {}, "config.steps: must not be negative"),
        ({"good": {}, "teacher": {}}, {}, "config.compare.methods.teacher: this name is taken"),
        ({"a": {}}, {"grids": {"b": {"steps": (10,)}}}, "config.compare.grids.b: no such method"),
    ],
)
def test_what_cannot_be_compared_is_named_before_any_run(
    methods, more, message, monkeypatch, tmp_path
):
    monkeypatch.setattr(module, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ConfigError, match=message):
        compare(comparison(methods, compare=more), tmp_path / "home", console=quiet())


def test_test_pairs_are_needed(tmp_path):
    config = comparison({"sail": {"objective": "sail"}}, data__platonic__n_test=0)
    with pytest.raises(ConfigError, match=r"config.data: has no test pairs"):
        compare(config, tmp_path / "home", console=quiet())


def test_the_package_exports_it():
    assert compare_function is compare and validate(comparison()).compare.seeds == (3, 5)
