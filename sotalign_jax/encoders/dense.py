"""Layers that rows go through after they were pooled, as models of sentence-transformers have.

Imports torch: of this package only what loads a model imports it, when it does.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from sotalign_jax.encoders.pooling import unit_length
from sotalign_jax.encoders.sentence import DenseFacts

__all__ = ["Dense", "UnitLength", "load_stages"]


class Dense(torch.nn.Module):
    """``activation(W x + b)``, and with a residual the input, or a projection of it, added."""

    def __init__(self, facts: DenseFacts, activation: torch.nn.Module):
        super().__init__()
        self.linear = torch.nn.Linear(facts.inputs, facts.outputs, bias=facts.bias)
        self.activation = activation
        self.adds = facts.residual
        if facts.residual and facts.inputs != facts.outputs:
            self.residual = torch.nn.Linear(facts.inputs, facts.outputs, bias=False)

    def forward(self, rows):
        out = self.activation(self.linear(rows))
        if self.adds:
            out = out + (self.residual(rows) if hasattr(self, "residual") else rows)
        return out


class UnitLength(torch.nn.Module):
    """Rows scaled to length 1."""

    def forward(self, rows):
        return unit_length(rows)


def load_stages(
    stages: Sequence[DenseFacts | None], width: int | None, name: str
) -> torch.nn.Sequential:
    """The layers, with their weights in float32 as rows are.

    Args:
        stages: as `SentenceFacts.stages` has them.
        width: dimension of the rows that go in; None where it is not known.
        name: of the model, for messages.

    Raises:
        ValueError: weights that cannot be read or are of another shape, layers that do not follow
            each other, or an activation that is none of PyTorch's.
    """
    for facts in filter(None, stages):
        if width not in (None, facts.inputs):
            raise ValueError(
                f"name: {facts.weights} takes rows of {facts.inputs} features, and gets {width}"
            )
        width = facts.outputs
    return torch.nn.Sequential(*(_load(s, name) if s else UnitLength() for s in stages))


def _load(facts: DenseFacts, name: str) -> Dense:
    layer = Dense(facts, _activation(facts.activation, name))
    try:
        layer.load_state_dict(_read(facts.weights))
    except Exception as error:  # of files that were cut, and of names and shapes
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ValueError(
            f"name: {facts.weights} has no weights of {facts.inputs} to {facts.outputs} features "
            f"({lines[-1] if lines else type(error).__name__})"
        ) from error
    return layer.to(torch.float32)


def _read(path: str) -> dict[str, torch.Tensor]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file  # pyright: ignore[reportMissingImports]

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _activation(path: str, name: str) -> torch.nn.Module:
    module, _, attribute = path.rpartition(".")
    found: Any = None
    # Nothing else is imported: a configuration must not choose what code runs.
    if module == "torch.nn" or module.startswith("torch.nn.modules."):
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            found = None
    if not (isinstance(found, type) and issubclass(found, torch.nn.Module)):
        raise ValueError(
            f"name: {name} has a layer with the activation {path!r}, which is not one of torch.nn "
            f"(give another pooling to take its transformer alone)"
        )
    try:
        return found()
    except TypeError:
        raise ValueError(
            f"name: {name} has a layer with the activation {path!r}, which needs arguments "
            f"(give another pooling to take its transformer alone)"
        ) from None
