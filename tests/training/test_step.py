"""A step against a float64 reading of it, and what dispatches of steps have in common."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from step_runs import (
    SIDES,
    Run,
    assert_close_states,
    check_value_and_gradient,
    embedded,
    named,
    prepared_rows,
    small,
)
from tiny_runs import from_teacher, tiny

from sotalign_jax.features.batches import Batch, batch_rows, first_order
from sotalign_jax.objectives.divergences import klot as klot_module
from sotalign_jax.training import step as step_module
from sotalign_jax.training.step import OptimizerSettings, run_resident, run_streamed

# Both sides standardised, and the teacher refitted on the unpaired rows.
EXTENSIONS = {
    "teacher__standardize__image": 0.5,
    "teacher__standardize__text": 1.0,
    "teacher__refit__weight": 0.3,
    "teacher__refit__epsilon": 0.1,
}


# ---- the same losses in float64 NumPy


def siglip(params, image, text, normalization):
    logits = np.exp(params["log_scale"]) * reference.cosines(image, text) + params["bias"]
    target = -np.ones_like(logits)
    np.fill_diagonal(target, 1)
    total = np.sum(np.log1p(np.exp(-target * logits)))
    return total / (logits.size if normalization == "mean" else min(logits.shape))


def projected(run):
    """The teacher's view of the unpaired rows."""
    return [
        prepared_rows(run, "unpaired", side)
        @ np.asarray(getattr(run.teacher, f"{side}_weight"), np.float64)
        for side in SIDES
    ]


def numpy_loss(run, params):
    loss = run.config.loss
    image, text = embedded(run, params, "pairs")
    if run.config.objective == "sail":
        return siglip(params, image, text, loss.normalization)
    more_image, more_text = embedded(run, params, "unpaired")
    if run.config.objective == "sail_semi":
        return 0.5 * (
            siglip(params, image, np.r_[text, more_text], loss.normalization)
            + siglip(params, np.r_[image, more_image], text, loss.normalization)
        )
    value, _ = reference.klot(
        reference.cosines(more_image, more_text), reference.cosines(*projected(run)), loss.epsilon
    )
    return siglip(params, image, text, loss.normalization) + loss.alpha * value


@pytest.mark.parametrize(
    "config",
    [
        small(objective="sail"),
        small(objective="sail", loss__normalization="rows"),
        small(objective="sail_semi"),
        small(objective="sail_semi", loss__normalization="rows", data__n_unpaired=32),
        small(objective="sotalign", loss__alpha=0.3),
        small(objective="sotalign", loss__alpha=0.3, **EXTENSIONS),
    ],
    ids=["sail", "sail rows", "sail_semi", "sail_semi rows", "sotalign", "extensions"],
)
def test_first_step_is_what_float64_numpy_says(config):
    run = Run(config)
    before, gradient, state, metrics = check_value_and_gradient(
        run, lambda params: numpy_loss(run, params)
    )
    after = named(state.params)

    # The update: sign of the gradient and decoupled decay, at a quarter of the peak (4 warm-up
    # steps of 40), on every parameter.
    rate = 1e-3 / 4
    np.testing.assert_allclose(metrics["train/learning_rate"], [rate], rtol=1e-6)
    for name, value in before.items():
        expected = value - rate * (np.sign(gradient[name]) + 1e-5 * value)
        np.testing.assert_allclose(after[name], expected, rtol=1e-6, atol=1e-7, err_msg=name)
    np.testing.assert_allclose(metrics["train/scale"], [np.exp(after["log_scale"])], rtol=1e-6)
    np.testing.assert_allclose(metrics["train/bias"], [after["bias"]], rtol=1e-6)
    assert int(state.step) == 1


@pytest.mark.parametrize("most", [pytest.param(64, marks=pytest.mark.slow), 10])
def test_sharpness_is_that_of_the_first_rows_of_the_converged_plans(most, monkeypatch):
    monkeypatch.setattr(klot_module, "_LOOKED_AT", most)
    # Another width for each, since a compiled program knows no more of the number.
    run = Run(small(objective="sotalign", loss__alpha=0.3, model__dim=most // 2))
    _, metrics = run.resident(1)
    views = {"student": embedded(run, named(run.first.params), "unpaired")}
    views["teacher"] = projected(run)
    for name, epsilon in (("student", 0.05), ("teacher", 0.01)):
        plan = reference.sinkhorn(reference.cosines(*views[name]), epsilon)[:most]
        share = plan / plan.sum(axis=1, keepdims=True)
        share = np.where(share > 0, share, 1.0)
        truth = np.exp(-(share * np.log(share)).sum(axis=1).mean())
        np.testing.assert_allclose(metrics[f"train/{name}_perplexity"], [truth], rtol=2e-3)
        assert 1 < truth < 32


def test_second_step_uses_the_momentum_of_the_first():
    run = Run(small(objective="sail", optimizer__b1=0.6, optimizer__weight_decay=0.1))
    one, _ = run.resident(1)
    two, _ = run.resident(2)
    momentum = named(one.opt_state[0].mu)
    gradient = {  # mu2 = 0.99 mu1 + 0.01 gradient
        name: (mu - 0.99 * momentum[name]) / 0.01 for name, mu in named(two.opt_state[0].mu).items()
    }
    before, after = named(one.params), named(two.params)
    for name, value in before.items():
        mixed = 0.6 * momentum[name] + 0.4 * gradient[name]
        expected = value - 2 / 4 * 1e-3 * (np.sign(mixed) + 0.1 * value)
        # Where the mixture is all but zero, float32 may not know its sign.
        known = np.abs(mixed) > 1e-4 * np.abs(mixed).max()
        assert known.mean() > 0.98
        np.testing.assert_allclose(after[name][known], expected[known], rtol=1e-5, atol=1e-7)


def test_adamw_takes_steps_of_the_rate_against_the_gradient():
    run = Run(small(objective="sail", optimizer__name="adamw", optimizer__weight_decay=0.0))
    state, _ = run.resident(1)
    before, after = named(run.first.params), named(state.params)
    for name, mu in named(state.opt_state[0].mu).items():
        gradient = mu / (1 - 0.9)
        expected = before[name] - 1e-3 / 4 * gradient / (np.abs(gradient) + 1e-8)
        np.testing.assert_allclose(after[name], expected, rtol=1e-4, atol=2e-7, err_msg=name)


def test_schedule_rises_in_a_line_and_falls_to_zero_in_a_cosine():
    settings = OptimizerSettings("lion", 0.5, 0.0, 0.9, 0.99, warmup=0.2, steps=20)
    rates = [float(settings.schedule()(step)) for step in range(21)]
    rise = [0.5 * (step + 1) / 4 for step in range(4)]
    fall = [0.25 * (1 + np.cos(np.pi * k / 16)) for k in range(17)]
    np.testing.assert_allclose(rates, rise + fall, atol=1e-7)
    bare = dataclasses.replace(settings, warmup=0.0)
    expected = [0.25 * (1 + np.cos(np.pi * k / 20)) for k in range(21)]
    np.testing.assert_allclose([float(bare.schedule()(k)) for k in range(21)], expected, atol=1e-7)


def test_one_step_in_all_warms_up_and_ends():
    for warmup in (0.0, 0.9):
        settings = OptimizerSettings("lion", 0.5, 0.0, 0.9, 0.99, warmup=warmup, steps=1)
        assert float(settings.schedule()(0)) == 0.5


# ---- where Sinkhorn starts


def affinities(run, params):
    """Float64 cosines of all unpaired images and texts: the student's, and the teacher's."""
    given = [
        prepared_rows(run, "unpaired", side)
        @ np.asarray(getattr(run.teacher, f"{side}_weight"), np.float64)
        for side in SIDES
    ]
    mine = embedded(run, params, "unpaired")
    return reference.cosines(*mine), reference.cosines(*given)


def drawn(run, step):
    """Rows of the unpaired images and texts in the batch of a step."""
    return [
        np.asarray(batch_rows(stream, first_order(stream, run.key, step), step))
        for stream in run.setup.streams[1:]
    ]


def centred(values):
    return values - values.mean()


def standing_still(**fields):
    """Batches drawn from larger tables, and steps too small to change an affinity."""
    # At the teacher's usual epsilon a plan of so few rows is all but a permutation, and its
    # potentials are all but open.
    fields = {
        "data__n_unpaired": 100,
        "batch__unpaired": 32,
        "loss__teacher_epsilon": 0.05,
    } | fields
    return Run(tiny(optimizer__learning_rate=1e-12, **fields))


def test_potentials_that_are_kept_are_those_of_the_converged_plans():
    run = standing_still(loss__threshold=1e-6, loss__max_iterations=5_000)
    state, _ = run.resident(1)
    images, texts = drawn(run, 0)
    others = np.setdiff1d(np.arange(100), images)
    loss = run.config.loss
    for kept, affinity, epsilon in zip(
        state.potentials,
        affinities(run, named(run.first.params)),
        (loss.epsilon, loss.teacher_epsilon),
        strict=True,
    ):
        affinity = affinity[np.ix_(images, texts)]
        log_plan = np.log(reference.sinkhorn(affinity, epsilon))
        # log P = (f + g + K) / epsilon: the mean over columns is f, but for a constant.
        expected = centred(np.mean(epsilon * log_plan - affinity, axis=1))
        np.testing.assert_allclose(np.asarray(kept)[images], expected, atol=2e-5)
        assert not np.asarray(kept)[others].any()


@pytest.mark.parametrize("streamed", [False, True], ids=["resident", "rows from the host"])
def test_solves_start_from_a_share_of_what_was_kept(streamed):
    """Two iterations of a solve, followed in float64 over two epochs of drawn batches."""
    shares = {"loss__warm_student": 0.5, "loss__warm_teacher": 1.0}
    run = standing_still(loss__iterations=2, **shares)
    if streamed:
        state, _ = run.streamed(6)
    else:
        state, _ = run.resident(6)
    loss = run.config.loss
    for kept, affinity, epsilon, share in zip(
        state.potentials,
        affinities(run, named(run.first.params)),
        (loss.epsilon, loss.teacher_epsilon),
        shares.values(),
        strict=True,
    ):
        table = np.zeros(100)
        for step in range(6):
            images, texts = drawn(run, step)
            scores = affinity[np.ix_(images, texts)] / epsilon
            f = share * table[images] / epsilon
            for _ in range(2):
                g = -np.log(32) - reference.logsumexp(scores + f[:, None], 0)
                f = -np.log(32) - reference.logsumexp(scores + g[None, :], 1)
            table[images] = centred(epsilon * f)
        np.testing.assert_allclose(np.asarray(kept), table, atol=2e-5)


COLD = {"loss__warm_student": 0.0, "loss__warm_teacher": 0.0}


def test_a_warm_start_has_no_say_in_the_outcome():
    fields = {"loss__threshold": 1e-5, "optimizer__name": "adamw", "loss__teacher_epsilon": 0.05}
    (warm, metrics), (cold, _) = (
        Run(tiny(**fields)).resident(20),
        Run(tiny(**fields, **COLD)).resident(20),
    )
    expected = named(cold.params)
    for name, value in named(warm.params).items():
        np.testing.assert_allclose(value, expected[name], atol=2e-4, err_msg=name)
    for plan in ("student", "teacher"):
        assert (metrics[f"train/{plan}_marginal_error"] < 1e-5).all()


@pytest.mark.slow
def test_a_warm_start_is_nearer_after_as_many_iterations():
    # Most rows are seen again, and with most of the same.
    fields = {"loss__iterations": 3, "loss__teacher_epsilon": 0.05, "data__n_unpaired": 72}
    _, warm = Run(tiny(**fields)).resident(20)
    _, cold = Run(tiny(**fields, **COLD)).resident(20)
    for plan in ("student", "teacher"):
        near, far = (metrics[f"train/{plan}_marginal_error"] for metrics in (warm, cold))
        np.testing.assert_array_equal(near[0], far[0])  # nothing is known yet
        assert near[1:].mean() < 0.7 * far[1:].mean()


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, (True, True)),
        ({"loss__warm_student": 0.0}, (False, True)),
        ({"loss__warm_teacher": 0.0}, (True, False)),
        # Every batch is all there is: the teacher's plan is solved once a dispatch.
        ({"batch__unpaired": 256}, (True, False)),
        ({"objective": "sail"}, (False, False)),
        ({"objective": "sail_semi"}, (False, False)),
        ({"loss__divergence": "cka"}, (False, False)),
        ({"loss__alpha": 0.0}, (False, False)),
    ],
)
def test_potentials_are_kept_where_they_are_of_use(fields, kept):
    potentials = Run(tiny(**fields)).first.potentials
    assert tuple(leaf is not None for leaf in potentials) == kept
    assert all(leaf.shape == (256,) for leaf in jax.tree.leaves(potentials))


# ---- dispatches


@functools.cache
def tiny_run():
    return Run(tiny())


def assert_equal_states(one, other):
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other
    )


def test_dispatches_of_any_length_take_the_same_steps():
    together, metrics = tiny_run().resident(20)
    assert int(together.step) == 20
    parts, parts_metrics = tiny_run().resident(10, 10)
    assert_equal_states(together, parts)
    assert_equal_states(metrics, parts_metrics)


def test_steps_one_by_one_differ_by_rounding_alone():
    # XLA unrolls a loop of one step, and then adds in another order.
    run = Run(tiny(objective="sail"))
    (together, metrics), (singly, single_metrics) = run.resident(10), run.resident(*[1] * 10)
    assert_close_states(together, singly)
    np.testing.assert_allclose(single_metrics["train/loss"], metrics["train/loss"], rtol=1e-5)


def test_resident_and_streamed_rows_train_alike():
    run = tiny_run()
    (resident, metrics), (streamed, others) = run.resident(10), run.streamed(10)
    np.testing.assert_allclose(others["train/loss"], metrics["train/loss"], rtol=1e-5)
    assert_close_states(resident, streamed)


def test_streamed_rows_are_standardised_as_resident_ones():
    run = Run(tiny(**EXTENSIONS, objective="sotalign", optimizer__learning_rate=1e-6))
    (_, metrics), (_, others) = run.resident(5), run.streamed(5)
    # At a rate at which the sign of a gradient that is all but zero does not matter.
    np.testing.assert_allclose(others["train/loss"], metrics["train/loss"], rtol=1e-5)


def test_alpha_zero_is_sail_to_the_last_bit():
    without = Run(tiny(loss__alpha=0.0)).resident(10)
    sail = Run(tiny(objective="sail")).resident(10)
    assert_equal_states(without, sail)
    with_klot = named(tiny_run().resident(10)[0].params)
    assert (with_klot["image.linear.kernel"] != named(sail[0].params)["image.linear.kernel"]).any()


def test_precision_reaches_both_losses():
    def products(objective, precision):
        run = Run(tiny(objective=objective, loss__precision=precision))
        program = run_resident.lower(
            run.setup, 10, run.state(), run.rest, run.prepared, run.key
        ).as_text()
        return program.count("xbf16>) -> tensor<")

    assert products("sotalign", "float32") == products("sail_semi", "float32") == 0
    siglip = products("sail", "bfloat16_3x")
    assert siglip == 3 * 3  # forward, and back to both sides
    assert products("sail_semi", "bfloat16_3x") == 2 * siglip
    # KLOT's: the affinities of student and teacher, and from the student's back to both sides.
    assert products("sotalign", "bfloat16_3x") == siglip + 3 * 4


@pytest.mark.parametrize("divergence", ["klot", "cka", "info_nce"])
def test_each_divergence_falls_where_it_alone_counts(divergence):
    config = tiny(loss__divergence=divergence, loss__alpha=100.0, steps=60)
    _, metrics = Run(config).resident(60)
    values = metrics[
        {"info_nce": "train/info_nce_divergence"}.get(divergence, f"train/{divergence}")
    ]
    assert np.mean(values[-10:]) < 0.8 * np.mean(values[:5])
    np.testing.assert_allclose(
        metrics["train/loss"], metrics["train/siglip"] + 100 * values, rtol=1e-5
    )


@pytest.mark.parametrize("layer", ["mlp", pytest.param("star", marks=pytest.mark.slow)])
def test_deeper_layers_train(layer):
    config = tiny(model__layer=layer, model__width_factor=1, objective="sail")
    _, metrics = Run(config).resident(20)
    assert metrics["train/loss"][-1] < 0.7 * metrics["train/loss"][0]


def test_training_starts_at_the_teacher_when_told_to():
    run = Run(from_teacher(data__platonic__n_test=50))
    given = [
        np.asarray(getattr(run.teacher, f"project_{s}")(getattr(run.raw, f"unpaired_{s}")))
        for s in SIDES
    ]
    mine = embedded(run, named(run.first.params), "unpaired")
    np.testing.assert_allclose(reference.cosines(*mine), reference.cosines(*given), atol=1e-5)


def test_equal_setups_share_one_program(monkeypatch):
    traced = []
    step = step_module._step
    monkeypatch.setattr(step_module, "_step", lambda *a: (traced.append(1), step(*a))[1])
    # A width of its own, so that no other test has compiled this program.
    for seed, rate, alpha in ((0, 1e-3, 0.01), (1, 1e-3, 0.01), (0, 1.5e-3, 0.1)):
        fields = {"optimizer__learning_rate": rate, "loss__alpha": alpha}
        Run(tiny(seed=seed, model__dim=9, **fields)).resident(2, 2)
    assert len(traced) == 1
    Run(tiny(model__dim=9, optimizer__b1=0.8)).resident(2)
    assert len(traced) == 2


def test_the_state_that_went_in_is_given_away():
    run = tiny_run()
    for dispatch in (
        lambda state: run_resident(run.setup, 1, state, run.rest, run.prepared, run.key),
        lambda state: run_streamed(
            run.setup,
            state,
            run.rest,
            run.teacher,
            Batch(
                *(
                    rows[: stream.size]
                    for rows, stream in zip(
                        run.raw[:4], [run.setup.streams[i] for i in (0, 0, 1, 2)], strict=True
                    )
                ),
                image_rows=jnp.arange(run.setup.streams[1].size),
            ),
            run.key,
        ),
    ):
        state = run.state()
        after, _ = dispatch(state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, run.prepared)))
