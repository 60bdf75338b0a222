"""Alignment heads that SAIL's training code saved, as an `Aligner`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from sotalign_jax.models import Aligner, LayerConfig

__all__ = ["read_sail_heads"]

_SIDES = {"vision": "image", "text": "text"}
# Names in a checkpoint to names of ours, by the layer's kind.
_KINDS = {
    "linear": {"": "linear"},
    "mlp": {"proj.0.": "hidden", "proj.2.": "output"},
    "star": {"f1.": "gate", "f2.": "value", "g.": "output"},
}


def read_sail_heads(path: str | os.PathLike) -> Aligner:
    """Reads heads in the layout of SAIL's checkpoints.

    Each side is a LayerNorm over raw features (nothing is normalised or centred before it) and a
    linear, MLP or star layer; the logit scale is stored as its logarithm. Which features the heads
    were trained on, with which pooling, a checkpoint does not say.

    Args:
        path: ``.pt`` or ``.pth`` (needs PyTorch; only tensors are unpickled), bare or under a key
            ``state_dict``; or the same tensors as ``.safetensors``.

    Returns:
        The aligner; its ``training_prior`` is unknown.

    Raises:
        ValueError: a file that cannot be read, or whose tensors are missing, unknown, of another
            shape, not finite, or of layers that we do not have.
        ImportError: a ``.pt`` file without PyTorch.

    References:
        Zhang et al., Assessing and Learning Alignment of Unimodal Vision and Language Models,
        CVPR 2025 (SAIL).
    """
    # A model wrapped for several devices puts "module." before its names, a whole one "vlhead.".
    tensors = {
        name.removeprefix("module.").removeprefix("vlhead."): value
        for name, value in _read(Path(path)).items()
    }
    if not any(name.startswith("vision_mapping_network.") for name in tensors):
        shown = ", ".join(sorted(tensors)[:4])
        raise ValueError(f"{path}: no vision_mapping_network; not SAIL heads (it has {shown} ...)")
    kind = next(
        (
            kind
            for kind, names in _KINDS.items()
            if all(f"vision_mapping_network.{name}weight" in tensors for name in names)
        ),
        None,
    )
    if kind is None:
        raise ValueError(f"{path}: vision_mapping_network is none of {', '.join(_KINDS)}")
    found = {"log_scale": _scalar(tensors, "logit_scale"), "bias": _scalar(tensors, "logit_bias")}
    for theirs, ours in _SIDES.items():
        norm, mapping = f"{theirs}_layer_norm.", f"{theirs}_mapping_network."
        found[f"{ours}.layer_norm.scale"] = _take(tensors, f"{norm}weight")
        found[f"{ours}.layer_norm.bias"] = _take(tensors, f"{norm}bias")
        for name, our in _KINDS[kind].items():
            found[f"{ours}.{our}.kernel"] = _take(tensors, f"{mapping}{name}weight").T
            found[f"{ours}.{our}.bias"] = _take(tensors, f"{mapping}{name}bias")
    if tensors:
        shown = ", ".join(sorted(tensors)[:4])
        raise ValueError(
            f"{path}: {len(tensors)} tensors that we have no place for: {shown} ...; save the two "
            "layer norms, the two mapping networks and the logit scale and bias alone"
        )
    return _aligner(str(path), kind, found)


def _aligner(path: str, kind: str, found: Mapping[str, np.ndarray]) -> Aligner:
    widths = {side: len(found[f"{side}.layer_norm.scale"]) for side in _SIDES.values()}
    last = "linear" if kind == "linear" else "output"
    layer = LayerConfig(kind=kind, **_width(path, kind, widths, found))  # pyright: ignore[reportArgumentType]
    dim = found[f"image.{last}.kernel"].shape[-1]
    aligner = Aligner(
        widths["image"], widths["text"], dim, layer=layer, normalize=False, rngs=nnx.Rngs(0)
    )
    graph, params, rest = nnx.split(aligner, nnx.Param, ...)
    read = []
    for place, variable in nnx.to_flat_state(params):
        name = ".".join(map(str, place))
        value = found[name].reshape(()) if variable.shape == () else found[name]
        if value.shape != variable.shape:
            raise ValueError(
                f"{path}: {name} has shape {value.shape}; {variable.shape} would fit the others"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"{path}: {name} is not finite")
        read.append((place, variable.replace(jnp.asarray(value))))
    return nnx.merge(graph, nnx.from_flat_state(read), rest)


def _width(
    path: str, kind: str, widths: Mapping[str, int], found: Mapping[str, np.ndarray]
) -> dict[str, float | int]:
    """The field of a layer that gives both sides their hidden width.

    That is a multiple of the input's in SAIL's star layer, and the same number on both sides in
    MLPs whose hidden width was given.
    """
    if kind == "linear":
        return {}
    first = "hidden" if kind == "mlp" else "gate"
    hidden = {side: found[f"{side}.{first}.kernel"].shape[-1] for side in widths}
    factors = {hidden[side] / widths[side] for side in widths}
    if len(factors) == 1:
        return {"width_factor": factors.pop()}
    if len(set(hidden.values())) == 1:
        return {"hidden": hidden.popitem()[1]}
    raise ValueError(
        f"{path}: hidden widths {hidden} of inputs {widths} are neither the same number nor the "
        "same multiple; an aligner has one width or width_factor for both sides"
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return safetensors.numpy.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file ({error})") from error
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path}: reading a .pt file needs PyTorch (the extra 'encoders'); or convert it to "
            ".safetensors"
        ) from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        raise ValueError(f"{path}: not a checkpoint of tensors ({error})") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(torch.is_tensor(v) for v in state.values()):
        raise ValueError(f"{path}: not a dictionary of tensors, nor one under 'state_dict'")
    return {name: value.float().numpy() for name, value in state.items()}


def _take(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in tensors:
        raise ValueError(f"{name}: missing from the checkpoint")
    return np.asarray(tensors.pop(name), np.float32)


def _scalar(tensors: dict[str, np.ndarray], name: str) -> np.ndarray:
    value = _take(tensors, name)
    if value.size != 1:
        raise ValueError(f"{name}: has shape {value.shape}; must be one number")
    return value.reshape(())
