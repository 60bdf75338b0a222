"""The card says what it was given, and nothing else."""

import pytest
from ml_collections import ConfigDict

from sotalign_jax.config import default_config
from sotalign_jax.interop import LOADER, model_card

SCORES = {f"{side}recall@{k}": 0.1234 for side in ("t2i/", "i2t/", "mean_") for k in (1, 5, 10)} | {
    "n_images": 400.0,
    "n_texts": 2000.0,
    "foscttm": 0.1,
}


def document(**metadata):
    return {
        "image_dim": 6,
        "text_dim": 9,
        "dim": 4,
        "sotalign_jax": "0.1.0",
        "recipe": "x = x / |x|; done",
        "metadata": metadata,
    }


def test_a_run():
    config = default_config()
    config.seed = 7
    features = {
        "image": {"encoder": "dinov3-vitl16", "pooling": "cls_mean", "normalized": False, "dim": 6},
        "text": {"encoder": "nv-embed-v2", "dim": 9},
    }
    results = {
        "pairs": 300,
        "selected_step": 1_200,
        "test": SCORES,
        "teacher_test": SCORES | {"mean_recall@1": 0.5},
    }
    card = model_card(
        document(data="CC3M", features=features, config=ConfigDict(config).to_dict(), step=9),
        results,
        name="my | model",
        changed={"loss.alpha": 0.5},
    )
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: sotalign_jax" in front
    assert "# my \\| model" in body
    assert "| image | dinov3-vitl16 | cls_mean | no | 6 |" in body
    assert "| text | nv-embed-v2 | unknown | unknown | 9 |" in body
    assert "- method: sotalign, teacher cca, layers from a random start" in body
    assert "- pairs: 300; step selected: 1,200" in body and "- seed: 7" in body
    assert "loss.alpha = 0.5" in body
    row = next(line for line in body.splitlines() if line.startswith("| test: 400 images, 2000"))
    assert row.count("12.3") == 9
    teacher = next(line for line in body.splitlines() if "its teacher alone" in line)
    assert "50.0" in teacher
    assert LOADER.rstrip() in body
    assert "| val" not in body
    assert "## Forward pass\n\n```\nx = x / |x|\ndone\n```\n" in body


def test_a_teacher_is_not_called_a_trained_model():
    card = model_card(document(data="CC3M", config=ConfigDict(default_config()).to_dict()))
    assert "- method: the linear teacher alone, cca\n" in card
    assert "method: sotalign" not in card


def test_little_is_known():
    card = model_card(document(), name="imported", loader=False)
    assert card.count("Not recorded.") == 2
    assert "- method: not recorded" in card and "- data: not recorded" in card
    assert "PyTorch" not in card and "seed" not in card


def test_a_fitted_aligner():
    card = model_card(document() | {"kind": "csa"})
    assert "- method: csa" in card


@pytest.mark.parametrize("value", ["two\nlines", "a | b"])
def test_a_table_stays_a_table(value):
    card = model_card(document(features={"image": {"encoder": value}, "text": {}}))
    rows = [line for line in card.splitlines() if line.startswith("| image")]
    assert len(rows) == 1 and rows[0].replace("\\|", "").count("|") == 3
