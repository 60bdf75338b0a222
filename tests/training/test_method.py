"""The method does what it is for: in a world with known truth, the unpaired rows help.

Measured on this configuration, mean recall@1 of 500 test rows, seeds 0 and 1: SOTAlign 0.909 and
0.922, its teacher 0.703 and 0.708, SigLIP alone from the same start 0.824 and 0.869, SOTAlign with
512 unpaired rows 0.639 and 0.635. A broken KLOT, gradient or sampling closes these gaps.
"""

import pytest

from sotalign_jax.config import default_config
from sotalign_jax.training import train


def platonic(**fields):
    config = default_config()
    config.mesh.devices = 1
    config.update_from_flattened_dict(
        {
            "data.name": "platonic",
            "data.n_pairs": 300,
            "data.n_unpaired": 4_000,
            "data.platonic.n_val": 50,
            "data.platonic.n_test": 500,
            "teacher.ridge": 1e-3,
            "model.init": "teacher",
            "model.layer_norm": False,
            "loss.alpha": 0.1,
            "loss.epsilon": 0.1,
            "batch.unpaired": 512,
            "optimizer.learning_rate": 3e-4,
            "steps": 150,
            "log_every": 50,
            "eval_every": 0,
            "checkpoint_every": 0,
        }
        | fields
    )
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    variants = {
        "sotalign": {},
        "siglip": {"objective": "sail"},
        "few unpaired": {"data.n_unpaired": 512},
    }
    return {
        name: train(platonic(**fields), tmp_path_factory.mktemp("run") / "workdir", quiet=True)
        for name, fields in variants.items()
    }


def recall(results, name="test"):
    return results[name]["mean_recall@1"]


def test_beats_its_teacher(runs):
    assert recall(runs["sotalign"]) > recall(runs["sotalign"], "teacher_test") + 0.12


def test_beats_siglip_from_the_same_start(runs):
    assert recall(runs["sotalign"]) > recall(runs["siglip"]) + 0.04


def test_more_unpaired_rows_help(runs):
    assert recall(runs["sotalign"]) > recall(runs["few unpaired"]) + 0.15
