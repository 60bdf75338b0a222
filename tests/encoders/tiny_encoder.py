"""Encoders that need no model, and files for them to read."""

import io
import time

import numpy as np
from PIL import Image

from sotalign_jax.encoders.callables import CallableEncoder

# Seconds a batch: long enough for a test on a busy machine to see a part done, and to interfere
# before the next one is.
SLOW = 0.1


def image(items):
    """4 by 4 colours of each image."""
    return np.stack([np.asarray(item.resize((4, 4)), np.float32).ravel() / 255 for item in items])


def text(items):
    """How often each of 32 classes of bytes occurs."""
    return np.stack(
        [np.bincount(np.frombuffer(item.encode(), np.uint8) % 32, minlength=32) for item in items]
    )


def slow_image(items):
    time.sleep(SLOW)
    return image(items)


def slow_text(items):
    time.sleep(SLOW)
    return text(items)


def made(scale=1.0):
    """A function that gives a function."""
    return lambda items: scale * text(items)


def other_modality():
    return CallableEncoder(text, "text", "tiny")


def broken(items):
    return np.zeros((len(items) + 1, 3))


def encoder(modality, function=None):
    return CallableEncoder(function or globals()[modality], modality, "tiny")


def colours(seed, width=6, height=5):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def file_of(picture, form="PNG", **options):
    """The bytes of an image's file."""
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def png(seed):
    return file_of(colours(seed))
