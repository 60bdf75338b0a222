"""Streamed and sharded KLOT: the value and gradient of the definition, by other roads."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sotalign_jax.losses import klot, klot_from_affinity
from sotalign_jax.losses.klot import dense_or_block

N, M, D, E = 32, 21, 6, 5
TIGHT = {"threshold": 1e-6, "max_iterations": 5000}
# So little that a block has the least number of rows, 8: with 13 rows the last block has 5.
SMALL = {"memory": "streamed", "memory_gib": 1e-9}
MESHES = {"8": ((8,), ("rows",)), "4x2": ((4, 2), ("rows", "more"))}
# Always run; each value of each parameter meets each of another.
SAMPLE = {
    ("divides", "8", "streamed"),
    ("divides", "4x2", "dense"),
    ("does_not", "8", "dense"),
    ("does_not", "4x2", "streamed"),
}


def draw(n=N, m=M, seed=0):
    """Student and teacher embeddings of uneven lengths."""
    rng = np.random.default_rng(seed)
    sizes = [(n, D), (m, D), (n, E), (m, E)]
    return [
        (rng.normal(size=s) * rng.uniform(0.2, 30, (s[0], 1))).astype(np.float32) for s in sizes
    ]


def truth(image, text, teacher_image, teacher_text, a=None, b=None):
    """Value, and gradients by the chain rule through the normalisation, in float64."""
    affinity, teacher = (
        reference.cosines(image, text),
        reference.cosines(teacher_image, teacher_text),
    )
    plan, star = reference.sinkhorn(affinity, 0.05, a, b), reference.sinkhorn(teacher, 0.01, a, b)
    mass = star > 0
    slope = (plan - star) / 0.05
    gradients = []
    for rows, others, by in ((image, text, slope), (text, image, slope.T)):
        along = by @ reference.unit(others)
        unit = reference.unit(rows)
        radial = np.sum(along * unit, axis=1, keepdims=True) * unit
        gradients.append((along - radial) / np.linalg.norm(rows, axis=1, keepdims=True))
    return np.sum(star[mass] * np.log(star[mass] / plan[mass])), gradients


def check(value, gradients, expected, rtol=1e-4):
    np.testing.assert_allclose(value, expected[0], rtol=rtol, atol=1e-6)
    for gradient, wanted in zip(gradients, expected[1], strict=True):
        assert gradient.dtype == jnp.float32 and gradient.shape == wanted.shape
        assert np.linalg.norm(gradient - wanted) < 1e-3 * np.linalg.norm(wanted) + 1e-5


def value_and_gradients(rows, **options):
    def loss(image, text):
        return klot(image, text, *rows[2:], **TIGHT, **options)[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*rows[:2])


class TestStreamed:
    @pytest.mark.parametrize("n,m", [(13, 9), (8, 8), (1, 9), (40, 33)])
    def test_value_and_gradient_are_those_of_the_converged_plans(self, n, m):
        rows = draw(n, m)
        check(*value_and_gradients(rows, **SMALL), truth(*rows))

    def test_weights(self):
        rows = draw()
        a, b = np.arange(N) % 4.0, 1 + np.arange(M) % 3.0
        a, b = a / a.sum(), b / b.sum()
        for options in (SMALL, {"memory": "dense"}):
            value, gradients = value_and_gradients(rows, a=a, b=b, **options)
            check(value, gradients, truth(*rows, a, b))
            assert np.all(np.asarray(gradients[0])[a == 0] == 0)

    def test_rows_of_no_weight_are_padding(self):
        rows = draw()
        expected = truth(*rows)
        padded = [np.concatenate([r, np.zeros((3, r.shape[1]), np.float32)]) for r in rows]
        a, b = (np.r_[np.full(k, 1 / k), np.zeros(3)] for k in (N, M))
        for options in (SMALL, {"memory": "dense"}):
            value, gradients = value_and_gradients(padded, a=a, b=b, **options)
            check(value, [g[:-3] for g in gradients], expected)
            assert all(np.all(np.asarray(g[-3:]) == 0) for g in gradients)

    def test_zero_at_equality(self):
        image, text, *_ = draw()
        rows = [image, text, image, text]
        value, _ = klot(*rows, epsilon=0.05, teacher_epsilon=0.05, **SMALL)
        assert float(value) == 0.0

    def test_vmap_over_problems(self):
        rows = [draw(9, 7, seed) for seed in range(3)]
        stacked = [jnp.stack(parts) for parts in zip(*rows, strict=True)]
        values = jax.vmap(lambda *r: klot(*r, **TIGHT, **SMALL)[0])(*stacked)
        np.testing.assert_allclose(values, [truth(*r)[0] for r in rows], rtol=1e-4)

    def test_no_matrix_of_rows_by_columns_forward_or_backward(self):
        rows = draw(211, 157)
        f = jax.grad(lambda i, t, *more: klot(i, t, *more, **SMALL)[0], argnums=(0, 1))
        text = jax.jit(f).lower(*rows).compile().as_text()
        assert "[8,157]" in text
        assert not re.search(r"\[(211,157|157,211)\]", text)

    def test_memory_grows_linearly(self):
        sizes = [1024, 2048, 4096, 8192]
        used = []
        for n in sizes:
            rows = [jax.ShapeDtypeStruct((n, 16), jnp.float32)] * 4
            f = jax.grad(
                lambda i, t, *more: klot(i, t, *more, memory="streamed", memory_gib=1e-2)[0],
                argnums=(0, 1),
            )
            used.append(jax.jit(f).lower(*rows).compile().memory_analysis().temp_size_in_bytes)
        assert max(u / n for u, n in zip(used, sizes, strict=True)) < 2 * used[0] / sizes[0]
        assert used[-1] < 8192 * 8192 * 4 / 4

    def test_second_order_is_refused(self):
        rows = draw(9, 7)
        with pytest.raises(NotImplementedError, match="second-order"):
            jax.hessian(lambda i: klot(i, *rows[1:], **SMALL)[0])(rows[0])


class TestChoice:
    def test_auto_is_dense_where_five_matrices_fit(self):
        need = 5 * 4 * 1000 * 500 / 2**30
        assert dense_or_block("auto", need, 1000, 500) == 0
        assert dense_or_block("auto", 0.99 * need, 1000, 500) > 0
        assert dense_or_block("dense", 1e-9, 1000, 500) == 0
        assert dense_or_block("streamed", 100.0, 1000, 500) == 256

    def test_the_dense_form_holds_no_more_than_what_auto_counts_on(self):
        rows = [jax.ShapeDtypeStruct((1500, 8), jnp.float32)] * 4
        f = jax.grad(lambda i, *more: klot(i, *more, memory="dense")[0])
        used = jax.jit(f).lower(*rows).compile().memory_analysis().temp_size_in_bytes
        assert 3 * 4 * 1500**2 < used <= 5 * 4 * 1500**2

    def test_bad_options_are_named(self):
        with pytest.raises(ValueError, match="memory_gib must be positive"):
            klot(*draw(5, 4), memory_gib=0.0)
        with pytest.raises(ValueError, match="memory must be 'dense', 'streamed' or 'auto'"):
            dense_or_block("sparse", 1.0, 5, 4)  # klot's own signature stops it first under pytest


def sharded(mesh_name, check_vma=True, **options):
    """KLOT with the images spread over a mesh, as a function of whole arrays."""
    shape, names = MESHES[mesh_name]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))

    def local(image, text, teacher_image, teacher_text, a):
        return klot(
            image, text, teacher_image, teacher_text, a=a, axis_name=names, **TIGHT, **options
        )[0]

    specs = (P(names), P(), P(names), P(), P(names))
    whole = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma)
    inside = jax.shard_map(
        jax.grad(local, argnums=(0, 1)), mesh=mesh, in_specs=specs, out_specs=(P(names), P())
    )
    return whole, inside


def padded_to(rows, n):
    """Rows, and weights, with padding: what a caller does whose rows do not divide."""
    extra = n - len(rows[0])
    grown = [np.concatenate([r, np.zeros((extra, r.shape[1]), np.float32)]) for r in rows[::2]]
    a = np.r_[np.full(n - extra, 1 / (n - extra)), np.zeros(extra)].astype(np.float32)
    return grown[0], rows[1], grown[1], rows[3], a


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
class TestSharded:
    @pytest.mark.parametrize(
        "n,mesh,options",
        [
            pytest.param(
                n,
                mesh,
                {"memory": "dense"} if memory == "dense" else SMALL,
                id=f"{name}-{mesh}-{memory}",
                marks=[] if (name, mesh, memory) in SAMPLE else pytest.mark.slow,
            )
            for name, n in (("divides", N), ("does_not", N - 3))
            for mesh in MESHES
            for memory in ("dense", "streamed")
        ],
    )
    def test_equals_one_device_and_the_truth(self, options, mesh, n):
        rows = draw(n)
        one_value, one_gradients = value_and_gradients(rows, **options)
        whole, inside = sharded(mesh, **options)
        arguments = padded_to(rows, N)
        value, gradients = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(*arguments)
        gradients = [gradients[0][:n], gradients[1]]
        check(value, gradients, truth(*rows))
        np.testing.assert_allclose(value, one_value, rtol=1e-5)
        within = jax.jit(inside)(*arguments)
        for pair in zip(gradients, one_gradients, (within[0][:n], within[1]), strict=True):
            for found in (pair[0], pair[2]):
                assert np.linalg.norm(found - pair[1]) < 1e-5 * np.linalg.norm(pair[1])

    @pytest.mark.parametrize("options", [{"memory": "dense"}, SMALL], ids=["dense", "streamed"])
    def test_without_tracking_of_varying_axes(self, options):
        rows = draw()
        whole, _ = sharded("4x2", check_vma=False, **options)
        arguments = padded_to(rows, N)
        check(*jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))(*arguments), truth(*rows))

    @pytest.mark.parametrize("options", [{"memory": "dense"}, SMALL], ids=["dense", "streamed"])
    def test_only_vectors_travel_and_the_gradient_of_the_texts(self, options):
        """Rows 33 a device, columns 157: neither is a power of two that could be anything else."""
        rows = draw(8 * 33, 157)
        whole, _ = sharded("8", **options)
        f = jax.jit(jax.value_and_grad(whole, argnums=(0, 1)))
        text = f.lower(*padded_to(rows, 8 * 33)).compile().as_text()
        kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
        traffic = re.findall(rf"= (\S.*) ({kinds})(?:-start)?\(", text)
        assert {kind for _, kind in traffic} == {"all-reduce"}
        shapes = [shape for left, _ in traffic for shape in re.findall(r"\w+\[[\d,]*\]", left)]
        # Scalars, column vectors (streamed: two at a time), and once the gradient of the texts.
        gradient = f"f32[157,{D}]"
        small = {"f32[]", "s32[]", "f32[157]", "s32[157]", "f32[2,157]"}
        assert set(shapes) <= small | {gradient} and shapes.count(gradient) == 1

    def test_plain_klot_works_inside_shard_map(self):
        """A problem a device, nothing shared: no flag is needed for it."""
        rows = [draw(9, 7, seed) for seed in range(8)]
        mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
        stacked = [jnp.concatenate(parts) for parts in zip(*rows, strict=True)]
        for options in ({"memory": "dense"}, SMALL):

            def local(*r, options=options):
                return klot(*r, **TIGHT, **options)[0][None]

            f = jax.shard_map(local, mesh=mesh, in_specs=P("rows"), out_specs=P("rows"))
            np.testing.assert_allclose(
                jax.jit(f)(*stacked), [truth(*r)[0] for r in rows], rtol=1e-4
            )

    def test_from_affinities(self):
        rows = draw()
        student, teacher = reference.cosines(*rows[:2]), reference.cosines(*rows[2:])
        mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))

        def local(k, t):
            return klot_from_affinity(k, t, axis_name="rows", **TIGHT)[0]

        f = jax.shard_map(local, mesh=mesh, in_specs=P("rows"), out_specs=P())
        value, gradient = jax.jit(jax.value_and_grad(f))(
            student.astype(np.float32), teacher.astype(np.float32)
        )
        expected = reference.klot(student, teacher)
        check(value, [gradient], (expected[0], [expected[1]]))

    def test_a_nan_on_one_device_spoils_the_value_on_all(self):
        rows = draw()
        rows[0][17] = np.nan
        whole, _ = sharded("8", memory="dense")
        assert np.isnan(jax.jit(whole)(*padded_to(rows, N)))
