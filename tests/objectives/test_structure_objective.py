"""STRUCTURE as an objective, against a float64 reading of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from step_runs import (
    SIDES,
    Run,
    check_value_and_gradient,
    embedded,
    named,
    prepared_rows,
    small,
)

from sotalign_jax.config import ConfigError, validate
from sotalign_jax.objectives import OBJECTIVES

# As the published code has it, and as its forks configure it.
CODE = {
    "structure__combine": "mean",
    "structure__divergence": "reverse",
    "structure__levels": 2,
    "structure__weighting": "inverse",
    "structure__temperature": 0.3,
    "structure__margin": 1e-4,
}


def info_nce(image, text, scale):
    logits = scale * reference.cosines(image, text)
    both = reference.logsumexp(logits, 0) + reference.logsumexp(logits, 1)
    return np.mean(both / 2 - np.diagonal(logits))


def similarities(rows, temperature):
    rows = reference.unit(rows)
    rows = rows - rows.mean(0)
    scores = rows @ rows.T / temperature
    return np.exp(scores - reference.logsumexp(scores, 1)[:, None])


def relative(p, q):
    return np.sum(p * np.log(p / q)) / len(p)


def regulariser(ours, frozen, how):
    """Of rows none of whose similarities vanish."""
    first = [similarities(rows, how.temperature) for rows in (ours, frozen)]
    total = 0.0
    for level in range(1, how.levels + 1):
        p, q = (np.linalg.matrix_power(matrix, level) for matrix in first)
        m = (p + q) / 2
        if how.divergence == "js":
            value = (relative(p, m) + relative(q, m)) / 2
        else:
            value = (relative(m, p + how.eps) + relative(m, q + how.eps)) / 2
        assert value > how.margin, "or the gradient is that of nothing"
        total += (value - how.margin) / (level if how.weighting == "inverse" else 1)
    return total / how.levels


def numpy_parts(run, params):
    """InfoNCE, and the regularisers of images and of texts."""
    how = run.config.structure
    kinds = {"pairs": ["pairs"], "unpaired": ["unpaired"], "both": ["pairs", "unpaired"]}[how.rows]
    rows = {kind: dict(zip(SIDES, embedded(run, params, kind), strict=True)) for kind in kinds}
    pairs = embedded(run, params, "pairs")
    return info_nce(*pairs, 1 / how.temperature), [
        regulariser(
            np.concatenate([rows[kind][side] for kind in kinds]),
            np.concatenate([prepared_rows(run, kind, side) for kind in kinds]),
            how,
        )
        for side in SIDES
    ]


def numpy_loss(run, params, weight):
    value, kept = numpy_parts(run, params)
    return value + weight * (sum(kept) if run.config.structure.combine == "sum" else sum(kept) / 2)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param(
            {"structure__rows": "unpaired", "model__center": False}, marks=pytest.mark.slow
        ),
        pytest.param(
            {"structure__rows": "both", "loss__memory": "streamed"}, marks=pytest.mark.slow
        ),
    ],
    ids=["paper", "unpaired", "both by blocks"],
)
def test_first_step_is_what_float64_numpy_says(fields):
    run = Run(small(objective="structure", structure__weight=30.0, **fields))
    _, gradient, state, metrics = check_value_and_gradient(
        run, lambda params: numpy_loss(run, params, 30.0)
    )
    before = named(run.first.params)
    value, kept = numpy_parts(run, before)
    np.testing.assert_allclose(metrics["train/info_nce"], [value], rtol=1e-5)
    for side, expected in zip(SIDES, kept, strict=True):
        np.testing.assert_allclose(metrics[f"train/structure_{side}"], [expected], rtol=1e-4)
    assert gradient["log_scale"] == gradient["bias"] == 0
    # The aligner that is saved has the scale that it was trained at.
    np.testing.assert_allclose(metrics["train/scale"], [1 / 0.07], rtol=1e-5)
    np.testing.assert_allclose(named(state.params)["log_scale"], -np.log(0.07), rtol=1e-6)


def test_warm_up_and_the_choices_of_the_published_code():
    fields = {"structure__weight": 8.0, "structure__warmup": 4, "structure__rows": "both"}
    run = Run(small(objective="structure", **fields, **CODE))
    state, metrics = run.resident(*[1] * 6)
    np.testing.assert_allclose(metrics["train/structure_weight"], [0, 2, 4, 6, 8, 8], rtol=1e-6)
    kept = metrics["train/structure_image"] + metrics["train/structure_text"]
    np.testing.assert_allclose(
        metrics["train/loss"],
        metrics["train/info_nce"] + metrics["train/structure_weight"] * kept / 2,
        rtol=1e-6,
    )
    assert np.isfinite(metrics["train/gradient_norm"]).all()
    assert all(np.isfinite(value).all() for value in named(state.params).values())
    # A run that stands at step 2 has half of the weight.
    run.first = run.first._replace(step=jnp.asarray(2, jnp.int32))
    check_value_and_gradient(run, lambda params: numpy_loss(run, params, 4.0))


def test_weights_are_numbers_of_one_program():
    setups = [
        Run(small(objective="structure", structure__weight=weight)).setup for weight in (0.0, 10.0)
    ]
    assert len({jax.tree.structure(setup) for setup in setups}) == 1


@pytest.mark.parametrize(("rows", "reads"), [("pairs", False), ("both", True), ("unpaired", True)])
def test_unpaired_rows_are_read_where_they_count(rows, reads):
    setup = Run(small(objective="structure", structure__rows=rows)).setup
    assert setup.loss.reads.unpaired is reads and not setup.loss.reads.teacher
    assert setup.streams[1].size == (32 if reads else 0)
    assert OBJECTIVES["structure"].prior(setup.loss, 24, 32, 32) is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("weight", -1.0, r"must be finite and not negative, got -1.0"),
        ("weight", float("inf"), r"must be finite and not negative, got inf"),
        ("warmup", -5, r"must be finite and not negative, got -5"),
        ("rows", "all", r"got 'all'; must be one of pairs, both, unpaired"),
        ("combine", "max", r"got 'max'; must be one of sum, mean"),
        ("temperature", 0.0, r"must be positive and finite, got 0.0"),
        ("levels", 0, r"must be at least 1, got 0"),
        ("weighting", "half", r"got 'half'; must be one of none, inverse"),
        ("margin", -0.1, r"must be finite and not negative, got -0.1"),
        ("divergence", "kl", r"got 'kl'; must be one of js, reverse"),
        ("eps", 0.0, r"must lie in \[1e-30, 1\), got 0.0"),
    ],
)
def test_bad_options_are_named(field, value, message):
    with pytest.raises(ConfigError, match=rf"^config.structure.{field}: {message}"):
        validate(small(**{f"structure__{field}": value}))


def test_one_row_has_no_similarities():
    run = Run(small(objective="structure", batch__pairs=1))
    with pytest.raises(ValueError, match=r"^config.structure.rows: 'pairs' are 1 of a modality"):
        run.resident(1)
