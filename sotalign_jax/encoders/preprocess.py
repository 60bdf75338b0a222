"""What worker processes do to an item before a model sees it: pictures to pixels, texts to ids.

A preprocessor holds the image processor or the tokenizer of its model and nothing else, so it can
be pickled, and needs neither the hub nor the model's weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sotalign_jax.encoders.base import Inputs

__all__ = ["ImagePreprocessor", "TextPreprocessor", "resized"]


class ImagePreprocessor:
    """A picture to ``{"pixel_values": (3, height, width)}``, by the model's own processor.

    Args:
        processor: an image processor of transformers.
    """

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, item: Any) -> Inputs:
        """Raises ValueError for what is no picture, and for one that the processor refuses."""
        if not hasattr(item, "convert") or not hasattr(item, "size"):
            raise ValueError(f"expected a picture, got {type(item).__name__}")
        pixels = self.processor(images=item.convert("RGB"), return_tensors="np")["pixel_values"]
        return {"pixel_values": np.asarray(pixels[0], np.float32)}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as JSON takes it."""
        known = self.processor.to_dict()
        kept = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
        chosen = {
            k: known[k]
            for k in (*kept, *(k for k in known if k.startswith("do_")))
            if known.get(k) is not None
        }
        chosen["processor"] = type(self.processor).__name__
        return _plain(chosen)


class TextPreprocessor:
    """A text to ``{"input_ids": (tokens,)}``: prompt before it, cut at its end, not padded.

    Args:
        tokenizer: of transformers.
        prompt: before the text, or with ``{text}`` where the text goes.
        max_length: tokens that are kept, special tokens included.
        end: token that all texts end with; by default what the tokenizer puts there.
        lower: puts texts into lower case first, but not the prompt.

    Raises:
        ValueError: ``end`` is not one token, or the prompt leaves no token for the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt: str,
        max_length: int,
        end: str | None = None,
        lower: bool = False,
    ):
        self.tokenizer = tokenizer
        self.lower = lower
        self.prompt = prompt
        self.max_length = max_length
        self.end: int | None = None
        tokenizer.truncation_side = "right"
        if end is not None:
            found = tokenizer.convert_tokens_to_ids(end)
            if not isinstance(found, int) or found == tokenizer.unk_token_id:
                raise ValueError(f"end: {end!r} is not a token of this tokenizer")
            self.end = found
        taken = len(self._ids(self._prompted(""), None))
        if taken >= max_length:
            raise ValueError(
                f"max_length: the prompt and the special tokens take {taken} tokens, which leaves "
                f"none of {max_length} for the text"
            )

    def __call__(self, item: Any) -> Inputs:
        """Raises ValueError for what is no text, or cannot be tokenized, or gives no token."""
        if not isinstance(item, str):
            raise ValueError(f"expected a text, got {type(item).__name__}")
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode ({error.reason})") from None
        item = item.lower() if self.lower else item
        ids = self._ids(self._prompted(item), self.max_length)
        if not ids:
            raise ValueError("text is empty, and this model's texts have no special tokens")
        return {"input_ids": np.asarray(ids, np.int32)}

    def _prompted(self, text: str) -> str:
        if "{text}" in self.prompt:
            return self.prompt.replace("{text}", text)
        return self.prompt + text

    def _ids(self, text: str, length: int | None) -> list[int]:
        cut = {"truncation": True, "max_length": length} if length else {}
        ids = list(self.tokenizer(text, verbose=False, **cut)["input_ids"])
        if self.end is not None and (not ids or ids[-1] != self.end):
            ids = [*ids[: None if length is None else length - 1], self.end]
        return ids


def resized(processor: Any, image_size: int, name: str) -> Any:
    """An image processor for another size: what it crops has it, and it resizes in proportion.

    Raises:
        ValueError: its sizes are of a kind that is not known here, or the number is not positive.
    """
    if image_size < 1:
        raise ValueError(f"image_size: must be positive, got {image_size}")
    size, crop = (getattr(processor, k, None) for k in ("size", "crop_size"))
    crops = bool(getattr(processor, "do_center_crop", False)) and crop is not None
    old = dict(crop if crops else size or {})
    if "height" not in old or old["height"] != old["width"]:
        raise ValueError(
            f"image_size: the processor of {name} has sizes {old}, which this cannot change; "
            f"leave image_size out"
        )
    factor = image_size / old["height"]
    scale = {k: round(v * factor) for k, v in dict(size or {}).items() if v is not None}
    changes: dict[str, Any] = {"size": scale}
    if crops:
        changes["crop_size"] = {"height": image_size, "width": image_size}
    return type(processor).from_dict({**processor.to_dict(), **changes})


def _plain(value: Any) -> Any:
    """As JSON takes it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | float):
        return float(value) if isinstance(value, float) else int(value)
    return _plain(dict(value)) if hasattr(value, "items") else str(value)
