"""Any function as an encoder: a list of images or texts in, an array out."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
from jaxtyping import Float32

from sotalign_jax.encoders.base import Description, Encoder, Inputs

__all__ = ["CallableEncoder", "load_callable"]


class CallableEncoder:
    """A function of a list of items, as an encoder.

    Args:
        function: of a list of RGB `PIL.Image.Image`, or of strings, to an array ``(n, dim)``.
        modality: ``"image"`` or ``"text"``.
        name: what the manifest calls it.
        options: that the function was made with, as JSON takes them; they are of its description.
    """

    def __init__(
        self,
        function: Callable[[list[Any]], Any],
        modality: str,
        name: str,
        options: Mapping[str, Any] | None = None,
    ):
        self._function = function
        self.description = Description(
            name, modality, pooling="", normalized=None, settings=dict(options or {})
        )
        self.preprocess = _image_arrays if modality == "image" else _text_arrays

    def encode(self, batch: Sequence[Inputs]) -> Float32[np.ndarray, "n dim"]:
        """The function's rows.

        Raises:
            ValueError: it gives something else than a row of numbers for each item.
        """
        rows = self._function([_item(inputs) for inputs in batch])
        try:
            array = np.asarray(rows)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{self.description.name}: gives no array ({error})") from None
        if array.ndim != 2 or len(array) != len(batch) or array.dtype.kind not in "fiuV":
            raise ValueError(
                f"{self.description.name}: must give {len(batch)} rows of numbers for as many "
                f"items, gives {array.dtype} of shape {array.shape}"
            )
        with np.errstate(over="ignore"):  # what is too large is refused as Inf
            return array.astype(np.float32)


def _image_arrays(item: Any) -> Inputs:
    return {"pixels": np.asarray(item)}


def _text_arrays(item: Any) -> Inputs:
    # As bytes: NumPy's strings drop zeros at their ends.
    return {"text": np.frombuffer(item.encode(), np.uint8)}


def _item(inputs: Inputs) -> Any:
    if "text" in inputs:
        return inputs["text"].tobytes().decode()
    from PIL import Image

    return Image.fromarray(inputs["pixels"])


def load_callable(name: str, modality: str, **options: Any) -> Encoder:
    """The encoder ``MODULE:FUNCTION``.

    Args:
        name: a module that can be imported from here (or is in the working directory), and what in
            it: an `Encoder`, a function of one list of items, or one without required arguments
            that gives either.
        modality: ``"image"`` or ``"text"``.
        options: arguments of a function that gives an encoder.

    Returns:
        The encoder.

    Raises:
        ValueError: no such module or function, it is none of the above, is of the other modality,
            or takes no options.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ValueError(f"encoder: must be MODULE:FUNCTION, got {name!r}")
    if os.getcwd() not in sys.path:  # for good, since workers take over what is there
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ImportError as error:
        raise ValueError(f"encoder: {module} cannot be imported ({error})") from error
    except AttributeError as error:
        raise ValueError(f"encoder: {name} does not exist ({error})") from None
    if not _is_encoder(found) and callable(found) and _makes(found, options, name):
        found = found(**options)
    elif options:
        raise ValueError(f"encoder: {name} takes no options, got {', '.join(options)}")
    if _is_encoder(found):
        if found.description.modality != modality:
            raise ValueError(
                f"encoder: {name} takes items of modality {found.description.modality!r}, not "
                f"{modality!r}"
            )
        return found
    if not callable(found):
        raise ValueError(
            f"encoder: {name} is {type(found).__name__}; must be an Encoder, a function of a list, "
            "or one without arguments that gives either"
        )
    return CallableEncoder(found, modality, name, options)


def _is_encoder(value: Any) -> TypeGuard[Encoder]:
    # A class has the attributes of its instances' methods too.
    return isinstance(value, Encoder) and not isinstance(value, type)


def _makes(function: Callable, options: dict[str, Any], name: str) -> bool:
    """Whether a function is called to get an encoder, and is none itself."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return False  # of C
    required = [
        p
        for p in signature.parameters.values()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.name not in options
    ]
    if required:
        return False
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"encoder: {name} does not take these options ({error})") from None
    return True
