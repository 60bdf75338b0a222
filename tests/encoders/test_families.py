"""Architectures beyond those of the presets, against the outputs of transformers itself."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

import tiny_models  # noqa: E402
from tiny_models import BACKENDS, TEXTS  # noqa: E402

from sotalign_jax.encoders.towers import load_encoder  # noqa: E402

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_models.library(tmp_path_factory)


def load(folder, modality, **options):
    options = {"devices": 1, "batch_size": 3, "backend": "torch"} | options
    return load_encoder(str(folder), modality, **options)


def encode(encoder, items):
    return encoder.encode([encoder.preprocess(item) for item in items])


def assert_close(got, wanted):
    assert got.dtype == np.float32
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(got, wanted, rtol=5e-5, atol=3e-5 * max(1, np.abs(wanted).max()))


def plain(folder, loader="AutoModel", **options):
    """The model as anybody would load it."""
    return getattr(transformers, loader).from_pretrained(folder, **options).eval()


# Indexed by a buffer, which torchax cannot: PyTorch runs it.
UNTRACED = {"radio"}


# Those that say what others do not; the rest are slow.
SOME = {
    *("metaclip_2", "altclip", "beit", "deit", "aimv2_vision_model", "pixio", "radio"),
    *("convnext", "dinov3_convnext", "resnet", "swinv2", "hiera"),
    *("albert", "electra", "deberta-v2", "nomic_bert", "siglip2", "t5", "embeddinggemma"),
}
SOME_TRACED = {"deit", "convnext", "t5", "deberta-v2", "embeddinggemma"}


def cases(families):
    """Each with every backend that can run it."""
    found = []
    for family in families:
        for backend in BACKENDS:
            if backend == "torchax" and family in UNTRACED:
                continue
            some = SOME_TRACED if backend == "torchax" else SOME
            found.append(pytest.param(family, backend, marks=() if family in some else slow))
    return found


# family -> tokens before the patches, whether the first is a class token, default pooling.
IMAGES = {
    "metaclip_2": (1, True, "model"),
    "altclip": (1, True, "model"),
    "chinese_clip": (1, True, "model"),
    "aimv2": (0, False, "model"),
    "aimv2_vision_model": (0, False, "mean"),
    "beit": (1, True, "model"),
    "data2vec-vision": (1, True, "model"),
    "deit": (2, True, "cls"),
    "vit_msn": (1, True, "cls"),
    "ijepa": (0, False, "mean"),
    "mlcd_vision_model": (1, True, "model"),
    "pixio": (3, False, "model"),
    "radio": (10, False, "model"),
    "dinov3_convnext": (1, True, "model"),
    "convnext": (0, False, "model"),
    "convnextv2": (0, False, "model"),
    "swin": (0, False, "model"),
    "swinv2": (0, False, "model"),
    "hiera": (0, False, "model"),
    "resnet": (0, False, "model"),
    "regnet": (0, False, "model"),
}


@pytest.mark.parametrize("family,backend", cases(IMAGES))
def test_image_rows(saved, family, backend):
    folder = saved(family)
    pictures = tiny_models.pictures()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    more = {"add_pooling_layer": True} if family == "data2vec-vision" else {}
    model = plain(folder, **more)
    call = getattr(model, "get_image_features", model)
    with torch.no_grad():
        wanted = call(pixel_values=pixels)
    prefix, cls, default = IMAGES[family]
    tokens = wanted.last_hidden_state.double()
    if tokens.ndim == 4:
        tokens = tokens.flatten(2).transpose(1, 2)
    size = pixels.shape[-1] // 7 if prefix + 16 == tokens.shape[1] else None
    assert size == 4 or family in tiny_models.STAGES
    mean = tokens[:, prefix:].mean(1)
    rows = {"cls": tokens[:, 0]} | {"mean": mean}
    own = wanted.get("summary" if family == "radio" else "pooler_output")
    if own is not None:
        rows["model"] = own.flatten(1)
    pooling = "cls_mean" if cls else "mean"
    encoder = load(folder, "image", backend=backend, pooling=pooling)
    said = encoder.description
    assert (said.pooling, said.settings["backend"]) == (pooling, backend)
    assert json.loads(json.dumps(said.settings)) == said.settings
    assert_close(encode(encoder, pictures), torch.cat([rows["cls"], mean], 1) if cls else mean)
    if backend == "torch" or default == "model":
        encoder = load(folder, "image", backend=backend)
        assert encoder.description.pooling == default
        assert_close(encode(encoder, pictures), rows[default])


# A text of as many tokens as the shortest batches have, so that nothing is padded.
FULL = "sixteen or less"
POOLED = ("albert", "camembert", "xlm-roberta-xl")
OF_TWO = ("siglip2", "metaclip_2", "altclip", "chinese_clip")
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
OTHERS = ("electra", "deberta", "deberta-v2", "nomic_bert", "gemma3_text", "embeddinggemma")


def hidden_of_texts(folder, family, items):
    """The output for each text alone, and which of its tokens are the text's."""
    model = plain(folder, ENCODERS.get(family, "AutoModel"))
    call = getattr(model, "get_text_features", model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # SigLIP 2 alone was trained on padding.
    full = {"padding": "max_length", "max_length": 64} if family == "siglip2" else {}
    for item in items:
        inputs = tokenizer(item, return_tensors="pt", **full)
        mask = inputs["attention_mask"][0].bool()
        options = {} if full else {"attention_mask": inputs["attention_mask"]}
        with torch.no_grad():
            yield call(input_ids=inputs["input_ids"], **options), mask


@pytest.mark.parametrize(
    "family,backend",
    cases((*POOLED, *OF_TWO, *ENCODERS, *OTHERS)),
)
def test_text_rows(saved, family, backend):
    folder = saved(family)
    wanted = list(hidden_of_texts(folder, family, [*TEXTS, FULL]))
    rows = {"mean": [out.last_hidden_state[0][mask].double().mean(0) for out, mask in wanted]}
    rows["cls"] = [out.last_hidden_state[0][mask][0].double() for out, mask in wanted]
    if family in (*POOLED, *OF_TWO):
        rows["model"] = [out.pooler_output[0] for out, _ in wanted]
    for pooling in rows if backend == "torch" else list(rows)[:1]:
        options = (
            {} if (family, pooling) in {(f, "model") for f in OF_TWO} else {"pooling": pooling}
        )
        encoder = load(folder, "text", backend=backend, **options)
        assert encoder.description.pooling == pooling
        assert encoder.description.settings["backend"] == backend
        assert_close(encode(encoder, TEXTS), torch.stack(rows[pooling][:-1]))
        # Alone, and where nothing is padded no mask is needed.
        assert_close(encode(encoder, [FULL]), rows[pooling][-1][None])


def test_both_directions_are_seen_only_where_the_model_says(saved):
    """Of two texts that begin alike, a decoder's first token is the same."""
    for family, same in (("gemma3_text", True), ("embeddinggemma", False), ("t5", False)):
        encoder = load(saved(family), "text", pooling="cls")
        first, second = encode(encoder, ["abcd", "abce"])
        assert np.allclose(first, second, atol=1e-5) == same


def test_the_other_tower_is_dropped(saved):
    """It would take memory of every device."""
    for modality, kept in (("image", "vision_model"), ("text", "text_model")):
        encoder = load(saved("metaclip_2"), modality)
        names = {n.split(".")[1] for n, _ in encoder._loaded.network.named_parameters()}
        assert kept in names and len({"vision_model", "text_model"} & names) == 1


def unknown(folder, make):
    torch.manual_seed(0)
    model = make()
    tiny_models.randomize(model)
    model.save_pretrained(folder)
    if hasattr(model.config, "vocab_size"):
        tiny_models.save_tokenizer(folder)
    else:
        tiny_models.save_processor(folder, "", size=64)
    return model.eval()


SMALL = {"vocab_size": 300, **tiny_models.IDS}
T = transformers


def test_texts_of_a_family_that_is_not_in_the_table(tmp_path):
    config = T.GPT2Config(**SMALL, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model = unknown(tmp_path, lambda: T.GPT2Model(config))
    encoder = load(tmp_path, "text", pooling="last")
    rows = []
    for text in TEXTS:
        ids = encoder.preprocess(text)["input_ids"]
        with torch.no_grad():
            rows.append(model(torch.tensor([ids.tolist()])).last_hidden_state[0, -1])
    assert_close(encode(encoder, TEXTS), torch.stack(rows))


def test_of_an_encoder_and_a_decoder_the_encoder_is_taken(tmp_path):
    sizes = {
        f"{part}_{what}": n
        for part in ("encoder", "decoder")
        for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    config = T.M2M100Config(
        **SMALL | {"pad_token_id": 1}, **sizes, d_model=16, max_position_embeddings=64
    )
    model = unknown(tmp_path, lambda: T.M2M100Model(config))
    encoder = load(tmp_path, "text", pooling="mean")
    rows = []
    for text in TEXTS:
        ids = torch.tensor([encoder.preprocess(text)["input_ids"].tolist()])
        with torch.no_grad():
            rows.append(model.encoder(ids).last_hidden_state[0].mean(0))
    assert_close(encode(encoder, TEXTS), torch.stack(rows))


def test_more_tokens_than_positions(tmp_path):
    """ESM counts positions from the id of padding, which no table here says."""
    config = T.EsmConfig(
        **tiny_models.TEXT, pad_token_id=1, position_embedding_type="absolute", mask_token_id=9
    )
    unknown(tmp_path, lambda: T.EsmModel(config, add_pooling_layer=False))
    with pytest.raises(ValueError, match=r"^max_length: .* no text of 48 tokens .*; give less$"):
        load(tmp_path, "text", pooling="mean")
    assert encode(load(tmp_path, "text", pooling="mean", max_length=46), TEXTS).shape == (5, 16)


def fnet():
    return T.FNetModel(
        T.FNetConfig(**SMALL, hidden_size=16, num_hidden_layers=2, intermediate_size=32)
    )


def dpr():
    return T.DPRQuestionEncoder(
        T.DPRConfig(**tiny_models.TEXT | {"num_hidden_layers": 1}, **{"pad_token_id": 256})
    )


def yolos():
    config = T.YolosConfig(**tiny_models.VIT | {"image_size": [64, 64], "patch_size": 8})
    return T.YolosModel(config)


def poolformer():
    return T.PoolFormerModel(T.PoolFormerConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))


@pytest.mark.parametrize(
    "make,modality,pooling,message",
    [
        # It mixes tokens by a Fourier transform, padding and all.
        (fnet, "text", "mean", r"name: .* no text rows .*depend on padding, .* module:function"),
        (dpr, "text", "mean", r"name: .* no text rows .*last_hidden_state"),
        (poolformer, "image", "model", r"name: .* no image rows .*pooler_output"),
        (poolformer, "image", "mean", r"pooling: where the tokens of a 'poolformer' stand"),
        # Tokens of objects come after the patches.
        (yolos, "image", "mean", r"pooling: where the tokens of a 'yolos' stand"),
    ],
)
def test_models_that_give_no_rows(tmp_path, make, modality, pooling, message):
    unknown(tmp_path, make)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        load(tmp_path, modality, pooling=pooling)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "family,modality,options,message",
    [
        ("siglip2", "image", {}, r"modality: images of a siglip2 .*google/siglip2-base-patch16"),
        ("aimv2", "text", {}, r"modality: texts of a aimv2 are not encoded"),
        ("swin", "image", {"pooling": "mean", "layer": 1}, r"layer: the stages of a swin"),
        ("deit", "image", {"pooling": "mean_registers"}, r"pooling: .* needs register tokens"),
        ("pixio", "image", {"pooling": "cls"}, r"pooling: .* needs a class token"),
        ("t5", "text", {"pooling": "model"}, r"pooling: .* has no row of its own"),
        ("camembert", "text", {"pooling": "mean", "max_length": 49}, r"max_length: .* at most 48"),
        # Its positions count from the id of padding, and the configuration says 48.
        ("altclip", "text", {"max_length": 47}, r"max_length: .* at most 46"),
    ],
)
def test_refusals(saved, family, modality, options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        load(saved(family), modality, **options)


def test_layers(saved):
    for family, pooling in (("deit", "mean"), ("beit", "cls")):
        folder = saved(family)
        encoder = load(folder, "image", pooling=pooling, layer=1)
        x = [
            torch.from_numpy(encoder.preprocess(p)["pixel_values"]) for p in tiny_models.pictures()
        ]
        with torch.no_grad():
            out = plain(folder)(pixel_values=torch.stack(x), output_hidden_states=True)
        state = out.hidden_states[1].double()
        wanted = state[:, 2:].mean(1) if pooling == "mean" else state[:, 0]
        assert_close(encode(encoder, tiny_models.pictures()), wanted)
    folder = saved("t5")
    encoder = load(folder, "text", pooling="mean", layer=-1, final_norm=True)
    model, rows = plain(folder, "T5EncoderModel"), []
    for text in TEXTS:
        ids = torch.tensor([encoder.preprocess(text)["input_ids"].tolist()])
        with torch.no_grad():
            rows.append(model(ids).last_hidden_state[0].double().mean(0))
    assert_close(encode(encoder, TEXTS), torch.stack(rows))
