import inspect

import graph_reference
import numpy as np
import pytest

from sotalign_jax.fitted.spectralnet import orthonormalizing, rayleigh, spectral_net

SMALL = {
    "dim": 3,
    "hidden": (16,),
    "neighbours": 6,
    "scale_neighbour": 4,
    "batch_size": 40,
    "epochs": 60,
}


def _rows(n=60, seed=0):
    """Three clouds that a few rows join, and which of them a row is in."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n)
    return 4 * np.eye(3)[label] + rng.normal(size=(n, 3)), label


@pytest.fixture(scope="module")
def fitted():
    rows, _ = _rows()
    return spectral_net(rows, **SMALL)


def test_orthonormalizing_is_the_inverse_of_householders_r():
    rows = np.random.default_rng(0).normal(size=(50, 6)) + 2
    turn = np.asarray(orthonormalizing(rows.astype(np.float32)), np.float64)
    upper = np.linalg.qr(rows, mode="r")
    expected = np.sqrt(50) * np.linalg.inv(upper)
    np.testing.assert_allclose(turn, expected * np.sign(np.diag(expected)), atol=1e-4)
    np.testing.assert_allclose((rows @ turn).T @ (rows @ turn), 50 * np.eye(6), atol=1e-2)


def test_outputs_that_are_almost_the_same_are_made_orthonormal_too():
    rng = np.random.default_rng(0)
    rows = (1 + 1e-3 * rng.normal(size=(80, 5))).astype(np.float32)
    turned = rows @ np.asarray(orthonormalizing(rows), np.float64)
    np.testing.assert_allclose(turned.T @ turned / 80, np.eye(5), atol=1e-2)
    same = np.asarray(orthonormalizing(np.ones((80, 5), np.float32)))
    assert np.isfinite(same).all()


def test_rayleigh_is_the_weighted_sum_of_squared_differences():
    rng = np.random.default_rng(0)
    y, weights = rng.normal(size=(12, 3)), rng.uniform(size=(12, 12))
    weights = weights + weights.T
    expected = 0.0
    for i in range(12):
        for j in range(12):
            expected += weights[i, j] * np.square(y[i] - y[j]).sum() / (2 * 12)
    got = rayleigh(y.astype(np.float32), weights.astype(np.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    with pytest.raises(ValueError, match=r"weights: got shape \(12, 12\); 11 embeddings"):
        inspect.unwrap(rayleigh)(y[1:].astype(np.float32), weights.astype(np.float32))


def test_embeddings_are_orthonormal_sorted_and_near_the_smoothest_there_are(fitted):
    rows, _ = _rows()
    embedded = np.asarray(fitted.embed(rows.astype(np.float32)), np.float64)
    np.testing.assert_allclose(embedded.T @ embedded / len(rows), np.eye(3), atol=1e-3)
    weights, _, _ = graph_reference.graph(rows - rows.mean(axis=0), 6, 4)
    laplacian = np.diag(weights.sum(axis=1)) - weights
    rough = embedded.T @ laplacian @ embedded / len(rows)
    np.testing.assert_allclose(rough, np.diag(np.diag(rough)), atol=1e-3)
    assert (np.diff(np.diag(rough)) > 0).all()
    best = np.linalg.eigvalsh(laplacian)[:3].sum()
    random = np.trace(laplacian) / len(rows) * 3
    # The way from what chance gives to what there is.
    assert np.trace(rough) < best + 0.1 * (random - best)


def test_new_rows_find_their_cluster(fitted):
    (rows, label), (new, new_label) = _rows(), _rows(40, seed=1)
    means = [
        np.asarray(fitted.embed(rows[label == k].astype(np.float32))).mean(0) for k in (0, 1, 2)
    ]
    embedded = np.asarray(fitted.embed(new.astype(np.float32)))
    distance = np.square(embedded[:, None, :] - np.stack(means)[None]).sum(axis=2)
    assert np.mean(distance.argmin(axis=1) == new_label) > 0.9


def test_the_seed_decides_and_progress_is_told(fitted):
    rows, _ = _rows()
    told = []
    again = spectral_net(rows, **SMALL, progress=lambda done, total: told.append((done, total)))
    for one, other in zip(fitted.layers.values(), again.layers.values(), strict=True):
        np.testing.assert_array_equal(one["weight"], other["weight"])
    np.testing.assert_array_equal(fitted.rotation, again.rotation)
    other = spectral_net(rows, **SMALL, seed=1)
    assert np.any(
        np.asarray(fitted.layers["0"]["weight"]) != np.asarray(other.layers["0"]["weight"])
    )
    assert told == [(k + 1, 60) for k in range(len(told))] and 10 < len(told) <= 60


def test_a_constant_turn_gives_another_gradient():
    rows, _ = _rows()
    options = {**SMALL, "epochs": 1}
    one = spectral_net(rows, **options)
    other = spectral_net(rows, **options, orthonormal="constant")
    assert np.abs(np.asarray(one.rotation - other.rotation)).max() > 1e-4


def test_what_diverges_is_stopped():
    rows, _ = _rows()
    with pytest.raises(FloatingPointError, match=r"spectral_net: .*lower learning_rate"):
        spectral_net(rows, **{**SMALL, "epochs": 3}, learning_rate=1e30)


def test_bad_input_is_named():
    rows, _ = _rows(40)
    for bad, message in (
        ({"dim": 0}, "dim: got 0; must be at least 1"),
        ({"dim": 37}, "dim: got 37; the 36 rows of a batch"),
        ({"epochs": 0}, "epochs: got 0; must be at least 1"),
        ({"hidden": ()}, r"hidden: got \(\); one or more"),
        ({"hidden": (8, 0)}, r"hidden: got \(8, 0\); one or more"),
        ({"learning_rate": 0.0}, "learning_rate: got 0.0; must be positive"),
        ({"batch_size": 6}, "neighbours: got 6; a graph of 6 rows"),
        ({"scale_neighbour": 9}, "scale_neighbour: got 9; must lie between 2 and 7"),
        ({"orthonormal": "no"}, "orthonormal: got 'no'; must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            inspect.unwrap(spectral_net)(rows, **{**SMALL, **bad})
    with pytest.raises(ValueError, match="rows: row 0 holds NaN"):
        spectral_net(rows * np.nan, **SMALL)
