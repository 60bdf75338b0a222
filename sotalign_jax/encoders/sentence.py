"""How a model of sentence-transformers makes rows, read from the files beside its weights.

``modules.json`` names the stages; ``1_Pooling/config.json`` says what is pooled,
``2_Dense/config.json`` what is made of that, ``sentence_bert_config.json`` the length, and
``config_sentence_transformers.json`` the prompts.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sotalign_jax.encoders.pooling import TEXT_POOLINGS

__all__ = ["DenseFacts", "SentenceFacts", "read_sentence_facts"]

# In the order in which sentence-transformers joins them.
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "last",
}
_MODES = {mode: mode for mode in TEXT_POOLINGS} | {"lasttoken": "last"}
# What sentence-transformers calls a row.
_ROWS = "sentence_embedding"
# Where no activation is named: what sentence-transformers takes.
_TANH = "torch.nn.modules.activation.Tanh"


@dataclasses.dataclass(frozen=True)
class DenseFacts:
    """One layer that rows go through after they were pooled.

    Attributes:
        weights: path of its weights.
        inputs: dimension of the rows it takes.
        outputs: dimension of those it gives.
        bias: whether something is added.
        activation: class of PyTorch that is applied to that, with the module it is in.
        residual: whether its input is added after that.
    """

    weights: str
    inputs: int
    outputs: int
    bias: bool
    activation: str
    residual: bool


@dataclasses.dataclass(frozen=True)
class SentenceFacts:
    """What the files say.

    Attributes:
        pooling: one of `TEXT_POOLINGS`, or several joined by ``+``.
        normalize: whether rows are scaled to length 1.
        max_length: tokens of a text that are kept; None where it is not said.
        prompt: the default one.
        lower: whether texts are put into lower case first.
        stages: what rows go through between the pooling and that: layers, and None where they are
            scaled to length 1.
        skip_prompt: whether the prompt's tokens are left out of what is pooled.
    """

    pooling: str
    normalize: bool
    max_length: int | None
    prompt: str
    lower: bool
    stages: tuple[DenseFacts | None, ...] = ()
    skip_prompt: bool = False


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
    after = {"Dense", "Normalize", "Dropout"}
    if stages[:2] != ["Transformer", "Pooling"] or not after.issuperset(stages[2:]):
        raise ValueError(
            f"name: {name} has the stages {', '.join(stages)}; known are Transformer, Pooling and "
            f"then Dense and Normalize, as often as there are (give pooling to take its "
            f"transformer alone)"
        )
    path = modules[1].get("path") or "1_Pooling"
    pooling = _read(find, f"{path}/config.json") or {}
    chosen = [p for key, p in _POOLINGS.items() if pooling.get(key)]
    if "pooling_mode" in pooling:  # since version 5.4
        modes = pooling["pooling_mode"]
        modes = [modes] if isinstance(modes, str) else list(modes)
        chosen = [_MODES.get(mode, mode) for mode in modes]
    if not chosen or not set(chosen) <= set(TEXT_POOLINGS):
        said = ", ".join(map(str, chosen)) or "nothing"
        raise ValueError(
            f"pooling: {name} says {said}; known are {', '.join(TEXT_POOLINGS)}: give one"
        )
    skip_prompt = pooling.get("include_prompt") is False
    if skip_prompt and "weightedmean" in chosen:
        raise ValueError(
            f"pooling: {name} leaves the prompt out of a weighted mean, which is not known here: "
            f"give one"
        )
    rows: list[DenseFacts | None] = []
    for stage, module in zip(stages[2:], modules[2:], strict=True):
        if stage != "Dropout":  # of training
            path = str(module.get("path") or "")
            known = _read(find, f"{path}/config.json") if path else None
            _check_names(known or {}, path, name)
            rows.append(_dense(known, find, path, name) if stage == "Dense" else None)
    normalize = bool(rows) and rows[-1] is None
    bert = _read(find, "sentence_bert_config.json") or {}
    length = bert.get("max_seq_length")
    prompts = _read(find, "config_sentence_transformers.json") or {}
    default = prompts.get("default_prompt_name")
    return SentenceFacts(
        pooling="+".join(chosen),
        normalize=normalize,
        max_length=None if length is None else int(length),
        prompt=str((prompts.get("prompts") or {}).get(default) or "") if default else "",
        lower=bool(bert.get("do_lower_case")),
        stages=tuple(rows[:-1] if normalize else rows),
        skip_prompt=skip_prompt,
    )


def _check_names(known: dict[str, Any], path: str, name: str) -> None:
    """Raises ValueError for a stage that is of tokens, or makes something beside the row."""
    keys = ("module_input_name", "module_output_name")
    named = [str(known[key]) for key in keys if known.get(key) not in (None, _ROWS)]
    if named:
        raise ValueError(
            f"name: the stage {path} of {name} is of {named[0]}, and not of rows (give pooling to "
            f"take its transformer alone)"
        )


def _dense(known: Any, find: Callable[[str], str | None], path: str, name: str) -> DenseFacts:
    weights = find(f"{path}/model.safetensors") or find(f"{path}/pytorch_model.bin")
    if known is None or weights is None:
        raise ValueError(
            f"name: {name} has a stage {path} without its "
            f"{'config.json' if known is None else 'weights'}"
        )
    try:
        inputs, outputs = int(known["in_features"]), int(known["out_features"])
    except KeyError as error:
        raise ValueError(f"name: {path}/config.json of {name} does not say {error}") from None
    return DenseFacts(
        weights,
        inputs,
        outputs,
        bias=bool(known.get("bias", True)),
        activation=str(known.get("activation_function", _TANH)),
        residual=bool(known.get("use_residual", False)),
    )


def _read(find: Callable[[str], str | None], file: str) -> Any:
    path = find(file)
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"name: {path} is not JSON ({error})") from None
