"""What the ``get_hyper(hyper, arg)`` of a sweep file is given: sweeps as lists of points.

A point is a flat dict, field of the configuration to value, as ``{"loss.alpha": 1e-3, "seed": 2}``.
A key ``label.NAME`` is no field but a label, for rows, columns and lines of tables and plots. Every
function here takes and returns lists of points, so that they nest:

    hyper.product(
        hyper.chain(
            hyper.fixed({"label.method": "SAIL", "objective": "sail"}),
            hyper.product(
                hyper.fixed("label.method", "SOTAlign"), hyper.sweep("loss.alpha", [1e-4, 1e-3])
            ),
        ),
        hyper.sweep("seed", range(3)),
    )

are nine points. The names are those of the ``hyper`` that big_vision's configs are written for
(there ``zipit`` and ``chainit``), which was not published.
"""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sotalign_jax.config import ConfigError

__all__ = ["LABEL", "Fields", "chain", "fixed", "product", "sweep", "zip"]

LABEL = "label."

Fields = dict[str, Any]


def sweep(field: str, values: Any) -> list[Fields]:
    """One field at each of several values.

    Args:
        field: a field of the configuration, as ``"loss.alpha"``, or ``"label.NAME"``.
        values: at least one.

    Returns:
        A point a value, in their order.

    Raises:
        ConfigError: no values, or one string, of which each letter would be a value.
    """
    _check_name("sweep", field)
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise ConfigError(f"hyper.sweep: {field}: must be given a list of values, got {values!r}")
    points = [{field: _plain(value)} for value in values]
    if not points:
        raise ConfigError(f"hyper.sweep: {field}: names no value")
    return points


def fixed(field: str | Mapping[str, Any] | None = None, *value: Any, **fields: Any) -> list[Fields]:
    """One point: ``fixed("loss.alpha", 0.0)``, ``fixed({"loss.alpha": 0.0})``, ``fixed(steps=9)``.

    Args:
        field: a field, followed by its value; or a dict of fields.
        value: the value of ``field``.
        fields: further fields, whose names have no dot.

    Returns:
        A list of that one point.

    Raises:
        ConfigError: a field without value, or with several.
    """
    given: Fields = {}
    if isinstance(field, str):
        if len(value) != 1:
            raise ConfigError(f"hyper.fixed: {field}: must be followed by one value")
        given[field] = value[0]
    elif value:
        raise ConfigError(f"hyper.fixed: {value[0]!r}: is the value of no field")
    elif field is not None:
        given |= field
    for name in given:
        _check_name("fixed", name)
    point = {name: _plain(one) for name, one in given.items()}
    return [_merged("fixed", [point, {name: _plain(one) for name, one in fields.items()}])]


def product(*parts: Any) -> list[Fields]:
    """Every combination of a point of each part; the last part varies fastest.

    Args:
        parts: lists of points.

    Returns:
        As many points as the product of their lengths; of no parts, one empty point.

    Raises:
        ConfigError: two parts give one field different values.
    """
    _check_parts("product", parts)
    return [_merged("product", points) for points in itertools.product(*parts)]


def zip(*parts: Any) -> list[Fields]:
    """The first points of all parts together, then the second ones, and so on.

    Args:
        parts: lists of points, of one length.

    Returns:
        As many points as each part has.

    Raises:
        ConfigError: no parts, unequal lengths, or two parts give one field different values.
    """
    _check_parts("zip", parts)
    lengths = [len(part) for part in parts]
    if len(set(lengths)) != 1:
        raise ConfigError(f"hyper.zip: all parts must be of one length, got {lengths}")
    return [_merged("zip", points) for points in builtins.zip(*parts, strict=True)]


def chain(*parts: Any) -> list[Fields]:
    """The points of all parts, one part after another.

    Args:
        parts: lists of points.

    Returns:
        As many points as the sum of their lengths.
    """
    _check_parts("chain", parts)
    return [dict(point) for part in parts for point in part]


def _check_name(function: str, name: Any) -> None:
    if not isinstance(name, str) or not name or name == LABEL:
        raise ConfigError(
            f"hyper.{function}: {name!r}: must be the name of a field, or of a label after 'label.'"
        )


def _check_parts(function: str, parts: tuple[Any, ...]) -> None:
    for number, part in enumerate(parts, 1):
        if not isinstance(part, list) or not all(isinstance(point, dict) for point in part):
            raise ConfigError(
                f"hyper.{function}: part {number}: must be a list of points, as the functions of "
                f"hyper return it, got {part!r}"
            )


def _merged(function: str, points: Iterable[Fields]) -> Fields:
    merged: Fields = {}
    for point in points:
        for name, value in point.items():
            if name in merged and not _same(merged[name], value):
                raise ConfigError(
                    f"hyper.{function}: {name}: is given twice, {merged[name]!r} and {value!r}"
                )
            merged[name] = value
    return merged


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's: a configuration takes no others."""
    return value.item() if isinstance(value, np.generic) else value
