"""A run spread over a mesh of devices gives what one device gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import assert_same_parameters, from_teacher, records, tiny

from sotalign_jax.config import ConfigError, validate
from sotalign_jax.features import FeatureTable
from sotalign_jax.objectives.base import RowPotentials
from sotalign_jax.training import train
from sotalign_jax.training.checkpoints import Checkpoints
from sotalign_jax.training.devices import (
    AXIS,
    make_mesh,
    padded,
    place,
    place_table,
    place_vector,
    put_rows,
    share,
    take_rows,
)
from sotalign_jax.training.step import TrainState

# AdamW: Lion moves by the sign of a gradient, which hides small differences and blows up others.
COMMON = {"optimizer__name": "adamw", "loss__alpha": 1.0, "loss__iterations": 20, "steps": 12}
# Batches of 45 pairs and 61 unpaired rows: no number of devices here divides them.
UNEVEN = {"batch__pairs": 45, "batch__unpaired": 61, "data__n_unpaired": 250}
RHYTHM = {"log_every": 4, "eval_every": 0, "checkpoint_every": 0}


def run(path, devices, make=tiny, **fields):
    train(make(mesh__devices=devices, **(COMMON | UNEVEN | RHYTHM | fields)), path, quiet=True)
    return path


def assert_close(one, other):
    assert_same_parameters(one, other)
    for a, b in zip(records(one), records(other), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(
            [b[k] for k in a], list(a.values()), rtol=2e-4, atol=2e-5, err_msg=str(a.keys())
        )


CASES = {
    "klot": (8, {}),
    "klot streamed, rows from disk": (3, {"loss__memory": "streamed", "data__resident": "never"}),
    "all pairs in every batch": (4, {"batch__pairs": 64}),
    "klot by products of parts": (4, {"loss__precision": "bfloat16_3x"}),
    "sail, by blocks": (4, {"objective": "sail", "loss__memory": "streamed"}),
    "sail_semi": (3, {"objective": "sail_semi", "loss__normalization": "rows"}),
    "cka": (4, {"loss__divergence": "cka"}),
    "info_nce": (3, {"loss__divergence": "info_nce"}),
    "clip": (4, {"objective": "clip"}),
    "clip, by blocks": (3, {"objective": "clip", "loss__memory": "streamed"}),
    "structure, mixtures, rows from disk": (
        3,
        {
            "objective": "structure",
            "structure__rows": "both",
            "structure__warmup": 6,
            "fusemix__alpha": 1.0,
            "batch__pairs": 46,
            "data__resident": "never",
        },
    ),
    "sclip": (3, {"objective": "sclip"}),
    "sclip, by blocks, joint space": (
        4,
        {"objective": "sclip", "sclip__space": "joint", "loss__memory": "streamed"},
    ),
    "sclip, hard labels of texts, rows from disk": (
        3,
        {
            "objective": "sclip",
            "sclip__labels": "hard",
            "sclip__sides": "text",
            "data__resident": "never",
        },
    ),
    "nnclr": (4, {"objective": "nnclr"}),
    "nnclr, mixtures, rows from disk": (
        3,
        {
            "objective": "nnclr",
            "nnclr__stop_gradient": True,
            "fusemix__alpha": 1.0,
            "batch__pairs": 46,
            "data__resident": "never",
        },
    ),
    "structure by levels": (4, {"objective": "structure", "structure__levels": 2}),
    "sail_semi, mixtures of rolled pairs": (
        4,
        {
            "objective": "sail_semi",
            "fusemix__alpha": 0.5,
            "fusemix__partners": "roll",
            "fusemix__per_row": True,
        },
    ),
}


SAMPLE = (
    "klot",
    "klot streamed, rows from disk",
    "sail_semi",
)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in SAMPLE else pytest.mark.slow) for c in CASES]
)
def test_equals_one_device(case, tmp_path):
    devices, fields = CASES[case]
    one = fields | {"data__resident": "always"}  # wherever the mesh has its rows from
    assert_close(run(tmp_path / "one", 1, **one), run(tmp_path / "mesh", devices, **fields))


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    fields = {"checkpoint_every": 4, "make": from_teacher}
    through = run(tmp_path / "through", 1, **fields)
    cut = tmp_path / "cut"
    with pytest.raises(FloatingPointError):
        run_until_nan(cut, 4, fields)
    assert not (cut / "results.json").exists()
    assert_close(through, run(cut, 2, **fields))


def run_until_nan(path, devices, fields):
    """A run that breaks off in its last dispatch, after the checkpoint of step 8."""
    from sotalign_jax.training import record

    whole = record.checked_means

    def breaking(metrics, step):
        if step == 12:
            raise FloatingPointError("stop here")
        return whole(metrics, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "checked_means", breaking)
        run(path, devices, **fields)


class TestDevices:
    def mesh(self, count):
        return make_mesh(validate(tiny(mesh__devices=count)))

    def test_how_many(self):
        assert self.mesh(1) is None
        assert self.mesh(3).size == 3
        assert self.mesh(0).size == jax.device_count()
        with pytest.raises(ConfigError, match=r"config.mesh.devices: 99 asked, but there are"):
            self.mesh(99)

    @pytest.mark.parametrize("rows", [0, 1, 7, 8, 9])
    def test_rows_are_placed_with_zeros_after_them(self, rows):
        mesh = self.mesh(4)
        table = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
        placed = place(table.__getitem__, rows, 3, mesh)
        assert placed.shape == (padded(rows, mesh), 3) and padded(rows, mesh) % 4 == 0
        np.testing.assert_array_equal(np.asarray(placed)[:rows], table)
        assert not np.asarray(placed)[rows:].any()
        assert {s.data.shape[0] for s in placed.addressable_shards} == {padded(rows, mesh) // 4}
        assert share(rows, mesh) == slice(0, rows) == share(rows, None)

    def test_tables(self):
        table = FeatureTable.from_array(np.arange(10.0, dtype=np.float32).reshape(5, 2))
        assert place_table(None, None) is None
        np.testing.assert_array_equal(place_table(table, None), table.array())
        np.testing.assert_array_equal(
            np.asarray(place_table(table, self.mesh(2)))[:5], table.array()
        )

    @pytest.mark.parametrize("count", [1, 5, 16])
    def test_take_rows(self, count):
        mesh = self.mesh(4)
        table = np.random.default_rng(1).normal(size=(10, 3)).astype(np.float32)
        rows = np.random.default_rng(2).integers(10, size=count).astype(np.int32)
        spec = jax.sharding.PartitionSpec
        taken = jax.shard_map(
            take_rows, mesh=mesh, in_specs=(spec("rows"), spec()), out_specs=spec("rows")
        )(place(table.__getitem__, 10, 3, mesh), rows)
        np.testing.assert_array_equal(np.asarray(taken)[:count], table[rows])
        assert not np.asarray(taken)[count:].any()

    @pytest.mark.parametrize("count", [1, 5, 10])
    def test_put_rows_is_the_way_back(self, count):
        mesh = self.mesh(4)
        rng = np.random.default_rng(3)
        vector = rng.normal(size=10).astype(np.float32)
        rows = rng.permutation(10)[:count].astype(np.int32)
        new = rng.normal(size=count).astype(np.float32)
        spec = jax.sharding.PartitionSpec
        put = jax.shard_map(
            put_rows, mesh=mesh, in_specs=(spec(AXIS), spec(), spec(AXIS)), out_specs=spec(AXIS)
        )(place_vector(vector, mesh), rows, place_vector(new, mesh))
        expected = vector.copy()
        expected[rows] = new
        np.testing.assert_array_equal(np.asarray(put), np.r_[expected, 0, 0])
        assert {shard.data.shape for shard in put.addressable_shards} == {(3,)}

    @pytest.mark.parametrize(("before", "after"), [(4, 3), (3, 4), (4, 1), (1, 4)])
    def test_potentials_are_restored_on_other_devices(self, before, after, tmp_path):
        vector = np.random.default_rng(4).normal(size=10).astype(np.float32)

        def state(count, values):
            potentials = RowPotentials(place_vector(values, self.mesh(count)))
            return TrainState({"w": jnp.ones(3)}, (), jnp.asarray(5), potentials)

        checkpoints = Checkpoints(tmp_path, keep_best=False)
        checkpoints.save(state(before, vector))
        restored = checkpoints.restore(state(after, jnp.zeros(10)), 5)
        checkpoints.close()
        kept = np.asarray(restored.potentials.student)
        assert len(kept) == padded(10, self.mesh(after))
        np.testing.assert_array_equal(kept[:10], vector)
        assert not kept[10:].any() and restored.potentials.teacher is None

    @pytest.mark.parametrize("width", [2, 4])
    def test_parameters_of_another_shape_are_refused(self, width, tmp_path):
        def state(width):
            return TrainState({"w": jnp.ones((width, 3))}, (), jnp.asarray(5))

        checkpoints = Checkpoints(tmp_path, keep_best=False)
        checkpoints.save(state(3))
        message = rf"params.w of step 5 in .* has shape \(3, 3\), and this run needs \({width}, 3\)"
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(state(width), 5)
        with pytest.raises(ValueError, match=r"opt_state.0 of step 5 .* has shape None"):
            checkpoints.restore(state(3)._replace(opt_state=(jnp.ones(2),)), 5)
        checkpoints.close()
