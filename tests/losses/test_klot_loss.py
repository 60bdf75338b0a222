import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.losses import KLOTInfo, klot, klot_from_affinity

TIGHT = {"threshold": 5e-6, "max_iterations": 4000}


def draw_affinities(n, m, seed=0):
    teacher = reference.cca_affinity(n, m)
    noise = np.random.default_rng(seed).normal(size=(n, m))
    return (0.5 * teacher + 0.1 * noise).astype(np.float32), teacher.astype(np.float32)


def draw_embeddings(n=12, m=9, d=6, seed=0):
    """Student and teacher, of uneven lengths: nothing here is normalised."""
    draw = np.random.default_rng(seed)
    lengths = [(n, d), (m, d), (n, 5), (m, 5)]
    rows = (draw.normal(size=size) * draw.uniform(0.2, 30, (size[0], 1)) for size in lengths)
    return [part.astype(np.float32) for part in rows]


def truth_from_embeddings(image, text, teacher_image, teacher_text, **epsilons):
    student, teacher = (
        reference.cosines(image, text),
        reference.cosines(teacher_image, teacher_text),
    )
    return reference.klot(student, teacher, **epsilons)[0]


class TestTruth:
    @pytest.mark.parametrize("n,m", [(40, 40), (12, 9), (1, 9), (9, 1)])
    @pytest.mark.parametrize("epsilon,teacher_epsilon", [(0.05, 0.01), (0.05, 0.05), (0.2, 0.02)])
    def test_value_and_gradient_of_affinities(self, n, m, epsilon, teacher_epsilon):
        affinity, teacher = draw_affinities(n, m)
        epsilons = {"epsilon": epsilon, "teacher_epsilon": teacher_epsilon}

        def loss(k):
            return klot_from_affinity(k, teacher, **epsilons, **TIGHT)

        (value, info), gradient = jax.value_and_grad(loss, has_aux=True)(affinity)
        truth, true_gradient = reference.klot(affinity, teacher, **epsilons)
        for plan, matrix in ((info.student, affinity), (info.teacher, teacher)):
            assert max(reference.marginal_errors(reference.plan_of(plan, matrix))) < 1e-5
        np.testing.assert_allclose(value, truth, rtol=1e-4, atol=1e-6)
        scale = np.linalg.norm(true_gradient)
        assert np.linalg.norm(gradient - true_gradient) <= 1e-3 * scale + 1e-5

    def test_default_threshold_is_already_close(self):
        affinity, teacher = draw_affinities(60, 60)
        value, info = klot_from_affinity(affinity, teacher)
        assert bool(info.student.converged) and bool(info.teacher.converged)
        np.testing.assert_allclose(value, reference.klot(affinity, teacher)[0], rtol=5e-3)

    def test_gradient_of_affinities_is_the_slope_of_the_value(self):
        affinity, teacher = (k.astype(np.float64) for k in draw_affinities(12, 9))
        gradient = jax.grad(lambda k: klot_from_affinity(k, teacher, **TIGHT)[0])(affinity)
        direction = np.random.default_rng(3).normal(size=affinity.shape)
        step = 1e-5 * direction
        slope = reference.klot(affinity + step, teacher)[0]
        slope = (slope - reference.klot(affinity - step, teacher)[0]) / 2e-5
        np.testing.assert_allclose(np.sum(np.asarray(gradient) * direction), slope, rtol=1e-3)

    def test_gradient_of_embeddings_against_finite_differences(self):
        parts = draw_embeddings()
        epsilons = {"epsilon": 0.1, "teacher_epsilon": 0.1}

        def loss(image, text):
            return klot(image, text, *parts[2:], **epsilons, **TIGHT)

        (value, _), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*parts[:2])
        np.testing.assert_allclose(value, truth_from_embeddings(*parts, **epsilons), rtol=1e-4)
        draw = np.random.default_rng(7)
        for side in (0, 1):
            for _ in range(3):
                direction = draw.normal(size=parts[side].shape)
                ends = []
                for sign in (1, -1):
                    moved = [part.astype(np.float64) for part in parts]
                    moved[side] = moved[side] + sign * 1e-5 * direction
                    ends.append(truth_from_embeddings(*moved, **epsilons))
                slope = (ends[0] - ends[1]) / 2e-5
                found = np.sum(np.asarray(gradients[side], np.float64) * direction)
                np.testing.assert_allclose(found, slope, rtol=1e-3, atol=2e-5)

    def test_a_fixed_count_of_iterations(self):
        affinity, teacher = draw_affinities(40, 40)
        value, info = klot_from_affinity(affinity, teacher, iterations=100)
        plan = reference.sinkhorn(affinity, 0.05, iterations=100)
        target = reference.sinkhorn(teacher, 0.01, iterations=100)
        assert int(info.student.iterations) == int(info.teacher.iterations) == 100
        np.testing.assert_allclose(value, np.sum(target * np.log(target / plan)), rtol=1e-4)


class TestLaws:
    def test_zero_value_and_gradient_at_equality(self):
        affinity, _ = draw_affinities(12, 9)

        def loss(k):
            return klot_from_affinity(k, affinity, epsilon=0.05, teacher_epsilon=0.05)[0]

        value, gradient = jax.value_and_grad(loss)(affinity)
        np.testing.assert_allclose(value, 0.0, atol=1e-7)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-6)

    def test_zero_where_the_plans_agree_though_the_affinities_do_not(self):
        affinity, _ = draw_affinities(12, 9)
        value, _ = klot_from_affinity(
            5 * affinity, affinity, epsilon=0.25, teacher_epsilon=0.05, **TIGHT
        )
        np.testing.assert_allclose(value, 0.0, atol=1e-6)

    def test_order_of_rows_and_columns_does_not_matter(self):
        image, text, teacher_image, teacher_text = draw_embeddings()
        value, gradients = jax.value_and_grad(
            lambda i, t: klot(i, t, teacher_image, teacher_text, threshold=1e-5)[0], (0, 1)
        )(image, text)
        rows, columns = np.random.default_rng(1).permutation(12), np.arange(9)[::-1]
        moved, moved_gradients = jax.value_and_grad(
            lambda i, t: klot(i, t, teacher_image[rows], teacher_text[columns], threshold=1e-5)[0],
            (0, 1),
        )(image[rows], text[columns])
        np.testing.assert_allclose(moved, value, rtol=1e-4)
        for new, old, order in zip(moved_gradients, gradients, (rows, columns), strict=True):
            scale = np.abs(old).max()
            np.testing.assert_allclose(new, old[order], atol=1e-3 * scale)

    @settings(deadline=None, max_examples=20)
    @given(seed=st.integers(0, 2**16), constant=st.floats(-3, 3))
    def test_constants_of_rows_and_columns_do_not_matter(self, seed, constant):
        affinity, teacher = draw_affinities(12, 9)
        draw = np.random.default_rng(seed)
        shifts = constant + draw.normal(size=(12, 1)) + draw.normal(size=(1, 9))
        shifted = (affinity + shifts).astype(np.float32)
        gradient = jax.grad(lambda k: klot_from_affinity(k, teacher, **TIGHT)[0])
        value = klot_from_affinity(affinity, teacher, **TIGHT)[0]
        np.testing.assert_allclose(
            klot_from_affinity(shifted, teacher, **TIGHT)[0], value, rtol=2e-4
        )
        shifted_teacher = (teacher + shifts).astype(np.float32)
        np.testing.assert_allclose(
            klot_from_affinity(affinity, shifted_teacher, **TIGHT)[0], value, rtol=1e-3
        )
        np.testing.assert_allclose(gradient(shifted), gradient(affinity), atol=5e-4)

    @settings(deadline=None, max_examples=20)
    @given(seed=st.integers(0, 2**16), scale=st.floats(0.0, 2.0))
    def test_not_negative_and_convex_along_segments(self, seed, scale):
        draw = np.random.default_rng(seed)
        _, teacher = draw_affinities(12, 9)
        ends = (scale * draw.normal(size=(2, 12, 9))).astype(np.float32)
        first, last, middle = (
            float(klot_from_affinity(k, teacher, epsilon=0.2, **TIGHT)[0])
            for k in (ends[0], ends[1], ends.mean(0))
        )
        assert min(first, last, middle) >= -1e-6
        assert middle <= 0.5 * (first + last) * (1 + 1e-4) + 1e-6

    def test_gradients_of_an_affinity_sum_to_zero(self):
        affinity, teacher = draw_affinities(12, 9)
        gradient = jax.grad(lambda k: klot_from_affinity(k, teacher, **TIGHT)[0])(affinity)
        np.testing.assert_allclose(np.sum(gradient, axis=0), 0, atol=2e-4)
        np.testing.assert_allclose(np.sum(gradient, axis=1), 0, atol=2e-4)

    def test_a_forbidden_entry_takes_no_part(self):
        affinity, teacher = draw_affinities(12, 9)
        affinity[2, 3] = teacher[2, 3] = -np.inf
        (value, _), gradient = jax.value_and_grad(
            lambda k: klot_from_affinity(k, teacher, **TIGHT), has_aux=True
        )(affinity)
        truth, true_gradient = reference.klot(affinity, teacher)
        np.testing.assert_allclose(value, truth, rtol=1e-4)
        np.testing.assert_allclose(gradient, true_gradient, atol=1e-3)
        assert float(gradient[2, 3]) == 0.0

    def test_gradient_descent_reaches_the_teachers_plan(self):
        image, text, *teacher = draw_embeddings(n=16, m=16)
        epsilons = {"epsilon": 0.2, "teacher_epsilon": 0.2}
        optimizer = optax.adam(0.1)

        @jax.jit
        def step(student, state):
            value, gradient = jax.value_and_grad(lambda s: klot(*s, *teacher, **epsilons)[0])(
                student
            )
            updates, state = optimizer.update(gradient, state)
            return optax.apply_updates(student, updates), state, value

        student = (jnp.asarray(reference.unit(image), jnp.float32),)
        student += (jnp.asarray(reference.unit(text), jnp.float32),)
        state, values = optimizer.init(student), []
        for _ in range(200):
            student, state, value = step(student, state)
            values.append(float(value))
        assert values[0] > 0.5 and values[-1] < 0.02 * values[0]
        found = truth_from_embeddings(*map(np.asarray, student), *teacher, **epsilons)
        np.testing.assert_allclose(found, values[-1], atol=0.01)


class TestTransforms:
    @pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
    def test_every_dtype_gives_float32(self, dtype):
        parts = [part.astype(dtype) for part in draw_embeddings()]
        value, info = klot(*parts, epsilon=0.1, teacher_epsilon=0.1, threshold=1e-5)
        truth = truth_from_embeddings(*parts, epsilon=0.1, teacher_epsilon=0.1)
        assert value.dtype == info.student.f.dtype == jnp.float32
        np.testing.assert_allclose(value, truth, rtol=1e-4)
        gradient = jax.grad(lambda i: klot(i, *parts[1:])[0])(jnp.asarray(parts[0]))
        assert gradient.dtype == jnp.asarray(parts[0]).dtype

    def test_float64_gives_float32_where_x64_is_on(self):
        with jax.enable_x64(True):
            value, info = klot(*(part.astype(np.float64) for part in draw_embeddings()))
            assert value.dtype == info.teacher.f.dtype == jnp.float32

    def test_vmap_and_its_gradient_equal_a_loop(self):
        batches = [draw_embeddings(seed=seed) for seed in range(3)]
        stacked = [np.stack(parts) for parts in zip(*batches, strict=True)]

        def loss(image, text, teacher_image, teacher_text):
            return klot(image, text, teacher_image, teacher_text, threshold=1e-5)[0]

        def total(image, *rest):
            return jnp.sum(jax.vmap(loss)(image, *rest))

        values = jax.jit(jax.vmap(loss))(*stacked)
        gradients = jax.grad(total)(*stacked)
        inner = jax.vmap(jax.grad(loss))(*stacked)
        for i, parts in enumerate(batches):
            alone, gradient = jax.value_and_grad(loss)(*parts)
            np.testing.assert_allclose(values[i], alone, rtol=1e-4)
            for many in (gradients[i], inner[i]):
                np.testing.assert_allclose(many, gradient, atol=1e-3 * np.abs(gradient).max())

    def test_under_jit_checkpoint_and_scan(self):
        parts = draw_embeddings()

        def loss(image):
            return klot(image, *parts[1:], threshold=1e-5)[0]

        value, gradient = jax.value_and_grad(loss)(parts[0])
        scale = np.abs(gradient).max()
        for wrapped in (jax.jit(loss), jax.checkpoint(loss)):
            again, again_gradient = jax.value_and_grad(wrapped)(parts[0])
            np.testing.assert_allclose(again, value, rtol=1e-5)
            np.testing.assert_allclose(again_gradient, gradient, atol=1e-4 * scale)

        def scanned(image):
            return jax.lax.scan(lambda c, _: (c + loss(image), None), 0.0, None, length=2)[0]

        np.testing.assert_allclose(jax.grad(scanned)(parts[0]), 2 * gradient, atol=1e-4 * scale)

    def test_the_cotangent_scales_the_gradient(self):
        affinity, teacher = draw_affinities(12, 9)
        plain = jax.grad(lambda k: klot_from_affinity(k, teacher)[0])(affinity)
        scaled = jax.grad(lambda k: -3.0 * klot_from_affinity(k, teacher)[0])(affinity)
        np.testing.assert_allclose(scaled, -3 * plain, rtol=1e-6)

    def test_teacher_is_a_constant(self):
        image, text, *teacher = draw_embeddings()
        gradients = jax.grad(lambda t: klot(image, text, *t)[0])(tuple(teacher))
        for gradient in gradients:
            np.testing.assert_array_equal(gradient, 0.0)

    def test_nothing_is_learned_through_the_info(self):
        affinity, teacher = draw_affinities(12, 9)
        gradient = jax.grad(lambda k: jnp.sum(klot_from_affinity(k, teacher)[1].student.f))(
            affinity
        )
        np.testing.assert_array_equal(gradient, 0.0)

    def test_second_order_is_an_error(self):
        affinity, teacher = draw_affinities(12, 9)

        def loss(k):
            return klot_from_affinity(k, teacher)[0]

        with pytest.raises(NotImplementedError, match="second-order"):
            jax.grad(lambda k: jnp.sum(jax.grad(loss)(k) ** 2))(affinity)
        with pytest.raises((NotImplementedError, TypeError)):
            jax.hessian(loss)(affinity)
        with pytest.raises(TypeError):
            jax.jvp(loss, (affinity,), (affinity,))

    @pytest.mark.parametrize("name", ["epsilon", "teacher_epsilon", "threshold"])
    def test_settings_are_not_differentiable(self, name):
        affinity, teacher = draw_affinities(12, 9)
        with pytest.raises(NotImplementedError, match=f"respect to {name}"):
            jax.grad(lambda e: klot_from_affinity(affinity, teacher, **{name: e})[0])(0.1)

    def test_traced_epsilons_do_not_retrace(self):
        affinity, teacher = draw_affinities(12, 9)
        traces = []

        @jax.jit
        def run(epsilon, teacher_epsilon):
            traces.append(None)
            return klot_from_affinity(
                affinity, teacher, epsilon=epsilon, teacher_epsilon=teacher_epsilon, **TIGHT
            )[0]

        for epsilon, teacher_epsilon in [(0.05, 0.05), (0.2, 0.1)]:
            truth = reference.klot(affinity, teacher, epsilon, teacher_epsilon)[0]
            np.testing.assert_allclose(run(epsilon, teacher_epsilon), truth, rtol=1e-4)
        assert len(traces) == 1


class TestInfo:
    def test_fields_tell_what_was_done(self):
        affinity, teacher = draw_affinities(60, 60)
        _, info = klot_from_affinity(affinity, teacher, threshold=1e-4, max_iterations=30)
        assert isinstance(info, KLOTInfo)
        assert bool(info.student.converged) and int(info.student.iterations) < 30
        assert not bool(info.teacher.converged) and int(info.teacher.iterations) == 30
        np.testing.assert_allclose([info.student.epsilon, info.teacher.epsilon], [0.05, 0.01])
        for plan, matrix in ((info.student, affinity), (info.teacher, teacher)):
            errors = reference.marginal_errors(reference.plan_of(plan, matrix))
            np.testing.assert_allclose(plan.marginal_error, max(errors), rtol=0.05, atol=2e-5)

    def test_a_threshold_for_each_plan(self):
        affinity, teacher = draw_affinities(60, 60)
        _, info = klot_from_affinity(affinity, teacher, threshold=(1e-5, 1e-2))
        errors = [
            max(reference.marginal_errors(reference.plan_of(plan, matrix)))
            for plan, matrix in ((info.student, affinity), (info.teacher, teacher))
        ]
        assert errors[0] < 1.5e-5 and 1e-4 < errors[1] < 1e-2

    def test_potentials_warm_start_the_next_call(self):
        affinity, teacher = draw_affinities(60, 60)
        value, info = klot_from_affinity(affinity, teacher, threshold=1e-4)
        again, warm = klot_from_affinity(affinity, teacher, threshold=1e-4, init=info.potentials)
        np.testing.assert_allclose(again, value, rtol=1e-3)
        assert int(warm.teacher.iterations) < int(info.teacher.iterations)
        _, half = klot_from_affinity(
            affinity, teacher, threshold=1e-4, init=(None, info.teacher.potentials)
        )
        assert int(half.student.iterations) == int(info.student.iterations)
        assert int(half.teacher.iterations) == int(warm.teacher.iterations)

    def test_traced_potentials_warm_start_too(self):
        affinity, teacher = draw_affinities(12, 9)

        @jax.jit
        def loss(k, init):
            (value, info), gradient = jax.value_and_grad(
                lambda k: klot_from_affinity(k, teacher, init=init, **TIGHT), has_aux=True
            )(k)
            return value, info.potentials, gradient

        zeros = ((jnp.zeros(12), jnp.zeros(9)),) * 2
        value, potentials, _ = loss(affinity, zeros)
        again, _, gradient = loss(affinity, potentials)
        np.testing.assert_allclose(again, value, rtol=1e-4)
        np.testing.assert_allclose(gradient, reference.klot(affinity, teacher)[1], atol=1e-3)


class TestErrors:
    @pytest.mark.parametrize(
        "side,size,name", [(2, (13, 5), "teacher_image"), (3, (8, 5), "teacher_text")]
    )
    def test_rows_that_do_not_fit(self, side, size, name):
        parts = draw_embeddings()
        parts[side] = np.ones(size, np.float32)
        with pytest.raises(ValueError, match=name):
            inspect.unwrap(klot)(*parts)

    def test_dimensions_that_do_not_fit(self):
        image, text, *teacher = draw_embeddings()
        with pytest.raises(ValueError, match="image and text"):
            from sotalign_jax.losses.affinity import cosine_affinity

            inspect.unwrap(cosine_affinity)(image, text[:, :4])
        with pytest.raises(ValueError, match="image"):
            inspect.unwrap(klot)(image[0], text, *teacher)

    def test_affinities_of_two_shapes(self):
        with pytest.raises(ValueError, match="teacher_affinity"):
            inspect.unwrap(klot_from_affinity)(np.zeros((3, 4)), np.zeros((4, 3)))

    @pytest.mark.parametrize("side", ["student", "teacher"])
    def test_a_nan_names_its_side_and_row(self, side):
        affinity, teacher = draw_affinities(12, 9)
        (affinity if side == "student" else teacher)[4, 2] = np.nan
        with pytest.raises(ValueError, match=f"{side} plan: affinity.*row 4"):
            klot_from_affinity(affinity, teacher)
        value, info = jax.jit(klot_from_affinity)(affinity, teacher)
        assert np.isnan(value) and not bool(getattr(info, side).converged)

    def test_a_bad_epsilon_names_its_side(self):
        affinity, teacher = draw_affinities(12, 9)
        with pytest.raises(ValueError, match="teacher plan: epsilon"):
            klot_from_affinity(affinity, teacher, teacher_epsilon=-1.0)


WITHOUT_FRAMEWORKS = """
import sys, warnings
warnings.simplefilter("ignore")

class Absent:
    def find_spec(self, name, *_):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import numpy as np
from sotalign_jax.losses import cka, info_nce, info_nce_divergence, klot, siglip
print(np.isfinite(klot(*np.ones((4, 3, 2), "f"))[0]))
"""


def test_the_losses_need_no_framework():
    # ott imports optax, and Flax where it finds it; here it finds none.
    absent = ["flax", "ml_collections", "torch", "tensorflow", "transformers"]
    absent += ["orbax", "grain", "h5py", "pyarrow", "safetensors"]
    command = [sys.executable, "-c", WITHOUT_FRAMEWORKS, *absent]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_strict_dtype_promotion_is_respected():
    image, text = np.eye(6, 4, dtype=np.float32), np.ones((5, 4), np.float32)
    with jax.numpy_dtype_promotion("strict"):
        (value, info), gradient = jax.value_and_grad(klot, has_aux=True)(image, text, image, text)
    assert np.isfinite(float(value)) and np.isfinite(np.asarray(gradient)).all()
    assert bool(info.teacher.converged)


def test_nothing_flows_through_info():
    image, text = np.eye(6, 4, dtype=np.float32), np.ones((5, 4), np.float32)
    with jax.numpy_dtype_promotion("standard"):
        flow = jax.grad(lambda x: klot(x, text, image, text)[1].student.f.sum())(image)
    np.testing.assert_array_equal(flow, 0.0)
