import functools

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.evaluation import linear_cka, mutual_knn


def views(n=60, d=9, e=7, latent=3, noise=0.5, seed=0):
    """Two noisy linear views of one latent, rows of uneven length."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, latent))
    sides = []
    for dim in (d, e):
        rows = z @ rng.normal(size=(latent, dim)) + noise * rng.normal(size=(n, dim))
        sides.append(((rows + 0.5) * rng.uniform(0.1, 9, (n, 1))).astype(np.float32))
    return sides


def neighbour_sets(rows, k, metric):
    rows = np.asarray(rows, np.float64)
    sets = []
    for i, row in enumerate(rows):
        if metric == "cosine":
            far = -rows @ row / np.linalg.norm(rows, axis=1)
        else:
            far = np.linalg.norm(rows - row, axis=1)
        far[i] = np.inf
        sets.append(set(np.argsort(far, kind="stable")[:k].tolist()))
    return sets


def overlap(image, text, k, metric="cosine"):
    pairs = zip(neighbour_sets(image, k, metric), neighbour_sets(text, k, metric), strict=True)
    return np.mean([len(a & b) for a, b in pairs]) / k


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("k", "chunk_size"), [(1, 60), (5, 1), (10, 13), (58, 1024)])
def test_mutual_knn_by_brute_force(metric, k, chunk_size):
    image, text = views()
    found = mutual_knn(image, text, k=k, metric=metric, permutations=2, chunk_size=chunk_size)
    assert found["score"] == pytest.approx(overlap(image, text, k, metric), abs=1e-12)
    assert found["chance"] == pytest.approx(k / 59)
    assert (found["n"], found["k"]) == (60, k)


def test_the_metrics_differ_and_euclidean_needs_no_origin():
    image, text = views()
    cosine, euclidean = (
        mutual_knn(image, text, k=5, metric=metric) for metric in ("cosine", "euclidean")
    )
    assert cosine["score"] != euclidean["score"]
    # Multiples of 1/64 are exact 4096 away in float32: only the origin moves.
    coarse = [np.round(rows * 64) / 64 for rows in (image, text)]
    near = mutual_knn(*coarse, k=5, metric="euclidean")
    far = mutual_knn(*(rows + np.float32(4096) for rows in coarse), k=5, metric="euclidean")
    assert near == far


def test_the_null_is_that_of_shuffled_texts():
    image, text = views(n=40, noise=2.0)
    found = mutual_knn(image, text, k=4, permutations=300, seed=5)
    rng = np.random.default_rng(0)
    null = np.array([overlap(image, text[rng.permutation(40)], 4) for _ in range(300)])
    # Two samples of 300 of one law: means within 4 standard errors, deviations within 4 as well.
    error = null.std() / np.sqrt(300)
    assert abs(found["null_mean"] - null.mean()) < 4 * np.sqrt(2) * error
    assert abs(found["null_mean"] - found["chance"]) < 4 * error
    assert found["null_sd"] / null.std() == pytest.approx(1, abs=4 / np.sqrt(300))
    assert found["z"] == pytest.approx((found["score"] - 4 / 39) / found["null_sd"])
    assert mutual_knn(image, text, k=4, permutations=300, seed=5) == found
    assert mutual_knn(image, text, k=4, permutations=300, seed=6)["null_sd"] != found["null_sd"]


def test_pairs_stand_out_and_shuffled_pairs_do_not():
    image, text = views(n=200)
    found = mutual_knn(image, text, permutations=99)
    assert found["p"] == 0.01 and found["z"] > 10
    # Of 20 shuffles, about one has p <= 0.05; more than five have once in 10,000.
    low = 0
    for seed in range(20):
        shuffled = text[np.random.default_rng(seed).permutation(200)]
        low += mutual_knn(image, shuffled, permutations=99)["p"] <= 0.05
    assert low <= 5


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000))
def test_mutual_knn_has_no_sides_and_no_row_order(seed):
    image, text = views(n=25, seed=seed)
    order = np.random.default_rng(seed).permutation(25)
    score = mutual_knn(image, text, k=3, permutations=2)["score"]
    assert mutual_knn(text, image, k=3, permutations=2)["score"] == score
    assert mutual_knn(image[order], text[order], k=3, permutations=2)["score"] == score
    assert mutual_knn(image, image * 3, k=3, permutations=2)["score"] == 1


def test_where_all_shuffles_score_the_same_there_is_no_z():
    axes = np.eye(3, dtype=np.float32)
    found = [mutual_knn(axes, axes, k=1, permutations=2, seed=seed) for seed in range(20)]
    flat = [one["null_sd"] == 0 for one in found]
    assert 0 < sum(flat) < 20
    assert [bool(np.isnan(one["z"])) for one in found] == flat


def hsic_unbiased(k, ell):
    """Song et al. (2012), equation (5), term by term."""
    m = len(k)
    k, ell = k - np.diag(np.diag(k)), ell - np.diag(np.diag(ell))
    one = np.ones(m)
    return (
        np.trace(k @ ell)
        + (one @ k @ one) * (one @ ell @ one) / ((m - 1) * (m - 2))
        - 2 * (one @ k @ ell @ one) / (m - 2)
    ) / (m * (m - 3))


def hsic_biased(k, ell):
    h = np.eye(len(k)) - 1 / len(k)
    return np.trace(k @ h @ ell @ h)


def cka_of(hsic, image, text):
    k, ell = image @ image.T, text @ text.T
    own = hsic(k, k), hsic(ell, ell)
    return hsic(k, ell) / np.sqrt(own[0] * own[1]) if min(own) > 0 else np.nan


@pytest.mark.parametrize(("n", "d", "e"), [(40, 6, 5), (12, 30, 20), (4, 3, 9), (50, 2, 90)])
@pytest.mark.parametrize("normalize", [True, False])
def test_cka_by_its_definition(n, d, e, normalize):
    image, text = (rows.astype(np.float64) for rows in views(n, d, e))
    truth = [reference.unit(rows) if normalize else rows for rows in (image, text)]
    for chunk_size in (1, 7, 1024):
        found = linear_cka(image, text, normalize=normalize, chunk_size=chunk_size)
        assert found["biased"] == pytest.approx(cka_of(hsic_biased, *truth), abs=1e-10)
        unbiased = cka_of(hsic_unbiased, *truth)
        assert found["unbiased"] == pytest.approx(unbiased, abs=1e-8, nan_ok=n == 4)
        assert found["n"] == n


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_cka_does_not_see_rotation_scale_or_shift(seed, scale):
    rows, other = (rows.astype(np.float64) for rows in views(30, 8, 6, seed=seed))
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(8, 8)))[0]
    moved = scale * rows @ rotation + 3
    check = functools.partial(linear_cka, normalize=False)
    for kind in ("biased", "unbiased"):
        assert check(rows, moved)[kind] == pytest.approx(1, abs=1e-9)
        assert check(rows, other)[kind] == pytest.approx(check(moved, other)[kind], abs=1e-9)
        assert check(rows, other)[kind] == pytest.approx(check(other, rows)[kind], abs=1e-12)


def test_of_strangers_the_unbiased_averages_0_and_the_biased_does_not():
    rng = np.random.default_rng(0)
    found = [
        linear_cka(rng.normal(size=(20, 40)), rng.normal(size=(20, 50)), normalize=False)
        for _ in range(300)
    ]
    unbiased = np.array([one["unbiased"] for one in found])
    assert abs(unbiased.mean()) < 4 * unbiased.std() / np.sqrt(300)
    assert unbiased.std() < 0.1
    assert min(one["biased"] for one in found) > 0.5


def test_rows_at_equal_distances_have_no_unbiased_cka():
    found = linear_cka(np.eye(6), np.eye(6))
    assert found["biased"] == pytest.approx(1)
    assert np.isnan(found["unbiased"])


def test_bad_input_is_named():
    image, text = views(n=20)
    broken = text.copy()
    broken[3, 0] = np.nan
    for measure in (mutual_knn, linear_cka):
        with pytest.raises(ValueError, match="text: row 3 holds NaN or infinity"):
            measure(image, broken)
        with pytest.raises(ValueError, match="text: 19 rows, but image has 20"):
            measure(image, text[1:])
        with pytest.raises(ValueError, match=r"image: shape \(20, 0\)"):
            measure(image[:, :0], text)
        with pytest.raises(ValueError, match="chunk_size=0: must be at least 1"):
            measure(image, text, chunk_size=0)
    with pytest.raises(ValueError, match="image: 11 rows; at least 12 are needed"):
        mutual_knn(image[:11], text[:11])
    with pytest.raises(ValueError, match="k=0: must be at least 1"):
        mutual_knn(image, text, k=0)
    with pytest.raises(ValueError, match="permutations=1: must be at least 2"):
        mutual_knn(image, text, permutations=1)
    with pytest.raises(ValueError, match="metric must be 'cosine' or 'euclidean', got 'dot'"):
        mutual_knn(image, text, metric="dot")
    with pytest.raises(ValueError, match="image: 3 rows; at least 4 are needed"):
        linear_cka(image[:3], text[:3])
    with pytest.raises(ValueError, match="text: all rows are equal"):
        linear_cka(image, np.ones_like(text))


def test_ties_are_nothing_that_image_and_text_have_in_common():
    rng = np.random.default_rng(0)
    same = np.eye(200, dtype=np.float32)
    bags = [np.zeros((400, 3000), np.float32) for _ in range(2)]
    for bag in bags:
        for row in bag:
            row[rng.choice(3000, size=4, replace=False)] = 1
    for image, text in ((same, same[rng.permutation(200)]), bags):
        found = mutual_knn(image, text)
        assert abs(found["z"]) < 3.5 and found["score"] < 3 * found["chance"]
