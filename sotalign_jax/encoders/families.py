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
        call: method of the model that gives its output.
        cls: of images: whether the first token is a class token.
        registers: of images: whether the configuration counts register tokens.
        others: of images: how many tokens that no pooling takes come before these, or what the
            configuration calls that number.
        norm: name of the last norm, which intermediate layers can be given too; None without one.
        own: attribute of the model's output that is its own row; None without one.
        pooling: by default; None where a model of this family may mean any.
        padding: side of texts.
        masked: whether texts are told what padding is; where not, the model was trained on texts
            that were all padded to one length.
        head: whether the loader can leave out a pooling layer.
        end: token that every text ends with, where it is not the tokenizer that puts it there.
        layers: whether all layers are of one width, so that another than the last can be taken.
    """

    loader: str = "AutoModel"
    call: str = "forward"
    cls: bool = True
    registers: bool = False
    others: int | str = 0
    norm: str | None = None
    own: str | None = None
    pooling: str | None = None
    padding: Literal["left", "right"] = "right"
    masked: bool = True
    head: bool = False
    end: str | None = None
    layers: bool = True


_BERT = Family(own="pooler_output", head=True)
_DECODER = Family(norm="norm", padding="left")
# Two towers in one model, whose own row is where they meet; the other tower is dropped.
_IMAGE_OF_TWO = Family(call="get_image_features", own="pooler_output", pooling=MODEL_POOLING)
_TEXT_OF_TWO = Family(call="get_text_features", own="pooler_output", pooling=MODEL_POOLING)
# Stages of growing width; what pools them is a mean, and maybe a norm of that.
_STAGES = Family(cls=False, own="pooler_output", pooling=MODEL_POOLING, layers=False)
_SIGLIP_TEXT = Family(
    "SiglipTextModel",
    norm="final_layer_norm",
    own="pooler_output",
    pooling=MODEL_POOLING,
    masked=False,
)
_T5 = Family("T5EncoderModel", norm="final_layer_norm")

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
    ("siglip", "text"): _SIGLIP_TEXT,
    ("siglip2", "text"): dataclasses.replace(_SIGLIP_TEXT, loader="Siglip2TextModel"),
    ("metaclip_2", "image"): dataclasses.replace(_IMAGE_OF_TWO, norm="post_layernorm"),
    ("metaclip_2", "text"): dataclasses.replace(_TEXT_OF_TWO, norm="final_layer_norm"),
    ("altclip", "image"): dataclasses.replace(_IMAGE_OF_TWO, norm="post_layernorm"),
    ("altclip", "text"): _TEXT_OF_TWO,
    ("chinese_clip", "image"): dataclasses.replace(_IMAGE_OF_TWO, norm="post_layernorm"),
    ("chinese_clip", "text"): _TEXT_OF_TWO,
    ("aimv2", "image"): dataclasses.replace(_IMAGE_OF_TWO, cls=False, norm="rms_norm"),
    ("aimv2_vision_model", "image"): Family(
        cls=False, norm="rms_norm", own="pooler_output", pooling="mean"
    ),
    ("beit", "image"): Family(norm="layernorm", own="pooler_output", pooling=MODEL_POOLING),
    ("data2vec-vision", "image"): Family(
        norm="layernorm", own="pooler_output", pooling=MODEL_POOLING, head=True
    ),
    # After the class token the one that learned from a teacher's labels.
    ("deit", "image"): Family(
        others=1, norm="layernorm", own="pooler_output", pooling="cls", head=True
    ),
    ("vit_msn", "image"): Family(norm="layernorm", pooling="cls"),
    ("ijepa", "image"): Family(cls=False, norm="layernorm", pooling="mean"),
    ("mlcd_vision_model", "image"): Family(
        norm="post_layernorm", own="pooler_output", pooling=MODEL_POOLING
    ),
    # Several class tokens, of which its own row is made.
    ("pixio", "image"): Family(
        cls=False, others="n_cls_tokens", own="pooler_output", pooling=MODEL_POOLING
    ),
    ("radio", "image"): Family(
        cls=False, others="num_summary_tokens", own="summary", pooling=MODEL_POOLING
    ),
    # Its first token is the mean of the others, before the norm of all.
    ("dinov3_convnext", "image"): dataclasses.replace(_STAGES, cls=True),
    ("convnext", "image"): _STAGES,
    ("convnextv2", "image"): _STAGES,
    ("swin", "image"): _STAGES,
    ("swinv2", "image"): _STAGES,
    ("hiera", "image"): _STAGES,
    ("resnet", "image"): _STAGES,
    ("regnet", "image"): _STAGES,
    ("bert", "text"): _BERT,
    ("roberta", "text"): _BERT,
    ("xlm-roberta", "text"): _BERT,
    ("mpnet", "text"): _BERT,
    ("camembert", "text"): _BERT,
    ("xlm-roberta-xl", "text"): _BERT,
    ("albert", "text"): _BERT,
    ("distilbert", "text"): Family(),
    ("electra", "text"): Family(),
    ("deberta", "text"): Family(),
    ("deberta-v2", "text"): Family(),
    ("nomic_bert", "text"): Family(),
    ("t5", "text"): _T5,
    ("mt5", "text"): dataclasses.replace(_T5, loader="MT5EncoderModel"),
    ("umt5", "text"): dataclasses.replace(_T5, loader="UMT5EncoderModel"),
    ("modernbert", "text"): Family(norm="final_norm"),
    ("llama", "text"): _DECODER,
    ("mistral", "text"): _DECODER,
    ("qwen2", "text"): _DECODER,
    ("qwen3", "text"): _DECODER,
    # EmbeddingGemma, which sees both directions, and what it was made of, which does not.
    ("gemma3_text", "text"): Family(norm="norm"),
    # Two that this package loads without the code that comes with them.
    ("llama_bidirec", "text"): Family(norm="norm", pooling="mean"),
    ("nvembed", "text"): Family(
        norm="norm", own="sentence_embeddings", pooling=MODEL_POOLING, end="</s>"
    ),
}
# What transformers has, and no rows can be taken of here.
REFUSED: dict[tuple[str, str], str] = {
    ("aimv2", "text"): "transformers lets a text see its own end only where nothing is padded",
    ("siglip2", "image"): "NaFlex cuts each picture into as many patches as it likes; take a model "
    "of one size, such as google/siglip2-base-patch16-224",
}
# Configurations of one tower of a model of two.
_TOWERS = {"vision_model": "image", "text_model": "text"}


def family_of(model_type: str, modality: str) -> Family | None:
    """What is known of an architecture, or None.

    Raises:
        ValueError: it is known to have no tower of the modality, or none that can be run.
    """
    family = FAMILIES.get((model_type, modality))
    for ending, tower in _TOWERS.items():
        if family is None and model_type.endswith(f"_{ending}") and modality == tower:
            model_type = model_type.removesuffix(f"_{ending}")
            family = FAMILIES.get((model_type, modality))
            if family is not None:  # there is no other tower to tell it from
                family = dataclasses.replace(family, call="forward")
    reason = REFUSED.get((model_type, modality))
    if reason is not None:
        raise ValueError(f"modality: {modality}s of a {model_type} are not encoded: {reason}")
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
    others = family.others
    others = getattr(config, others) if isinstance(others, str) else others
    return Layout(family.cls, int(count or 0), int(others))


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
    parts = pooling.split("+") if modality == "text" else [pooling]
    if pooling != MODEL_POOLING and not set(parts) <= set(known):
        raise ValueError(
            f"pooling: must be one of {', '.join((*known, MODEL_POOLING))} for {modality}s; "
            f"got {pooling!r}"
        )
    if pooling == MODEL_POOLING and family is not None and family.own is None:
        raise ValueError(f"pooling: {name} has no row of its own; give one of {', '.join(known)}")
    return pooling
