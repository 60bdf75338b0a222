"""The nearest unpaired rows of each pair, found once before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console

from sotalign_jax.config import Config, ConfigError
from sotalign_jax.features import FeatureTable, Splits
from sotalign_jax.features.batches import Batch, NeighbourRows
from sotalign_jax.losses import nearest_neighbours
from sotalign_jax.models import Aligner, Preprocessing
from sotalign_jax.objectives.base import Reads
from sotalign_jax.training.distributed import broadcast, together

__all__ = ["NeighbourCache", "check_neighbours", "find_neighbours", "with_neighbours"]


def check_neighbours(config: Config, splits: Splits, reads: Reads) -> None:
    """Raises ConfigError where there are fewer unpaired rows than neighbours asked."""
    for side in reads.sides:
        table = getattr(splits, f"unpaired_{side}")
        if len(table) < reads.neighbours:
            raise ConfigError(
                f"config.{config.objective}: {reads.neighbours} neighbours (k) of each pair asked, "
                f"but {table.name} has {len(table)} rows; give a smaller k, more data, or leave "
                f"out the neighbours of the {side}s"
            )


class NeighbourCache:
    """Neighbours of several runs: those that would find the same ones search once."""

    def __init__(self):
        self._known: list[tuple[Splits, Reads, Aligner, NeighbourRows]] = []

    def get(
        self,
        config: Config,
        splits: Splits,
        aligner: Aligner,
        reads: Reads,
        *,
        console: Console | None = None,
    ) -> NeighbourRows:
        """`find_neighbours`, or what it found before."""
        for one, kind, other, found in self._known:
            if one is splits and kind == reads and _same_view(aligner, other):
                return found
        found = find_neighbours(config, splits, aligner, reads, console=console)
        self._known.append((splits, reads, aligner, found))
        return found


def _same_view(one: Aligner, other: Aligner) -> bool:
    """Whether two aligners take the same of raw rows."""
    leaves, others = (jax.tree.leaves(nnx.state(side, Preprocessing)) for side in (one, other))
    same = one.normalize == other.normalize and one.standardized == other.standardized
    return same and all(map(np.array_equal, leaves, others))


def find_neighbours(
    config: Config,
    splits: Splits,
    aligner: Aligner,
    reads: Reads,
    *,
    console: Console | None = None,
) -> NeighbourRows:
    """The unpaired rows nearest to each pair, by what the aligner takes of them.

    All rows are compared, and no state is kept: the same data gives the same neighbours, when a run
    goes on as well. Of several processes the first one searches, for all.

    Args:
        config: a validated configuration, for messages.
        splits: the rows.
        aligner: whose preprocessing to compare by; its layers do not matter.
        reads: how many, of which sides, and whether duplicates count.
        console: where to say what is searched; None says nothing.

    Returns:
        ``(pairs, k)`` numbers of rows of ``splits.unpaired_image`` and of ``splits.unpaired_text``,
        nearest first; None of a side that is not read.

    Raises:
        ConfigError: a pair has fewer neighbours, duplicates left out.
    """

    if console is not None and reads.neighbours:
        among = (f"{len(getattr(splits, f'unpaired_{s}'))} unpaired {s}s" for s in reads.sides)
        console.print(
            f"neighbours: searching the {reads.neighbours} nearest to each of "
            f"{len(splits.pairs)} pairs among {' and '.join(among)}",
            highlight=False,
        )

    def of(side: str) -> np.ndarray | None:
        if not reads.neighbours or side not in reads.sides:
            return None
        pairs: FeatureTable = getattr(splits.pairs, side)
        view = getattr(aligner, f"preprocess_{side}")
        rows = np.zeros((len(pairs), reads.neighbours), np.int32)
        if jax.process_index() == 0:
            try:
                rows = _search(pairs, getattr(splits, f"unpaired_{side}"), view, reads)
            except ValueError as error:
                raise ConfigError(f"config.{config.objective}.k ({side}s): {error}") from error
        return rows

    found = together(lambda: NeighbourRows(of("image"), of("text")))
    return NeighbourRows(*(None if rows is None else broadcast([rows], 0)[0] for rows in found))


def _search(
    pairs: FeatureTable, unpaired: FeatureTable, view: Callable[[Any], Any], reads: Reads
) -> np.ndarray:
    found = nearest_neighbours(
        pairs.array(), _Slices(unpaired), reads.neighbours, duplicates=reads.duplicates, view=view
    )
    return np.asarray(found.rows)


class _Slices:
    """A table of features, of which rows are read as they are sliced."""

    def __init__(self, table: FeatureTable):
        self._table = table
        self.shape = table.shape

    def __getitem__(self, index: slice) -> np.ndarray:
        return self._table.read(index)


def with_neighbours(tables: Batch, splits: Splits, found: NeighbourRows) -> Batch:
    """The sources of a run with those unpaired rows that are a neighbour of any pair.

    Args:
        tables: the sources.
        splits: the rows.
        found: the neighbours, as `find_neighbours` numbers them.

    Returns:
        The sources, in which the neighbours are numbered anew: rows that are nobody's neighbour are
        left behind. The size of a table follows from the number of rows: runs on other rows can
        share programs.
    """
    near: dict[str, FeatureTable] = {}
    numbers: dict[str, np.ndarray] = {}
    for side, rows in found._asdict().items():
        if rows is not None:
            table: FeatureTable = getattr(splits, f"unpaired_{side}")
            wanted, places = np.unique(rows, return_inverse=True)
            repeated = min(rows.size, len(table)) - len(wanted)
            near[f"neighbour_{side}"] = table.select(np.pad(wanted, (0, repeated), mode="edge"))
            numbers[side] = places.reshape(rows.shape).astype(np.int32)
    return tables._replace(**near, neighbours=NeighbourRows(**numbers))
