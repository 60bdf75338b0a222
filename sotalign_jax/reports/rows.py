"""How the rows of held-out pairs look to a person."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from sotalign_jax import features
from sotalign_jax.config import Config
from sotalign_jax.features import FeatureTable, Pairs
from sotalign_jax.reports.markup import Markup, tag

__all__ = ["View", "view_rows"]

# Of a picture on the page, in pixels.
_SIDE = 128


class View(NamedTuple):
    """What can be seen of a row.

    Attributes:
        name: its id, or its number.
        caption: of a text; empty where none is kept.
        picture: of an image; None where there is none.
    """

    name: str
    caption: str = ""
    picture: Markup | None = None

    def show(self) -> list[Markup | None]:
        """Picture, caption, and the id."""
        caption = tag("span", self.caption) if self.caption else None
        return [self.picture, caption, tag("span", " ", self.name, class_="id")]


def view_rows(
    config: Config, pairs: Pairs, split: str, *, image: Sequence[int], text: Sequence[int]
) -> tuple[dict[int, View], dict[int, View], list[str]]:
    """Views of some rows of the pairs that a configuration loads.

    Args:
        config: a validated configuration.
        pairs: its held-out pairs.
        split: which of them, "val" or "test".
        image: rows of the images.
        text: rows of the texts.

    Returns:
        Views of the images and of the texts, and what was wrong with pictures or captions.
    """
    tables = {"image": pairs.image, "text": pairs.text}
    rows = {"image": sorted(set(map(int, image))), "text": sorted(set(map(int, text)))}
    problems: list[str] = []
    pictures: Mapping[int, Markup] = {}
    captions: Mapping[int, str] = {}
    if config.data.name == "files":
        paths = {side: _path(config.data.files, split, side) for side in tables}
        try:
            found = features.read_thumbnails(paths["image"], pairs.image, rows["image"])
            pictures = {
                row: picture
                for row, content in found.items()
                if (picture := _picture(content, _name(pairs.image, row), problems)) is not None
            }
        except (ValueError, OSError) as error:
            problems.append(str(error))
        try:
            captions = features.read_captions(paths["text"], pairs.text, rows["text"])
        except (ValueError, OSError) as error:
            problems.append(str(error))
    known = features.emoji_metadata()
    columns = (known[name] for name in ("id", "character", "label"))
    of_id = {one: (character, label) for one, character, label in zip(*columns, strict=True)}
    if not pictures and _all_known(pairs.image, of_id):
        pictures = {row: _character(*of_id[_name(pairs.image, row)]) for row in rows["image"]}
    if not captions and _all_known(pairs.text, of_id):
        column = config.data.emoji.text if config.data.name == "emoji" else "label"
        by_id = dict(zip(known["id"], known[column], strict=True))
        captions = {row: str(by_id[_name(pairs.text, row)]) for row in rows["text"]}
    images = {row: View(_name(pairs.image, row), "", pictures.get(row)) for row in rows["image"]}
    texts = {row: View(_name(pairs.text, row), captions.get(row, "")) for row in rows["text"]}
    return images, texts, problems


def _path(files: Config, split: str, side: str) -> str:
    """Of the features that the pairs of a split come from."""
    return files[f"{split}_{side}"] or files[side]


def _name(table: FeatureTable, row: int) -> str:
    return f"row {row}" if table.ids is None else str(table.ids[row])


def _all_known(table: FeatureTable, ids: Mapping[str, object]) -> bool:
    """Whether all ids are code points of emoji: a single one might be some other number."""
    return table.ids is not None and all(str(one) in ids for one in table.ids)


def _character(character: str, label: str) -> Markup:
    """An emoji, which is its own picture."""
    return tag("span", character, class_="emoji", role="img", aria_label=label)


def _picture(content: bytes, name: str, problems: list[str]) -> Markup | None:
    """A picture small enough to carry along, drawn anew: what is no picture does not get in."""
    from PIL import Image  # comes with matplotlib

    try:
        with Image.open(io.BytesIO(content)) as opened:
            opened.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # a JPEG need not be read in full
            clear = "A" in opened.getbands() or "transparency" in opened.info
            small = opened.convert("RGBA" if clear else "RGB")
        small.thumbnail((_SIDE, _SIDE))
        kind = "PNG" if small.mode == "RGBA" else "JPEG"
        out = io.BytesIO()
        small.save(out, kind)
    except Exception as error:  # each format has its own, and so have bombs
        problems.append(f"thumbnail of {name}: not a readable picture ({error})")
        return None
    data = base64.b64encode(out.getvalue()).decode()
    width, height = small.size
    source = f"data:image/{kind.lower()};base64,{data}"
    return tag("img", src=source, alt=name, width=width, height=height)
