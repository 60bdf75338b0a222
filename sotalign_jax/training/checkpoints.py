"""Checkpoints of a training state: orbax keeps the latest, and the best on validation."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from sotalign_jax.training.step import TrainState

__all__ = ["Checkpoints"]


# Leaves that hold one number a row, as long as the devices of a run want them.
_PADDED = "potentials."


class Checkpoints:
    """The checkpoints of one run, in one directory, written in the background.

    Training goes on while files are written; whatever reads or writes checkpoints next waits for
    them. A write that failed is an error of that call, and leaves the checkpoint before it intact.
    (A state that was donated to the next step is safe: what is being written stands in host memory,
    and where that is the device's own, jax does not give it away.)

    Args:
        directory: made if absent; left-overs of a save that was cut off are removed.
        keep_best: keep the checkpoint with the highest validation metric beside the latest.

    Raises:
        OSError: by the next call of any method: a checkpoint could not be written.
    """

    def __init__(self, directory: str | os.PathLike, *, keep_best: bool):
        self._directory = Path(directory).absolute()
        self._writing: int | None = None
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
            str(self._directory),
            preservation_policy=policies.AnyPreservationPolicy(kept),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
        )

    @property
    def latest(self) -> int | None:
        """Step of the latest checkpoint; None without one."""
        self.wait()
        found = self._checkpointer.latest
        return None if found is None else found.step

    @property
    def best(self) -> int | None:
        """Step of the checkpoint with the highest validation metric; the later of equals."""
        self.wait()
        found = [c for c in self._checkpointer.checkpoints if c.metrics is not None]
        return max(found, key=lambda c: (c.metrics["value"], c.step)).step if found else None

    def save(self, state: TrainState, value: float | None = None) -> None:
        """Begin to save ``state`` under its step, with its validation metric if there is one."""
        step = int(state.step)
        if step == self.latest:  # which waits: orbax takes one save at a time
            return
        metrics = None if value is None else {"value": float(value)}
        self._writing = step
        with self._errors():
            self._checkpointer.save_async(step, _named_leaves(state), force=True, metrics=metrics)

    def restore(self, like: TrainState, step: int) -> TrainState:
        """The state saved at ``step``, with the structure, dtypes and shardings of ``like``.

        Raises:
            ValueError: a leaf has another shape; what is one number a row may differ in padding.
        """
        self.wait()
        abstract = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in _named_leaves(like).items()
        }
        self._check_shapes(abstract, step)
        # One number a row is padded to what the devices share evenly: other devices, other padding.
        options = ocp.options.ArrayOptions(
            loading=ocp.options.ArrayOptions.Loading(enable_padding_and_truncation=True)
        )
        with ocp.Context(array_options=options):
            leaves = self._checkpointer.load(step, abstract)
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in abstract])

    def _check_shapes(self, wanted: dict[str, jax.ShapeDtypeStruct], step: int) -> None:
        """Raises ValueError where the checkpoint is of another state; only padding may differ."""
        saved = self._checkpointer.metadata(step).metadata
        for name, leaf in wanted.items():
            found = tuple(saved[name].shape) if name in saved else None
            if found != leaf.shape and not (found and name.startswith(_PADDED)):
                raise ValueError(
                    f"checkpoints: {name} of step {step} in {self._directory} has shape {found}, "
                    f"and this run needs {leaf.shape}; have its data changed? Give another workdir"
                )

    def wait(self) -> None:
        """Wait for what is being written, and know that it is complete."""
        with self._errors():
            self._checkpointer.wait()
        self._writing = None

    def close(self) -> None:
        """Wait for what is being written, and give up the threads that wrote."""
        with self._errors():
            self._checkpointer.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Names the checkpoint that could not be written."""
        handled = sys.exception()
        try:
            yield
        except Exception as error:
            if self._writing is None:
                raise
            # Where other processes were waited for in vain, that stands over what happened here.
            cause: BaseException = error
            while (earlier := cause.__context__) is not None and earlier is not handled:
                cause = earlier
            raise OSError(
                f"checkpoints: that of step {self._writing} could not be written to "
                f"{self._directory} ({cause}); those before it are intact. Make room or mend the "
                "directory, and run the same command again"
            ) from error


def _named_leaves(state: TrainState) -> dict[str, jax.Array]:
    """Leaves by their path: a checkpoint that can be read without this package's classes."""
    leaves, _ = jax.tree.flatten_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
