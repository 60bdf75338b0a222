"""Evaluation protocols by name, each with the counts that it is known by."""

from sotalign_jax.protocols.base import Protocol
from sotalign_jax.protocols.classification import (
    CLASSIFICATION,
    ClassificationProtocol,
    read_labels,
)
from sotalign_jax.protocols.compositional import COMPOSITIONAL, ItemProtocol
from sotalign_jax.protocols.prompts import class_names, prompts, templates
from sotalign_jax.protocols.published import Published
from sotalign_jax.protocols.retrieval import RETRIEVAL, RetrievalProtocol

__all__ = [
    "PROTOCOLS",
    "ClassificationProtocol",
    "ItemProtocol",
    "Protocol",
    "Published",
    "RetrievalProtocol",
    "class_names",
    "find",
    "prompts",
    "read_labels",
    "templates",
]

PROTOCOLS: dict[str, Protocol] = {
    one.name: one for one in (*RETRIEVAL, *COMPOSITIONAL, *CLASSIFICATION)
}


def find(name: str) -> Protocol:
    """The protocol of a name, or a ValueError that lists them."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: no {name!r}; there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
