"""Stages of sentence-transformers, from files as it writes them, against modules of PyTorch."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402
import tiny_models  # noqa: E402
from tiny_models import TEXTS, each_backend, each_backend_if_slow  # noqa: E402

from sotalign_jax.encoders.towers import load_encoder  # noqa: E402

# Of so few tokens that torchax compiles one program.
SHORT = ["a cat", "x", "yes it is"]
KIND = "sentence_transformers.models."


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny_models.save(folder, "bert")
    return folder


@pytest.fixture
def model(bert, tmp_path):
    """A model's files but those of its stages."""
    for path in bert.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def write(folder, stages, pooling, **facts):
    """The files of stages after Transformer and Pooling: None scales to length 1."""
    named = [("", "Transformer"), ("1_Pooling", "Pooling")]
    for k, stage in enumerate(stages, 2):
        path = f"{k}_{'Normalize' if stage is None else 'Dense'}"
        named.append((path, path[2:]))
        if stage is not None:
            (folder / path).mkdir(exist_ok=True)
            (folder / path / "config.json").write_text(json.dumps(stage[0]))
            safetensors.torch.save_file(stage[1], folder / path / "model.safetensors")
    modules = [
        {"idx": k, "name": str(k), "path": path, "type": KIND + stage}
        for k, (path, stage) in enumerate(named)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(facts))


def dense(inputs, outputs, *, bias=True, activation="activation.Tanh", **more):
    """A layer's configuration and its weights."""
    generator = torch.Generator().manual_seed(inputs * 100 + outputs)
    weights = {"linear.weight": torch.randn(outputs, inputs, generator=generator) / inputs**0.5}
    if bias:
        weights["linear.bias"] = torch.randn(outputs, generator=generator)
    facts = {
        "in_features": inputs,
        "out_features": outputs,
        "bias": bias,
        "activation_function": f"torch.nn.modules.{activation}",
        **more,
    }
    return facts, weights


def load(folder, **options):
    options = {"devices": 1, "batch_size": 3, "backend": "torch"} | options
    return load_encoder(str(folder), "text", **options)


def encode(encoder, items=TEXTS):
    return encoder.encode([encoder.preprocess(item) for item in items])


def hidden(folder, items=TEXTS):
    """The tokens of each text, alone and so without padding, by transformers."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return [
            model(torch.tensor([tokenizer(item)["input_ids"]])).last_hidden_state[0].double()
            for item in items
        ]


def affine(rows, stage):
    facts, weights = stage
    out = rows @ weights["linear.weight"].double().T
    return out + weights["linear.bias"].double() if facts["bias"] else out


def unit(rows):
    return rows / (rows**2).sum(1, keepdim=True) ** 0.5


def assert_close(got, wanted):
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.asarray(wanted), rtol=5e-5, atol=3e-5)


MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}


@each_backend
def test_layers_after_the_pooling(model, backend):
    """As LaBSE has one with tanh, and EmbeddingGemma two without bias or activation."""
    first = dense(16, 12)
    second = dense(12, 20, bias=False, activation="linear.Identity")
    write(model, [first, second, None], MEAN)
    encoder = load(model, backend=backend)
    mean = torch.stack([x.mean(0) for x in hidden(model, SHORT)])
    wanted = affine(torch.tanh(affine(mean, first)), second)
    assert_close(encode(encoder, SHORT), unit(wanted))
    said = encoder.description
    assert (said.pooling, said.normalized) == ("mean", True)
    assert said.settings["after_pooling"] == ["Dense", "Dense"]
    # The last stage can be left out, and the layers stay.
    assert_close(encode(load(model, normalize=False), SHORT), wanted)


def test_rows_are_scaled_where_the_files_say(model):
    layer = dense(16, 5, activation="activation.GELU")
    write(model, [None, layer], MEAN)
    encoder = load(model)
    mean = torch.stack([x.mean(0) for x in hidden(model)])
    wanted = torch.nn.functional.gelu(affine(unit(mean), layer))
    assert_close(encode(encoder), wanted)
    assert not encoder.description.normalized
    assert encoder.description.settings["after_pooling"] == ["UnitLength", "Dense"]
    assert_close(encode(load(model, normalize=True)), unit(wanted))


@pytest.mark.parametrize("outputs", [16, 6])
def test_layers_with_a_residual(model, outputs):
    facts, weights = dense(16, outputs, use_residual=True)
    if outputs != 16:
        weights["residual.weight"] = torch.randn(outputs, 16)
    write(model, [(facts, weights)], MEAN)
    mean = torch.stack([x.mean(0) for x in hidden(model)])
    added = mean if outputs == 16 else mean @ weights["residual.weight"].double().T
    assert_close(encode(load(model)), torch.tanh(affine(mean, (facts, weights))) + added)


def test_weights_of_older_files_and_the_default_activation(model):
    facts, weights = dense(16, 4)
    del facts["activation_function"], facts["bias"]
    write(model, [(facts, weights)], MEAN)
    expected = encode(load(model))
    (model / "2_Dense" / "model.safetensors").unlink()
    torch.save(weights, model / "2_Dense" / "pytorch_model.bin")
    np.testing.assert_array_equal(encode(load(model)), expected)
    mean = torch.stack([x.mean(0) for x in hidden(model)])
    assert_close(expected, torch.tanh(affine(mean, (facts | {"bias": True}, weights))))


def test_another_pooling_or_layer_leaves_the_layers_out(model):
    """They were trained on rows of the pooling that the files name."""
    write(model, [dense(16, 4), None], MEAN)
    assert encode(load(model, pooling="mean")).shape == (5, 4)
    for options in ({"pooling": "cls"}, {"layer": -1}):
        encoder = load(model, **options)
        assert "after_pooling" not in encoder.description.settings
        assert encode(encoder).shape == (5, 16) and encoder.description.normalized


@pytest.mark.parametrize(
    "pooling,expected",
    [
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": False}, "max"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "mean_sqrt_len_tokens"),
        ({"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        (
            {"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True, **MEAN}
            | {"pooling_mode_cls_token": True},
            "cls+mean+last",
        ),
        ({"pooling_mode": ["lasttoken", "max"]}, "last+max"),
    ],
)
def test_poolings_and_their_order(model, pooling, expected):
    write(model, [], pooling)
    encoder = load(model)
    assert encoder.description.pooling == expected
    parts = {
        "cls": lambda x: x[0],
        "last": lambda x: x[-1],
        "mean": lambda x: x.mean(0),
        "max": lambda x: x.max(0).values,
        "mean_sqrt_len_tokens": lambda x: x.sum(0) / len(x) ** 0.5,
        "weightedmean": lambda x: (
            sum((k + 1) * one for k, one in enumerate(x)) / (len(x) * (len(x) + 1) / 2)
        ),
    }
    rows = [torch.cat([parts[one](x) for one in expected.split("+")]) for x in hidden(model)]
    assert_close(encode(encoder), torch.stack(rows))


@each_backend_if_slow
def test_the_prompt_is_not_pooled(model, backend):
    """It is seen by the text's tokens, and counts for none of the mean."""
    prompts = {"prompts": {"q": "Say: "}, "default_prompt_name": "q"}
    write(model, [], MEAN | {"include_prompt": False}, **prompts)
    encoder = load(model, backend=backend)
    assert encoder.description.settings["prompt_pooled"] is False
    tokens = hidden(model, [f"Say: {text}" for text in SHORT])
    # Not <s> and the five bytes of "Say: ".
    assert_close(encode(encoder, SHORT), torch.stack([x[6:].mean(0) for x in tokens]))
    with pytest.raises(ValueError, match=r"text is empty"):
        encoder.preprocess(" ")
    rows = encode(load(model, prompt=""), SHORT)
    assert_close(rows, torch.stack([x.mean(0) for x in hidden(model, SHORT)]))
    with pytest.raises(ValueError, match=r"^prompt: .* must be before the text"):
        load(model, prompt="a {text}")
    # What is given overrides what the files say.
    rows = encode(load(model, pooling="cls"), SHORT)
    assert_close(rows, torch.stack([x[0] for x in tokens]))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"activation_function": "os.system"}, r"activation 'os\.system', which is not one of"),
        ({"activation_function": "torch.nn.functional.gelu"}, r"gelu', which is not one of"),
        ({"activation_function": "torch.nn.modules.linear.Linear"}, r"needs arguments"),
        ({"out_features": 5}, r"no weights of 16 to 5 features \(.*size mismatch"),
        ({"module_input_name": "token_embeddings"}, r"is of token_embeddings, and not of rows"),
        ({"in_features": None}, r"in_features"),
    ],
)
def test_layers_that_are_not_known(model, change, message):
    facts, weights = dense(16, 4)
    changed = {k: v for k, v in (facts | change).items() if v is not None}
    write(model, [(changed, weights)], MEAN)
    with pytest.raises(ValueError, match=rf"^name: .*{message}") as caught:
        load(model)
    assert "\n" not in str(caught.value)
    assert encode(load(model, pooling="cls")).shape == (5, 16)


def test_layers_that_do_not_fit_the_model(model):
    write(model, [dense(17, 4)], MEAN)
    with pytest.raises(ValueError, match=r"^name: .* takes rows of 17 features, and gets 16"):
        load(model)
    write(model, [dense(16, 4), dense(5, 3)], MEAN)
    with pytest.raises(ValueError, match=r"^name: .* takes rows of 5 features, and gets 4"):
        load(model)


def test_layers_without_files(model):
    write(model, [dense(16, 4)], MEAN)
    (model / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^name: .* a stage 2_Dense without its weights"):
        load(model)
    (model / "2_Dense" / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"^name: .*pytorch_model\.bin has no weights of 16 to 4"):
        load(model)
    (model / "2_Dense" / "config.json").unlink()
    with pytest.raises(ValueError, match=r"^name: .* a stage 2_Dense without its config"):
        load(model)
