"""What runs a network: PyTorch itself, or JAX through torchax, jitted and spread over devices."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from sotalign_jax.encoders.extras import has, need
from sotalign_jax.features.store import BFLOAT16

__all__ = [
    "BACKENDS",
    "WEIGHTS",
    "Backend",
    "JaxBackend",
    "TorchBackend",
    "choose_backend",
    "local_devices",
]

BACKENDS = ("auto", "torch", "torchax")
WEIGHTS = ("auto", "replicated", "sharded")
AXIS = "rows"
# Weights of fewer values are whole on every device.
SMALL = 2**14
Arrays = Mapping[str, np.ndarray]


def choose_backend(backend: str) -> str:
    """``"torch"`` or ``"torchax"``, which ``"auto"`` is where it is installed and JAX has an
    accelerator. On CPUs PyTorch is nearly as fast for products of matrices and faster for
    convolutions, and it may have an accelerator that JAX was installed without.

    Raises:
        ValueError: an unknown backend.
        ImportError: torch or torchax is missing, or their versions do not fit together.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: must be one of {', '.join(BACKENDS)}; got {backend!r}")
    need("torch", extra="encoders", why="backend")
    if backend == "auto":
        if not _has_accelerator():
            return "torch"
        with _no_traces_of_import():
            return "torchax" if has("torchax") else "torch"
    if backend == "torchax":
        with _no_traces_of_import():
            need("torchax", extra="torchax", why="backend='torchax'")
    return backend


def _has_accelerator() -> bool:
    return any(device.platform != "cpu" for device in jax.local_devices())


def local_devices(count: int) -> list[Any]:
    """The first devices of this process, all for 0.

    Raises:
        ValueError: there are not so many.
    """
    local = jax.local_devices()
    if count > len(local):
        raise ValueError(f"devices: {count} asked, but there are {len(local)}; 0 takes all of them")
    return local[: count or len(local)]


class TorchBackend:
    """Runs a network with PyTorch, on one device: a GPU where there is one."""

    rows = 1  # any number of rows will do

    def __init__(self, network: Any):
        import torch  # pyright: ignore[reportMissingImports]

        self._torch = torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network = network.to(self.device).eval()
        for module in network.modules():
            if getattr(module, "_supports_sdpa", False):
                module.set_attn_implementation("sdpa")  # less memory: no matrix of weights

    def __call__(self, inputs: Arrays) -> Any:
        """Rows ``(n, d)``, float32, on the device and maybe still being computed."""
        torch = self._torch
        tensors = {
            name: torch.from_numpy(np.array(x, np.int64 if x.dtype.kind == "i" else np.float32))
            for name, x in inputs.items()
        }
        # TensorFloat-32, the default of convolutions, has the precision of float16.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            return self._network(**{name: x.to(self.device) for name, x in tensors.items()})

    def fetch(self, rows: Any) -> np.ndarray:
        """Rows that a call gave, once they are computed."""
        return rows.cpu().numpy()


class JaxBackend:
    """Runs a network with JAX: one compiled program for each shape of its inputs.

    Weights are arguments of the program, not constants in it; rows of a batch are spread over the
    devices. Where weights are sharded, each device keeps a part of each large one, and has the
    whole of it only while it is used; the rows are the same.

    Args:
        network: a module of PyTorch, on the CPU.
        devices: how many of this process's devices; 0 takes all.
        exact: whether products of matrices are of full float32.
        weights: ``"replicated"``: every device has all; ``"sharded"``; or ``"auto"``, sharded
            where they would take more than half of a device's memory.

    Raises:
        ValueError: fewer devices than asked.
    """

    def __init__(
        self, network: Any, *, devices: int = 0, exact: bool = True, weights: str = "auto"
    ):
        import torch  # pyright: ignore[reportMissingImports]

        with _no_traces_of_import():
            import torchax.tensor  # pyright: ignore[reportMissingImports]

        local = local_devices(devices)
        mesh = jax.make_mesh((len(local),), (AXIS,), (AxisType.Auto,), devices=local)
        self._by_row = NamedSharding(mesh, PartitionSpec(AXIS))
        self.rows = len(local)
        self._exact = exact
        self._torch = torch
        # An environment of our own: the default one is the user's.
        environment = torchax.tensor.Environment()
        self._network = network.eval().requires_grad_(False)
        everywhere = NamedSharding(mesh, PartitionSpec())
        once = {id(tensor): tensor for _, tensor in self._tensors()}.values()
        size = sum(tensor.numel() * tensor.element_size() for tensor in once)
        sharded = weights == "sharded" or (weights == "auto" and _too_much(size, local[0]))
        self.weights = "sharded" if sharded else "replicated"
        self._shardings = {
            name: NamedSharding(
                mesh, _spec(tensor.shape, len(local)) if sharded else everywhere.spec
            )
            for name, tensor in self._tensors()
        }
        self._state: dict[str, jax.Array] = {}

        def run(state, inputs):
            # Said of all at the start, done by the compiler for each when it is needed.
            state = jax.lax.with_sharding_constraint(state, everywhere)
            state, inputs = environment.j2t_iso((state, inputs))
            with environment, torch.no_grad():
                rows = torch.func.functional_call(network, state, (), inputs, tie_weights=False)
            return environment.t2j_iso(rows)

        self._run = jax.jit(run, out_shardings=self._by_row)

    def trace(self, inputs: Mapping[str, tuple[tuple[int, ...], DTypeLike]]) -> None:
        """Traces the program for inputs of some shapes, to find out early that it cannot be."""
        abstract = {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=self._by_row)
            for name, (shape, dtype) in inputs.items()
        }
        state = {
            name: jax.ShapeDtypeStruct(x.shape, _dtype(x), sharding=self._shardings[name])
            for name, x in self._tensors()
        }
        with self._settings():
            self._run.trace(state, abstract)

    def place(self) -> None:
        """Moves the weights to the devices; the network itself has none afterwards."""
        placed: dict[int, jax.Array] = {}
        for name, tensor in self._tensors():
            if id(tensor) not in placed:
                placed[id(tensor)] = jax.device_put(_to_numpy(tensor), self._shardings[name])
            self._state[name] = placed[id(tensor)]
        self._network.to("meta")

    def _tensors(self) -> list[tuple[str, Any]]:
        """All weights by name; one that layers share has several."""
        named = (self._network.named_parameters, self._network.named_buffers)
        return [found for of in named for found in of(remove_duplicate=False)]

    def __call__(self, inputs: Arrays) -> jax.Array:
        """Rows ``(n, d)``, float32, maybe still being computed; ``n`` a multiple of `rows`."""
        placed = {
            name: jax.device_put(x.astype(np.int32) if x.dtype.kind == "i" else x, self._by_row)
            for name, x in inputs.items()
        }
        with self._settings():
            return self._run(self._state, placed)

    def fetch(self, rows: jax.Array) -> np.ndarray:
        """Rows that a call gave, once they are computed."""
        return np.asarray(rows)

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        """JAX as torchax needs it, whatever the caller has set."""
        fast = self._torch.backends.mha.get_fastpath_enabled()
        self._torch.backends.mha.set_fastpath_enabled(False)  # torchax has no such kernels
        try:
            with (
                _no_caches(),
                jax.numpy_rank_promotion("allow"),
                jax.numpy_dtype_promotion("standard"),
                jax.default_matmul_precision("float32" if self._exact else "default"),
                warnings.catch_warnings(),
            ):
                # PyTorch's integers have 64 bits; ids of tokens fit into 32.
                warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
                yield
        finally:
            self._torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _no_caches() -> Iterator[None]:
    """Keeps transformers from caching tensors of a trace, which are of no use after it.

    Its caches stand back where it believes that PyTorch is compiling.
    """
    module: Any = sys.modules.get("transformers.pytorch_utils")
    if module is None:
        yield
        return
    asked = module.is_torchdynamo_compiling
    module.is_torchdynamo_compiling = lambda: True
    try:
        yield
    finally:
        module.is_torchdynamo_compiling = asked


def _too_much(size: int, device: Any) -> bool:
    """Whether weights of so many bytes leave a device too little memory for anything else."""
    known = device.memory_stats() or {}  # None on CPUs
    return size > 0.5 * known.get("bytes_limit", math.inf)


def _spec(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """Which axis is cut: the longest of those that can be; none of what is small."""
    axes = [axis for axis, length in enumerate(shape) if length % devices == 0]
    if devices == 1 or math.prod(shape) < SMALL or not axes:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*(AXIS if axis == longest else None for axis in range(len(shape))))


def _dtype(tensor: Any) -> np.dtype:
    return _to_numpy(tensor[:0] if tensor.ndim else tensor).dtype


def _to_numpy(tensor: Any) -> np.ndarray:
    """A tensor's values, in its own type."""
    import torch  # pyright: ignore[reportMissingImports]

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BFLOAT16)
    if tensor.dtype == torch.int64:
        return tensor.numpy().astype(np.int32)
    return tensor.numpy()


@contextlib.contextmanager
def _no_traces_of_import() -> Iterator[None]:
    """Importing torchax sets an option of torch and a variable of the environment: not here."""
    import torch  # pyright: ignore[reportMissingImports]

    fast = torch.backends.mha.get_fastpath_enabled()
    variable = "ENABLE_RUNTIME_UPTIME_TELEMETRY"
    before = os.environ.get(variable)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        if before is None:
            os.environ.pop(variable, None)


Backend = TorchBackend | JaxBackend
