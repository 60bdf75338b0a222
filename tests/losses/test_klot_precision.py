"""KLOT by products of bfloat16 parts: where it does no harm, and why one product is not offered."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sotalign_jax.losses import klot, siglip
from sotalign_jax.transport import StreamedAffinity, solve

N = 300
THREE = {"precision": "bfloat16_3x"}
FORMS = {
    "dense": {"memory": "dense"},
    "streamed": {"memory": "streamed", "memory_gib": 2e-3},  # 48 rows a block of 160
}


def unit_rows_of(kind):
    """Rows of a CCA teacher on real features, or random ones."""
    if kind == "cca":
        rows = [side[:N] for side in reference.cca_rows()]
    else:
        draw = np.random.default_rng(0)
        rows = [draw.normal(size=(N, 64)) for _ in range(2)]
    return [reference.unit(side).astype(np.float32) for side in rows]


def marginal_error(affinity, truth, epsilon, threshold):
    """Of the plan that the potentials stand for, with the true affinities, in float64."""
    plan = solve(affinity, epsilon, threshold=threshold, max_iterations=2000)
    assert bool(plan.converged)  # by its own numbers
    return max(reference.marginal_errors(reference.plan_of(plan, truth)))


class TestMarginalErrors:
    """The teacher's problem, at the epsilons of the paper and of the authors' code."""

    @pytest.mark.parametrize("kind", ["cca", pytest.param("random", marks=pytest.mark.slow)])
    @pytest.mark.parametrize("epsilon", [0.01, 0.005])
    def test_three_products_do_no_harm_and_one_does(self, kind, epsilon):
        image, text = unit_rows_of(kind)
        truth = image.astype(np.float64) @ text.astype(np.float64).T
        image, text = jnp.asarray(image), jnp.asarray(text)
        for block in (None, 64):
            full, three = (
                marginal_error(affinity if block else affinity.of_rows(image), truth, epsilon, 1e-3)
                for affinity in (
                    StreamedAffinity(image, text, block or N),
                    StreamedAffinity(image, text, block or N, "bfloat16_3x"),
                )
            )
            assert three < 1e-3 and three < 1.03 * full
        heads = [jax.lax.reduce_precision(side, 8, 7) for side in (image, text)]
        one = marginal_error(StreamedAffinity(*heads, N), truth, epsilon, 1e-3)
        assert one > 10e-3

    @pytest.mark.parametrize("kind", ["cca", "random"])
    @pytest.mark.parametrize("epsilon", [0.01, 0.005])
    def test_what_remains_of_them_is_rounding_over_epsilon(self, kind, epsilon):
        image, text = unit_rows_of(kind)
        truth = image.astype(np.float64) @ text.astype(np.float64).T
        affinity = StreamedAffinity(jnp.asarray(image), jnp.asarray(text), N, "bfloat16_3x")
        error = marginal_error(affinity.of_rows(affinity.image), truth, epsilon, 1e-5)
        assert 1e-7 / epsilon < error < 5e-7 / epsilon


def problem(n=160):
    """A CCA teacher's rows, and a student that is the teacher with noise, of uneven lengths."""
    teacher = [side[:n] for side in unit_rows_of("cca")]
    draw = np.random.default_rng(1)
    student = [
        (side + 0.03 * draw.normal(size=side.shape)) * draw.uniform(0.2, 30, (n, 1))
        for side in teacher
    ]
    return [side.astype(np.float32) for side in (*student, *teacher)]


def value_and_gradients(rows, **options):
    def loss(image, text):
        return klot(image, text, *rows[2:], threshold=1e-4, **options)[0]

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*rows[:2])


def distance(one, other):
    return np.linalg.norm(np.asarray(one) - other) / np.linalg.norm(other)


class TestKLOT:
    @pytest.mark.parametrize("form", FORMS)
    def test_value_and_gradient_are_those_of_float32(self, form):
        # Cosines are off by 2e-7 or so: the teacher's plan by that over its epsilon, 2e-5 of it.
        rows = problem()
        value, gradients = value_and_gradients(rows, **FORMS[form])
        found, found_gradients = value_and_gradients(rows, **FORMS[form], **THREE)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        for one, other in zip(found_gradients, gradients, strict=True):
            assert 0 < distance(one, other) < 1e-4

    def test_both_forms_are_one(self):
        (dense, left), (streamed, right) = (
            # The forms look at their errors at different times: as many iterations in both.
            value_and_gradients(problem(), iterations=60, **options, **THREE)
            for options in FORMS.values()
        )
        np.testing.assert_allclose(streamed, dense, rtol=1e-6)
        for one, other in zip(right, left, strict=True):
            assert distance(one, other) < 2e-5

    @pytest.mark.parametrize("form", FORMS)
    def test_zero_at_equality(self, form):
        image, text, *_ = problem()
        options = {"epsilon": 0.05, "teacher_epsilon": 0.05, **FORMS[form], **THREE}
        value, _ = klot(image, text, image, text, **options)
        assert abs(float(value)) < 1e-8  # rounding alone, as in float32

    @pytest.mark.parametrize("form", FORMS)
    def test_every_product_of_embeddings_is_of_parts(self, form):
        """Also those of every iteration, of the unbalanced ends and of the gradient."""
        d, e = 13, 11  # no other size here
        shapes = [
            jax.ShapeDtypeStruct(s, jnp.float32) for s in ((50, d), (40, d), (50, e), (40, e))
        ]
        options = FORMS[form] | ({"memory_gib": 1e-9} if form == "streamed" else {})

        def dots(**more):
            f = jax.grad(lambda *rows: klot(*rows, **options, **more)[0], argnums=(0, 1))
            text = jax.jit(f).lower(*shapes).as_text()
            operands = re.findall(r"dot_general.*: \((.*)\) ->", text)
            return [line for line in operands if re.search(rf"[<x]({d}|{e})x", line)]

        full, parts = dots(), dots(**THREE)
        assert full and not any("bf16" in line for line in full)
        assert len(parts) == 3 * len(full)
        assert not any("f32" in line for line in parts)

    @pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
    @pytest.mark.parametrize("form", FORMS)
    def test_sharded_equals_one_device(self, form):
        rows = problem(80)
        mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))
        options = FORMS[form] | THREE | {"iterations": 20}

        def local(*rows):
            return klot(*rows, axis_name="rows", **options)[0]

        specs = (P("rows"), P(), P("rows"), P())
        f = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
        value, gradients = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*rows)
        expected, wanted = value_and_gradients(rows, **options)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for one, other in zip(gradients, wanted, strict=True):
            assert distance(one, other) < 1e-5


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("block", [None, 7])
def test_siglip(block):
    """Whole, by blocks and spread over devices: float32's value and gradient, nearly."""
    image, text = problem(80)[:2]
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))

    def local(image, text):
        return siglip(image, text, block=block, axis_name="rows", **THREE)

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P())
    value, gradients = jax.value_and_grad(siglip, argnums=(0, 1))(image, text)
    for f in (lambda image, text: siglip(image, text, block=block, **THREE), spread):
        found, found_gradients = jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(image, text)
        np.testing.assert_allclose(found, value, rtol=1e-5)
        for one, other in zip(found_gradients, gradients, strict=True):
            assert 0 < distance(one, other) < 3e-5
