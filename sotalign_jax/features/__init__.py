"""Features on disk and in memory: tables, formats, joins, splits, and the embedded data."""

from sotalign_jax.features.annotations import read_captions, read_thumbnails
from sotalign_jax.features.embedded import (
    emoji,
    emoji_metadata,
    emoji_pairs,
    emoji_table,
    openclipart_metadata,
    openclipart_table,
)
from sotalign_jax.features.formats import open_features
from sotalign_jax.features.platonic import platonic_world
from sotalign_jax.features.splits import Pairs, Splits, join, pair, split_pairs
from sotalign_jax.features.store import (
    BadRows,
    FeatureTable,
    Manifest,
    MissingFileError,
    check_finite,
    concat,
    find_bad_rows,
    open_store,
    refuse_bad_rows,
    write_store,
)

__all__ = [
    "BadRows",
    "FeatureTable",
    "Manifest",
    "MissingFileError",
    "Pairs",
    "Splits",
    "check_finite",
    "concat",
    "emoji",
    "emoji_metadata",
    "emoji_pairs",
    "emoji_table",
    "find_bad_rows",
    "join",
    "open_features",
    "open_store",
    "openclipart_metadata",
    "openclipart_table",
    "pair",
    "platonic_world",
    "read_captions",
    "read_thumbnails",
    "refuse_bad_rows",
    "split_pairs",
    "write_store",
]
