"""Aligners that are fitted in one go, without training steps, by name."""

import os
from collections.abc import Mapping
from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Float

from sotalign_jax.fitted.asif import ASIF, Asif, AsifOptions, asif
from sotalign_jax.fitted.base import (
    FORMAT,
    FORMAT_VERSIONS,
    FittedAligner,
    Method,
    Options,
    make_options,
)
from sotalign_jax.fitted.csa import CSA, Csa, CsaOptions, csa
from sotalign_jax.fitted.sue import SUE, Sue, SueOptions, sue
from sotalign_jax.models import Aligner
from sotalign_jax.models.saved import CONFIG_FILE, read_document, saved_format, saved_path

__all__ = [
    "FITTED",
    "FORMAT",
    "Asif",
    "AsifOptions",
    "Csa",
    "CsaOptions",
    "FittedAligner",
    "Method",
    "Options",
    "Sue",
    "SueOptions",
    "asif",
    "csa",
    "fit",
    "load",
    "load_aligner",
    "reads_unpaired",
    "sue",
]

# One more method is one more file, and a line here.
FITTED: dict[str, Method] = {"asif": ASIF, "csa": CSA, "sue": SUE}


def fit(
    name: str,
    image: Float[ArrayLike, "n dx"],
    text: Float[ArrayLike, "m dy"],
    unpaired_image: Float[ArrayLike, "p ex"] | None = None,
    unpaired_text: Float[ArrayLike, "q ey"] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> FittedAligner:
    """An aligner of the pairs, and of the unpaired rows where its method reads them.

    Args:
        name: one of `FITTED`.
        image: ``(n, dx)`` image rows of the pairs, any floating dtype.
        text: ``(n, dy)`` their text rows.
        unpaired_image: further image rows; None will do unless `reads_unpaired`.
        unpaired_text: further text rows, likewise.
        options: options of the method by name; those that are not given have their defaults.
        seed: of whatever is random.

    Returns:
        The aligner.

    Raises:
        ValueError: an unknown name or option, or rows that cannot be used.
    """
    method = _method(name)
    settings = dict(options or {})
    if not reads_unpaired(name, settings):
        unpaired_image = unpaired_text = None
    return method.fit(image, text, unpaired_image, unpaired_text, seed=seed, **settings)


def reads_unpaired(name: str, options: Mapping[str, Any] | None = None) -> bool:
    """Whether a method reads unpaired rows with these options.

    Args:
        name: one of `FITTED`.
        options: as for `fit`.

    Returns:
        The answer.

    Raises:
        ValueError: an unknown name, or an option that is unknown, of another type or out of range.
    """
    method = _method(name)
    return method.reads_unpaired(make_options(method.options, options or {}))


def load(directory: str | os.PathLike) -> FittedAligner:
    """Reads what `FittedAligner.save` wrote.

    Args:
        directory: the aligner's directory.

    Returns:
        The aligner, bit for bit.

    Raises:
        ValueError: the directory holds no fitted aligner, one of another format version or of an
            unknown method, or tensors that are damaged, missing, unknown or of the wrong shape.
    """
    path = saved_path(directory)
    document = read_document(path, FORMAT, FORMAT_VERSIONS)
    kind = document.get("kind")
    if kind not in FITTED:
        raise ValueError(
            f"{path / CONFIG_FILE}: kind {kind!r} is unknown; known are {', '.join(FITTED)}"
        )
    return FITTED[kind].aligner.from_saved(path, document, FITTED[kind].options)


def load_aligner(directory: str | os.PathLike) -> Aligner | FittedAligner:
    """An aligner of layers, or a fitted one: whichever was saved.

    Args:
        directory: the aligner's directory.

    Returns:
        The aligner, bit for bit.

    Raises:
        ValueError: as `load` and `sotalign_jax.models.Aligner.load`.
    """
    return load(directory) if saved_format(directory) == FORMAT else Aligner.load(directory)


def _method(name: str) -> Method:
    if name not in FITTED:
        raise ValueError(f"name: got {name!r}; must be one of {', '.join(FITTED)}")
    return FITTED[name]
