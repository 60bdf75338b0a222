"""Networks in PyTorch that give one row for each item; what runs them is in `backends`.

Imports torch: of this package only what loads a model imports it, when it does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from sotalign_jax.encoders.pooling import MODEL_POOLING, Layout, pool, unit_length

__all__ = ["RowNetwork", "check_layer", "fix_positions", "keep_layers", "named"]


class RowNetwork(torch.nn.Module):
    """A model, and how its tokens become a row.

    Args:
        model: of transformers.
        pooling: of its tokens, or ``"model"``.
        own: what its output calls the model's own row.
        layout: of the tokens of images; None for texts.
        block: module whose output is the hidden state to pool, or, with ``before``, its input;
            None for the model's last one.
        before: takes the input of ``block``.
        norm: applied to that.
        normalize: whether rows are scaled to length 1.
        masked: whether the model is told what padding is.
        options: further arguments of the model.
        call: method of the model that gives its output.
        skip: how many tokens at the start of each text are not pooled.
        stages: what rows go through before ``normalize``.
        window: of a decoder that was made to see both directions: how near a token must be to be
            seen in the layers that do not see the whole text. Its masks are then made here, as
            transformers makes them by functions of single tokens, which torchax cannot trace.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        pooling: str,
        own: str = "pooler_output",
        layout: Layout | None = None,
        block: torch.nn.Module | None = None,
        before: bool = False,
        norm: torch.nn.Module | None = None,
        normalize: bool = False,
        masked: bool = True,
        options: Mapping[str, Any] | None = None,
        call: str = "forward",
        skip: int = 0,
        stages: torch.nn.Module | None = None,
        window: int | None = None,
    ):
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.own = own
        self.layout = layout
        # In a tuple, so that its parameters are not counted twice.
        self.norm = (norm,)
        self.normalize = normalize
        self.masked = masked
        self.options = dict(options or {})
        self.call = call
        self.skip = skip
        self.stages = stages
        self.window = window
        self.captured: Any = None
        self.captures = block is not None
        if block is not None and before:
            block.register_forward_pre_hook(self._capture_input, with_kwargs=True)
        elif block is not None:
            block.register_forward_hook(self._capture_output)

    def _capture_input(self, module, args, kwargs):
        self.captured = args[0] if args else kwargs["hidden_states"]

    def _capture_output(self, module, args, output):
        self.captured = output[0] if isinstance(output, tuple) else output

    def forward(self, **inputs):
        mask = inputs.get("attention_mask")
        if not self.masked:
            inputs = {name: x for name, x in inputs.items() if name != "attention_mask"}
        if "pixel_values" in inputs:
            dtype = next(self.model.parameters()).dtype
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        if self.window is not None:
            dtype = next(self.model.parameters()).dtype
            inputs["attention_mask"] = _both_ways(inputs["attention_mask"], self.window, dtype)
        rows = self._rows(inputs, mask).to(torch.float32)
        if self.stages is not None:
            rows = self.stages(rows)
        return unit_length(rows) if self.normalize else rows

    def _rows(self, inputs, mask):
        # By a call of the model, where that is it, so that its own hooks run.
        model = self.model if self.call == "forward" else getattr(self.model, self.call)
        output = model(**inputs, **self._options(inputs))
        if self.pooling == MODEL_POOLING:
            own = output[self.own] if isinstance(output, Mapping) else getattr(output, self.own)
            # Convolutional networks average to maps of one pixel.
            return own.flatten(1) if own.ndim == 4 and own.shape[2:] == (1, 1) else own
        if self.captures:
            hidden, self.captured = self.captured, None  # a trace must not keep it
        else:
            hidden = output["last_hidden_state"]
        if self.norm[0] is not None:
            hidden = self.norm[0](hidden)
        if self.layout is not None:
            if hidden.ndim == 4:  # features, height, width
                hidden = hidden.flatten(2).transpose(1, 2)
            return pool(hidden, self.pooling, layout=self.layout)
        if self.skip:
            mask = (mask > 0) & (mask.cumsum(1) > self.skip)
        return pool(hidden, self.pooling, mask=mask)

    def _options(self, inputs) -> dict[str, Any]:
        options = dict(self.options)
        if "noise" in options:
            # Masked autoencoders order patches by noise: this keeps them, and their order.
            pixels = inputs["pixel_values"]
            noise = torch.arange(options["noise"], dtype=torch.float32, device=pixels.device)
            options["noise"] = noise[None, :].expand(pixels.shape[0], -1)
        return options


def _both_ways(mask, window: int, dtype) -> dict[str, Any]:
    """What to add to the scores of attention, for each kind of layer."""
    at = torch.arange(mask.shape[1], device=mask.device)
    seen = (mask > 0)[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    near = seen & ((at[:, None] - at[None, :]).abs() < window)
    return {
        kind: torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
        for kind, sees in (("full_attention", seen), ("sliding_attention", near))
    }


def named(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """The module of a name that is nearest to the root."""
    found = [
        (path.count("."), m) for path, m in model.named_modules() if path.split(".")[-1] == name
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def check_layer(layer: int, count: int) -> None:
    """Raises ValueError where a model of so many blocks has no such layer."""
    if not -count - 1 <= layer <= count:
        raise ValueError(
            f"layer: the model has {count} blocks, so layers {-count - 1} to {count}; got {layer}"
        )


def keep_layers(model: torch.nn.Module, layer: int, count: int) -> tuple[torch.nn.Module, bool]:
    """Cuts off the blocks that a layer does not need.

    Args:
        model: changed in place.
        layer: 0 for what goes into the first block, k for what comes out of the k-th; negative
            from the end, -1 for the last.
        count: of blocks, as the configuration has it.

    Returns:
        The block to watch, and whether its input is wanted instead of its output.

    Raises:
        ValueError: no such layer, or the model's blocks were not found.
    """
    check_layer(layer, count)
    layer = layer + count + 1 if layer < 0 else layer
    stacks = [
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential)
        and len(module) == count
        and len({type(block) for block in module}) == 1
        and any(True for _ in module.parameters())
        and "norm" not in type(module[0]).__name__.lower()
    ]
    if len(stacks) != 1:
        raise ValueError(
            f"layer: {len(stacks)} stacks of {count} blocks found in {type(model).__name__}, where "
            f"one was expected; leave layer out"
        )
    (blocks,) = stacks
    del blocks[max(layer, 1) :]
    return (blocks[0], True) if layer == 0 else (blocks[layer - 1], False)


def fix_positions(network: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Interpolates position embeddings once, by running inputs, for all inputs of their size.

    Afterwards a forward pass reads them as buffers, ``fixed_positions``: bicubic interpolation is
    what libraries agree on least.

    Returns:
        The rows of the inputs.
    """
    for module in network.modules():
        if callable(getattr(type(module), "interpolate_pos_encoding", None)):
            _fix(module, "interpolate_pos_encoding")
        if type(module).__name__.endswith("RelativePositionBias"):  # BEiT interpolates this
            _fix(module, "forward")
    with torch.no_grad():
        return network(**inputs)


def _fix(module: Any, method: str) -> None:
    original = getattr(module, method)

    def record(*args, **kwargs):
        positions = original(*args, **kwargs)
        module.register_buffer("fixed_positions", positions.detach().clone(), persistent=False)
        setattr(module, method, lambda *args, **kwargs: module.fixed_positions)
        return positions

    setattr(module, method, record)
