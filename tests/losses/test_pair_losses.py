import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sotalign_jax.losses import info_nce, one_sided_info_nce, siglip
from sotalign_jax.losses.affinity import check_same_rows, cosine_affinity


def draw(n, m, d=5, seed=0):
    generator = np.random.default_rng(seed)
    return tuple(3 * generator.normal(size=(size, d)).astype(np.float32) for size in (n, m))


def orthogonal_sides(n):
    """Images and texts all of whose cosines are 0."""
    return np.tile(np.float32([[1, 0]]), (n, 1)), np.tile(np.float32([[0, 3]]), (n, 1))


def siglip_in_numpy(image, text, scale=20.0, bias=-10.0, normalization="mean"):
    logits = scale * reference.cosines(image, text) + bias
    targets = np.where(np.arange(len(image))[:, None] == np.arange(len(text)), 1.0, -1.0)
    total = np.logaddexp(0.0, -targets * logits).sum()
    return total / (logits.size if normalization == "mean" else min(logits.shape))


def info_nce_in_numpy(image, text, scale):
    logits = scale * reference.cosines(image, text)
    own = np.diagonal(logits)
    rows, columns = (np.mean(reference.logsumexp(logits, axis) - own) for axis in (1, 0))
    return (rows + columns) / 2


def one_sided_in_numpy(anchors, candidates, scale):
    logits = scale * reference.cosines(anchors, candidates)
    return np.mean(reference.logsumexp(logits, 1) - np.diagonal(logits))


def check_gradient(loss, truth, image, text, side, rtol=1e-3):
    """Directional derivative of ``loss`` against central differences of ``truth`` in float64."""
    gradient = np.asarray(jax.grad(loss, side)(image, text), np.float64)
    parts = [image.astype(np.float64), text.astype(np.float64)]
    direction = np.random.default_rng(9).normal(size=parts[side].shape)
    ends = []
    for sign in (1, -1):
        moved = list(parts)
        moved[side] = parts[side] + sign * 1e-5 * direction
        ends.append(truth(*moved))
    slope = (ends[0] - ends[1]) / 2e-5
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=rtol, atol=1e-6)


class TestSiglip:
    @pytest.mark.parametrize("n,mean,rows", [(1_000, 0.010045, 10.05)])
    def test_published_start_values(self, n, mean, rows):
        image, text = orthogonal_sides(n)
        np.testing.assert_allclose(siglip(image, text), mean, rtol=1e-4)
        np.testing.assert_allclose(siglip(image, text, normalization="rows"), rows, rtol=1e-3)

    @pytest.mark.parametrize("n,mean,rows", [(10_000, 0.0010454, 10.45), (32_768, 3.506e-4, 11.49)])
    def test_published_start_values_of_large_batches(self, n, mean, rows):
        # At cosine 0 the loss of n pairs follows from that of 2: one positive, n - 1 negatives.
        image, text = orthogonal_sides(2)
        both = float(siglip(image, text, normalization="rows"))
        positive = np.logaddexp(0, 10)
        total = positive + (both - positive) * (n - 1)
        np.testing.assert_allclose([total / n, total], [mean, rows], rtol=1e-3)

    @pytest.mark.parametrize("n,m", [(9, 9), (9, 15), (15, 9), (1, 1), (1, 6)])
    @pytest.mark.parametrize("normalization", ["mean", "rows"])
    def test_value_and_gradient(self, n, m, normalization):
        image, text = draw(n, m)
        options = {"scale": 7.0, "bias": -2.0, "normalization": normalization}

        def loss(image, text):
            return siglip(image, text, **options)

        def truth(image, text):
            return siglip_in_numpy(image, text, **options)

        np.testing.assert_allclose(loss(image, text), truth(image, text), rtol=1e-5)
        for side in (0, 1):
            check_gradient(loss, truth, image, text, side)

    @pytest.mark.parametrize("block", [1, 4, 9, 20])
    @pytest.mark.parametrize("n,m", [(9, 15), (15, 9)])
    def test_blocks_and_masks(self, n, m, block):
        image, text = draw(n, m)
        options = {"scale": 7.0, "bias": -2.0, "normalization": "rows"}
        for keep_n, keep_m in ((n, m), (n - 2, m - 1)):
            masks = {"image_mask": np.arange(n) < keep_n, "text_mask": np.arange(m) < keep_m}

            def loss(image, text, masks=masks):
                return siglip(image, text, **options, **masks, block=block)

            def truth(image, text, keep_n=keep_n, keep_m=keep_m):
                return siglip_in_numpy(image[:keep_n], text[:keep_m], **options)

            np.testing.assert_allclose(loss(image, text), truth(image, text), rtol=1e-5)
            for side in (0, 1):
                check_gradient(loss, truth, image, text, side)

    def test_blocks_hold_no_matrix(self):
        image, text = draw(211, 157)
        f = jax.jit(jax.grad(lambda i, t: siglip(i, t, block=16)))
        compiled = f.lower(image, text).compile().as_text()
        assert "[16,157]" in compiled and "[211,157]" not in compiled

    @pytest.mark.parametrize("shape,names", [((8,), ("r",)), ((4, 2), ("r", "s"))])
    @pytest.mark.parametrize("n,m", [(16, 16), (13, 19), (13, 13)])
    def test_sharded_equals_numpy(self, shape, names, n, m):
        image, text = draw(n, m)
        padded = np.concatenate([image, np.zeros((16 - n, image.shape[1]), np.float32)])
        mask = np.arange(16) < n
        mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))

        def local(image, text, mask, scale):
            return siglip(image, text, scale=scale, image_mask=mask, axis_name=names, block=1)

        f = jax.shard_map(local, mesh=mesh, in_specs=(P(names), P(), P(names), P()), out_specs=P())
        value, gradients = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 3)))(
            padded, text, mask, jnp.float32(20.0)
        )
        one = jax.grad(lambda i, t, s: siglip(i, t, scale=s), argnums=(0, 1, 2))(
            image, text, jnp.float32(20.0)
        )
        np.testing.assert_allclose(value, siglip_in_numpy(image, text), rtol=1e-5)
        for found, expected in zip((gradients[0][:n], *gradients[1:]), one, strict=True):
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)

    def test_a_bad_block_is_named(self):
        with pytest.raises(ValueError, match="block must be at least 1, got 0"):
            siglip(*draw(4, 4), block=0)

    def test_scale_and_bias_are_learned(self):
        image, text = draw(9, 9)
        found = jax.grad(lambda p: siglip(image, text, scale=p[0], bias=p[1]))((20.0, -10.0))
        for place, gradient in enumerate(found):
            ends = []
            for sign in (1, -1):
                values = [20.0, -10.0]
                values[place] += sign * 1e-5
                ends.append(siglip_in_numpy(image, text, *values))
            np.testing.assert_allclose(gradient, (ends[0] - ends[1]) / 2e-5, rtol=1e-4)

    def test_large_logits_stay_finite(self):
        image, text = draw(6, 6)
        value, gradient = jax.value_and_grad(lambda i: siglip(i, text, scale=1e4))(image)
        np.testing.assert_allclose(value, siglip_in_numpy(image, text, scale=1e4), rtol=1e-5)
        assert np.isfinite(gradient).all()

    def test_vmap_jit_and_dtypes(self):
        batches = [draw(6, 8, seed=seed) for seed in range(3)]
        values = jax.jit(jax.vmap(siglip))(*map(np.stack, zip(*batches, strict=True)))
        truths = [siglip_in_numpy(*batch) for batch in batches]
        np.testing.assert_allclose(values, truths, rtol=1e-5)
        for dtype in (jnp.bfloat16, np.float16, np.float64):
            parts = [part.astype(dtype) for part in batches[0]]
            value = siglip(*parts)
            assert value.dtype == jnp.float32
            np.testing.assert_allclose(value, siglip_in_numpy(*parts), rtol=1e-5)

    def test_unknown_normalization(self):
        with pytest.raises(ValueError, match="normalization"):
            inspect.unwrap(siglip)(*draw(3, 3), normalization="sum")


class TestInfoNCE:
    @pytest.mark.parametrize("n", [1, 7, 300])
    def test_log_n_when_nothing_is_told_apart(self, n):
        same = np.ones((n, 3), np.float32)
        np.testing.assert_allclose(info_nce(same, same), np.log(n), rtol=1e-6, atol=1e-6)

    def test_value_and_gradient(self):
        image, text = draw(9, 9)

        def loss(image, text):
            return info_nce(image, text, scale=5.0)

        def truth(image, text):
            return info_nce_in_numpy(image, text, 5.0)

        np.testing.assert_allclose(loss(image, text), truth(image, text), rtol=1e-5)
        np.testing.assert_allclose(
            info_nce(image, text), info_nce_in_numpy(image, text, 1 / 0.07), rtol=1e-5
        )
        for side in (0, 1):
            check_gradient(loss, truth, image, text, side)

    @settings(deadline=None, max_examples=20)
    @given(seed=st.integers(0, 2**16))
    def test_neither_order_nor_side_nor_length_matters(self, seed):
        image, text = draw(8, 8, seed=seed)
        order = np.random.default_rng(seed).permutation(8)
        value = float(info_nce(image, text))
        np.testing.assert_allclose(info_nce(image[order], text[order]), value, rtol=1e-5)
        np.testing.assert_allclose(info_nce(text, image), value, rtol=1e-5)
        np.testing.assert_allclose(info_nce(100 * image, 0.01 * text), value, rtol=1e-5)
        # A hundred times the scale of any of these cosines still neither overflows nor errs.
        truth = info_nce_in_numpy(image, text, 1000.0)
        np.testing.assert_allclose(info_nce(image, text, scale=1000.0), truth, rtol=1e-5)

    def test_rows_must_pair(self):
        with pytest.raises(ValueError, match="image and text"):
            inspect.unwrap(info_nce)(*draw(4, 5))

    def test_by_parts_of_bfloat16(self):
        image, text = draw(9, 9)
        value = info_nce(image, text, scale=5.0, precision="bfloat16_3x")
        np.testing.assert_allclose(value, info_nce_in_numpy(image, text, 5.0), rtol=1e-4)
        with pytest.raises(ValueError, match="precision must be"):
            inspect.unwrap(info_nce)(image, text, precision="bfloat16")


class TestOneSidedInfoNCE:
    @pytest.mark.parametrize("block", [None, 4])
    def test_further_candidates_and_padding(self, block):
        anchors, candidates = draw(9, 15)
        for keep_n, keep_m in ((9, 15), (7, 12)):
            masks = {
                "anchor_mask": np.arange(9) < keep_n,
                "candidate_mask": np.arange(15) < keep_m,
            }

            def loss(anchors, candidates, masks=masks):
                return one_sided_info_nce(anchors, candidates, scale=5.0, **masks, block=block)

            def truth(anchors, candidates, keep_n=keep_n, keep_m=keep_m):
                return one_sided_in_numpy(anchors[:keep_n], candidates[:keep_m], 5.0)

            np.testing.assert_allclose(
                loss(anchors, candidates), truth(anchors, candidates), rtol=1e-5
            )
            for side in (0, 1):
                check_gradient(loss, truth, anchors, candidates, side)

    def test_both_directions_are_info_nce(self):
        image, text = draw(9, 9)
        both = one_sided_info_nce(image, text) + one_sided_info_nce(text, image)
        np.testing.assert_allclose(both / 2, info_nce(image, text), rtol=1e-5)

    def test_scale_is_learned(self):
        anchors, candidates = draw(9, 15)
        found = jax.grad(lambda s: one_sided_info_nce(anchors, candidates, scale=s, block=4))(8.0)
        high, low = (one_sided_in_numpy(anchors, candidates, 8.0 + h) for h in (1e-5, -1e-5))
        np.testing.assert_allclose(found, (high - low) / 2e-5, rtol=1e-4)

    def test_blocks_hold_no_matrix(self):
        anchors, candidates = draw(157, 211)
        f = jax.jit(jax.grad(lambda a, c: one_sided_info_nce(a, c, block=16)))
        compiled = f.lower(anchors, candidates).compile().as_text()
        assert "[16,211]" in compiled and "[157,211]" not in compiled

    def test_sharded_equals_one_device(self):
        n, m = 13, 19
        anchors, candidates = draw(n, m)
        padded = np.concatenate([anchors, np.ones((16 - n, anchors.shape[1]), np.float32)])
        mask = np.arange(16) < n
        mesh = jax.make_mesh((4,), ("r",), axis_types=(AxisType.Auto,))

        def local(anchors, candidates, mask, scale):
            return one_sided_info_nce(
                anchors, candidates, scale=scale, anchor_mask=mask, axis_name="r", block=3
            )

        f = jax.shard_map(local, mesh=mesh, in_specs=(P("r"), P(), P("r"), P()), out_specs=P())
        value, gradients = jax.jit(jax.value_and_grad(f, argnums=(0, 1, 3)))(
            padded, candidates, mask, jnp.float32(9.0)
        )
        one = jax.grad(lambda a, c, s: one_sided_info_nce(a, c, scale=s), argnums=(0, 1, 2))(
            anchors, candidates, jnp.float32(9.0)
        )
        np.testing.assert_allclose(value, one_sided_in_numpy(anchors, candidates, 9.0), rtol=1e-5)
        assert not gradients[0][n:].any()
        for found, expected in zip((gradients[0][:n], *gradients[1:]), one, strict=True):
            assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)

    @pytest.mark.parametrize(
        "n,m,options,message",
        [
            (5, 4, {}, "candidate must have a row for each of the 5 anchors, got 4"),
            (4, 4, {"block": 0}, "block must be at least 1, got 0"),
            (4, 4, {"precision": "float16"}, "precision must be"),
        ],
    )
    def test_bad_input(self, n, m, options, message):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(one_sided_info_nce)(*draw(n, m), **options)


class TestAffinity:
    def test_cosines_in_float32(self):
        image, text = draw(6, 4)
        for dtype in (jnp.bfloat16, np.float16, np.float32, np.float64):
            parts = image.astype(dtype), text.astype(dtype)
            affinity = cosine_affinity(*parts)
            assert affinity.dtype == jnp.float32
            np.testing.assert_allclose(affinity, reference.cosines(*parts), atol=1e-6)

    def test_one_dimension(self):
        with pytest.raises(ValueError, match="image and text"):
            inspect.unwrap(cosine_affinity)(np.ones((3, 4)), np.ones((3, 5)))

    def test_same_rows(self):
        good = [np.ones(size) for size in ((3, 4), (5, 4), (3, 2), (5, 2))]
        check_same_rows(*good)
        for side, name in ((2, "teacher_image"), (3, "teacher_text")):
            bad = list(good)
            bad[side] = np.ones((7, 2))
            with pytest.raises(ValueError, match=name):
                check_same_rows(*bad)
            bad[side] = np.ones(7)
            with pytest.raises(ValueError, match=name):
                check_same_rows(*bad)
