import inspect

import graph_reference
import jax
import numpy as np
import pytest
import scipy.linalg

from sotalign_jax.fitted.spectral import nystrom


def _rows(n=80, d=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def _blobs(n=40, seed=0):
    """Three clouds, far apart, and which of them a row is in."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n)
    return 20 * np.eye(3)[label] + rng.normal(size=(n, 3)), label


def _circle(n, phase=0.0):
    angle = 2 * np.pi * (np.arange(n) + phase) / n
    return np.stack([np.cos(angle), np.sin(angle)], axis=1), angle


def test_eigenvectors_are_those_of_the_normalised_laplacian():
    rows = _rows()
    got = nystrom(rows, dim=6, neighbours=12, scale_neighbour=6)
    centred = rows - rows.mean(axis=0)
    weights, _, _ = graph_reference.graph(centred, 12, 6)
    degree = weights.sum(axis=1)
    # D - W against D: the same vectors, by another road.
    values, vectors = scipy.linalg.eigh(np.diag(degree) - weights, np.diag(degree))
    np.testing.assert_allclose(1 - np.asarray(got.eigenvalues), values[:6], atol=1e-5)
    ours = np.asarray(got.vectors * got.eigenvalues[None, :], np.float64)
    theirs = vectors[:, :6] * np.sqrt(degree.sum())
    theirs *= np.sign(np.sum(theirs * ours, axis=0))
    np.testing.assert_allclose(ours, theirs, atol=2e-3)
    np.testing.assert_allclose(ours.T * degree @ ours, degree.sum() * np.eye(6), atol=0.1)
    np.testing.assert_allclose(ours[:, 0], 1.0, atol=1e-4)


def test_a_row_of_the_graph_has_its_own_entry():
    rows = _rows(300)  # more than are embedded at once
    got = nystrom(rows, dim=8, neighbours=12, scale_neighbour=6)
    entries = np.asarray(got.vectors * got.eigenvalues[None, :])
    embedded = np.asarray(jax.jit(lambda x: got.embed(x, neighbours=12))(rows.astype(np.float32)))
    np.testing.assert_allclose(embedded, entries, atol=1e-3)
    one = got.embed(rows[7:8].astype(np.float32), neighbours=12)
    np.testing.assert_allclose(one, embedded[7:8], atol=1e-4)


def test_clusters_far_apart_have_their_indicators_and_new_rows_find_them():
    rows, label = _blobs(60)
    got = nystrom(rows, dim=5, neighbours=6, scale_neighbour=4)
    np.testing.assert_allclose(got.eigenvalues[:3], 1.0, atol=1e-6)
    assert got.eigenvalues[3] < 0.99
    indicators = np.eye(3)[label]
    leading = np.asarray(got.vectors[:, :3], np.float64)
    coefficients, _, _, _ = np.linalg.lstsq(indicators, leading, rcond=None)
    np.testing.assert_allclose(indicators @ coefficients, leading, atol=1e-4)
    new, new_label = _blobs(30, seed=1)
    embedded = got.embed(new.astype(np.float32), neighbours=6)[:, :3]
    np.testing.assert_allclose(embedded, np.eye(3)[new_label] @ coefficients, atol=1e-4)


def test_a_circle_has_cosines_and_sines_also_between_its_rows():
    rows, _ = _circle(60)
    got = nystrom(rows, dim=5, neighbours=10, scale_neighbour=5)
    middle, angle = _circle(60, phase=0.5)
    embedded = np.asarray(got.embed(middle.astype(np.float32), neighbours=10), np.float64)
    for k, columns in ((1, slice(1, 3)), (2, slice(3, 5))):
        waves = np.sqrt(2) * np.stack([np.cos(k * angle), np.sin(k * angle)], axis=1)
        turn, _, _, _ = np.linalg.lstsq(waves, embedded[:, columns], rcond=None)
        np.testing.assert_allclose(waves @ turn, embedded[:, columns], atol=2e-2)
        np.testing.assert_allclose(turn.T @ turn, np.eye(2), atol=5e-2)


def test_rows_far_from_everything_are_finite():
    got = nystrom(_rows(), dim=4, neighbours=8, scale_neighbour=4)
    far = np.asarray(got.embed(np.full((1, 5), 1e6, np.float32), neighbours=8))
    assert np.isfinite(far).all() and np.abs(far).max() <= np.abs(got.vectors).max()


def test_some_of_the_rows_stand_for_all():
    rows, label = _blobs(300)
    options = {"dim": 3, "neighbours": 6, "scale_neighbour": 4, "landmarks": 60}
    few = nystrom(rows, **options)
    assert few.landmarks.shape == (60, 3)
    embedded = np.asarray(few.embed(rows.astype(np.float32), neighbours=6), np.float64)
    indicators = np.eye(3)[label]
    coefficients, _, _, _ = np.linalg.lstsq(indicators, embedded, rcond=None)
    np.testing.assert_allclose(indicators @ coefficients, embedded, atol=1e-4)
    assert np.linalg.matrix_rank(coefficients, tol=0.1) == 3
    again, other = nystrom(rows, **options), nystrom(rows, **options, seed=1)
    np.testing.assert_array_equal(few.landmarks, again.landmarks)
    np.testing.assert_array_equal(few.vectors, again.vectors)
    assert np.any(np.asarray(few.landmarks) != np.asarray(other.landmarks))


def test_bad_input_is_named():
    rows = _rows(20)
    for bad, message in (
        ({"dim": 0}, r"dim: got 0; must lie between 1 and 19"),
        ({"dim": 20}, r"dim: got 20; must lie between 1 and 19"),
        ({"neighbours": 0}, r"neighbours: got 0; must be at least 1"),
        ({"neighbours": 20}, r"neighbours: got 20; a graph of 20 rows"),
        ({"landmarks": 5}, r"neighbours: got 6; a graph of 5 rows"),
        ({"scale_neighbour": 1}, r"scale_neighbour: got 1; must lie between 2 and 7"),
        ({"scale_neighbour": 8}, r"scale_neighbour: got 8; must lie between 2 and 7"),
        ({"dim": 19}, r"dim: got 19; only \d+ eigenvectors can be extended"),
    ):
        options = {"dim": 3, "neighbours": 6, "scale_neighbour": 4, **bad}
        with pytest.raises(ValueError, match=message):
            nystrom(rows, **options)
    for bad, message in (
        (rows * np.nan, "rows: row 0 holds NaN"),
        (np.full((20, 5), 1e39), "rows: row 0 holds NaN or infinity"),
        (np.ones((20, 5)), "rows: all 20 are the same"),
        (rows[0], "rows: shape"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(nystrom)(bad, dim=3, neighbours=6, scale_neighbour=4)
    fitted = nystrom(rows, dim=3, neighbours=6, scale_neighbour=4)
    with pytest.raises(ValueError, match=r"rows: got shape \(2, 4\); expected \(n, 5\)"):
        fitted.embed(np.ones((2, 4), np.float32), neighbours=6)
