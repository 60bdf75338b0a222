"""The programs of a run, from a configuration file: compiled without its data where none is had."""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sotalign_jax.config import Config, ConfigError, explain, validate
from sotalign_jax.features import FeatureTable, Pairs, Splits
from sotalign_jax.features.batches import Batch, NeighbourRows
from sotalign_jax.losses import klot
from sotalign_jax.numerics import Columns, MatmulPrecision
from sotalign_jax.objectives.base import Reads, RowPotentials
from sotalign_jax.teachers import LinearTeacher
from sotalign_jax.training.build import Inputs, build, fits, raw_tables
from sotalign_jax.training.data import fit_teacher, load_splits
from sotalign_jax.training.devices import AXIS, padded
from sotalign_jax.training.neighbours import with_neighbours
from sotalign_jax.training.step import Setup, prepare, run_resident, run_streamed

__all__ = [
    "check_devices",
    "compile_programs",
    "compiled_klot",
    "inputs_or_shapes",
    "memory_of",
    "read_config",
    "whole_numbers",
]


Memory = Literal["dense", "streamed", "auto"]


def read_config(path: str) -> Config:
    """The configuration of a file, as the command line of ``sotalign`` would read it.

    Args:
        path: ``FILE.py``, or ``FILE.py:arg`` for ``get_config("arg")``.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: no such file, no ``get_config`` in it, or one that fails or cannot be run.
    """
    name, _, arg = path.partition(":")
    file = pathlib.Path(name)
    spec = importlib.util.spec_from_file_location("sotalign_config", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"config: there is no config file {name}; give FILE.py or FILE.py:arg")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(arg) if arg else module.get_config()
    except Exception as error:  # a config file is a program: anything may come out of it
        raise ConfigError(f"config: {name}: {explain(error, [])}") from error
    return validate(config)


def whole_numbers(name: str, text: str) -> list[int]:
    """``"1,2,4"`` as numbers.

    Raises:
        ValueError: naming ``name``, where they are not positive whole numbers.
    """
    parts = text.split(",")
    if not all(part.isascii() and part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{name}: must be positive whole numbers, as in 1,2,4, got {text!r}")
    return [int(part) for part in parts]


def inputs_or_shapes(config: Config, image_dim: int, text_dim: int) -> Inputs:
    """The rows and the teacher of a run; of one that reads files, their shapes alone.

    Args:
        config: a validated configuration.
        image_dim: columns of the image features, where they would come from files.
        text_dim: columns of the text features, likewise.

    Returns:
        The inputs. Without data, all rows are one and the same, which takes no memory, and so are
        the entries of the teacher.

    Raises:
        ValueError: data that cannot be loaded, or a number of unpaired rows that is not known.
    """
    if config.data.name != "files":
        splits = load_splits(config)
        return Inputs(splits, fit_teacher(config, splits))
    for name, dim in (("image_dim", image_dim), ("text_dim", text_dim)):
        if dim < 1:
            raise ValueError(f"{name}: must be at least 1, got {dim}")
    if not config.data.n_unpaired:
        raise ConfigError(
            "config.data.n_unpaired: 0 takes all rows of the files, which are not read here; give "
            "the number"
        )
    dim = config.teacher.dim or min(image_dim, text_dim, max(config.data.n_pairs - 1, 1))

    def table(rows: int, columns: int) -> FeatureTable:
        return FeatureTable.from_array(np.broadcast_to(np.float32(1), (rows, columns)))

    pairs, unpaired = config.data.n_pairs, config.data.n_unpaired
    splits = Splits(
        Pairs(table(pairs, image_dim), table(pairs, text_dim), np.arange(pairs)),
        table(unpaired, image_dim),
        table(unpaired, text_dim),
    )

    def columns(side: str, width: int) -> Columns | None:
        ones = jnp.ones(width, jnp.float32)
        return Columns(ones, ones) if config.teacher.standardize[side] else None

    teacher = LinearTeacher(
        image_weight=jnp.ones((image_dim, dim), jnp.float32),
        text_weight=jnp.ones((text_dim, dim), jnp.float32),
        image_mean=jnp.ones(image_dim, jnp.float32),
        text_mean=jnp.ones(text_dim, jnp.float32),
        correlations=jnp.ones(dim, jnp.float32),
        image_columns=columns("image", image_dim),
        text_columns=columns("text", text_dim),
    )
    return Inputs(splits, teacher)


def compile_programs(config: Config, inputs: Inputs) -> tuple[Setup, dict[str, Any]]:
    """The programs that a run would execute, compiled for ``config.mesh.devices`` devices.

    Args:
        config: a validated configuration.
        inputs: its rows and teacher; only their shapes matter.

    Returns:
        The setup of the run; and the compiled programs by name: ``"step"``, of a dispatch of
        ``log_every`` steps or of one step whose rows come from the host, and, in the first case,
        ``"prepare"``, which preprocesses all rows once.

    Raises:
        ConfigError: more devices asked than there are, or no steps.
    """
    if not config.steps:
        raise ConfigError("config.steps: 0 trains nothing, and there is no step to compile")
    setup, state, rest = build(config, *inputs)
    tables = _tables(inputs.splits, setup.loss.reads)
    key = jax.eval_shape(lambda: jax.random.key(0))
    potentials = [
        leaf if leaf is None else jnp.zeros(padded(len(leaf), setup.mesh))
        for leaf in state.potentials
    ]
    state, rest, teacher, key = _shapes((state, rest, inputs.teacher, key), setup.mesh)
    spread = _shapes(potentials, setup.mesh, PartitionSpec(AXIS))
    state = state._replace(potentials=RowPotentials(*spread))
    if not fits(config, tables, inputs.teacher, setup.mesh):
        raw = _rows(tables, [stream.size for stream in setup.streams], setup.mesh)
        image = setup.streams[1]
        if not image.whole:
            rows = jax.ShapeDtypeStruct((image.size,), jnp.int32)
            raw = raw._replace(image_rows=_shapes(rows, setup.mesh))
        lowered = run_streamed.lower(setup, state, rest, teacher, raw, key)
        return setup, {"step": lowered.compile()}
    neighbours = _shapes(tables.neighbours, setup.mesh)
    raw = _rows(tables, None, setup.mesh)._replace(neighbours=neighbours)
    preparing = jax.jit(prepare)
    arguments = (setup, state.params, rest, teacher, raw)
    spread = _shapes(preparing.eval_shape(*arguments), setup.mesh, PartitionSpec(AXIS))
    spread = spread._replace(neighbours=neighbours)
    length = min(config.log_every, config.steps)
    return setup, {
        "prepare": preparing.lower(*arguments).compile(),
        "step": run_resident.lower(setup, length, state, rest, spread, key).compile(),
    }


def compiled_klot(
    n: int, d: int, devices: int, memory: Memory, precision: MatmulPrecision = "float32"
) -> Any:
    """KLOT of ``n`` images and ``n`` texts, value and gradient, compiled for so many devices.

    Args:
        n: rows of each side, a multiple of ``devices``.
        d: columns of student and teacher embeddings.
        devices: over which the images are spread.
        memory: as for `klot`.
        precision: as for `klot`.

    Returns:
        The program: ``(image, text, teacher_image, teacher_text)`` to the value and its gradient
        with respect to the first two.
    """

    def value_and_gradient(image, text, teacher_image, teacher_text):
        def loss(image, text):
            rows = (image, text, teacher_image, teacher_text)
            return klot(*rows, memory=memory, precision=precision, axis_name=axis)[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(image, text)

    rows = jax.ShapeDtypeStruct((n, d), jnp.float32)
    if devices == 1:
        axis = None
        return jax.jit(value_and_gradient).lower(rows, rows, rows, rows).compile()
    axis = AXIS
    mesh = jax.make_mesh((devices,), (AXIS,), (AxisType.Auto,), devices=jax.devices()[:devices])
    spread, same = PartitionSpec(AXIS), PartitionSpec()
    function = jax.shard_map(
        value_and_gradient,
        mesh=mesh,
        in_specs=(spread, same, spread, same),
        out_specs=(same, (spread, same)),
    )
    image, text = (rows.update(sharding=NamedSharding(mesh, spec)) for spec in (spread, same))
    return jax.jit(function).lower(image, text, image, text).compile()


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of one device that a compiled program needs, by kind.

    Args:
        compiled: what ``jax.jit(f).lower(...).compile()`` gives.

    Returns:
        ``arguments``, ``outputs`` (those that do not take the place of an argument), ``temporary``
        and their ``total``.
    """
    analysis = compiled.memory_analysis()
    parts = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def check_devices(devices: Sequence[int], rows: int | None = None) -> None:
    """Raises ValueError where there are too few devices, or they cannot share ``rows`` evenly."""
    if max(devices) > len(jax.devices()):
        raise ValueError(
            f"devices: {max(devices)} asked, but there are {len(jax.devices())}; fake ones of the "
            "CPU come with XLA_FLAGS=--xla_force_host_platform_device_count=COUNT"
        )
    for count in devices:
        if rows is not None and rows % count:
            raise ValueError(f"n must be a multiple of devices, got {rows} for {count} devices")


def _shapes(tree: Any, mesh: Mesh | None, spec: PartitionSpec | None = None) -> Any:
    """Shapes in place of arrays, the same on every device unless ``spec`` says otherwise."""
    sharding = None if mesh is None else NamedSharding(mesh, spec or PartitionSpec())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def _tables(splits: Splits, reads: Reads) -> Batch:
    """The sources of a run, in which other rows may be neighbours than truly are."""

    def rows(side: str) -> np.ndarray | None:
        if not reads.neighbours or side not in reads.sides:
            return None
        numbers = np.arange(len(splits.pairs) * reads.neighbours, dtype=np.int32)
        unpaired = len(getattr(splits, f"unpaired_{side}"))
        return (numbers % unpaired).reshape(len(splits.pairs), reads.neighbours)

    found = NeighbourRows(rows("image"), rows("text"))
    return with_neighbours(raw_tables(splits, reads), splits, found)


def _rows(tables: Batch, sizes: Sequence[int] | None, mesh: Mesh | None) -> Batch:
    """Shapes of a batch of so many pairs, images and texts, or of all rows, on the mesh."""

    def shape(table: FeatureTable | None, stream: int) -> Any:
        if table is None:
            return None
        count = len(table) if sizes is None else sizes[stream]
        return jax.ShapeDtypeStruct((padded(count, mesh), table.dim), jnp.float32)

    shapes = Batch(
        shape(tables.pairs_image, 0),
        shape(tables.pairs_text, 0),
        shape(tables.unpaired_image, 1),
        shape(tables.unpaired_text, 2),
        neighbour_image=shape(tables.neighbour_image, 0),
        neighbour_text=shape(tables.neighbour_text, 0),
    )
    return _shapes(shapes, mesh, PartitionSpec(AXIS))
