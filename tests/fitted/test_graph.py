import graph_reference
import numpy as np

from sotalign_jax.fitted.graph import neighbour_graph, prepared_by


def _rows(n=70, d=6, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def test_weights_are_those_of_the_definition():
    rows = _rows()
    got = neighbour_graph(rows, neighbours=9, scale_neighbour=5)
    weights, radius, bandwidth = graph_reference.graph(rows, 9, 5)
    np.testing.assert_allclose(got.weights, weights, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(got.weights) > 0, weights > 0)
    np.testing.assert_allclose(got.radius, radius, rtol=1e-4)
    np.testing.assert_allclose(got.bandwidth, [bandwidth], rtol=1e-4)
    np.testing.assert_array_equal(np.diag(got.weights), 1.0)
    np.testing.assert_array_equal(got.weights, np.asarray(got.weights).T)


def test_the_order_of_the_rows_does_not_matter_even_where_they_are_as_near():
    # On a grid most rows have several neighbours at the same distance.
    grid = np.stack(np.meshgrid(np.arange(8.0), np.arange(8.0)), axis=-1).reshape(-1, 2)
    rows = np.asarray(prepared_by(grid.astype(np.float32))(grid.astype(np.float32)))
    order = np.random.default_rng(0).permutation(len(rows))
    one = neighbour_graph(rows, neighbours=5, scale_neighbour=3).weights
    other = neighbour_graph(rows[order], neighbours=5, scale_neighbour=3).weights
    np.testing.assert_allclose(np.asarray(one)[np.ix_(order, order)], other, atol=1e-6)


def test_copies_are_tied_to_each_other_alone():
    rows = np.repeat(_rows(5, 3), 8, axis=0)
    weights = np.asarray(neighbour_graph(rows, neighbours=7, scale_neighbour=4).weights)
    np.testing.assert_allclose(weights, np.kron(np.eye(5), np.ones((8, 8))), atol=0.2)
    assert (np.kron(1 - np.eye(5), np.ones((8, 8))) * weights).max() == 0


def test_few_rows_are_all_neighbours():
    weights = np.asarray(neighbour_graph(_rows(4), neighbours=30).weights)
    assert weights.shape == (4, 4) and (weights > 0).all()


def test_prepared_rows_have_mean_zero_and_mean_square_length_one():
    rows = 40 + 3 * _rows()
    prepared = np.asarray(prepared_by(rows)(rows))
    np.testing.assert_allclose(prepared.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.square(prepared).sum(axis=1).mean(), 1, rtol=1e-4)
    same = np.ones((3, 2), np.float32)
    np.testing.assert_array_equal(prepared_by(same)(same), 0.0)
