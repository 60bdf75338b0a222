"""Independent truths for the numerics tests: plain float64 NumPy, run to convergence."""

from __future__ import annotations

import functools
import importlib.resources

import numpy as np

EPSILON, TEACHER_EPSILON = 0.05, 0.01


def logsumexp(matrix, axis):
    top = np.max(matrix, axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        total = np.log(np.sum(np.exp(matrix - top), axis=axis))
    return total + np.squeeze(top, axis)


def sinkhorn(affinity, epsilon, a=None, b=None, *, tolerance=1e-12, iterations=None, limit=20_000):
    """Plan of plain log-domain Sinkhorn (columns, then rows), to convergence or for a fixed count.

    To convergence, Newton steps on the dual finish what Sinkhorn began. Whatever found it, a matrix
    of the form ``exp(f + g + K / epsilon)`` with the right marginals is the one and only plan.
    """
    scores = np.asarray(affinity, np.float64) / epsilon
    n, m = scores.shape
    a = np.full(n, 1.0 / n) if a is None else np.asarray(a, np.float64)
    b = np.full(m, 1.0 / m) if b is None else np.asarray(b, np.float64)
    with np.errstate(divide="ignore"):
        log_a, log_b = np.log(a), np.log(b)

    def iterate(f):
        g = log_b - logsumexp(scores + f[:, None], 0)
        f = log_a - logsumexp(scores + g[None, :], 1)
        plan = np.exp(scores + f[:, None] + g[None, :])
        return f, plan, np.abs(plan.sum(0) - b).sum()

    f = np.zeros(n)
    if iterations is not None:
        for _ in range(iterations):
            f, plan, error = iterate(f)
        return plan
    for count in range(limit):
        f, plan, error = iterate(f)
        if error < tolerance:
            return plan
        if count % 50 == 49:
            rows, columns = np.diag(plan.sum(1)), np.diag(plan.sum(0))
            hessian = np.block([[rows, plan], [plan.T, columns]])
            residual = np.r_[a - plan.sum(1), b - plan.sum(0)]
            step = np.linalg.lstsq(hessian, residual, rcond=1e-14)[0][:n]
            if iterate(f + step)[2] < error:
                f = f + step
    raise AssertionError("the reference itself did not converge")


def plan_of(solution, affinity):
    """The plan that float32 potentials stand for, in float64."""
    f, g = (np.asarray(p, np.float64) for p in (solution.f, solution.g))
    affinity = np.asarray(affinity, np.float64)
    return np.exp((f[:, None] + g[None, :] + affinity) / float(solution.epsilon))


def marginal_errors(plan, a=None, b=None):
    """L1 errors of the row and of the column sums."""
    n, m = plan.shape
    a, b = (np.full(n, 1.0 / n) if a is None else a), (np.full(m, 1.0 / m) if b is None else b)
    return np.abs(plan.sum(1) - a).sum(), np.abs(plan.sum(0) - b).sum()


def unit(rows):
    rows = np.asarray(rows, np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cosines(image, text):
    return unit(image) @ unit(text).T


def klot(affinity, teacher_affinity, epsilon=EPSILON, teacher_epsilon=TEACHER_EPSILON):
    """Value, and gradient with respect to the affinity, from plans run to convergence."""
    plan, teacher = sinkhorn(affinity, epsilon), sinkhorn(teacher_affinity, teacher_epsilon)
    positive = teacher > 0
    value = np.sum(teacher[positive] * np.log(teacher[positive] / plan[positive]))
    return value, (plan - teacher) / epsilon


def shipped_features():
    """The packaged emoji features: drawings and embedded labels, row by row."""
    folder = importlib.resources.files("sotalign_jax") / "features" / "data"
    return tuple(
        np.load(str(folder / name)).astype(np.float64)
        for name in ("emoji_image_google.npy", "emoji_text_label_tags.npy")
    )


@functools.cache
def cca_rows(pairs=300, ridge=0.1):
    """Shipped rows that no pair comes from, projected by a CCA of shipped pairs."""
    image, text = shipped_features()
    order = np.random.default_rng(0).permutation(len(image))
    # A part of the features will do, and its eigendecomposition takes no time.
    image, text = unit(image[:, :320]), unit(text)
    image, text = image - image[order[:pairs]].mean(0), text - text[order[:pairs]].mean(0)
    left, right = image[order[:pairs]], text[order[:pairs]]

    def inverse_root(rows):
        values, vectors = np.linalg.eigh(rows.T @ rows / (pairs - 1))
        return (vectors / np.sqrt(np.maximum(values, 0) + ridge)) @ vectors.T

    whiten_left, whiten_right = inverse_root(left), inverse_root(right)
    cross = whiten_left @ (left.T @ right / (pairs - 1)) @ whiten_right
    u, _, vt = np.linalg.svd(cross, full_matrices=False)
    rest = order[pairs:]
    return image[rest] @ whiten_left @ u, text[rest[::-1]] @ whiten_right @ vt.T


def cca_affinity(n, m):
    """Cosines that a CCA teacher gives to shipped rows, with no correspondence."""
    image, text = cca_rows()
    return cosines(image[:n], text[:m])
