import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.teachers import (
    LinearTeacher,
    cca,
    empty_moments,
    moments_of,
    procrustes,
    recentered,
)


def _unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _pairs(n, dx, dy, *, latent=4, noise=0.3, seed=0):
    """Two noisy linear views of one latent, both with a mean that is not zero."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, latent))
    image = z @ rng.normal(size=(latent, dx)) + noise * rng.normal(size=(n, dx)) + 0.5
    text = z @ rng.normal(size=(latent, dy)) + noise * rng.normal(size=(n, dy)) - 0.5
    return image, text


def _centred(rows):
    rows = _unit(rows)
    return rows - rows.mean(axis=0)


def _cosine(a, b):
    return _unit(a) @ _unit(b).T


def _float64(teacher):
    return [np.asarray(array, np.float64) for array in teacher[:5]]


# --- Procrustes


def test_procrustes_weights_are_orthonormal_and_diagonalise_the_cross_scatter():
    image, text = _pairs(60, 9, 6)
    teacher = procrustes(moments_of([(image, text)]))
    wx, wy, *_ = _float64(teacher)
    assert teacher.image_weight.shape == (9, 6) and teacher.text_weight.shape == (6, 6)
    np.testing.assert_allclose(wx.T @ wx, np.eye(6), atol=1e-6)
    np.testing.assert_allclose(wy.T @ wy, np.eye(6), atol=1e-6)
    inner = wx.T @ (_centred(image).T @ _centred(text)) @ wy
    singular = np.linalg.svd(_centred(image).T @ _centred(text), compute_uv=False)
    np.testing.assert_allclose(inner, np.diag(singular), atol=1e-5 * singular[0])


def test_procrustes_agrees_with_the_orthogonal_procrustes_problem():
    image, text = _pairs(80, 7, 7)
    wx, wy, *_ = _float64(procrustes(moments_of([(image, text)])))
    rotation, scale = scipy.linalg.orthogonal_procrustes(_centred(image), _centred(text))
    np.testing.assert_allclose(wx @ wy.T, rotation, atol=1e-5)
    inner = np.trace(wx.T @ _centred(image).T @ _centred(text) @ wy)
    np.testing.assert_allclose(inner, scale, rtol=1e-6)


def test_procrustes_correlations_are_those_of_the_projected_pairs():
    image, text = _pairs(40, 8, 5)
    teacher = procrustes(moments_of([(image, text)]), dim=4)
    a, b = teacher.project_image(image), teacher.project_text(text)
    for k in range(4):
        expected = np.corrcoef(np.asarray(a)[:, k], np.asarray(b)[:, k])[0, 1]
        np.testing.assert_allclose(teacher.correlations[k], expected, atol=1e-5)


# --- CCA


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.1])
def test_cca_whitens_and_diagonalises(ridge):
    image, text = _pairs(200, 8, 5)
    teacher = cca(moments_of([(image, text)]), ridge=ridge)
    wx, wy, _, _, rho = _float64(teacher)
    a, b = _centred(image), _centred(text)
    sxx, syy, sxy = (np.asarray(s) / 199 for s in (a.T @ a, b.T @ b, a.T @ b))
    np.testing.assert_allclose(wx.T @ (sxx + ridge * np.eye(8)) @ wx, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(wy.T @ (syy + ridge * np.eye(5)) @ wy, np.eye(5), atol=1e-5)
    np.testing.assert_allclose(wx.T @ sxy @ wy, np.diag(rho), atol=1e-5)
    assert np.all(np.diff(rho) <= 0) and rho.min() >= 0 and rho.max() <= 1


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_cca_is_the_generalised_eigenvalue_problem(ridge):
    image, text = _pairs(150, 6, 4, seed=2)
    teacher = cca(moments_of([(image, text)]), ridge=ridge)
    a, b = _centred(image), _centred(text)
    sxx, syy, sxy = a.T @ a / 149, b.T @ b / 149, a.T @ b / 149
    # Of [[0, Sxy], [Syx, 0]] w = rho [[Sxx + r, 0], [0, Syy + r]] w, rho comes as +- pairs.
    left = np.block([[np.zeros((6, 6)), sxy], [sxy.T, np.zeros((4, 4))]])
    right = scipy.linalg.block_diag(sxx + ridge * np.eye(6), syy + ridge * np.eye(4))
    values, vectors = scipy.linalg.eigh(left, right)
    top, w = values[::-1][:4], vectors[:, ::-1][:, :4] * np.sqrt(2)
    np.testing.assert_allclose(teacher.correlations, top, atol=1e-6)
    expected = _cosine(a @ w[:6], b @ w[6:])
    np.testing.assert_allclose(teacher.affinity(image, text), expected, atol=1e-4)


def test_scatter_ridge_is_covariance_ridge_times_degrees_of_freedom():
    image, text = _pairs(50, 6, 5)
    moments = moments_of([(image, text)])
    a, b = _centred(image), _centred(text)
    teacher = cca(moments, ridge=0.7, ridge_on="scatter")
    # The paper's appendix: (A^T A + ridge I)^-1/2 A^T B (B^T B + ridge I)^-1/2.
    roots = [
        np.linalg.inv(scipy.linalg.sqrtm(c.T @ c + 0.7 * np.eye(c.shape[1]))).real for c in (a, b)
    ]
    u, s, vt = np.linalg.svd(roots[0] @ a.T @ b @ roots[1], full_matrices=False)
    np.testing.assert_allclose(teacher.correlations, s, atol=1e-6)
    expected = _cosine(a @ roots[0] @ u, b @ roots[1] @ vt.T)
    np.testing.assert_allclose(teacher.affinity(image, text), expected, atol=1e-4)
    same = cca(moments, ridge=0.7 / 49)
    for got, want in zip(teacher[:5], same[:5], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_weighting_multiplies_both_sides_by_the_root_of_the_correlations():
    image, text = _pairs(70, 6, 5)
    moments = moments_of([(image, text)])
    plain, weighted = cca(moments, ridge=0.01), cca(moments, ridge=0.01, weighted=True)
    a, b = _centred(image), _centred(text)
    wx, wy, _, _, rho = _float64(plain)
    expected = _cosine(a @ wx * np.sqrt(rho), b @ wy * np.sqrt(rho))
    np.testing.assert_allclose(weighted.affinity(image, text), expected, atol=1e-5)
    np.testing.assert_array_equal(weighted.correlations, plain.correlations)
    assert (
        np.abs(np.asarray(weighted.affinity(image, text) - plain.affinity(image, text))).max()
        > 0.05
    )


# --- what both do


def test_procrustes_recovers_a_planted_rotation():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(300, 6))
    left, right = (np.linalg.qr(rng.normal(size=(d, 6)))[0] for d in (20, 15))
    image, text = z @ left.T, z @ right.T
    teacher = procrustes(moments_of([(image[:100], text[:100])]))
    wx, wy, *_ = _float64(teacher)
    assert wx.shape == (20, 6)  # the rank of the pairs, not the smaller dimension
    np.testing.assert_allclose(wx @ wy.T, left @ right.T, atol=1e-5)
    affinity = np.asarray(teacher.affinity(image[100:], text[100:]))
    assert np.all(affinity.argmax(axis=1) == np.arange(200))


def test_cca_recovers_a_planted_map_on_rows_not_seen():
    image, text = _pairs(400, 20, 15, latent=8, noise=0.02)
    teacher = cca(moments_of([(image[:200], text[:200])]), ridge=1e-3)
    affinity = np.asarray(teacher.affinity(image[200:], text[200:]))
    assert np.mean(affinity.argmax(axis=1) == np.arange(200)) > 0.95


@pytest.mark.parametrize("fit", [procrustes, cca])
@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000))
def test_rotated_features_give_the_same_affinity(fit, seed):
    image, text = _pairs(30, 7, 5, seed=seed)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(7, 7)))[0]
    plain = fit(moments_of([(image, text)])).affinity(image, text)
    rotated = fit(moments_of([(image @ rotation, text)])).affinity(image @ rotation, text)
    np.testing.assert_allclose(plain, rotated, atol=2e-3)


@pytest.mark.parametrize("fit", [procrustes, cca])
def test_row_length_does_not_matter_and_dtype_is_float32(fit):
    image, text = _pairs(30, 6, 5)
    teacher = fit(moments_of([(image, text)]), dim=3)
    assert teacher.image_columns is None and teacher.text_columns is None
    for array in teacher[:5]:
        assert isinstance(array, jax.Array) and array.dtype == jnp.float32
    scales = np.geomspace(0.1, 10, 30)[:, None]
    other = fit(moments_of([(image * scales, text / scales)]), dim=3)
    np.testing.assert_allclose(
        teacher.affinity(image, text), other.affinity(image * scales, text), atol=1e-5
    )


@pytest.mark.parametrize("fit", [procrustes, cca])
def test_signs_are_fixed_by_the_largest_image_entry(fit):
    image, text = _pairs(40, 9, 6)
    weight = np.asarray(fit(moments_of([(image, text)])).image_weight)
    assert np.all(weight[np.abs(weight).argmax(axis=0), np.arange(6)] > 0)


def test_the_projection_is_unit_rows_less_means_times_weights():
    rng = np.random.default_rng(5)
    teacher = LinearTeacher(
        *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((4, 3), (5, 3), (4,), (5,), (3,)))
    )
    image, text = rng.normal(size=(6, 4)).astype(np.float16), rng.normal(size=(7, 5))
    wx, wy, mx, my, _ = _float64(teacher)
    a = (_unit(image.astype(np.float64)) - mx) @ wx
    b = (_unit(text) - my) @ wy
    np.testing.assert_allclose(teacher.project_image(image), a, atol=1e-5)
    np.testing.assert_allclose(teacher.project_text(text), b, atol=1e-5)
    affinity = jax.jit(LinearTeacher.affinity)(teacher, image, text.astype(np.float32))
    np.testing.assert_allclose(affinity, _cosine(a, b), atol=1e-5)


# --- thin, degenerate and wrong data


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_more_dimensions_than_pairs(ridge):
    image, text = _pairs(10, 40, 30)
    teacher = cca(moments_of([(image, text)]), ridge=ridge)
    assert teacher.image_weight.shape == (40, 9) and teacher.text_weight.shape == (30, 9)
    a, b = _centred(image), _centred(text)
    wx, wy, _, _, rho = _float64(teacher)
    np.testing.assert_allclose(wx.T @ (a.T @ a / 9 + ridge * np.eye(40)) @ wx, np.eye(9), atol=1e-4)
    np.testing.assert_allclose(wx.T @ (a.T @ b / 9) @ wy, np.diag(rho), atol=1e-4)
    if ridge == 0:  # without a ridge the pairs are fitted perfectly
        np.testing.assert_allclose(rho, 1, atol=1e-6)
    assert procrustes(moments_of([(image, text)])).image_weight.shape == (40, 9)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_rank_deficient_features_and_duplicate_rows(ridge):
    rng = np.random.default_rng(1)
    image, text = _pairs(50, 6, 5)
    image, text = _unit(image), _unit(text)
    wide = image @ np.linalg.qr(rng.normal(size=(12, 6)))[0].T
    twice = moments_of([(np.vstack([wide, wide]), np.vstack([text, text]))])
    teacher = cca(twice, ridge=ridge)
    assert teacher.image_weight.shape == (12, 5)
    assert np.isfinite(np.asarray(teacher.image_weight)).all()
    # Duplicates change only the degrees of freedom: S * (2 * 49 / 99).
    once = cca(moments_of([(image, text)]), ridge=ridge * 99 / 98)
    np.testing.assert_allclose(teacher.correlations, once.correlations, atol=1e-6)
    np.testing.assert_allclose(teacher.affinity(wide, text), once.affinity(image, text), atol=1e-4)
    constant = np.hstack([image, np.zeros((50, 3))])
    assert procrustes(moments_of([(constant, text)])).image_weight.shape == (9, 5)


def test_duplicates_alone_support_no_more_directions_than_distinct_rows():
    image, text = _pairs(4, 20, 10)
    moments = moments_of([(np.tile(image, (25, 1)), np.tile(text, (25, 1)))])
    assert cca(moments).correlations.shape == (3,)
    assert procrustes(moments).correlations.shape == (3,)


def test_one_pair_needs_other_means():
    image, text = _pairs(200, 8, 5)
    pool_image, pool_text = _unit(image[1:]).mean(axis=0), _unit(text[1:]).mean(axis=0)
    one = moments_of([(image[:1], text[:1])])
    with pytest.raises(ValueError, match=r"moments: nothing is left .* recentered"):
        procrustes(one)
    moved = recentered(one, pool_image, pool_text)
    teacher = procrustes(moved)
    a, b = _unit(image[:1]) - pool_image, _unit(text[:1]) - pool_text
    assert teacher.image_weight.shape == (8, 1)
    np.testing.assert_allclose(
        np.asarray(teacher.image_weight @ teacher.text_weight.T), _unit(a).T @ _unit(b), atol=1e-6
    )
    np.testing.assert_allclose(teacher.correlations, [1.0], atol=1e-6)
    for moments in (one, moved):
        with pytest.raises(ValueError, match="cca needs at least 2 pairs, got 1; use procrustes"):
            cca(moments)


def test_recentring_supports_one_direction_more_and_stores_the_new_means():
    image, text = _pairs(5, 20, 10)
    moved = recentered(moments_of([(image, text)]), np.zeros(20), np.zeros(10))
    teacher = cca(moved)
    assert teacher.correlations.shape == (5,)
    np.testing.assert_array_equal(teacher.image_mean, np.zeros(20))


@pytest.mark.parametrize("fit", [procrustes, cca])
def test_data_that_cannot_be_fitted_is_refused(fit):
    image, text = _pairs(30, 6, 5)
    with pytest.raises(ValueError, match="moments: hold no pairs"):
        fit(empty_moments(3, 3))
    same = np.tile(text[:1], (30, 1)) * np.geomspace(1, 3, 30)[:, None]
    with pytest.raises(ValueError, match="moments: all 30 text rows are the same"):
        fit(moments_of([(image, same)]))
    moments = moments_of([(image, text)])
    broken = moments._replace(cross_scatter=moments.cross_scatter * np.nan)
    with pytest.raises(ValueError, match="moments: cross_scatter holds NaN"):
        fit(broken)
    with pytest.raises(ValueError, match=r"dim=6: the pairs support at most 5"):
        fit(moments, dim=6)
    with pytest.raises(ValueError, match=r"dim=30: the pairs support at most 4 .*5 pairs"):
        fit(moments_of([(np.tile(image[:5], 6), np.tile(text[:5], 6))]), dim=30)
    with pytest.raises(ValueError, match="dim=0"):
        fit(moments, dim=0)


def test_uncorrelated_sides_leave_procrustes_nothing():
    image = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])
    text = np.array([[1.0, 0], [1, 0], [-1, 0], [-1, 0]])
    with pytest.raises(ValueError, match="moments: images and texts of the pairs do not vary"):
        procrustes(moments_of([(image, text)]))


def test_bad_options_are_named():
    image, text = _pairs(30, 6, 5)
    moments = moments_of([(image, text)])
    for ridge in (-0.1, np.nan, np.inf):
        with pytest.raises(ValueError, match="ridge="):
            cca(moments, ridge=ridge)
    with pytest.raises(ValueError, match="ridge_on='both'"):
        inspect.unwrap(cca)(moments, ridge_on="both")
    teacher = procrustes(moments)
    with pytest.raises(ValueError, match=r"image: shape \(30, 5\); the teacher takes \(n, 6\)"):
        teacher.project_image(text)
    with pytest.raises(ValueError, match=r"text: shape \(30, 6\); the teacher takes \(n, 5\)"):
        teacher.project_text(image)
