"""Best and worst queries, against float64 NumPy and against the metrics they explain."""

import numpy as np
import pytest

from sotalign_jax.evaluation import examples as module
from sotalign_jax.evaluation import rank_queries, retrieval_examples, retrieval_metrics


def world(seed=0, n=40, captions=1, dim=6):
    """Images, texts near them, and the image of each text, in no order."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, dim))
    owner = rng.permutation(np.repeat(np.arange(n), captions))
    text = image[owner] + 0.8 * rng.normal(size=(len(owner), dim))
    return image.astype(np.float32), text.astype(np.float32), owner


def reference(queries, gallery, query_image, gallery_image):
    """Ranks and margins one query at a time, in float64."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, gallery)]
    scores = unit[0].astype(np.float64) @ unit[1].astype(np.float64).T
    ranks, margins = [], []
    for row, image in zip(scores, query_image, strict=True):
        own, wrong = row[gallery_image == image], row[gallery_image != image]
        ranks.append(1 + (wrong > own.max()).sum() + 0.5 * (wrong == own.max()).sum())
        margins.append(own.max() - wrong.max())
    return np.array(ranks), np.array(margins), scores


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
@pytest.mark.parametrize("captions", [1, 3])
def test_ranks_and_margins_are_those_of_float64(direction, captions, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 16)  # the last chunk is padded
    image, text, owner = world(captions=captions)
    sides = (text, image, owner, np.arange(40)), (image, text, np.arange(40), owner)
    ranks, margins, _ = reference(*sides[direction == "i2t"])
    found = rank_queries(image, text, text_to_image=owner, direction=direction)
    np.testing.assert_array_equal(found.rank, ranks)
    np.testing.assert_allclose(found.margin, margins, atol=1e-6)
    metrics = retrieval_metrics(image, text, text_to_image=owner)
    for k in (1, 5, 10):
        assert metrics[f"{direction}/recall@{k}"] == pytest.approx(np.mean(found.rank <= k))
    assert metrics[f"{direction}/median_rank"] == np.median(found.rank)


def test_inner_products_rank_by_length_as_well():
    image, text, owner = world()
    image *= np.geomspace(0.2, 5, 40, dtype=np.float32)[:, None]
    found = rank_queries(image, text, text_to_image=owner, normalize=False)
    scores = text.astype(np.float64) @ image.astype(np.float64).T
    own = scores[np.arange(40), owner]
    np.testing.assert_array_equal(found.rank, 1 + (scores > own[:, None]).sum(1))
    metrics = retrieval_metrics(image, text, text_to_image=owner, normalize=False)
    assert metrics["t2i/recall@5"] == pytest.approx(np.mean(found.rank <= 5))
    assert (found.rank != rank_queries(image, text, text_to_image=owner).rank).any()
    best, _ = retrieval_examples(image, text, text_to_image=owner, normalize=False, count=1)
    np.testing.assert_allclose(best.score[0], np.sort(scores[best.query[0]])[::-1][:5], rtol=1e-5)


@pytest.mark.parametrize("direction", ["t2i", "i2t"])
def test_the_best_stand_clearest_and_the_worst_come_last(direction):
    image, text, owner = world(captions=2)
    sides = (text, image, owner, np.arange(40)), (image, text, np.arange(40), owner)
    queries, gallery, query_image, gallery_image = sides[direction == "i2t"]
    ranks, margins, scores = reference(queries, gallery, query_image, gallery_image)
    best, worst = retrieval_examples(
        image, text, text_to_image=owner, direction=direction, count=4, shown=3
    )
    order = sorted(range(len(ranks)), key=lambda i: (ranks[i], -margins[i]))
    assert best.query.tolist() == order[:4] and worst.query.tolist() == order[::-1][:4]
    for found in (best, worst):
        for i, query in enumerate(found.query):
            nearest = np.argsort(-scores[query])[:3]
            assert found.found[i].tolist() == nearest.tolist()
            np.testing.assert_allclose(found.score[i], scores[query][nearest], atol=1e-6)
            own = gallery_image == query_image[query]
            assert found.true[i].tolist() == own[nearest].tolist()
            assert found.own[i] == np.flatnonzero(own)[scores[query][own].argmax()]
            assert found.own_score[i] == pytest.approx(scores[query][own].max(), abs=1e-6)
            assert found.rank[i] == ranks[query]
    assert best.true[:, 0].all()


def test_few_queries_are_shared_out_and_ties_count_half():
    image = np.eye(3, dtype=np.float32)
    text = np.float32([[1, 0, 0], [0, 1, 1], [1, 1, 0]])  # text 1 ties, text 2 is lost
    found = rank_queries(image, text)
    assert found.rank.tolist() == [1.0, 1.5, 3.0]
    best, worst = retrieval_examples(image, text, count=6, shown=9)
    assert best.query.tolist() == [0, 1] and worst.query.tolist() == [2]
    assert best.found.shape == (2, 3)
    np.testing.assert_allclose(worst.own_score, 0, atol=1e-7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"direction": "text"}, "direction: must be 't2i' or 'i2t', got 'text'"),
        ({"count": 0}, "count: must be at least 1, got 0"),
        ({"shown": 0}, "shown: must be at least 1, got 0"),
        ({"text_to_image": np.zeros(3, int)}, "text_to_image: shape"),
    ],
)
def test_wrong_input_is_named(arguments, message):
    image, text, _ = world()
    with pytest.raises(ValueError, match=message):
        retrieval_examples(image, text, **arguments)
