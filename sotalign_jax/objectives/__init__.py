"""What a step minimises: a loss of an aligner on a batch, by the name a configuration gives it.

A further objective is a file here and a line below; docs/objectives.md walks through one.
"""

from __future__ import annotations

from typing import Any

from sotalign_jax.objectives.base import Divergence, LossSettings, Objective
from sotalign_jax.objectives.clip import CLIP
from sotalign_jax.objectives.divergences import DIVERGENCES
from sotalign_jax.objectives.fusemix import FuseMix
from sotalign_jax.objectives.nnclr import NNCLR
from sotalign_jax.objectives.options import check_options, switch_names, traced_names
from sotalign_jax.objectives.sail import SAIL
from sotalign_jax.objectives.sail_semi import SAIL_SEMI
from sotalign_jax.objectives.sclip import SCLIP
from sotalign_jax.objectives.sotalign import SOTALIGN
from sotalign_jax.objectives.structure import STRUCTURE

__all__ = [
    "DIVERGENCES",
    "OBJECTIVES",
    "loss_settings",
    "option_tables",
    "switch_fields",
    "traced_fields",
]

OBJECTIVES: dict[str, Objective] = {
    "sotalign": SOTALIGN,
    "sail": SAIL,
    "sail_semi": SAIL_SEMI,
    "clip": CLIP,
    "structure": STRUCTURE,
    "sclip": SCLIP,
    "nnclr": NNCLR,
}


def option_tables() -> dict[str, type]:
    """The classes of options, by the name of their table: FuseMix, objectives, divergences.

    Raises:
        TypeError: two methods that have options have one name, and so one table.
    """
    tables: dict[str, type] = {"fusemix": FuseMix}
    methods: list[tuple[str, Objective | Divergence]] = [*OBJECTIVES.items(), *DIVERGENCES.items()]
    for name, method in methods:
        if method.options is None:
            continue
        if name in tables:
            raise TypeError(f"{name}: two methods with options cannot have one name")
        tables[name] = method.options
    return tables


def traced_fields() -> set[str]:
    """The fields of those tables that are arguments of a compiled step, as ``table.field``."""
    return {
        f"{table}.{name}" for table, cls in option_tables().items() for name in traced_names(cls)
    }


def switch_fields() -> set[str]:
    """Those of them whose zero takes another program."""
    return {
        f"{table}.{name}" for table, cls in option_tables().items() for name in switch_names(cls)
    }


def loss_settings(config: Any) -> LossSettings:
    """The settings of a validated configuration."""

    def options(name: str, cls: type | None) -> Any:
        return None if cls is None else check_options(cls, config[name].to_dict())

    objective, divergence = OBJECTIVES[config.objective], DIVERGENCES[config.loss.divergence]
    loss = config.loss.to_dict()
    # An arg-max in place of a softmax is another program.
    loss["teacher_epsilon"] = loss["teacher_epsilon"] or None
    return LossSettings(
        **loss,
        objective=config.objective,
        options=options(config.objective, objective.options),
        divergence_options=options(config.loss.divergence, divergence.options),
        fusemix=options("fusemix", FuseMix) if config.fusemix.alpha else None,
        reads=objective.reads(config),
        potentials=divergence.potentials,
    )
