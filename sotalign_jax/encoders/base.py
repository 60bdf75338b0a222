"""What stands between items (pictures, texts) and rows of features: an encoder, in two halves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

__all__ = ["AsyncEncoder", "Description", "Encoder", "Inputs", "Preprocessor"]

# Arrays of one item, without an axis for the batch: {"pixel_values": (3, 224, 224)}.
Inputs = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Description:
    """What makes an encoder's rows what they are; it goes into the manifest of its features.

    Attributes:
        name: of the model, as a hub or a person calls it.
        modality: ``"image"`` or ``"text"``.
        pooling: how tokens become one row.
        normalized: whether rows have unit length; None if unknown.
        settings: whatever else changes the rows (prompt, length, layer, precision, revision), as
            JSON takes it.
    """

    name: str
    modality: str
    pooling: str
    normalized: bool | None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@runtime_checkable
class Preprocessor(Protocol):
    """The half that worker processes run: one item to arrays. It can be pickled."""

    def __call__(self, item: Any) -> Inputs:
        """Arrays of an RGB `PIL.Image.Image` or of a text.

        Raises:
            ValueError: the item cannot be encoded; it is listed and left out.
        """
        ...


@runtime_checkable
class Encoder(Protocol):
    """The half that has the model: items that were preprocessed to rows."""

    description: Description
    preprocess: Preprocessor

    def encode(self, batch: Sequence[Inputs]) -> Float32[np.ndarray, "n dim"]:
        """One row for each item, in their order.

        Rows may depend by rounding on what else is in the batch, and on nothing else.
        """
        ...


@runtime_checkable
class AsyncEncoder(Encoder, Protocol):
    """An encoder that need not be waited for."""

    def submit(self, batch: Sequence[Inputs]) -> Callable[[], Float32[np.ndarray, "n dim"]]:
        """Starts what `encode` does, and returns what waits for the rows and returns them.

        The rows are asked for in the order in which they were begun, and maybe never.
        """
        ...
