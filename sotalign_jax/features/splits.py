"""Which rows are pairs, which are unpaired: joins by id, and splits drawn from a seed."""

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, Int64

from sotalign_jax.features.store import FeatureTable

__all__ = [
    "Pairs",
    "Splits",
    "counts_rows",
    "join",
    "numbered_otherwise",
    "numbers_with_gaps",
    "pair",
    "split_pairs",
]

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs:
    """Images and the texts that belong to them; an image may have several texts.

    Attributes:
        image: ``(n, image_dim)`` rows.
        text: ``(m, text_dim)`` rows.
        text_to_image: ``(m,)`` int64, the row of `image` that each row of `text` belongs to.

    Raises:
        ValueError: `text_to_image` has another length than `text`, or names no row of `image`.
    """

    image: FeatureTable
    text: FeatureTable
    text_to_image: Int[np.ndarray, " m"]

    def __post_init__(self):
        rows = np.asarray(self.text_to_image).astype(np.int64)
        if rows.shape != (len(self.text),):
            raise ValueError(
                f"text_to_image: shape {rows.shape} for {len(self.text)} rows of {self.text.name}"
            )
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.image)):
            raise ValueError(
                f"text_to_image: rows {rows.min()} .. {rows.max()}, but {self.image.name} has "
                f"{len(self.image)} rows"
            )
        rows.setflags(write=False)
        object.__setattr__(self, "text_to_image", rows)

    def __len__(self) -> int:
        return len(self.text)

    @property
    def one_to_one(self) -> bool:
        """Whether row i of `image` belongs to row i of `text` and to nothing else."""
        same = len(self.image) == len(self.text)
        return same and bool((self.text_to_image == np.arange(len(self.text))).all())


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """All that one run reads.

    Attributes:
        pairs: one-to-one pairs to train on.
        unpaired_image: images without a known text.
        unpaired_text: texts without a known image.
        val: pairs to choose hyper-parameters on, or None.
        test: pairs to report on, or None.
        description: one line on where the rows come from.

    Raises:
        ValueError: `pairs` not one-to-one, or tables of one modality that differ in dim.
    """

    pairs: Pairs
    unpaired_image: FeatureTable
    unpaired_text: FeatureTable
    val: Pairs | None = None
    test: Pairs | None = None
    description: str = ""

    def __post_init__(self):
        if not self.pairs.one_to_one:
            raise ValueError("pairs: row i of the images must belong to row i of the texts")
        held_out = [p for p in (self.val, self.test) if p is not None]
        _same_dim(self.pairs.image, self.unpaired_image, *(p.image for p in held_out))
        _same_dim(self.pairs.text, self.unpaired_text, *(p.text for p in held_out))


def _same_dim(first: FeatureTable, *others: FeatureTable) -> None:
    for table in others:
        if table.dim != first.dim:
            raise ValueError(
                f"dim: {table.name} has {table.dim} columns, {first.name} has {first.dim}"
            )


def join(
    image: FeatureTable,
    text: FeatureTable,
    *,
    on: str = "auto",
) -> tuple[Int64[np.ndarray, " p"], Int64[np.ndarray, " p"]]:
    """Finds which rows of two tables belong together.

    By id, in the order of the text table; several texts may have the id of one image. Rows whose
    id the other side lacks are dropped, and a log warning says how many. Another warns of numbers
    that are those of rows on one side and something else on the other. Tables without ids are
    joined by row order.

    Args:
        image: the images; each id at most once.
        text: the texts; an id may be repeated.
        on: "ids", "rows", or "auto" (default): by id when both have ids, by row when neither has.

    Returns:
        ``(image_rows, text_rows)``, int64: row ``image_rows[k]`` of `image` belongs to row
        ``text_rows[k]`` of `text`.

    Raises:
        ValueError: one side alone has ids, an image id occurs twice, no id is shared, or tables
            joined by row differ in length.
    """
    if on not in ("auto", "ids", "rows"):
        raise ValueError(f"on must be 'auto', 'ids' or 'rows', got {on!r}")
    image_ids, text_ids = image.ids, text.ids
    if on == "rows" or (on == "auto" and image_ids is None and text_ids is None):
        if len(image) != len(text):
            raise ValueError(
                f"pairs: joined by row order, but {image.name} has {len(image)} rows and "
                f"{text.name} has {len(text)}"
            )
        return np.arange(len(image)), np.arange(len(text))
    if image_ids is None or text_ids is None:
        if image_ids is None and text_ids is None:
            raise ValueError(f"on='ids': neither {image.name} nor {text.name} has ids")
        have, lack = (text, image) if image_ids is None else (image, text)
        raise ValueError(
            f"ids: {have.name} has ids and {lack.name} has none; pass on='rows' if row i of one "
            f"belongs to row i of the other"
        )
    order = np.argsort(image_ids, kind="stable")
    ordered = image_ids[order]
    if (twice := ordered[1:] == ordered[:-1]).any():
        raise ValueError(
            f"ids: {str(ordered[1:][twice][0])!r} occurs more than once in {image.name}; an image "
            f"id must be unique"
        )
    if not len(ordered) or not len(text_ids):
        raise ValueError(f"ids: nothing to join, {image.name} or {text.name} has no rows")
    place = np.minimum(np.searchsorted(ordered, text_ids), len(ordered) - 1)
    text_rows = np.flatnonzero(ordered[place] == text_ids)
    if not len(text_rows):
        raise ValueError(
            f"ids: {image.name} and {text.name} share none; the first are "
            f"{str(image_ids[0])!r} and {str(text_ids[0])!r}"
        )
    if numbering := numbered_otherwise(image, text):
        logger.warning("join: %s", numbering)
    image_rows = order[place[text_rows]]
    lost_images = len(image) - len(np.unique(image_rows))
    lost_texts = len(text) - len(text_rows)
    if lost_images or lost_texts:
        logger.warning(
            "join: %d of %d rows of %s and %d of %d rows of %s have no partner and are dropped",
            *(lost_images, len(image), image.name, lost_texts, len(text), text.name),
        )
    return image_rows.astype(np.int64), text_rows.astype(np.int64)


def counts_rows(table: FeatureTable) -> bool:
    """Whether ids look like numbers of rows, which `sotalign encode` gives where there are no ids.

    That is 0, 1, 2, ... in this order, of which some may be missing (rows that could not be
    encoded) and some repeated (several texts of one row), but no more than half are missing.
    """
    numbers = _numbers(table.ids)
    return numbers is not None and _dense(numbers) and not (np.diff(numbers) < 0).any()


def numbers_with_gaps(table: FeatureTable) -> bool:
    """Whether ids are whole numbers most of which are missing, as those of COCO's images."""
    numbers = _numbers(table.ids)
    return numbers is not None and not _dense(numbers)


def numbered_otherwise(image: FeatureTable, text: FeatureTable) -> str:
    """Why numbers that two tables share are hardly the same ids, or ``""``.

    One table counts its rows, and the ids of the other are numbers with gaps.
    """
    for rows, other in ((image, text), (text, image)):
        if numbers_with_gaps(other) and counts_rows(rows):
            return (
                f"ids of {rows.name} count its rows, those of {other.name} are other numbers; "
                f"encode {rows.name} with a column of ids (--column=id:NAME), unless they are "
                "numbers of the same rows"
            )
    return ""


def _numbers(ids: np.ndarray | None) -> np.ndarray | None:
    """Ids as integers, or None unless all are whole numbers without zeros before them."""
    if ids is None or not len(ids) or not (str(ids[0]).isdecimal() and str(ids[-1]).isdecimal()):
        return None
    if np.char.str_len(ids).max() > 18 or not np.char.isdecimal(ids).all():
        return None
    numbers = ids.astype(np.int64)
    return numbers if (numbers.astype(ids.dtype) == ids).all() else None


def _dense(numbers: np.ndarray) -> bool:
    return bool(2 * len(np.unique(numbers)) > numbers.max())


def pair(image: FeatureTable, text: FeatureTable, *, on: str = "auto") -> Pairs:
    """Joins two tables into `Pairs`, keeping every text of every joined image.

    Args:
        image: the images; each id at most once.
        text: the texts; an id may be repeated.
        on: as in `join`.

    Returns:
        Texts in the order of their table. If no image has two texts, images in the order of the
        texts (one-to-one); else images in the order of their table.

    Raises:
        ValueError: as `join`.
    """
    image_rows, text_rows = join(image, text, on=on)
    unique, inverse = np.unique(image_rows, return_inverse=True)
    if len(unique) == len(image_rows):
        unique, inverse = image_rows, np.arange(len(image_rows))
    return Pairs(image.select(unique), text.select(text_rows), inverse)


def split_pairs(
    image: FeatureTable,
    text: FeatureTable,
    *,
    n_pairs: int,
    n_unpaired: int | None = None,
    mode: str = "aligned",
    seed: int = 0,
    unpaired_image: FeatureTable | None = None,
    unpaired_text: FeatureTable | None = None,
    exclude: Sequence[str] | np.ndarray | None = None,
    on: str = "auto",
) -> tuple[Pairs, FeatureTable, FeatureTable]:
    """Draws pairs and unpaired rows from one seed.

    An item is an image with all its texts. Items are put in random order; the first `n_pairs`
    give the pairs (where an image has several texts, one of them at random). Unpaired rows are

    * "aligned": the items that remain, on both sides, each side shuffled for itself, so that the
      partner of a row is there but its place is not known;
    * "disjoint": the remaining items cut in halves, images from one, texts from the other, so that
      no unpaired row has a partner;
    * "independent": `unpaired_image` and `unpaired_text`, from other corpora, shuffled.

    With one seed, fewer pairs are a prefix of more pairs, `n_unpaired` does not change the pairs,
    and in the modes "disjoint" and "independent" fewer unpaired rows are a prefix of more.
    The unpaired tables keep their ids: they are for checks, not for training.

    Args:
        image: the images of the paired corpus.
        text: its texts.
        n_pairs: pairs to draw, at least 1.
        n_unpaired: unpaired rows of each side; None takes all.
        mode: where unpaired rows come from (default "aligned").
        seed: of all draws (default 0).
        unpaired_image: other images, in mode "independent" only.
        unpaired_text: other texts, in mode "independent" only.
        exclude: ids that must not be drawn (those of val and test); dropped from every table that
            has ids, and the paired corpus must have them.
        on: as in `join`.

    Returns:
        ``(pairs, unpaired_image, unpaired_text)``.

    Raises:
        ValueError: more pairs or unpaired rows asked than exist, an unknown mode, tables that
            do not fit the mode, `exclude` without ids, or as `join`.
    """
    if mode not in ("aligned", "disjoint", "independent"):
        raise ValueError(f"mode must be 'aligned', 'disjoint' or 'independent', got {mode!r}")
    if (mode == "independent") != (unpaired_image is not None and unpaired_text is not None) or (
        (unpaired_image is None) != (unpaired_text is None)
    ):
        raise ValueError(
            f"mode={mode!r}: unpaired_image and unpaired_text must both be given in mode "
            f"'independent', and neither in the others"
        )
    if n_pairs < 1:
        raise ValueError(f"n_pairs must be at least 1, got {n_pairs}")
    if n_unpaired is not None and n_unpaired < 0:
        raise ValueError(f"n_unpaired must not be negative, got {n_unpaired}")
    image_rows, text_rows = join(image, text, on=on)
    if exclude is not None:
        if image.ids is None:
            raise ValueError(f"exclude: {image.name} has no ids to compare with")
        keep = ~np.isin(image.ids[image_rows], np.asarray(exclude, dtype=str))
        image_rows, text_rows = image_rows[keep], text_rows[keep]

    items, starts = _items(image_rows)
    if n_pairs > len(items):
        raise ValueError(
            f"n_pairs: {n_pairs} asked, but {image.name} and {text.name} have {len(items)}"
        )
    # Each draw has its own generator, so that none depends on how many another needs.
    rng_items, rng_text, rng_left, rng_right = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(4)
    )
    by_item = text_rows[np.argsort(image_rows, kind="stable")]
    counts = np.diff(np.append(starts, len(by_item)))
    one_text = by_item[starts + np.floor(rng_text.random(len(items)) * counts).astype(np.int64)]
    order = rng_items.permutation(len(items))
    chosen, rest = order[:n_pairs], order[n_pairs:]
    pairs = Pairs(
        image.select(items[chosen], name=f"{image.name} (pairs)"),
        text.select(one_text[chosen], name=f"{text.name} (pairs)"),
        np.arange(n_pairs),
    )

    if unpaired_image is not None and unpaired_text is not None:
        _same_dim(image, unpaired_image)
        _same_dim(text, unpaired_text)
        left = _not_excluded(unpaired_image, exclude)
        right = _not_excluded(unpaired_text, exclude)
        left_source, right_source = unpaired_image, unpaired_text
    else:
        left_items = right_items = rest
        if mode == "disjoint":
            left_items, right_items = np.array_split(rest, 2)
        elif n_unpaired is not None and n_unpaired <= len(rest):
            left_items = right_items = rest[:n_unpaired]
        left = items[left_items]
        right = by_item[_ranges(starts[right_items], counts[right_items])]
        left_source, right_source = image, text
    return (
        pairs,
        _draw(left_source, left, n_unpaired, rng_left),
        _draw(right_source, right, n_unpaired, rng_right),
    )


def _items(image_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct image rows, and where the texts of each start once sorted by image row."""
    return np.unique(np.sort(image_rows, kind="stable"), return_index=True)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers ``start .. start + count - 1`` of every range, one range after another."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))


def _not_excluded(table: FeatureTable, exclude) -> np.ndarray:
    if exclude is None or table.ids is None:
        return np.arange(len(table))
    return np.flatnonzero(~np.isin(table.ids, np.asarray(exclude, dtype=str)))


def _draw(
    table: FeatureTable, rows: np.ndarray, count: int | None, rng: np.random.Generator
) -> FeatureTable:
    if count is not None and count > len(rows):
        raise ValueError(
            f"n_unpaired: {count} asked, but {table.name} has {len(rows)} rows that are not pairs"
        )
    return table.select(rng.permutation(rows)[:count], name=f"{table.name} (unpaired)")
