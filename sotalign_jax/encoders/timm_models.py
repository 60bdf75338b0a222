"""Encoders out of models of timm: ``timm:NAME``, with timm's own pictures and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from sotalign_jax.encoders.base import Inputs
from sotalign_jax.encoders.digests import digest_of_model
from sotalign_jax.encoders.extras import need
from sotalign_jax.encoders.families import check_pooling
from sotalign_jax.encoders.networks import RowNetwork, keep_layers, named
from sotalign_jax.encoders.pooling import MODEL_POOLING, Layout, check_layout
from sotalign_jax.encoders.preprocess import check_proportions
from sotalign_jax.encoders.presets import Preset
from sotalign_jax.encoders.towers import Loaded

__all__ = ["TimmPreprocessor", "load_timm"]


class TimmPreprocessor:
    """A picture to ``{"pixel_values": (channels, height, width)}``, by timm's transform.

    Args:
        transform: of timm.
        edge: that it brings the short side of a picture to; 0 where it does not keep proportions.
    """

    def __init__(self, transform: Any, edge: int = 0):
        self.transform, self._edge = transform, edge

    def __call__(self, item: Any) -> Inputs:
        """Raises ValueError for what is no picture, and for one that is too narrow."""
        if not hasattr(item, "convert") or not hasattr(item, "size"):
            raise ValueError(f"expected a picture, got {type(item).__name__}")
        check_proportions(item, self._edge)
        return {"pixel_values": self.transform(item.convert("RGB")).numpy()}


class _Tokens(torch.nn.Module):
    """A model of timm with outputs by name."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        features = self.model.forward_features(pixel_values)
        row = self.model.forward_head(features, pre_logits=True)
        if features.ndim == 4:  # maps of a convolutional network are tokens too
            width = self.model.num_features
            last = features.shape[-1] == width and features.shape[1] != width
            features = features.flatten(1, 2) if last else features.flatten(2).transpose(1, 2)
        return {"last_hidden_state": features, "row": row}


def load_timm(
    name: str,
    modality: str,
    *,
    preset: Preset | None,
    pooling: str | None,
    layer: int | None,
    final_norm: bool | None,
    normalize: bool | None,
    prompt: str | None,
    max_length: int | None,
    image_size: int | None,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
) -> Loaded:
    """Loads a model of timm, its weights on the CPU; arguments are those of `load_encoder`.

    The row of the model itself is what goes into its classifier.
    """
    if modality != "image":
        raise ValueError("modality: models of timm encode images, not texts")
    if revision is not None:
        raise ValueError("revision: timm takes it in the name, as in timm:hf-hub:OWNER/NAME@COMMIT")
    timm = need("timm", extra="timm", why=f"name: timm:{name}")
    pooling = check_pooling(pooling, modality, None, f"timm:{name}")
    if layer is not None and pooling == MODEL_POOLING:
        raise ValueError(
            "layer: the model's own row is of its last layer; give a pooling of tokens"
        )
    size = {} if image_size is None else {"img_size": image_size}
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, **size)
    except TypeError as error:
        raise ValueError(f"image_size: {name} takes no other ({error})") from error
    except Exception as error:  # of timm, the hub and the files
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"name: timm:{name} cannot be loaded ({line})") from error
    given = {} if image_size is None else {"input_size": (3, image_size, image_size)}
    data = timm.data.resolve_data_config(given, model=model)
    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    cls = prefix > 0 and getattr(model, "cls_token", None) is not None
    layout = Layout(cls, prefix - int(cls))
    if pooling != MODEL_POOLING:
        check_layout(pooling, layout)
    block, before, norm = None, False, None
    if layer is not None:
        if final_norm:
            norm = named(model, "norm")
            if norm is None:
                raise ValueError(f"final_norm: timm:{name} has no last norm that is known here")
        block, before = keep_layers(model, layer, len(getattr(model, "blocks", ())))
    network = RowNetwork(
        _Tokens(model.to(getattr(torch, dtype)).eval()),
        pooling=pooling,
        own="row",
        layout=layout,
        block=block,
        before=before,
        norm=norm,
        normalize=bool(normalize),
    )
    return Loaded(
        network=network,
        preprocess=TimmPreprocessor(
            timm.data.create_transform(**data, is_training=False),
            0 if data.get("crop_mode") == "squash" else int(max(data["input_size"][1:])),
        ),
        name=f"timm:{name}",
        pooling=pooling,
        normalized=bool(normalize),
        settings={
            "model": name,
            "family": "timm",
            **_files(name),
            "layer": layer,
            "final_norm": bool(final_norm) if layer is not None else None,
            "timm": timm.__version__,
            "image_size": list(data["input_size"][1:]),
            "pixels": {
                key: list(value) if isinstance(value, tuple) else value
                for key, value in data.items()
            },
        },
        image_shape=tuple(int(n) for n in data["input_size"]),
    )


def _files(name: str) -> dict[str, str]:
    """Of a model in a directory, what is in it: it has no version."""
    scheme, _, folder = name.partition(":")
    return {"files": digest_of_model(Path(folder))} if scheme == "local-dir" else {}
