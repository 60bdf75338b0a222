"""HTML of a page that stands alone: escaped by default, one style sheet, nothing to fetch."""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Iterable, Sequence

__all__ = ["GENERATOR", "Markup", "fold", "page", "section", "table", "tag"]

# By this a report knows a file that it may replace.
GENERATOR = "sotalign report"

# The page may show what it carries, and ask for nothing else.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_VOID = ("br", "hr", "img", "meta")


class Markup(str):
    """Text that is HTML already; any other text is escaped where it goes into a `tag`."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: `Markup` as it is, None left out, all else as escaped text.
        attributes: escaped; those that are None are left out. ``class_`` is ``class``, and
            ``aria_label`` is ``aria-label``.

    Returns:
        The element as HTML.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(_escaped(child) for child in children if child is not None)
    return Markup(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{inner}</{name}>")


def _escaped(child: object) -> str:
    return child if isinstance(child, Markup) else html.escape(str(child))


def section(heading: str, *children: object) -> Markup:
    """A part of the page, with a heading."""
    return tag("section", tag("h2", heading), *children)


def fold(summary: str, *children: object, **attributes: object) -> Markup:
    """What is shown on demand."""
    return tag("details", tag("summary", summary), *children, **attributes)


def table(
    heads: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    caption: str | None = None,
    text: int = 1,
) -> Markup:
    """A table that scrolls for itself where it is wider than the page.

    Args:
        heads: of the columns.
        rows: cells; the first of each heads its row.
        caption: above the table.
        text: so many columns from the left hold text; the others hold numbers, to the right.

    Returns:
        The table as HTML.
    """

    def cell(kind: str, column: int, child: object, **attributes: object) -> Markup:
        number = "n" if column >= text else None
        return tag(kind, child, class_=number, **attributes)

    head = tag("tr", *(cell("th", i, h, scope="col") for i, h in enumerate(heads)))
    body = [
        tag("tr", tag("th", first, scope="row"), *(cell("td", i, c) for i, c in enumerate(rest, 1)))
        for first, *rest in rows
    ]
    title = None if caption is None else tag("caption", caption)
    return tag("div", tag("table", title, tag("thead", head), tag("tbody", *body)), class_="wide")


def page(title: str, *children: object) -> str:
    """A whole document.

    Args:
        title: of the window.
        children: of its ``main``.

    Returns:
        The text of the file.
    """
    style = importlib.resources.files("sotalign_jax.reports").joinpath("style.css")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="generator", content=GENERATOR),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(style.read_text(encoding="utf-8"))),
    )
    body = tag("body", tag("main", *children))
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"
