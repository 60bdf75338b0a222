"""How the tokens of an item become its one row.

The functions take hidden states ``(n, tokens, d)`` of NumPy, JAX or PyTorch alike, and give rows of
the same kind, in float32: a mean over hundreds of tokens in half precision would lose digits.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = [
    "IMAGE_POOLINGS",
    "MODEL_POOLING",
    "TEXT_POOLINGS",
    "Layout",
    "pool",
    "text_poolings",
    "unit_length",
]

# The model's own: nothing is pooled here.
MODEL_POOLING = "model"


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of an image stand: [class], [others], [registers], patches.

    Attributes:
        cls: whether there is a class token.
        registers: how many register tokens follow it.
        others: how many tokens that no pooling takes come between the two, as DeiT's distillation
            token does.
    """

    cls: bool = True
    registers: int = 0
    others: int = 0

    @property
    def first(self) -> int:
        """The number of tokens before the first register."""
        return int(self.cls) + self.others

    @property
    def prefix(self) -> int:
        """The number of tokens before the first patch."""
        return self.first + self.registers


def _cls(tokens, layout: Layout):
    return tokens[:, 0]


def _mean(tokens, layout: Layout):
    return _average(tokens[:, layout.prefix :])


def _mean_registers(tokens, layout: Layout):
    return _average(tokens[:, layout.first :])


def _cls_mean(tokens, layout: Layout):
    return _join(_cls(tokens, layout), _mean(tokens, layout))


def _cls_mean_registers(tokens, layout: Layout):
    return _join(_cls(tokens, layout), _mean_registers(tokens, layout))


def _cls_mean_shifted(tokens, layout: Layout):
    last = tokens.shape[1] - layout.registers
    return _join(_cls(tokens, layout), _average(tokens[:, layout.first : last]))


# name -> (what it is, the function). The first line of docs/encoders.md's table is the same text.
IMAGE_POOLINGS: dict[str, tuple[str, Callable[[Any, Layout], Any]]] = {
    "cls": ("the class token", _cls),
    "mean": ("mean of the patches", _mean),
    "mean_registers": ("mean of the registers and patches", _mean_registers),
    "cls_mean": ("the class token, then the mean of the patches: the paper's", _cls_mean),
    "cls_mean_registers": (
        "the class token, then the mean of the registers and patches",
        _cls_mean_registers,
    ),
    "cls_mean_shifted": (
        "the class token, then the mean of all but the last tokens, as many as there are registers:"
        " a published mistake, which takes the registers for patches and leaves out patches",
        _cls_mean_shifted,
    ),
}


def _first(tokens, mask):
    numbers = _numbers(mask)
    return _take(tokens, _integers(mask) * (mask.shape[1] + 1 - numbers)[None, :])


def _last(tokens, mask):
    return _take(tokens, _integers(mask) * _numbers(mask)[None, :])


def _masked_mean(tokens, mask):
    weights = _float32(_integers(mask))
    total = (tokens * weights[:, :, None]).sum(1)
    return total / weights.sum(1)[:, None]


def _masked_mean_sqrt(tokens, mask):
    xp = _namespace(tokens)
    weights = _float32(_integers(mask))
    total = (tokens * weights[:, :, None]).sum(1)
    return total / xp.sqrt(weights.sum(1))[:, None]


def _weighted_mean(tokens, mask):
    # Counted from the first token of the text, on whatever side the padding is.
    real = _integers(mask)
    weights = _float32(real.cumsum(1) * real)
    return (tokens * weights[:, :, None]).sum(1) / weights.sum(1)[:, None]


def _max(tokens, mask):
    xp = _namespace(tokens)
    lowest = xp.full_like(tokens, -xp.inf)
    highest = xp.where((_integers(mask) > 0)[:, :, None], tokens, lowest)
    return xp.amax(highest, 1)


TEXT_POOLINGS: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "cls": ("the first token of the text", _first),
    "last": ("the last token of the text", _last),
    "mean": ("mean of the tokens of the text, prompt and special tokens included", _masked_mean),
    "max": ("the largest value of each feature over those tokens", _max),
    "mean_sqrt_len_tokens": (
        "sum of those tokens, divided by the square root of how many they are",
        _masked_mean_sqrt,
    ),
    "weightedmean": ("mean of those tokens, the k-th of them with weight k", _weighted_mean),
}


def text_poolings(pooling: str) -> tuple[str, ...]:
    """The poolings of texts that a name joins, in their order: ``"cls+mean"`` is of two.

    Raises:
        ValueError: one of them is unknown.
    """
    names = tuple(pooling.split("+"))
    if not set(names) <= set(TEXT_POOLINGS):
        raise ValueError(
            f"pooling: must be one of {', '.join(TEXT_POOLINGS)}, or some joined by +; got "
            f"{pooling!r}"
        )
    return names


def pool(tokens: Any, pooling: str, *, layout: Layout | None = None, mask: Any = None) -> Any:
    """One row for each item, of its tokens.

    Args:
        tokens: ``(n, tokens, d)`` hidden states.
        pooling: one of `IMAGE_POOLINGS` with a layout; with a mask one of `TEXT_POOLINGS`, or some
            of them joined by ``+``.
        layout: of the tokens of images.
        mask: ``(n, tokens)``, nonzero where a token is of the text, zero where it is padding, on
            either side; at least one token of each text.

    Returns:
        ``(n, d)`` float32, and ``(n, k d)`` where k are joined.

    Raises:
        ValueError: an unknown pooling, one that the layout has no token for, or no patch left.
    """
    if (layout is None) == (mask is None):
        raise ValueError("pool: takes a layout (of images) or a mask (of texts), and not both")
    if layout is None:
        rows = [TEXT_POOLINGS[one][1](_float32(tokens), mask) for one in text_poolings(pooling)]
        return functools.reduce(_join, rows)
    if pooling not in IMAGE_POOLINGS:
        raise ValueError(f"pooling: must be one of {', '.join(IMAGE_POOLINGS)}; got {pooling!r}")
    check_layout(pooling, layout)
    if tokens.shape[1] <= layout.prefix:
        raise ValueError(
            f"pool: {tokens.shape[1]} tokens leave no patch after the first {layout.prefix}"
        )
    return IMAGE_POOLINGS[pooling][1](_float32(tokens), layout)


def check_layout(pooling: str, layout: Layout) -> None:
    """Raises ValueError for a pooling that needs tokens which the layout does not have."""
    if "cls" in pooling and not layout.cls:
        raise ValueError(f"pooling: {pooling!r} needs a class token, and the model has none")
    if pooling.endswith(("_registers", "_shifted")) and not layout.registers:
        raise ValueError(f"pooling: {pooling!r} needs register tokens, and the model has none")


def unit_length(rows: Any) -> Any:
    """Rows scaled to length 1; zeros stay zeros."""
    xp = _namespace(rows)
    norms = xp.sqrt((rows * rows).sum(1))[:, None]
    return rows / xp.where(norms > 0, norms, xp.ones_like(norms))


def _namespace(array: Any) -> Any:
    """The library whose functions take the array; PyTorch is never imported here."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(array, torch.Tensor):
        return torch
    if isinstance(array, np.ndarray):
        return np
    import jax.numpy

    return jax.numpy


def _float32(array: Any) -> Any:
    xp = _namespace(array)
    return array.to(xp.float32) if hasattr(array, "to") else array.astype(xp.float32)


def _integers(mask: Any) -> Any:
    """1 where a mask is not zero, and 0 where it is."""
    xp = _namespace(mask)
    # Through a boolean, because a mask may be of any type.
    as_bool = mask.to(xp.bool) if hasattr(mask, "to") else mask.astype(bool)
    return as_bool.to(xp.int32) if hasattr(mask, "to") else as_bool.astype(xp.int32)


def _place(array: Any) -> dict[str, Any]:
    """For new arrays where this one is; only PyTorch asks."""
    return {"device": array.device} if hasattr(array, "to") else {}


def _numbers(mask: Any) -> Any:
    """1, 2, ... for the columns of a mask."""
    xp = _namespace(mask)
    return xp.arange(1, mask.shape[1] + 1, dtype=xp.int32, **_place(mask))


def _take(tokens: Any, scores: Any) -> Any:
    """Of each item the token with the highest score."""
    xp = _namespace(tokens)
    rows = xp.arange(tokens.shape[0], **_place(tokens))
    return tokens[rows, xp.argmax(scores, 1)]


def _average(tokens: Any) -> Any:
    return tokens.sum(1) / tokens.shape[1]


def _join(left: Any, right: Any) -> Any:
    xp = _namespace(left)
    return xp.cat([left, right], 1) if hasattr(xp, "cat") else xp.concatenate([left, right], 1)
