"""Models of timm against what timm computes itself, on a tiny random one."""

import json
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
timm = pytest.importorskip("timm", exc_type=ImportError)  # it needs torchvision too

import tiny_models  # noqa: E402
from tiny_models import each_backend  # noqa: E402

from sotalign_jax.encoders.digests import digest_of_model  # noqa: E402
from sotalign_jax.encoders.towers import load_encoder  # noqa: E402

VIT = {"img_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 3, "num_heads": 2}
MODELS = {
    "vit_small_patch14_reg4_dinov2": (VIT, 5),
    "vit_small_patch16_dinov3": (VIT, 5),
    "vit_tiny_patch16_224": (VIT, 1),
    "resnet10t": ({}, 0),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    from timm.models import save_for_hf

    made = {}

    def folder(name):
        if name not in made:
            options, _ = MODELS[name]
            torch.manual_seed(0)
            model = timm.create_model(name, pretrained=False, **options)
            if options:  # a convolutional network would overflow
                tiny_models.randomize(model)
            made[name] = tmp_path_factory.mktemp(name)
            size = {"input_size": (3, 28, 28), "fixed_input_size": False}
            model.pretrained_cfg = {**model.pretrained_cfg, **size}
            save_for_hf(model.eval(), made[name], model_args=options)
        return made[name]

    return folder


def load(folder, **options):
    options = {"devices": 1, "batch_size": 3} | options
    return load_encoder(f"timm:local-dir:{folder}", "image", **options)


def encode(encoder, items):
    return encoder.encode([encoder.preprocess(item) for item in items])


def assert_close(got, wanted):
    np.testing.assert_allclose(got, np.asarray(wanted), rtol=5e-5, atol=5e-5)


@each_backend
@pytest.mark.parametrize("name", MODELS)
def test_rows(saved, name, backend):
    folder, (_, prefix) = saved(name), MODELS[name]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    data = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**data, is_training=False)
    items = tiny_models.pictures()
    with torch.no_grad():
        features = model.forward_features(torch.stack([transform(p) for p in items]))
        own = model.forward_head(features, pre_logits=True)
    features = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
    encoder = load(folder, backend=backend, pooling="model")
    assert_close(encode(encoder, items), own)
    said = encoder.description
    assert said.settings["timm"] == timm.__version__ and said.settings["image_size"] == [28, 28]
    assert said.settings["files"] == digest_of_model(folder)
    assert json.loads(json.dumps(said.settings)) == said.settings
    encoder = load(folder, backend=backend, pooling="mean")
    assert_close(encode(encoder, items), features[:, prefix:].double().mean(1))
    again = pickle.loads(pickle.dumps(encoder.preprocess))
    one = encoder.preprocess(items[0])["pixel_values"]
    np.testing.assert_array_equal(again(items[0])["pixel_values"], one)
    if prefix == 5:
        encoder = load(folder, backend=backend, pooling="cls_mean_shifted")
        shifted = features[:, 1:-4].double().mean(1)
        assert_close(encode(encoder, items), torch.cat([features[:, 0], shifted], 1))


@each_backend
def test_layers(saved, backend):
    folder = saved("vit_small_patch14_reg4_dinov2")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    items = tiny_models.pictures()
    encoder = load(folder, backend=backend, pooling="cls", layer=2)
    x = torch.stack([torch.from_numpy(encoder.preprocess(p)["pixel_values"]) for p in items])
    with torch.no_grad():
        (state,) = model.forward_intermediates(
            x, indices=[1], return_prefix_tokens=True, norm=False, intermediates_only=True
        )
    assert_close(encode(encoder, items), state[1][:, 0])


def test_refusals(saved):
    folder = saved("resnet10t")
    for message, options in {
        "pooling: nothing says how": {},
        "pooling: 'cls' needs a class token": {"pooling": "cls"},
        "layer: the model has 0 blocks": {"pooling": "mean", "layer": 1},
        "revision: timm takes it in the name": {"pooling": "mean", "revision": "main"},
        "image_size: .* takes no other": {"pooling": "mean", "image_size": 35},
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            load(folder, backend="torch", **options)
    with pytest.raises(ValueError, match=r"^modality: models of timm encode images"):
        load_encoder(f"timm:local-dir:{folder}", "text")
    with pytest.raises(ValueError, match=r"^name: timm:no_such_model cannot be loaded"):
        load_encoder("timm:no_such_model", "image", pooling="mean")
