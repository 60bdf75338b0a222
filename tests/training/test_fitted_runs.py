"""Runs without steps: an aligner fitted in one go, evaluated and saved like any other."""

import copy
import dataclasses
import functools
import io
import json

import numpy as np
import pytest
from local_processes import finish, start
from rich.console import Console
from tiny_runs import CONFIG_FILE, results, tensors, tiny

from sotalign_jax import commands
from sotalign_jax.config import ConfigError, validate
from sotalign_jax.fitted import FITTED, asif, csa, load
from sotalign_jax.reports import write_report
from sotalign_jax.training import (
    data,
    evaluate,
    many,
    together_key,
    train,
    train_many,
)
from sotalign_jax.training.build import load_inputs

LEFT = {"aligner", "config.json", "provenance.jsonl", "results.json", "teacher"}


def names(workdir):
    return {path.name for path in workdir.iterdir() if not path.name.startswith(".")}


@functools.cache
def inputs():
    """Rows and teacher that all runs on the tiny world have in common."""
    return load_inputs(validate(tiny()))


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """CSA of 60 emoji, reported on a console."""
    workdir = tmp_path_factory.mktemp("runs") / "emoji"
    config = tiny(
        aligner="csa",
        data__name="emoji",
        data__n_pairs=60,
        data__n_unpaired=0,
        teacher__name="procrustes",
        csa__correlations="in_sample",  # one fit, of 1,280 dimensions
    )
    console = Console(file=io.StringIO(), width=150)
    return config, workdir, commands.train(config, str(workdir), console), console.file.getvalue()


def test_a_run_leaves_all_but_steps(emoji):
    _, workdir, outcome, report = emoji
    assert names(workdir) == LEFT
    assert json.loads((workdir / "results.json").read_text()) == outcome
    assert outcome["selected_step"] == 0 and outcome["pairs"] == 60
    recorded = json.loads((workdir / "config.json").read_text())
    assert recorded["aligner"] == "csa" and recorded["csa"]["correlations"] == "in_sample"
    assert len((workdir / "provenance.jsonl").read_text().splitlines()) == 1
    assert "aligner: csa, 59 dimensions" in report and "teacher (procrustes)" in report
    assert "│ csa " in report and "step" not in report
    document = json.loads((workdir / "aligner" / "aligner.json").read_text())
    assert document["metadata"]["config"] == recorded


def test_the_saved_aligner_gives_the_results(emoji):
    _, workdir, outcome, _ = emoji
    scores = commands.evaluate(str(workdir), console=Console(quiet=True))
    assert scores == pytest.approx(outcome["test"], abs=1e-9)
    assert scores["mean_recall@10"] > 2 * 10 / scores["n_images"]  # twice what chance gives
    log = Console(file=io.StringIO(), width=250)
    commands.inspect([str(workdir)], console=log)
    assert "csa, {" in log.file.getvalue() and '"in_sample"' in log.file.getvalue()


def test_the_page_of_a_run_shows_its_queries(emoji, tmp_path):
    _, workdir, _, _ = emoji
    written, problems = write_report(str(workdir), str(tmp_path / "page.html"))
    page = written.read_text(encoding="utf-8")
    assert "csa, fitted in one go" in page and "Numbers are similarities" in page
    assert "selected step" not in page and not problems


def test_the_aligner_is_the_fit_of_the_pairs(tmp_path):
    config = tiny(aligner="csa", csa__folds=3, seed=4)
    outcome = train(config, tmp_path / "run", quiet=True, inputs=inputs())
    pairs = inputs().splits.pairs
    direct = csa(pairs.image.array(), pairs.text.array(), folds=3, seed=4)
    loaded = load(tmp_path / "run" / "aligner")
    np.testing.assert_array_equal(loaded.image_weight, direct.image_weight)
    np.testing.assert_array_equal(loaded.correlations, direct.correlations)
    for name, held_out in (("val", inputs().splits.val), ("test", inputs().splits.test)):
        assert outcome[name] == pytest.approx(evaluate(direct, held_out), abs=1e-9)


def test_a_finished_run_started_again_does_nothing(emoji, monkeypatch):
    config, workdir, outcome, _ = emoji
    monkeypatch.setattr(data.fitted, "fit", None)
    assert train(config, workdir, quiet=True) == outcome
    config = copy.deepcopy(config)
    config.csa.folds = 3
    with pytest.raises(ConfigError, match=r"another configuration \(csa.folds: 5 -> 3\)"):
        train(config, workdir, quiet=True)


def test_unpaired_rows_are_read_where_the_options_ask_for_them(tmp_path):
    config = tiny(aligner="asif", asif__neighbours=5, asif__center="unpaired")
    train(config, tmp_path / "run", quiet=True, inputs=inputs())
    splits = inputs().splits
    tables = (splits.pairs.image, splits.pairs.text, splits.unpaired_image, splits.unpaired_text)
    direct = asif(*(table.array() for table in tables), neighbours=5, center="unpaired")
    loaded = load(tmp_path / "run" / "aligner")
    np.testing.assert_array_equal(loaded.image_map, direct.image_map)
    np.testing.assert_array_equal(loaded.text_mean, direct.text_mean)

    none = dataclasses.replace(splits, unpaired_image=splits.unpaired_image.select([]))
    with pytest.raises(ConfigError, match=r"config.asif: unpaired_image: holds no rows"):
        train(config, tmp_path / "none", quiet=True, inputs=inputs()._replace(splits=none))
    assert not names(tmp_path / "none")  # left open to a corrected start
    config.asif.center = "pairs"
    train(config, tmp_path / "none", quiet=True, inputs=inputs()._replace(splits=none))


def test_fitted_runs_stand_beside_those_that_are_trained_together(tmp_path, monkeypatch):
    configs = [tiny(aligner="csa"), tiny(objective="sail")]
    paths = [tmp_path / str(number) for number in range(2)]
    trained = []

    def train_group(runs, console, quiet, watch, done):
        for run in runs:
            trained.append(run.number)
            done(run.number, {"trained": run.number})

    monkeypatch.setattr(many, "_train_group", train_group)
    outcomes = train_many(configs, paths, quiet=True, inputs=[inputs()] * 2)
    assert trained == [1] and outcomes[1] == {"trained": 1}
    assert names(paths[0]) == LEFT and outcomes[0]["seconds"] > 0
    alone = train(configs[0], tmp_path / "alone", quiet=True, inputs=inputs())
    assert outcomes[0]["test"] == alone["test"] and results(paths[0]) == results(tmp_path / "alone")
    assert together_key(configs[0]) != together_key(configs[1])


def test_a_further_method_is_a_line_in_the_registry(tmp_path, monkeypatch):
    monkeypatch.setitem(FITTED, "mine", FITTED["asif"])
    config = tiny()
    assert config.mine.power == 8
    config.aligner, config.mine.power = "mine", 0
    with pytest.raises(ConfigError, match=r"config.mine.power: got 0; must be at least 1"):
        validate(config)
    config.mine.power = 2
    train(config, tmp_path / "run", quiet=True, inputs=inputs())
    assert load(tmp_path / "run" / "aligner").options.power == 2


def test_rows_that_do_not_support_the_options_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"config.csa: dim: got 60; .* the pairs support at most"):
        train(tiny(aligner="csa", csa__dim=60), tmp_path / "run", quiet=True, inputs=inputs())
    assert not names(tmp_path / "run")


@pytest.mark.slow
def test_two_processes_fit_what_one_fits(tmp_path):
    flags = (f"--config={CONFIG_FILE}:teacher", "--config.aligner=csa")
    for count in (1, 2):
        finish(start("train", *flags, f"--workdir={tmp_path / str(count)}", processes=count))
    assert names(tmp_path / "2") == LEFT and results(tmp_path / "1") == results(tmp_path / "2")
    one, two = (tensors(tmp_path / str(count)) for count in (1, 2))
    for name, value in one.items():
        np.testing.assert_array_equal(value, two[name], err_msg=name)
    flags += (f"--workdir={tmp_path / 'bad'}", "--config.csa.dim=60")
    for output in finish(start("train", *flags, processes=2), statuses=(2,)):
        assert "config.csa: dim: got 60; without one fold of 5" in output
