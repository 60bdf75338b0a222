"""Every preset on a tiny random model of its architecture, against transformers and NumPy."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

import tiny_models  # noqa: E402
from tiny_models import TEXTS, each_backend_if_slow  # noqa: E402

from sotalign_jax.encoders import presets  # noqa: E402
from sotalign_jax.encoders.families import FAMILIES, check_pooling, layout_of  # noqa: E402
from sotalign_jax.encoders.pooling import IMAGE_POOLINGS, TEXT_POOLINGS, Layout  # noqa: E402
from sotalign_jax.encoders.presets import PRESETS, Preset, find_preset, preset_names  # noqa: E402
from sotalign_jax.encoders.towers import load_encoder  # noqa: E402

LONG = 1100  # positions: more than the texts of any preset


def nvembed_config():
    from sotalign_jax.encoders.nvembed import NVEmbedConfig

    _, mistral = tiny_models.configuration("mistral", LONG)
    latent = {"num_latents_value": 5, "latent_dim": 16, "num_cross_heads": 2, "cross_dim_head": 8}
    return NVEmbedConfig(text_config=mistral.to_dict(), latent_attention_config=latent)


def save_nvembed(folder):
    from sotalign_jax.encoders.nvembed import NVEmbed

    torch.manual_seed(0)
    model = NVEmbed(nvembed_config())
    tiny_models.randomize(model)
    model.save_pretrained(folder)
    tiny_models.save_tokenizer(folder, template="<s> $A")


def save_llama_bidirec(folder):
    tiny_models.save_model(folder, "llama", positions=LONG)
    path = folder / "config.json"
    facts = json.loads(path.read_text()) | {
        "model_type": "llama_bidirec",
        "auto_map": {"AutoModel": "gone.LlamaBidirectionalModel"},
    }
    path.write_text(json.dumps(facts))
    tiny_models.save_tokenizer(folder, template="<s> $A")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    made = {}

    def folder(family):
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            own = {"nvembed": save_nvembed, "llama_bidirec": save_llama_bidirec}.get(family)
            if own:
                own(made[family])
            else:
                tiny_models.save(made[family], family, positions=LONG)
        return made[family]

    return folder


def load(monkeypatch, folder, name, **options):
    """The encoder of a preset, from a directory in place of the hub."""
    monkeypatch.setitem(PRESETS, name, dataclasses.replace(PRESETS[name], model=str(folder)))
    options = {"devices": 1, "batch_size": 5, "backend": "torch"} | options
    return load_encoder(name, PRESETS[name].modality, **options)


def encode(encoder, items):
    return encoder.encode([encoder.preprocess(item) for item in items])


def test_the_table_is_consistent():
    for name, preset in PRESETS.items():
        known = IMAGE_POOLINGS if preset.modality == "image" else TEXT_POOLINGS
        family = FAMILIES[preset.family, preset.modality]
        assert preset.pooling in (*known, "model"), name
        if preset.pooling == "model":
            assert family.own, name
        assert (preset.max_length is None) == (preset.modality == "image"), name
        assert preset.licence and preset.source, name
        assert "/" in preset.model and not preset.model.startswith("/"), name
        assert ("registers" in preset.pooling or "shifted" in preset.pooling) <= family.registers
    assert set(preset_names("image")) | set(preset_names("text")) == set(PRESETS)
    assert not set(preset_names("image")) & set(preset_names("text"))
    # Encoder pairs of the paper: table 8.
    for name, model, pooling in (
        ("dinov3-vitl16", "facebook/dinov3-vitl16-pretrain-lvd1689m", "cls_mean"),
        ("dinov2-vitl14", "facebook/dinov2-large", "cls_mean"),
        ("nv-embed-v2", "nvidia/NV-Embed-v2", "model"),
        ("llama-embed-nemotron-8b", "nvidia/llama-embed-nemotron-8b", "mean"),
        ("qwen3-embedding-8b", "Qwen/Qwen3-Embedding-8B", "last"),
    ):
        assert (PRESETS[name].model, PRESETS[name].pooling) == (model, pooling)


def test_what_architectures_are_pooled_by_if_nobody_says():
    for family, pooling in {
        "dinov2": "cls_mean",
        "dinov2_with_registers": "cls_mean",
        "dinov3_vit": "cls_mean",
        "vit": "cls",
        "vit_mae": "cls",
        "clip": "model",
        "siglip": "model",
    }.items():
        known = FAMILIES[family, "image"]
        assert check_pooling(None, "image", known, family) == pooling
        assert layout_of(known, types.SimpleNamespace(num_register_tokens=4)) == Layout(
            cls=family != "siglip",
            registers=4 * (family in ("dinov2_with_registers", "dinov3_vit")),
        )
    for family in ("clip", "siglip", "nvembed"):
        assert check_pooling(None, "text", FAMILIES[family, "text"], family) == "model"
    for family in ("bert", "roberta", "modernbert", "qwen3", "llama"):
        with pytest.raises(ValueError, match=f"pooling: nothing says how {family} is pooled"):
            check_pooling(None, "text", FAMILIES[family, "text"], family)


def test_finding_presets():
    assert isinstance(find_preset("dinov3-vitl16", "image"), Preset)
    assert find_preset("facebook/dinov2-base", "image") is None
    with pytest.raises(ValueError, match=r"modality: the preset 'dinov3-vitl16' encodes images"):
        find_preset("dinov3-vitl16", "text")
    assert presets.similar_presets("dinov3-vitl-16", "image")[0] == "dinov3-vitl16"


# One name for each way of use; the others differ in the size of the model.
SAMPLE = [
    "dinov3-vits16",
    "dinov3-vits16-shifted",
    "siglip2-vitb16-text",
    "all-minilm-l6-v2",
    "e5-large",
    "llama-embed-nemotron-8b",
    "nv-embed-v2",
]


@pytest.mark.parametrize(
    "name", [n if n in SAMPLE else pytest.param(n, marks=pytest.mark.slow) for n in PRESETS]
)
def test_presets_load_and_encode(monkeypatch, saved, name):
    preset = PRESETS[name]
    encoder = load(monkeypatch, saved(preset.family), name)
    said = encoder.description
    assert (said.name, said.modality, said.pooling) == (name, preset.modality, preset.pooling)
    assert said.normalized == preset.normalize
    assert json.loads(json.dumps(said.settings)) == said.settings
    items = tiny_models.pictures() if preset.modality == "image" else TEXTS
    rows = encode(encoder, items)
    dim = 8 if preset.family == "clip" else 16
    assert rows.shape == (5, 2 * dim if "cls_mean" in preset.pooling else dim)
    assert np.isfinite(rows).all() and np.ptp(rows, axis=0).min() > 1e-3
    if preset.normalize:
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    if preset.modality == "text":
        long = encoder.preprocess("word " * 2000)["input_ids"]
        short = encoder.preprocess("a")["input_ids"]
        assert len(long) == preset.max_length == said.settings["max_length"]
        if preset.end:
            end = encoder.preprocess.tokenizer.convert_tokens_to_ids(preset.end)
            assert long[-1] == short[-1] == end
        if preset.prompt:
            prompt = encoder.preprocess.tokenizer.encode(preset.prompt, add_special_tokens=False)
            assert [i for i in short if i in prompt][: len(prompt)] == prompt


def everywhere(model, ids):
    """Hidden states of one text where every token sees every other, by transformers."""
    open_mask = torch.zeros(1, 1, len(ids), len(ids))
    with torch.no_grad():
        return model(torch.tensor([ids]), attention_mask=open_mask).last_hidden_state[0]


@each_backend_if_slow
def test_llama_embed_nemotron_sees_both_directions(monkeypatch, saved, backend):
    folder = saved("llama_bidirec")
    encoder = load(monkeypatch, folder, "llama-embed-nemotron-8b", backend=backend)
    known = json.loads((folder / "config.json").read_text())
    known = {k: v for k, v in known.items() if k not in ("model_type", "auto_map")}
    model = transformers.LlamaModel.from_pretrained(
        folder, config=transformers.LlamaConfig(**known), attn_implementation="eager"
    )
    wanted = []
    for text in TEXTS:
        ids = encoder.preprocess(text)["input_ids"].tolist()
        assert ids == [257, *text.encode().translate(TABLE)]
        wanted.append(everywhere(model, ids).double().mean(0).numpy())
    np.testing.assert_allclose(encode(encoder, TEXTS), wanted, rtol=5e-5, atol=3e-5)


@pytest.mark.parametrize("name", ["llama-embed-nemotron-8b", "nv-embed-v2-mean"])
def test_both_directions_are_seen_without_padding_too(monkeypatch, saved, name):
    """Where nothing is padded there is no mask, and then it is for the layers to say."""
    encoder = load(monkeypatch, saved(PRESETS[name].family), name)
    full = "a text of sixteen tokens"[: 15 - (PRESETS[name].end is not None)]
    inputs = [encoder.preprocess(text) for text in (full, "a text of more than sixteen tokens")]
    assert [len(one["input_ids"]) > 16 for one in inputs] == [False, True]
    assert len(inputs[0]["input_ids"]) == 16
    alone, padded = encoder.encode(inputs[:1]), encoder.encode(inputs)[:1]
    np.testing.assert_allclose(alone, padded, rtol=5e-5, atol=3e-5)


# Bytes to the ids of the tokenizer of the tests, which go by the characters that stand for them.
def _table():
    from tokenizers import pre_tokenizers

    known = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    printable = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = [known[printable.pre_tokenize_str(chr(b))[0][0]] if b < 128 else 0 for b in range(256)]
    return bytes(ids)


TABLE = _table()


@each_backend_if_slow
def test_nv_embed_pools_by_latent_attention(monkeypatch, saved, backend):
    folder = saved("nvembed")
    weights = load_weights(folder)
    # As the published files name them.
    assert {
        "embedding_model.embed_tokens.weight",
        "embedding_model.layers.0.self_attn.q_proj.weight",
        "embedding_model.norm.weight",
        "latent_attention_model.latents",
        "latent_attention_model.cross_attend_blocks.0.norm.weight",
        "latent_attention_model.cross_attend_blocks.0.norm_context.weight",
        "latent_attention_model.cross_attend_blocks.0.fn.to_q.weight",
        "latent_attention_model.cross_attend_blocks.0.fn.to_kv.weight",
        "latent_attention_model.cross_attend_blocks.0.fn.to_out.weight",
        "latent_attention_model.cross_attend_blocks.1.norm.weight",
        "latent_attention_model.cross_attend_blocks.1.fn.net.0.weight",
        "latent_attention_model.cross_attend_blocks.1.fn.net.2.bias",
    } <= weights.keys()
    inner = {
        k.removeprefix("embedding_model."): torch.tensor(v)
        for k, v in weights.items()
        if k.startswith("embedding_model.")
    }
    config = nvembed_config().mistral
    config._attn_implementation = "eager"
    mistral = transformers.MistralModel(config).eval()
    mistral.load_state_dict(inner)
    rows = {}
    for name in ("nv-embed-v2", "nv-embed-v2-mean"):
        encoder = load(monkeypatch, folder, name, backend=backend)
        rows[name] = encode(encoder, TEXTS)
    for i, text in enumerate(TEXTS):
        ids = encoder.preprocess(text)["input_ids"].tolist()
        assert ids[-1] == 258
        hidden = everywhere(mistral, ids).double().numpy()
        np.testing.assert_allclose(
            rows["nv-embed-v2-mean"][i], hidden.mean(0), rtol=5e-5, atol=3e-5
        )
        wanted = latent_attention(hidden, weights).mean(0)
        np.testing.assert_allclose(rows["nv-embed-v2"][i], wanted, rtol=5e-5, atol=1e-5)


def load_weights(folder):
    from safetensors.numpy import load_file

    return load_file(folder / "model.safetensors")


def latent_attention(x, weights, heads=2):
    """Section 3.1 of the paper, head by head, in float64."""
    w = {
        k.removeprefix("latent_attention_model.cross_attend_blocks."): v.astype(np.float64)
        for k, v in weights.items()
    }
    latents = w["latent_attention_model.latents"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    context = norm(latents, "0.norm_context")
    query = norm(x, "0.norm") @ w["0.fn.to_q.weight"].T
    key, value = np.split(context @ w["0.fn.to_kv.weight"].T, 2, axis=1)
    width = query.shape[1] // heads
    seen = []
    for head in range(heads):
        at = slice(head * width, (head + 1) * width)
        scores = np.exp(query[:, at] @ key[:, at].T / np.sqrt(width))
        seen.append(scores / scores.sum(1, keepdims=True) @ value[:, at])
    x = np.hstack(seen) @ w["0.fn.to_out.weight"].T + x
    wide = norm(x, "1.norm") @ w["1.fn.net.0.weight"].T + w["1.fn.net.0.bias"]
    values, gates = np.split(wide, 2, axis=1)
    erf = np.vectorize(math.erf)
    gated = values * gates * (1 + erf(gates / np.sqrt(2))) / 2
    return gated @ w["1.fn.net.2.weight"].T + w["1.fn.net.2.bias"] + x


def test_an_option_overrides_a_preset(monkeypatch, saved):
    folder = saved("bert")
    encoder = load(
        monkeypatch, folder, "e5-large", pooling="last", prompt="", normalize=False, max_length=9
    )
    said = encoder.description
    assert (said.pooling, said.normalized) == ("last", False)
    assert (said.settings["prompt"], said.settings["max_length"]) == ("", 9)


def test_a_copy_of_nv_embed_is_used_as_its_preset_is(monkeypatch, saved):
    folder = saved("nvembed")
    options = {"devices": 1, "batch_size": 5, "backend": "torch", "max_length": 64}
    preset = load(monkeypatch, folder, "nv-embed-v2", **options)
    copy = load_encoder(str(folder), "text", **options)
    assert copy.description.settings == preset.description.settings
    np.testing.assert_array_equal(encode(copy, TEXTS), encode(preset, TEXTS))


@pytest.mark.parametrize("family", ["nvembed", "llama_bidirec", "bert", "dinov3_vit", "clip"])
def test_a_revision_is_of_all_files(monkeypatch, saved, family):
    hub, model, seen, weights = transformers.utils.hub, transformers.PreTrainedModel, [], []
    files, read = hub.cached_files, model.from_pretrained.__func__

    def spy_files(*arguments, **options):
        seen.append(options["revision"])
        return files(*arguments, **options)

    def spy_weights(cls, *arguments, **options):
        weights.append(options.get("revision"))
        return read(cls, *arguments, **options)

    monkeypatch.setattr(hub, "cached_files", spy_files)
    monkeypatch.setattr(model, "from_pretrained", classmethod(spy_weights))
    modality = "image" if family in ("dinov3_vit", "clip") else "text"
    options = {"pooling": "mean"} if family == "bert" else {}
    load_encoder(str(saved(family)), modality, backend="torch", revision="abc", **options)
    assert len(seen) > 3 and set(seen) == {"abc"} and weights == ["abc"]


def test_a_preset_of_another_architecture_is_refused(monkeypatch, saved):
    with pytest.raises(ValueError, match=r"name: the preset 'e5-large' is of a bert, but .* qwen3"):
        load(monkeypatch, saved("qwen3"), "e5-large")


def test_the_published_mistake_is_of_other_tokens(monkeypatch, saved):
    """It differs from the patches' mean by four patches and four registers."""
    folder = saved("dinov3_vit")
    items = tiny_models.pictures()
    rows = {
        suffix: encode(load(monkeypatch, folder, f"dinov3-vitl16{suffix}"), items)
        for suffix in ("", "-cls", "-registers", "-shifted")
    }
    for suffix in ("", "-registers", "-shifted"):
        np.testing.assert_array_equal(rows[suffix][:, :16], rows["-cls"])
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    encoder = load(monkeypatch, folder, "dinov3-vitl16")
    x = torch.stack([torch.from_numpy(encoder.preprocess(p)["pixel_values"]) for p in items])
    with torch.no_grad():
        tokens = model(x).last_hidden_state.double().numpy()
    sums = {"": tokens[:, 5:], "-registers": tokens[:, 1:], "-shifted": tokens[:, 1:-4]}
    for suffix, chosen in sums.items():
        assert chosen.shape[1] == {"": 16, "-registers": 20, "-shifted": 16}[suffix]
        np.testing.assert_allclose(rows[suffix][:, 16:], chosen.mean(1), rtol=5e-5, atol=3e-5)
