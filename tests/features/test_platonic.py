import numpy as np
import pytest

from sotalign_jax.features import platonic_world

SMALL = {"n_pairs": 40, "n_unpaired": 60, "n_val": 30, "n_test": 50}


def parts(splits):
    return {
        "pairs image": splits.pairs.image,
        "pairs text": splits.pairs.text,
        "unpaired image": splits.unpaired_image,
        "unpaired text": splits.unpaired_text,
        "val image": splits.val.image,
        "val text": splits.val.text,
        "test image": splits.test.image,
        "test text": splits.test.text,
    }


def arrays(**options):
    return {name: part.array() for name, part in parts(platonic_world(**options)).items()}


def held_out_r2(image, text, test_image, test_text):
    """Share of the texts' variance that least squares on the images explains on other rows."""
    mean_image, mean_text = image.mean(0), text.mean(0)
    weights = np.linalg.lstsq(image - mean_image, text - mean_text, rcond=None)[0]
    left = test_text - mean_text - (test_image - mean_image) @ weights
    return 1 - (left**2).sum() / ((test_text - mean_text) ** 2).sum()


def test_sizes_and_dtype():
    splits = platonic_world(**SMALL, latent_dim=5, clusters=7, image_dim=11, text_dim=9)
    shapes = {name: part.shape for name, part in parts(splits).items()}
    assert shapes == {
        "pairs image": (40, 11),
        "pairs text": (40, 9),
        "unpaired image": (60, 11),
        "unpaired text": (60, 9),
        "val image": (30, 11),
        "val text": (30, 9),
        "test image": (50, 11),
        "test text": (50, 9),
    }
    for name, part in parts(splits).items():
        assert part.dtype == np.float32
        assert part.name == f"platonic {name}"
    assert splits.pairs.one_to_one
    assert splits.val is not None
    assert splits.val.one_to_one
    assert splits.test is not None
    assert splits.test.one_to_one
    none = platonic_world(n_pairs=1, n_unpaired=0, n_val=0, n_test=0)
    assert none.val is None
    assert none.test is None
    assert len(none.unpaired_image) == 0


def test_one_seed_one_world():
    first, again, other = arrays(**SMALL, seed=3), arrays(**SMALL, seed=3), arrays(**SMALL, seed=4)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
        assert not np.isclose(first[name], other[name]).all(axis=1).any()


@pytest.mark.parametrize(
    ("size", "changed"),
    [("n_unpaired", "unpaired"), ("n_pairs", "pairs"), ("n_val", "val"), ("n_test", "test")],
)
def test_more_rows_of_one_part_leave_all_else(size, changed):
    """Bit for bit, also over the border of a block of draws."""
    few = arrays(**SMALL)
    many = arrays(**{**SMALL, size: 1500})
    for name, rows in few.items():
        np.testing.assert_array_equal(many[name][: len(rows)], rows)
        assert len(many[name]) == (1500 if name.startswith(changed) else len(rows))


def test_parts_have_latents_of_their_own():
    """Without noise, a row seen twice would be the same row twice."""
    world = arrays(n_pairs=1100, n_unpaired=1100, n_val=50, n_test=50, noise=0.0)
    for modality in ("image", "text"):
        rows = np.concatenate([a for name, a in world.items() if name.endswith(modality)])
        assert len(np.unique(rows.round(5), axis=0)) == len(rows) == 2300


def test_unpaired_images_and_texts_are_strangers():
    """An image tells of its own text, and nothing of the unpaired text of the same number."""
    world = arrays(n_pairs=3000, n_unpaired=3000, n_val=1, n_test=1, clusters=50)
    for name, lower, upper in (("pairs", 0.15, 1.0), ("unpaired", -0.5, 0.0)):
        image, text = world[f"{name} image"], world[f"{name} text"]
        fit, test = slice(2000), slice(2000, None)
        assert lower < held_out_r2(image[fit], text[fit], image[test], text[test]) < upper


def test_noise_follows_its_equation():
    """Noise adds rows of rank 32 and of variance ``noise^2`` a column, on average over columns."""
    options = {"n_pairs": 20_000, "n_unpaired": 0, "n_val": 0, "n_test": 0, "seed": 1}
    clean, noisy = (platonic_world(**options, noise=n).pairs for n in (0.0, 2.0))
    for modality in ("image", "text"):
        signal = getattr(clean, modality).array()
        assert abs(signal).max() <= 1
        nuisance = getattr(noisy, modality).array() - signal
        assert np.linalg.matrix_rank(nuisance, tol=1e-2) == 32
        assert nuisance.var(axis=0).mean() == pytest.approx(4.0, rel=0.1)
        assert abs(nuisance.mean(axis=0)).max() < 0.1


@pytest.mark.parametrize(("clusters", "variance"), [(1, 0.25), (400, 1.0)])
def test_signal_follows_its_equation(clusters, variance):
    """The argument of tanh is 2 z W: undone, it shows the variance of z within and over clusters.

    A column of z W has variance ``v_i = variance * sum_j l_j^2 W_ji^2``, of mean `variance` and, as
    ``l_j^2`` is proportional to 1/j, of relative variance ``2 sum_j j^-2 / (sum_j 1/j)^2``.
    """
    splits = platonic_world(
        n_pairs=20_000,
        n_unpaired=0,
        n_val=0,
        n_test=0,
        clusters=clusters,
        image_dim=2000,
        noise=0.0,
    )
    image = splits.pairs.image.array().astype(np.float64)
    # Quartiles, not moments: the tails of tanh are flat in float32.
    low, high = np.arctanh(np.quantile(image, [0.25, 0.75], axis=0)) / 2
    variances = ((high - low) / 1.349) ** 2
    assert variances.mean() == pytest.approx(variance, rel=0.1)
    j = np.arange(1, 49)
    spread = 2 * np.sum(1 / j**2) / np.sum(1 / j) ** 2
    assert variances.var() / variances.mean() ** 2 == pytest.approx(spread, rel=0.3)


def test_maps_are_nonlinear():
    """Even without noise and with many pairs, a linear map leaves part of the text unexplained."""
    world = arrays(n_pairs=6000, n_unpaired=0, n_val=1, n_test=2000, noise=0.0)
    rows = [world[name] for name in ("pairs image", "pairs text", "test image", "test text")]
    assert 0.7 < held_out_r2(*rows) < 0.95


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def inverse_root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return (vectors / np.sqrt(values)) @ vectors.T


def cca_recall(splits, ridge=1e-3):
    """Mean recall@1 on test of CCA on unit, centred rows, in float64."""
    image, text, test_image, test_text = (
        unit(part.array().astype(np.float64))
        for pairs in (splits.pairs, splits.test)
        for part in (pairs.image, pairs.text)
    )
    mean_image, mean_text, scale = image.mean(0), text.mean(0), len(image) - 1
    image, text = image - mean_image, text - mean_text
    white_image = inverse_root(image.T @ image / scale + ridge * np.eye(image.shape[1]))
    white_text = inverse_root(text.T @ text / scale + ridge * np.eye(text.shape[1]))
    left, _, right = np.linalg.svd(
        white_image @ (image.T @ text / scale) @ white_text, full_matrices=False
    )
    cosine = unit((test_image - mean_image) @ white_image @ left) @ (
        unit((test_text - mean_text) @ white_text @ right.T).T
    )
    rank_text = (cosine > np.diag(cosine)[:, None]).sum(axis=1)
    rank_image = (cosine > np.diag(cosine)[None]).sum(axis=0)
    return ((rank_text == 0).mean() + (rank_image == 0).mean()) / 2


@pytest.mark.parametrize(
    ("n_pairs", "noise", "low", "high"),
    [(500, 1.0, 0.68, 0.77), (20_000, 1.0, 0.84, 0.92), (500, 2.0, 0.54, 0.62)],
)
def test_a_linear_method_finds_what_the_docstring_says(n_pairs, noise, low, high):
    splits = platonic_world(n_pairs=n_pairs, n_unpaired=0, n_val=0, noise=noise)
    assert low < cca_recall(splits) < high


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_pairs": 0}, "n_pairs must be at least 1, got 0"),
        ({"n_unpaired": -1}, "n_unpaired must be at least 0"),
        ({"clusters": 0}, "clusters must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"noise": -0.5}, "noise must be finite and not negative"),
        ({"noise": float("nan")}, "noise must be finite"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        platonic_world(**options)
