"""Encoders out of models of transformers and sentence-transformers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from sotalign_jax.encoders.dense import load_stages
from sotalign_jax.encoders.digests import digest_of_model
from sotalign_jax.encoders.extras import need
from sotalign_jax.encoders.families import Family, check_pooling, family_of, layout_of
from sotalign_jax.encoders.networks import (
    RowNetwork,
    check_layer,
    fix_positions,
    keep_layers,
    named,
)
from sotalign_jax.encoders.pooling import MODEL_POOLING, check_layout, text_poolings
from sotalign_jax.encoders.preprocess import (
    FloatImagePreprocessor,
    ImagePreprocessor,
    TextPreprocessor,
    resized,
)
from sotalign_jax.encoders.presets import Preset, similar_presets
from sotalign_jax.encoders.sentence import read_sentence_facts
from sotalign_jax.encoders.towers import Loaded, buckets

__all__ = ["load_transformers"]

# Texts of models that take more are cut here, unless max_length says otherwise.
LONGEST = 1024
# Models of more parameters are not tried on their longest text, which takes a CPU long.
LARGE = 1_000_000_000
_COUNT_FROM_PADDING = (
    "altclip_text_model",
    "camembert",
    "data2vec-text",
    "ibert",
    "layoutlmv3",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
# What of a model of two towers does not encode a modality.
_OTHERS = {
    "image": ("text_model", "text_projection"),
    "text": ("vision_model", "vision_projection", "visual_projection"),
}
# What only a model's own row is made by.
_UNUSED = {"pooler", "visual_projection", "text_projection"}
# Loaded by this package: the code that comes with these is of transformers 4.
NATIVE = ("llama_bidirec", "nvembed")


def load_transformers(
    name: str,
    modality: str,
    *,
    preset: Preset | None,
    pooling: str | None,
    layer: int | None,
    final_norm: bool | None,
    normalize: bool | None,
    prompt: str | None,
    max_length: int | None,
    image_size: int | None,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
) -> Loaded:
    """Loads one tower, its weights on the CPU; arguments are those of `load_encoder`."""
    transformers = need("transformers", extra="encoders", why=f"name: {name}")
    if modality == "image":
        need("PIL", extra="encoders", why=f"name: {name}")
    source = preset.model if preset else name
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _reading(name, source, modality, trust_remote_code):
        known, _ = transformers.PreTrainedConfig.get_config_dict(source, revision=revision)
    model_type = str(known.get("model_type") or "")
    if not model_type:
        raise ValueError(f"name: {source} has no config.json that says its model_type")
    if preset and model_type != preset.family:
        raise ValueError(
            f"name: the preset {name!r} is of a {preset.family}, but {source} is a {model_type}"
        )
    family = family_of(model_type, modality)
    facts = None
    if modality == "text" and preset is None:
        facts = _sentence_facts(transformers, source, revision, pooling)
    if pooling is None and (preset or facts):
        pooling = preset.pooling if preset else facts.pooling if facts else None
    pooling = check_pooling(pooling, modality, family, name)
    # Layers that come after a pooling were trained on its rows, and on those of the last layer.
    follows = facts is not None and pooling == facts.pooling and layer is None
    if layer is not None and pooling == MODEL_POOLING:
        raise ValueError(
            "layer: the model's own row is of its last layer; give a pooling of tokens"
        )
    if normalize is None:
        normalize = preset.normalize if preset else bool(facts and facts.normalize)

    with _reading(name, source, modality, trust_remote_code):
        whole = _config(transformers, source, model_type, hub)
    config = getattr(whole, "vision_config" if modality == "image" else "text_config", None)
    config = config if hasattr(config, "num_hidden_layers") else whole  # of one tower, or of all
    layout = layout_of(family, config) if modality == "image" else None
    if modality == "image" and pooling != MODEL_POOLING:
        if layout is None:
            raise ValueError(
                f"pooling: where the tokens of a {model_type!r} stand is not known here; give "
                f"{MODEL_POOLING!r}"
            )
        check_layout(pooling, layout)
    count = getattr(config, "num_hidden_layers", 0)
    count = count if isinstance(count, int) else 0
    if layer is not None:
        if family is not None and not family.layers:
            raise ValueError(
                f"layer: the stages of a {model_type} are of different widths; leave layer out"
            )
        check_layer(layer, count)
        if final_norm and (family is None or family.norm is None):
            raise ValueError(f"final_norm: {name} has no last norm that is known here")
    settings: dict[str, Any] = {
        "model": source,
        "family": model_type,
        "layer": layer,
        # Without a layer, as the model has it.
        "final_norm": bool(final_norm) if layer is not None else None,
        "transformers": transformers.__version__,
    }
    items: dict[str, Any] = {}
    if modality == "image":
        image_size = image_size or (preset.image_size if preset else None)
        with _reading(name, source, modality, trust_remote_code):
            preprocess: Any = _image_preprocessor(transformers, source, image_size, hub)
        settings["pixels"] = preprocess.settings
    else:
        with _reading(name, source, modality, trust_remote_code):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **hub)
        if prompt is None:
            prompt = preset.prompt if preset else facts.prompt if facts else ""
        if max_length is None and (preset or facts):
            max_length = preset.max_length if preset else facts.max_length if facts else None
        end = preset.end if preset else family.end if family else None
        preprocess = TextPreprocessor(
            tokenizer,
            prompt=prompt,
            max_length=_check_length(max_length, tokenizer, config, name),
            end=end,
            lower=bool(facts and facts.lower),
            skip_prompt=bool(facts and follows and facts.skip_prompt),
        )
        items, said = _padding(preprocess, family, preset, name)
        settings |= said
        if preprocess.skip:
            settings["prompt_pooled"] = False
    stages = None
    if facts and follows and facts.stages:
        width = getattr(config, "hidden_size", None)
        width = width * len(text_poolings(pooling)) if isinstance(width, int) else None
        stages = load_stages(facts.stages, width, name)
        settings["after_pooling"] = [type(stage).__name__ for stage in stages]

    # All that can be wrong with the options was found; now to what takes long.
    with _reading(name, source, modality, trust_remote_code):
        model, missing = _load_model(
            transformers, source, model_type, family, pooling, dtype, hub, whole
        )
    if missing:
        raise ValueError(
            f"{'pooling' if _UNUSED & set(missing[0].split('.')) else 'name'}: {source} has no "
            f"weights for "
            f"{missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    settings["revision"] = getattr(model.config, "_commit_hash", None) or revision
    if Path(source).is_dir():  # which has no revision
        settings["files"] = digest_of_model(Path(source))
    model, call = _one_tower(model, modality, family, whole)
    block, before, norm = None, False, None
    if layer is not None:
        norm = named(model, family.norm) if final_norm and family and family.norm else None
        block, before = keep_layers(model, layer, count)
    network = RowNetwork(
        model,
        pooling=pooling,
        own=family.own if family and family.own else "pooler_output",
        layout=layout,
        block=block,
        before=before,
        norm=norm,
        normalize=normalize,
        masked=family is None or family.masked,
        call=call,
        skip=preprocess.skip if modality == "text" else 0,
        stages=stages,
        window=model.config.sliding_window if _sees_both_ways(model_type, config) else None,
    )
    if modality == "image":
        shape = _fit_image(network, preprocess, config, image_size, name)
        settings["image_size"] = list(shape[1:])
        items = {"image_shape": shape}
    else:
        _try_texts(network, preprocess, items, known=family is not None, name=name)
    return Loaded(network, preprocess, name, pooling, normalize, settings, **items)


def _config(transformers, source: str, model_type: str, hub: dict[str, Any]):
    """A model's configuration; of models that are loaded by this package, its own reading of it."""
    if model_type == "nvembed":
        from sotalign_jax.encoders.nvembed import NVEmbedConfig

        return NVEmbedConfig.from_pretrained(source, revision=hub["revision"])
    if model_type == "llama_bidirec":
        known, _ = transformers.PreTrainedConfig.get_config_dict(source, revision=hub["revision"])
        known = {k: v for k, v in known.items() if k not in ("model_type", "auto_map")}
        return transformers.LlamaConfig.from_dict(known)
    return transformers.AutoConfig.from_pretrained(source, **hub)


def _sees_both_ways(model_type: str, config) -> bool:
    """Whether a Gemma was made to, as EmbeddingGemma is."""
    return model_type == "gemma3_text" and bool(config.use_bidirectional_attention)


def _padding(
    preprocess: TextPreprocessor, family: Family | None, preset: Preset | None, name: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How texts are padded, for `Loaded`; and what of texts is to be said of the encoder."""
    masked = family is None or family.masked
    longest, tokenizer = preprocess.max_length, preprocess.tokenizer
    pad = tokenizer.pad_token_id
    if pad is None and not masked:
        raise ValueError(f"name: {name} has texts padded, and its tokenizer names no padding")
    side = preset.padding if preset else family.padding if family else "right"
    if not masked and not preset:  # it shows in the rows, and the tokenizer's files say it
        side = tokenizer.padding_side
    items = {
        "pad": 0 if pad is None else int(pad),  # under a mask, any id will do
        "left": side == "left",
        "buckets": buckets(longest) if masked else (longest,),
    }
    return items, {
        "prompt": preprocess.prompt,
        "max_length": longest,
        "truncation": "right",
        "padding": side if masked else f"{side}, always to {longest}",
        "end": None if preprocess.end is None else tokenizer.convert_ids_to_tokens(preprocess.end),
        "lower": preprocess.lower,
        "strip": True,
        "tokenizer": type(tokenizer).__name__,
    }


def _load_model(
    transformers, source, model_type, family: Family | None, pooling, dtype, hub, config
):
    """The model, and which of its weights the checkpoint does not have."""
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    # Models of this package's own reading and of known families need no code of others.
    if model_type not in NATIVE:
        options |= hub
    else:
        options["revision"] = hub["revision"]
    if family is not None:
        options["attn_implementation"] = "eager"  # plain products, which torchax can trace
        if family.head:
            options["add_pooling_layer"] = pooling == MODEL_POOLING
    loader: Any = getattr(transformers, family.loader if family else "AutoModel")
    if model_type == "nvembed":
        from sotalign_jax.encoders.nvembed import NVEmbed

        loader, options["config"] = NVEmbed, config
    elif model_type == "llama_bidirec":
        loader, options["config"] = transformers.LlamaModel, config
    elif model_type == "vit_mae":
        options["mask_ratio"] = 0.0  # all patches are seen
    model, info = loader.from_pretrained(source, **options)
    if model_type == "llama_bidirec":
        from sotalign_jax.encoders.nvembed import attend_both_ways

        model = attend_both_ways(model)
    if getattr(model.config, "use_cache", False):
        model.config.use_cache = False
    missing = sorted(info["missing_keys"])
    if pooling != MODEL_POOLING:
        missing = [key for key in missing if _UNUSED.isdisjoint(key.split("."))]
    return model, missing


def _image_preprocessor(transformers, source: str, image_size: int | None, hub):
    known, _ = transformers.BaseImageProcessor.get_image_processor_dict(
        source, revision=hub["revision"]
    )
    if str(known.get("image_processor_type", "")).startswith("DINOv3ViT"):
        preprocess = FloatImagePreprocessor.from_config(known, source)
        return preprocess if image_size is None else preprocess.resized(image_size)
    # Never torchvision's, so that rows do not depend on whether it is installed.
    processor = transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **hub)
    return ImagePreprocessor(
        processor if image_size is None else resized(processor, image_size, source)
    )


def _one_tower(model, modality: str, family: Family | None, config) -> tuple[Any, str]:
    """The part of a model that encodes items, and what of it to call."""
    of_two = getattr(config, "is_encoder_decoder", False)
    if modality == "text" and (of_two or (family and family.loader.endswith("EncoderModel"))):
        # Of the encoder's models too, which hold the embeddings a second time.
        return model.get_encoder(), "forward"
    if family is not None:
        call = family.call
    else:
        two = all(callable(getattr(model, f"get_{of}_features", None)) for of in ("image", "text"))
        call = f"get_{modality}_features" if two else "forward"
    if call != "forward":
        for part in _OTHERS[modality]:
            if isinstance(getattr(model, part, None), torch.nn.Module):
                setattr(model, part, None)
    return model, call


def _fit_image(network, preprocess, config, image_size: int | None, name: str) -> tuple[int, ...]:
    """Readies a network for pictures of one size, and returns the shape of their pixels."""
    from PIL import Image  # pyright: ignore[reportMissingImports]

    example = preprocess(Image.new("RGB", (64, 64)))["pixel_values"]
    size = getattr(config, "image_size", None)
    height, width = example.shape[1:]
    sizes = (size, size) if isinstance(size, int) else tuple(size or ())
    arguments = inspect.signature(getattr(network.model, network.call)).parameters
    if "interpolate_pos_encoding" in arguments and sizes not in ((), (height, width)):
        network.options["interpolate_pos_encoding"] = True
    if config.model_type == "vit_mae":
        patch = config.patch_size
        network.options["noise"] = (height // patch) * (width // patch)
    try:
        rows = fix_positions(network, {"pixel_values": torch.from_numpy(example[None])})
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{'name' if image_size is None else 'image_size'}: the model takes no pictures of "
            f"{height} x {width} pixels ({_line(error)})"
        ) from error
    except (AttributeError, LookupError, TypeError) as error:  # of models that take something else
        reason = f"{type(error).__name__}: {_line(error)}"
        raise ValueError(_not_known(name, "image", reason)) from error
    _check_rows(rows, network, name, "image")
    return example.shape


def _try_texts(network, preprocess, items: dict[str, Any], *, known: bool, name: str) -> None:
    """Encodes a text alone and with padding: a model that nobody tried may not tell them apart.

    Raises:
        ValueError: it gives no rows, rows that depend on padding, or none of the longest texts.
    """
    if known and network.stages is None:
        return
    longest = items["buckets"][-1]
    ids = preprocess("a small cat")["input_ids"].astype("int64")
    ids = torch.from_numpy(ids)[: max(preprocess.skip + 1, longest // 2)]

    def run(ids, length: int):
        at = slice(length - len(ids), None) if items["left"] else slice(len(ids))
        padded = torch.full((1, length), items["pad"])
        mask = torch.zeros((1, length), dtype=torch.int64)
        padded[0, at], mask[0, at] = ids, 1
        with torch.no_grad():
            return network.eval()(input_ids=padded, attention_mask=mask)

    try:
        padded = run(ids, min(len(ids) + 9, longest) if network.masked else longest)
        alone = run(ids, len(ids)) if network.masked else padded
    except MemoryError:
        raise
    except Exception as error:  # of code that may expect anything
        said = f"{type(error).__name__}: {_line(error)}"
        raise ValueError(_not_known(name, "text", said)) from error
    _check_rows(padded, network, name, "text")
    # Half precision rounds what is next to padding differently.
    least = 1e-3 if next(network.parameters()).dtype == torch.float32 else 5e-2
    apart = float((alone - padded).abs().max() / alone.abs().max().clamp_min(1e-30))
    if not apart < least:
        raise ValueError(
            _not_known(name, "text", f"its rows depend on padding, by {apart:.1g} of the largest")
        )
    if known or sum(x.numel() for x in network.parameters()) > LARGE:
        return
    try:
        run(ids.repeat(longest)[:longest], longest)
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"max_length: {name} takes no text of {longest} tokens ({_line(error)}); give less"
        ) from error


def _check_rows(rows: torch.Tensor, network, name: str, modality: str) -> None:
    if rows.ndim != 2:
        raise ValueError(
            _not_known(name, modality, f"{network.pooling} gives {tuple(rows.shape)} for one item")
        )


def _not_known(name: str, modality: str, reason: str) -> str:
    return (
        f"name: {name} gives no {modality} rows as transformers loads it ({reason}); take a model "
        f"of a family in docs/encoders.md, or write a function, module:function, that runs it"
    )


def _check_length(max_length: int | None, tokenizer, config, name: str) -> int:
    limits = [getattr(tokenizer, "model_max_length", None)]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and its kin count positions from the id of padding.
        positions -= 2 if config.model_type in _COUNT_FROM_PADDING else 0
        limits.append(positions)
        if max_length is not None and max_length > positions:
            raise ValueError(f"max_length: {name} takes at most {positions}, got {max_length}")
    if max_length is not None:
        return max_length
    return min(LONGEST, *(int(limit) for limit in limits if limit))


def _sentence_facts(transformers, source, revision, pooling):
    def find(file: str) -> str | None:
        return transformers.utils.cached_file(
            source,
            file,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
        )

    try:
        return read_sentence_facts(find, source)
    except ValueError:
        if pooling is None:
            raise
        return None  # what is pooled was said, and the rest is the transformer's
    except OSError as error:  # else a hub that fails once would change what rows are
        raise ValueError(f"name: {source!r} was not read from the hub ({_line(error)})") from error


@contextlib.contextmanager
def _reading(name: str, source: str, modality: str, trusted: bool) -> Iterator[None]:
    """Errors of the hub and of files in one line, and no notices about weights not needed."""
    from transformers.utils import logging  # pyright: ignore[reportMissingImports]

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except OSError as error:
        if Path(source).is_dir():
            raise ValueError(f"name: {source} cannot be read ({_line(error)})") from error
        similar = similar_presets(name, modality)
        hint = f"; similar presets: {', '.join(similar)}" if similar and source == name else ""
        raise ValueError(
            f"name: {source!r} is no preset and no directory, and was not read from the hub "
            f"({_line(error)}){hint}"
            if source == name
            else f"name: {source!r} was not read from the hub ({_line(error)})"
        ) from error
    except ImportError as error:
        raise ImportError(f"name: {source} needs what is not installed ({_line(error)})") from error
    except MemoryError:
        raise
    except Exception as error:  # of transformers, of its files, and of code of others
        if "trust_remote_code" in str(error) and not trusted:
            raise ValueError(
                f"trust_remote_code: {source} comes with code of its own, which would run here; "
                f"read it, then set this to true"
            ) from error
        raise ValueError(f"name: {source} cannot be loaded ({_line(error)})") from error
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
