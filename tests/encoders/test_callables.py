"""A function as an encoder."""

import pickle

import numpy as np
import pytest
import tiny_encoder
from PIL import Image

from sotalign_jax.encoders import Encoder
from sotalign_jax.encoders.callables import CallableEncoder, load_callable


def test_a_function_gets_the_items_as_they_were():
    got = []

    def keep(items):
        got.extend(items)
        return np.zeros((len(items), 2))

    texts = ["über\0", "\0", "two\nlines"]
    encoder = CallableEncoder(keep, "text", "keep")
    preprocess = pickle.loads(pickle.dumps(encoder.preprocess))
    rows = encoder.encode([preprocess(text) for text in texts])
    assert got == texts and rows.dtype == np.float32 and rows.shape == (3, 2)

    got.clear()
    encoder = CallableEncoder(keep, "image", "keep")
    encoder.encode([pickle.loads(pickle.dumps(encoder.preprocess))(tiny_encoder.colours(0))])
    assert isinstance(got[0], Image.Image) and got[0].mode == "RGB"
    np.testing.assert_array_equal(np.asarray(got[0]), np.asarray(tiny_encoder.colours(0)))


@pytest.mark.parametrize(
    "gives,message",
    [
        (np.zeros((3, 2)), r"must give 2 rows of numbers .*, gives float64 of shape \(3, 2\)"),
        (np.zeros(2), r"gives float64 of shape \(2,\)"),
        ([["a"], ["b"]], "gives <U1"),
        ([[1], [1, 2]], "gives no array"),
        (None, "gives object of shape"),
    ],
)
def test_what_is_no_row_for_each_item(gives, message):
    encoder = CallableEncoder(lambda items: gives, "text", "module:function")
    with pytest.raises(ValueError, match=f"module:function: .*{message}"):
        encoder.encode([encoder.preprocess("a"), encoder.preprocess("b")])


def test_it_is_found_by_name():
    encoder = load_callable("tiny_encoder:text", "text")
    assert isinstance(encoder, Encoder) and encoder.description.name == "tiny_encoder:text"
    inputs = [encoder.preprocess(text) for text in ("a", "b")]
    np.testing.assert_array_equal(encoder.encode(inputs), tiny_encoder.text(["a", "b"]))
    twice = load_callable("tiny_encoder:made", "text", scale=2.0)
    np.testing.assert_array_equal(twice.encode(inputs), 2 * encoder.encode(inputs))
    # What it was made with is of its description, so that no store has rows of both.
    assert twice.description.settings == {"scale": 2.0} and encoder.description.settings == {}
    assert load_callable("tiny_encoder:other_modality", "text").description.name == "tiny"


def test_a_module_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_own_encoder.py").write_text(
        "import numpy\nclass Mine:\n    def rows(items):\n"
        "        return numpy.ones((len(items), 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    encoder = load_callable("my_own_encoder:Mine.rows", "text")
    assert encoder.encode([encoder.preprocess("a")]) == 1


@pytest.mark.parametrize(
    "name,options,message",
    [
        ("tiny_encoder", {}, "must be MODULE:FUNCTION, got 'tiny_encoder'"),
        ("no_such_module:f", {}, "no_such_module cannot be imported"),
        ("tiny_encoder:no", {}, "tiny_encoder:no does not exist"),
        ("tiny_encoder:np", {}, "is module; must be an Encoder, a function"),
        ("tiny_encoder:text", {"a": 1}, "takes no options, got a"),
        ("tiny_encoder:made", {"a": 1}, "does not take these options"),
        ("tiny_encoder:other_modality", {}, "takes items of modality 'text', not 'image'"),
    ],
)
def test_names_that_are_refused(name, options, message):
    with pytest.raises(ValueError, match=f"encoder: .*{message}"):
        load_callable(name, "image", **options)
