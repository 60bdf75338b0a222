"""How a model of sentence-transformers pools, read from the files beside its weights.

``modules.json`` names the stages; ``1_Pooling/config.json`` says what is pooled,
``sentence_bert_config.json`` the length, ``config_sentence_transformers.json`` the prompts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["SentenceFacts", "read_sentence_facts"]

_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}


@dataclasses.dataclass(frozen=True)
class SentenceFacts:
    """What the files say.

    Attributes:
        pooling: ``"cls"``, ``"mean"`` or ``"last"``.
        normalize: whether rows are scaled to length 1.
        max_length: tokens of a text that are kept; None where it is not said.
        prompt: the default one.
        lower: whether texts are put into lower case first.
    """

    pooling: str
    normalize: bool
    max_length: int | None
    prompt: str
    lower: bool


def read_sentence_facts(find: Callable[[str], str | None], name: str) -> SentenceFacts | None:
    """Reads the files of a model.

    Args:
        find: path of one of its files, or None where it has none.
        name: of the model, for messages.

    Returns:
        None where it is not of sentence-transformers.

    Raises:
        ValueError: it has stages, or pools in a way, that are not known here.
    """
    modules = _read(find, "modules.json")
    if modules is None:
        return None
    stages = [str(m["type"]).rsplit(".", 1)[-1] for m in modules]
    if stages[:2] != ["Transformer", "Pooling"] or stages[2:] not in ([], ["Normalize"]):
        raise ValueError(
            f"name: {name} has the stages {', '.join(stages)}; known are Transformer, Pooling and "
            f"then maybe Normalize (give pooling to take its transformer alone)"
        )
    path = modules[1].get("path") or "1_Pooling"
    pooling = _read(find, f"{path}/config.json") or {}
    chosen = [p for key, p in _POOLINGS.items() if pooling.get(key)]
    if "pooling_mode" in pooling:  # since version 5.4
        modes = pooling["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else list(modes)
        chosen = [_MODES.get(mode, mode) for mode in modes]
    known = set(_POOLINGS.values())
    others = [k for k, v in pooling.items() if k.startswith("pooling_mode_") and v is True]
    if len(chosen) != 1 or len(others) > 1 or chosen[0] not in known:
        said = ", ".join(others or chosen) or "nothing"
        raise ValueError(
            f"pooling: {name} says {said}; known are one of {', '.join(known)}: give one"
        )
    if pooling.get("include_prompt") is False:
        raise ValueError(f"pooling: {name} leaves the prompt out of what it pools: give one")
    bert = _read(find, "sentence_bert_config.json") or {}
    length = bert.get("max_seq_length")
    prompts = _read(find, "config_sentence_transformers.json") or {}
    default = prompts.get("default_prompt_name")
    return SentenceFacts(
        pooling=chosen[0],
        normalize=stages[2:] == ["Normalize"],
        max_length=None if length is None else int(length),
        prompt=str((prompts.get("prompts") or {}).get(default) or "") if default else "",
        lower=bool(bert.get("do_lower_case")),
    )


def _read(find: Callable[[str], str | None], file: str) -> Any:
    path = find(file)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"name: {path} is not JSON ({error})") from None
