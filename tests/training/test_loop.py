"""What a run leaves behind, and that an interruption leaves no trace."""

import functools
import json
import sys
import types

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_runs import assert_same_outcome, from_teacher, records, results, tensors, tiny

import sotalign_jax
from sotalign_jax import training
from sotalign_jax.config import ConfigError, validate
from sotalign_jax.evaluation import retrieval_metrics
from sotalign_jax.features import platonic_world
from sotalign_jax.models import Aligner
from sotalign_jax.training import build, loop, record
from sotalign_jax.training.checkpoints import Checkpoints
from sotalign_jax.training.metrics import MetricWriter


def sail(**fields):
    """Quicker to compile, for what does not depend on the objective."""
    return tiny(objective="sail", **fields)


@functools.cache
def shared_inputs():
    """Rows and teacher of `tiny`, which most runs here have in common."""
    return loop.load_inputs(validate(tiny()))


def quietly(config, workdir, **options):
    return training.train(config, workdir, quiet=True, **options)


def shortly(config, workdir):
    """The same on the rows and the teacher of `tiny`."""
    return quietly(config, workdir, inputs=shared_inputs())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of `tiny`, uninterrupted."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    return workdir, quietly(tiny(), workdir)


# ---- what is there when it is done


def test_metrics_hold_every_logged_step_once(finished):
    workdir, _ = finished
    lines = records(workdir, times=True)
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    for line in lines:
        assert {
            "train/loss",
            "train/siglip",
            "train/klot",
            "train/gradient_norm",
            "train/parameter_norm",
            "train/learning_rate",
            "train/scale",
            "train/bias",
            "train/student_marginal_error",
            "train/teacher_marginal_error",
            "train/student_iterations",
            "train/teacher_iterations",
            "train/student_perplexity",
            "train/teacher_perplexity",
            "time/steps_per_second",
            "time/rows_per_second",
            "val/t2i/recall@1",
            "val/i2t/recall@10",
            "val/mean_recall@5",
        } <= line.keys()
        assert all(isinstance(value, int | float) for value in line.values())
        np.testing.assert_allclose(
            line["train/loss"], line["train/siglip"] + 0.01 * line["train/klot"], rtol=1e-5
        )
        # 48 pairs, 64 images and 64 texts a step.
        np.testing.assert_allclose(
            line["time/rows_per_second"], 176 * line["time/steps_per_second"], rtol=1e-9
        )
    # The mean over the cosine's last ten steps: 36 steps of it from step 4 on.
    rates = [5e-4 * (1 + np.cos(np.pi * (k - 4) / 36)) for k in range(30, 40)]
    np.testing.assert_allclose(lines[-1]["train/learning_rate"], np.mean(rates), rtol=1e-5)


def test_validation_only_when_due(tmp_path):
    quietly(sail(steps=25, eval_every=20, checkpoint_every=0), tmp_path / "run")
    lines = records(tmp_path / "run")
    assert [line["step"] for line in lines] == [10, 20, 25]
    assert ["val/foscttm" in line for line in lines] == [False, True, True]


def test_config_and_provenance_are_recorded(finished):
    workdir, _ = finished
    recorded = json.loads((workdir / "config.json").read_text())
    assert recorded == json.loads(validate(tiny()).to_json())
    (start,) = [json.loads(s) for s in (workdir / "provenance.jsonl").read_text().splitlines()]
    assert start["seed"] == 0
    assert start["sotalign_jax"] == sotalign_jax.__version__
    assert start["versions"]["jax"] == jax.__version__
    assert start["versions"]["numpy"] == np.__version__
    assert start["command"] == sys.argv
    assert start["devices"] == [str(device) for device in jax.devices()]
    assert start["git"] is None or len(start["git"]["commit"]) == 40


def test_the_saved_aligner_gives_the_results(finished):
    workdir, returned = finished
    assert returned == json.loads((workdir / "results.json").read_text())
    world = platonic_world(seed=0, n_pairs=64, n_unpaired=256, n_val=40, n_test=50)
    for folder, prefix in (("aligner", ""), ("teacher", "teacher_")):
        aligner = Aligner.load(workdir / folder)
        for name, pairs in (("val", world.val), ("test", world.test)):
            scores = retrieval_metrics(
                aligner.embed_image(pairs.image.array()), aligner.embed_text(pairs.text.array())
            )
            for metric, value in scores.items():
                assert returned[f"{prefix}{name}"][metric] == pytest.approx(value, abs=1e-6)
    aligner = Aligner.load(workdir / "aligner")
    assert aligner.training_prior == pytest.approx(1 / 48)  # the pairs of a batch
    assert returned["selected_step"] == 40 and returned["pairs"] == 64
    metadata = json.loads((workdir / "aligner" / "aligner.json").read_text())["metadata"]
    assert metadata["step"] == 40 and metadata["config"]["steps"] == 40


def test_training_moves_the_parameters_and_lowers_the_loss(finished):
    workdir, _ = finished
    losses = [line["train/loss"] for line in records(workdir)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]


def test_a_finished_run_started_again_does_nothing(finished, monkeypatch):
    workdir, returned = finished
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*")}
    monkeypatch.setattr(loop, "load_inputs", lambda config: pytest.fail("read the data again"))
    assert quietly(tiny(), workdir) == returned
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob("*")} == before


def test_seeds_differ(tmp_path):
    kernel = "image.linear.kernel"
    for seed in (0, 1):
        quietly(sail(seed=seed), tmp_path / str(seed))
    assert (tensors(tmp_path / "0")[kernel] != tensors(tmp_path / "1")[kernel]).any()


def test_inputs_of_a_caller_give_the_same_run(finished, tmp_path):
    config = validate(tiny())
    quietly(config, tmp_path / "run", inputs=loop.load_inputs(config))
    assert_same_outcome(tmp_path / "run", finished[0])


def test_the_report_shows_what_happens(tmp_path, capsys):
    console = Console(width=200)
    training.train(tiny(), tmp_path / "run", console=console)
    shown = capsys.readouterr().out
    for part in ("64 (48 a step)", "256 (64)", "resident", "teacher: cca, 8", "step 40/40", "err*"):
        assert part in shown


# ---- interruption


class Interruption(Exception):
    pass


def interrupt_once(monkeypatch, config, workdir, *, before_write=None, before_save=None):
    """Runs until just before a record, or a checkpoint, of a step is written."""
    with monkeypatch.context() as patch:
        write, save = MetricWriter.write, Checkpoints.save

        def writing(self, step, metrics):
            if step == before_write:
                raise Interruption
            write(self, step, metrics)

        def saving(self, state, value=None):
            if int(state.step) == before_save:
                raise Interruption
            save(self, state, value)

        patch.setattr(MetricWriter, "write", writing)
        patch.setattr(Checkpoints, "save", saving)
        with pytest.raises(Interruption):
            shortly(config, workdir)


@pytest.mark.parametrize(
    ("config", "cut"),
    [
        (sail(), {"before_write": 10}),
        (tiny(), {"before_save": 30}),
        (from_teacher(objective="sail", steps=37, select="best"), {"before_save": 20}),
        (sail(data__resident="never"), {"before_write": 30}),
        (sail(checkpoint_every=20), {"before_write": 40}),
        # Neighbours are searched again.
        pytest.param(tiny(objective="nnclr"), {"before_save": 30}, marks=pytest.mark.slow),
    ],
    ids=[
        "before any checkpoint",
        "unsaved steps",
        "best",
        "streamed",
        "rare checkpoints",
        "neighbours",
    ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(config, cut, tmp_path, monkeypatch):
    shortly(config, tmp_path / "through")
    interrupt_once(monkeypatch, config, tmp_path / "cut", **cut)
    assert not (tmp_path / "cut" / "results.json").exists()
    shortly(config, tmp_path / "cut")
    assert_same_outcome(tmp_path / "cut", tmp_path / "through")
    steps = [line["step"] for line in records(tmp_path / "cut")]
    assert steps == sorted(set(steps)) and steps[-1] == config.steps
    starts = (tmp_path / "cut" / "provenance.jsonl").read_text().splitlines()
    assert len(starts) == 2


@pytest.mark.parametrize("resident", ["always", "never"])
def test_a_kill_after_the_last_step_leaves_only_the_results_to_write(
    resident, tmp_path, monkeypatch
):
    config = sail(data__resident=resident)
    shortly(config, tmp_path / "run")
    before = tensors(tmp_path / "run"), results(tmp_path / "run"), records(tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    monkeypatch.setattr(loop, "run_resident", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(loop, "run_streamed", lambda *a: pytest.fail("trained again"))
    shortly(config, tmp_path / "run")
    after = tensors(tmp_path / "run"), results(tmp_path / "run"), records(tmp_path / "run")
    np.testing.assert_equal(after, before)


def test_metrics_writer_drops_what_will_be_done_again_and_what_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "a": 1}\n{"step": 20, "a": 2}\n{"step": 30, "a')
    writer = MetricWriter(path, 10)
    writer.write(20, {"a": 5.0})
    writer.close()
    assert path.read_text() == '{"step": 10, "a": 1}\n{"step": 20, "a": 5.0}\n'
    path.write_text('{"step": 10, "a": 1}')  # whole, but for its end of line
    writer = MetricWriter(path, 10)
    writer.write(20, {})
    writer.close()
    assert path.read_text() == '{"step": 10, "a": 1}\n{"step": 20}\n'


# ---- the best checkpoint


def planted(monkeypatch, scores):
    """Validation that returns these scores, one a checkpoint, and the real ones afterwards."""
    real, left = record.evaluate, list(scores)

    def evaluate(aligner, pairs):
        found = real(aligner, pairs)
        return found | {"mean_recall@1": left.pop(0)} if left else found

    monkeypatch.setattr(record, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("scores", "best"),
    [((0.1, 0.5, 0.2, 0.3), 20), ((0.1, 0.2, 0.3, 0.4), 40), ((0.1, 0.5, 0.5, 0.2), 30)],
    ids=["early", "last", "the later of equals"],
)
def test_select_best_restores_the_best_checkpoint(scores, best, tmp_path, monkeypatch):
    planted(monkeypatch, scores)
    shortly(sail(select="best"), tmp_path / "run")
    assert results(tmp_path / "run")["selected_step"] == best
    kept = {int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {best, 40}
    # A run that pauses at `best` has these parameters: interrupt the same one there.
    saved = {}
    save = Checkpoints.save

    def keeping(self, state, value=None):
        saved[int(state.step)] = np.asarray(state.params["text"]["linear"]["kernel"][...])
        save(self, state, value)

    monkeypatch.setattr(Checkpoints, "save", keeping)
    planted(monkeypatch, scores)
    shortly(sail(select="best"), tmp_path / "again")
    np.testing.assert_array_equal(tensors(tmp_path / "run")["text.linear.kernel"], saved[best])


def test_best_survives_a_restart_and_a_half_deleted_checkpoint(tmp_path, monkeypatch):
    config = sail(select="best")
    planted(monkeypatch, (0.5, 0.1, 0.3, 0.2))
    interrupt_once(monkeypatch, config, tmp_path / "run", before_write=30)
    # A kill while the checkpoint of step 20 was being removed would leave this.
    stale = tmp_path / "run" / "checkpoints" / "15"
    (stale / "state").mkdir(parents=True)
    planted(monkeypatch, (0.3, 0.2))
    shortly(config, tmp_path / "run")
    assert results(tmp_path / "run")["selected_step"] == 10


# ---- trouble


def test_a_loss_that_is_not_finite_stops_the_run(finished, tmp_path, monkeypatch):
    config = tiny()
    run = loop.run_resident

    def poisoned(setup, length, state, *rest):
        state, metrics = run(setup, length, state, *rest)
        if int(state.step) == 30:
            metrics["train/loss"] = metrics["train/loss"].at[4].set(np.nan)
        return state, metrics

    monkeypatch.setattr(loop, "run_resident", poisoned)
    with pytest.raises(FloatingPointError, match="train/loss is nan at step 25") as caught:
        shortly(config, tmp_path / "run")
    assert "learning_rate" in str(caught.value)
    assert [line["step"] for line in records(tmp_path / "run")] == [10, 20]
    assert not (tmp_path / "run" / "results.json").exists()
    # The last good checkpoint goes on as if nothing had been.
    monkeypatch.undo()
    shortly(config, tmp_path / "run")
    assert_same_outcome(tmp_path / "run", finished[0])


def test_a_rate_that_blows_up_is_named(tmp_path):
    config = sail(optimizer__learning_rate=1e30)
    with pytest.raises(FloatingPointError, match=r"at step \d+;.*optimizer.learning_rate"):
        shortly(config, tmp_path / "run")


# ---- where the rows lie


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_rows_are_resident_where_what_one_device_holds_fits(devices):
    """By hand: raw and prepared rows, and the teacher's eight columns of the unpaired ones."""
    config = validate(tiny(data__n_unpaired=250, mesh__devices=devices))
    splits, teacher = loop.load_inputs(config)
    setup, _, _ = build.build(config, splits, teacher)
    tables = build.raw_tables(splits, setup.loss.reads)
    pairs, unpaired = {1: (64, 250), 3: (22, 84), 8: (8, 32)}[devices]
    needed = 4 * (pairs * 2 * (256 + 192) + unpaired * (2 * (256 + 192) + 2 * 8)) / 2**30
    for gib, expected in ((needed, True), (needed * 0.999, False)):
        config.data.resident_gib = gib
        assert build.fits(config, tables, teacher, setup.mesh) is expected
    config.data.resident = "always"
    assert build.fits(config, tables, teacher, setup.mesh)


# ---- sinks


def test_tensorboard_gets_event_files(tmp_path):
    shortly(sail(metrics__tensorboard=True), tmp_path / "run")
    (events,) = (tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes() and b"val/mean_recall_1" in events.read_bytes()


class FakeWandBRun:
    """Records what it is called with."""

    def __init__(self, options):
        self.options = options
        self.logged, self.finished = [], 0

    def log(self, metrics, step):
        assert not self.finished, "a run that is finished takes no more records"
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


class FakeWandB(types.ModuleType):
    """Hands out runs as W&B does: the one that is open, unless told to make another."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = []

    def init(self, *, reinit="default", **options):
        opened = [run for run in self.runs if not run.finished]
        if opened and reinit != "create_new":
            return opened[-1]
        self.runs.append(FakeWandBRun(options))
        return self.runs[-1]

    @property
    def starts(self):
        return [run.options for run in self.runs]

    @property
    def logged(self):
        return [record for run in self.runs for record in run.logged]


def test_wandb_gets_every_record_and_one_id_a_workdir(tmp_path, monkeypatch):
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = sail(metrics__wandb="my-project")
    interrupt_once(monkeypatch, config, tmp_path / "a" / "run", before_save=20)
    shortly(config, tmp_path / "a" / "run")
    assert [step for step, _ in wandb.logged] == [10, 20, 20, 30, 40]
    assert wandb.logged[1][1]["train/loss"] == wandb.logged[2][1]["train/loss"]
    assert [run.finished for run in wandb.runs] == [1, 1]
    first, second = wandb.starts
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert first["project"] == "my-project" and first["config"]["steps"] == 40
    # Another run of the same folder name is another run.
    shortly(config, tmp_path / "b" / "run")
    assert wandb.starts[2]["id"] != first["id"]


@pytest.mark.slow
def test_runs_that_are_trained_together_are_runs_of_their_own_in_wandb(tmp_path, monkeypatch):
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    configs = [sail(metrics__wandb="my-project", seed=seed) for seed in (0, 1)]
    paths = [tmp_path / "a", tmp_path / "b"]
    outcomes = training.train_many(configs, paths, quiet=True, inputs=[shared_inputs()] * 2)
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes)
    assert [run.options["name"] for run in wandb.runs] == ["a", "b"]
    assert [run.finished for run in wandb.runs] == [1, 1]
    for run, path in zip(wandb.runs, paths, strict=True):
        assert run.options["id"] == (path / "wandb_id").read_text()
        assert [step for step, _ in run.logged] == [10, 20, 30, 40]
        kept = [record["train/loss"] for record in records(path)]
        assert [metrics["train/loss"] for _, metrics in run.logged] == kept


@pytest.mark.parametrize(
    ("package", "field", "value"),
    [("tensorboardX", "tensorboard", True), ("wandb", "wandb", "project")],
)
def test_a_missing_sink_names_its_extra(package, field, value, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"config.metrics.{field}.*sotalign-jax\[{field}\]"):
        shortly(tiny(**{f"metrics__{field}": value}), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# ---- the directory


def test_a_workdir_of_another_configuration_is_left_alone(finished):
    workdir, _ = finished
    before = (workdir / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"workdir: .* another configuration .*loss.alpha: 0.01"):
        shortly(tiny(loss__alpha=0.5, seed=3), workdir)
    assert (workdir / "config.json").read_bytes() == before


def test_a_file_or_a_foreign_directory_is_no_workdir(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"workdir: .*is a file"):
        shortly(tiny(), tmp_path / "file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match=r"workdir: .*not empty and holds no run"):
        shortly(tiny(), tmp_path / "mine")
    assert (tmp_path / "file").read_text() == (tmp_path / "mine" / "thesis.tex").read_text()


def test_a_start_that_fails_on_its_input_leaves_the_workdir_to_a_corrected_one(tmp_path):
    with pytest.raises(ValueError, match="width_factor"):
        shortly(sail(model__width_factor=2), tmp_path / "run")
    shortly(sail(), tmp_path / "run")


def test_a_kill_while_the_configuration_was_written_is_no_obstacle(tmp_path):
    (tmp_path / ".config.json.123").write_text('{"seed":')
    assert shortly(sail(), tmp_path)["selected_step"] == 40


@pytest.mark.parametrize("field", ["select", "objective"])
def test_rows_that_are_missing_stop_the_run_before_it_starts(field, tmp_path):
    config, message = {
        "select": (tiny(select="best", data__platonic__n_val=0), "config.select: .*validation"),
        "objective": (
            tiny(data__name="emoji", data__n_pairs=800, data__n_unpaired=0),
            "config.objective: .*unpaired",
        ),
    }[field]
    with pytest.raises(ConfigError, match=message):
        quietly(config, tmp_path / "run")
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]
