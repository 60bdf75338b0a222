import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sotalign_jax.evaluation import retrieval_metrics, retrieval_of_scores
from sotalign_jax.evaluation.retrieval import _caption_rows, _rivals_of_chunk


def _from_scores(scores):
    """Unit embeddings whose cosines are the (small) scores, exactly: text rows are axes."""
    n, m = scores.shape
    rest = np.sqrt(1 - np.sum(scores**2, axis=1, keepdims=True))
    image = np.hstack([scores, rest * np.eye(n)])
    return image.astype(np.float32), np.eye(m, m + n, dtype=np.float32)


def _brute_force(image, text, owner, ks):
    """The definitions, one query at a time, from a float64 score matrix."""
    image, text = np.asarray(image, np.float64), np.asarray(text, np.float64)
    image = image / np.linalg.norm(image, axis=1, keepdims=True)
    text = text / np.linalg.norm(text, axis=1, keepdims=True)
    scores = image @ text.T
    n, m = scores.shape

    def above(wrong, true):
        return np.sum(wrong > true) + np.sum(wrong == true) / 2

    t2i, t2i_fractions = [], []
    for j in range(m):
        rivals = above(np.delete(scores[:, j], owner[j]), scores[owner[j], j])
        t2i.append(1 + rivals)
        t2i_fractions.append(rivals / (n - 1))
    i2t, i2t_fractions = [], []
    for i in range(n):
        own = np.flatnonzero(owner == i)
        wrong = np.delete(scores[i], own)
        rivals = [above(wrong, scores[i, j]) for j in own]
        i2t.append(1 + min(rivals))
        i2t_fractions += [count / len(wrong) for count in rivals]
    metrics = {f"t2i/recall@{k}": np.mean(np.array(t2i) <= k) for k in ks}
    metrics |= {f"i2t/recall@{k}": np.mean(np.array(i2t) <= k) for k in ks}
    for k in ks:
        both = metrics[f"t2i/recall@{k}"] + metrics[f"i2t/recall@{k}"]
        metrics[f"mean_recall@{k}"] = both / 2
    metrics["t2i/median_rank"], metrics["i2t/median_rank"] = np.median(t2i), np.median(i2t)
    metrics["foscttm"] = (np.mean(t2i_fractions) + np.mean(i2t_fractions)) / 2
    return metrics | {"n_images": n, "n_texts": m}


def _assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert isinstance(value, float)
        assert value == pytest.approx(expected[name], abs=1e-12), name


def _world(n, counts, d=12, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(n, d)).astype(np.float32)
    owner = rng.permutation(np.repeat(np.arange(n), counts))
    text = (image[owner] + rng.normal(size=(len(owner), d)) * 1.5).astype(np.float32)
    return image, text, owner


def test_hand_made_scores_with_two_captions_an_image():
    # Rows are images, columns texts; texts 2i and 2i + 1 belong to image i.
    scores = np.array(
        [
            [0.50, 0.10, 0.20, 0.00, 0.30, 0.00, 0.00, 0.00],  # best own 0.50: rank 1
            [0.30, 0.00, 0.10, 0.20, 0.25, 0.00, 0.05, 0.00],  # own 0.10, 0.20: two above, rank 3
            [0.10, 0.40, 0.15, 0.35, 0.30, 0.20, 0.45, 0.00],  # own 0.30, 0.20: three above, rank 4
            [0.00, 0.00, 0.00, 0.10, 0.00, 0.10, 0.10, 0.05],  # own 0.10: two ties, rank 2
        ]
    )
    image, text = _from_scores(scores)
    metrics = retrieval_metrics(
        image, text, text_to_image=np.repeat(np.arange(4), 2), ks=(1, 2, 3, 4)
    )
    # Text to image, column by column: ranks 1, 2, 3, 2, 1.5, 1, 2, 1.
    # Column 4 holds .30 .25 .30 .00: image 2 ties with image 0.
    expected = {
        "i2t/recall@1": 1 / 4,
        "i2t/recall@2": 2 / 4,
        "i2t/recall@3": 3 / 4,
        "i2t/recall@4": 1.0,
        "i2t/median_rank": 2.5,
        "t2i/recall@1": 3 / 8,
        "t2i/recall@2": 7 / 8,
        "t2i/recall@3": 1.0,
        "t2i/median_rank": 1.75,
        "mean_recall@1": 5 / 16,
        # Of 6 wrong texts, above each caption in turn: 0, 2, 2, 2, 3, 3, 1 (two ties), 2.
        "foscttm": (
            (0 + 1 + 2 + 1 + 0.5 + 0 + 1 + 0) / 8 / 3 + (0 + 2 + 2 + 2 + 3 + 3 + 1 + 2) / 8 / 6
        )
        / 2,
        "n_images": 4.0,
        "n_texts": 8.0,
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("chunk_size", [1, 7, 30, 31])
def test_one_to_one_against_brute_force(chunk_size):
    image, text, owner = _world(30, 1, seed=1)
    text = text[np.argsort(owner)]
    got = retrieval_metrics(image, text, chunk_size=chunk_size)
    _assert_same(got, _brute_force(image, text, np.arange(30), (1, 5, 10)))


@pytest.mark.parametrize("chunk_size", [1, 7, 20, 21])
def test_many_captions_against_brute_force(chunk_size):
    counts = np.random.default_rng(2).integers(1, 6, size=20)
    counts[3] = 21  # more captions than one row of slots holds
    image, text, owner = _world(20, counts, seed=2)
    got = retrieval_metrics(image, text, text_to_image=owner, ks=(1, 3), chunk_size=chunk_size)
    expected = _brute_force(image, text, owner, (1, 3))
    assert 0 < expected["i2t/recall@1"] < 1 and 0 < expected["t2i/recall@1"] < 1
    _assert_same(got, expected)


def test_exact_ties_count_half_with_integer_scores():
    rng = np.random.default_rng(4)

    # Rows of four +-1 among zeros have length 2 and cosines in quarters: ties are exact everywhere.
    def rows(n):
        out = np.zeros((n, 9), np.float32)
        for row in out:
            row[rng.choice(9, 4, replace=False)] = rng.choice([-1, 1], 4)
        return out

    owner = rng.permutation(np.repeat(np.arange(15), 3))
    image, text = rows(15), rows(45)
    got = retrieval_metrics(image, text, text_to_image=owner, chunk_size=8)
    _assert_same(got, _brute_force(image / 2, text / 2, owner, (1, 5, 10)))


@pytest.mark.parametrize(("n", "d", "chunk_size"), [(40, 33, 16), (101, 257, 1024)])
def test_constant_embeddings_do_not_look_good(n, d, chunk_size):
    row = np.random.default_rng(n).normal(size=(1, d)).astype(np.float32)
    image, text = np.tile(row, (n, 1)), np.tile(row[:, ::-1], (n, 1))
    metrics = retrieval_metrics(image, text, ks=(1, n // 2, n), chunk_size=chunk_size)
    assert metrics["foscttm"] == 0.5
    assert metrics["t2i/median_rank"] == metrics["i2t/median_rank"] == (n + 1) / 2
    assert metrics["t2i/recall@1"] == metrics["i2t/recall@1"] == 0
    assert metrics[f"mean_recall@{n}"] == 1


def test_zero_rows_tie_with_everything():
    image = np.eye(4, dtype=np.float32)
    image[2] = 0
    metrics = retrieval_metrics(image, np.eye(4, dtype=np.float32))
    # Text 2 scores 0 with every image: rank 1 + 3/2. Image 2 likewise with every text.
    assert metrics["t2i/recall@1"] == metrics["i2t/recall@1"] == 0.75
    assert metrics["foscttm"] == pytest.approx(0.5 / 4)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000))
def test_row_order_and_row_length_do_not_matter(seed):
    image, text, owner = _world(12, 2, seed=seed)
    rng = np.random.default_rng(seed + 1)
    plain = retrieval_metrics(image, text, text_to_image=owner)
    images, texts = rng.permutation(12), rng.permutation(24)
    place = np.argsort(images)
    # Powers of two, so that no rounding separates the two sides.
    scale = 2.0 ** rng.integers(-8, 8, size=(24, 1)).astype(np.float32)
    shuffled = retrieval_metrics(
        image[images], (text * scale)[texts], text_to_image=place[owner[texts]]
    )
    _assert_same(shuffled, plain)


def test_embeddings_compared_with_themselves_are_perfect_and_duplicates_tie():
    image = np.random.default_rng(6).normal(size=(150, 37)).astype(np.float32)
    metrics = retrieval_metrics(image, image, chunk_size=64)
    assert metrics["mean_recall@1"] == 1 and metrics["foscttm"] == 0
    twice = np.vstack([image, image])
    metrics = retrieval_metrics(twice, twice, chunk_size=64)
    assert metrics["t2i/median_rank"] == metrics["i2t/median_rank"] == 1.5
    assert metrics["foscttm"] == pytest.approx(0.5 / 299)


def test_half_precision_and_device_arrays_are_taken():
    image, text, owner = _world(15, 2)
    image, text = image.astype(np.float16), text.astype(np.float16)
    got = retrieval_metrics(jnp.asarray(image), text, text_to_image=jnp.asarray(owner))
    _assert_same(got, _brute_force(image, text, owner, (1, 5, 10)))


def test_without_normalisation_the_longer_row_wins():
    image = np.array([[1.0, 0.0], [2.0, 2.0]], np.float32)
    text = np.array([[1.0, 0.2], [0.3, 1.1]], np.float32)
    cosine = retrieval_metrics(image, text, ks=(1,))
    assert cosine["t2i/recall@1"] == cosine["i2t/recall@1"] == 1
    # For the first text 1.0 and 2.4; for the second image 2.4 and 2.8.
    inner = retrieval_metrics(image, text, normalize=False, ks=(1,))
    assert (inner["t2i/recall@1"], inner["i2t/recall@1"]) == (0.5, 1)


@pytest.mark.parametrize("chunk_size", [7, 1024])
def test_metrics_of_scores_are_those_of_the_rows_they_come_from(chunk_size):
    image, text, owner = _world(12, [1, 2, 3, 11, 1, 1, 2, 2, 4, 1, 1, 2], d=5)
    scores = image @ text.T
    asked = {"image": [], "text": []}

    def rows_of(name, table):
        return lambda rows: asked[name].append(rows) or table[rows]

    got = retrieval_of_scores(
        rows_of("image", scores),
        rows_of("text", scores.T),
        12,
        len(owner),
        text_to_image=owner,
        chunk_size=chunk_size,
    )
    _assert_same(got, retrieval_metrics(image, text, text_to_image=owner, normalize=False))
    for name, total in (("image", 12), ("text", len(owner))):
        sizes = {len(rows) for rows in asked[name]}
        assert len(sizes) == 1 and max(sizes) <= chunk_size
        assert set(np.concatenate(asked[name])) == set(range(total))


def test_bad_scores_are_named():
    scores = np.eye(3, dtype=np.float32)
    take = functools.partial(retrieval_of_scores, n=3, m=3)
    for bad in (np.nan, np.inf):
        table = np.where(np.arange(9).reshape(3, 3) == 6, bad, scores)
        with pytest.raises(ValueError, match="text_scores: gave NaN or infinity"):
            take(scores.__getitem__, table.T.__getitem__)
        with pytest.raises(ValueError, match="image_scores: gave NaN or infinity"):
            take(table.__getitem__, scores.__getitem__)
    with pytest.raises(ValueError, match=r"text_scores: gave shape \(3, 2\) for 3 rows; \(3, 3\)"):
        take(lambda i: scores[i], lambda t: scores[t, :2])
    with pytest.raises(ValueError, match="text_to_image: needed where 3 texts face 4 images"):
        take(lambda i: scores[i], lambda t: scores[t], n=4)


def test_caption_rows_hold_every_text_once_beside_its_image():
    owner = np.array([2, 0, 2, 2, 1, 0] + [1] * 17)
    rows, captions = _caption_rows(owner)
    held = captions[captions >= 0]
    assert sorted(held) == list(range(23))
    for row, texts in zip(rows, captions, strict=True):
        assert np.all(owner[texts[texts >= 0]] == row)
    assert captions.shape == (5, 8)


def test_memory_is_that_of_one_chunk_and_one_program_serves_all_chunks():
    n, m, d, chunk = 2000, 6000, 16, 64

    def temporary(chunk, m):
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((n, d), jnp.float32),
                ((m, d), jnp.float32),
                ((m,), jnp.int32),
                ((chunk,), jnp.int32),
                ((chunk,), jnp.int32),
                ((chunk, 5), jnp.int32),
            )
        ]
        analysis = _rivals_of_chunk.lower(*arguments).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    block = chunk * m * 4
    assert temporary(chunk, m) < 3 * block + 4 * m * d
    assert temporary(2 * chunk, m) < 6 * block + 4 * m * d < n * m * 4
    programs = getattr(_rivals_of_chunk, "_cache_size")  # noqa: B009
    before = programs()
    image, text, owner = _world(50, 3, d=5)
    retrieval_metrics(image, text, text_to_image=owner, chunk_size=32)
    assert programs() == before + 2  # one a direction, for 5 and 2 chunks


def test_bad_input_is_named():
    image, text, owner = _world(6, 2, d=4)
    check = functools.partial(retrieval_metrics, text_to_image=owner)
    broken = text.copy()
    broken[3, 0] = np.nan
    with pytest.raises(ValueError, match="text: holds NaN or infinity"):
        check(image, broken)
    with pytest.raises(ValueError, match="image: holds NaN or infinity"):
        check(image * np.float32(np.inf), text)
    with pytest.raises(ValueError, match="text: dimension 3, but image has 4"):
        check(image, text[:, :3])
    with pytest.raises(ValueError, match=r"text_to_image: shape \(12,\)"):
        check(image, text[:7])
    with pytest.raises(ValueError, match="text_to_image: needed where 12 texts face 6 images"):
        retrieval_metrics(image, text)
    with pytest.raises(ValueError, match="text_to_image: dtype float64"):
        inspect.unwrap(retrieval_metrics)(image, text, text_to_image=owner * 1.0)
    with pytest.raises(ValueError, match="text_to_image: entry 0 is 9, outside"):
        retrieval_metrics(image, text, text_to_image=np.full(12, 9))
    with pytest.raises(ValueError, match="text_to_image: entry 0 is -1, outside"):
        retrieval_metrics(image, text, text_to_image=np.full(12, -1))
    with pytest.raises(ValueError, match=r"text_to_image: 1 images have no text \(first: row 5\)"):
        retrieval_metrics(image, text, text_to_image=np.where(owner == 5, 0, owner))
    with pytest.raises(ValueError, match=r"ks=\[1, 0\]"):
        check(image, text, ks=(1, 0))
    with pytest.raises(ValueError, match=r"ks=\[\]"):
        check(image, text, ks=())
    with pytest.raises(ValueError, match="chunk_size=0"):
        check(image, text, chunk_size=0)
    with pytest.raises(ValueError, match="image: 1 rows"):
        retrieval_metrics(image[:1], text[:1])
