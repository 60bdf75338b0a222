"""Canonical similarity analysis against its definition in float64 NumPy."""

import jaxtyping
import numpy as np
import pytest
from reference import unit

from sotalign_jax.fitted import Csa, CsaOptions, csa
from sotalign_jax.fitted.csa import _folds

N, DX, DY, LATENT = 120, 9, 7, 4


def pairs(n=N, dx=DX, dy=DY, seed=0, noise=0.7):
    """Two noisy linear views of a few latent numbers, off centre."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, LATENT))
    maps = np.random.default_rng(99).normal(size=(LATENT, dx + dy))
    views = latent @ maps + noise * rng.normal(size=(n, dx + dy)) + 0.5
    return views[:, :dx].astype(np.float32), views[:, dx:].astype(np.float32)


def prepared(rows, normalize):
    return unit(rows) if normalize else np.asarray(rows, np.float64)


def inverse_root(covariance):
    values, vectors = np.linalg.eigh(covariance)
    return (vectors / np.sqrt(values)) @ vectors.T


def numpy_cca(a, b, ridge, means=None):
    """Directions by the textbook: (means, weights), descending."""
    means = (a.mean(0), b.mean(0)) if means is None else means
    a, b, degrees = a - means[0], b - means[1], len(a) - 1
    left = inverse_root(a.T @ a / degrees + ridge * np.eye(a.shape[1]))
    right = inverse_root(b.T @ b / degrees + ridge * np.eye(b.shape[1]))
    u, _, vt = np.linalg.svd(left @ (a.T @ b / degrees) @ right, full_matrices=False)
    return means, (left @ u, right @ vt.T)


def scores(rows, mean, weight, dim):
    return (rows - mean) @ weight[:, :dim]


def numpy_similarity(train, test, *, rho, ridge, dim, normalize=True, means=None):
    """Truncate, scale to length 1, weight."""
    train, test = ([prepared(rows, normalize) for rows in both] for both in (train, test))
    means, weights = numpy_cca(*train, ridge, means)
    u, v = (unit(scores(r, m, w, dim)) for r, m, w in zip(test, means, weights, strict=True))
    return np.einsum("ik,k,jk->ij", u, rho, v)


def numpy_held_out(image, text, *, ridge, folds, seed, dim, normalize=True):
    """Correlations of pairs that were held out, from the rows themselves."""
    fold = _folds(image, folds, seed)
    a, b = prepared(image, normalize), prepared(text, normalize)
    products = np.zeros((3, dim))
    for number in range(folds):
        means, weights = numpy_cca(a[fold != number], b[fold != number], ridge)
        u = scores(a[fold == number], means[0], weights[0], dim)
        v = scores(b[fold == number], means[1], weights[1], dim)
        products += [(u * v).sum(0), (u * u).sum(0), (v * v).sum(0)]
    return np.maximum(products[0] / np.sqrt(products[1] * products[2]), 0)


# ---- the definition


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ridge": 0.1, "dim": 3, "folds": 3},
        {"ridge": 0.0, "normalize": False},
        {"ridge": 1e-3, "normalize": False, "dim": 5},
    ],
)
def test_similarity_is_the_definition(options):
    train, test = pairs(), pairs(30, seed=1)
    fitted = csa(*train, seed=3, **options)
    settings = fitted.options
    dim = settings.dim or DY
    shared = {"ridge": settings.ridge, "dim": dim, "normalize": settings.normalize}
    rho = numpy_held_out(*train, folds=settings.folds, seed=3, **shared)
    np.testing.assert_allclose(fitted.correlations, rho, atol=1e-5)
    assert rho.max() > 0.5  # what is compared is no row of zeros
    expected = numpy_similarity(train, test, rho=rho, **shared)
    np.testing.assert_allclose(fitted.similarity(*test), expected, atol=2e-5)
    image, text = fitted.embed_image(test[0]), fitted.embed_text(test[1])
    np.testing.assert_allclose(np.asarray(image) @ np.asarray(text).T, expected, atol=2e-5)
    assert (fitted.image_dim, fitted.text_dim, fitted.dim) == (DX, DY, dim)
    assert not fitted.unit and np.linalg.norm(image, axis=1).max() < 1
    assert np.abs(expected).max() <= rho.max() + 1e-6


def test_equal_weights_are_cosines_and_need_no_folds():
    train, test = pairs(), pairs(30, seed=1)
    fitted = csa(*train, weights="equal", ridge=0.01, dim=5)
    expected = numpy_similarity(train, test, rho=np.ones(5), ridge=0.01, dim=5)
    np.testing.assert_allclose(fitted.similarity(*test), expected, atol=2e-5)
    assert fitted.unit
    np.testing.assert_allclose(np.linalg.norm(fitted.embed_text(test[1]), axis=1), 1, atol=1e-5)
    inside = csa(*train, correlations="in_sample", ridge=0.01, dim=5)
    np.testing.assert_array_equal(fitted.correlations, inside.correlations)


def test_in_sample_correlations_are_those_of_the_fitted_pairs():
    image, text = pairs()
    fitted = csa(image, text, correlations="in_sample", ridge=0.05)
    means, weights = numpy_cca(unit(image), unit(text), 0.05)
    u, v = (
        scores(unit(image), means[0], weights[0], DY),
        scores(unit(text), *_right(means, weights)),
    )
    rho = [np.corrcoef(u[:, k], v[:, k])[0, 1] for k in range(DY)]
    np.testing.assert_allclose(fitted.correlations, np.maximum(rho, 0), atol=1e-5)
    # Without a ridge these are the canonical correlations themselves.
    plain = csa(image, text, correlations="in_sample", ridge=0.0)
    a, b = (rows - rows.mean(0) for rows in (unit(image), unit(text)))
    left, right = np.linalg.qr(a)[0], np.linalg.qr(b)[0]
    canonical = np.linalg.svd(left.T @ right, compute_uv=False)
    np.testing.assert_allclose(plain.correlations, canonical, atol=1e-5)


def _right(means, weights):
    return means[1], weights[1], DY


def test_the_whitening_identities():
    image, text = pairs()
    ridge = 0.02
    fitted = csa(image, text, ridge=ridge)
    a, b = (unit(rows) - unit(rows).mean(0) for rows in (image, text))
    wx, wy = np.asarray(fitted.image_weight, float), np.asarray(fitted.text_weight, float)
    sxx, syy, sxy = (left.T @ right / (N - 1) for left, right in ((a, a), (b, b), (a, b)))
    np.testing.assert_allclose(wx.T @ (sxx + ridge * np.eye(DX)) @ wx, np.eye(DY), atol=1e-5)
    np.testing.assert_allclose(wy.T @ (syy + ridge * np.eye(DY)) @ wy, np.eye(DY), atol=1e-5)
    cross = wx.T @ sxy @ wy
    np.testing.assert_allclose(cross, np.diag(np.diag(cross)), atol=1e-5)
    assert (np.diff(np.diag(cross)) <= 1e-6).all()
    by_scatter = csa(image, text, ridge=ridge * (N - 1), ridge_on="scatter")
    np.testing.assert_allclose(by_scatter.image_weight, wx, atol=1e-4)


def test_truncated_then_normalised_then_weighted():
    train, test = pairs(), pairs(30, seed=1)
    dim, ridge = 3, 0.01
    fitted = csa(*train, dim=dim, ridge=ridge)
    rho = np.asarray(fitted.correlations, float)
    means, weights = numpy_cca(unit(train[0]), unit(train[1]), ridge)
    u, v = (scores(unit(r), m, w, DY) for r, m, w in zip(test, means, weights, strict=True))
    right = np.einsum("ik,k,jk->ij", unit(u[:, :dim]), rho, unit(v[:, :dim]))
    np.testing.assert_allclose(fitted.similarity(*test), right, atol=2e-5)
    too_early = np.einsum("ik,k,jk->ij", unit(u)[:, :dim], rho, unit(v)[:, :dim])
    too_late = unit(u[:, :dim] * np.sqrt(rho)) @ unit(v[:, :dim] * np.sqrt(rho)).T
    for wrong in (too_early, too_late):
        assert np.abs(wrong - right).max() > 0.02


def test_means_of_the_unpaired_rows():
    train, test, (more_image, more_text) = pairs(), pairs(30, seed=1), pairs(400, seed=2)
    fitted = csa(
        *train, more_image, more_text[:300], center="unpaired", ridge=0.1, correlations="in_sample"
    )
    means = unit(more_image).mean(0), unit(more_text[:300]).mean(0)
    np.testing.assert_allclose(fitted.image_mean, means[0], atol=1e-6)
    rho = np.asarray(fitted.correlations, float)
    expected = numpy_similarity(train, test, rho=rho, ridge=0.1, dim=fitted.dim, means=means)
    np.testing.assert_allclose(fitted.similarity(*test), expected, atol=2e-5)
    # Read for nothing else.
    ignored = csa(*train, np.full_like(more_image, np.nan), None, ridge=0.1)
    np.testing.assert_array_equal(ignored.image_weight, csa(*train, ridge=0.1).image_weight)


# ---- held-out correlations


def test_in_sample_correlations_of_noise_are_high_and_held_out_ones_are_not():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(60, 30)), rng.normal(size=(60, 30))
    inside = csa(*noise, ridge=0.0, correlations="in_sample").correlations
    outside = csa(*noise, ridge=0.0).correlations
    assert np.asarray(inside)[:10].mean() > 0.8
    assert np.asarray(outside).mean() < 0.15


def test_the_order_of_the_pairs_does_not_matter():
    train, test = pairs(), pairs(30, seed=1)
    order = np.random.default_rng(5).permutation(N)
    one, other = csa(*train), csa(*(rows[order] for rows in train))
    np.testing.assert_allclose(one.correlations, other.correlations, atol=1e-5)
    np.testing.assert_allclose(one.similarity(*test), other.similarity(*test), atol=2e-5)


def test_folds_are_even_keep_an_image_together_and_follow_the_seed():
    image, _ = pairs(100)
    fold = _folds(image, 5, 0)
    assert (np.bincount(fold) == 20).all()
    np.testing.assert_array_equal(fold, _folds(image.astype(np.float64), 5, 0))
    np.testing.assert_array_equal(fold[::-1], _folds(image[::-1], 5, 0))
    assert (_folds(image, 5, 1) != fold).any()
    captioned = _folds(np.repeat(image, 3, axis=0), 5, 0)
    np.testing.assert_array_equal(captioned, np.repeat(fold, 3))


def test_seed_changes_the_correlations_alone():
    train = pairs()
    one, same, other = csa(*train, seed=0), csa(*train, seed=0), csa(*train, seed=1)
    np.testing.assert_array_equal(one.correlations, same.correlations)
    assert np.abs(np.asarray(one.correlations) - np.asarray(other.correlations)).max() > 1e-4
    np.testing.assert_array_equal(one.image_weight, other.image_weight)


def test_directions_that_folds_disagree_on_are_no_use():
    image = np.random.default_rng(0).normal(size=(80, 1))
    sign = np.where(_folds(image, 2, 0) == 0, 1.0, -1.0)
    text = image * sign[:, None]
    options = {"normalize": False, "folds": 2}
    with pytest.raises(ValueError, match="correlations: those of held_out pairs are all 0"):
        csa(image, text, **options)
    assert csa(image, text, weights="equal", **options).dim == 1
    assert csa(image, image, **options).correlations[0] > 0.99


# ---- as published, thin data, errors


def test_as_published_few_pairs_fit_perfectly_and_a_ridge_finds_more():
    published = {"ridge": 0.0, "correlations": "in_sample", "normalize": False}
    train, test = pairs(30, 40, 35, noise=1.0), pairs(200, 40, 35, seed=1, noise=1.0)

    def recall(fitted):
        similarity = np.asarray(fitted.similarity(*test))
        return np.mean(np.argmax(similarity, axis=1) == np.arange(200))

    as_published = csa(*train, **published)
    np.testing.assert_allclose(as_published.correlations, 1, atol=1e-4)
    assert recall(csa(*train, ridge=0.1)) > 2 * recall(as_published)


def test_features_of_any_dtype_and_raw_size():
    image, text = pairs()
    one = csa(image.astype(np.float16), text.astype(np.float64))
    assert isinstance(one, Csa) and one.image_weight.dtype == np.float32
    scaled = csa(image * np.geomspace(0.1, 9, N, dtype=np.float32)[:, None], text, seed=1)
    assert scaled.embed_text(text[0]).shape == (DY,)
    np.testing.assert_allclose(scaled.image_weight, csa(image, text).image_weight, atol=1e-4)


@pytest.fixture
def untyped():
    """The library as its users get it, without the tests' type checks in front."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": -1}, "dim: got -1; must be positive, or 0"),
        ({"dim": 8}, "dim: got 8; without one fold of 5, the pairs support at most 7"),
        ({"dim": 8, "correlations": "in_sample"}, "dim=8: the pairs support at most 7"),
        ({"ridge": -0.5}, "ridge: got -0.5; must be finite"),
        ({"ridge": float("nan")}, "ridge: got nan; must be finite"),
        ({"folds": 1}, "folds: got 1; must be at least 2"),
        ({"folds": N + 1}, f"folds: got {N + 1}; the pairs have only {N} different images"),
        ({"ridge_on": "both"}, "ridge_on: got 'both'; must be one of covariance, scatter"),
        ({"correlations": "all"}, "correlations: got 'all'; must be one of held_out, in_sample"),
        ({"weights": "none"}, "weights: got 'none'; must be one of correlation, equal"),
        ({"center": "none"}, "center: got 'none'; must be one of pairs, unpaired"),
        ({"center": "unpaired"}, "unpaired_image: needed with these options"),
        ({"normalize": 1}, "normalize: got 1; must be of type bool"),
        ({"dim": 2.0}, "dim: got 2.0; must be of type int"),
        ({"ridges": 0.1}, "ridges: no such option; known are dim, ridge"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        csa(*pairs(), **options)


def test_bad_rows_are_named():
    image, text = pairs()
    broken = image.copy()
    broken[17, 2] = np.inf
    for rows, message in (
        ((broken, text), "image: row 17 holds NaN or infinity"),
        ((image, text[:-1]), "text: 119 rows, but image has 120"),
        ((image[:0], text[:0]), "image: holds no rows"),
        ((image[:1], text[:1]), "folds: got 5; the pairs have only 1 different images"),
        ((image[:2], text[:2]), "folds: got 5; the pairs have only 2 different images"),
        ((image, np.tile(text[:1], (N, 1))), "all 96 text rows are the same"),
    ):
        with pytest.raises(ValueError, match=message):
            csa(*rows)
    with pytest.raises(ValueError, match=r"folds: got 2; without one of them, .*at least 2 pairs"):
        csa(image[:2], text[:2], folds=2)
    with pytest.raises(ValueError, match=r"unpaired_text: 9 features, but the pairs have 7"):
        csa(image, text, image, image, center="unpaired")
    fitted = csa(image, text)
    with pytest.raises(
        ValueError, match=r"text: got shape \(120, 9\); expected \(n, 7\) or \(7,\)"
    ):
        fitted.embed_text(image)


def test_defaults_are_the_ones_documented():
    options = CsaOptions()
    assert (options.dim, options.folds, options.correlations) == (0, 5, "held_out")
    assert options.normalize and options.ridge > 0
