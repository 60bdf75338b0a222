"""Runs that are trained together end as they would have alone."""

import json
import os
import signal

import jax
import numpy as np
import pytest
from tiny_runs import assert_same_parameters, from_teacher, records, results, tiny

from sotalign_jax.config import validate
from sotalign_jax.training import many, together_key, train, train_many
from sotalign_jax.training.build import InputCache
from sotalign_jax.training.checkpoints import Checkpoints
from sotalign_jax.training.distributed import Preempted, PreemptionWatch
from sotalign_jax.training.neighbours import NeighbourCache

# AdamW: Lion moves by the sign of a gradient, which blows small differences up.
COMMON = {
    "optimizer__name": "adamw",
    "loss__iterations": 20,
    "steps": 12,
    "log_every": 4,
    "eval_every": 4,
    "checkpoint_every": 4,
    "select": "best",
    "data__n_pairs": 32,
    "data__n_unpaired": 100,
    "batch__pairs": 24,
    "batch__unpaired": 40,
    "mesh__devices": 1,
}


def config(**fields):
    return validate(tiny(**(COMMON | fields)))


@pytest.fixture(autouse=True)
def one_device(monkeypatch, request):
    if "devices" not in request.fixturenames:
        monkeypatch.setattr(many.jax, "local_device_count", lambda: 1)


def run(configs, folder, **options):
    paths = [folder / f"run_{i}" for i in range(len(configs))]
    return train_many(configs, paths, quiet=True, **options), paths


def counted(monkeypatch):
    """How many runs each compiled dispatch advanced."""
    sizes = []
    real = many._train_group
    monkeypatch.setattr(
        many, "_train_group", lambda runs, *rest: (sizes.append(len(runs)), real(runs, *rest))
    )
    return sizes


def assert_like_alone(configs, paths, folder):
    for i, (one, path) in enumerate(zip(configs, paths, strict=True)):
        train(one, folder / f"alone_{i}", quiet=True)
        assert_same_parameters(path, folder / f"alone_{i}")
        assert json.loads((path / "config.json").read_text()) == json.loads(one.to_json())
        ours, theirs = results(path), results(folder / f"alone_{i}")
        assert ours["selected_step"] == theirs["selected_step"]
        for split in ("val", "test", "teacher_val", "teacher_test"):
            assert ours[split].keys() == theirs[split].keys()
            for name, value in theirs[split].items():
                assert abs(ours[split][name] - value) < 0.03, (split, name)
        for a, b in zip(records(path), records(folder / f"alone_{i}"), strict=True):
            assert a.keys() == b.keys()
            for name in ("train/loss", "train/klot", "train/gradient_norm", "train/learning_rate"):
                np.testing.assert_allclose(a[name], b[name], rtol=2e-4, atol=1e-6, err_msg=name)


def test_seeds(tmp_path, monkeypatch):
    """Other pairs, other weights, another order of batches: all rows differ."""
    sizes = counted(monkeypatch)
    configs = [config(seed=seed) for seed in (0, 5)]
    _, paths = run(configs, tmp_path)
    assert sizes == [2]
    assert_like_alone(configs, paths, tmp_path)
    for path in paths:
        (start,) = [json.loads(s) for s in (path / "provenance.jsonl").read_text().splitlines()]
        assert start["together"] == 2


def test_numbers_of_the_loss_and_the_optimiser_on_the_same_batches(tmp_path, monkeypatch):
    sizes = counted(monkeypatch)
    configs = [
        config(),
        config(loss__alpha=1.0),
        config(optimizer__learning_rate=3e-3, optimizer__weight_decay=0.1),
        config(loss__epsilon=0.1, loss__teacher_epsilon=0.05, model__scale=10.0, model__bias=-5.0),
    ]
    cache = InputCache()
    _, paths = run(configs, tmp_path, inputs=[cache.get(c) for c in configs])
    assert sizes == [4]
    assert_like_alone(configs, paths, tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "sail"},
        pytest.param({"objective": "sail_semi"}, marks=pytest.mark.slow),
        pytest.param({"objective": "sclip"}, marks=pytest.mark.slow),
        pytest.param({"objective": "nnclr"}, marks=pytest.mark.slow),
        pytest.param({"loss__divergence": "cka"}, marks=pytest.mark.slow),
        pytest.param({"loss__divergence": "info_nce"}, marks=pytest.mark.slow),
        pytest.param({"loss__memory": "streamed"}, marks=pytest.mark.slow),
        pytest.param({"objective": "structure", "fusemix__alpha": 1.0}, marks=pytest.mark.slow),
        # A solve stops when its own error is small, whatever the others do.
        pytest.param({"loss__iterations": 0, "loss__threshold": 1e-4}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_other_losses(fields, tmp_path):
    configs = [config(seed=seed, **fields) for seed in (0, 1)]
    _, paths = run(configs, tmp_path)
    for i, one in enumerate(configs):
        train(one, tmp_path / f"alone_{i}", quiet=True)
        assert_same_parameters(paths[i], tmp_path / f"alone_{i}")


@pytest.mark.parametrize(
    ("fields", "other"),
    [
        pytest.param(
            {"objective": "structure"}, {"structure__weight": 300.0}, marks=pytest.mark.slow
        ),
        ({"objective": "clip"}, {"clip__temperature": 0.3, "clip__max_scale": 5.0}),
        pytest.param(
            {"objective": "nnclr"},
            {"nnclr__base_weight": 0.3, "nnclr__image_weight": 2.0, "nnclr__text_weight": 3.0},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"objective": "sclip", "sclip__label_scale": 1.0, "sclip__max_scale": 50.0},
            {
                "sclip__label_scale": 3.0,
                "sclip__image_weight": 4.0,
                "sclip__text_weight": 5.0,
                "sclip__max_scale": 2.0,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"objective": "sail", "fusemix__alpha": 0.5},
            {"fusemix__alpha": 4.0},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["structure", "clip", "nnclr", "sclip", "fusemix"],
)
def test_options_of_an_objective_differ_within_a_program(fields, other, tmp_path, monkeypatch):
    """Each run has its own, and they do change what comes of it."""
    sizes = counted(monkeypatch)
    short = {"steps": 4, "eval_every": 0, "checkpoint_every": 0, "select": "last"}
    configs = [config(**short, **fields), config(**short, **(fields | other))]
    _, paths = run(configs, tmp_path)
    assert sizes == [2]
    for i, one in enumerate(configs):
        train(one, tmp_path / f"alone_{i}", quiet=True)
        assert_same_parameters(paths[i], tmp_path / f"alone_{i}")
    first, last = (records(path)[-1]["train/parameter_norm"] for path in paths)
    assert first != last


@pytest.mark.slow
def test_teachers_of_one_shape_from_their_start(tmp_path, monkeypatch):
    sizes = counted(monkeypatch)
    names = ("cca", "procrustes")
    configs = [
        validate(from_teacher(**(COMMON | {"teacher__name": name, "steps": 4}))) for name in names
    ]
    _, paths = run(configs, tmp_path)
    assert sizes == [2]
    for i, one in enumerate(configs):
        train(one, tmp_path / f"alone_{i}", quiet=True)
        assert_same_parameters(paths[i], tmp_path / f"alone_{i}")
        assert results(paths[i])["teacher_test"] == results(tmp_path / f"alone_{i}")["teacher_test"]


@pytest.mark.slow
def test_runs_that_need_other_programs_stand_apart(tmp_path, monkeypatch):
    sizes = counted(monkeypatch)
    configs = [
        config(steps=4),
        config(steps=4, seed=1),
        config(steps=4, model__dim=8),
        config(steps=4, data__n_pairs=30),
        config(steps=4, data__resident="never"),
        config(steps=4, data__resident="never", seed=1),
    ]
    found, _ = run(configs, tmp_path)
    assert sorted(sizes) == [1, 1, 1, 1, 2]
    assert [one["pairs"] for one in found] == [32, 32, 32, 30, 32, 32]


def test_no_more_rows_at_once_than_fit(tmp_path, monkeypatch):
    sizes = counted(monkeypatch)
    configs = [config(steps=4, objective="sail", seed=seed) for seed in range(3)]
    home = many.Workdir(tmp_path / "one", configs[0])
    a_run = many._Run(0, configs[0], home, InputCache().get(configs[0]), None, NeighbourCache())
    for one in configs:
        one.data.resident_gib = 2.5 * a_run.bytes / 2**30
    run(configs, tmp_path)
    assert sorted(sizes) == [1, 2]


def test_runs_on_the_same_rows_are_no_more_rows(tmp_path, monkeypatch):
    """Three rates on one draw stand on its rows; those of two draws would stand once a run."""
    sizes = counted(monkeypatch)
    cache = InputCache()
    configs = [
        config(steps=4, objective="sail", seed=seed, optimizer__learning_rate=rate)
        for seed in (0, 1)
        for rate in (1e-3, 2e-3, 3e-3)
    ]
    inputs = [cache.get(one) for one in configs]
    home = many.Workdir(tmp_path / "one", configs[0])
    a_run = many._Run(0, configs[0], home, inputs[0], None, NeighbourCache())
    for one in configs:
        one.data.resident_gib = 4.5 * a_run.bytes / 2**30
    run(configs, tmp_path, inputs=inputs)
    assert sizes == [3, 3]


def test_keys():
    base = together_key(config())
    for fields in (
        {"seed": 3},
        {"loss__alpha": 2.0},
        {"loss__teacher_epsilon": 0.3},
        {"optimizer__learning_rate": 1.0},
        {"teacher__ridge": 3.0},
        {"sclip__image_weight": 10.0, "nnclr__base_weight": 0.1},
        {"mesh__devices": 0},
    ):
        assert together_key(config(**fields)) == base, fields
    for fields in (
        {"steps": 8},
        {"loss__alpha": 0.0},
        {"objective": "sail"},
        {"model__dim": 3},
        {"loss__divergence": "cka"},
        {"data__n_pairs": 5},
        {"sclip__label_scale": 8.0},
        {"nnclr__text_weight": 0.0},
        {"nnclr__k": 3},
    ):
        assert together_key(config(**fields)) != base, fields


# ---- interruptions


def stopped_at(step):
    """A watch that is told to stop after a step."""

    class Watch(PreemptionWatch):
        def agreed(self, now):
            return now == step or super().agreed(now)

    return Watch()


def test_a_group_that_was_stopped_goes_on_together_or_alone(tmp_path, monkeypatch):
    configs = [config(seed=seed) for seed in (0, 1, 5)]
    with stopped_at(4) as watch, pytest.raises(Preempted):
        run(configs, tmp_path, watch=watch)
    for i in range(3):
        assert not (tmp_path / f"run_{i}" / "results.json").exists()
        assert records(tmp_path / f"run_{i}")[-1]["step"] == 4
    train(configs[0], tmp_path / "run_0", quiet=True)  # one goes on alone,
    with stopped_at(8) as watch, pytest.raises(Preempted):
        train(configs[1], tmp_path / "run_1", quiet=True, watch=watch)  # another part of the way
    sizes = counted(monkeypatch)
    _, paths = run(configs, tmp_path)
    assert sizes == [1, 1]
    assert_like_alone(configs, paths, tmp_path)


def test_sigterm_saves_all(tmp_path, monkeypatch):
    configs = [config(objective="sail", seed=seed) for seed in (0, 1)]
    real = many._run_together
    monkeypatch.setattr(
        many, "_run_together", lambda *a: (os.kill(os.getpid(), signal.SIGTERM), real(*a))[1]
    )
    with pytest.raises(Preempted, match="goes on from step 4"):
        run(configs, tmp_path)
    for i in (0, 1):
        checkpoints = Checkpoints(tmp_path / f"run_{i}" / "checkpoints", keep_best=True)
        assert checkpoints.latest == 4
        checkpoints.close()


@pytest.mark.slow
def test_a_group_whose_turn_had_not_come_goes_on_as_well(tmp_path):
    """Directories of later groups hold nothing until their runs are started."""
    configs = [config(objective="sail", seed=s, model__dim=d) for d in (16, 8) for s in (0, 1)]
    with stopped_at(4) as watch, pytest.raises(Preempted):
        run(configs, tmp_path, watch=watch)
    assert [file.name for file in (tmp_path / "run_3").iterdir()] == [".lock"]
    found, _ = run(configs, tmp_path)
    assert all(one["selected_step"] for one in found)


def test_a_run_that_cannot_be_built_leaves_the_others_as_they_were(tmp_path):
    configs = [config(objective="sail", steps=4), config(objective="sail", steps=4, select="last")]
    bad = config(data__n_unpaired=3, objective="nnclr", nnclr__k=5)
    with pytest.raises(ValueError, match="k"):
        run([*configs, bad], tmp_path)
    found, _ = run(configs, tmp_path)
    assert len(found) == 2


def test_finished_runs_are_read_again(tmp_path, monkeypatch):
    configs = [config(objective="sail", seed=seed, steps=4) for seed in (0, 1)]
    found, _ = run(configs, tmp_path)
    monkeypatch.setattr(many, "_train_group", lambda *a: pytest.fail("trained again"))
    told = {}
    assert run(configs, tmp_path, on_done=told.__setitem__)[0] == found
    assert told == dict(enumerate(found))


def test_no_steps(tmp_path):
    configs = [validate(from_teacher(**(COMMON | {"steps": 0, "seed": s}))) for s in (0, 1)]
    found, _ = run(configs, tmp_path)
    for one in found:
        assert one["selected_step"] == 0
        assert one["test"] == pytest.approx(one["teacher_test"], abs=0.03)


# ---- a run that fails leaves the others alone


def test_a_loss_that_is_not_finite_is_told_of_its_run_only(tmp_path, monkeypatch):
    real = many._run_together

    def poisoned(*arguments):
        state, metrics = real(*arguments)
        if int(state.step) == 8:
            metrics["train/loss"] = metrics["train/loss"].at[1, 2].set(np.nan)
        return state, metrics

    monkeypatch.setattr(many, "_run_together", poisoned)
    configs = [config(objective="sail", seed=seed) for seed in (0, 1, 2)]
    found, paths = run(configs, tmp_path)
    assert isinstance(found[1], FloatingPointError)
    assert "train/loss is nan at step 7" in str(found[1])
    assert not (paths[1] / "results.json").exists()
    assert found[0]["selected_step"] and found[2]["selected_step"]
    monkeypatch.setattr(many, "_run_together", real)
    run(configs, tmp_path)
    for i in (0, 1, 2):
        train(configs[i], tmp_path / f"alone_{i}", quiet=True)
        assert_same_parameters(paths[i], tmp_path / f"alone_{i}")


def test_arguments_that_do_not_fit(tmp_path):
    configs = [config(), config(seed=1)]
    with pytest.raises(ValueError, match="configs, workdirs, inputs: one of each a run, got 2, 1"):
        train_many(configs, [tmp_path / "a"])
    with pytest.raises(ValueError, match="workdirs: two runs have the same directory"):
        train_many(configs, [tmp_path / "a", tmp_path / "b" / ".." / "a"])


# ---- several devices


@pytest.fixture
def devices():
    assert jax.local_device_count() == 8


def test_runs_are_spread_over_devices(tmp_path, devices):
    configs = [config(seed=seed, mesh__devices=0) for seed in range(3)]
    _, paths = run(configs, tmp_path)
    for i, one in enumerate(configs):
        assert json.loads((paths[i] / "config.json").read_text())["mesh"] == {"devices": 0}
        one.mesh.devices = 1
        train(one, tmp_path / f"alone_{i}", quiet=True)
        assert_same_parameters(paths[i], tmp_path / f"alone_{i}")


@pytest.mark.slow
def test_more_runs_than_devices(tmp_path, devices, monkeypatch):
    monkeypatch.setattr(many.jax, "local_device_count", lambda: 2)
    configs = [config(objective="sail", seed=seed) for seed in range(5)]
    _, paths = run(configs, tmp_path)
    for i, one in enumerate(configs):
        train(one, tmp_path / f"alone_{i}", quiet=True)
        assert_same_parameters(paths[i], tmp_path / f"alone_{i}")
