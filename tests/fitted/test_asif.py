"""ASIF against a naive loop in float64, and its dense variant without the loop."""

import sys

import jax
import jaxtyping
import numpy as np
import pytest
from reference import unit

from sotalign_jax.fitted import Asif, asif

N, DX, DY = 40, 6, 5


@pytest.fixture
def untyped():
    """No run-time type checks, as in a user's program: our own errors must do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pairs(n=N, seed=0, dx=DX, dy=DY):
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(n, 4))
    maps = np.random.default_rng(9).normal(size=(4, dx + dy))
    views = latent @ maps + 0.3 * rng.normal(size=(n, dx + dy)) + 0.4
    return views[:, :dx].astype(np.float32), views[:, dx:].astype(np.float32)


def naive(row, anchors, *, neighbours, power, mean=None):
    """One row's similarities to the anchors, one at a time."""

    def prepared(x):
        x = np.asarray(x, np.float64)
        x = x / np.linalg.norm(x)
        if mean is not None:
            x = (x - mean) / np.linalg.norm(x - mean)
        return x

    found = [float(prepared(row) @ prepared(anchor)) for anchor in anchors]
    if 0 < neighbours < len(found):
        last = sorted(found, reverse=True)[neighbours - 1]
        found = [s if s >= last else 0.0 for s in found]
    found = np.array([s**power for s in found])
    return found / np.linalg.norm(found)


def naive_similarity(train, test, *, neighbours, power, means=(None, None)):
    image, text = (
        np.stack([naive(r, anchors, neighbours=neighbours, power=power, mean=m) for r in rows])
        for rows, anchors, m in zip(test, train, means, strict=True)
    )
    return image @ text.T


@pytest.mark.parametrize(
    ("neighbours", "power", "center"),
    [(800, 8, "none"), (7, 8, "none"), (1, 3, "pairs"), (10, 1, "unpaired"), (0, 2, "pairs")],
)
def test_similarity_is_the_naive_one(neighbours, power, center):
    train, test, more = pairs(), pairs(12, seed=1), pairs(100, seed=2)
    fitted = asif(*train, *more, neighbours=neighbours, power=power, center=center)
    source = {"none": None, "pairs": train, "unpaired": more}[center]
    means = (None, None) if source is None else tuple(unit(rows).mean(0) for rows in source)
    expected = naive_similarity(train, test, neighbours=neighbours, power=power, means=means)
    np.testing.assert_allclose(fitted.similarity(*test), expected, atol=2e-5)
    image, text = fitted.embed_image(test[0]), fitted.embed_text(test[1])
    np.testing.assert_allclose(np.asarray(image) @ np.asarray(text).T, expected, atol=2e-5)
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)
    assert fitted.unit and (fitted.image_dim, fitted.text_dim, fitted.dim) == (DX, DY, N)
    if 0 < neighbours < N:
        assert (np.count_nonzero(image, axis=1) == neighbours).all()


def test_as_published_is_the_default():
    options = asif(*pairs()).options
    assert (options.neighbours, options.power, options.center) == (800, 8, "none")


@pytest.mark.parametrize("center", ["pairs", "none"])
def test_the_dense_variant_needs_no_similarities(center):
    train, test = pairs(), pairs(12, seed=1)
    options = {"neighbours": 0, "power": 1, "center": center}
    fitted = asif(*train, **options)
    assert fitted.dim == min(DX, DY) and fitted.image_map.shape == (DX, DY) and not fitted.unit
    means = tuple(unit(rows).mean(0) for rows in train) if center == "pairs" else (None, None)
    expected = naive_similarity(train, test, neighbours=0, power=1, means=means)
    np.testing.assert_allclose(fitted.similarity(*test), expected, atol=2e-5)
    # As many neighbours as pairs are all of them.
    same = asif(*train, **options | {"neighbours": N})
    np.testing.assert_array_equal(same.image_map, fitted.image_map)
    # With fewer pairs than dimensions, the similarities are the smaller matrix.
    few = tuple(rows[:DX] for rows in train)
    means = tuple(unit(rows).mean(0) for rows in few) if center == "pairs" else (None, None)
    fitted = asif(*few, **options)
    assert fitted.dim == DX and fitted.image_root is None
    expected = naive_similarity(few, test, neighbours=0, power=1, means=means)
    np.testing.assert_allclose(fitted.similarity(*test), expected, atol=2e-5)


@pytest.mark.parametrize("options", [{"neighbours": 7}, {"neighbours": 0, "power": 1}])
def test_the_order_of_the_pairs_does_not_matter(options):
    train, test = pairs(), pairs(12, seed=1)
    order = np.random.default_rng(3).permutation(N)
    one, other = asif(*train, **options), asif(*(rows[order] for rows in train), **options)
    np.testing.assert_allclose(one.similarity(*test), other.similarity(*test), atol=1e-5)


def test_pairs_that_tie_for_the_last_place_are_all_kept():
    # Entries that float32 multiplies without rounding.
    image = np.array([[1, 0], [0, 1], [0, 1], [-1, 0]], np.float32)
    fitted = asif(image, image, neighbours=2, power=2)
    embedded = fitted.embed_image(np.array([[1, 0], [0, 1], [-1, 0]], np.float32))
    half = np.sqrt(0.5)
    # The first row ties at 0, where keeping and dropping are the same.
    np.testing.assert_allclose(
        embedded, [[1, 0, 0, 0], [0, half, half, 0], [0, 0, 0, 1]], atol=1e-6
    )
    one = asif(image, image, neighbours=1, power=2).embed_image(np.array([0, 1], np.float32))
    np.testing.assert_allclose(one, [0, half, half, 0], atol=1e-6)


def test_an_even_power_makes_negative_similarities_positive_as_published():
    image = np.array([[1.0, 0], [-1.0, 0.1]], np.float32)
    embedded = np.asarray(asif(image, image, power=8).embed_image(image[:1]))
    assert (embedded > 0.5).all()
    assert (np.asarray(asif(image, image, power=3).embed_image(image[:1])) < 0).any()


def test_rows_are_handled_in_blocks(monkeypatch):
    train, test = pairs(), pairs(12, seed=1)
    fitted = asif(*train, neighbours=7)
    whole = np.asarray(fitted.embed_image(test[0]))
    monkeypatch.setattr(sys.modules["sotalign_jax.fitted.asif"], "_BLOCK", 5 * N)

    def embed(rows):
        return fitted._embed("image", rows)

    np.testing.assert_allclose(jax.jit(embed)(test[0]), whole, atol=1e-6)
    # Five rows at a time, and then the two that are left over.
    assert f"f32[5,{N}]" in str(jax.make_jaxpr(embed)(test[0]))


def test_small_similarities_survive_a_high_power():
    image = np.array([[1.0, 0, 0], [0, 1.0, 0]], np.float32)
    row = np.array([[1e-4, 2e-4, 1.0]], np.float32)
    embedded = asif(image, image, power=12).embed_image(row)
    np.testing.assert_allclose(embedded, [[2.0**-12, 1]], rtol=1e-3)
    np.testing.assert_array_equal(asif(image, image).embed_image(np.zeros((1, 3))), [[0, 0]])


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": -1}, "neighbours: got -1; must be positive, or 0"),
        ({"power": 0}, "power: got 0; must be at least 1"),
        ({"power": 1.5}, "power: got 1.5; must be of type int"),
        ({"center": "mean"}, "center: got 'mean'; must be one of none, pairs, unpaired"),
        ({"center": "unpaired"}, "unpaired_image: needed with these options"),
        ({"top": 3}, "top: no such option; known are neighbours, power, center"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        asif(*pairs(), **options)


def test_bad_rows_are_named():
    image, text = pairs()
    with pytest.raises(ValueError, match="text: 39 rows, but image has 40"):
        asif(image, text[1:])
    with pytest.raises(ValueError, match="text: row 0 holds NaN"):
        asif(image, text * np.nan)
    with pytest.raises(ValueError, match="text: all rows point the same way"):
        asif(image, np.tile(text[:1], (N, 1)) * np.arange(1, N + 1)[:, None], center="pairs")
    with pytest.raises(ValueError, match="unpaired_image: all rows point the same way"):
        asif(image, text, image[:1], text, center="unpaired")
    assert isinstance(asif(image[:1], text[:1]), Asif)
