import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.losses import cka, info_nce, info_nce_divergence


def draw(n=9, m=7, d=5, e=4, seed=0):
    """Student and teacher embeddings, of uneven lengths and with a common direction."""
    generator = np.random.default_rng(seed)
    parts = []
    for rows, columns in ((n, d), (m, d), (n, e), (m, e)):
        part = generator.normal(size=(rows, columns)) + generator.normal(size=columns)
        parts.append((part * generator.uniform(0.1, 20, (rows, 1))).astype(np.float32))
    return parts


def cka_in_numpy(image, text, teacher_image, teacher_text):
    def centred(affinity):
        rows, columns = (np.eye(size) - 1 / size for size in affinity.shape)
        return rows @ affinity @ columns

    student = centred(reference.cosines(image, text))
    teacher = centred(reference.cosines(teacher_image, teacher_text))
    cosine = np.sum(student * teacher) / np.linalg.norm(student) / np.linalg.norm(teacher)
    return 1 - cosine


def info_nce_divergence_in_numpy(student, teacher, epsilon, teacher_epsilon, symmetric=True):
    def rows(student, teacher):
        log_p = student / epsilon
        log_p = log_p - reference.logsumexp(log_p, 1)[:, None]
        if teacher_epsilon == 0:
            return -np.mean(log_p[np.arange(len(log_p)), teacher.argmax(1)])
        log_t = teacher / teacher_epsilon
        log_t = log_t - reference.logsumexp(log_t, 1)[:, None]
        return np.mean(np.sum(np.exp(log_t) * (log_t - log_p), 1))

    value = rows(student, teacher)
    return (value + rows(student.T, teacher.T)) / 2 if symmetric else value


def slopes(truth, parts, side, direction, step=1e-5):
    ends = []
    for sign in (1, -1):
        moved = [part.astype(np.float64) for part in parts]
        moved[side] = moved[side] + sign * step * direction
        ends.append(truth(*moved))
    return (ends[0] - ends[1]) / (2 * step)


def check_gradients(loss, truth, parts):
    direction = np.random.default_rng(3)
    gradients = jax.grad(loss, (0, 1, 2, 3))(*parts)
    for side in (0, 1):
        along = direction.normal(size=parts[side].shape)
        found = np.sum(np.asarray(gradients[side], np.float64) * along)
        np.testing.assert_allclose(found, slopes(truth, parts, side, along), rtol=1e-3, atol=1e-6)
    for side in (2, 3):
        np.testing.assert_array_equal(gradients[side], 0.0)


class TestCKA:
    @pytest.mark.parametrize("n,m", [(9, 7), (12, 12), (3, 20), (2, 2)])
    def test_value_against_centred_matrices(self, n, m):
        for seed in range(3):
            parts = draw(n, m, seed=seed)
            np.testing.assert_allclose(cka(*parts), cka_in_numpy(*parts), rtol=1e-4, atol=1e-5)

    def test_gradient(self):
        check_gradients(cka, cka_in_numpy, draw())

    def test_equal_affinities(self):
        image, text, *_ = draw()
        rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))
        turned = [(part @ rotation).astype(np.float32) for part in (image, text)]
        np.testing.assert_allclose(cka(image, text, *turned), 0.0, atol=2e-6)
        np.testing.assert_allclose(cka(image, text, -turned[0], turned[1]), 2.0, atol=2e-6)

    @settings(deadline=None, max_examples=20)
    @given(seed=st.integers(0, 2**16), length=st.floats(0.01, 100))
    def test_invariances(self, seed, length):
        image, text, teacher_image, teacher_text = parts = draw(seed=seed)
        value = float(cka(*parts))
        assert -1e-5 <= value <= 2 + 1e-5
        generator = np.random.default_rng(seed)
        rotation, _ = np.linalg.qr(generator.normal(size=(5, 5)))
        rows, columns = generator.permutation(9), generator.permutation(7)
        same = [
            (image * np.float32(length), text, teacher_image, teacher_text),
            (image @ rotation.astype("f"), text @ rotation.astype("f"), *parts[2:]),
            (image[rows], text[columns], teacher_image[rows], teacher_text[columns]),
            (teacher_image, teacher_text, image, text),
            (text, image, teacher_text, teacher_image),
        ]
        for moved in same:
            np.testing.assert_allclose(cka(*moved), value, atol=5e-5)

    def test_rows_that_differ_little_stay_within_float32(self):
        generator = np.random.default_rng(0)
        parts = [1 + 1e-4 * generator.normal(size=(40, 6)) for _ in range(4)]
        parts = [part.astype(np.float32) for part in parts]
        np.testing.assert_allclose(cka(*parts), cka_in_numpy(*parts), atol=5e-3)

    def test_a_constant_affinity_has_no_direction(self):
        parts = draw()
        parts[0] = np.ones_like(parts[0])
        assert np.isnan(cka(*parts))

    def test_no_matrix_of_all_rows_is_formed(self):
        n, d = 3000, 16
        shape = jax.ShapeDtypeStruct((n, d), jnp.float32)
        compiled = jax.jit(jax.value_and_grad(cka, (0, 1))).lower(*[shape] * 4).compile()
        assert f"{n},{n}" not in compiled.as_text()
        assert compiled.memory_analysis().temp_size_in_bytes < 20 * 4 * n * d

    def test_vmap_jit_and_dtypes(self):
        batches = [draw(seed=seed) for seed in range(3)]
        values = jax.jit(jax.vmap(cka))(*map(np.stack, zip(*batches, strict=True)))
        truths = [cka_in_numpy(*parts) for parts in batches]
        np.testing.assert_allclose(values, truths, rtol=1e-4, atol=1e-5)
        for dtype in (jnp.bfloat16, np.float16, np.float64):
            parts = [part.astype(dtype) for part in batches[0]]
            assert cka(*parts).dtype == jnp.float32
            np.testing.assert_allclose(cka(*parts), cka_in_numpy(*parts), rtol=1e-4)

    def test_rows_that_do_not_fit(self):
        parts = draw()
        parts[2] = parts[2][:-1]
        with pytest.raises(ValueError, match="teacher_image"):
            inspect.unwrap(cka)(*parts)


class TestInfoNCEDivergence:
    @pytest.mark.parametrize("symmetric", [True, False])
    @pytest.mark.parametrize("teacher_epsilon", [0.0, 0.01, 0.2])
    def test_value_and_gradient(self, teacher_epsilon, symmetric):
        options = {"epsilon": 0.1, "teacher_epsilon": teacher_epsilon, "symmetric": symmetric}

        def loss(*parts):
            return info_nce_divergence(*parts, **options)

        def truth(image, text, teacher_image, teacher_text):
            student = reference.cosines(image, text)
            teacher = reference.cosines(teacher_image, teacher_text)
            return info_nce_divergence_in_numpy(student, teacher, **options)

        parts = draw()
        np.testing.assert_allclose(loss(*parts), truth(*parts), rtol=1e-4)
        check_gradients(loss, truth, parts)

    def test_paper_defaults(self):
        parts = draw()
        student, teacher = reference.cosines(*parts[:2]), reference.cosines(*parts[2:])
        truth = info_nce_divergence_in_numpy(student, teacher, 0.05, 0.01)
        np.testing.assert_allclose(info_nce_divergence(*parts), truth, rtol=1e-4)

    def test_zero_at_equality(self):
        image, text, *_ = draw()
        value, gradient = jax.value_and_grad(
            lambda i: info_nce_divergence(i, text, image, text, epsilon=0.1, teacher_epsilon=0.1)
        )(image)
        np.testing.assert_allclose(value, 0.0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-5)

    @settings(deadline=None, max_examples=25)
    @given(
        seed=st.integers(0, 2**16),
        epsilon=st.floats(0.02, 1),
        teacher_epsilon=st.floats(0.005, 1),
    )
    def test_not_negative(self, seed, epsilon, teacher_epsilon):
        options = {"epsilon": epsilon, "teacher_epsilon": teacher_epsilon}
        assert float(info_nce_divergence(*draw(seed=seed), **options)) >= -1e-6

    def test_zero_is_the_limit_of_small_teacher_epsilons(self):
        parts = draw()
        limit = float(info_nce_divergence(*parts, teacher_epsilon=0.0))
        gaps = [
            abs(float(info_nce_divergence(*parts, teacher_epsilon=e)) - limit)
            for e in (0.1, 0.01, 1e-5)
        ]
        assert gaps[0] > gaps[1] > 10 * gaps[2] and gaps[2] < 1e-5 * limit

    def test_a_teacher_that_tells_all_apart_gives_info_nce(self):
        image, text, *_ = draw(n=8, m=8)
        identity = np.eye(8, dtype=np.float32)
        for teacher_epsilon in (0.0, 0.01):
            value = info_nce_divergence(
                image, text, identity, identity, epsilon=0.1, teacher_epsilon=teacher_epsilon
            )
            np.testing.assert_allclose(value, info_nce(image, text, scale=10.0), rtol=1e-5)

    def test_vmap_jit_and_dtypes(self):
        batches = [draw(seed=seed) for seed in range(3)]
        values = jax.jit(jax.vmap(info_nce_divergence))(*map(np.stack, zip(*batches, strict=True)))
        for value, parts in zip(values, batches, strict=True):
            student, teacher = reference.cosines(*parts[:2]), reference.cosines(*parts[2:])
            truth = info_nce_divergence_in_numpy(student, teacher, 0.05, 0.01)
            np.testing.assert_allclose(value, truth, rtol=1e-4)
        for dtype in (jnp.bfloat16, np.float16, np.float64):
            value = info_nce_divergence(*[part.astype(dtype) for part in batches[0]])
            assert value.dtype == jnp.float32

    def test_bad_arguments(self):
        parts = draw()
        with pytest.raises(ValueError, match="teacher_epsilon"):
            info_nce_divergence(*parts, teacher_epsilon=-0.1)
        parts[3] = parts[3][:-1]
        with pytest.raises(ValueError, match="teacher_text"):
            inspect.unwrap(info_nce_divergence)(*parts)
