"""Checkpoints of a training state: orbax keeps the latest, and the best on validation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sotalign_jax.training.step import TrainState

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of one run, in one directory.

    Args:
        directory: made if absent; left-overs of a save that was cut off are removed.
        keep_best: keep the checkpoint with the highest validation metric beside the latest.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_best: bool):
        policies = ocp.training.preservation_policies
        kept: list[Any] = [policies.LatestN(n=1)]
        if keep_best:
            # A checkpoint without a metric was saved on SIGTERM, to go on from and no longer.
            kept.append(
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics["value"],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._checkpointer: Any = ocp.training.Checkpointer(
            str(Path(directory).absolute()),
            preservation_policy=policies.AnyPreservationPolicy(kept),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint; None without one."""
        found = self._checkpointer.latest
        return None if found is None else found.step

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest validation metric; the later of equals."""
        found = [c for c in self._checkpointer.checkpoints if c.metrics is not None]
        return max(found, key=lambda c: (c.metrics["value"], c.step)).step if found else None

    def save(self, state: TrainState, value: float | None = None) -> None:
        """Save ``state`` under its step, with its validation metric if there is one."""
        step = int(state.step)
        if step == self.latest:
            return
        metrics = None if value is None else {"value": float(value)}
        self._checkpointer.save(step, _named_leaves(state), force=True, metrics=metrics)

    def restore(self, like: TrainState, step: int) -> TrainState:
        """The state saved at ``step``, with the structure, dtypes and shardings of ``like``."""
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _named_leaves(like).items()
        }
        # One number a row is padded to what the devices share evenly: other devices, other padding.
        options = ocp.options.ArrayOptions(
            loading=ocp.options.ArrayOptions.Loading(enable_padding_and_truncation=True)
        )
        with ocp.Context(array_options=options):
            leaves = self._checkpointer.load(step, abstract)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in abstract])

    def close(self) -> None:
        """Wait for what is being written."""
        self._checkpointer.close()


def _named_leaves(state: TrainState) -> dict[str, jax.Array]:
    """Leaves by their path: a checkpoint that can be read without this package's classes."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
