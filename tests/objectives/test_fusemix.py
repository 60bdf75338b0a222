"""Mixtures of pairs under an objective: which rows, in which proportion, and what counts them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from step_runs import Run, check_value_and_gradient, layer, prepared_rows, small
from tiny_runs import tiny

from sotalign_jax.config import ConfigError, validate
from sotalign_jax.features.batches import step_key
from sotalign_jax.models import Aligner
from sotalign_jax.objectives import OBJECTIVES
from sotalign_jax.objectives.fusemix import FuseMix, mixed, mixtures
from sotalign_jax.training import together_key, train
from sotalign_jax.training.devices import AXIS

SPEC = jax.sharding.PartitionSpec


def proportions(rows, mixture, half):
    """How much of its first row each mixture has, and what no proportion explains."""
    first = np.asarray(rows, np.float64)
    other = np.roll(first, -half, axis=0)
    first, other = first[: len(mixture)], other[: len(mixture)]
    share = np.sum((mixture - other) * (first - other), 1) / np.sum((first - other) ** 2, 1)
    return share, np.abs(share[:, None] * (first - other) + other - mixture).max()


def siglip(params, image, text):
    logits = np.exp(params["log_scale"]) * reference.cosines(image, text) + params["bias"]
    target = 2 * np.eye(len(logits)) - 1
    return np.mean(np.log1p(np.exp(-target * logits)))


def test_an_objective_sees_the_mixtures_of_its_step():
    run = Run(small(objective="sail", fusemix__alpha=50.0, fusemix__per_row=True))
    seen = mixed(run.prepared, 24, run.setup.loss, step_key(run.key, 0))
    shares = {}
    for side in ("image", "text"):
        mixture = np.asarray(getattr(seen, f"pairs_{side}"), np.float64)
        rows = prepared_rows(run, "pairs", side)
        shares[side], rest = proportions(rows, mixture, 12)
        assert mixture.shape == (12, rows.shape[1]) and rest < 1e-5
    np.testing.assert_allclose(shares["image"], shares["text"], atol=1e-5)
    share = shares["image"][:, None]
    # Of Beta(50, 50): a half, and a standard deviation of 0.05.
    assert abs(share.mean() - 0.5) < 0.1 and 0.02 < share.std() < 0.1
    assert seen.unpaired_image is run.prepared.unpaired_image

    def truth(params):
        sides = []
        for side in ("image", "text"):
            rows = prepared_rows(run, "pairs", side)
            sides.append(layer(params, side, share * rows[:12] + (1 - share) * rows[12:]))
        return siglip(params, *sides)

    check_value_and_gradient(run, truth)
    assert run.setup.sizes == (12, 0, 0)
    assert OBJECTIVES["sail"].prior(run.setup.loss, *run.setup.sizes) == 1 / 12


@pytest.mark.slow
def test_proportions_are_new_in_each_step_and_of_the_distribution_asked_for():
    # The rows of the first half are 1 and of the second 0: a mixture is its own proportion.
    run = Run(small(objective="sail"))
    rows = jnp.repeat(jnp.asarray([[1.0], [0.0]], jnp.float32), 2, axis=0)
    batch = run.prepared._replace(pairs_image=rows, pairs_text=rows)

    def share(alpha, step):
        settings = dataclasses.replace(run.setup.loss, fusemix=FuseMix(alpha))
        return mixed(batch, 4, settings, step_key(run.key, step)).pairs_image[0, 0]

    # alpha is an argument of the program.
    draws = jax.jit(jax.vmap(share, in_axes=(None, 0)))
    for alpha in (0.2, 3.0):
        found = np.asarray(draws(alpha, jnp.arange(4_000)))
        np.testing.assert_allclose(np.mean(found), 0.5, atol=0.03)
        np.testing.assert_allclose(np.var(found), 1 / (4 * (2 * alpha + 1)), rtol=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [FuseMix(1.0, "halves", True), FuseMix(1.0, "roll", False)], ids=["halves", "roll"]
)
def test_a_mesh_mixes_the_rows_of_a_batch_and_not_its_padding(how):
    run = Run(small(objective="sail"))
    settings = dataclasses.replace(run.setup.loss, fusemix=how)
    rows = [side[:22] for side in (run.prepared.pairs_image, run.prepared.pairs_text)]
    batch = run.prepared._replace(unpaired_image=None, unpaired_text=None)
    batch = batch._replace(teacher_image=None, teacher_text=None)
    one = mixed(batch._replace(pairs_image=rows[0], pairs_text=rows[1]), 22, settings, run.key)
    # Three devices have 8, 8 and 6 of the 22 pairs; what follows must not be mixed in.
    padded = [jnp.pad(part, ((0, 2), (0, 0)), constant_values=9e9) for part in rows]
    mesh = jax.make_mesh((3,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.shard_map(
        lambda image, text, key: mixed(
            batch._replace(pairs_image=image, pairs_text=text),
            22,
            dataclasses.replace(settings, axis_name=AXIS),
            key,
        )[:2],
        mesh=mesh,
        in_specs=(SPEC(AXIS), SPEC(AXIS), SPEC()),
        out_specs=SPEC(AXIS),
    )
    count = 11 if how.partners == "halves" else 22
    for found, expected in zip(jax.jit(spread)(*padded, run.key), one[:2], strict=True):
        assert found.shape[0] == -(-count // 3) * 3 and len(expected) == count
        np.testing.assert_allclose(found[:count], expected, rtol=1e-6, atol=1e-7)
        assert not np.asarray(found)[count:].any()


def test_without_it_a_step_is_as_it_was():
    run = Run(small(objective="sail"))
    assert run.setup.loss.fusemix is None
    assert mixed(run.prepared, 24, run.setup.loss, run.key) is run.prepared


def test_runs_that_mix_can_be_trained_together():
    keys = [together_key(tiny(fusemix__alpha=alpha)) for alpha in (0.5, 2.0, 0.0)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.slow
def test_the_prior_is_that_of_the_mixtures(tmp_path):
    config = tiny(objective="sail", steps=0, fusemix__alpha=1.0, data__platonic__n_val=0)
    train(config, tmp_path, quiet=True)
    assert Aligner.load(tmp_path / "aligner").training_prior == pytest.approx(1 / 24)


def test_how_many():
    assert mixtures(None, 45) == 45
    assert mixtures(FuseMix(1.0, "halves"), 46) == 23
    assert mixtures(FuseMix(1.0, "roll"), 45) == 45


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -0.5}, r"alpha: must be finite and not negative \(0 is off\), got -0.5"),
        ({"alpha": float("inf")}, r"alpha: must be finite and not negative"),
        ({"alpha": 1.0, "partners": "any"}, r"partners: got 'any'; must be one of halves, roll"),
    ],
)
def test_bad_options_are_named(fields, message):
    with pytest.raises(ConfigError, match=rf"^config.fusemix.{message}"):
        validate(small(**{f"fusemix__{name}": value for name, value in fields.items()}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch__pairs": 45}, r"partners: 'halves' needs an even number of pairs a step, got 45"),
        ({"data__n_pairs": 21}, r"partners: 'halves' needs an even number of .*, got 21; make"),
        ({"batch__pairs": 1}, r"alpha: mixtures need at least 2 pairs a step, got 1; set 0"),
    ],
)
def test_batches_that_cannot_be_mixed_are_refused_before_any_work(fields, message):
    with pytest.raises(ConfigError, match=rf"^config.fusemix.{message}") as caught:
        validate(tiny(fusemix__alpha=1.0, **fields))
    assert "\n" not in str(caught.value)
    if "at least" not in message:
        validate(tiny(fusemix__alpha=1.0, fusemix__partners="roll", **fields))
