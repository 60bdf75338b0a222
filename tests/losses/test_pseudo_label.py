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

from sotalign_jax.losses import info_nce_divergence, pseudo_label, pseudo_label_targets

KINDS = ["hard", "soft", "ot"]


def draw(u=8, n=6, d=5, e=4, seed=0):
    """Unpaired rows, partners, and the two views, of uneven lengths."""
    generator = np.random.default_rng(seed)
    parts = []
    for rows, columns in ((u, d), (n, d), (u, e), (n, e)):
        part = generator.normal(size=(rows, columns))
        parts.append((part * generator.uniform(0.1, 20, (rows, 1))).astype(np.float32))
    return parts


def targets_in_numpy(unpaired, paired, labels, scale, iterations=None):
    cosines = reference.cosines(unpaired, paired)
    if labels == "hard":
        return np.eye(len(paired))[cosines.argmax(1)]
    if labels == "soft":
        scores = scale * cosines
        return np.exp(scores - reference.logsumexp(scores, 1)[:, None])
    plan = reference.sinkhorn(cosines, 1 / scale, iterations=iterations)
    return plan / plan.sum(1, keepdims=True)


def published_plan(cosines, scale, iterations=10):
    """Ten plain, not logarithmic, Sinkhorn iterations on the cost, columns first."""
    kernel = np.exp(-(1 - cosines) * scale)
    rows, columns = kernel.shape
    u = np.full(rows, 1 / rows)
    for _ in range(iterations):
        v = (1 / columns) / (kernel.T @ u)
        u = (1 / rows) / (kernel @ v)
    plan = u[:, None] * kernel * v[None, :]
    return plan / plan.sum(1, keepdims=True)


def pseudo_label_in_numpy(unpaired, partners, targets, scale):
    scores = scale * reference.cosines(unpaired, partners)
    return -np.mean(np.sum(targets * (scores - reference.logsumexp(scores, 1)[:, None]), 1))


def check_gradients(gradients, truth, start):
    """Slopes along random directions, against central differences of ``truth`` in float64."""
    start = [np.asarray(part, np.float64) for part in start]
    for at, gradient in enumerate(gradients):
        direction = np.random.default_rng(9).normal(size=start[at].shape)
        ends = []
        for step in (1e-5, -1e-5):
            moved = list(start)
            moved[at] = start[at] + step * direction
            ends.append(truth(*moved))
        found = np.sum(np.asarray(gradient, np.float64) * direction)
        np.testing.assert_allclose(found, (ends[0] - ends[1]) / 2e-5, rtol=2e-3, atol=1e-5)


class TestTargets:
    @pytest.mark.parametrize("labels", KINDS)
    @pytest.mark.parametrize("u,n", [(8, 6), (5, 12), (1, 3), (3, 1)])
    def test_against_numpy(self, labels, u, n):
        _, _, unpaired, paired = draw(u, n)
        found = pseudo_label_targets(unpaired, paired, labels=labels, scale=10.0, threshold=1e-6)
        truth = targets_in_numpy(unpaired, paired, labels, 10.0)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, truth, atol=2e-5)
        np.testing.assert_allclose(np.sum(found, axis=1), 1.0, rtol=1e-5)

    @pytest.mark.parametrize("scale", [10.0, 100.0])
    def test_ten_iterations_are_those_of_the_published_code(self, scale):
        _, _, unpaired, paired = draw(u=12, n=7)
        truth = published_plan(reference.cosines(unpaired, paired), scale)
        found = pseudo_label_targets(unpaired, paired, scale=scale, iterations=10)
        np.testing.assert_allclose(found, truth, atol=1e-4)

    def test_ten_iterations_leave_columns_unequal_and_a_solve_does_not(self):
        _, _, unpaired, paired = draw(u=12, n=7)
        spread = []
        for iterations in (10, None):
            found = pseudo_label_targets(
                unpaired, paired, scale=100.0, iterations=iterations, max_iterations=20_000
            )
            spread.append(np.abs(np.sum(found, axis=0) / 12 - 1 / 7).sum())
        assert spread[0] > 0.05 and spread[1] < 2e-3, spread

    def test_scales_that_underflow_a_plain_kernel(self):
        _, _, unpaired, paired = draw()
        unpaired, paired = np.abs(unpaired), -np.abs(paired)
        cosines = reference.cosines(unpaired, paired)
        assert not np.float32(np.exp(-1000.0 * (1 - cosines))).any()
        found = pseudo_label_targets(unpaired, paired, scale=1000.0, iterations=10)
        truth = targets_in_numpy(unpaired, paired, "ot", 1000.0, 10)
        np.testing.assert_allclose(found, truth, atol=2e-3)

    def test_by_hand(self):
        axes = np.eye(2, dtype=np.float32)
        unpaired = np.float32([[3, 0], [2, 0], [0, 5]])
        hard = pseudo_label_targets(unpaired, axes, labels="hard")
        np.testing.assert_array_equal(hard, [[1, 0], [1, 0], [0, 1]])
        soft = pseudo_label_targets(unpaired, axes, labels="soft", scale=np.float32(np.log(3)))
        np.testing.assert_allclose(soft, [[0.75, 0.25], [0.75, 0.25], [0.25, 0.75]], rtol=1e-6)
        # Two rows for pair 0 and one for pair 1, which must be labels equally often: with a large
        # scale the two, alike, give a quarter each of what is theirs.
        ot = pseudo_label_targets(unpaired, axes, scale=50.0)
        np.testing.assert_allclose(ot, [[0.75, 0.25], [0.75, 0.25], [0, 1]], atol=2e-3)

    def test_the_first_of_equals(self):
        paired = np.float32([[0, 1], [1, 0], [2, 0]])
        found = pseudo_label_targets(np.float32([[1, 0]]), paired, labels="hard")
        np.testing.assert_array_equal(found, [[0, 1, 0]])

    @pytest.mark.parametrize("labels", KINDS)
    def test_constant(self, labels):
        _, _, unpaired, paired = draw()
        weights = np.random.default_rng(1).normal(size=(8, 6)).astype(np.float32)

        def moved(unpaired, paired, scale):
            targets = pseudo_label_targets(unpaired, paired, labels=labels, scale=scale)
            return jnp.sum(weights * targets)

        for gradient in jax.grad(moved, (0, 1, 2))(unpaired, paired, jnp.float32(5.0)):
            np.testing.assert_array_equal(gradient, 0.0)


class TestPseudoLabel:
    @pytest.mark.parametrize("labels", KINDS)
    @pytest.mark.parametrize("iterations", [None, 10])
    def test_value_and_gradient(self, labels, iterations):
        parts, scale = draw(), 10.0
        targets = targets_in_numpy(*parts[2:], labels, scale, iterations)

        def loss(*parts):
            *parts, scale = parts
            return pseudo_label(
                *parts, labels=labels, scale=scale, iterations=iterations, threshold=1e-6
            )

        def truth(unpaired, partners, scale):
            return pseudo_label_in_numpy(unpaired, partners, targets, scale)

        inputs = [*parts, jnp.float32(scale)]
        value, gradients = jax.value_and_grad(loss, tuple(range(5)))(*inputs)
        np.testing.assert_allclose(value, truth(*parts[:2], scale), rtol=1e-4)
        # The scale moves the logits alone: that of the targets is a constant.
        check_gradients((gradients[0], gradients[1], gradients[4]), truth, (*parts[:2], scale))
        for gradient in gradients[2:4]:
            np.testing.assert_array_equal(gradient, 0.0)

    @pytest.mark.parametrize("labels,devices", [("ot", 1), ("ot", 4), ("hard", 4)])
    def test_padding_blocks_and_devices(self, labels, devices):
        """Blocks divide neither the rows nor those of a device; some pairs do not count."""
        unpaired, partners, *views = draw(u=13)
        targets = targets_in_numpy(*views, labels, 10.0, 10)
        spread = [np.pad(rows, ((0, 3), (0, 0))) for rows in (unpaired, views[0])]
        whole = [np.concatenate([rows, 2 * rows[:3]]) for rows in (partners, views[1])]

        def local(unpaired, view, mask, partners, scale):
            return pseudo_label(
                unpaired,
                partners,
                view,
                whole[1],
                labels=labels,
                scale=scale,
                iterations=10,
                unpaired_mask=mask,
                paired_mask=np.arange(9) < 6,
                block=3 if labels == "hard" or devices == 1 else None,
                axis_name="r" if devices > 1 else None,
            )

        loss, rows, same = local, P("r"), P()
        if devices > 1:
            mesh = jax.make_mesh((devices,), ("r",), axis_types=(AxisType.Auto,))
            specs = (rows, rows, rows, same, same)
            loss = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=same)
        value, (unpaired_gradient, partners_gradient, scale_gradient) = jax.jit(
            jax.value_and_grad(loss, (0, 3, 4))
        )(*spread, np.arange(16) < 13, whole[0], jnp.float32(10.0))
        truth = pseudo_label_in_numpy(unpaired, partners, targets, 10.0)
        np.testing.assert_allclose(value, truth, rtol=1e-4)
        assert not unpaired_gradient[13:].any() and not partners_gradient[6:].any()
        check_gradients(
            (unpaired_gradient[:13], partners_gradient[:6], scale_gradient),
            lambda *moved: pseudo_label_in_numpy(*moved[:2], targets, moved[2]),
            (unpaired, partners, 10.0),
        )

    def test_blocks_hold_no_matrix(self):
        parts = draw(u=211, n=157)
        program = jax.jit(jax.grad(lambda *p: pseudo_label(*p, iterations=10, block=16)))
        compiled = program.lower(*parts).compile().as_text()
        assert "[16,157]" in compiled and "[211,157]" not in compiled

    @pytest.mark.parametrize("labels", KINDS)
    def test_joint_space_is_a_view_without_gradient(self, labels):
        unpaired, partners, *_ = draw()
        paired = draw(seed=1)[1]

        def joint(unpaired):
            return pseudo_label(unpaired, partners, unpaired, paired, labels=labels)

        def fixed(rows):
            return pseudo_label(rows, partners, unpaired, paired, labels=labels)

        np.testing.assert_array_equal(jax.grad(joint)(unpaired), jax.grad(fixed)(unpaired))

    def test_soft_labels_are_the_divergence_and_the_entropy(self):
        parts = draw()
        targets = targets_in_numpy(*parts[2:], "soft", 20.0)
        entropy = -np.mean(np.sum(targets * np.log(targets), 1))
        divergence = info_nce_divergence(*parts, epsilon=0.1, teacher_epsilon=0.05, symmetric=False)
        value = pseudo_label(*parts, labels="soft", scale=10.0, label_scale=20.0)
        np.testing.assert_allclose(value, divergence + entropy, rtol=1e-4)

    def test_nothing_told_apart(self):
        unpaired, partners, *views = draw()
        partners = np.tile(partners[:1], (6, 1))
        for labels in KINDS:
            value = pseudo_label(unpaired, partners, *views, labels=labels)
            np.testing.assert_allclose(value, np.log(6), rtol=1e-5)

    @settings(deadline=None, max_examples=15)
    @given(seed=st.integers(0, 2**16), labels=st.sampled_from(KINDS))
    def test_order_and_length_of_rows_do_not_count(self, seed, labels):
        unpaired, partners, unpaired_view, paired_view = draw(seed=seed)
        options = {"labels": labels, "scale": 10.0, "threshold": 1e-6}
        value = pseudo_label(unpaired, partners, unpaired_view, paired_view, **options)
        assert value >= 0
        generator = np.random.default_rng(seed)
        rows, pairs = generator.permutation(8), generator.permutation(6)
        moved = pseudo_label(
            unpaired[rows] * np.float32(3),
            partners[pairs],
            unpaired_view[rows],
            paired_view[pairs] * np.float32(0.5),
            **options,
        )
        np.testing.assert_allclose(moved, value, rtol=1e-4)

    @pytest.mark.parametrize("labels", KINDS)
    def test_vmap_jit_and_dtypes(self, labels):
        batches = [draw(seed=seed) for seed in range(3)]

        def loss(*parts):
            return pseudo_label(*parts, labels=labels, scale=10.0, iterations=10)

        values = jax.jit(jax.vmap(loss))(*map(np.stack, zip(*batches, strict=True)))
        for value, parts in zip(values, batches, strict=True):
            targets = targets_in_numpy(*parts[2:], labels, 10.0, 10)
            truth = pseudo_label_in_numpy(*parts[:2], targets, 10.0)
            np.testing.assert_allclose(value, truth, rtol=1e-4)
        for dtype in (jnp.bfloat16, np.float16, np.float64):
            parts = [part.astype(dtype) for part in batches[0]]
            assert loss(*parts).dtype == jnp.float32

    @pytest.mark.parametrize(
        "change,options,message",
        [
            ((2, np.s_[:-1]), {}, "unpaired_view must be of the rows of unpaired"),
            ((3, np.s_[:-1]), {}, "paired_view must be of the rows of partners"),
            ((1, np.s_[:, :-1]), {}, "partners must have the dimension of unpaired, 5, got 4"),
            (
                (3, np.s_[:, :-1]),
                {},
                "paired_view must have the dimension of unpaired_view, 4, got 3",
            ),
            (None, {"scale": 0.0}, "^scale must be positive"),
            (None, {"label_scale": -1.0}, "label_scale must be positive"),
            (None, {"block": 0}, "block must be at least 1, got 0"),
            (None, {"precision": "float16"}, "precision must be"),
            (None, {"iterations": 0}, "iterations"),
            (None, {"threshold": -1.0}, "threshold"),
        ],
    )
    def test_bad_input(self, change, options, message):
        parts = draw()
        if change is not None:
            parts[change[0]] = parts[change[0]][change[1]]
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(pseudo_label)(*parts, **options)

    def test_unknown_labels(self):
        with pytest.raises(ValueError, match="labels must be 'hard', 'soft' or 'ot', got 'top'"):
            inspect.unwrap(pseudo_label_targets)(*draw()[2:], labels="top")

    def test_no_rows(self):
        parts = draw(u=0)
        with pytest.raises(ValueError, match="unpaired must have at least one row"):
            pseudo_label(*parts)


def test_nan_features_give_no_hard_label():
    rng = np.random.default_rng(0)
    unpaired, paired = (rng.normal(size=(n, 4)).astype(np.float32) for n in (5, 7))
    unpaired[3, 1] = np.nan
    targets = np.asarray(pseudo_label_targets(unpaired, paired, labels="hard"))
    assert np.isnan(targets[3]).all() and np.isfinite(np.delete(targets, 3, axis=0)).all()
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        pseudo_label_targets(unpaired, paired, scale=np.float32(0))
