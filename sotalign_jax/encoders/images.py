"""Files of images to RGB."""

from __future__ import annotations

import functools
import io
import re
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["FORMATS", "MAX_PIXELS", "Colour", "decode"]

FORMATS = (
    *("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF"),
    *("ICO", "TGA"),
)

# Pillow's own line between a large image and a bomb; it warns above, and refuses at twice as many.
MAX_PIXELS = 89_478_485
_SIXTEEN_BITS = ("I", "I;16", "I;16B", "I;16L", "I;16N")

Colour = tuple[int, int, int]


def decode(data: bytes, background: Colour | None = None) -> Image.Image:
    """An image as the field's loaders see it, which is what encoders were trained on.

    * The alpha channel is dropped, not blended: a transparent pixel has the colour that the file
      gives it, often black. Of palettes with transparency likewise. With a ``background`` the image
      is laid over it instead.
    * Grey becomes three equal channels; of 16 bits a channel the upper 8 are kept (Pillow alone
      would cut all that is brighter than 255 to white).
    * CMYK and YCbCr are converted by Pillow's formulas; colour profiles are ignored.
    * The orientation of EXIF is applied: the image is as people see it.
    * Of an animation the first frame is taken.

    Args:
        data: a file in one of `FORMATS`. Pillow reads more, some by starting other programs.
        background: red, green and blue, 0 to 255, behind what is transparent.

    Returns:
        The image in mode RGB.

    Raises:
        ValueError: no image, a truncated or corrupt one, one of more than `MAX_PIXELS`, or one of
            floating point numbers; begins with the kind of problem, then a colon.
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "images: install Pillow, as the extra sotalign-jax[encoders] does"
        ) from error
    if not data:
        raise ValueError("not an image: 0 bytes")
    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.UnidentifiedImageError:
        raise ValueError(f"not an image: no known format ({len(data)} bytes)") from None
    except bombs:
        raise ValueError(f"too large: more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # each of its parsers has its own
        raise ValueError(f"broken image: {_said(error)}") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"too large: more than {MAX_PIXELS} pixels")
    if image.mode == "F":
        raise ValueError("not an image: floating point numbers, whose range is not known")
    try:
        image.load()
        image = _upright(image)
        return _rgb(image if background is None else _over(image, background))
    except (MemoryError, KeyboardInterrupt):
        raise
    except bombs:
        raise ValueError(f"too large: more than {MAX_PIXELS} pixels") from None
    except Exception as error:
        raise ValueError(f"broken image: {_said(error)}") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Of `FORMATS` those that this build of Pillow has."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    """An image as its EXIF says that it is looked at."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # EXIF that cannot be read says nothing
        return image


def _over(image: Image.Image, background: Colour) -> Image.Image:
    """An image with transparency, laid over a colour; others as they are."""
    from PIL import Image

    if not image.has_transparency_data:
        return image
    over = image.convert("RGBA")
    laid = Image.new("RGBA", over.size, (*background, 255))
    laid.alpha_composite(over)
    return laid.convert("RGB")


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode in _SIXTEEN_BITS:
        values = np.asarray(image).astype(np.int64)
        upper = (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
        return Image.fromarray(upper).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns of the direct way
    return image.convert("RGB")


def _said(error: Exception) -> str:
    """An error's message without addresses of objects, so that each run says the same."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"<[^<>]* at 0x[0-9a-fA-F]+>", "the file", text)[:200]
