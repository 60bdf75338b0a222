"""Nearest neighbours as positives: the loss in float64, and whose rows a step gets."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from ml_collections import ConfigDict
from rich.console import Console
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
from tiny_runs import tiny

from sotalign_jax.config import ConfigError, validate
from sotalign_jax.features import FeatureTable
from sotalign_jax.features.batches import (
    NeighbourRows,
    drawn_neighbours,
    step_key,
    stream_batches,
)
from sotalign_jax.losses import choose_neighbours
from sotalign_jax.objectives import OBJECTIVES
from sotalign_jax.objectives.base import Moment, Reads
from sotalign_jax.objectives.fusemix import FuseMix, mixed
from sotalign_jax.training import neighbours, train
from sotalign_jax.training.neighbours import NeighbourCache, find_neighbours


def nnclr(make=small, **options):
    fields = {f"nnclr__{name}" if name in OPTIONS else name: v for name, v in options.items()}
    return make(objective="nnclr", **fields)


OPTIONS = {
    "k",
    "text_weight",
    "image_weight",
    "base_weight",
    "stop_gradient",
    "duplicates",
}


# ---- the loss


def siglip(params, image, text):
    logits = np.exp(params["log_scale"]) * reference.cosines(image, text) + params["bias"]
    return np.mean(np.logaddexp(0, (1 - 2 * np.eye(len(image))) * logits))


def numpy_loss(run):
    """The loss of the first step, of parameters; the draw is taken as it is."""
    given = run.config.nnclr
    pairs, *_ = drawn(run)
    chosen = drawn_neighbours(run.tables.neighbours, run.key, 0, pairs)
    rows = {side: prepared_rows(run, "pairs", side)[pairs] for side in SIDES}
    near = {
        side: prepared_rows(run, "neighbour", side)[numbers]
        for side, numbers in chosen._asdict().items()
        if numbers is not None
    }
    first = named(run.first.params)

    def loss(params):
        image, text = (layer(params, side, rows[side]) for side in SIDES)
        value = given.base_weight * siglip(params, image, text)
        constant = first if given.stop_gradient else params
        if given.text_weight:
            value += given.text_weight * siglip(
                params, image, layer(constant, "text", near["text"])
            )
        if given.image_weight:
            value += given.image_weight * siglip(
                params, layer(constant, "image", near["image"]), text
            )
        return value

    return loss


BOTH = {
    "k": 3,
    "text_weight": 10.0,
    "image_weight": 0.1,
    "base_weight": 0.5,
    "batch__pairs": 16,
}


@pytest.mark.parametrize(
    "options",
    [BOTH, {"k": 1, "stop_gradient": True, "image_weight": 0.0, "base_weight": 0.0}],
    ids=["both sides", "DeCLIP"],
)
def test_first_step_is_what_float64_numpy_says(options):
    run = Run(nnclr(**options))
    check_value_and_gradient(run, numpy_loss(run))


def test_resident_and_streamed_rows_train_alike():
    run = Run(nnclr(**BOTH))
    (resident, metrics), (streamed, others) = run.resident(1, 1, 1), run.streamed(3)
    for name in ("train/loss", "train/siglip", "train/neighbour_siglip"):
        np.testing.assert_allclose(others[name], metrics[name], rtol=1e-5)
    assert_close_states(resident, streamed)


def test_without_weight_no_neighbour_is_sought():
    run = Run(nnclr(text_weight=0.0, image_weight=0.0, base_weight=2.0))
    assert run.tables.neighbours == NeighbourRows() and run.tables.neighbour_image is None
    settings, moment = run.setup.loss, Moment(0, run.key)
    _, outcome = jax.eval_shape(
        lambda batch: OBJECTIVES["nnclr"].loss(run.aligner(), batch, settings, moment), run.raw
    )
    assert set(outcome.metrics) == {"train/siglip"}


# ---- whose rows


@pytest.mark.parametrize("fields", [{}, {"model__center": False}])
def test_neighbours_are_the_nearest_of_prepared_rows(fields):
    fields = {"data__n_unpaired": 400, "teacher__standardize__text": 0.5} | fields
    run = Run(nnclr(tiny, k=5, **fields))
    for side in SIDES:
        unpaired = getattr(run.splits, f"unpaired_{side}")
        rows = prepared_rows(run, "pairs", side)
        run.raw = run.raw._replace(**{f"unpaired_{side}": unpaired.array()})
        others = prepared_rows(run, "unpaired", side)
        nearest = np.argsort(-reference.cosines(rows, others), axis=1)[:, :5]
        # Rows that are nobody's neighbour are left behind, whatever was found.
        table = getattr(run.tables, f"neighbour_{side}")
        assert len(table) == 64 * 5 < 400
        found = table.array()[getattr(run.tables.neighbours, side)]
        np.testing.assert_array_equal(found, unpaired.array()[nearest])


def with_copies(splits):
    """The splits, in which the first ten unpaired texts are the text of the first pair."""
    rows = splits.unpaired_text.array().copy()
    rows[:10] = splits.pairs.text.array()[0]
    return dataclasses.replace(splits, unpaired_text=FeatureTable.from_array(rows, name="texts"))


@functools.cache
def plain():
    return Run(small(objective="sail"))


def found(splits, **options):
    return find_neighbours(plain().config, splits, plain().aligner(), Reads(**options))


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_copies_of_a_text_are_neighbours_only_where_they_may(duplicates):
    splits = with_copies(plain().splits)
    rows = found(splits, neighbours=5, duplicates=duplicates, sides=("text",))
    assert rows.image is None
    kept = set(rows.text[0]) & set(range(10))
    assert kept == (set(range(5)) if duplicates == "keep" else set())


def test_too_few_rows_that_are_no_copies():
    splits = with_copies(plain().splits)
    message = r"config.sail.k \(texts\): k=23 is too large: of the 32 rows of table, 22 can be"
    with pytest.raises(ConfigError, match=message):
        found(splits, neighbours=23, sides=("text",))


def test_runs_that_would_find_the_same_search_once(monkeypatch):
    searches = []
    monkeypatch.setattr(
        neighbours, "find_neighbours", lambda *a, **_: searches.append(a) or NeighbourRows()
    )
    cache, run = NeighbourCache(), plain()
    uncentred = Run(small(objective="sail", model__center=False)).aligner()
    reads = Reads(neighbours=3)
    get = functools.partial(cache.get, run.config)
    first = get(run.splits, run.aligner(), reads)
    other = Run(small(objective="sail", seed=1))
    seeds = other.aligner()  # other layers, and other means
    assert get(run.splits, run.aligner(), reads) is first and len(searches) == 1
    for another in (
        (run.splits, uncentred, reads),
        (run.splits, run.aligner(), Reads(neighbours=4)),
        (other.splits, run.aligner(), reads),
        (run.splits, seeds, reads),
    ):
        count = len(searches)
        get(*another)
        get(*another)
        assert len(searches) == count + 1


def test_the_search_is_announced(capsys):
    run = plain()
    find = functools.partial(find_neighbours, run.config, run.splits, run.aligner())
    find(Reads(neighbours=7, sides=("text",)), console=Console(width=200))
    line = "neighbours: searching the 7 nearest to each of 24 pairs among 32 unpaired texts\n"
    assert capsys.readouterr().out == line
    find(Reads(neighbours=7))
    assert not capsys.readouterr().out


def test_a_draw_is_that_of_its_step_pair_and_side():
    table = np.arange(600 * 4).reshape(600, 4).astype(np.int32)
    both, key = NeighbourRows(table, table), jax.random.key(5)
    pairs = np.random.default_rng(0).permutation(600)
    first = drawn_neighbours(both, key, 7, pairs)
    for rows in first:
        np.testing.assert_array_equal(np.asarray(rows) // 4, pairs)
        assert np.abs(np.bincount(np.asarray(rows) % 4) - 150).max() < 45  # four deviations
    for other in (
        first.text,
        drawn_neighbours(both, key, 8, pairs).image,
        drawn_neighbours(both, jax.random.key(6), 7, pairs).image,
    ):
        assert 0.17 < np.mean(np.asarray(other) == np.asarray(first.image)) < 0.33
    again = drawn_neighbours(NeighbourRows(image=table), key, 7, pairs)
    np.testing.assert_array_equal(again.image, first.image)
    assert again.text is None
    # The choice of the loss that others import, at a key that nothing else of a step has.
    choice = step_key(jax.random.fold_in(key, 1_001), 7)
    np.testing.assert_array_equal(first.image, choose_neighbours(choice, table[pairs]))


def test_neighbours_of_mixed_pairs_are_mixed_alike():
    run = plain()
    settings = dataclasses.replace(run.setup.loss, fusemix=FuseMix(1.0, "halves", True))
    rows = jax.random.normal(jax.random.key(0), (3, 8, 2))
    batch = run.prepared._replace(
        pairs_image=rows[0], pairs_text=rows[1], neighbour_text=jnp.tile(rows[0], (1, 3))
    )
    seen = mixed(batch, 8, settings, run.key)
    assert seen.neighbour_image is None
    np.testing.assert_array_equal(seen.neighbour_text, jnp.tile(seen.pairs_image, (1, 3)))
    assert np.abs(seen.pairs_image - rows[0, :4]).max() > 0.1


# ---- in a run


def test_host_rows_are_the_drawn_neighbours_of_the_drawn_pairs():
    run = Run(nnclr(tiny, k=4))
    parts = (slice(0, 20), slice(20, 48))
    shares = [
        list(
            stream_batches(run.tables, run.setup.streams, run.key, 3, 6, shares=(part, part, part))
        )
        for part in parts
    ]
    for step, batches in zip(range(3, 6), zip(*shares, strict=True), strict=True):
        pairs, *_ = drawn(run, step)
        rows = drawn_neighbours(run.tables.neighbours, run.key, step, pairs)
        for side in SIDES:
            read = np.concatenate([getattr(batch, f"neighbour_{side}") for batch in batches])
            table = getattr(run.tables, f"neighbour_{side}")
            expected = table.take(np.asarray(getattr(rows, side)))
            np.testing.assert_array_equal(read, expected)
            assert not len(getattr(batches[0], f"unpaired_{side}"))


def test_too_few_rows_stop_a_run_before_it_starts(tmp_path, capsys):
    config = nnclr(tiny, k=257, image_weight=0.0)
    with pytest.raises(ConfigError) as caught:
        train(config, tmp_path / "run")
    assert re.fullmatch(
        r"config.nnclr: 257 neighbours \(k\) of each pair asked, but .* has 256 rows; give a "
        r"smaller k, more data, or leave out the neighbours of the texts",
        str(caught.value),
    )
    assert not capsys.readouterr().out
    assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("k", 0, "must be at least 1, got 0"),
        ("k", 2.5, "must be of type int, got 2.5"),
        ("text_weight", -1.0, "must be finite and not negative, got -1"),
        ("image_weight", float("nan"), "must be finite and not negative, got nan"),
        ("duplicates", "some", "got 'some'; must be one of drop, keep"),
        ("stop_gradient", 1, "must be of type bool, got 1"),
    ],
)
def test_options_that_cannot_be_run_are_named(option, value, message):
    with pytest.raises(ConfigError, match=rf"^config.nnclr.{option}: {message}"):
        validate(ConfigDict({"nnclr": {option: value}}))
