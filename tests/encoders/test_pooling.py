"""Poolings against sums written out, on three libraries' arrays."""

import jax.numpy as jnp
import numpy as np
import pytest

from sotalign_jax.encoders.pooling import (
    IMAGE_POOLINGS,
    TEXT_POOLINGS,
    Layout,
    check_layout,
    pool,
    unit_length,
)

REGISTERS = Layout(cls=True, registers=4)


def as_numpy(x):
    return np.array(x)


def as_jax(x):
    return jnp.asarray(x)


def as_torch(x):
    return pytest.importorskip("torch").from_numpy(np.array(x))


LIBRARIES = pytest.mark.parametrize("of", [as_numpy, as_jax, as_torch])


def tokens(n=3, count=11, d=5):
    return np.random.default_rng(0).normal(size=(n, count, d)).astype(np.float32)


def by_hand(x, first, last):
    """The mean of tokens ``first`` to ``last``, that one left out, of float64."""
    out = np.zeros((x.shape[0], x.shape[2]))
    for item in range(x.shape[0]):
        for token in range(first, last):
            out[item] += x[item, token].astype(np.float64) / (last - first)
    return out


@LIBRARIES
def test_image_poolings(of):
    x = tokens()  # [class][4 registers][6 patches]
    cls = x[:, 0].astype(np.float64)
    wanted = {
        "cls": cls,
        "mean": by_hand(x, 5, 11),
        "mean_registers": by_hand(x, 1, 11),
        "cls_mean": np.hstack([cls, by_hand(x, 5, 11)]),
        "cls_mean_registers": np.hstack([cls, by_hand(x, 1, 11)]),
        # The published mistake: the registers and the first two of the six patches.
        "cls_mean_shifted": np.hstack([cls, by_hand(x, 1, 7)]),
    }
    assert wanted.keys() == IMAGE_POOLINGS.keys()
    for name, rows in wanted.items():
        got = pool(of(x), name, layout=REGISTERS)
        assert type(got) is type(of(x))
        np.testing.assert_allclose(np.asarray(got), rows, rtol=1e-5, atol=1e-6, err_msg=name)
        assert np.asarray(got).dtype == np.float32


def test_without_registers_and_without_a_class_token():
    x = tokens()
    np.testing.assert_allclose(pool(x, "mean", layout=Layout()), by_hand(x, 1, 11), atol=1e-6)
    # After the class token two that no pooling takes.
    layout = Layout(others=2, registers=3)
    np.testing.assert_allclose(pool(x, "mean", layout=layout), by_hand(x, 6, 11), atol=1e-6)
    got = pool(x, "mean_registers", layout=layout)
    np.testing.assert_allclose(got, by_hand(x, 3, 11), atol=1e-6)
    only = Layout(cls=False)
    np.testing.assert_allclose(pool(x, "mean", layout=only), by_hand(x, 0, 11), atol=1e-6)


@LIBRARIES
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [np.int32, bool])
def test_text_poolings_do_not_see_padding(of, side, dtype):
    x, lengths = tokens(n=4, count=6), [6, 1, 3, 5]
    mask = np.zeros((4, 6), dtype)
    for row, length in enumerate(lengths):
        mask[row, slice(6 - length, None) if side == "left" else slice(length)] = 1
    wanted = {name: [] for name in TEXT_POOLINGS} | {"max+cls": []}
    for row, length in enumerate(lengths):
        start = 6 - length if side == "left" else 0
        text = x[row, start : start + length].astype(np.float64)
        wanted["cls"].append(text[0])
        wanted["last"].append(text[-1])
        wanted["mean"].append(text.mean(0))
        wanted["max"].append(text.max(0))
        wanted["mean_sqrt_len_tokens"].append(text.sum(0) / np.sqrt(length))
        weighted = [(k + 1) * one for k, one in enumerate(text)]
        wanted["weightedmean"].append(sum(weighted) / (length * (length + 1) / 2))
        wanted["max+cls"].append(np.hstack([text.max(0), text[0]]))
    for name, rows in wanted.items():
        got = pool(of(x), name, mask=of(mask))
        np.testing.assert_allclose(np.asarray(got), rows, rtol=1e-5, atol=1e-6, err_msg=name)
        noise = np.where(mask[:, :, None].astype(bool), x, 1e6).astype(np.float32)
        again = pool(of(noise), name, mask=of(mask))
        np.testing.assert_array_equal(np.asarray(again), np.asarray(got), err_msg=name)


def test_half_precision_is_pooled_in_float32():
    # The mean of 2,049 ones is one; a sum in float16 stops at 2,048.
    x = np.ones((1, 2049, 1), np.float16)
    assert pool(x, "mean", layout=Layout(cls=False))[0, 0] == 1.0
    assert pool(x, "mean", mask=np.ones((1, 2049), np.int32))[0, 0] == 1.0


@LIBRARIES
def test_unit_length(of):
    x = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    np.testing.assert_allclose(np.asarray(unit_length(of(x))), [[0.6, 0.8], [0, 0]], rtol=1e-6)


def test_refusals():
    x, mask = tokens(), np.ones((3, 11), np.int32)
    for arguments in ({}, {"layout": Layout(), "mask": mask}):
        with pytest.raises(ValueError, match="takes a layout"):
            pool(x, "mean", **arguments)
    with pytest.raises(
        ValueError,
        match=r"pooling: must be one of cls, last, mean, .* joined by \+; got 'cls_mean'",
    ):
        pool(x, "cls_mean", mask=mask)
    with pytest.raises(ValueError, match=r"got 'cls\+'"):
        pool(x, "cls+", mask=mask)
    with pytest.raises(ValueError, match="got 'last'"):
        pool(x, "last", layout=Layout())
    with pytest.raises(ValueError, match="needs a class token"):
        pool(x, "cls_mean", layout=Layout(cls=False, registers=4))
    for pooling in ("mean_registers", "cls_mean_registers", "cls_mean_shifted"):
        with pytest.raises(ValueError, match="needs register tokens"):
            check_layout(pooling, Layout())
    with pytest.raises(ValueError, match="leave no patch"):
        pool(x[:, :5], "mean", layout=REGISTERS)
