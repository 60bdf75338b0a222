"""What the aligners that are fitted in one go have in common: embeddings, options, files."""

import abc
import dataclasses
import functools
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

import sotalign_jax
from sotalign_jax.models.saved import (
    CONFIG_FILE,
    TENSORS_FILE,
    json_metadata,
    read_tensors,
    write_model,
)
from sotalign_jax.numerics import unit_rows64

__all__ = [
    "FORMAT",
    "FORMAT_VERSIONS",
    "FittedAligner",
    "Method",
    "Options",
    "checked_pairs",
    "checked_rows",
    "fitted_aligner",
    "make_options",
    "mean_row",
    "static_field",
]

FORMAT = "sotalign_jax.fitted"
FORMAT_VERSIONS = (1,)
# Rows looked at together where a pass over all of them needs no more.
CHUNK = 8_192
_Class = TypeVar("_Class", bound=type)
_Options = TypeVar("_Options", bound="Options")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a method: a frozen dataclass of names, numbers and truth values with defaults.

    One that is annotated with a ``Literal`` takes no other value than those it names.
    """

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if typing.get_origin(hint) is Literal and value not in typing.get_args(hint):
                choices = ", ".join(typing.get_args(hint))
                raise ValueError(f"{name}: got {value!r}; must be one of {choices}")
        self.check()

    def check(self) -> None:
        """Raises ValueError ``"field: got ..."`` for a value out of range."""


def static_field() -> Any:
    """A field of an aligner that is no array; of those that `fitted_aligner` makes pytrees of."""
    return dataclasses.field(metadata={"static": True})


@typing.dataclass_transform(frozen_default=True, kw_only_default=True, eq_default=False)
def fitted_aligner(cls: _Class) -> _Class:
    """Makes a class a frozen dataclass with keyword arguments, and a pytree of its arrays.

    Args:
        cls: a `FittedAligner` whose fields are arrays, None, or dicts of arrays (which may be
            nested, with names that have no dot), and ``options``, a `static_field`.

    Returns:
        The class.
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True, eq=False)(cls)
    return jax.tree_util.register_dataclass(cls)


class FittedAligner(abc.ABC):
    """An aligner without training steps: inner products of its embeddings are the similarities.

    A subclass is decorated with `fitted_aligner`, has a ``kind`` under which it is registered in
    `sotalign_jax.fitted.FITTED`, and says how rows are embedded. Nothing may renormalise the rows
    that come out, unless ``unit`` says that they have length 1 anyway.

    Attributes:
        kind: name of the method.
        options: what it was fitted with.
    """

    kind: ClassVar[str]
    options: Any

    @property
    @abc.abstractmethod
    def image_dim(self) -> int:
        """Width of the image features."""

    @property
    @abc.abstractmethod
    def text_dim(self) -> int:
        """Width of the text features."""

    @property
    @abc.abstractmethod
    def dim(self) -> int:
        """Width of the embeddings."""

    @property
    @abc.abstractmethod
    def unit(self) -> bool:
        """Whether embeddings have unit length, so that similarities are cosines."""

    @property
    @abc.abstractmethod
    def recipe(self) -> str:
        """The embedding in one line, as the tensors' names spell it."""

    @abc.abstractmethod
    def _embed(self, side: str, rows: Float[Array, "n d"]) -> Float[Array, "n dim"]:
        """Float32 raw rows of a side, ``"image"`` or ``"text"``, of the right width, embedded."""

    def embed_image(self, raw: Float[ArrayLike, "*n image_dim"]) -> Float[Array, "*n dim"]:
        """Raw image features to rows whose inner products with those of texts are similarities.

        Args:
            raw: ``(n, image_dim)`` or one row ``(image_dim,)``, any floating dtype, as the encoder
                gave them.

        Returns:
            ``(n, dim)`` or ``(dim,)`` float32; of unit length only where ``unit``.

        Raises:
            ValueError: when the width is not ``image_dim``.
        """
        return self._embed_side("image", raw, self.image_dim)

    def embed_text(self, raw: Float[ArrayLike, "*n text_dim"]) -> Float[Array, "*n dim"]:
        """Raw text features to rows whose inner products with those of images are similarities.

        Args:
            raw: ``(n, text_dim)`` or one row ``(text_dim,)``, any floating dtype, as the encoder
                gave them.

        Returns:
            ``(n, dim)`` or ``(dim,)`` float32; of unit length only where ``unit``.

        Raises:
            ValueError: when the width is not ``text_dim``.
        """
        return self._embed_side("text", raw, self.text_dim)

    def similarity(
        self, image: Float[ArrayLike, "*n image_dim"], text: Float[ArrayLike, "*m text_dim"]
    ) -> Float[Array, "*n_m"]:
        """Similarity of every image with every text.

        Args:
            image: ``(n, image_dim)`` raw features, or one row.
            text: ``(m, text_dim)`` raw features, or one row.

        Returns:
            ``(n, m)`` float32; the axis of a side given as one row is absent.

        Raises:
            ValueError: when a width is wrong.
        """
        with jax.default_matmul_precision("highest"):
            return jnp.matmul(self.embed_image(image), self.embed_text(text).T)

    def save(self, directory: str | os.PathLike, metadata: Mapping[str, Any] | None = None) -> None:
        """Writes the aligner to a directory that needs no JAX to read; `fitted.load` reads it.

        ``aligner.safetensors`` holds the arrays, ``aligner.json`` the kind, the options, the
        dimensions, the embedding in words (``recipe``) and the metadata. They are written under
        another name and then moved into place, as `sotalign_jax.models.Aligner.save` does.

        Args:
            directory: where to; parents are made. It may exist if it is empty, or holds a fitted
                aligner and nothing else.
            metadata: anything of your own that JSON can hold.

        Raises:
            ValueError: when the directory holds something else, or the metadata is not JSON.
        """
        tensors = {}
        for field in _array_fields(type(self)):
            tensors |= _flat(field.name, getattr(self, field.name))
        document = {
            "format": FORMAT,
            "version": FORMAT_VERSIONS[-1],
            "sotalign_jax": sotalign_jax.__version__,
            "kind": self.kind,
            "options": dataclasses.asdict(self.options),
            "image_dim": self.image_dim,
            "text_dim": self.text_dim,
            "dim": self.dim,
            "tensors": {name: list(value.shape) for name, value in tensors.items()},
            "recipe": self.recipe,
            "metadata": json_metadata(metadata),
        }
        write_model(directory, document, tensors, FORMAT_VERSIONS)

    @classmethod
    def from_saved(
        cls, path: Path, document: Mapping[str, Any], options: type[Options]
    ) -> "FittedAligner":
        """The aligner of this class that a directory holds; `sotalign_jax.fitted.load` calls it.

        Args:
            path: the directory.
            document: its checked JSON.
            options: the class of the options.

        Returns:
            The aligner, bit for bit.

        Raises:
            ValueError: fields or tensors that are damaged, missing, unknown or do not fit.
        """
        file = path / CONFIG_FILE
        try:
            shapes = {name: tuple(shape) for name, shape in document["tensors"].items()}
            settings = make_options(options, document["options"])
            sizes = {name: document[name] for name in ("image_dim", "text_dim", "dim")}
        except KeyError as error:
            raise ValueError(f"{file}: field {error} is missing") from error
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}") from error
        tensors = read_tensors(path / TENSORS_FILE, shapes)
        fields = _nested(tensors)
        known = {field.name: field for field in _array_fields(cls)}
        needed = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        for problem, names in (
            ("not part of this aligner", fields.keys() - known.keys()),
            ("missing", needed - fields.keys()),
        ):
            if names:
                raise ValueError(f"{file}: tensors {problem}: {', '.join(sorted(names))}")
        aligner = cls(**{"options": settings, **fields})
        for name, size in sizes.items():
            if getattr(aligner, name) != size:
                raise ValueError(
                    f"{file}: {name} is {size!r}, but the tensors have {getattr(aligner, name)}"
                )
        return aligner

    def _embed_side(self, side: str, raw, width: int):
        raw = jnp.asarray(raw)
        if raw.ndim not in (1, 2) or raw.shape[-1] != width:
            raise ValueError(f"{side}: got shape {raw.shape}; expected (n, {width}) or ({width},)")
        rows = _compiled_embed(self, side, raw.astype(jnp.float32).reshape(-1, width))
        return rows.reshape(*raw.shape[:-1], self.dim)


@functools.partial(jax.jit, static_argnames="side")
def _compiled_embed(aligner: FittedAligner, side: str, rows: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return aligner._embed(side, rows)


class Method(NamedTuple):
    """How an aligner is fitted, as `sotalign_jax.fitted.FITTED` lists it.

    Attributes:
        fit: ``fit(image, text, unpaired_image, unpaired_text, *, seed, **options)``, of the pairs
            and of the unpaired rows, or None where ``reads_unpaired`` says that they do not matter.
        aligner: class of what it returns.
        options: class of its options.
        published: the options as in the published code, where they differ from the defaults.
        grid: values of options that are worth trying.
        reads_unpaired: whether unpaired rows are read with some options.
    """

    fit: Callable[..., FittedAligner]
    aligner: type[FittedAligner]
    options: type[Options]
    published: Mapping[str, Any]
    grid: Mapping[str, tuple]
    reads_unpaired: Callable[[Any], bool]


def make_options(cls: type[_Options], given: Mapping[str, Any]) -> _Options:
    """The options of a method, each known and of the type of its default.

    Args:
        cls: their dataclass.
        given: some of them by name; the others have their defaults.

    Returns:
        The options.

    Raises:
        ValueError: naming an option that is unknown, of another type, or out of range.
    """
    known = {field.name: field.default for field in dataclasses.fields(cls)}
    values = {}
    for name, value in given.items():
        if name not in known:
            raise ValueError(f"{name}: no such option; known are {', '.join(known)}")
        expected = type(known[name])
        if expected is float and type(value) is int:
            value = float(value)
        if type(value) is not expected:
            raise ValueError(f"{name}: got {value!r}; must be of type {expected.__name__}")
        values[name] = value
    return cls(**values)


def checked_rows(name: str, rows: ArrayLike | None, dim: int | None = None) -> np.ndarray:
    """Rows of features as a NumPy array, of which nothing was copied if they were one.

    Args:
        name: what errors call them.
        rows: ``(n, d)`` array of any floating dtype.
        dim: the width that they must have, if they must have one.

    Returns:
        The rows, every one of them finite.

    Raises:
        ValueError: no matrix, no rows, another width, or NaN or infinity.
    """
    if rows is None:
        raise ValueError(f"{name}: needed with these options; give (n, d) rows")
    rows = np.asarray(rows)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"{name}: shape {rows.shape}; rows by features, (n, d), are needed")
    if len(rows) == 0:
        raise ValueError(f"{name}: holds no rows; at least one is needed")
    if dim is not None and rows.shape[1] != dim:
        raise ValueError(f"{name}: {rows.shape[1]} features, but the pairs have {dim}")
    for start in range(0, len(rows), CHUNK):
        finite = np.isfinite(rows[start : start + CHUNK]).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{name}: row {start + int(np.argmin(finite))} holds NaN or infinity; every "
                "feature must be finite"
            )
    return rows


def checked_pairs(image: ArrayLike, text: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Both sides of the pairs by `checked_rows`; ValueError where they are not equally many."""
    image, text = checked_rows("image", image), checked_rows("text", text)
    if len(image) != len(text):
        raise ValueError(
            f"text: {len(text)} rows, but image has {len(image)}; row i of one must belong to "
            "row i of the other"
        )
    return image, text


def mean_row(
    name: str, rows: ArrayLike | None, dim: int, *, normalize: bool = True
) -> Float[np.ndarray, "dim"]:
    """The mean of rows in float64, read by chunks.

    Args:
        name: what errors call them.
        rows: ``(n, dim)`` of any floating dtype.
        dim: the width that they must have.
        normalize: scale each row to unit length first.

    Returns:
        ``(dim,)`` float64.

    Raises:
        ValueError: for rows that `checked_rows` refuses.
    """
    rows = checked_rows(name, rows, dim)
    total = np.zeros(dim)
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK].astype(np.float64)
        total += (unit_rows64(chunk) if normalize else chunk).sum(axis=0)
    return total / len(rows)


def _array_fields(cls: type) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(cls) if not field.metadata.get("static")]


def _flat(name: str, value: Any) -> dict[str, np.ndarray]:
    if value is None:
        return {}
    if isinstance(value, dict):
        parts = [_flat(f"{name}.{key}", part) for key, part in value.items()]
        return {key: array for part in parts for key, array in part.items()}
    return {name: np.ascontiguousarray(value, np.float32)}


def _nested(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in tensors.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(value)
    return tree
