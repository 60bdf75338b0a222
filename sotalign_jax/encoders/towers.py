"""Pretrained encoders: from a name to something that encodes pictures or texts."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32

from sotalign_jax.encoders.backends import (
    WEIGHTS,
    Backend,
    JaxBackend,
    TorchBackend,
    choose_backend,
    local_devices,
)
from sotalign_jax.encoders.base import Description, Encoder, Inputs, Preprocessor
from sotalign_jax.encoders.packaged import PACKAGED, load_efficientnet_lite, packaged_path
from sotalign_jax.encoders.presets import find_preset

__all__ = ["Loaded", "Tower", "load_encoder"]

DTYPES = ("float32", "bfloat16", "float16")
SHORTEST_BUCKET = 16


class Loaded(NamedTuple):
    """A model that was read, and what it needs to know of its items.

    Attributes:
        network: a `RowNetwork`, on the CPU.
        preprocess: of its items.
        name: of the model.
        pooling: as it was settled.
        normalized: likewise.
        settings: whatever else decides the rows.
        image_shape: of the pixels of a picture; None of texts.
        pad: the id of padding.
        left: whether padding is on the left.
        buckets: lengths that texts are padded to.
    """

    network: Any
    preprocess: Preprocessor
    name: str
    pooling: str
    normalized: bool
    settings: Mapping[str, Any]
    image_shape: tuple[int, ...] | None = None
    pad: int = 0
    left: bool = False
    buckets: tuple[int, ...] = ()


def load_encoder(
    name: str,
    modality: str,
    *,
    pooling: str | None = None,
    layer: int | None = None,
    final_norm: bool | None = None,
    normalize: bool | None = None,
    prompt: str | None = None,
    max_length: int | None = None,
    image_size: int | None = None,
    dtype: str = "float32",
    backend: str = "auto",
    batch_size: int = 64,
    devices: int = 0,
    weights: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """Loads an encoder.

    Args:
        name: a preset (`presets.PRESETS`); a model of the hub, or a directory, in the layout of
            transformers or sentence-transformers; ``timm:NAME``, a model of timm;
            ``packaged:NAME``, a model that is a package (`packaged.PACKAGED`); or
            ``module:function``, your own (see `callables`).
        modality: ``"image"`` or ``"text"``: the items, and which tower of a model of two.
        pooling: how tokens become one row (`pooling.IMAGE_POOLINGS`, `pooling.TEXT_POOLINGS`), or
            ``"model"`` for the model's own row; by default the preset's, or what the model's files
            or its architecture say.
        layer: the hidden state to pool: 0 for what goes into the first block, k for what comes out
            of the k-th, negative from the end, -1 for the last block's. By default the last one, as
            the model gives it.
        final_norm: with a layer: whether the model's last norm is applied to it; no by default.
        normalize: whether rows are scaled to length 1.
        prompt: before every text, or with ``{text}`` where the text goes; ``""`` for none.
        max_length: tokens of a text that are kept, prompt and special tokens included; texts are
            cut at their end.
        image_size: pixels, where it is not to be that of the model's image processor; position
            embeddings are interpolated.
        dtype: of weights and activations: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Pooling
            and rows are float32.
        backend: ``"torch"``; ``"torchax"``, which runs the same network jitted by JAX; or
            ``"auto"``, torchax where it is installed, JAX has an accelerator and the model can be
            traced.
        batch_size: items that go through the model at once, with torchax rounded up to a multiple
            of the devices.
        devices: of this process, over which torchax spreads the items; 0 takes all. PyTorch takes
            one.
        weights: with torchax: ``"replicated"``, all on every device; ``"sharded"``, each large one
            cut over the devices, for models that one device cannot hold; or ``"auto"``, sharded
            where they would take more than half of a device's memory.
        revision: of the model on the hub: a branch, a tag or, to have the same one for ever, a
            commit.
        trust_remote_code: whether code that comes with the model may run.

    Returns:
        The encoder; its description says all of the above as it was settled.

    Raises:
        ValueError: an option is unknown, out of range, or not of this encoder, or the model cannot
            be found or read; the message begins with the option.
        ImportError: an extra is missing; the message says which.
    """
    if not name:
        raise ValueError("name: must be a preset, a model or a function, got nothing")
    if modality not in ("image", "text"):
        raise ValueError(f"modality: must be 'image' or 'text', got {modality!r}")
    of_texts = {"prompt": prompt, "max_length": max_length}
    for option, value in of_texts.items() if modality == "image" else ():
        if value is not None:
            raise ValueError(f"{option}: is of texts, and {name} is to encode images")
    if modality == "text" and image_size is not None:
        raise ValueError(f"image_size: is of images, and {name} is to encode texts")
    if dtype not in DTYPES:
        raise ValueError(f"dtype: must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if weights not in WEIGHTS:
        raise ValueError(f"weights: must be one of {', '.join(WEIGHTS)}; got {weights!r}")
    numbers = {
        "batch_size": (batch_size, 1),
        "max_length": (max_length, 1),
        "image_size": (image_size, 1),
        "devices": (devices, 0),
        "layer": (layer, None),
    }
    for option, (value, least) in numbers.items():
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{option}: must be a whole number, got {value!r}")
        if least is not None and value < least:
            raise ValueError(f"{option}: must be at least {least}, got {value}")
    words = {"pooling": pooling, "prompt": prompt, "revision": revision}
    switches = {
        "final_norm": final_norm,
        "normalize": normalize,
        "trust_remote_code": trust_remote_code,
    }
    for options, kind, right in ((words, str, "a string"), (switches, bool, "true or false")):
        for option, value in options.items():
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{option}: must be {right}, got {value!r}")
    if final_norm is not None and layer is None:
        raise ValueError("final_norm: is of a layer, and none is given; the last one has it")
    of_models: dict[str, Any] = {
        "pooling": pooling,
        "layer": layer,
        "final_norm": final_norm,
        "normalize": normalize,
        "image_size": image_size,
        "revision": revision,
        **of_texts,
    }
    packaged = name.removeprefix("packaged:") if name.startswith("packaged:") else None
    if packaged is not None and PACKAGED.get(packaged) != modality:
        known = [f"packaged:{one}" for one, of in PACKAGED.items() if of == modality]
        raise ValueError(f"name: {name} is none of the packaged {modality} encoders: {known[0]}")
    shown = name
    if packaged is not None and modality == "text":
        name, packaged = str(packaged_path(packaged)), None
    preset = find_preset(name, modality)
    own = preset is None and packaged is None and ":" in name and not Path(name).exists()
    if own and not name.startswith("timm:"):
        for option, value in of_models.items():
            if value is not None:
                raise ValueError(f"{option}: is for {name} itself to decide")
        return _load_callable(name, modality)

    chosen = choose_backend(backend)
    if chosen == "torch" and weights == "sharded":
        raise ValueError("weights: PyTorch has them on one device; 'sharded' is of torchax")
    if chosen == "torchax":
        local_devices(devices)
    if own:
        from sotalign_jax.encoders.timm_models import load_timm as load
    else:
        from sotalign_jax.encoders.transformers_models import load_transformers as load
    if packaged is not None:
        normalize = of_models.pop("normalize")
        loaded = load_efficientnet_lite(
            packaged, modality, dtype=dtype, normalize=normalize, options=of_models
        )
    else:
        loaded = load(
            name.removeprefix("timm:") if own else name,
            modality,
            preset=preset,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            **of_models,
        )
    if shown != name:  # where it is installed does not matter
        loaded = loaded._replace(name=shown, settings={**loaded.settings, "model": shown})
    return Tower(
        loaded,
        modality,
        dtype=dtype,
        backend=chosen,
        fall_back=backend == "auto",
        batch_size=batch_size,
        devices=devices,
        weights=weights,
    )


def _load_callable(name: str, modality: str) -> Encoder:
    callables = importlib.import_module("sotalign_jax.encoders.callables")
    return callables.load_callable(name, modality)


class Tower:
    """An `Encoder`: one tower of a pretrained model."""

    def __init__(
        self,
        loaded: Loaded,
        modality: str,
        *,
        dtype: str,
        backend: str,
        fall_back: bool,
        batch_size: int,
        devices: int,
        weights: str,
    ):
        self.preprocess = loaded.preprocess
        self._loaded = loaded
        self._fixed = backend == "torchax"
        if backend == "torchax":
            exact = dtype == "float32"
            jitted = JaxBackend(loaded.network, devices=devices, exact=exact, weights=weights)
            self._batch = -(-batch_size // jitted.rows) * jitted.rows
            self._run: Backend = jitted
            try:
                jitted.trace(self._shapes())
            except Exception as error:  # whatever torchax lacks for this model
                reason = f"torchax cannot trace {loaded.name} ({_first_line(error)})"
                if not fall_back:
                    raise ValueError(f"backend: {reason}; take 'torch'") from error
                warnings.warn(f"{reason}; PyTorch runs it instead", stacklevel=3)
                backend, self._fixed = "torch", False
            else:
                jitted.place()
        if backend == "torch":
            self._batch = batch_size
            self._run = TorchBackend(loaded.network)
        self.description = Description(
            loaded.name,
            modality,
            loaded.pooling,
            loaded.normalized,
            {**loaded.settings, "dtype": dtype, "backend": backend},
        )

    def encode(self, batch: Sequence[Inputs]) -> Float32[np.ndarray, "n dim"]:
        """One row for each item, in their order.

        Args:
            batch: what `preprocess` gave, of any number of items but none.

        Raises:
            ValueError: no items, or items that another preprocessor made.
        """
        return self.submit(batch)()

    def submit(self, batch: Sequence[Inputs]) -> Callable[[], Float32[np.ndarray, "n dim"]]:
        """Starts `encode`: its first rows are being computed when this returns.

        Args:
            batch: as for `encode`.

        Returns:
            What waits for the rows and returns them.

        Raises:
            ValueError: as `encode`.
        """
        if not batch:
            raise ValueError("encode: needs at least one item, got none")
        key = "input_ids" if self._loaded.image_shape is None else "pixel_values"
        for item in batch:
            if key not in item:
                raise ValueError(f"encode: items must have {key}, got {', '.join(item)}")
        # Texts of like length go together, so that little padding is needed.
        order = np.argsort([len(item[key]) for item in batch], kind="stable")
        chosen = [order[n : n + self._batch] for n in range(0, len(order), self._batch)]
        begun = [self._run(self._inputs([batch[i] for i in chosen[0]]))]

        def rows() -> Float32[np.ndarray, "n dim"]:
            out: np.ndarray | None = None
            for number, places in enumerate(chosen):
                # One batch may still be computed while the next is put together, but not more.
                if number + 1 < len(chosen):
                    following = [batch[i] for i in chosen[number + 1]]
                    begun.append(self._run(self._inputs(following)))
                found = self._run.fetch(begun.pop(0))[: len(places)]
                if out is None:
                    out = np.empty((len(batch), found.shape[1]), np.float32)
                out[places] = found
            assert out is not None
            return out

        return rows

    def _inputs(self, items: Sequence[Inputs]) -> dict[str, np.ndarray]:
        """Arrays of a batch: of one of few shapes, where each shape costs a compilation."""
        if self._loaded.image_shape is not None:
            shapes = {item["pixel_values"].shape for item in items}
            if shapes != {self._loaded.image_shape}:
                raise ValueError(
                    f"encode: pictures must be {self._loaded.image_shape}, got {sorted(shapes)}"
                )
            arrays = {"pixel_values": np.stack([item["pixel_values"] for item in items])}
        else:
            arrays = self._padded([item["input_ids"] for item in items])
        if not self._fixed:
            return arrays
        # The first item again, where there are none: a row of padding alone may be NaN.
        fill = np.zeros(self._batch, np.int64)
        fill[: len(items)] = np.arange(len(items))
        return {name: x[fill] for name, x in arrays.items()}

    def _padded(self, texts: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        longest = max(len(ids) for ids in texts)
        if not 0 < min(len(ids) for ids in texts) <= longest <= self._loaded.buckets[-1]:
            raise ValueError(
                f"encode: texts must be of 1 to {self._loaded.buckets[-1]} tokens, got {longest}"
            )
        lengths = self._loaded.buckets
        if len(lengths) > 1 and not self._fixed:
            lengths = (longest,)  # PyTorch compiles nothing for it
        length = min(bucket for bucket in lengths if bucket >= longest)
        ids = np.full((len(texts), length), self._loaded.pad, np.int32)
        mask = np.zeros((len(texts), length), np.int32)
        for row, text in enumerate(texts):
            at = slice(length - len(text), None) if self._loaded.left else slice(len(text))
            ids[row, at], mask[row, at] = text, 1
        return {"input_ids": ids, "attention_mask": mask}

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        if self._loaded.image_shape is not None:
            return {"pixel_values": ((self._batch, *self._loaded.image_shape), np.float32)}
        shape = (self._batch, self._loaded.buckets[0])
        return {name: (shape, np.int32) for name in ("input_ids", "attention_mask")}


def buckets(max_length: int) -> tuple[int, ...]:
    """Lengths that texts are padded to: doubling, up to the longest there is."""
    lengths = []
    length = SHORTEST_BUCKET
    while length < max_length:
        lengths.append(length)
        length *= 2
    return (*lengths, max_length)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
