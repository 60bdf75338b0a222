"""S-CLIP: the loss and its gradient in float64, with labels of every kind."""

import jax
import numpy as np
import pytest
import reference
from ml_collections import ConfigDict
from step_runs import (
    SIDES,
    Run,
    assert_close_states,
    check_value_and_gradient,
    drawn,
    layer,
    named,
    prepared_rows,
    small,
)

from sotalign_jax.config import ConfigError, default_config, validate
from sotalign_jax.objectives import OBJECTIVES, loss_settings

OTHER = {"image": "text", "text": "image"}


def sclip(**options):
    """Batches of 16 of 24 pairs, and of all 32 unpaired rows."""
    given = {f"sclip__{name}": value for name, value in options.items()}
    return small(objective="sclip", batch__pairs=16, **given)


def one_way(anchors, candidates, scale):
    logits = scale * reference.cosines(anchors, candidates)
    return np.mean(reference.logsumexp(logits, 1) - np.diagonal(logits))


def targets(given, rows, pairs, scale):
    cosines = reference.cosines(rows, pairs)
    if given.labels == "hard":
        return np.eye(len(pairs))[cosines.argmax(1)]
    if given.labels == "soft":
        return np.exp(scale * cosines - reference.logsumexp(scale * cosines, 1)[:, None])
    plan = reference.sinkhorn(cosines, 1 / scale, iterations=given.iterations or None)
    return plan / plan.sum(1, keepdims=True)


def numpy_loss(run):
    """The loss of the first step, of parameters; labels are made with the first, and constant."""
    given = run.config.sclip
    sides = SIDES if given.sides == "both" else (given.sides,)
    pairs, *unpaired = drawn(run)
    rows = {
        "pairs": {s: prepared_rows(run, "pairs", s)[pairs] for s in SIDES},
        "unpaired": {
            s: prepared_rows(run, "unpaired", s)[some]
            for s, some in zip(SIDES, unpaired, strict=True)
        },
    }
    first = named(run.first.params)
    labels = {}
    for side in sides:
        views = rows["unpaired"][side], rows["pairs"][side]
        if given.space == "joint":
            views = (layer(first, side, view) for view in views)
        labels[side] = targets(given, *views, given.label_scale or np.exp(first["log_scale"]))

    def loss(params):
        pairs, more = ({s: layer(params, s, rows[kind][s]) for s in SIDES} for kind in rows)
        scale = np.exp(params["log_scale"])
        value = 0.0
        for side in SIDES:
            among = pairs[OTHER[side]]
            if OTHER[side] in sides:
                among = np.r_[among, more[OTHER[side]]]
            value += 0.5 * one_way(pairs[side], among, scale)
        for side in sides:
            logits = scale * reference.cosines(more[side], pairs[OTHER[side]])
            logs = logits - reference.logsumexp(logits, 1)[:, None]
            value -= given[f"{side}_weight"] * np.mean(np.sum(labels[side] * logs, 1))
        return value

    return loss


BOTH = {
    "labels": "soft",
    "space": "joint",
    "image_weight": 10.0,
    "text_weight": 0.1,
    "label_scale": 8.0,
}
CASES = {
    # Ten iterations, at a scale that moves.
    "as published": {"sides": "image", "image_weight": 0.1},
    "until the threshold": {"sides": "text", "space": "joint", "iterations": 0},
    "both sides": BOTH,
    "texts as negatives": {"labels": "hard", "space": "joint", "text_weight": 0.0},
}
SLOW = ("until the threshold", "texts as negatives")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES]
)
def test_first_step_is_what_float64_numpy_says(case):
    run = Run(sclip(**CASES[case]))
    _, gradient, _, metrics = check_value_and_gradient(run, numpy_loss(run))
    assert not gradient["bias"].any() and gradient["log_scale"]
    given = run.config.sclip
    labelled = {
        f"train/pseudo_label_{side}"
        for side in SIDES
        if given.sides in ("both", side) and given[f"{side}_weight"]
    }
    assert {name for name in metrics if "pseudo" in name} == labelled


@pytest.mark.parametrize("side", SIDES)
def test_the_other_side_needs_no_unpaired_rows(side):
    run = Run(sclip(sides=side))
    other = getattr(run.tables, f"unpaired_{OTHER[side]}")
    assert not len(other) and len(getattr(run.tables, f"unpaired_{side}")) == 32
    assert [stream.rows for stream in run.setup.streams[1:]] == [
        32 * (side == "image"),
        32 * (side == "text"),
    ]


def test_resident_and_streamed_rows_train_alike():
    run = Run(sclip(**BOTH))
    (resident, metrics), (streamed, others) = run.resident(1, 1, 1), run.streamed(3)
    for name in ("train/loss", "train/info_nce", "train/pseudo_label_image"):
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5)
    assert_close_states(resident, streamed)


def test_weights_and_a_fixed_scale_compile_nothing_anew():
    def structure(**options):
        settings = loss_settings(validate(sclip(**options)))
        return jax.tree.structure(settings)

    one = structure(image_weight=0.1, label_scale=8.0)
    assert one == structure(image_weight=10.0, label_scale=50.0)
    for other in ({"image_weight": 0.0}, {"label_scale": 0.0}, {"labels": "soft"}):
        assert one != structure(**({"image_weight": 0.1, "label_scale": 8.0} | other))


@pytest.mark.parametrize(("bound", "expected"), [(0.0, 20.0), (30.0, 20.0), (15.0, 15.0)])
def test_a_scale_is_brought_back_into_its_bound(bound, expected):
    run = Run(sclip(max_scale=bound))
    settled = named(OBJECTIVES["sclip"].settle(run.first.params, run.setup.loss))
    np.testing.assert_allclose(np.exp(settled.pop("log_scale")), expected, rtol=1e-6)
    before = named(run.first.params)
    for name, value in settled.items():
        np.testing.assert_array_equal(value, before[name])


def test_logits_are_no_probabilities():
    config = default_config()
    config.objective = "sclip"
    settings = loss_settings(validate(config))
    assert OBJECTIVES["sclip"].prior(settings, 50, 30, 20) is None


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("labels", "top", "got 'top'; must be one of hard, soft, ot"),
        ("space", "both", "got 'both'; must be one of unimodal, joint"),
        ("sides", "none", "got 'none'; must be one of both, image, text"),
        ("image_weight", -0.1, "must be finite and not negative, got -0.1"),
        ("text_weight", float("nan"), "must be finite and not negative, got nan"),
        ("max_scale", float("inf"), "must be finite and not negative, got inf"),
        ("label_scale", -1.0, "must be finite and not negative, got -1"),
        ("iterations", -1, "must be finite and not negative, got -1"),
        ("iterations", 1.5, "must be of type int, got 1.5"),
    ],
)
def test_options_that_cannot_be_run_are_named(option, value, message):
    with pytest.raises(ConfigError, match=rf"^config.sclip.{option}: {message}"):
        validate(ConfigDict({"sclip": {option: value}}))
