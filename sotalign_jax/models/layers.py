"""Alignment layers: light maps from an encoder's features to the shared space."""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

__all__ = ["MLP", "LayerConfig", "LayerKind", "Linear", "Star", "make_layer"]

LayerKind = Literal["linear", "mlp", "star"]

LAYER_NORM_EPSILON = 1e-5
STAR_CLAMP = 1e3
DEFAULT_WIDTH_FACTOR = {"mlp": 4, "star": 8}


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """What an alignment layer is made of; `dataclasses.asdict` gives its JSON.

    Attributes:
        kind: ``"linear"``, ``"mlp"`` or ``"star"``.
        layer_norm: LayerNorm with gain and offset over the input features first. The paper's linear
            layer has one; a bare matrix is another model.
        bias: biases in the layer's matrices.
        width_factor: hidden width over input width of ``"mlp"`` (``None``: 4) and of each branch of
            ``"star"`` (``None``: 8); fractions are allowed. ``"linear"`` has no hidden width and
            takes ``None`` only.
        hidden: the hidden width itself, whatever the input's, instead of a factor.

    Raises:
        ValueError: for an unknown kind, a field of the wrong type, or a width that is not positive
            or has no meaning.
    """

    kind: LayerKind = "linear"
    layer_norm: bool = True
    bias: bool = True
    width_factor: int | float | None = None
    hidden: int | None = None

    def __post_init__(self):
        kinds = get_args(LayerKind)
        if self.kind not in kinds:
            raise ValueError(f"kind: unknown layer {self.kind!r}; choose one of {', '.join(kinds)}")
        for name in ("layer_norm", "bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}; it must be true or false")
        if self.hidden is not None:
            if self.kind == "linear" or self.width_factor is not None:
                raise ValueError(
                    f"hidden: got {self.hidden!r}; it is for mlp and star, without a width_factor"
                )
            check_sizes(hidden=self.hidden)
        factor = self.width_factor
        if factor is None:
            return
        if self.kind == "linear":
            raise ValueError(
                f"width_factor: got {factor!r}, but a linear layer has no hidden width; leave None"
            )
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise ValueError(f"width_factor: got {factor!r}; it must be a number or None")
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"width_factor: got {factor!r}; it must be positive and finite")


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for the first size that is not a positive integer, by its name."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
            raise ValueError(f"{name}: got {size!r}; it must be a positive integer")


def _layer_norm(features: int, use: bool, rngs: nnx.Rngs) -> nnx.LayerNorm | None:
    if not use:
        return None
    # The two-pass variance: the fast form cancels badly when the mean is large.
    return nnx.LayerNorm(features, epsilon=LAYER_NORM_EPSILON, use_fast_variance=False, rngs=rngs)


def _dense(d_in: int, d_out: int, bias: bool, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.xavier_uniform()
    return nnx.Linear(d_in, d_out, use_bias=bias, kernel_init=init, rngs=rngs)


class Linear(nnx.Module):
    """``z W + b``, with z the input or its LayerNorm.

    Parameters: ``layer_norm.scale``, ``layer_norm.bias`` (d_in,); ``linear.kernel`` (d_in, d_out),
    Xavier-uniform; ``linear.bias`` (d_out,), zeros.

    Args:
        d_in: input width.
        d_out: output width.
        layer_norm: LayerNorm over the input first.
        bias: with b.
        rngs: source of the initial weights.

    Raises:
        ValueError: when a width is not a positive integer.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        layer_norm: bool = True,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        check_sizes(d_in=d_in, d_out=d_out)
        self.layer_norm = _layer_norm(d_in, layer_norm, rngs)
        self.linear = _dense(d_in, d_out, bias, rngs)

    def __call__(self, features: Float[Array, "*n d_in"]) -> Float[Array, "*n d_out"]:
        """Maps ``(n, d_in)`` float32 features to ``(n, d_out)``."""
        if self.layer_norm is not None:
            features = self.layer_norm(features)
        return self.linear(features)


class MLP(nnx.Module):
    """``GELU(z W1 + b1) W2 + b2``, with z the input or its LayerNorm and the exact (erf) GELU.

    Parameters: ``layer_norm.*``; ``hidden.kernel`` (d_in, hidden), ``hidden.bias``;
    ``output.kernel`` (hidden, d_out), ``output.bias``. Xavier-uniform weights, zero biases.

    Args:
        d_in: input width.
        d_out: output width.
        hidden: hidden width; ``None`` means ``4 * d_in``.
        layer_norm: LayerNorm over the input first.
        bias: with b1 and b2.
        rngs: source of the initial weights.

    Raises:
        ValueError: when a width is not a positive integer.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        hidden: int | None = None,
        layer_norm: bool = True,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        check_sizes(d_in=d_in, d_out=d_out)
        hidden = DEFAULT_WIDTH_FACTOR["mlp"] * d_in if hidden is None else hidden
        check_sizes(hidden=hidden)
        self.layer_norm = _layer_norm(d_in, layer_norm, rngs)
        self.hidden = _dense(d_in, hidden, bias, rngs)
        self.output = _dense(hidden, d_out, bias, rngs)

    def __call__(self, features: Float[Array, "*n d_in"]) -> Float[Array, "*n d_out"]:
        """Maps ``(n, d_in)`` float32 features to ``(n, d_out)``."""
        if self.layer_norm is not None:
            features = self.layer_norm(features)
        return self.output(jax.nn.gelu(self.hidden(features), approximate=False))


class Star(nnx.Module):
    """``(ReLU6(z W1 + b1) * (z W2 + b2)) W3 + b3``, with z the input or its LayerNorm.

    The gated layer of SAIL, with the second branch clamped to [-1000, 1000]. (SAIL clamps the
    first as well, which ReLU6 makes no difference to.)

    Parameters: ``layer_norm.*``; ``gate.kernel`` and ``value.kernel`` (d_in, hidden), ``gate.bias``
    and ``value.bias``; ``output.kernel`` (hidden, d_out), ``output.bias``. Xavier-uniform weights,
    zero biases.

    Args:
        d_in: input width.
        d_out: output width.
        hidden: width of each branch; ``None`` means ``8 * d_in``.
        layer_norm: LayerNorm over the input first.
        bias: with b1, b2 and b3.
        rngs: source of the initial weights.

    Raises:
        ValueError: when a width is not a positive integer.

    References:
        Zhang et al., Assessing and Learning Alignment of Unimodal Vision and Language Models,
        CVPR 2025 (SAIL).
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        hidden: int | None = None,
        layer_norm: bool = True,
        bias: bool = True,
        rngs: nnx.Rngs,
    ):
        check_sizes(d_in=d_in, d_out=d_out)
        hidden = DEFAULT_WIDTH_FACTOR["star"] * d_in if hidden is None else hidden
        check_sizes(hidden=hidden)
        self.layer_norm = _layer_norm(d_in, layer_norm, rngs)
        self.gate = _dense(d_in, hidden, bias, rngs)
        self.value = _dense(d_in, hidden, bias, rngs)
        self.output = _dense(hidden, d_out, bias, rngs)

    def __call__(self, features: Float[Array, "*n d_in"]) -> Float[Array, "*n d_out"]:
        """Maps ``(n, d_in)`` float32 features to ``(n, d_out)``."""
        if self.layer_norm is not None:
            features = self.layer_norm(features)
        value = jnp.clip(self.value(features), -STAR_CLAMP, STAR_CLAMP)
        return self.output(jax.nn.relu6(self.gate(features)) * value)


def make_layer(
    config: LayerConfig, d_in: int, d_out: int, *, rngs: nnx.Rngs
) -> Linear | MLP | Star:
    """The layer that a configuration describes.

    Args:
        config: kind and options.
        d_in: input width.
        d_out: output width.
        rngs: source of the initial weights.

    Returns:
        The layer, a map from ``(n, d_in)`` to ``(n, d_out)`` float32. A hidden width that is not
        given is ``width_factor * d_in``, rounded, at least 1.

    Raises:
        ValueError: when a width is not a positive integer.
    """
    options = {"layer_norm": config.layer_norm, "bias": config.bias, "rngs": rngs}
    if config.kind == "linear":
        return Linear(d_in, d_out, **options)
    hidden, factor = config.hidden, config.width_factor
    if factor is not None:
        hidden = max(1, round(factor * d_in))
    layer = MLP if config.kind == "mlp" else Star
    return layer(d_in, d_out, hidden=hidden, **options)
