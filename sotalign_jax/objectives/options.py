"""Options of a method: a dataclass that a configuration fills in and a compiled program takes."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

import jax

__all__ = ["check_options", "options", "switch_names", "traced", "traced_names"]

T = TypeVar("T", bound=type)


def traced(default: float, *, zero_is_none: bool = False) -> Any:
    """A number that a compiled program takes as an argument: another value compiles nothing anew.

    Runs that differ in nothing else can be trained together. Python cannot branch on such a field
    inside of a loss; a field without this is static, and can be branched on. Annotate it ``Any``:
    in a program that is being traced, no number stands there.

    Args:
        default: its value.
        zero_is_none: a configuration's 0 is None in a compiled program, which Python can branch on:
            another program, that leaves out what has no weight.

    Returns:
        What a class of :func:`options` is to have as the field's default.
    """
    return dataclasses.field(
        default=default, metadata={"traced": True, "zero_is_none": zero_is_none}
    )


@typing.dataclass_transform(frozen_default=True, field_specifiers=(traced,))
def options(cls: T) -> T:
    """Class decorator: a frozen dataclass, and a pytree whose leaves are its :func:`traced` fields.

    Every field needs a default. One that is annotated with a ``Literal`` takes no other value than
    those it names. A method ``check`` may raise ValueError for values out of range, with a message
    that begins with the name of the field.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    leaves = traced_names(cls)
    static = [field.name for field in dataclasses.fields(cls) if field.name not in leaves]
    return jax.tree_util.register_dataclass(cls, data_fields=leaves, meta_fields=static)


def traced_names(cls: type) -> list[str]:
    """The :func:`traced` fields of a class of :func:`options`."""
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get("traced")]


def switch_names(cls: type) -> list[str]:
    """The traced fields of a class of :func:`options` whose zero is None."""
    return [field.name for field in dataclasses.fields(cls) if field.metadata.get("zero_is_none")]


def check_options(cls: type, values: dict[str, Any]) -> Any:
    """Options of concrete values.

    Args:
        cls: a class of :func:`options`.
        values: of each of its fields, each of the field's type.

    Returns:
        An instance, None for the zeros that stand for it.

    Raises:
        ValueError: a value that is none of the field's choices, or that ``check`` refuses.
    """
    hints = typing.get_type_hints(cls)
    for name, value in values.items():
        choices = typing.get_args(hints[name]) if _is_literal(hints[name]) else ()
        if choices and value not in choices:
            raise ValueError(f"{name}: got {value!r}; must be one of {', '.join(choices)}")
    made = cls(**values)
    if hasattr(made, "check"):
        made.check()
    nones = {name: getattr(made, name) or None for name in switch_names(cls)}
    return dataclasses.replace(made, **nones)


def _is_literal(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal
