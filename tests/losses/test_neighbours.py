import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sotalign_jax.losses import choose_neighbours, nearest_neighbours, neighbour_siglip, siglip
from sotalign_jax.losses.neighbours import Neighbours, _merged


def draw(q=7, n=40, e=5, seed=0):
    generator = np.random.default_rng(seed)
    return tuple(
        (generator.normal(size=(rows, e)) * generator.uniform(0.1, 20, (rows, 1))).astype(
            np.float32
        )
        for rows in (q, n)
    )


def neighbours_in_numpy(query, table, k, exclude=None, drop=True):
    """All cosines, and what may not count taken out row by row."""
    cosines = reference.cosines(query, table)
    for i in range(len(query)):
        for j in range(len(table)):
            twin = exclude is not None and exclude[i] >= 0 and (table[j] == table[exclude[i]]).all()
            if drop and ((table[j] == query[i]).all() or twin):
                cosines[i, j] = -np.inf
            if drop and any((table[j] == earlier).all() for earlier in table[:j]):
                cosines[i, j] = -np.inf
            if exclude is not None and j == exclude[i]:
                cosines[i, j] = -np.inf
    return np.argsort(-cosines, axis=1, kind="stable")[:, :k], cosines


class TestNearestNeighbours:
    @pytest.mark.parametrize("k", [1, 5, 40])
    @pytest.mark.parametrize("block", [1, 3, 8, 40, 4096])
    def test_against_all_cosines(self, k, block):
        query, table = draw()
        found = nearest_neighbours(query, table, k, block=block)
        rows, cosines = neighbours_in_numpy(query, table, k)
        np.testing.assert_array_equal(found.rows, rows)
        np.testing.assert_allclose(
            found.cosines, np.take_along_axis(cosines, rows, 1), rtol=1e-5, atol=1e-6
        )
        assert found.rows.dtype == jnp.int32 and found.cosines.dtype == jnp.float32

    @settings(deadline=None, max_examples=25)
    @given(
        seed=st.integers(0, 2**16),
        block=st.sampled_from([1, 4, 30]),
        drop=st.booleans(),
        excluding=st.booleans(),
    )
    def test_duplicates_and_ties(self, seed, block, drop, excluding):
        # Rows of small integers, of which many are equal and more have equal cosines.
        generator = np.random.default_rng(seed)
        axes = np.float32([[1, 0], [0, 1], [-1, 0], [0, -1], [2, 0], [0, 2], [-2, 0], [0, -2]])
        query, table = axes[generator.integers(0, 8, 6)], axes[generator.integers(0, 8, 30)]
        exclude = generator.integers(-1, 30, 6) if excluding else None
        truth, cosines = neighbours_in_numpy(query, table, 2, exclude, drop)
        fewest = np.isfinite(cosines).sum(1).min()
        duplicates = "drop" if drop else "keep"

        def find(k):
            return nearest_neighbours(
                query, table, k, exclude=exclude, duplicates=duplicates, block=block
            )

        np.testing.assert_array_equal(find(2).rows, truth)
        if fewest < 30:
            with pytest.raises(ValueError, match=f"k={fewest + 1} is too large"):
                find(int(fewest) + 1)
        at = np.asarray(find(int(fewest)).rows)
        assert np.isfinite(np.take_along_axis(cosines, at, 1)).all()
        assert all(len(set(row)) == fewest for row in at)

    def test_a_caption_that_many_share(self):
        query, table = draw()
        table[[3, 11, 12, 39]] = query[2]
        table[[5, 6, 30]] = table[4] = query[2] + np.float32(0.01)
        kept = nearest_neighbours(query, table, 5, duplicates="keep").rows[2]
        np.testing.assert_array_equal(kept, [3, 11, 12, 39, 4])
        without = nearest_neighbours(query, table, 2, duplicates="keep", exclude=np.full(7, 3))
        np.testing.assert_array_equal(without.rows[2], [11, 12])
        dropped = np.asarray(nearest_neighbours(query, table, 33).rows[2])
        assert dropped[0] == 4 and not {3, 11, 12, 39, 5, 6, 30} & set(dropped.tolist())
        for exclude in (4, 6):  # whichever copy is the query itself, all are
            found = nearest_neighbours(query, table, 32, exclude=np.full(7, exclude)).rows[2]
            np.testing.assert_array_equal(found, dropped[1:])

    def test_equal_as_float32_whatever_the_dtype_and_the_sign_of_zero(self):
        query, table = (rows.astype(np.float16) for rows in draw())
        table[9] = query[0]
        table[9, 2], query[0, 2] = 0.0, -0.0
        found = nearest_neighbours(query[:1].astype(np.float32), table, 39)
        assert 9 not in np.asarray(found.rows)
        assert 9 in np.asarray(nearest_neighbours(query[1:2], table, 40).rows)

    def test_tables_on_disk_and_on_the_device(self, tmp_path):
        query, table = draw()
        np.save(tmp_path / "table.npy", table)
        truth = nearest_neighbours(query, table, 3)
        on_disk = np.load(tmp_path / "table.npy", mmap_mode="r")
        for form in (on_disk, jnp.asarray(table)):
            found = nearest_neighbours(jnp.asarray(query), form, 3, block=16)
            np.testing.assert_array_equal(found.rows, truth.rows)

    def test_a_table_that_gives_slices_and_a_view_of_rows(self):
        query, table = draw()
        table[9] = table[4] = query[0]
        shift = np.float32([[1, 2, 0, 0, 3]])

        class OnDisk:
            shape = table.shape

            def __getitem__(self, index):
                return table[index]

        found = nearest_neighbours(query, OnDisk(), 3, view=lambda rows: rows + shift, block=16)
        cosines = reference.cosines(query + shift, table + shift)
        _, plain = neighbours_in_numpy(query, table, 3)  # whose are duplicates
        cosines = np.where(np.isinf(plain), -np.inf, cosines)
        truth = np.argsort(-cosines, axis=1, kind="stable")[:, :3]
        np.testing.assert_array_equal(found.rows, truth)
        np.testing.assert_allclose(
            found.cosines, np.take_along_axis(cosines, truth, 1), rtol=1e-5, atol=1e-6
        )

    def test_blocks_bound_the_memory(self):
        q, block, k = 211, 16, 3
        best = Neighbours(jnp.zeros((q, k), jnp.int32), jnp.zeros((q, k)))
        query, rows = jnp.ones((q, 5)), jnp.ones((block, 5))
        arguments = (best, query, jnp.zeros((q, 1), jnp.int32), rows, jnp.ones(block, bool))
        compiled = _merged.lower(*arguments, np.int32(0)).compile().as_text()
        assert f"[{block},{block}]" in compiled and f"[{q},{block}]" not in compiled

    @pytest.mark.parametrize(
        "change,options,message",
        [
            ({}, {"k": 0}, "k must lie between 1 and the 40 rows of table, got 0"),
            ({}, {"k": 41}, "k must lie between 1 and the 40 rows of table, got 41"),
            ({}, {"k": 40, "exclude": np.arange(7)}, "k=40 is too large: of the 40 rows"),
            ({}, {"block": 0}, "block must be at least 1"),
            ({}, {"duplicates": "some"}, "duplicates must be 'drop' or 'keep'"),
            ({}, {"exclude": np.arange(6)}, "exclude must have one entry a query"),
            ({}, {"exclude": np.full(7, 40)}, "entry 0 is 40"),
            ({}, {"exclude": np.full(7, -2)}, "entry 0 is -2"),
            ({"table": 0.0}, {}, "table row 33 has no direction"),
            ({"table": np.nan}, {"duplicates": "keep"}, "table row 33 has no direction"),
            ({"query": np.inf}, {}, "query row 6 has no direction"),
        ],
    )
    def test_bad_input(self, change, options, message):
        query, table = draw()
        if "table" in change:
            table[33] = change["table"]
        if "query" in change:
            query[6, 1] = change["query"]
        with pytest.raises(ValueError, match=re.escape(message)):
            inspect.unwrap(nearest_neighbours)(query, table, **options)

    def test_bad_shapes_and_traced_arrays(self):
        query, table = draw()
        with pytest.raises(ValueError, match="table must have the dimension of query, 5, got 4"):
            inspect.unwrap(nearest_neighbours)(query, table[:, :4])
        with pytest.raises(ValueError, match="query must be a matrix of rows, got shape"):
            inspect.unwrap(nearest_neighbours)(query[0], table)
        with pytest.raises(ValueError, match="outside of jit"):
            jax.jit(lambda rows: nearest_neighbours(query, rows).rows)(table)


class TestChooseNeighbours:
    def test_each_as_likely(self, rng):
        rows = np.arange(20_000 * 4).reshape(20_000, 4).astype(np.int32)
        chosen = np.asarray(choose_neighbours(rng, rows))
        np.testing.assert_array_equal(chosen // 4, np.arange(20_000))
        np.testing.assert_allclose(np.bincount(chosen % 4) / 20_000, 0.25, atol=0.02)
        again = choose_neighbours(jax.random.fold_in(rng, 1), rows)
        assert 0.2 < np.mean(np.asarray(again) == chosen) < 0.3

    def test_jit_and_the_only_one(self, rng):
        rows = np.int32([[7], [3]])
        np.testing.assert_array_equal(jax.jit(choose_neighbours)(rng, rows), [7, 3])


def siglip_in_numpy(image, text, scale, bias):
    logits = scale * reference.cosines(image, text) + bias
    targets = 2 * np.eye(len(image)) - 1
    return np.mean(np.logaddexp(0, -targets * logits))


def pairs(n=6, d=5, seed=0):
    generator = np.random.default_rng(seed)
    return [3 * generator.normal(size=(n, d)).astype(np.float32) for _ in range(4)]


def neighbour_in_numpy(image, text, text_neighbour, image_neighbour, weights, scale=7.0, bias=-2.0):
    first = siglip_in_numpy(image, text_neighbour, scale, bias)
    second = siglip_in_numpy(text, image_neighbour, scale, bias)
    return weights[0] * first + weights[1] * second


class TestNeighbourSiglip:
    @pytest.mark.parametrize("weights", [(1.0, 1.0), (0.1, 10.0), (0.0, 1.0), (1.0, 0.0)])
    @pytest.mark.parametrize("block", [None, 4])
    def test_value_and_gradient(self, weights, block):
        parts = pairs()

        def loss(image, text, text_neighbour, image_neighbour):
            return neighbour_siglip(
                image,
                text,
                text_neighbour=text_neighbour,
                image_neighbour=image_neighbour,
                text_weight=weights[0],
                image_weight=weights[1],
                scale=7.0,
                bias=-2.0,
                block=block,
            )

        value, gradients = jax.value_and_grad(loss, (0, 1, 2, 3))(*parts)
        np.testing.assert_allclose(value, neighbour_in_numpy(*parts, weights), rtol=1e-5)
        for side, gradient in enumerate(gradients):
            direction = np.random.default_rng(9).normal(size=parts[side].shape)
            ends = []
            for sign in (1, -1):
                moved = [part.astype(np.float64) for part in parts]
                moved[side] += sign * 1e-5 * direction
                ends.append(neighbour_in_numpy(*moved, weights))
            along = np.sum(np.asarray(gradient, np.float64) * direction)
            np.testing.assert_allclose(along, (ends[0] - ends[1]) / 2e-5, rtol=2e-3, atol=1e-6)

    def test_neighbours_that_are_the_pairs_themselves(self):
        image, text, *_ = pairs()
        value = neighbour_siglip(image, text, text_neighbour=text, image_neighbour=image)
        np.testing.assert_allclose(value, 2 * siglip(image, text), rtol=1e-6)

    def test_one_side(self):
        image, text, text_neighbour, image_neighbour = pairs()
        first = neighbour_siglip(image, text, text_neighbour=text_neighbour)
        np.testing.assert_allclose(first, siglip(image, text_neighbour), rtol=1e-6)
        second = neighbour_siglip(image, text, image_neighbour=image_neighbour, image_weight=3.0)
        np.testing.assert_allclose(second, 3 * siglip(image_neighbour, text), rtol=1e-6)
        nothing = neighbour_siglip(image, text, text_neighbour=text_neighbour, text_weight=0.0)
        assert nothing == 0 and nothing.dtype == jnp.float32

    @pytest.mark.parametrize("normalization", ["mean", "rows"])
    def test_sharded_and_masked(self, normalization):
        parts = pairs(13)
        padded = [np.concatenate([part, np.ones((3, 5), np.float32)]) for part in parts]
        mask = np.arange(16) < 13
        mesh = jax.make_mesh((8,), ("r",), axis_types=(AxisType.Auto,))

        def local(image, text, text_neighbour, image_neighbour, image_mask):
            return neighbour_siglip(
                image,
                text,
                text_neighbour=text_neighbour,
                image_neighbour=image_neighbour,
                normalization=normalization,
                image_mask=image_mask,
                text_mask=mask,
                axis_name="r",
            )

        sharded = jax.shard_map(
            local, mesh=mesh, in_specs=(P("r"), P(), P(), P("r"), P("r")), out_specs=P()
        )
        truth = neighbour_in_numpy(*parts, (1.0, 1.0), 20.0, -10.0)
        truth *= 13 if normalization == "rows" else 1
        np.testing.assert_allclose(jax.jit(sharded)(*padded, mask), truth, rtol=1e-5)

    def test_weights_of_a_program(self):
        parts = pairs()

        @jax.jit
        def loss(weights):
            image, text, *near = parts
            return neighbour_siglip(
                image,
                text,
                text_neighbour=near[0],
                image_neighbour=near[1],
                text_weight=weights[0],
                image_weight=weights[1],
                scale=7.0,
                bias=-2.0,
            )

        for weights in ((0.1, 10.0), (0.0, 1.0)):
            truth = neighbour_in_numpy(*parts, weights)
            np.testing.assert_allclose(loss(weights), truth, rtol=1e-5)

    def test_vmap_jit_and_dtypes(self):
        batches = [pairs(seed=seed) for seed in range(3)]

        def loss(image, text, text_neighbour, image_neighbour):
            return neighbour_siglip(
                image, text, text_neighbour=text_neighbour, image_neighbour=image_neighbour
            )

        values = jax.jit(jax.vmap(loss))(*map(np.stack, zip(*batches, strict=True)))
        truths = [neighbour_in_numpy(*parts, (1.0, 1.0), 20.0, -10.0) for parts in batches]
        np.testing.assert_allclose(values, truths, rtol=1e-4)
        for dtype in (jnp.bfloat16, np.float16, np.float64):
            assert loss(*[part.astype(dtype) for part in batches[0]]).dtype == jnp.float32

    def test_bad_input(self):
        image, text, text_neighbour, image_neighbour = pairs()
        call = inspect.unwrap(neighbour_siglip)
        with pytest.raises(ValueError, match="text_neighbour or image_neighbour must be given"):
            call(image, text)
        with pytest.raises(ValueError, match="pair row by row, got 5 and 6"):
            call(image[:-1], text, text_neighbour=text_neighbour)
        with pytest.raises(ValueError, match="text_weight must not be negative"):
            call(image, text, text_neighbour=text_neighbour, text_weight=-1.0)
        with pytest.raises(ValueError, match="image_weight must not be negative"):
            call(image, text, image_neighbour=image_neighbour, image_weight=float("nan"))
        with pytest.raises(ValueError, match="text_neighbour must have one row for each text"):
            call(image, text, text_neighbour=text_neighbour[:-1])
        with pytest.raises(ValueError, match="image_neighbour must have one row for each image"):
            call(image, text, image_neighbour=image_neighbour[:-1])
