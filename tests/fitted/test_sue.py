import inspect
from typing import Any

import numpy as np
import pytest

from sotalign_jax.fitted import sue
from sotalign_jax.fitted.mmd import residual_map
from sotalign_jax.fitted.spectral import Nystrom
from sotalign_jax.fitted.sue import SUE, spectral_cca
from sotalign_jax.numerics import unit_rows64

QUICK = {"spectral_dim": 12, "dim": 5, "neighbours": 12, "scale_neighbour": 6, "mmd_epochs": 2}


def _views(n, seed):
    """Two nonlinear views of points of a square, each with noise of its own."""
    rng = np.random.default_rng(seed)
    z = rng.uniform(-1, 1, size=(n, 2))
    maps = np.random.default_rng(9)
    waves = [z, z**2, np.sin(2 * z), z[:, :1] * z[:, 1:], np.exp(-(z**2))]
    image, text = (np.concatenate(waves[k : k + 3], axis=1) for k in (0, 2))
    image = np.tanh(image @ maps.normal(size=(image.shape[1], 12)))
    text = np.cos(text @ maps.normal(size=(text.shape[1], 9)) + 0.5)
    return (
        image + 0.02 * rng.normal(size=image.shape),
        text + 0.02 * rng.normal(size=text.shape),
    )


def _jobs(pairs=30, unpaired=220):
    """Pairs, then images and texts of which no two belong together."""
    return *_views(pairs, 0), _views(unpaired, 1)[0], _views(unpaired, 2)[1]


def _recall(aligner, k=5, n=100):
    image, text = _views(n, 3)
    affinity = np.asarray(aligner.similarity(image, text))
    better = (affinity > np.diag(affinity)[:, None]).sum(axis=1)
    return np.mean(better < k)


def _pairs(n=40, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 4))
    image = z @ rng.normal(size=(4, 7)) + 0.4 * rng.normal(size=(n, 7)) + 2
    text = z @ rng.normal(size=(4, 5)) + 0.4 * rng.normal(size=(n, 5)) - 1
    return image, text


# ---- the second stage


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_correct_cca_gives_scores_of_covariance_one_that_correlate_in_order(ridge):
    image, text = _pairs()
    got = spectral_cca(image, text, dim=4, ridge=ridge)
    u = (image - got.image_mean) @ got.image_weight
    v = (text - got.text_mean) @ got.text_weight
    for scores, weight in ((u, got.image_weight), (v, got.text_weight)):
        covariance = scores.T @ scores / 39 + ridge * weight.T @ weight
        np.testing.assert_allclose(covariance, np.eye(4), atol=1e-4)
    # The canonical correlations by two QR decompositions, where nothing regularises them.
    cross = u.T @ v / 39
    np.testing.assert_allclose(cross, np.diag(np.diag(cross)), atol=1e-4)
    if ridge == 0:
        left, right = (np.linalg.qr(x - x.mean(axis=0))[0] for x in (image, text))
        expected = np.linalg.svd(left.T @ right, compute_uv=False)[:4]
        np.testing.assert_allclose(np.diag(cross), expected, atol=1e-4)


def _by_deflation(x, y, dim):
    """Rotations of CCA by deflation of standardised columns, as scikit-learn defines them."""
    x, y = ((r - r.mean(axis=0)) / r.std(axis=0, ddof=1) for r in (x, y))
    weights, loadings = ([], []), ([], [])
    for _ in range(dim):
        (ux, sx, vx), (uy, sy, vy) = (np.linalg.svd(r, full_matrices=False) for r in (x, y))
        keep_x, keep_y = sx > 1e-9, sy > 1e-9
        a, _, b = np.linalg.svd(ux[:, keep_x].T @ uy[:, keep_y])
        wx = vx[keep_x].T @ (a[:, 0] / sx[keep_x])
        wy = vy[keep_y].T @ (b[0] / sy[keep_y])
        for side, (rows, w) in enumerate(((x, wx), (y, wy))):
            w = w / np.linalg.norm(w)
            scores = rows @ w
            loading = rows.T @ scores / (scores @ scores)
            weights[side].append(w)
            loadings[side].append(loading)
            rows -= np.outer(scores, loading)
    return [
        np.stack(w, axis=1) @ np.linalg.inv(np.stack(p, axis=1).T @ np.stack(w, axis=1))
        for w, p in zip(weights, loadings, strict=True)
    ]


def test_published_cca_multiplies_raw_embeddings_by_rotations_of_standardised_ones():
    image, text = _pairs()
    got = spectral_cca(image, text, dim=4, scaling="published")
    left, right = _by_deflation(image, text, 4)
    sign = np.sign(np.sum(left * got.image_weight, axis=0))
    np.testing.assert_allclose(got.image_weight, left * sign, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got.text_weight, right * sign, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(got.image_mean, np.zeros(7))
    np.testing.assert_array_equal(got.text_mean, np.zeros(5))
    constant = np.concatenate([image, np.ones((40, 1))], axis=1)
    with_one = spectral_cca(constant, text, dim=4, scaling="published")
    np.testing.assert_allclose(with_one.image_weight[:7], got.image_weight, atol=1e-3)
    np.testing.assert_allclose(with_one.image_weight[7], 0.0, atol=1e-6)


def test_bad_pairs_are_named():
    image, text = _pairs()
    with pytest.raises(ValueError, match="dim=6: the pairs support at most 5"):
        spectral_cca(image, text, dim=6)
    with pytest.raises(ValueError, match="scaling: got 'none'; must be one of"):
        inspect.unwrap(spectral_cca)(image, text, dim=2, scaling="none")
    with pytest.raises(ValueError, match="holds NaN"):
        spectral_cca(image * np.nan, text, dim=2)


# ---- all three


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def quick(told):
    return sue(*_jobs(), **QUICK, progress=lambda *what: told.append(what))


def test_few_pairs_align_two_nonlinear_views(quick):
    assert _recall(quick) > 0.5  # chance 5 / 100
    dims = quick.image_dim, quick.text_dim, quick.dim, quick.unit
    assert dims == (12, 9, 5, True)
    image, text = _views(100, 4)
    for rows in (quick.embed_image(image), quick.embed_text(text)):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    # Only the pairs say which directions of the two embeddings belong together.
    image, text, *unpaired = _jobs()
    assert _recall(sue(image, text[::-1], *unpaired, **QUICK)) < 0.2


@pytest.mark.slow
def test_few_pairs_align_two_nonlinear_views_by_the_network():
    aligner = sue(*_jobs(unpaired=600), spectral_dim=12, dim=6, neighbours=15, embedding="network")
    assert _recall(aligner) > 0.4


def test_the_residual_network_takes_the_scores_of_all_images_to_those_of_all_texts(quick):
    image, text, unpaired_image, unpaired_text = _jobs()
    scores = []
    for side, rows in (("image", (image, unpaired_image)), ("text", (text, unpaired_text))):
        rows = unit_rows64(np.concatenate(rows)).astype(np.float32)
        embedded = Nystrom(**getattr(quick, side)).embed(rows, neighbours=12)
        mean, weight = (np.asarray(getattr(quick, f"{side}_{what}")) for what in ("mean", "weight"))
        scores.append((np.asarray(embedded) - mean) @ weight)
    residual = residual_map(*scores, epochs=2)
    for k in ("0", "1", "2"):
        for name, array in residual.layers[k].items():
            np.testing.assert_allclose(quick.residual[k][name], array, atol=2e-4)
    moved = np.asarray(residual(scores[0][:30]))
    expected = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    np.testing.assert_allclose(quick.embed_image(image), expected, atol=1e-2)
    assert np.abs(moved - scores[0][:30]).max() > 1e-3


def test_the_seed_decides_and_progress_is_told(quick, told):
    rows = _views(100, 4)[0]
    again = sue(*_jobs(), **QUICK)
    np.testing.assert_array_equal(quick.embed_image(rows), again.embed_image(rows))
    other = sue(*_jobs(), **QUICK, seed=1)
    assert np.abs(np.asarray(quick.embed_image(rows) - other.embed_image(rows))).max() > 1e-4
    assert told == [
        ("embed images", 1, 1),
        ("embed texts", 1, 1),
        ("move images", 1, 2),
        ("move images", 2, 2),
    ]


def test_rows_of_any_length_are_the_same_where_they_are_normalised(quick):
    jobs = _jobs()
    other = sue(*(rows * 7.0 for rows in jobs), **QUICK)
    rows = _views(100, 4)[0]
    np.testing.assert_allclose(quick.embed_image(rows), other.embed_image(rows * 3), atol=1e-3)
    raw = sue(*jobs, **QUICK, normalize=False)
    assert np.abs(np.asarray(raw.embed_image(rows) - raw.embed_image(rows * 3))).max() > 0.01


def test_unpaired_rows_may_be_missing(quick):
    image, text, *_ = _jobs(pairs=250)
    none = sue(image, text, **QUICK)
    empty = sue(image, text, image[:0], text[:0], **QUICK)
    rows = _views(100, 4)[0]
    np.testing.assert_array_equal(none.embed_image(rows), empty.embed_image(rows))
    np.testing.assert_allclose(none.image["center"], unit_rows64(image).mean(axis=0), atol=1e-6)


def test_bad_input_is_named():
    image, text, unpaired_image, unpaired_text = _jobs()
    for bad, message in (
        ({"spectral_dim": 0}, "spectral_dim: got 0; must be at least 1"),
        ({"dim": 13}, "dim: got 13; must be at most spectral_dim, which is 12"),
        ({"dim": 30, "spectral_dim": 40}, "dim: got 30; 30 pairs support at most 29"),
        ({"ridge": -1.0}, "ridge: got -1.0; must be finite"),
        ({"scale_neighbour": 14}, "scale_neighbour: got 14; must lie between 2 and 13"),
        ({"mmd_epochs": -1}, "mmd_epochs: got -1; must be at least 0"),
        ({"batch_size": 1}, "batch_size: got 1; must be at least 2"),
        ({"mmd_learning_rate": 0.0}, "mmd_learning_rate: got 0.0; must be positive"),
        ({"hidden": "64,64"}, "hidden: got '64,64'; must be widths"),
        ({"mmd_hidden": "0-8"}, "mmd_hidden: got '0-8'; must be widths"),
        ({"neighbors": 3}, "neighbors: no such option; known are embedding"),
        ({"neighbours": 300}, "image: neighbours: got 300; a graph of 250 rows"),
    ):
        options: dict[str, Any] = {**QUICK, **bad}
        with pytest.raises(ValueError, match=message):
            sue(image, text, unpaired_image, unpaired_text, **options)
    for rows, message in (
        ((image, text, unpaired_image[:, :5], unpaired_text), "unpaired_image: 5 features"),
        ((image, text, unpaired_image, unpaired_text * np.nan), "unpaired_text: row 0 holds NaN"),
        ((image, text, np.full((3, 12), 1e39), unpaired_text), "image: row 30 holds NaN or inf"),
        ((np.ones_like(image), text, None, unpaired_text), "image: rows: all 30 are the same"),
        ((image, text[:7], unpaired_image, unpaired_text), "text: 7 rows, but image has 30"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(sue)(*rows, **QUICK)


def test_published_options_are_those_of_the_published_code():
    published = SUE.options(**SUE.published)
    assert (published.spectral_dim, published.dim, published.neighbours) == (30, 8, 30)
    assert published.hidden == "4096-4096-1024" and published.mmd_hidden == "32-32"
