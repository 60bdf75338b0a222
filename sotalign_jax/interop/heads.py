"""An aligner as a list of plain steps: a folder that PyTorch reads with a few lines."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

import sotalign_jax
from sotalign_jax.files import new_directory
from sotalign_jax.fitted import Csa, FittedAligner
from sotalign_jax.models import Aligner
from sotalign_jax.models.layers import LAYER_NORM_EPSILON, STAR_CLAMP, Linear, Star

__all__ = ["LOADER", "export_heads", "head_steps"]

FORMAT = "sotalign.heads"
FORMAT_VERSION = 1
CONFIG = "config.json"
TENSORS = "model.safetensors"

# The README shows it, cards repeat it, and a test runs it. It must read every step there is.
LOADER = """\
import json, pathlib, torch
import torch.nn.functional as F
from safetensors.torch import load_file

OPS = {
    "unit": lambda x: F.normalize(x, dim=-1),
    "shift": lambda x, a: x + a,
    "scale": lambda x, a: x * a,
    "layer_norm": lambda x, a, b: F.layer_norm(x, x.shape[-1:], a, b),
    "linear": F.linear,
    "gelu": F.gelu,
    "gated": lambda x, a, b, c, d: F.relu6(F.linear(x, a, b)) * F.linear(x, c, d).clamp(-1e3, 1e3),
}


class Head(torch.nn.Module):
    def __init__(self, folder, side):  # side: "image" or "text"
        super().__init__()
        self.steps = json.loads(pathlib.Path(folder, "config.json").read_bytes())[side]["steps"]
        tensors = load_file(f"{folder}/model.safetensors").items()
        self.tensors = torch.nn.ParameterDict({k: v for k, v in tensors if k.startswith(side)})

    def forward(self, x):
        x = x.float()  # features are mostly stored in half precision
        for op, *names in self.steps:
            x = OPS[op](x, *(self.tensors[name] for name in names))
        return x
"""

# torch's default of layer_norm and the number in the loader.
assert (LAYER_NORM_EPSILON, STAR_CLAMP) == (1e-5, 1e3)

Step = tuple[str, ...]


def head_steps(
    aligner: Aligner | FittedAligner, side: str
) -> tuple[list[Step], dict[str, np.ndarray]]:
    """One side of an aligner, from raw features to embeddings, as steps.

    A step is an operation and the tensors it reads: ``unit`` (length 1 of each row; zeros stay),
    ``shift`` (add), ``scale`` (multiply), ``layer_norm`` (gain, offset; epsilon 1e-5), ``linear``
    (weight ``(out, in)``, bias), ``gelu`` (erf), ``gated`` (``relu6(a x + b) * clip(c x + d)``, of
    weights and biases a, b, c, d, clipped at 1,000).

    Args:
        aligner: of alignment layers (a teacher is one), or CSA.
        side: ``"image"`` or ``"text"``.

    Returns:
        The steps, and the tensors by name, float32.

    Raises:
        ValueError: an aligner that is no chain of such steps.
    """
    chain = _Chain(side)
    if isinstance(aligner, Aligner):
        _layers(chain, aligner)
    elif isinstance(aligner, Csa):
        _csa(chain, aligner)
    else:
        raise ValueError(
            f"aligner: {aligner.kind} is no chain of layers; alignment layers, teachers and csa are"
        )
    return chain.steps, chain.tensors


def export_heads(
    aligner: Aligner | FittedAligner,
    directory: str | os.PathLike,
    *,
    card: str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write the folder that `LOADER` reads: ``config.json``, ``model.safetensors``, a card.

    Args:
        aligner: as in `head_steps`.
        directory: where to; it must not exist.
        card: text of ``README.md``; None writes none.
        metadata: anything of your own that JSON can hold, kept in ``config.json``.

    Returns:
        The directory.

    Raises:
        ValueError: as `head_steps`; or the directory exists.
    """
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "sotalign_jax": sotalign_jax.__version__,
        "dim": aligner.dim,
    }
    tensors: dict[str, np.ndarray] = {}
    for side in ("image", "text"):
        steps, own = head_steps(aligner, side)
        width = aligner.image_dim if side == "image" else aligner.text_dim
        config[side] = {"dim": width, "steps": [list(step) for step in steps]}
        tensors |= own
    if isinstance(aligner, Aligner):
        config["logit_scale"] = float(aligner.scale)
        config["logit_bias"] = float(aligner.bias[...])
        config["training_prior"] = aligner.training_prior
    config["metadata"] = dict(metadata or {})
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with new_directory(directory) as partial:
        (partial / CONFIG).write_text(text, encoding="utf-8")
        safetensors.numpy.save_file(tensors, partial / TENSORS)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")
    return Path(directory)


class _Chain:
    """Steps of one side so far; tensors are named after the side and the number of their step."""

    def __init__(self, side: str):
        self.side = side
        self.steps: list[Step] = []
        self.tensors: dict[str, np.ndarray] = {}

    def add(self, op: str, **values) -> None:
        names = []
        for name, value in values.items():
            names.append(f"{self.side}_{len(self.steps)}_{name}")
            self.tensors[names[-1]] = np.ascontiguousarray(value, np.float32)
        self.steps.append((op, *names))

    def linear(self, dense) -> None:
        """A dense layer of ours, whose kernel is (in, out)."""
        values = {"weight": np.asarray(dense.kernel[...]).T}
        if dense.bias is not None:
            values["bias"] = dense.bias[...]
        self.add("linear", **values)


def _layers(chain: _Chain, aligner: Aligner) -> None:
    layer = getattr(aligner, chain.side)
    if aligner.normalize:
        chain.add("unit")
    if (columns := aligner.columns(chain.side)) is not None:
        chain.add("shift", mean=-np.asarray(columns.mean))
        chain.add("scale", factor=1 / np.asarray(columns.scale))
        chain.add("unit")
    mean = np.asarray(getattr(aligner, f"{chain.side}_mean")[...])
    if mean.any():
        chain.add("shift", mean=-mean)
    if layer.layer_norm is not None:
        chain.add("layer_norm", gain=layer.layer_norm.scale[...], offset=layer.layer_norm.bias[...])
    if isinstance(layer, Linear):
        chain.linear(layer.linear)
    elif isinstance(layer, Star):
        values = {}
        for name in ("gate", "value"):
            dense = getattr(layer, name)
            kernel = np.asarray(dense.kernel[...])
            values[f"{name}_weight"] = kernel.T
            empty = np.zeros(kernel.shape[1], np.float32)
            values[f"{name}_bias"] = empty if dense.bias is None else dense.bias[...]
        chain.add("gated", **values)
        chain.linear(layer.output)
    else:
        chain.linear(layer.hidden)
        chain.add("gelu")
        chain.linear(layer.output)
    chain.add("unit")


def _csa(chain: _Chain, aligner: Csa) -> None:
    if aligner.options.normalize:
        chain.add("unit")
    chain.add("shift", mean=-np.asarray(getattr(aligner, f"{chain.side}_mean")))
    chain.add("linear", weight=np.asarray(getattr(aligner, f"{chain.side}_weight")).T)
    chain.add("unit")
    if not aligner.unit:
        chain.add("scale", factor=np.sqrt(np.asarray(aligner.correlations)))
