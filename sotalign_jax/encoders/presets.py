"""Encoders by a short name: which model of the hub, and how the literature takes rows from it.

Facts are of model cards, papers and the transformers library. What could not be checked against the
model itself is said in `Preset.unverified`; no weights are part of this package.
"""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any, Literal

__all__ = ["PRESETS", "Preset", "find_preset", "preset_names"]

_DINOV2_LICENCE = "Apache-2.0"
_DINOV3_LICENCE = "DINOv3 License; the hub asks to accept it and to log in"


@dataclasses.dataclass(frozen=True)
class Preset:
    """How one model is used.

    Attributes:
        model: its name on the hub.
        modality: ``"image"`` or ``"text"``.
        family: architecture, as ``model_type`` in its configuration or, where that is given by code
            on the hub, as this package calls it.
        pooling: one of `IMAGE_POOLINGS`, `TEXT_POOLINGS`, or ``"model"`` for the model's own.
        normalize: whether rows are scaled to length 1.
        prompt: before every text, or with ``{text}`` where the text goes.
        query_prompt: what the model's card puts before queries, and not before documents; nothing
            uses it unless it is given as ``prompt``.
        max_length: tokens of a text that are kept, special tokens included.
        padding: side of texts that padding is on.
        end: token that every text ends with, also one that was cut.
        image_size: pixels, where it differs from what the model's image processor says.
        licence: of the weights.
        source: where this way of use is described.
        unverified: what could not be checked.
    """

    model: str
    modality: Literal["image", "text"]
    family: str
    pooling: str
    normalize: bool = False
    prompt: str = ""
    query_prompt: str = ""
    max_length: int | None = None
    padding: Literal["left", "right"] = "right"
    end: str | None = None
    image_size: int | None = None
    licence: str = ""
    source: str = ""
    unverified: str = ""


def _dinov2() -> dict[str, Preset]:
    names = {"s": "small", "b": "base", "l": "large", "g": "giant"}
    found = {}
    for letter, size in names.items():
        common: dict[str, Any] = {"modality": "image", "licence": _DINOV2_LICENCE}
        for registers in (False, True):
            family = "dinov2_with_registers" if registers else "dinov2"
            model = f"facebook/dinov2-{'with-registers-' if registers else ''}{size}"
            name = f"dinov2-vit{letter}14{'-reg' if registers else ''}"
            source = "arXiv 2309.16588" if registers else "arXiv 2304.07193"
            for suffix, pooling in (("", "cls_mean"), ("-cls", "cls")):
                found[name + suffix] = Preset(
                    model, family=family, pooling=pooling, source=source, **common
                )
    return found


def _dinov3() -> dict[str, Preset]:
    found = {}
    for name in ("vits16", "vits16plus", "vitb16", "vitl16", "vith16plus", "vit7b16"):
        for suffix, pooling in (
            ("", "cls_mean"),
            ("-cls", "cls"),
            ("-registers", "cls_mean_registers"),
            ("-shifted", "cls_mean_shifted"),
        ):
            found[f"dinov3-{name}{suffix}"] = Preset(
                f"facebook/dinov3-{name}-pretrain-lvd1689m",
                modality="image",
                family="dinov3_vit",
                pooling=pooling,
                licence=_DINOV3_LICENCE,
                source="arXiv 2508.10104; the pooling: SOTAlign, arXiv 2602.23353, section 6",
            )
    return found


def _two_towers() -> dict[str, Preset]:
    """CLIP, SigLIP and SigLIP 2: a preset for the pictures and one for the texts."""
    models = {
        "clip-vitb32": ("openai/clip-vit-base-patch32", "clip"),
        "clip-vitb16": ("openai/clip-vit-base-patch16", "clip"),
        "clip-vitl14": ("openai/clip-vit-large-patch14", "clip"),
        "clip-vitl14-336": ("openai/clip-vit-large-patch14-336", "clip"),
        "siglip-vitb16": ("google/siglip-base-patch16-224", "siglip"),
        "siglip-vitl16-384": ("google/siglip-large-patch16-384", "siglip"),
        "siglip-so400m-384": ("google/siglip-so400m-patch14-384", "siglip"),
        "siglip2-vitb16": ("google/siglip2-base-patch16-224", "siglip"),
        "siglip2-vitl16-384": ("google/siglip2-large-patch16-384", "siglip"),
        "siglip2-so400m-384": ("google/siglip2-so400m-patch14-384", "siglip"),
    }
    found = {}
    for name, (model, family) in models.items():
        two = name.startswith("siglip2")
        clip = family == "clip"
        common: dict[str, Any] = {
            "family": family,
            "pooling": "model",
            "licence": "MIT" if clip else "Apache-2.0",
            "source": "arXiv 2103.00020"
            if clip
            else f"arXiv {'2502.14786' if two else '2303.15343'}",
        }
        found[f"{name}-image"] = Preset(model, modality="image", **common)
        unverified = (
            "that the tokenizer of this model lowers the case of letters, as the training did"
            if two
            else ""
        )
        found[f"{name}-text"] = Preset(
            model,
            modality="text",
            max_length=77 if clip else 64,
            unverified=unverified,
            **common,
        )
    return found


_TASK = "Given a web search query, retrieve relevant passages that answer the query"


def _texts() -> dict[str, Preset]:
    found = {
        "nv-embed-v2": Preset(
            "nvidia/NV-Embed-v2",
            modality="text",
            family="nvembed",
            pooling="model",
            max_length=1024,
            end="</s>",
            query_prompt="Instruct: Given a question, retrieve passages that answer the question"
            "\nQuery: ",
            licence="CC-BY-NC-4.0",
            source="arXiv 2405.17428; without instruction or unit length: code of the precursor of "
            "SOTAlign (its text says mean of the tokens: nv-embed-v2-mean)",
            unverified="the model's own code does not import with transformers 5; what runs is this"
            " package's reading of it, which was never given the model's weights",
        ),
        "llama-embed-nemotron-8b": Preset(
            "nvidia/llama-embed-nemotron-8b",
            modality="text",
            family="llama_bidirec",
            pooling="mean",
            max_length=1024,
            query_prompt="Instruct: Given a question, retrieve passages that answer the question"
            "\nQuery: ",
            licence="NVIDIA's, non-commercial; and the Llama 3.1 Community License",
            source="arXiv 2511.07025; the pooling: SOTAlign, arXiv 2602.23353",
            unverified="the wording of the instruction; the model's own code does not import with "
            "transformers 5, so it is loaded as a Llama that attends in both directions",
        ),
    }
    found["nv-embed-v2-mean"] = dataclasses.replace(found["nv-embed-v2"], pooling="mean")
    for size in ("0.6b", "4b", "8b"):
        found[f"qwen3-embedding-{size}"] = Preset(
            f"Qwen/Qwen3-Embedding-{size.upper()}",
            modality="text",
            family="qwen3",
            pooling="last",
            max_length=1024,
            padding="left",
            end="<|endoftext|>",
            query_prompt=f"Instruct: {_TASK}\nQuery:",
            licence="Apache-2.0",
            source="arXiv 2506.05176",
        )
    for name, model, pooling, length, prompt, licence, source in (
        (
            "all-minilm-l6-v2",
            "sentence-transformers/all-MiniLM-L6-v2",
            "mean",
            256,
            "",
            "Apache-2.0",
            "model card",
        ),
        ("bge-base-en", "BAAI/bge-base-en-v1.5", "cls", 512, "", "MIT", "model card"),
        ("bge-large-en", "BAAI/bge-large-en-v1.5", "cls", 512, "", "MIT", "model card"),
        ("e5-large", "intfloat/e5-large-v2", "mean", 512, "passage: ", "MIT", "arXiv 2212.03533"),
    ):
        found[name] = Preset(
            model,
            modality="text",
            family="bert",
            pooling=pooling,
            normalize=True,
            prompt=prompt,
            query_prompt={
                "bge": "Represent this sentence for searching relevant passages: ",
                "e5-": "query: ",
            }.get(name[:3], ""),
            max_length=length,
            licence=licence,
            source=source,
        )
    for name, model, family, pooling, length in (
        (
            "all-mpnet-base-v2",
            "sentence-transformers/all-mpnet-base-v2",
            "mpnet",
            "mean",
            384,
        ),
        (
            "all-roberta-large-v1",
            "sentence-transformers/all-roberta-large-v1",
            "roberta",
            "mean",
            256,
        ),
    ):
        found[name] = Preset(
            model,
            modality="text",
            family=family,
            pooling=pooling,
            normalize=True,
            max_length=length,
            licence="Apache-2.0",
            source="model card",
            unverified="max_length" if family == "roberta" else "",
        )
    return found


def _vits() -> dict[str, Preset]:
    return {
        "vit-b16-in21k": Preset(
            "google/vit-base-patch16-224-in21k",
            modality="image",
            family="vit",
            pooling="cls",
            licence="Apache-2.0",
            source="arXiv 2010.11929",
        ),
        "vit-l16-in21k": Preset(
            "google/vit-large-patch16-224-in21k",
            modality="image",
            family="vit",
            pooling="cls",
            licence="Apache-2.0",
            source="arXiv 2010.11929",
        ),
        **{
            f"mae-vit{letter}": Preset(
                f"facebook/vit-mae-{size}",
                modality="image",
                family="vit_mae",
                pooling="cls",
                licence="Apache-2.0",
                source="arXiv 2111.06377",
                unverified="the licence",
            )
            for letter, size in (("b16", "base"), ("l16", "large"), ("h14", "huge"))
        },
    }


PRESETS: dict[str, Preset] = {
    **_dinov2(),
    **_dinov3(),
    **_vits(),
    **_two_towers(),
    **_texts(),
}


def preset_names(modality: str | None = None) -> list[str]:
    """Names of the presets, of one modality or of both."""
    return [name for name, p in PRESETS.items() if modality in (None, p.modality)]


def find_preset(name: str, modality: str) -> Preset | None:
    """The preset of a name, or None where the name is of something else.

    Raises:
        ValueError: a preset of the other modality.
    """
    preset = PRESETS.get(name)
    if preset is not None and preset.modality != modality:
        other = name.removesuffix(f"-{preset.modality}") + f"-{modality}"
        hint = f"; {other!r} is there" if other in PRESETS else ""
        raise ValueError(
            f"modality: the preset {name!r} encodes {preset.modality}s, not {modality}s{hint}"
        )
    return preset


def similar_presets(name: str, modality: str) -> list[str]:
    """Presets that a misspelt name may have meant, the most similar first."""
    return difflib.get_close_matches(name, preset_names(modality), n=3, cutoff=0.6)
