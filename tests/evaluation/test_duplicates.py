import ml_dtypes
import numpy as np
import pytest
import reference

from sotalign_jax.evaluation import find_duplicates


def strangers(n=50, d=24, seed=0):
    """Independent rows: no two of them are near."""
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def nudged(rows, cosine, seed=1):
    """Rows at exactly this cosine to the given ones, of other lengths."""
    rng = np.random.default_rng(seed)
    unit = reference.unit(rows)
    other = rng.normal(size=rows.shape)
    other = reference.unit(other - np.sum(other * unit, axis=1, keepdims=True) * unit)
    moved = cosine * unit + np.sqrt(1 - cosine**2) * other
    return moved * rng.uniform(0.1, 9, (len(rows), 1))


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1024])
def test_copies_in_another_set_are_found_and_strangers_are_not(chunk_size):
    rows, others = strangers(50), strangers(80, seed=9)
    others[[3, 30]] = rows[[10, 20]] * 3.7
    others[31] = nudged(rows[11:12], 0.995)
    others[32] = nudged(rows[12:13], 0.985)
    found = find_duplicates(rows, others, near=0.99, chunk_size=chunk_size)
    assert found.same.tolist() == [10, 20]
    assert found.near.tolist() == [10, 11, 20]
    assert found.partner[[10, 20, 11, 12]].tolist() == [3, 30, 31, 32]
    cosines = reference.cosines(rows, others)
    np.testing.assert_array_equal(found.partner, cosines.argmax(axis=1))
    np.testing.assert_allclose(found.cosine, cosines.max(axis=1), atol=1e-9)


@pytest.mark.parametrize("chunk_size", [4, 1024])
def test_within_one_set_the_later_of_two_is_found(chunk_size):
    rows = strangers(20)
    rows[[7, 15, 19]] = rows[[2, 2, 18]] * 2
    rows[12] = nudged(rows[4:5], 0.995)
    found = find_duplicates(rows, chunk_size=chunk_size)
    assert found.same.tolist() == [7, 15, 19]
    assert found.near.tolist() == [7, 12, 15, 19]
    assert found.partner[0] == -1 and found.cosine[0] == -1
    assert found.partner[[7, 12, 19]].tolist() == [2, 4, 18]
    distinct = np.delete(rows, found.same, axis=0)
    assert not len(find_duplicates(distinct, chunk_size=chunk_size).same)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_storage_in_half_precision_changes_nothing(dtype):
    rows = strangers(30, d=512)
    assert len(find_duplicates(rows, rows.astype(dtype)).same) == 30
    # Ten times the bound, and so another row.
    assert not len(find_duplicates(rows, nudged(rows, 1 - 1e-4)).same)


def test_a_row_of_zeros_is_nobodys_double():
    rows = np.zeros((3, 4), np.float32)
    rows[0] = 1
    assert find_duplicates(rows).same.tolist() == []
    assert find_duplicates(rows, rows).same.tolist() == [0]


def test_bad_input_is_named():
    rows = strangers(5)
    for near in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"near=.*: a cosine in \(0, 0.99999\] is needed"):
            find_duplicates(rows, near=near)
    with pytest.raises(ValueError, match="chunk_size=0: must be at least 1"):
        find_duplicates(rows, chunk_size=0)
    with pytest.raises(ValueError, match="others: dimension 23, but rows has 24"):
        find_duplicates(rows, rows[:, 1:])
    with pytest.raises(ValueError, match="rows: 0 rows; at least 1"):
        find_duplicates(rows[:0])
    with pytest.raises(ValueError, match="others: row 4 holds NaN or infinity"):
        find_duplicates(rows, np.vstack([rows[:4], rows[4:] * np.nan]))
