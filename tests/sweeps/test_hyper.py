"""Points: products, zips and chains, by their laws and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sotalign_jax.config import ConfigError
from sotalign_jax.sweeps import hyper


def lists(*names, min_size=0):
    """Lists of points, each of which may assign some of the named fields."""
    point = st.fixed_dictionaries({}, optional={name: st.integers(0, 9) for name in names})
    return st.lists(point, min_size=min_size, max_size=4)


A, B, C = lists("a", "label.a"), lists("b"), lists("c", "d")


@given(A, B, C)
def test_a_product_has_every_combination_once_the_last_part_fastest(a, b, c):
    points = hyper.product(a, b, c)
    assert len(points) == math.prod(map(len, (a, b, c)))
    assert points == [{**x, **y, **z} for x in a for y in b for z in c]


@given(A, B, C)
def test_product_and_chain_are_associative_and_have_neutral_elements(a, b, c):
    for function, neutral in ((hyper.product, [{}]), (hyper.chain, [])):
        assert function(function(a, b), c) == function(a, function(b, c)) == function(a, b, c)
        assert function(a, neutral) == function(neutral, a) == function(a) == a
        assert function() == neutral


@given(A, B, C)
def test_a_product_distributes_over_a_chain_on_its_left(a, b, c):
    left = hyper.product(hyper.chain(a, b), c)
    assert left == hyper.chain(hyper.product(a, c), hyper.product(b, c))


@given(st.data(), st.integers(1, 5))
def test_a_zip_takes_points_in_step(data, length):
    parts = [
        data.draw(st.lists(st.integers(0, 9), min_size=length, max_size=length)) for _ in range(3)
    ]
    a, b, c = (hyper.sweep(name, values) for name, values in zip("abc", parts, strict=True))
    zipped = hyper.zip(a, b, c)
    assert zipped == [{"a": x, "b": y, "c": z} for x, y, z in zip(*parts, strict=True)]
    assert hyper.zip(hyper.zip(a, b), c) == hyper.zip(a, hyper.zip(b, c)) == zipped
    assert hyper.zip(a) == a


def test_a_zip_of_a_method_and_its_own_rate():
    points = hyper.product(
        hyper.zip(hyper.sweep("objective", ["sail", "sotalign"]), hyper.sweep("lr", [1e-3, 1e-4])),
        hyper.sweep("seed", range(2)),
    )
    assert [(p["objective"], p["lr"], p["seed"]) for p in points] == [
        ("sail", 1e-3, 0),
        ("sail", 1e-3, 1),
        ("sotalign", 1e-4, 0),
        ("sotalign", 1e-4, 1),
    ]


def test_fixed_takes_a_field_and_value_a_dict_or_keywords():
    assert hyper.fixed("loss.alpha", 0.1) == [{"loss.alpha": 0.1}]
    assert hyper.fixed({"loss.alpha": 0.1}, steps=3) == [{"loss.alpha": 0.1, "steps": 3}]
    assert hyper.fixed(**{"loss.alpha": 0.1}) == [{"loss.alpha": 0.1}]
    assert hyper.fixed("loss.alpha", None) == [{"loss.alpha": None}]
    assert hyper.fixed() == [{}]


def test_numbers_of_numpy_become_plain_ones():
    values = [point["x"] for point in hyper.sweep("x", np.array([0.5, 2.0], np.float32))]
    assert values == [0.5, 2.0] and {type(value) for value in values} == {float}
    assert type(hyper.fixed("x", np.int64(3))[0]["x"]) is int


def test_points_are_copies():
    part = hyper.fixed("x", 1)
    hyper.chain(part)[0]["x"] = 2
    hyper.product(part)[0]["x"] = 2
    assert part == [{"x": 1}]


def test_one_field_may_be_given_twice_if_it_is_the_same():
    assert hyper.product(hyper.fixed("x", 1), hyper.fixed({"x": 1, "y": 2})) == [{"x": 1, "y": 2}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hyper.sweep("x", []), "hyper.sweep: x: names no value"),
        (lambda: hyper.sweep("objective", "sail"), "hyper.sweep: objective: must be given a list"),
        (lambda: hyper.sweep("x", 3), "hyper.sweep: x: must be given a list of values, got 3"),
        (lambda: hyper.sweep("", [1]), "hyper.sweep: '': must be the name of a field"),
        (lambda: hyper.sweep("label.", [1]), "'label.': must be the name of a field"),
        (lambda: hyper.fixed("x"), "hyper.fixed: x: must be followed by one value"),
        (lambda: hyper.fixed("x", 1, 2), "hyper.fixed: x: must be followed by one value"),
        (lambda: hyper.fixed({"x": 1}, x=2), "hyper.fixed: x: is given twice, 1 and 2"),
        (
            lambda: hyper.product(hyper.sweep("x", [1, 2]), hyper.fixed("x", 1)),
            "hyper.product: x: is given twice, 2 and 1",
        ),
        (
            lambda: hyper.product(hyper.fixed("x", 1), hyper.fixed("x", 1.0)),
            "x: is given twice, 1 and 1.0",
        ),
        (
            lambda: hyper.zip(hyper.sweep("x", [1, 2]), hyper.sweep("y", [1])),
            r"hyper.zip: all parts must be of one length, got \[2, 1\]",
        ),
        (lambda: hyper.zip(), "hyper.zip: all parts must be of one length"),
        (lambda: hyper.chain({"x": 1}), "hyper.chain: part 1: must be a list of points"),
        (lambda: hyper.product([{}], [1]), "hyper.product: part 2: must be a list of points"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()
