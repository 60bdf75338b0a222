"""Where the rows of a run lie: on one device, or spread over a mesh of them.

Rows of features, and of a batch, are spread over the one axis of the mesh; parameters are the same
on every device. What travels in a step are the rows of the batch, once to where they are worked on;
the embeddings of its texts, once to every device; column vectors of Sinkhorn; and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from sotalign_jax.config import Config, ConfigError
from sotalign_jax.features import FeatureTable
from sotalign_jax.features.batches import Batch

__all__ = [
    "AXIS",
    "local_copy",
    "make_mesh",
    "padded",
    "place",
    "place_batch",
    "place_table",
    "place_tables",
    "place_vector",
    "put_rows",
    "replicate",
    "share",
    "take_rows",
]

AXIS = "rows"


def make_mesh(config: Config) -> Mesh | None:
    """The mesh of a run; None on one device, where nothing is spread.

    Raises:
        ConfigError: more devices asked than there are, or fewer than several processes have.
    """
    devices = jax.devices()
    count = config.mesh.devices or len(devices)
    if count > len(devices):
        raise ConfigError(
            f"config.mesh.devices: {count} asked, but there are {len(devices)}; 0 takes all"
        )
    if jax.process_count() > 1 and count < len(devices):
        raise ConfigError(
            f"config.mesh.devices: {count} asked, but the {jax.process_count()} processes have "
            f"{len(devices)}, and each must take part; 0 takes all"
        )
    if count == 1:
        return None
    # Auto: ott cannot take explicit axes, the default of make_mesh.
    return jax.make_mesh((count,), (AXIS,), (AxisType.Auto,), devices=devices[:count])


def padded(rows: int, mesh: Mesh | None) -> int:
    """The number of rows that, with padding, every device has an equal share of."""
    return rows if mesh is None else -(-rows // mesh.size) * mesh.size


def place(read: Callable[[slice], np.ndarray], rows: int, dim: int, mesh: Mesh) -> Array:
    """Rows spread over the mesh, each process reading those of its own devices.

    Args:
        read: float32 rows of a slice.
        rows: how many there are; zeros follow up to `padded`.
        dim: columns.
        mesh: where to.

    Returns:
        ``(padded(rows), dim)`` float32.
    """

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(padded(rows, mesh))
        out = np.zeros((stop - start, dim), np.float32)
        if start < rows:
            out[: min(stop, rows) - start] = read(slice(start, min(stop, rows)))
        return out

    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.make_array_from_callback((padded(rows, mesh), dim), sharding, part)


def place_table(table: FeatureTable | None, mesh: Mesh | None) -> Any:
    """All rows of a table on the device, or spread over the mesh."""
    if table is None:
        return None
    return table.array() if mesh is None else place(table.read, len(table), table.dim, mesh)


def place_tables(tables: Batch, mesh: Mesh | None) -> Batch:
    """All sources of a run on the device, or spread over the mesh; who neighbours whom everywhere.

    Args:
        tables: the sources, each a `FeatureTable`, and numbers of neighbours.
        mesh: where to.
    """
    placed = (place_table(table, mesh) for table in tables[:-1])
    return Batch(*placed, neighbours=replicate(tables.neighbours, mesh))


def place_vector(values: Float[ArrayLike, " k"], mesh: Mesh | None) -> Float[Array, " p"]:
    """One number a row, which every process has: on the device, or spread as the rows are."""
    if mesh is None:
        return jnp.asarray(values)
    whole = np.asarray(values)
    whole = np.pad(whole, (0, padded(len(whole), mesh) - len(whole)))
    sharding = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def place_batch(local: Batch, sizes: tuple[int, int, int], mesh: Mesh | None) -> Batch:
    """A batch on the device, or spread over the mesh, of which each process has its `share`.

    Args:
        local: host rows of this process's share.
        sizes: pairs, unpaired images and unpaired texts of the whole batch.
        mesh: where to.
    """
    if mesh is None:
        return local
    pairs, images, texts = sizes

    def put(rows, size: int):
        if rows is None:
            return None
        start = share(size, mesh).start
        return place(lambda at: rows[at.start - start : at.stop - start], size, rows.shape[1], mesh)

    placed = Batch(
        put(local.pairs_image, pairs),
        put(local.pairs_text, pairs),
        put(local.unpaired_image, images),
        put(local.unpaired_text, texts),
        neighbour_image=put(local.neighbour_image, pairs),
        neighbour_text=put(local.neighbour_text, pairs),
    )
    rows = local.image_rows
    if rows is not None:
        # Not by `replicate`: jax would have the processes compare their rows, and wait for that.
        everywhere = NamedSharding(mesh, PartitionSpec())
        rows = jax.make_array_from_callback(rows.shape, everywhere, lambda index: rows[index])
    return placed._replace(image_rows=rows)


def share(rows: int, mesh: Mesh | None) -> slice:
    """Of ``rows`` rows spread over the mesh, those that lie on this process's devices."""
    if mesh is None:
        return slice(0, rows)
    each = padded(rows, mesh) // mesh.size
    me = jax.process_index()
    here = [k for k, device in enumerate(mesh.devices.flat) if device.process_index == me]
    return slice(min(rows, here[0] * each), min(rows, (here[-1] + 1) * each))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """A pytree of arrays that every process has, the same on every device of the mesh."""
    if mesh is None:
        return tree
    everywhere = NamedSharding(mesh, PartitionSpec())

    def put(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = jax.device_put(np.asarray(jax.random.key_data(leaf)), everywhere)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        return jax.device_put(np.asarray(leaf), everywhere)

    return jax.tree.map(put, tree)


def local_copy(tree: Any) -> Any:
    """A replicated pytree as arrays of this process alone."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def take_rows(local: Float[Array, "k ..."], rows: Int[Array, " b"]) -> Float[Array, "c ..."]:
    """Inside ``shard_map``: this device's share of some rows of a spread table.

    Every device gives the rows that it has, and zeros for the others; their sum, exact because all
    but one term is zero, is left where it is needed.

    Args:
        local: this device's rows of the table, or its part of one number a row.
        rows: numbers of rows of the whole table, the same on every device.

    Returns:
        This device's share of those rows, zeros after the last of them.
    """
    devices = jax.lax.axis_size(AXIS)
    rows = jnp.pad(rows, (0, -len(rows) % devices), constant_values=-1)
    here = rows - jax.lax.axis_index(AXIS) * local.shape[0]
    mine = (rows >= 0) & (here >= 0) & (here < local.shape[0])
    mine = mine.reshape(-1, *(1,) * (local.ndim - 1))
    given = jnp.where(mine, local[jnp.clip(here, 0, local.shape[0] - 1)], 0.0)
    return jax.lax.psum_scatter(given, AXIS, tiled=True)


def put_rows(
    local: Float[Array, " k"], rows: Int[Array, " b"], values: Float[Array, " c"]
) -> Float[Array, " k"]:
    """Inside ``shard_map``: a spread vector with new values for some rows, as `take_rows` has them.

    Args:
        local: this device's part of the vector.
        rows: numbers of rows of the whole vector, no two equal, the same on every device.
        values: this device's share of the new values; what follows the last of them is padding.

    Returns:
        This device's part of the new vector.
    """
    every = jax.lax.all_gather(values, AXIS, tiled=True)[: len(rows)]
    here = rows - jax.lax.axis_index(AXIS) * local.shape[0]
    # A negative index would count from the end; one beyond the end is dropped.
    here = jnp.where(here < 0, local.shape[0], here)
    return local.at[here].set(every, mode="drop")
