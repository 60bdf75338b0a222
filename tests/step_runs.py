"""Runs taken apart: the parts that `train` builds, steps of them, and float64 readings of these."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import reference
from flax import nnx
from tiny_runs import tiny

from sotalign_jax.config import validate
from sotalign_jax.features.batches import batch_rows, first_order, stream_batches
from sotalign_jax.training.build import InputCache, build, sources
from sotalign_jax.training.devices import place_tables
from sotalign_jax.training.step import prepare, run_resident, run_streamed

SIDES = ("image", "text")
# Rows and teachers that several tests read, and none changes.
_INPUTS = InputCache()


class Run:
    """The parts of a run, as `train` builds them."""

    def __init__(self, config):
        self.config = validate(config)
        self.splits, self.teacher = _INPUTS.get(self.config)
        self.setup, self.first, self.rest = build(self.config, self.splits, self.teacher)
        self.tables = sources(self.config, self.splits, self.setup, self.first, self.rest)
        self.raw = place_tables(self.tables, None)
        self.key = jax.random.key(3)

    def aligner(self):
        """The aligner before the first step."""
        return nnx.merge(self.setup.graph, self.first.params, self.rest)

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

    def streamed(self, steps):
        """State and metrics after so many steps on rows that come from the host."""
        state, collected = self.state(), []
        for raw in stream_batches(self.tables, self.setup.streams, self.key, 0, steps):
            state, metrics = run_streamed(self.setup, state, self.rest, self.teacher, raw, self.key)
            collected.append(metrics)
        return state, jax.tree.map(lambda *parts: np.stack(parts), *collected)


def small(**fields):
    """All rows in every batch, and Sinkhorn run until nothing changes."""
    fields = {"data__n_pairs": 24, "data__n_unpaired": 32, "batch__pairs": 24} | fields
    return tiny(batch__unpaired=32, loss__threshold=1e-6, loss__max_iterations=5_000, **fields)


def named(params):
    """Parameters in float64 by path, ``image.linear.kernel`` for instance."""
    leaves, _ = jax.tree.flatten_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): np.asarray(
            leaf, np.float64
        )
        for path, leaf in leaves
    }


def prepared_rows(run, kind, side):
    """The rows of ``"pairs"``, say, of a side as its layer takes them, in float64."""
    rows = reference.unit(getattr(run.raw, f"{kind}_{side}"))
    columns = getattr(run.teacher, f"{side}_columns")
    if columns is not None:
        rows = reference.unit((rows - columns.mean) / columns.scale)
    centred = run.config.model.center
    return rows - np.asarray(getattr(run.teacher, f"{side}_mean"), np.float64) * centred


def layer(params, side, rows):
    """What the linear layer of a side makes of prepared rows, in float64."""
    if f"{side}.layer_norm.scale" in params:
        rows = rows - rows.mean(1, keepdims=True)
        rows = rows / np.sqrt((rows**2).mean(1, keepdims=True) + 1e-5)
        rows = rows * params[f"{side}.layer_norm.scale"] + params[f"{side}.layer_norm.bias"]
    return rows @ params[f"{side}.linear.kernel"] + params[f"{side}.linear.bias"]


def drawn(run, step=0):
    """Which pairs, unpaired images and unpaired texts are in the batch of a step."""
    return [
        np.asarray(batch_rows(stream, first_order(stream, run.key, step), step))
        for stream in run.setup.streams
    ]


def embedded(run, params, kind):
    """Embeddings of all images and of all texts of ``"pairs"`` or ``"unpaired"``, in float64."""
    return [layer(params, side, prepared_rows(run, kind, side)) for side in SIDES]


def check_value_and_gradient(run, truth):
    """The loss and the gradient of a run's first step against a float64 function of parameters.

    Args:
        run: with Lion, and not yet started.
        truth: of parameters as `named` has them; returns the loss.

    Returns:
        The parameters before the step, its gradient, the state after it, and its metrics.
    """
    state, metrics = run.resident(1)
    before = named(run.first.params)
    np.testing.assert_allclose(metrics["train/loss"][0], truth(before), rtol=2e-5)

    # Lion's momentum after one step from zero is (1 - b2) times the gradient.
    gradient = {name: m / (1 - 0.99) for name, m in named(state.opt_state[0].mu).items()}
    assert gradient.keys() == before.keys()
    size = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
    np.testing.assert_allclose(metrics["train/gradient_norm"][0], size, rtol=1e-4)
    rng = np.random.default_rng(0)
    for name, value in before.items():
        # Along the gradient, where the slope is large, and along a random direction.
        for direction in (gradient[name], rng.standard_normal(value.shape)):
            if not np.any(direction):
                continue
            direction = direction / np.linalg.norm(direction)
            h = 1e-4
            high, low = (truth(before | {name: value + s * h * direction}) for s in (1, -1))
            np.testing.assert_allclose(
                np.sum(gradient[name] * direction),
                (high - low) / (2 * h),
                rtol=2e-3,
                atol=2e-4 * np.linalg.norm(gradient[name]) + 1e-8,
                err_msg=name,
            )
    return before, gradient, state, metrics


def assert_close_states(one, other):
    """Parameters equal up to rounding."""
    expected = named(one.params)
    for name, value in named(other.params).items():
        np.testing.assert_allclose(value, expected[name], atol=1e-6, err_msg=name)
