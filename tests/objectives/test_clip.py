"""InfoNCE as an objective, against a float64 reading of it."""

import jax
import numpy as np
import pytest
import reference
from step_runs import Run, check_value_and_gradient, embedded, named, small

from sotalign_jax.config import ConfigError, validate
from sotalign_jax.objectives import OBJECTIVES


def info_nce(image, text, scale):
    logits = scale * reference.cosines(image, text)
    both = reference.logsumexp(logits, 0) + reference.logsumexp(logits, 1)
    return np.mean(both / 2 - np.diagonal(logits))


def clip_run(**fields):
    return Run(small(objective="clip", **fields))


@pytest.mark.parametrize("memory", ["dense", pytest.param("streamed", marks=pytest.mark.slow)])
def test_learned_scale(memory):
    run = clip_run(loss__memory=memory)
    before, gradient, state, metrics = check_value_and_gradient(
        run,
        lambda params: info_nce(*embedded(run, params, "pairs"), np.exp(params["log_scale"])),
    )
    assert gradient["log_scale"] != 0 and gradient["bias"] == 0
    np.testing.assert_array_equal(metrics["train/info_nce"], metrics["train/loss"])
    # Away from its bound the scale is what the optimiser makes of it: a quarter of the peak rate.
    moved = before["log_scale"] - 1e-3 / 4 * (
        np.sign(gradient["log_scale"]) + 1e-5 * before["log_scale"]
    )
    np.testing.assert_allclose(named(state.params)["log_scale"], moved, rtol=1e-6)


def test_fixed_temperature():
    run = clip_run(clip__temperature=0.2)
    _, gradient, state, metrics = check_value_and_gradient(
        run, lambda params: info_nce(*embedded(run, params, "pairs"), 5.0)
    )
    assert gradient["log_scale"] == 0
    # The aligner that is saved has the scale that it was trained at.
    np.testing.assert_allclose(metrics["train/scale"], [5.0], rtol=1e-6)
    np.testing.assert_allclose(named(state.params)["log_scale"], np.log(5.0), rtol=1e-6)


def test_a_learned_scale_comes_back_to_its_bound_and_can_leave_it():
    # Pairs that are all alike: the lower the scale, the lower the loss.
    down = clip_run(model__scale=120.0, data__platonic__noise=20.0)
    _, metrics = down.resident(*[1] * 3)
    np.testing.assert_allclose(metrics["train/scale"][0], 100.0, rtol=1e-5)
    assert np.all(np.diff(metrics["train/scale"]) < -1e-3)
    # Until the bound is reached it rises, and stays there.
    up = clip_run(model__scale=0.3, clip__max_scale=0.30005, optimizer__learning_rate=1e-2)
    _, metrics = up.resident(*[1] * 3)
    np.testing.assert_allclose(metrics["train/scale"], 0.30005, rtol=1e-5)


def test_options_are_numbers_of_one_program():
    setups = [
        clip_run(clip__temperature=temperature, clip__max_scale=most).setup
        for temperature, most in ((0.0, 100.0), (0.1, 50.0))
    ]
    assert len({jax.tree.structure(setup) for setup in setups}) == 1


def test_no_probability_no_prior():
    run = clip_run()
    assert OBJECTIVES["clip"].prior(run.setup.loss, 24, 0, 0) is None
    assert not run.setup.loss.reads.unpaired


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.1, r"must be finite and not negative \(0: learned\), got -0.1"),
        ("temperature", float("nan"), r"must be finite and not negative"),
        ("max_scale", 0.0, r"must be positive and finite, got 0.0"),
        ("max_scale", float("inf"), r"must be positive and finite, got inf"),
    ],
)
def test_bad_options_are_named(field, value, message):
    with pytest.raises(ConfigError, match=rf"^config.clip.{field}: {message}"):
        validate(small(**{f"clip__{field}": value}))
