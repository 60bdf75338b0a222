"""What worker processes do to an item before a model sees it: pictures to pixels, texts to ids.

A preprocessor holds the image processor or the tokenizer of its model and nothing else, so it can
be pickled, and needs neither the hub nor the model's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sotalign_jax.encoders.base import Inputs
from sotalign_jax.encoders.images import MAX_PIXELS

__all__ = [
    "FloatImagePreprocessor",
    "ImagePreprocessor",
    "TextPreprocessor",
    "check_proportions",
    "resized",
]


class ImagePreprocessor:
    """A picture to ``{"pixel_values": (3, height, width)}``, by the model's own processor.

    Args:
        processor: an image processor of transformers.
    """

    def __init__(self, processor: Any):
        self.processor = processor
        size = _plain(processor.to_dict().get("size"))
        # Only where pictures keep their proportions may a side become long.
        free = isinstance(size, dict) and "longest_edge" not in size
        self._edge = int(size.get("shortest_edge", 0)) if free else 0

    def __call__(self, item: Any) -> Inputs:
        """Raises ValueError for what is no picture, and for one that the processor refuses."""
        _check_picture(item)
        check_proportions(item, self._edge)
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


class FloatImagePreprocessor:
    """A picture to ``{"pixel_values": (3, height, width)}``: resized after it was made float.

    What the image processor of DINOv3 does, which needs torchvision. Pillow resizes single
    precision too, by the same antialiased kernels, so nothing is rounded to 8 bits in between.

    Args:
        height: of the result.
        width: of the result.
        resample: Pillow's number of the kernel.
        factor: that values of 0 to 255 are multiplied by.
        mean: of each channel, subtracted after that.
        std: of each channel, divided by after that.
    """

    def __init__(
        self,
        *,
        height: int,
        width: int,
        resample: int,
        factor: float,
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self.height, self.width, self.resample, self.factor = height, width, resample, factor
        self.mean, self.std = list(mean), list(std)

    @classmethod
    def from_config(cls, known: Mapping[str, Any], name: str) -> FloatImagePreprocessor:
        """Of a processor's configuration.

        Raises:
            ValueError: it asks for steps that are not done here.
        """
        size = known.get("size") or {}
        extra = [k for k in ("do_center_crop", "do_pad") if known.get(k)]
        off = [k for k in ("do_resize", "do_rescale", "do_normalize") if known.get(k) is False]
        if extra or off or not {"height", "width"} <= set(size):
            raise ValueError(
                f"name: the image processor of {name} has steps or sizes that are not known here: "
                f"{', '.join(extra or off) or size}"
            )
        return cls(
            height=int(size["height"]),
            width=int(size["width"]),
            resample=int(known.get("resample", 2)),
            factor=float(known.get("rescale_factor", 1 / 255)),
            mean=known.get("image_mean", (0.485, 0.456, 0.406)),
            std=known.get("image_std", (0.229, 0.224, 0.225)),
        )

    def resized(self, image_size: int) -> FloatImagePreprocessor:
        """The same for square pictures of another size."""
        changed = copy.copy(self)
        changed.height = changed.width = image_size
        return changed

    def __call__(self, item: Any) -> Inputs:
        """Raises ValueError for what is no picture."""
        _check_picture(item)
        from PIL import Image  # pyright: ignore[reportMissingImports]

        pixels = np.asarray(item.convert("RGB"), np.float32) * np.float32(self.factor)
        channels = [
            np.asarray(
                Image.fromarray(np.ascontiguousarray(pixels[..., k])).resize(
                    (self.width, self.height), Image.Resampling(self.resample)
                )
            )
            for k in range(3)
        ]
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (self.mean, self.std))
        return {"pixel_values": (np.stack(channels) - mean) / std}

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the pixels, as JSON takes it."""
        return {
            "size": {"height": self.height, "width": self.width},
            "resample": self.resample,
            "rescale_factor": self.factor,
            "image_mean": self.mean,
            "image_std": self.std,
            "processor": "rescale, resize, normalize",
        }


class TextPreprocessor:
    """A text to ``{"input_ids": (tokens,)}``: prompt before it, cut at its end, not padded.

    White space around prompt and text is taken off, as earlier versions of sentence-transformers
    did: of many tokenizers a space at the end would be one more token.

    Args:
        tokenizer: of transformers.
        prompt: before the text, or with ``{text}`` where the text goes.
        max_length: tokens that are kept, special tokens included.
        end: token that all texts end with; by default what the tokenizer puts there.
        lower: puts prompt and text into lower case first.
        skip_prompt: whether the prompt's tokens are not pooled; `skip` is how many that are, with
            the special tokens before them.

    Raises:
        ValueError: ``end`` is not one token, the prompt leaves no token for the text, or its tokens
            are to be left out and it is around the text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prompt: str,
        max_length: int,
        end: str | None = None,
        lower: bool = False,
        skip_prompt: bool = False,
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
        self.skip = self._prompt_tokens() if skip_prompt and prompt else 0

    def __call__(self, item: Any) -> Inputs:
        """Raises ValueError for what is no text, or cannot be tokenized, or gives no token."""
        if not isinstance(item, str):
            raise ValueError(f"expected a text, got {type(item).__name__}")
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text is not valid Unicode ({error.reason})") from None
        text = self._prompted(item).strip()
        ids = self._ids(text.lower() if self.lower else text, self.max_length)
        if not ids:
            raise ValueError("text is empty, and this model's texts have no special tokens")
        if len(ids) <= self.skip:
            raise ValueError("text is empty, and this model does not pool the prompt's tokens")
        return {"input_ids": np.asarray(ids, np.int32)}

    def _prompt_tokens(self) -> int:
        """As sentence-transformers counts them: all but a special token at the end."""
        if "{text}" in self.prompt:
            raise ValueError(
                f"prompt: its tokens are not pooled, so it must be before the text, without "
                f"{{text}}; got {self.prompt!r}"
            )
        prompt = self.prompt.lstrip()  # a space at its end is before the text, and stays
        ids = self._ids(prompt.lower() if self.lower else prompt, None)
        return len(ids) - bool(ids and ids[-1] in {*self.tokenizer.all_special_ids, self.end})

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
        ValueError: its sizes are of a kind that is not known here.
    """
    known = processor.to_dict()
    size, crop = (_plain(known.get(key) or {}) for key in ("size", "crop_size"))
    crops = bool(known.get("do_center_crop")) and bool(crop)
    old = crop if crops else size
    if "height" not in old or old["height"] != old.get("width"):
        raise ValueError(
            f"image_size: the processor of {name} has sizes {old}, which this cannot change; "
            f"leave image_size out"
        )
    factor = image_size / old["height"]
    changes: dict[str, Any] = {"size": {k: round(v * factor) for k, v in size.items()}}
    if crops:
        changes["crop_size"] = {"height": image_size, "width": image_size}
    return type(processor).from_dict({**known, **changes})


def check_proportions(item: Any, edge: int) -> None:
    """Raises ValueError for a picture that would not fit into memory, its short side an edge."""
    short, long = sorted(item.size)
    if edge * edge * long > MAX_PIXELS * short:
        raise ValueError(
            f"too narrow: {item.size[0]} x {item.size[1]} pixels, with the short side at {edge} "
            f"more than {MAX_PIXELS}"
        )


def _check_picture(item: Any) -> None:
    if not hasattr(item, "convert") or not hasattr(item, "size"):
        raise ValueError(f"expected a picture, got {type(item).__name__}")


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
