"""Zero-shot classification against float64 NumPy and numbers by hand."""

import numpy as np
import pytest

from sotalign_jax.evaluation import class_embeddings, classification_metrics


def by_hand(prompts, owner, n_classes):
    """The definition, a class at a time."""
    rows = []
    for index in range(n_classes):
        mine = prompts[owner == index].astype(np.float64)
        mean = (mine / np.linalg.norm(mine, axis=1, keepdims=True)).mean(axis=0)
        rows.append(mean / np.linalg.norm(mean))
    return np.array(rows)


@pytest.fixture
def prompts():
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(30, 6)) * rng.uniform(0.1, 40, size=(30, 1))).astype(np.float32)
    return rows, rng.permutation(np.repeat(np.arange(5), [3, 9, 6, 1, 11]))


@pytest.mark.parametrize("size", [1, 7, 30])
def test_classes_are_means_of_unit_prompts(prompts, size):
    rows, owner = prompts
    chunks = [rows[start : start + size] for start in range(0, 30, size)]
    got = class_embeddings(iter(chunks), owner, 5)
    np.testing.assert_allclose(got, by_hand(rows, owner, 5), rtol=1e-6, atol=1e-7)
    assert got.dtype == np.float32
    # A mean of prompts as they are would be that of the longest.
    plain = class_embeddings(iter(chunks), owner, 5, normalize=False)
    means = np.array([rows[owner == index].astype(np.float64).mean(axis=0) for index in range(5)])
    np.testing.assert_allclose(plain, means, rtol=1e-5, atol=1e-6)
    cosines = np.sum(plain * got, axis=1) / np.linalg.norm(plain, axis=1)
    assert cosines.min() < 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_of_row": np.array([0, 0, 2])}, "class_of_row: class 1 has no prompt"),
        ({"class_of_row": np.array([0, 1, 3])}, r"class_of_row: classes 0 .. 3, but there are 3"),
        ({"class_of_row": np.array([0, 1])}, "class_of_row: class 2 has no prompt"),
        ({"class_of_row": np.array([0, 1, 2, 2])}, "chunks: 3 rows, but class_of_row has 4"),
        ({"chunks": [np.eye(3), np.eye(3)]}, "chunks: more rows than the 3"),
        ({"chunks": [np.full((3, 3), np.nan)]}, "chunks: hold NaN or infinity"),
        ({"chunks": [np.zeros((3, 3))]}, "prompts of class 0 have mean 0"),
    ],
)
def test_prompts_that_do_not_fit_are_refused(change, message):
    given = {"chunks": [np.eye(3)], "class_of_row": np.arange(3), "n_classes": 3}
    with pytest.raises(ValueError, match=message):
        class_embeddings(**(given | change))


def test_metrics_by_hand():
    # Scores of images (rows) for classes; the own class in brackets.
    scores = np.array(
        [
            [[0.9], 0.1, 0.2, 0.3],  # right
            [[0.2], 0.3, 0.1, 0.0],  # second
            [[0.1], 0.2, 0.3, 0.4],  # fourth
            [0.5, [0.5], 0.1, 0.0],  # a tie with an earlier class: second
            [0.1, 0.4, [0.4], 0.3],  # another
            [0.1, 0.1, [0.5], 0.5],  # a tie with a later class: right
            [0.0, 0.0, 0.0, [0.1]],  # right
        ],
        dtype=object,
    )
    labels = np.array([0, 0, 0, 1, 2, 2, 3])
    plain = np.array([[v[0] if isinstance(v, list) else v for v in row] for row in scores])
    rows = plain.astype(np.float32)
    for sizes in ([7], [4, 3], [1] * 7):
        chunks = np.split(rows, np.cumsum(sizes)[:-1])
        got = classification_metrics(
            iter(chunks), np.eye(4, dtype=np.float32), labels, ks=(1, 2, 3, 5)
        )
        assert got == pytest.approx(
            {
                "top@1": 3 / 7,
                "top@2": 6 / 7,
                "top@3": 6 / 7,
                "mean_per_class_recall": (1 / 3 + 0 + 1 / 2 + 1) / 4,
                "n_images": 7.0,
                "n_classes": 4.0,
            }
        )


def test_metrics_against_a_sort_in_float64():
    rng = np.random.default_rng(1)
    classes, images = rng.normal(size=(12, 8)), rng.normal(size=(200, 8))
    labels = rng.permutation(np.arange(200) % 12)
    got = classification_metrics([images], classes, labels)
    order = np.argsort(-images @ classes.T, axis=1)
    right = order[:, 0] == labels
    assert got["top@1"] == pytest.approx(right.mean())
    assert got["top@5"] == pytest.approx((order[:, :5] == labels[:, None]).any(axis=1).mean())
    recalls = [right[labels == index].mean() for index in range(12)]
    assert got["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert got["top@1"] != pytest.approx(got["mean_per_class_recall"], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 1, 3])}, r"labels: 0 .. 3, but there are 3 classes"),
        ({"labels": np.array([0, 1, 1])}, "labels: no image has class 2"),
        ({"labels": np.array([0, 1, 2, 2])}, "chunks: 3 rows, but 4 labels"),
        ({"chunks": [np.eye(3), np.eye(3)]}, "chunks: more rows than the 3"),
        ({"chunks": [np.full((3, 3), np.inf)]}, "chunks: hold NaN or infinity"),
        ({"ks": ()}, r"ks=\[\]"),
        ({"ks": (0,)}, r"ks=\[0\]"),
    ],
)
def test_images_that_do_not_fit_are_refused(change, message):
    given = {"chunks": [np.eye(3)], "classes": np.eye(3), "labels": np.arange(3)}
    with pytest.raises(ValueError, match=message):
        classification_metrics(**(given | change))
