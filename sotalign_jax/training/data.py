"""From a configuration to the rows of a run and to its teacher, checked before any training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from sotalign_jax import features, fitted
from sotalign_jax.config import Config, ConfigError
from sotalign_jax.features import FeatureTable, Pairs, Splits
from sotalign_jax.fitted import FittedAligner
from sotalign_jax.numerics import unit_rows64
from sotalign_jax.teachers import (
    ColumnMoments,
    Columns,
    LinearTeacher,
    Moments,
    cca,
    column_moments_of,
    columns_of,
    contrastive,
    merge_column_moments,
    moments_of,
    procrustes,
    recentered,
    refit,
)
from sotalign_jax.teachers.moments import (
    empty_moments,
    merge_moments,
    standardized_rows64,
)
from sotalign_jax.training.distributed import broadcast, gather, together

__all__ = ["fit_aligner", "fit_teacher", "load_splits", "load_test_pairs"]

_CHUNK = 8_192
# Parts of a table that different processes may read; more would only be more to exchange.
_PARTS = 16
# Pairs a step of the contrastive teacher: all of the paper's 10,000.
_CONTRASTIVE_BATCH = 10_000
# Draws the images of `n_test`: runs on any seed are to report on the same ones.
_TEST_SEED = 2**40


def load_splits(config: Config) -> Splits:
    """The splits that a validated configuration names, every row of them known to be finite.

    Args:
        config: a validated configuration.

    Returns:
        The splits. The pairs, and the unpaired rows of files, are drawn with ``config.seed``. Of
        several processes, each reads a part of the rows to check them.

    Raises:
        ValueError: a file that is missing or not features, tables that do not join, NaN or
            infinite features, dimensions that differ, more rows asked than exist.
    """
    splits = together(lambda: _splits(config))
    _check_finite(splits)
    return splits


def _splits(config: Config) -> Splits:
    """The splits of `load_splits`, of which no row has been read."""
    data = config.data
    if data.name == "emoji":
        splits = features.emoji(n_pairs=data.n_pairs, seed=config.seed, **data.emoji.to_dict())
        if data.n_unpaired:
            splits = _fewer_unpaired(splits, data.n_unpaired)
        return splits
    if data.name == "platonic":
        return features.platonic_world(
            seed=config.seed,
            n_pairs=data.n_pairs,
            n_unpaired=data.n_unpaired or 20_000,
            **data.platonic.to_dict(),
        )
    return _from_files(config)


def _check_finite(splits: Splits) -> None:
    """Raises ValueError for NaN or Inf: the same one in all processes, each of which reads a part.

    Of several bad tables, the first is named.
    """
    tables = []
    for side in ("image", "text"):
        tables += [getattr(splits.pairs, side), getattr(splits, f"unpaired_{side}")]
        tables += [getattr(held, side) for held in (splits.val, splits.test) if held is not None]
    me, count = jax.process_index(), jax.process_count()
    found = together(lambda: [features.find_bad_rows(table, me, count) for table in tables])
    everyone = np.stack(gather(np.array(found, np.int64)))
    for number, table in enumerate(tables):
        bad, first = everyone[:, number, 0].sum(), everyone[:, number, 1].min()
        features.refuse_bad_rows(table, features.BadRows(int(bad), int(first)))


def load_test_pairs(config: Config) -> Pairs | None:
    """The test pairs of `load_splits`; nothing that belongs to the training rows is read.

    Args:
        config: a validated configuration.

    Returns:
        The pairs, every row of them known to be finite; None where the data has none.

    Raises:
        ValueError: a file that is missing or not features, tables that do not join, NaN or
            infinite features.
    """
    data = config.data
    if data.name == "emoji":
        test = features.emoji_pairs("test", image=data.emoji.image, text=data.emoji.text)
    elif data.name == "platonic":
        # The sizes of the other parts change no row of this one.
        sizes = {"n_pairs": 1, "n_unpaired": 0, "n_val": 0}
        test = features.platonic_world(seed=config.seed, **data.platonic.to_dict() | sizes).test
    else:
        test = _held_out(data.files, "test")
        if data.files.n_test:
            corpus = _corpus(data.files)
            _, test = _split_off(corpus, "n_test", data.files, _TEST_SEED)
    if test is not None:
        features.check_finite(test.image)
        features.check_finite(test.text)
    return test


def _fewer_unpaired(splits: Splits, count: int) -> Splits:
    for table in (splits.unpaired_image, splits.unpaired_text):
        if count > len(table):
            raise ConfigError(
                f"config.data.n_unpaired: {count} asked, but {table.name} has {len(table)} rows"
            )
    return dataclasses.replace(
        splits,
        unpaired_image=splits.unpaired_image.select(np.arange(count)),
        unpaired_text=splits.unpaired_text.select(np.arange(count)),
    )


def _from_files(config: Config) -> Splits:
    files = config.data.files
    corpus = _corpus(files)
    held_out = {name: _held_out(files, name) for name in ("test", "val")}
    description = f"{corpus.image.name} with {corpus.text.name}, unpaired rows {files.mode}"
    # Test first, so that neither its rows nor their number depend on the validation rows.
    for name, seed in (("test", _TEST_SEED), ("val", config.seed)):
        if files[f"n_{name}"]:
            corpus, held_out[name] = _split_off(corpus, f"n_{name}", files, seed)
    test, val = held_out["test"], held_out["val"]
    independent = files.mode == "independent"
    if independent != bool(files.unpaired_image) or independent != bool(files.unpaired_text):
        raise ConfigError(
            "config.data.files.unpaired_image, unpaired_text: both are needed in mode "
            f"'independent' and neither in the others, got mode {files.mode!r}"
        )
    pairs, unpaired_image, unpaired_text = features.split_pairs(
        corpus.image,
        corpus.text,
        n_pairs=config.data.n_pairs,
        n_unpaired=config.data.n_unpaired or None,
        mode=files.mode,
        seed=config.seed,
        unpaired_image=_open(files, "unpaired_image") if independent else None,
        unpaired_text=_open(files, "unpaired_text") if independent else None,
        exclude=_held_out_ids(corpus, val, test),
        on=files.on,
    )
    return Splits(
        pairs=pairs,
        unpaired_image=unpaired_image,
        unpaired_text=unpaired_text,
        val=val,
        test=test,
        description=description,
    )


def _corpus(files) -> Pairs:
    """All pairs of the paired corpus."""
    for name in ("image", "text"):
        if not files[name]:
            raise ConfigError(
                f"config.data.files.{name}: no path given; the paired {name} features are needed"
            )
    return features.pair(_open(files, "image"), _open(files, "text"), on=files.on)


def _open(files, name: str) -> FeatureTable:
    modality = "text" if name.endswith("text") else "image"
    try:
        return features.open_features(files[name], modality=modality)
    except ValueError as error:
        raise ConfigError(f"config.data.files.{name}: {error}") from error


def _held_out(files, name: str) -> Pairs | None:
    given = [bool(files[f"{name}_{side}"]) for side in ("image", "text")]
    if any(given) and files[f"n_{name}"]:
        raise ConfigError(
            f"config.data.files.n_{name}: give this or {name}_image and {name}_text, not both"
        )
    if not any(given):
        return None
    if not all(given):
        raise ConfigError(f"config.data.files.{name}_image, {name}_text: give both or neither")
    image, text = _open(files, f"{name}_image"), _open(files, f"{name}_text")
    return features.pair(image, text, on=files.on)


def _held_out_ids(corpus: Pairs, *held_out: Pairs | None) -> np.ndarray | None:
    """Ids that must not be trained on, where the tables have ids to compare."""
    ids = [p.image.ids for p in held_out if p is not None and p.image.ids is not None]
    return np.concatenate(ids) if ids and corpus.image.ids is not None else None


def _split_off(corpus: Pairs, name: str, files, seed: int) -> tuple[Pairs, Pairs]:
    """As many images as a field says, with all their texts, after the rest of them."""
    count = files[name]
    if count >= len(corpus.image):
        rest = " left" if name == "n_val" and files.n_test else ""
        raise ConfigError(
            f"config.data.files.{name}: {count} asked, but the paired corpus has "
            f"{len(corpus.image)} images{rest}"
        )
    # Its own stream of random numbers: the pairs are drawn from `seed` itself.
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
    order = rng.permutation(len(corpus.image))
    # In the order of the corpus: tables without ids go on being joined row by row.
    return _restrict(corpus, np.sort(order[count:])), _restrict(corpus, np.sort(order[:count]))


def _restrict(pairs: Pairs, image_rows: np.ndarray) -> Pairs:
    """The given images of ``pairs``, with all their texts."""
    place = np.full(len(pairs.image), -1)
    place[image_rows] = np.arange(len(image_rows))
    text_rows = np.flatnonzero(place[pairs.text_to_image] >= 0)
    return Pairs(
        pairs.image.select(image_rows),
        pairs.text.select(text_rows),
        place[pairs.text_to_image[text_rows]],
    )


def fit_teacher(config: Config, splits: Splits) -> LinearTeacher:
    """The linear teacher of a validated configuration, fitted on the pairs of the splits.

    Args:
        config: a validated configuration.
        splits: its rows; the unpaired ones are read only where ``teacher.center``,
            ``teacher.standardize`` or ``teacher.refit`` asks for them.

    Returns:
        The teacher.

    Raises:
        ValueError: rows that do not support what is asked.
    """
    settings = config.teacher
    _check_unpaired(settings, splits)
    image_columns, text_columns = (_columns(settings, splits, side) for side in ("image", "text"))
    if settings.name == "contrastive":
        return contrastive(
            splits.pairs.image.array(),
            splits.pairs.text.array(),
            dim=settings.dim,
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            batch_size=min(len(splits.pairs), _CONTRASTIVE_BATCH),
            seed=config.seed,
            image_columns=image_columns,
            text_columns=text_columns,
        )
    moments = _pair_moments(splits, image_columns, text_columns)
    if settings.center == "unpaired":
        moments = recentered(
            moments,
            _unit_mean(splits.unpaired_image, image_columns),
            _unit_mean(splits.unpaired_text, text_columns),
        )
    dim = settings.dim or None
    if settings.name == "procrustes":
        return procrustes(moments, dim=dim)._replace(
            image_columns=image_columns, text_columns=text_columns
        )
    options = {name: settings[name] for name in ("ridge", "ridge_on", "weighted")}
    teacher = cca(moments, dim=dim, **options)._replace(
        image_columns=image_columns, text_columns=text_columns
    )
    if settings.refit.weight == 0:
        return teacher
    try:
        return refit(
            teacher,
            moments,
            splits.unpaired_image.array(),
            splits.unpaired_text.array(),
            **settings.refit.to_dict(),
            **options,
        )
    except ValueError as error:
        raise ConfigError(f"config.teacher.refit: {error}") from error


def fit_aligner(config: Config, splits: Splits) -> FittedAligner:
    """The aligner of a validated configuration whose ``aligner`` is fitted in one go.

    Args:
        config: a validated configuration.
        splits: its rows; the unpaired ones are read only where the method's options ask for them.

    Returns:
        The aligner.

    Raises:
        ConfigError: rows that do not support what is asked.
    """
    options = config[config.aligner].to_dict()
    unpaired: list[np.ndarray | None] = [None, None]
    if fitted.reads_unpaired(config.aligner, options):
        unpaired = [table.array() for table in (splits.unpaired_image, splits.unpaired_text)]
    image, text = splits.pairs.image.array(), splits.pairs.text.array()
    try:
        return fitted.fit(config.aligner, image, text, *unpaired, options=options, seed=config.seed)
    except ValueError as error:
        raise ConfigError(f"config.{config.aligner}: {error}") from error


def _check_unpaired(settings: Config, splits: Splits) -> None:
    """Raises ConfigError where a teacher needs unpaired rows that the data does not have."""
    for table in (splits.unpaired_image, splits.unpaired_text):
        if settings.center == "unpaired" and not len(table):
            raise ConfigError(
                "config.teacher.center: 'unpaired' takes the means of the unpaired rows, but "
                f"{table.name} has none; take 'pairs'"
            )
        if settings.refit.weight and not len(table):
            raise ConfigError(
                "config.teacher.refit.weight: the refit couples the unpaired rows, but "
                f"{table.name} has none; set 0"
            )


def _columns(settings: Config, splits: Splits, side: str) -> Columns | None:
    """What standardises the columns of a side: those of its pairs and unpaired rows together."""
    power = settings.standardize[side]
    if not power:
        return None
    tables = (getattr(splits.pairs, side), getattr(splits, f"unpaired_{side}"))
    zeros = np.zeros(tables[0].dim)
    empty = total = ColumnMoments(0, zeros, zeros)
    for table in tables:

        def read(rows: np.ndarray, table: FeatureTable = table) -> ColumnMoments:
            return column_moments_of(table.select(rows).chunks(_CHUNK))

        for count, *rest in _parts(len(table), empty, read):
            total = merge_column_moments(total, ColumnMoments(int(count), *rest))
    try:
        return columns_of(total, power=power)
    except ValueError as error:
        raise ConfigError(f"config.teacher.standardize.{side}: {error}") from error


def _pair_moments(
    splits: Splits, image_columns: Columns | None, text_columns: Columns | None
) -> Moments:
    """Moments of the pairs."""
    image, text = splits.pairs.image, splits.pairs.text

    def read(rows: np.ndarray) -> Moments:
        chunks = (table.select(rows).chunks(_CHUNK) for table in (image, text))
        return moments_of(
            zip(*chunks, strict=True), image_columns=image_columns, text_columns=text_columns
        )

    empty = total = empty_moments(image.dim, text.dim)
    for count, *rest in _parts(len(image), empty, read):
        total = merge_moments(total, Moments(int(count), *rest))
    return total


def _unit_mean(table: FeatureTable, columns: Columns | None) -> np.ndarray:
    """Mean of the rows of a table, each scaled to unit length (and standardised)."""

    def read(rows: np.ndarray) -> list[np.ndarray]:
        total = np.zeros(table.dim)
        for chunk in table.select(rows).chunks(_CHUNK):
            unit = unit_rows64(chunk.astype(np.float64))
            total += standardized_rows64(unit, columns).sum(axis=0)
        return [total]

    total = np.zeros(table.dim)
    for (part,) in _parts(len(table), [total], read):
        total = total + part
    return total / len(table)


def _parts(
    rows: int, empty: Sequence[Any], read: Callable[[np.ndarray], Sequence[Any]]
) -> Iterator[list[np.ndarray]]:
    """What is read of the parts of some rows, in order, each part by one process for all.

    Neither the parts nor their order depend on the number of processes, so that a sum over them
    does not either. The processes read at the same time, one part each.

    Args:
        rows: how many there are.
        empty: numbers and arrays of the shapes that ``read`` returns.
        read: given the numbers of the rows of a part.
    """
    parts = min(_PARTS, -(-rows // _CHUNK))
    me, count = jax.process_index(), jax.process_count()
    for first in range(0, parts, count):
        mine = first + me
        found = empty
        if mine < parts:
            found = read(np.arange(rows * mine // parts, rows * (mine + 1) // parts))
        arrays = [np.asarray(value) for value in found]
        for owner in range(min(count, parts - first)):
            yield broadcast(arrays, owner)
