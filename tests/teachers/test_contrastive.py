import inspect
from typing import Any

import numpy as np
import pytest

from sotalign_jax.teachers import cca, contrastive, moments_of


def _planted(n=160, seed=0):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 8))
    image = z @ rng.normal(size=(8, 20)) + 0.3 * rng.normal(size=(n, 20)) + 0.5
    text = z @ rng.normal(size=(8, 14)) + 0.3 * rng.normal(size=(n, 14)) - 0.5
    return image, text


def _hits(teacher, image, text):
    """Fraction of images whose own text has the highest cosine."""
    affinity = np.asarray(teacher.affinity(image, text))
    return np.mean(affinity.argmax(axis=1) == np.arange(len(affinity)))


@pytest.mark.parametrize(("loss", "batch_size"), [("siglip", None), ("info_nce", 40)])
def test_beats_chance_clearly_on_rows_not_seen(loss, batch_size):
    image, text = _planted()
    teacher = contrastive(
        image[:80],
        text[:80],
        dim=16,
        loss=loss,
        steps=300,
        learning_rate=5e-3,
        batch_size=batch_size,
    )
    assert teacher.image_weight.shape == (20, 16) and teacher.text_weight.shape == (14, 16)
    assert _hits(teacher, image[80:], text[80:]) > 0.5  # chance 1 / 80
    unit = image[:80] / np.linalg.norm(image[:80], axis=1, keepdims=True)
    np.testing.assert_allclose(teacher.image_mean, unit.mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(teacher.correlations, np.ones(16))


def test_the_seed_decides_start_and_batches():
    image, text = _planted(40)
    fit = lambda seed: contrastive(image, text, dim=6, steps=5, batch_size=16, seed=seed)  # noqa: E731
    first, again, other = fit(3), fit(3), fit(4)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.abs(np.asarray(first.image_weight - other.image_weight)).max() > 0.01


def test_batches_follow_the_seed():
    image, text = _planted(40)
    start = cca(moments_of([(image, text)]), dim=6)
    fit = lambda seed: contrastive(  # noqa: E731
        image, text, dim=6, steps=8, learning_rate=1e-3, batch_size=4, seed=seed, init=start
    )
    # From one start, only the batches can tell two seeds apart.
    assert np.any(np.asarray(fit(0).image_weight) != np.asarray(fit(1).image_weight))


def test_starts_from_a_teacher_and_one_lion_step_has_the_size_of_the_rate():
    image, text = _planted(40)
    start = cca(moments_of([(image, text)]), dim=6)
    teacher = contrastive(
        image, text, dim=6, steps=1, learning_rate=1e-3, weight_decay=0.0, init=start
    )
    moved = np.abs(np.asarray(teacher.image_weight) - np.asarray(start.image_weight))
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-2)
    np.testing.assert_array_equal(teacher.text_mean, start.text_mean)


def test_a_run_that_diverges_is_stopped_with_its_step():
    image, text = _planted(20)
    with pytest.raises(FloatingPointError, match=r"step 1 of 3 .*learning_rate"):
        contrastive(image, text, dim=4, steps=3, learning_rate=3e38)
    with pytest.raises(FloatingPointError, match=r"the last step, 0 of 1, .*learning_rate"):
        contrastive(image, text, dim=4, steps=1, learning_rate=3e38, weight_decay=1e3)


def test_bad_input_is_named():
    image, text = _planted(10)
    start = cca(moments_of([(image, text)]), dim=4)
    with pytest.raises(ValueError, match="text: holds NaN"):
        contrastive(image, text * np.nan, dim=4)
    with pytest.raises(ValueError, match="text: 9 rows, but image has 10"):
        contrastive(image, text[:9], dim=4)
    with pytest.raises(ValueError, match="image: 1 pairs"):
        contrastive(image[:1], text[:1], dim=4)
    with pytest.raises(ValueError, match=r"init: weights \(20, 4\) and \(14, 4\); .* dim=5"):
        contrastive(image, text, dim=5, init=start)
    bad_options: tuple[dict[str, Any], ...] = (
        {"dim": 0},
        {"steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"weight_decay": -1.0},
        {"batch_size": 11},
        {"batch_size": 1},
        {"scale": 0.0},
    )
    for bad in bad_options:
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            options: dict[str, Any] = {"dim": 4, **bad}
            contrastive(image, text, **options)
    with pytest.raises(ValueError, match="loss='mse'"):
        inspect.unwrap(contrastive)(image, text, dim=4, loss="mse")
