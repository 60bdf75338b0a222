"""Real features that ship with the package: emoji and clip art, small enough to embed.

What the files are, their origin and licences, and what to expect of each method: ``data/README.md``
beside this module.
"""

import csv
import functools
import importlib.resources

import numpy as np

from sotalign_jax.features.splits import Pairs, Splits
from sotalign_jax.features.store import FeatureTable, Manifest, concat

__all__ = [
    "emoji",
    "emoji_metadata",
    "emoji_pairs",
    "emoji_table",
    "openclipart_metadata",
    "openclipart_table",
]

EMOJI_IMAGES = ("google", "fluent3d")
EMOJI_TEXTS = ("label_tags", "label")

IMAGE = {
    "encoder": "EfficientNet-Lite2 (ImageNet-1k, 260 px)",
    "pooling": "global average",
    "normalized": False,
}
TEXT = {"encoder": "all-MiniLM-L6-v2", "pooling": "masked mean", "normalized": True}
# File -> (encoder, source, licence).
FILES = {
    "emoji_image_google": (IMAGE, "Noto Emoji drawings", "Apache-2.0"),
    "emoji_image_fluent3d": (IMAGE, "Microsoft Fluent 3D emoji", "MIT"),
    "emoji_text_label": (TEXT, "CLDR labels of emoji", "MIT, Unicode"),
    "emoji_text_label_tags": (TEXT, "CLDR labels and tags of emoji", "MIT, Unicode"),
    "openclipart_image": (IMAGE, "Openclipart drawings", "public domain"),
    "openclipart_text": (TEXT, "Openclipart titles and keywords", "public domain"),
}


def _one_of(value: str, choices: tuple[str, ...], name: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _resource(file: str):
    return importlib.resources.files("sotalign_jax.features").joinpath("data", file)


@functools.cache
def _columns(file: str) -> dict[str, np.ndarray]:
    header, *rows = csv.reader(_resource(file).read_text(encoding="utf-8").splitlines())
    columns = {name: np.array([row[i] for row in rows]) for i, name in enumerate(header)}
    for column in columns.values():
        column.setflags(write=False)
    return columns


@functools.cache
def _table(file: str) -> FeatureTable:
    with _resource(f"{file}.npy").open("rb") as stream:
        array = np.load(stream, allow_pickle=False)
    encoder, source, licence = FILES[file]
    return FeatureTable.from_array(
        array,
        ids=_columns(f"{file.split('_')[0]}.csv")["id"],
        name=file.replace("_", " ", 2),
        manifest=Manifest(
            **encoder,
            dim=array.shape[1],
            dtype=array.dtype.name,
            rows=len(array),
            source=source,
            licence=licence,
        ),
    )


def emoji_table(what: str) -> FeatureTable:
    """All 1,344 emoji in one of four views, in the row order of `emoji_metadata`.

    Args:
        what: image features (1,280 columns, not normalised) of the drawings of "google" (Noto
            Emoji) or "fluent3d" (Microsoft), or text features (384 columns, unit length) of the
            "label" ("baby bottle") or of "label_tags" ("baby bottle: babies, birth, ...").

    Returns:
        A table whose ids are code points, as "1F37C".

    Raises:
        ValueError: an unknown name.
    """
    _one_of(what, EMOJI_IMAGES + EMOJI_TEXTS, "what")
    modality = "image" if what in EMOJI_IMAGES else "text"
    return _table(f"emoji_{modality}_{what}")


def openclipart_table(what: str) -> FeatureTable:
    """The 3,732 pieces of clip art, in the row order of `openclipart_metadata`.

    Args:
        what: "image" (1,280 columns, not normalised) or "text" (384 columns, unit length; title
            and keywords, noisy, some of it Italian).

    Returns:
        A table whose ids are paths, as "animals/armadillo_architetto_fra_01".

    Raises:
        ValueError: an unknown name.
    """
    _one_of(what, ("image", "text"), "what")
    return _table(f"openclipart_{what}")


def emoji_metadata() -> dict[str, np.ndarray]:
    """What is known of each emoji.

    Returns:
        Columns of 1,344 strings: "id" (code points), "character", "split" ("train", "val" or
        "test"), "family" (emoji that differ in skin tone or gender share one), "category",
        "label" and "label_tags" (the captions).
    """
    return dict(_columns("emoji.csv"))


def openclipart_metadata() -> dict[str, np.ndarray]:
    """What is known of each piece of clip art.

    Returns:
        Columns of 3,732 strings: "id" and "text" (the caption).
    """
    return dict(_columns("openclipart.csv"))


def emoji_pairs(split: str, *, image: str = "google", text: str = "label_tags") -> Pairs:
    """All pairs of one split of the emoji.

    Args:
        split: "train", "val" or "test".
        image: drawings, "google" (default) or "fluent3d".
        text: captions, "label_tags" (default) or "label".

    Returns:
        One-to-one pairs with ids.

    Raises:
        ValueError: an unknown name.
    """
    _one_of(split, ("train", "val", "test"), "split")
    _one_of(image, EMOJI_IMAGES, "image")
    _one_of(text, EMOJI_TEXTS, "text")
    rows = np.flatnonzero(_columns("emoji.csv")["split"] == split)
    return _emoji_pairs(rows, split, image, text)


def _emoji_pairs(rows: np.ndarray, name: str, image: str, text: str) -> Pairs:
    return Pairs(
        emoji_table(image).select(rows, name=f"emoji {name} image"),
        emoji_table(text).select(rows, name=f"emoji {name} text"),
        np.arange(len(rows)),
    )


def emoji(
    *,
    n_pairs: int = 300,
    seed: int = 0,
    image: str = "google",
    text: str = "label_tags",
    unpaired: str = "emoji",
) -> Splits:
    """The embedded job: emoji drawings and their captions.

    800 emoji are for training, 144 for choosing hyper-parameters, 400 for the report; variants of
    one emoji never straddle these. The pairs are drawn from the 800; with one seed, fewer pairs are
    a prefix of more.

    The unpaired pool "emoji" is the train emoji that are not pairs: both vendors' drawings on one
    side, both captions on the other, each side shuffled for itself, so that the partners are
    there and unknown. The pool "openclipart" is another corpus, shuffled likewise.

    Args:
        n_pairs: pairs to draw, 1 to 800 (default 300); at 800 the pool "emoji" is empty.
        seed: of the draw (default 0).
        image: drawings of pairs, val and test: "google" (default) or "fluent3d".
        text: captions of pairs, val and test: "label_tags" (default) or "label".
        unpaired: where unpaired rows come from: "emoji" (default) or "openclipart".

    Returns:
        Splits with ids; val and test are one-to-one.

    Raises:
        ValueError: more pairs asked than exist, or an unknown name.
    """
    _one_of(image, EMOJI_IMAGES, "image")
    _one_of(text, EMOJI_TEXTS, "text")
    _one_of(unpaired, ("emoji", "openclipart"), "unpaired")
    train = np.flatnonzero(_columns("emoji.csv")["split"] == "train")
    if not 1 <= n_pairs <= len(train):
        raise ValueError(f"n_pairs: {n_pairs} asked, the train split has {len(train)} emoji")
    rng_pairs, rng_image, rng_text = (
        np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(3)
    )
    order = rng_pairs.permutation(train)

    if unpaired == "emoji":
        rest = order[n_pairs:]
        pool_image = concat([emoji_table(what).select(rest) for what in EMOJI_IMAGES])
        pool_text = concat([emoji_table(what).select(rest) for what in EMOJI_TEXTS])
    else:
        pool_image, pool_text = openclipart_table("image"), openclipart_table("text")
    return Splits(
        pairs=_emoji_pairs(order[:n_pairs], "pairs", image, text),
        unpaired_image=pool_image.select(
            rng_image.permutation(len(pool_image)), name=f"{unpaired} unpaired image"
        ),
        unpaired_text=pool_text.select(
            rng_text.permutation(len(pool_text)), name=f"{unpaired} unpaired text"
        ),
        val=emoji_pairs("val", image=image, text=text),
        test=emoji_pairs("test", image=image, text=text),
        description=(
            f"{n_pairs} emoji ({image} drawings, {text} captions, seed {seed}), "
            f"unpaired from {unpaired}"
        ),
    )
