"""A step against a float64 reading of it, and what dispatches of steps have in common."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny_runs import from_teacher, tiny

from sotalign_jax.config import validate
from sotalign_jax.features.batches import Batch, batch_rows, first_order, stream_batches
from sotalign_jax.training import step as step_module
from sotalign_jax.training.build import build, load_inputs
from sotalign_jax.training.step import OptimizerSettings, prepare, run_resident, run_streamed

SIDES = ("image", "text")


class Run:
    """The parts of a run, as `train` builds them."""

    def __init__(self, config):
        self.config = validate(config)
        splits, self.teacher = load_inputs(self.config)
        self.setup, self.first, self.rest = build(self.config, splits, self.teacher)
        self.tables = Batch(
            splits.pairs.image, splits.pairs.text, splits.unpaired_image, splits.unpaired_text
        )
        self.raw = Batch(*(None if table is None else table.array() for table in self.tables))
        self.key = jax.random.key(3)

    @functools.cached_property
    def prepared(self):
        return prepare(self.setup, self.first.params, self.rest, self.teacher, self.raw)

    def state(self):
        """A first state of its own, since dispatches take theirs away."""
        return jax.tree.map(jnp.copy, self.first)

    def resident(self, *lengths):
        """State and metrics (one entry a step) after dispatches of these lengths."""
        state, collected = self.state(), []
        for length in lengths:
            state, metrics = run_resident(
                self.setup, length, state, self.rest, self.prepared, self.key
            )
            collected.append(metrics)
        return state, jax.tree.map(lambda *parts: np.concatenate(parts), *collected)


def small(**fields):
    """All rows in every batch, and Sinkhorn run until nothing changes."""
    fields = {"data__n_pairs": 24, "data__n_unpaired": 32, "batch__pairs": 24} | fields
    return tiny(batch__unpaired=32, loss__threshold=1e-6, loss__max_iterations=5_000, **fields)


# Both sides standardised, and the teacher refitted on the unpaired rows.
EXTENSIONS = {
    "teacher__standardize__image": 0.5,
    "teacher__standardize__text": 1.0,
    "teacher__refit__weight": 0.3,
    "teacher__refit__epsilon": 0.1,
}


def named(params):
    """Parameters in float64 by path, ``image.linear.kernel`` for instance."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): np.asarray(
            leaf, np.float64
        )
        for path, leaf in leaves
    }


# ---- the same losses in float64 NumPy


def project(params, side, rows, mean):
    z = reference.unit(rows) - np.asarray(mean)
    if f"{side}.layer_norm.scale" in params:
        z = z - z.mean(1, keepdims=True)
        z = z / np.sqrt((z**2).mean(1, keepdims=True) + 1e-5)
        z = z * params[f"{side}.layer_norm.scale"] + params[f"{side}.layer_norm.bias"]
    return z @ params[f"{side}.linear.kernel"] + params[f"{side}.linear.bias"]


def siglip(params, image, text, normalization):
    logits = np.exp(params["log_scale"]) * reference.cosines(image, text) + params["bias"]
    target = -np.ones_like(logits)
    np.fill_diagonal(target, 1)
    total = np.sum(np.log1p(np.exp(-target * logits)))
    return total / (logits.size if normalization == "mean" else min(logits.shape))


def numpy_loss(run, params):
    loss, teacher = run.config.loss, run.teacher
    means = {s: np.asarray(getattr(teacher, f"{s}_mean"), np.float64) for s in ("image", "text")}

    def rows(kind, side):
        found = reference.unit(getattr(run.raw, f"{kind}_{side}"))
        columns = getattr(teacher, f"{side}_columns")
        return found if columns is None else (found - columns.mean) / columns.scale

    image, text = (project(params, side, rows("pairs", side), means[side]) for side in means)
    if run.config.objective == "sail":
        return siglip(params, image, text, loss.normalization)
    more_image, more_text = (
        project(params, side, rows("unpaired", side), means[side]) for side in means
    )
    if run.config.objective == "sail_semi":
        return 0.5 * (
            siglip(params, image, np.r_[text, more_text], loss.normalization)
            + siglip(params, np.r_[image, more_image], text, loss.normalization)
        )
    given = [
        (reference.unit(rows("unpaired", s)) - means[s])
        @ np.asarray(getattr(teacher, f"{s}_weight"), np.float64)
        for s in means
    ]
    value, _ = reference.klot(
        reference.cosines(more_image, more_text), reference.cosines(*given), loss.epsilon
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
    state, metrics = run.resident(1)
    before, after = named(run.first.params), named(state.params)
    np.testing.assert_allclose(metrics["train/loss"][0], numpy_loss(run, before), rtol=2e-5)

    # Lion's momentum after one step from zero is (1 - b2) times the gradient.
    gradient = {name: m / (1 - 0.99) for name, m in named(state.opt_state[0].mu).items()}
    assert gradient.keys() == before.keys()
    size = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    np.testing.assert_allclose(metrics["train/gradient_norm"][0], size, rtol=1e-4)
    rng = np.random.default_rng(0)
    for name, value in before.items():
        # Along the gradient, where the slope is large, and along a random direction.
        for direction in (gradient[name], rng.standard_normal(value.shape)):
            direction = direction / np.linalg.norm(direction)
            h = 1e-4
            high, low = (
                numpy_loss(run, before | {name: value + s * h * direction}) for s in (1, -1)
            )
            np.testing.assert_allclose(
                np.sum(gradient[name] * direction),
                (high - low) / (2 * h),
                rtol=2e-3,
                atol=2e-4 * np.linalg.norm(gradient[name]) + 1e-8,
                err_msg=name,
            )

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
    means = {s: np.asarray(getattr(run.teacher, f"{s}_mean"), np.float64) for s in SIDES}
    rows = {s: getattr(run.raw, f"unpaired_{s}") for s in SIDES}
    given = [
        (reference.unit(rows[s]) - means[s])
        @ np.asarray(getattr(run.teacher, f"{s}_weight"), np.float64)
        for s in SIDES
    ]
    mine = [project(params, s, rows[s], means[s]) for s in SIDES]
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
        state = run.state()
        for raw in stream_batches(run.tables, run.setup.streams, run.key, 0, 6):
            state, _ = run_streamed(run.setup, state, run.rest, run.teacher, raw, run.key)
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


def assert_close_states(one, other):
    expected = named(one.params)
    for name, value in named(other.params).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)


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
    resident, metrics = run.resident(10)
    state, losses = run.state(), []
    for raw in stream_batches(run.tables, run.setup.streams, run.key, 0, 10):
        state, one = run_streamed(run.setup, state, run.rest, run.teacher, raw, run.key)
        losses.append(float(one["train/loss"]))
    np.testing.assert_allclose(losses, metrics["train/loss"], rtol=1e-5)
    assert_close_states(resident, state)


def test_streamed_rows_are_standardised_as_resident_ones():
    run = Run(tiny(**EXTENSIONS, objective="sotalign", optimizer__learning_rate=1e-6))
    _, metrics = run.resident(5)
    state, losses = run.state(), []
    for raw in stream_batches(run.tables, run.setup.streams, run.key, 0, 5):
        state, one = run_streamed(run.setup, state, run.rest, run.teacher, raw, run.key)
        losses.append(float(one["train/loss"]))
    # At a rate at which the sign of a gradient that is all but zero does not matter.
    np.testing.assert_allclose(losses, metrics["train/loss"], rtol=1e-5)


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


@pytest.mark.parametrize("layer", ["mlp", "star"])
def test_deeper_layers_train(layer):
    config = tiny(model__layer=layer, model__width_factor=1, objective="sail")
    _, metrics = Run(config).resident(20)
    assert metrics["train/loss"][-1] < 0.7 * metrics["train/loss"][0]


def test_training_starts_at_the_teacher_when_told_to():
    run = Run(from_teacher(data__platonic__n_test=50))
    given = [
        np.asarray(getattr(run.teacher, f"project_{s}")(getattr(run.raw, f"unpaired_{s}")))
        for s in ("image", "text")
    ]
    params = named(run.first.params)
    mine = [
        project(params, s, getattr(run.raw, f"unpaired_{s}"), getattr(run.teacher, f"{s}_mean"))
        for s in ("image", "text")
    ]
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
