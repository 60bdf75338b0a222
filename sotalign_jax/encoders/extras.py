"""Libraries that only encoders need, imported when they are."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = ["has", "need"]


def need(module: str, *, extra: str, why: str) -> ModuleType:
    """A module of an extra.

    Args:
        module: its name.
        extra: of this package that has it.
        why: what asked for it, which begins the message.

    Raises:
        ImportError: it is missing, or what it needs is; the message says which extra has it.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # torch and torchax of versions that do not fit raise others
        raise ImportError(
            f"{why}: install the extra, sotalign-jax[{extra}] ({module}: "
            f"{type(error).__name__}: {error})"
        ) from error


def has(module: str) -> bool:
    """Whether a module can be imported; it is imported to know."""
    try:
        importlib.import_module(module)
    except Exception:
        return False
    return True
