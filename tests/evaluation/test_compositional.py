"""Winoground and MMVP by hand."""

import numpy as np
import pytest

from sotalign_jax.evaluation import mmvp_metrics, winoground_metrics

# Rows are images, columns captions.
ALL_RIGHT = [[0.9, 0.1], [0.2, 0.8]]
TEXT_ALONE = [[0.3, 0.1], [0.8, 0.9]]  # image 0 prefers caption 0, caption 0 prefers image 1
IMAGE_ALONE = [[0.3, 0.8], [0.1, 0.9]]
WRONG = [[0.1, 0.9], [0.8, 0.2]]


def test_scores_of_one_item_each():
    cases = {"all": ALL_RIGHT, "text": TEXT_ALONE, "image": IMAGE_ALONE, "none": WRONG}
    expected = {"all": (1, 1, 1), "text": (1, 0, 0), "image": (0, 1, 0), "none": (0, 0, 0)}
    for name, scores in cases.items():
        got = winoground_metrics(np.array([scores]))
        found = got["text_score"], got["image_score"], got["group_score"]
        assert found == expected[name], name
    together = winoground_metrics(np.array(list(cases.values())))
    assert together == {
        "text_score": 0.5,
        "image_score": 0.5,
        "group_score": 0.25,
        "n_items": 4.0,
    }


@pytest.mark.parametrize(
    ("own", "rival", "metric"),
    [
        ((0, 0), (0, 1), "text_score"),
        ((1, 1), (1, 0), "text_score"),
        ((0, 0), (1, 0), "image_score"),
        ((1, 1), (0, 1), "image_score"),
    ],
)
def test_a_tie_is_wrong(own, rival, metric):
    """Each of the four comparisons is strict."""
    scores = np.array([[0.5, 0.1], [0.2, 0.5]])
    assert winoground_metrics(scores[None])["group_score"] == 1
    tied = scores.copy()
    tied[own] = scores[rival]
    assert winoground_metrics(tied[None])[metric] == 0
    if metric == "image_score":
        assert mmvp_metrics(tied[None], ["a"])["accuracy"] == 0
    tied[own] += 1e-9
    assert winoground_metrics(tied[None])[metric] == 1


def test_chance_is_what_random_scores_give():
    scores = np.random.default_rng(0).normal(size=(60_000, 2, 2))
    got = winoground_metrics(scores)
    assert got["text_score"] == pytest.approx(1 / 4, abs=0.01)
    assert got["image_score"] == pytest.approx(1 / 4, abs=0.01)
    assert got["group_score"] == pytest.approx(1 / 6, abs=0.01)
    assert mmvp_metrics(scores, ["a", "b"])["accuracy"] == pytest.approx(1 / 4, abs=0.01)


def test_patterns_are_runs_of_pairs():
    scores = np.array(
        [ALL_RIGHT, WRONG, IMAGE_ALONE, TEXT_ALONE, WRONG, WRONG, ALL_RIGHT, ALL_RIGHT]
    )
    got = mmvp_metrics(scores, ["a", "b", "c", "d"])
    # MMVP asks each caption for its image, as the image score.
    assert got == {
        "accuracy": (1 / 2 + 1 / 2 + 0 + 1) / 4,
        "pattern/a": 1 / 2,
        "pattern/b": 1 / 2,
        "pattern/c": 0.0,
        "pattern/d": 1.0,
        "n_items": 8.0,
    }


def test_the_mmvp_rule_is_a_softmax_over_two_images():
    """The published script: more than half of the softmax for the first, less for the second."""
    scores = np.random.default_rng(3).normal(size=(900, 2, 2))
    over_images = np.exp(100 * scores) / np.exp(100 * scores).sum(axis=1, keepdims=True)
    first_image = over_images[:, 0, :]
    right = (first_image[:, 0] > 0.5) & (first_image[:, 1] < 0.5)
    assert mmvp_metrics(scores, ["all"])["accuracy"] == pytest.approx(right.mean())


@pytest.mark.parametrize(
    ("scores", "patterns", "message"),
    [
        (np.zeros((4, 2)), ["a"], r"scores: shape \(4, 2\)"),
        (np.zeros((0, 2, 2)), ["a"], r"scores: shape \(0, 2, 2\)"),
        (np.full((2, 2, 2), np.nan), ["a"], "scores: hold NaN"),
        (np.zeros((4, 2, 2)), ["a", "b", "c"], "patterns: 4 pairs do not divide into 3"),
        (np.zeros((4, 2, 2)), [], "patterns: 4 pairs do not divide into 0"),
    ],
)
def test_scores_of_another_shape_are_refused(scores, patterns, message):
    with pytest.raises(ValueError, match=message):
        mmvp_metrics(scores, patterns)
