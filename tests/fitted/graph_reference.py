"""The neighbour graph as its definition reads, in float64 NumPy."""

import numpy as np


def graph(rows, neighbours, scale_neighbour):
    """Weights, squared distance of each last neighbour, squared bandwidth."""
    rows = np.asarray(rows, np.float64)
    squares = np.square(rows[:, None, :] - rows[None, :, :]).sum(axis=2)
    nearest = np.sort(squares, axis=1)
    ties = np.zeros_like(squares)
    for i, row in enumerate(squares):
        ties[i, np.argsort(row, kind="stable")[: neighbours + 1]] = 1
    bandwidth = np.median(np.sqrt(nearest[:, scale_neighbour - 1])) ** 2
    directed = ties * np.exp(-squares / bandwidth)
    return (directed + directed.T) / 2, nearest[:, neighbours], bandwidth
