"""What architectures of the transformers library have in common and where they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from sotalign_jax.encoders.pooling import IMAGE_POOLINGS, MODEL_POOLING, TEXT_POOLINGS, Layout

__all__ = ["Family", "check_pooling", "family_of", "layout_of"]


@dataclasses.dataclass(frozen=True)
class Family:
    """One tower of an architecture.

    Attributes:
        loader: class of transformers that loads it.
        cls: of images: whether the first token is a class token.
        registers: of images: whether the configuration counts register tokens.
        norm: name of the last norm, which intermediate layers can be given too; None without one.
        own: attribute of the model's output that is its own row; None without one.
        pooling: by default; None where a model of this family may mean any.
        padding: side of texts.
        masked: whether texts are told what padding is; where not, the model was trained on texts
            that were all padded to one length.
        head: whether the loader can leave out a pooling layer.
        end: token that every text ends with, where it is not the tokenizer that puts it there.
    """

    loader: str = "AutoModel"
    cls: bool = True
    registers: bool = False
    norm: str | None = None
    own: str | None = None
    pooling: str | None = None
    padding: Literal["left", "right"] = "right"
    masked: bool = True
    head: bool = False
    end: str | None = None


_BERT = Family(own="pooler_output", head=True)
_DECODER = Family(norm="norm", padding="left")

FAMILIES: dict[tuple[str, str], Family] = {
    ("dinov2", "image"): Family(norm="layernorm", own="pooler_output", pooling="cls_mean"),
    ("dinov2_with_registers", "image"): Family(
        registers=True, norm="layernorm", own="pooler_output", pooling="cls_mean"
    ),
    ("dinov3_vit", "image"): Family(
        registers=True, norm="norm", own="pooler_output", pooling="cls_mean"
    ),
    ("vit", "image"): Family(norm="layernorm", own="pooler_output", pooling="cls", head=True),
    ("vit_mae", "image"): Family(norm="layernorm", pooling="cls"),
    ("clip", "image"): Family(
        "CLIPVisionModelWithProjection",
        norm="post_layernorm",
        own="image_embeds",
        pooling=MODEL_POOLING,
    ),
    ("clip", "text"): Family(
        "CLIPTextModelWithProjection",
        norm="final_layer_norm",
        own="text_embeds",
        pooling=MODEL_POOLING,
    ),
    ("siglip", "image"): Family(
        "SiglipVisionModel",
        cls=False,
        norm="post_layernorm",
        own="pooler_output",
        pooling=MODEL_POOLING,
    ),
    ("siglip", "text"): Family(
        "SiglipTextModel",
        norm="final_layer_norm",
        own="pooler_output",
        pooling=MODEL_POOLING,
        masked=False,
    ),
    ("bert", "text"): _BERT,
    ("roberta", "text"): _BERT,
    ("xlm-roberta", "text"): _BERT,
    ("mpnet", "text"): _BERT,
    ("distilbert", "text"): Family(),
    ("modernbert", "text"): Family(norm="final_norm"),
    ("llama", "text"): _DECODER,
    ("mistral", "text"): _DECODER,
    ("qwen2", "text"): _DECODER,
    ("qwen3", "text"): _DECODER,
    # Two that this package loads without the code that comes with them.
    ("llama_bidirec", "text"): Family(norm="norm", pooling="mean"),
    ("nvembed", "text"): Family(
        norm="norm", own="sentence_embeddings", pooling=MODEL_POOLING, end="</s>"
    ),
}
# Configurations of one tower of a model of two.
_TOWERS = {"vision_model": "image", "text_model": "text"}


def family_of(model_type: str, modality: str) -> Family | None:
    """What is known of an architecture, or None.

    Raises:
        ValueError: it is known to have no tower of the modality.
    """
    for ending, tower in _TOWERS.items():
        if model_type.endswith(f"_{ending}") and modality == tower:
            model_type = model_type.removesuffix(f"_{ending}")
    family = FAMILIES.get((model_type, modality))
    others = [m for (t, m) in FAMILIES if t == model_type]
    if family is None and others:
        raise ValueError(
            f"modality: a model of type {model_type!r} encodes {others[0]}s, not {modality}s"
        )
    return family


def layout_of(family: Family | None, config: Any) -> Layout | None:
    """Where an image's tokens stand; None where that is not known."""
    if family is None:
        return None
    count = getattr(config, "num_register_tokens", 0) if family.registers else 0
    return Layout(family.cls, int(count or 0))


def check_pooling(pooling: str | None, modality: str, family: Family | None, name: str) -> str:
    """The pooling to take: what is given, or else what the family is known for.

    Raises:
        ValueError: none is given and none is known; or it is unknown, or not of this model.
    """
    known: Mapping[str, Any] = IMAGE_POOLINGS if modality == "image" else TEXT_POOLINGS
    pooling = pooling if pooling is not None or family is None else family.pooling
    if pooling is None:
        raise ValueError(
            f"pooling: nothing says how {name} is pooled; give one of "
            f"{', '.join((*known, MODEL_POOLING))}"
        )
    if pooling not in (*known, MODEL_POOLING):
        raise ValueError(
            f"pooling: must be one of {', '.join((*known, MODEL_POOLING))} for {modality}s; "
            f"got {pooling!r}"
        )
    if pooling == MODEL_POOLING and family is not None and family.own is None:
        raise ValueError(f"pooling: {name} has no row of its own; give one of {', '.join(known)}")
    return pooling
