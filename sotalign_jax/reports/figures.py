"""Figures as SVG inside a page, in the colours of the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

from sotalign_jax.reports.markup import Markup, tag

__all__ = ["COLOURS", "check_plots", "figure"]

# Stand-ins, each replaced by a colour of the style sheet.
_INK, _LINE = "#010203", "#010204"
_SERIES = tuple(f"#0103{i:02x}" for i in range(8))
_NAMES = {_INK: "currentColor", _LINE: "var(--line)"} | {
    colour: f"var(--s{i})" for i, colour in enumerate(_SERIES)
}
# For ``color`` of matplotlib: the colours of series, in order.
COLOURS = _SERIES

_STYLE = {
    "svg.fonttype": "none",  # text stays text: found by a search, read aloud, in the page's font
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "grid.color": _LINE,
    "grid.linewidth": 0.6,
    "xtick.color": _LINE,
    "xtick.labelcolor": _INK,
    "ytick.color": _LINE,
    "ytick.labelcolor": _INK,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
}


def check_plots() -> None:
    """Raises ImportError, which says what to install, where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "report: its curves are drawn by matplotlib; install the extra, sotalign-jax[plots]"
        ) from error


def figure(
    name: str,
    draw: Callable[[Any], None],
    *,
    title: str,
    note: str = "",
    size: tuple[float, float] = (4.6, 2.7),
) -> Markup:
    """A figure with its caption.

    Args:
        name: no other figure of the page has it.
        draw: given the ``matplotlib`` axes, draws on them in `COLOURS`.
        title: what is shown.
        note: more on it.
        size: in inches, of which the page takes the proportions.

    Returns:
        A ``figure`` element.
    """
    import matplotlib
    from matplotlib.figure import Figure

    file = io.BytesIO()
    style: Any = _STYLE | {"svg.hashsalt": name}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user has set for figures of their own
        matplotlib.rcParams.update(style)
        canvas = Figure(figsize=size, layout="constrained")
        draw(canvas.add_subplot())
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    caption = tag("figcaption", tag("b", title), f" {note}" if note else None)
    return tag("figure", caption, _inline(file.getvalue(), name, title))


def _inline(svg: bytes, name: str, title: str) -> Markup:
    """What matplotlib wrote as a part of a page that has more such parts.

    Without names of namespaces, which HTML does not need; without the style of the whole document,
    metadata and names that nothing refers to; the others made the figure's own.
    """
    root = ElementTree.fromstring(svg)
    used = set(re.findall(rb"#([\w-]+)", svg))
    for parent in root.iter():
        for child in [c for c in parent if _local(c.tag) in ("metadata", "style")]:
            parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        if "id" in attributes and attributes["id"].encode() not in used:
            del attributes["id"]
        for key, value in attributes.items():
            if key == "id":
                value = f"{name}-{value}"
            value = re.sub(r"url\(#", f"url(#{name}-", value)
            if key == "href":
                value = f"#{name}-{value.removeprefix('#')}"
            attributes[key] = re.sub(r"#01[0-9a-f]{4}", lambda m: _NAMES.get(m[0], m[0]), value)
        element.attrib.clear()
        element.attrib.update(attributes)
    for text in root.iter("text"):
        text.set("style", re.sub(r"font-family:[^;]*;", "", text.get("style", "")))
    for key in ("version", "width", "height"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": title}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _local(name: str) -> str:
    return name.rpartition("}")[2]
