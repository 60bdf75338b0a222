"""Towers against the outputs of transformers itself, on tiny random models of each architecture."""

import inspect
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")

import safetensors.numpy  # noqa: E402
import tiny_models  # noqa: E402
from jax.sharding import PartitionSpec  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_models import BACKENDS, TEXTS, each_backend, each_backend_if_slow  # noqa: E402

import sotalign_jax  # noqa: E402
from sotalign_jax.encoders import backends  # noqa: E402
from sotalign_jax.encoders.digests import digest_of_model  # noqa: E402
from sotalign_jax.encoders.towers import buckets, load_encoder  # noqa: E402

with_torchax = pytest.mark.skipif(BACKENDS == ["torch"], reason="torchax is not installed")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny_models.library(tmp_path_factory)


@pytest.fixture(scope="module")
def pictures():
    return tiny_models.pictures()


def load(folder, modality, **options):
    options = {"devices": 1, "batch_size": 3} | options
    return load_encoder(str(folder), modality, **options)


def encode(encoder, items):
    return encoder.encode([encoder.preprocess(item) for item in items])


def plain(folder, loader="AutoModel", **options):
    """The model as anybody would load it."""
    found = getattr(transformers, loader)
    return found.from_pretrained(folder, attn_implementation="eager", **options).eval()


def pixels(folder, family, items):
    """What the model's own processor makes of pictures; DINOv3's is written out."""
    if family != "dinov3_vit":
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        return processor(images=items, return_tensors="pt")["pixel_values"]
    facts = json.loads((folder / "preprocessor_config.json").read_text())
    out = []
    for item in items:
        x = torch.from_numpy(np.asarray(item).astype(np.float32) / 255).permute(2, 0, 1)
        x = torch.nn.functional.interpolate(
            x[None], (28, 28), mode="bilinear", antialias=True, align_corners=False
        )
        mean, std = (torch.tensor(facts[k])[:, None, None] for k in ("image_mean", "image_std"))
        out.append((x[0] - mean) / std)
    return torch.stack(out)


def hidden_of_images(folder, family, items):
    """Hidden states of pictures, all layers and the last with its norm, by transformers."""
    loader = {
        "clip": "CLIPVisionModelWithProjection",
        "siglip": "SiglipVisionModel",
    }.get(family, "AutoModel")
    options = {"mask_ratio": 0.0} if family == "vit_mae" else {}
    inputs = {"pixel_values": pixels(folder, family, items)}
    if family == "vit_mae":
        inputs["noise"] = torch.arange(16.0).expand(len(items), -1)
    with torch.no_grad():
        return plain(folder, loader, **options)(**inputs, output_hidden_states=True)


def assert_close(got, wanted):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.asarray(wanted), rtol=5e-5, atol=3e-5)


# family -> tokens before the patches, and whether there is a class token.
IMAGES = {
    "dinov2": (1, True),
    "dinov2_with_registers": (5, True),
    "dinov3_vit": (5, True),
    "vit": (1, True),
    "vit_mae": (1, True),
    "clip": (1, True),
    "siglip": (0, False),
}
SOME = ("dinov3_vit", "dinov2_with_registers", "siglip")


def sample(families):
    """All of them; those that say less that others do not are slow."""
    return [f if f in SOME else pytest.param(f, marks=slow) for f in families]


@each_backend_if_slow
@pytest.mark.parametrize("family", sample(IMAGES))
def test_image_rows(saved, pictures, family, backend):
    folder = saved(family)
    prefix, cls = IMAGES[family]
    wanted = hidden_of_images(folder, family, pictures)
    last = wanted.last_hidden_state.double()
    mean = last[:, prefix:].mean(1)
    pooling = "cls_mean" if cls else "mean"
    encoder = load(folder, "image", backend=backend, pooling=pooling)
    rows = encode(encoder, pictures)
    assert_close(rows, torch.cat([last[:, 0], mean], 1) if cls else mean)
    said = encoder.description
    assert (said.modality, said.pooling, said.normalized) == ("image", pooling, False)
    assert said.settings["backend"] == backend
    assert json.loads(json.dumps(said.settings)) == said.settings
    if family in ("clip", "siglip"):
        own = wanted.image_embeds if family == "clip" else wanted.pooler_output
        encoder = load(folder, "image", backend=backend, normalize=True)
        assert encoder.description.pooling == "model" and encoder.description.normalized
        assert_close(encode(encoder, pictures), torch.nn.functional.normalize(own.double()))


# family -> the class that has its text tower, and what it calls its own row.
TEXTS_OF = {
    "bert": ("AutoModel", "pooler_output"),
    "clip": ("CLIPTextModelWithProjection", "text_embeds"),
    "siglip": ("SiglipTextModel", "pooler_output"),
    "qwen3": ("AutoModel", None),
    "roberta": ("AutoModel", "pooler_output"),
    "xlm-roberta": ("AutoModel", "pooler_output"),
    "mpnet": ("AutoModel", "pooler_output"),
    "distilbert": ("AutoModel", None),
    "modernbert": ("AutoModel", None),
    "qwen2": ("AutoModel", None),
    "llama": ("AutoModel", None),
    "mistral": ("AutoModel", None),
}
SOME_TEXTS = ("bert", "siglip", "qwen3")


def hidden_of_texts(folder, family, items):
    """Hidden states of texts, one at a time, so that nothing is padded, by transformers."""
    loader, _ = TEXTS_OF[family]
    model = plain(folder, loader)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    # SigLIP alone was trained on padding.
    full = {"padding": "max_length", "max_length": 64} if family == "siglip" else {}
    found = []
    for item in items:
        inputs = tokenizer(item, return_tensors="pt", **full)
        inputs.pop("token_type_ids", None)
        mask = inputs["attention_mask"][0].bool()
        if family == "siglip":
            inputs.pop("attention_mask")
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True)
        found.append((output, mask))
    return found


@each_backend
@pytest.mark.parametrize(
    "family", [f if f in SOME_TEXTS else pytest.param(f, marks=slow) for f in TEXTS_OF]
)
def test_text_rows_do_not_see_what_else_is_in_the_batch(saved, family, backend):
    folder = saved(family)
    wanted = hidden_of_texts(folder, family, TEXTS)
    own = TEXTS_OF[family][1]
    poolings = ("mean", "last", *(["model"] if own else []))
    # Poolings are the same code on both; how a model takes padding may not be.
    for pooling in poolings if backend == "torch" else poolings[-1:]:
        if pooling == "model":
            rows = [output[own][0] for output, _ in wanted]
        else:
            texts = [output.last_hidden_state[0][mask].double() for output, mask in wanted]
            rows = [x[-1] if pooling == "last" else x.mean(0) for x in texts]
        encoder = load(folder, "text", backend=backend, pooling=pooling)
        assert_close(encode(encoder, TEXTS), torch.stack(rows))


@each_backend
def test_layers(saved, pictures, backend):
    folder = saved("dinov3_vit")
    states = hidden_of_images(folder, "dinov3_vit", pictures).hidden_states
    norm = plain(folder).norm
    for layer, k in ((0, 0), (-2, 2), (3, 3)) if backend == "torch" else ((-2, 2),):
        options = {"backend": backend, "pooling": "cls", "layer": layer}
        encoder = load(folder, "image", **options)
        assert_close(encode(encoder, pictures), states[k][:, 0])
        assert encoder.description.settings["layer"] == layer
        with torch.no_grad():
            normed = norm(states[k])[:, 0]
        encoder = load(folder, "image", final_norm=True, **options)
        assert_close(encode(encoder, pictures), normed)


@pytest.mark.parametrize("family", ["bert", pytest.param("qwen3", marks=slow)])
def test_layers_of_texts(saved, family):
    folder = saved(family)
    wanted = hidden_of_texts(folder, family, TEXTS)
    for layer in (0, 1):
        rows = [output.hidden_states[layer][0].double().mean(0) for output, _ in wanted]
        encoder = load(folder, "text", backend="torch", pooling="mean", layer=layer)
        assert_close(encode(encoder, TEXTS), torch.stack(rows))


def test_decoders_pad_on_either_side(saved):
    from sotalign_jax.encoders.towers import Tower

    folder = saved("qwen3")
    encoder = load(folder, "text", backend="torch", pooling="last")
    assert isinstance(encoder, Tower) and encoder._loaded.left
    left = encode(encoder, TEXTS)
    encoder._loaded = encoder._loaded._replace(left=False)
    np.testing.assert_allclose(encode(encoder, TEXTS), left, rtol=5e-5, atol=3e-5)


@with_torchax
def test_rows_are_spread_over_devices_and_batches_are_filled_up(saved, pictures):
    folder = saved("dinov3_vit")
    one = encode(load(folder, "image", backend="torch"), pictures)
    encoder = load(folder, "image", backend="torchax", devices=4, batch_size=3)
    rows = encode(encoder, [*pictures, *pictures])  # batches of 4, of which 2 are left over
    np.testing.assert_allclose(rows, np.concatenate([one, one]), rtol=5e-5, atol=3e-5)
    run = encoder._run
    placed = jax.tree.leaves(run._state)
    assert all(len(x.sharding.device_set) == 4 for x in placed)
    inputs = encoder._inputs([encoder.preprocess(p) for p in pictures[:2]])
    assert inputs["pixel_values"].shape[0] == 4
    out = run(inputs)
    assert {s.data.shape[0] for s in out.addressable_shards} == {1}
    assert run._run._cache_size() == 1
    # Weights are arguments of the program, and no constants of it.
    with run._settings():
        program = run._run.lower(run._state, inputs).as_text()
    assert "dense_resource" not in program and len(program) < 300_000


@with_torchax
def test_sharded_weights_give_the_same_rows(saved, monkeypatch):
    monkeypatch.setattr(backends, "SMALL", 64)
    texts = [*TEXTS, *TEXTS]
    whole = load(saved("qwen3"), "text", backend="torchax", pooling="last", devices=4, batch_size=4)
    assert whole._run.weights == "replicated"  # "auto", on devices that say nothing of memory
    options = {"backend": "torchax", "pooling": "last", "devices": 4, "weights": "sharded"}
    encoder = load(saved("qwen3"), "text", batch_size=4, **options)
    rows = encode(encoder, texts)
    np.testing.assert_allclose(rows, encode(whole, texts), rtol=1e-5, atol=1e-6)
    assert encoder.description == whole.description
    run = encoder._run
    for name, x in run._state.items():
        parts = {shard.data.size for shard in x.addressable_shards}
        assert parts == {x.size // 4 if x.ndim == 2 and x.size >= 64 else x.size}, name
    inputs = encoder._inputs([encoder.preprocess(text) for text in texts[:4]])
    with run._settings():
        program = run._run.lower(run._state, inputs).compile().as_text()
    # Weights are put together, each as a whole; no sums are of parts, which would round otherwise.
    assert program.count(" all-gather(") > 10
    assert " reduce-scatter(" not in program
    sums = [line for line in program.splitlines() if " all-reduce(" in line]
    assert not [line for line in sums if "/gather" not in line]  # of one value and zeros


PLANNED = """
import numpy as np, torch, transformers
from sotalign_jax.encoders.backends import JaxBackend
from sotalign_jax.encoders.networks import RowNetwork
config = transformers.LlamaConfig(
    hidden_size=256, intermediate_size=512, num_hidden_layers=8, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=1000, attn_implementation="eager", use_cache=False)
network = RowNetwork(transformers.LlamaModel(config), pooling="mean")
weights = {name: x.numel() * 4 for name, x in network.named_parameters()}
ids = np.ones((8, 16), np.int32)
for kind in ("replicated", "sharded"):
    backend = JaxBackend(network, weights=kind)
    backend._state = {
        name: jax.ShapeDtypeStruct(x.shape, np.float32, sharding=backend._shardings[name])
        for name, x in backend._tensors()
    }
    inputs = {
        name: jax.ShapeDtypeStruct(ids.shape, ids.dtype, sharding=backend._by_row)
        for name in ("input_ids", "attention_mask")
    }
    with backend._settings():
        memory = backend._run.lower(backend._state, inputs).compile().memory_analysis()
    found[kind] = [memory.argument_size_in_bytes, memory.temp_size_in_bytes]
found["all"], found["largest"] = sum(weights.values()), max(weights.values())
"""


@with_torchax
@slow
def test_sharded_weights_are_put_together_one_by_one():
    # The scheduler of accelerators; that of CPUs, by default, starts all it can at once.
    flags = "--xla_force_host_platform_device_count=8"
    flags += " --xla_cpu_enable_concurrency_optimized_scheduler=false"
    code = f"import jax, json\nfound = {{}}\n{PLANNED}\nprint(json.dumps(found))"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["replicated"][0] >= found["all"]
    assert found["sharded"][0] < 1.02 * found["all"] / 8
    assert found["sharded"][1] < found["replicated"][1] + 2 * found["largest"] < found["all"] / 4


def test_which_weights_are_cut_and_when():
    cut = backends._spec
    assert cut((4096, 1024), 8) == PartitionSpec("rows", None)
    assert cut((1000, 4096, 3), 8) == PartitionSpec(None, "rows", None)
    assert cut((4099, 1024), 8) == PartitionSpec(None, "rows")
    assert cut((4099, 1023), 8) == cut((64, 64), 8) == cut((4096, 1024), 1) == PartitionSpec()

    def device(limit):
        known = None if limit is None else {"bytes_limit": limit}
        return types.SimpleNamespace(memory_stats=lambda: known)

    assert backends._too_much(51, device(100)) and not backends._too_much(50, device(100))
    assert not backends._too_much(10**15, device(None))


@with_torchax
def test_weights_that_layers_share_are_placed_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(11, 8)
            self.back = torch.nn.Linear(8, 11, bias=False)
            self.back.weight = self.table.weight

        def forward(self, ids):
            return self.back(self.table(ids).mean(1))

    network = Tied()
    table = network.table.weight.detach().numpy().astype(np.float64)
    backend = backends.JaxBackend(network, devices=2)
    backend.trace({"ids": ((4, 3), np.int32)})
    backend.place()
    assert backend._state["table.weight"] is backend._state["back.weight"]
    for length in (3, 5):  # the second is another program, traced without weights
        ids = np.random.default_rng(length).integers(0, 11, (4, length)).astype(np.int32)
        rows = backend.fetch(backend({"ids": ids}))
        np.testing.assert_allclose(rows, table[ids].mean(1) @ table.T, rtol=1e-5, atol=1e-6)


@with_torchax
def test_texts_compile_once_for_each_length(saved):
    encoder = load(saved("bert"), "text", backend="torchax", pooling="mean", batch_size=2)
    assert buckets(48) == (16, 32, 48) and buckets(16) == (16,) and buckets(5) == (5,)
    encode(encoder, TEXTS)
    encode(encoder, TEXTS[::-1])
    assert encoder._run._run._cache_size() == 2  # of 16 and of 32 tokens


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=slow)])
@each_backend_if_slow
def test_half_precision(saved, dtype, backend):
    folder = saved("bert")
    exact = encode(load(folder, "text", backend="torch", pooling="mean"), TEXTS)
    encoder = load(folder, "text", backend=backend, pooling="mean", dtype=dtype)
    rows = encode(encoder, TEXTS)
    assert rows.dtype == np.float32 and encoder.description.settings["dtype"] == dtype
    error = np.abs(rows - exact).max() / np.abs(exact).max()
    assert 1e-5 < error < 3e-2


def test_prompts_and_lengths_are_the_tokenizers_own(saved):
    folder = saved("bert")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(text, **options):
        encoder = load(folder, "text", backend="torch", pooling="mean", **options)
        return encoder.preprocess(text)["input_ids"].tolist(), encoder.description.settings

    got, said = ids("a cat")
    assert got == tokenizer("a cat")["input_ids"] == [257, *tokenizer.encode("a cat")[1:-1], 258]
    assert (said["prompt"], said["max_length"]) == ("", 48)
    got, said = ids("a cat", prompt="query: ")
    assert got == tokenizer("query: a cat")["input_ids"] and said["prompt"] == "query: "
    got, _ = ids("a cat", prompt="a photo of {text}.")
    assert got == tokenizer("a photo of a cat.")["input_ids"]
    got, said = ids("a cat and a dog", max_length=7)
    assert got == tokenizer("a cat")["input_ids"] and said["max_length"] == 7
    got, _ = ids("a cat and a dog", prompt="see ", max_length=9)
    assert got == tokenizer("see a c")["input_ids"]  # the prompt stays, and the text is cut
    assert got[0] == 257 and got[-1] == 258


def test_white_space_around_a_text_is_no_token(saved):
    preprocess = load(
        saved("bert"), "text", backend="torch", pooling="mean", prompt=" q:"
    ).preprocess
    wanted = preprocess("a cat")["input_ids"].tolist()
    assert preprocess.tokenizer.decode(wanted) == "<s>q:a cat</s>"
    assert preprocess("a cat \n")["input_ids"].tolist() == wanted


def test_what_a_text_ends_with(saved):
    from sotalign_jax.encoders.preprocess import TextPreprocessor

    tokenizer = transformers.AutoTokenizer.from_pretrained(saved("qwen3"))
    options = {"prompt": "", "max_length": 6}
    ids = TextPreprocessor(tokenizer, end="</s>", **options)
    assert ids("ab")["input_ids"].tolist() == tokenizer("ab")["input_ids"]  # it has it already
    other = TextPreprocessor(tokenizer, end="<|endoftext|>", **options)
    assert other("ab")["input_ids"].tolist() == [*tokenizer("ab")["input_ids"], 259]
    assert other("abcdefgh")["input_ids"].tolist()[-1] == 259
    assert len(other("abcdefgh")["input_ids"]) == 6
    with pytest.raises(ValueError, match=r"end: '<eot>' is not a token"):
        TextPreprocessor(tokenizer, end="<eot>", **options)


def test_preprocessors_travel_and_refuse(saved, pictures):
    for family, modality in (("dinov2", "image"), ("dinov3_vit", "image"), ("bert", "text")):
        options = {} if modality == "image" else {"pooling": "mean"}
        preprocess = load(saved(family), modality, backend="torch", **options).preprocess
        again = pickle.loads(pickle.dumps(preprocess))
        item = pictures[0] if modality == "image" else "a cat"
        for key, value in preprocess(item).items():
            np.testing.assert_array_equal(again(item)[key], value)
        with pytest.raises(ValueError, match=r"got int"):
            preprocess(3)
    with pytest.raises(ValueError, match=r"not valid Unicode"):
        preprocess("\ud800")


@pytest.mark.parametrize(
    "change,said",
    [
        ({"do_center_crop": True}, "do_center_crop"),
        ({"do_pad": True}, "do_pad"),
        ({"do_rescale": False}, "do_rescale"),
        ({"size": {"shortest_edge": 28}}, "shortest_edge"),
    ],
)
def test_pictures_of_dinov3_with_steps_that_are_not_known(saved, tmp_path, change, said):
    folder = tmp_path / "copy"
    shutil.copytree(saved("dinov3_vit"), folder)
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ValueError, match=rf"^name: .*steps or sizes that are not known here.*{said}"
    ):
        load(folder, "image", backend="torch")


def test_pictures_that_would_not_fit_into_memory(saved):
    narrow = Image.new("L", (1, 90_000))
    preprocess = load(saved("dinov2"), "image", backend="torch").preprocess
    with pytest.raises(ValueError, match=r"too narrow: 1 x 90000 pixels, .* side at 32"):
        preprocess(narrow)
    assert preprocess(Image.new("L", (1, 3_000)))["pixel_values"].shape == (3, 28, 28)
    # It makes them square, whatever they are.
    assert load(saved("vit"), "image", backend="torch").preprocess(narrow)


def test_pictures_of_any_kind(saved):
    preprocess = load(saved("dinov3_vit"), "image", backend="torch").preprocess
    for mode in ("L", "RGBA", "P", "1"):
        assert preprocess(Image.new(mode, (3, 1)))["pixel_values"].shape == (3, 28, 28)


@each_backend_if_slow
@pytest.mark.parametrize("family", ["dinov2", pytest.param("clip", marks=slow)])
def test_another_image_size(saved, pictures, family, backend):
    folder = saved(family)
    encoder = load(folder, "image", backend=backend, image_size=35, pooling="cls")
    assert encoder.preprocess(pictures[0])["pixel_values"].shape == (3, 35, 35)
    assert encoder.description.settings["image_size"] == [35, 35]
    said = encoder.description.settings["pixels"]
    assert said["size"] == {"shortest_edge": 40} and said["crop_size"]["height"] == 35
    x = torch.stack([torch.from_numpy(encoder.preprocess(p)["pixel_values"]) for p in pictures])
    loader = "CLIPVisionModelWithProjection" if family == "clip" else "AutoModel"
    more = {"interpolate_pos_encoding": True} if family == "clip" else {}
    with torch.no_grad():
        wanted = plain(folder, loader)(pixel_values=x, **more).last_hidden_state[:, 0]
    assert_close(encode(encoder, pictures), wanted)


def copy_of(folder, tmp_path, **changes):
    shutil.copytree(folder, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return tmp_path / "copy"


def sentence_files(folder, *, pooling, normalize=True, stage="Normalize"):
    kind = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}Pooling"},
    ]
    if normalize:
        modules.append({"idx": 2, "name": "2", "path": "2_Last", "type": f"{kind}{stage}"})
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    facts = {"max_seq_length": 11, "do_lower_case": True}
    (folder / "sentence_bert_config.json").write_text(json.dumps(facts))
    prompts = {"prompts": {"q": "Q: "}, "default_prompt_name": "q"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))


@pytest.mark.parametrize(
    "pooling",
    [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, {"pooling_mode": "cls"}],
)
def test_sentence_transformers_files(saved, tmp_path, pooling):
    folder = copy_of(saved("bert"), tmp_path)
    sentence_files(folder, pooling=pooling)
    encoder = load(folder, "text", backend="torch")
    said = encoder.description
    assert (said.pooling, said.normalized) == ("cls", True)
    assert (said.settings["prompt"], said.settings["max_length"]) == ("Q: ", 11)
    assert said.settings["files"] == digest_of_model(folder)
    wanted = hidden_of_texts(saved("bert"), "bert", ["q: a cat"])[0][0].last_hidden_state[:, 0]
    assert_close(encode(encoder, ["A CAT"]), torch.nn.functional.normalize(wanted))
    # What is given overrides what the files say.
    encoder = load(folder, "text", backend="torch", normalize=False, prompt="", max_length=20)
    said = encoder.description
    assert (said.normalized, said.settings["prompt"], said.settings["max_length"]) == (
        False,
        "",
        20,
    )


@pytest.mark.parametrize(
    "pooling,expected",
    [
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
    ],
)
def test_sentence_transformers_files_without_unit_length(saved, tmp_path, pooling, expected):
    folder = copy_of(saved("bert"), tmp_path)
    sentence_files(folder, pooling=pooling, normalize=False)
    said = load(folder, "text", backend="torch").description
    assert (said.pooling, said.normalized) == (expected, False)


def test_sentence_transformers_files_that_are_not_known(saved, tmp_path):
    folder = copy_of(saved("bert"), tmp_path)
    sentence_files(folder, pooling={"pooling_mode": "attention"})
    with pytest.raises(ValueError, match=r"pooling: .* says attention; known are cls, last, mean"):
        load(folder, "text", backend="torch")
    sentence_files(folder, pooling={})
    with pytest.raises(ValueError, match=r"pooling: .* says nothing"):
        load(folder, "text", backend="torch")
    leaves = {"pooling_mode": "weightedmean", "include_prompt": False}
    sentence_files(folder, pooling=leaves)
    with pytest.raises(ValueError, match=r"^pooling: .* leaves the prompt out"):
        load(folder, "text", backend="torch")
    sentence_files(folder, pooling={"pooling_mode_cls_token": True}, stage="LSTM")
    with pytest.raises(ValueError, match=r"stages Transformer, Pooling, LSTM"):
        load(folder, "text", backend="torch")
    assert load(folder, "text", backend="torch", pooling="mean").description.pooling == "mean"
    (folder / "modules.json").write_text("[{")
    with pytest.raises(ValueError, match=r"^name: .*modules\.json is not JSON"):
        load(folder, "text", backend="torch")


def test_a_hub_that_fails_does_not_change_the_pooling(saved, tmp_path, monkeypatch):
    folder, hub = copy_of(saved("bert"), tmp_path), transformers.utils.hub
    sentence_files(folder, pooling={"pooling_mode_cls_token": True})
    real = hub.cached_files

    def fails(path_or_repo_id, filenames, _raise_exceptions_for_connection_errors=True, **options):
        if filenames == ["modules.json"]:
            if _raise_exceptions_for_connection_errors:
                raise OSError("There was a specific connection error\n503")
            return None
        return real(path_or_repo_id, filenames, **options)

    monkeypatch.setattr(hub, "cached_files", fails)
    with pytest.raises(ValueError, match=r"^name: .* not read from the hub \(.* error\)$"):
        load(folder, "text", backend="torch", pooling="mean")


REFUSED = {
    "modality: must be": ("bert", "video", {}),
    "modality: a model of type 'bert' encodes texts": ("bert", "image", {}),
    "modality: a model of type 'vit' encodes images": ("vit", "text", {"pooling": "mean"}),
    "pooling: nothing says how": ("bert", "text", {}),
    "pooling: must be one of cls, last, mean, max, mean_sqrt_len_tokens, weightedmean, model for": (
        "bert",
        "text",
        {"pooling": "cls_mean"},
    ),
    "pooling: .* needs register tokens": ("dinov2", "image", {"pooling": "cls_mean_shifted"}),
    "pooling: .* needs a class token": ("siglip", "image", {"pooling": "cls"}),
    "pooling: .* has no row of its own": ("qwen3", "text", {"pooling": "model"}),
    "layer: the model has 3 blocks, so layers -4 to 3; got 4": ("dinov2", "image", {"layer": 4}),
    "layer: the model's own row": ("clip", "text", {"layer": 1}),
    "final_norm: is of a layer": ("dinov2", "image", {"final_norm": True}),
    "final_norm: .* no last norm": (
        "bert",
        "text",
        {"pooling": "mean", "layer": 1, "final_norm": True},
    ),
    "prompt: is of texts": ("dinov2", "image", {"prompt": "x"}),
    "max_length: is of texts": ("dinov2", "image", {"max_length": 8}),
    "max_length: must be at least 1, got 0": ("bert", "text", {"max_length": 0}),
    "max_length: .* takes at most 48, got 49": (
        "bert",
        "text",
        {"pooling": "mean", "max_length": 49},
    ),
    # Positions of its kin are counted from the id of padding.
    "max_length: .*roberta.* takes at most 48, got 49": (
        "roberta",
        "text",
        {"pooling": "mean", "max_length": 49},
    ),
    "max_length: the prompt and the special tokens take 6": (
        "bert",
        "text",
        {"pooling": "mean", "prompt": "see ", "max_length": 6},
    ),
    "image_size: is of images": ("bert", "text", {"image_size": 28}),
    "image_size: the model takes no pictures of 3 x 3": ("dinov2", "image", {"image_size": 3}),
    "dtype: must be one of": ("bert", "text", {"dtype": "int8"}),
    "backend: must be one of": ("bert", "text", {"backend": "jax"}),
    "batch_size: must be at least 1, got 0": ("bert", "text", {"batch_size": 0}),
    "devices: must be at least 0, got -1": ("bert", "text", {"devices": -1}),
    "weights: must be one of auto, repl": ("bert", "text", {"pooling": "mean", "weights": "all"}),
    "weights: PyTorch has them on one": ("bert", "text", {"pooling": "mean", "weights": "sharded"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(saved, message):
    family, modality, options = REFUSED[message]
    with pytest.raises(ValueError, match=f"^{message}"):
        load(saved(family), modality, **({"backend": "torch"} | options))


@pytest.mark.parametrize(
    "option,value,right",
    [
        ("normalize", "False", "true or false"),  # as --option=normalize=False is read
        ("final_norm", 1, "true or false"),
        ("trust_remote_code", "False", "true or false"),
        ("pooling", True, "a string"),
        ("prompt", 3, "a string"),
        ("revision", 12, "a string"),
        ("max_length", "8", "a whole number"),
        ("batch_size", True, "a whole number"),
    ],
)
def test_options_of_another_type(saved, option, value, right):
    unchecked = inspect.unwrap(load_encoder)  # outside of tests nothing else looks at types
    options = {"layer": 1} if option == "final_norm" else {}
    with pytest.raises(ValueError, match=f"^{option}: must be {right}, got {value!r}$"):
        unchecked(str(saved("bert")), "text", backend="torch", **options, **{option: value})


@with_torchax
def test_too_many_devices(saved):
    with pytest.raises(ValueError, match=r"^devices: 99 asked"):
        load(saved("bert"), "text", pooling="mean", backend="torchax", devices=99)


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^name: must be a preset"):
        load_encoder("", "text")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"^name: .*empty has no config"):
        load_encoder(str(tmp_path / "empty"), "text", backend="torch")
    with pytest.raises(ValueError, match=r"similar presets: .*dinov3-vitl16") as caught:
        load_encoder("dinov3-vitl-16", "image", backend="torch")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^modality: the preset .*'clip-vitb32-text'"):
        load_encoder("clip-vitb32-image", "text")


def test_weights_that_are_not_there(saved, tmp_path):
    folder = copy_of(saved("bert"), tmp_path, num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"^name: .* has no weights for encoder\.layer\.3"):
        load(folder, "text", backend="torch", pooling="mean")


@pytest.mark.parametrize("family,modality", [("bert", "text"), ("vit", "image")])
def test_a_row_of_its_own_that_was_never_trained(saved, tmp_path, family, modality):
    folder = copy_of(saved(family), tmp_path)
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    kept = {k: v for k, v in weights.items() if "pooler" not in k}
    assert len(kept) == len(weights) - 2
    safetensors.numpy.save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"^pooling: .* has no weights for pooler\.dense"):
        load(folder, modality, backend="torch", pooling="model")
    assert load(folder, modality, backend="torch", pooling="cls")


def test_weights_that_cannot_be_read(saved, tmp_path):
    folder = copy_of(saved("bert"), tmp_path)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"^name: .* cannot be (loaded|read)"):
        load(folder, "text", backend="torch", pooling="mean")


def test_options_are_checked_before_weights_are_read(saved, tmp_path):
    folder = copy_of(saved("bert"), tmp_path)
    (folder / "model.safetensors").unlink()
    for message, options in {
        "max_length": {"max_length": 49},
        "layer": {"layer": 9},
        "final_norm": {"layer": 1, "final_norm": True},
        "devices": {"devices": 99, "backend": BACKENDS[-1]} if BACKENDS[1:] else {"devices": -1},
    }.items():
        with pytest.raises(ValueError, match=f"^{message}: "):
            load(folder, "text", **({"backend": "torch", "pooling": "mean"} | options))


def test_items_of_another_encoder_are_refused(saved, pictures):
    encoder = load(saved("dinov2"), "image", backend="torch")
    with pytest.raises(ValueError, match=r"needs at least one item"):
        encoder.encode([])
    with pytest.raises(ValueError, match=r"must have pixel_values, got input_ids"):
        encoder.encode([{"input_ids": np.ones(3, np.int32)}])
    with pytest.raises(ValueError, match=r"must be \(3, 28, 28\)"):
        encoder.encode([{"pixel_values": np.ones((3, 14, 14), np.float32)}])
    texts = load(saved("bert"), "text", backend="torch", pooling="mean")
    for length in (0, 49):
        with pytest.raises(ValueError, match=r"of 1 to 48 tokens"):
            texts.encode([{"input_ids": np.ones(length, np.int32)}])


@with_torchax
def test_auto_takes_pytorch_where_torchax_cannot(saved, monkeypatch):
    def lacking(self, inputs):
        raise NotImplementedError("no such operation\nat all")

    folder = saved("bert")
    assert load(folder, "text", pooling="mean").description.settings["backend"] == "torch"
    monkeypatch.setattr(backends, "_has_accelerator", lambda: True)
    assert load(folder, "text", pooling="mean").description.settings["backend"] == "torchax"
    monkeypatch.setattr(backends.JaxBackend, "trace", lacking)
    with pytest.raises(ValueError, match=r"^backend: torchax cannot trace .*no such operation\)"):
        load(folder, "text", pooling="mean", backend="torchax")
    with pytest.warns(UserWarning, match="PyTorch runs it instead"):
        encoder = load(folder, "text", pooling="mean")
    assert encoder.description.settings["backend"] == "torch"
    exact = encode(load(folder, "text", pooling="mean", backend="torch"), TEXTS)
    np.testing.assert_array_equal(encode(encoder, TEXTS), exact)


def test_missing_extras_are_named(saved, monkeypatch):
    from sotalign_jax.encoders import extras

    real = extras.importlib.import_module

    def without(*names):
        def find(module):
            if module in names:
                raise ModuleNotFoundError(f"No module named {module!r}")
            return real(module)

        return find

    folder = saved("bert")
    monkeypatch.setattr(extras.importlib, "import_module", without("torchax"))
    with pytest.raises(ImportError, match=r"^backend='torchax': .*sotalign-jax\[torchax\]"):
        load(folder, "text", pooling="mean", backend="torchax")
    assert load(folder, "text", pooling="mean").description.settings["backend"] == "torch"
    for missing, message in (
        ("torch", r"^backend: install the extra, sotalign-jax\[encoders\]"),
        ("transformers", r"^name: .*sotalign-jax\[encoders\]"),
    ):
        monkeypatch.setattr(extras.importlib, "import_module", without(missing))
        with pytest.raises(ImportError, match=message):
            load(folder, "text", pooling="mean", backend="torch" if missing != "torch" else "auto")


@with_torchax
def test_the_users_own_torch_stays_as_it_was(saved):
    encode(load(saved("siglip"), "text", backend="torchax"), TEXTS)
    assert torch.backends.mha.get_fastpath_enabled()
    x = torch.ones(2) + torch.arange(2)
    assert type(x) is torch.Tensor and x.device.type == "cpu"
    import torchax

    assert not torchax.default_env().enabled


def test_a_workers_imports_are_few(saved, tmp_path):
    preprocess = load(saved("bert"), "text", backend="torch", pooling="mean").preprocess
    (tmp_path / "preprocess").write_bytes(pickle.dumps(preprocess))
    code = (
        "import pickle, sys; sys.path.insert(0, sys.argv[2]); "
        "f = pickle.load(open(sys.argv[1], 'rb')); "
        "print(f('a cat')['input_ids'].tolist(), 'jax' in sys.modules)"
    )
    arguments = [str(tmp_path / "preprocess"), str(pathlib.Path(sotalign_jax.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"{preprocess('a cat')['input_ids'].tolist()} False"


REMOTE = """
import torch
from transformers import BertConfig, BertModel

class OwnConfig(BertConfig):
    model_type = "own"

class OwnModel(BertModel):
    config_class = OwnConfig

    def forward(self, input_ids, attention_mask):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
        output["pooler_output"] = -output.last_hidden_state[:, 0]
        return output
"""


def test_code_of_a_model_runs_only_where_it_is_trusted(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    auto = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}
    folder = copy_of(saved("bert"), tmp_path, model_type="own", auto_map=auto)
    (folder / "own.py").write_text(REMOTE)
    with pytest.raises(ValueError, match=r"^trust_remote_code: .* comes with code of its own"):
        load(folder, "text", backend="torch", pooling="model")
    encoder = load(folder, "text", backend="torch", pooling="model", trust_remote_code=True)
    wanted = hidden_of_texts(saved("bert"), "bert", TEXTS)
    rows = torch.stack([-output.last_hidden_state[0, 0] for output, _ in wanted])
    assert_close(encode(encoder, TEXTS), rows)
