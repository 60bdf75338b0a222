"""Files of images to RGB, and what is said of those that are none."""

import numpy as np
import pytest
from PIL import Image
from tiny_encoder import colours, file_of, png

from sotalign_jax.encoders import images
from sotalign_jax.encoders.images import decode


def pixels(data):
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_colours_come_out_as_they_are():
    expected = np.asarray(colours(0))
    for form in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(pixels(file_of(colours(0), form)), expected)
    assert pixels(file_of(colours(0), "JPEG")).shape == (5, 6, 3)


def test_alpha_is_dropped_and_not_blended():
    rgba = np.dstack([np.asarray(colours(1)), np.full((5, 6), 3, np.uint8)])
    np.testing.assert_array_equal(pixels(file_of(Image.fromarray(rgba))), np.asarray(colours(1)))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    data = file_of(palette, transparency=b"\x00\x80")
    np.testing.assert_array_equal(pixels(data), [[[255, 0, 0], [0, 255, 0]]])


def test_what_is_transparent_is_laid_over_a_background():
    colour, alpha, over = np.asarray(colours(1)), 100, np.array([10, 200, 30])
    rgba = np.dstack([colour, np.full((5, 6), alpha, np.uint8)])
    found = np.asarray(decode(file_of(Image.fromarray(rgba)), (10, 200, 30)))
    expected = (colour * (alpha / 255) + over * (1 - alpha / 255)).round()
    assert np.abs(found - expected).max() <= 1
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    data = file_of(palette, transparency=b"\x00\xff")
    found = np.asarray(decode(data, (10, 200, 30)))
    np.testing.assert_array_equal(found, [[[10, 200, 30], [0, 255, 0]]])
    np.testing.assert_array_equal(decode(png(2), (10, 200, 30)), pixels(png(2)))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_of_sixteen_bits_keeps_its_upper_eight(form):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    found = pixels(file_of(Image.fromarray(values), form))
    np.testing.assert_array_equal(found, np.repeat([[[0], [0], [1], [128], [255]]], 3, axis=2))
    wide = Image.fromarray(values.astype(np.int32))
    np.testing.assert_array_equal(pixels(file_of(wide, "TIFF")), found)


def test_grey_bits_and_cmyk():
    grey = Image.fromarray(np.array([[0, 7, 255]], np.uint8))
    np.testing.assert_array_equal(pixels(file_of(grey))[0, :, 1], [0, 7, 255])
    bits = grey.point(lambda v: 255 * (v > 5)).convert("1")
    np.testing.assert_array_equal(pixels(file_of(bits))[0, :, 2], [0, 255, 255])
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = pixels(file_of(cmyk, "JPEG"))[4, 4].astype(int)
    assert red[0] > 200 and red[1] < 60 and red[2] < 60


@pytest.mark.parametrize("kind", ["colours", "sixteen", "transparent", "palette"])
@pytest.mark.parametrize("background", [None, (0, 0, 0)])
def test_the_orientation_of_exif_is_applied(kind, background):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    if kind == "sixteen":
        values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 256
        upright = np.repeat(np.rot90(values // 256, -1)[..., None], 3, axis=2)
        data = file_of(Image.fromarray(values), exif=exif)
    else:
        picture = colours(2).quantize(4) if kind == "palette" else colours(2)
        upright = np.rot90(np.asarray(picture.convert("RGB")), -1)
        more = {"transparency": b"\xff" * 4} if kind == "palette" else {}
        picture = picture.convert("RGBA") if kind == "transparent" else picture
        data = file_of(picture, exif=exif, **more)
    np.testing.assert_array_equal(decode(data, background), upright)


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("#ff0000", "#00ff00")]
    data = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(pixels(data)[1, 1], [255, 0, 0])


def test_what_is_no_image():
    for data, reason in (
        (b"", "not an image: 0 bytes"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n", "not an image: no known format"),
        (b"<html>", r"not an image: no known format \(6 bytes\)"),
        (b"\x89PNG\r\n\x1a\n", "not an image|broken image: "),
        (file_of(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "not an image: floating"),
    ):
        with pytest.raises(ValueError, match=reason):
            decode(data)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "TIFF", "WEBP"])
def test_every_truncation_is_a_reason_and_the_same_each_time(form):
    data = file_of(colours(3, 40, 40), form)
    reasons = set()
    for cut in np.linspace(1, len(data) - 30, 25).astype(int):
        said = []
        for _ in range(2):
            try:
                decode(data[:cut])
            except ValueError as error:
                said.append(str(error))
        assert len(said) != 1 and len(set(said)) <= 1
        assert not any(" at 0x" in reason for reason in said)
        reasons |= {reason.partition(":")[0] for reason in said}
    assert reasons and reasons <= {"not an image", "broken image"}


def test_a_corrupt_png():
    data = bytearray(png(4))
    data[60] ^= 255
    with pytest.raises(ValueError, match="broken image: "):
        decode(bytes(data))


def test_too_many_pixels(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 29)
    with pytest.raises(ValueError, match="too large: more than 29 pixels"):
        decode(png(0))
    monkeypatch.setattr(images, "MAX_PIXELS", 30)
    assert pixels(png(0)).shape == (5, 6, 3)
    for limit in (20, 10):  # Pillow's own limit: a warning, and an error from twice as many
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="too large: more than 30 pixels"):
            decode(png(0))
