"""Random models of each architecture, a few kilobytes, saved as the hub has them."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from sotalign_jax.encoders.backends import choose_backend


def _backends():
    """Those that are installed; asked of the package, which leaves torch as it was."""
    try:
        choose_backend("torchax")
    except ImportError:
        return ["torch"]
    return ["torch", "torchax"]


BACKENDS = _backends()
each_backend = pytest.mark.parametrize("backend", BACKENDS)
# PyTorch is what rows are compared with: where there is torchax, that is the one to test.
each_backend_if_slow = pytest.mark.parametrize(
    "backend", [*(pytest.param(b, marks=pytest.mark.slow) for b in BACKENDS[:-1]), BACKENDS[-1]]
)
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 48,
}
STAGES = (
    "dinov3_convnext",
    "convnext",
    "convnextv2",
    "swin",
    "swinv2",
    "hiera",
    "resnet",
    "regnet",
)
IDS = {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}


def configuration(family, positions=48):
    """Of a tiny model of a family; and of what class it is."""
    t = transformers
    text = {**TEXT, "max_position_embeddings": positions}
    decoder = {**text, "num_key_value_heads": 1, "head_dim": 8}
    dino = {k: v for k, v in VIT.items() if k != "intermediate_size"}
    # Positions for another size than the pictures', as the published DINOv2 has them.
    dino |= {"image_size": 42, "mlp_ratio": 2}
    clip_text = {**text, **IDS, "max_position_embeddings": 77}
    shared = {"projection_dim": 8}
    # Networks of stages, each of half the resolution of the one before.
    stages = {"hidden_sizes": [6, 8, 10, 16], "depths": [1, 1, 2, 1]}
    windows = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
    windows |= {"image_size": 64, "patch_size": 4}
    t5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2}
    t5 |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, **IDS}
    # Two layers of three see the tokens nearby.
    gemma = {**decoder, **IDS, "sliding_window": 6, "query_pre_attn_scalar": 8}
    gemma["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    siglip_text = {**text, **IDS, "max_position_embeddings": 64}
    return {
        "dinov2": lambda: (t.Dinov2Model, t.Dinov2Config(**dino)),
        "dinov2_with_registers": lambda: (
            t.Dinov2WithRegistersModel,
            t.Dinov2WithRegistersConfig(**dino, num_register_tokens=4),
        ),
        "dinov3_vit": lambda: (
            t.DINOv3ViTModel,
            t.DINOv3ViTConfig(**VIT, num_register_tokens=4),
        ),
        "vit": lambda: (t.ViTModel, t.ViTConfig(**VIT)),
        "vit_mae": lambda: (t.ViTMAEForPreTraining, t.ViTMAEConfig(**VIT)),
        "clip": lambda: (
            t.CLIPModel,
            t.CLIPConfig(
                text_config={**clip_text, **shared}, vision_config={**VIT, **shared}, **shared
            ),
        ),
        "siglip": lambda: (
            t.SiglipModel,
            t.SiglipConfig(text_config=siglip_text, vision_config=VIT),
        ),
        "siglip2": lambda: (
            t.Siglip2Model,
            t.Siglip2Config(text_config=siglip_text, vision_config={**VIT, "num_patches": 16}),
        ),
        "metaclip_2": lambda: (
            t.MetaClip2Model,
            t.MetaClip2Config(
                text_config={**clip_text, **shared}, vision_config={**VIT, **shared}, **shared
            ),
        ),
        "altclip": lambda: (
            t.AltCLIPModel,
            t.AltCLIPConfig(
                text_config={**text, "project_dim": 12, "pad_token_id": 1},
                vision_config=VIT,
                **shared,
            ),
        ),
        "chinese_clip": lambda: (
            t.ChineseCLIPModel,
            t.ChineseCLIPConfig(text_config=text, vision_config={**VIT, **shared}, **shared),
        ),
        "aimv2": lambda: (
            t.Aimv2Model,
            t.Aimv2Config(text_config=clip_text, vision_config=VIT, **shared),
        ),
        "aimv2_vision_model": lambda: (t.Aimv2VisionModel, t.Aimv2VisionConfig(**VIT)),
        "beit": lambda: (t.BeitModel, t.BeitConfig(**VIT, use_relative_position_bias=True)),
        "data2vec-vision": lambda: (
            lambda config: t.Data2VecVisionModel(config, add_pooling_layer=True),
            t.Data2VecVisionConfig(**VIT, use_relative_position_bias=True),
        ),
        "deit": lambda: (t.DeiTModel, t.DeiTConfig(**VIT)),
        "vit_msn": lambda: (t.ViTMSNModel, t.ViTMSNConfig(**VIT)),
        "ijepa": lambda: (t.IJepaModel, t.IJepaConfig(**VIT)),
        "mlcd_vision_model": lambda: (t.MLCDVisionModel, t.MLCDVisionConfig(**VIT)),
        "pixio": lambda: (t.PixioModel, t.PixioConfig(**VIT, n_cls_tokens=3)),
        "radio": lambda: (t.RadioModel, t.RadioConfig(**VIT)),
        "dinov3_convnext": lambda: (t.DINOv3ConvNextModel, t.DINOv3ConvNextConfig(**stages)),
        "convnext": lambda: (t.ConvNextModel, t.ConvNextConfig(**stages)),
        "convnextv2": lambda: (t.ConvNextV2Model, t.ConvNextV2Config(**stages)),
        "swin": lambda: (t.SwinModel, t.SwinConfig(**windows)),
        "swinv2": lambda: (t.Swinv2Model, t.Swinv2Config(**windows)),
        "hiera": lambda: (
            t.HieraModel,
            t.HieraConfig(
                image_size=[64, 64], embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2]
            ),
        ),
        "resnet": lambda: (
            t.ResNetModel,
            t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]),
        ),
        "regnet": lambda: (
            t.RegNetModel,
            t.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8),
        ),
        "bert": lambda: (t.BertModel, t.BertConfig(**text)),
        "camembert": lambda: (
            t.CamembertModel,
            t.CamembertConfig(
                **(text | {"max_position_embeddings": positions + 2}), pad_token_id=1
            ),
        ),
        "xlm-roberta-xl": lambda: (
            t.XLMRobertaXLModel,
            t.XLMRobertaXLConfig(
                **(text | {"max_position_embeddings": positions + 2}), pad_token_id=1
            ),
        ),
        # Its layers are one, three times.
        "albert": lambda: (t.AlbertModel, t.AlbertConfig(**text, embedding_size=12)),
        "electra": lambda: (t.ElectraModel, t.ElectraConfig(**text, embedding_size=12)),
        # As the published ones: positions are of what lies between two tokens.
        "deberta": lambda: (
            t.DebertaModel,
            t.DebertaConfig(
                **text,
                relative_attention=True,
                pos_att_type=["c2p", "p2c"],
                position_biased_input=False,
            ),
        ),
        "deberta-v2": lambda: (
            t.DebertaV2Model,
            t.DebertaV2Config(
                **text,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                position_biased_input=False,
                position_buckets=8,
                norm_rel_ebd="layer_norm",
                share_att_key=True,
                conv_kernel_size=3,
            ),
        ),
        "nomic_bert": lambda: (
            t.NomicBertModel,
            t.NomicBertConfig(
                **text, **IDS, rope_parameters={"rope_type": "default", "rope_theta": 1000.0}
            ),
        ),
        "t5": lambda: (t.T5Model, t.T5Config(**t5)),
        "mt5": lambda: (
            t.MT5EncoderModel,
            t.MT5Config(**t5, feed_forward_proj="gated-gelu"),
        ),
        "umt5": lambda: (
            t.UMT5EncoderModel,
            t.UMT5Config(**t5, feed_forward_proj="gated-gelu"),
        ),
        "gemma3_text": lambda: (t.Gemma3TextModel, t.Gemma3TextConfig(**gemma)),
        "embeddinggemma": lambda: (
            t.Gemma3TextModel,
            t.Gemma3TextConfig(**gemma, use_bidirectional_attention=True),
        ),
        "roberta": lambda: (
            t.RobertaModel,
            t.RobertaConfig(**(text | {"max_position_embeddings": positions + 2}), pad_token_id=1),
        ),
        "xlm-roberta": lambda: (
            t.XLMRobertaModel,
            t.XLMRobertaConfig(
                **(text | {"max_position_embeddings": positions + 2}), pad_token_id=1
            ),
        ),
        "mpnet": lambda: (
            t.MPNetModel,
            t.MPNetConfig(**(text | {"max_position_embeddings": positions + 2}), pad_token_id=1),
        ),
        "distilbert": lambda: (
            t.DistilBertModel,
            t.DistilBertConfig(
                vocab_size=300,
                dim=16,
                n_layers=3,
                n_heads=2,
                hidden_dim=32,
                max_position_embeddings=positions,
            ),
        ),
        "modernbert": lambda: (
            t.ModernBertModel,
            t.ModernBertConfig(
                **text, **IDS, cls_token_id=257, sep_token_id=258, local_attention=8
            ),
        ),
        "qwen2": lambda: (
            t.Qwen2Model,
            t.Qwen2Config(**{k: v for k, v in decoder.items() if k != "head_dim"}),
        ),
        "qwen3": lambda: (t.Qwen3Model, t.Qwen3Config(**decoder)),
        "llama": lambda: (t.LlamaModel, t.LlamaConfig(**decoder, **IDS)),
        "mistral": lambda: (t.MistralModel, t.MistralConfig(**decoder, **IDS)),
    }[family]()


def save_tokenizer(folder, *, template="<s> $A </s>", tokenizer_class="PreTrainedTokenizerFast"):
    """A tokenizer of bytes: each byte is a token, 256 is padding, 257 <s> and 258 </s>."""
    specials = {"<pad>": 256, "<s>": 257, "</s>": 258, "<|endoftext|>": 259, "<unk>": 260}
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | specials, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=list(specials.items())
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": tokenizer_class,
                "pad_token": "<pad>",
                "bos_token": "<s>",
                "eos_token": "</s>",
                "model_max_length": 1000,
            }
        )
    )


def library(tmp_path_factory):
    """Gives the directory of a tiny model of a family, with what goes with it, made once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            save(made[family], family)
        return made[family]

    return folder


def save(folder, family, **options):
    """A model, its image processor and its tokenizer, as far as it has them."""
    model = save_model(folder, family, **options)
    texts = hasattr(model.config, "vocab_size") and family != "beit"  # which has one for patches
    if not texts:
        save_processor(folder, family, size=64 if family in STAGES else 28)
    if texts or hasattr(model.config, "text_config"):
        # Decoders have nothing before a text, and one token after it.
        decoder = hasattr(model.config, "num_key_value_heads") or "t5" in family
        save_tokenizer(folder, template="$A </s>" if decoder else "<s> $A </s>")
    return model


def pictures():
    """Five, of different sizes."""
    rng = np.random.default_rng(0)
    sizes = ((40, 30), (28, 28), (9, 50), (31, 44), (60, 60))
    return [Image.fromarray(rng.integers(0, 255, (*s, 3), dtype=np.uint8)) for s in sizes]


TEXTS = ["a cat", "two dogs in the snow", "x", "a long way down to the river", "yes"]


def randomize(model):
    """Weights so large that all parts of a model matter, whatever it initialises them with."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.4 + float(gain))


def save_model(folder, family, *, positions=48):
    """Saves a random model of a family."""
    torch.manual_seed(0)
    make, config = configuration(family, positions)
    model = make(config)
    randomize(model)
    model.save_pretrained(folder)
    return model.eval()


def save_processor(folder, family, size=28):
    """The image processor that the published models of a family have, for a small size."""
    t = transformers
    square = {"height": size, "width": size}
    mean = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if family in ("dinov2", "dinov2_with_registers", "clip"):
        crop = {"size": {"shortest_edge": size + 4}, "crop_size": square}
        make = t.CLIPImageProcessorPil if family == "clip" else t.BitImageProcessorPil
        processor = make(**crop, **({} if family == "clip" else mean))
    elif family == "dinov3_vit":  # the class itself needs torchvision
        facts = {
            "image_processor_type": "DINOv3ViTImageProcessorFast",
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": square,
            **mean,
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(facts))
        return None
    elif family == "siglip":
        processor = t.SiglipImageProcessorPil(size=square)
    else:
        processor = t.ViTImageProcessorPil(size=square)
    processor.save_pretrained(folder)
    return processor
