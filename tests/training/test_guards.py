"""What keeps a run from being wrong in silence: held-out ids, priors, locks, half-written files."""

import numpy as np
import pytest

from sotalign_jax.config import ConfigError, default_config, validate
from sotalign_jax.features import write_store
from sotalign_jax.objectives import OBJECTIVES, loss_settings
from sotalign_jax.training.data import load_splits
from sotalign_jax.training.workdir import Workdir


def files_config(folder, test_ids):
    """A corpus of 60 items, and test files that hold some of them."""
    rng = np.random.default_rng(0)
    ids = [f"item-{i}" for i in range(60)]
    for side, dim in (("image", 5), ("text", 4)):
        rows = rng.standard_normal((60, dim)).astype(np.float32)
        write_store(folder / side, rows, ids=ids, dtype="float32")
        chosen = rows[[ids.index(i) for i in test_ids]]
        write_store(folder / f"test_{side}", chosen, ids=test_ids, dtype="float32")
    config = default_config()
    config.data.n_pairs = 20
    for name in ("image", "text", "test_image", "test_text"):
        config.data.files[name] = str(folder / name)
    return validate(config)


def test_rows_of_the_test_set_are_never_trained_on(tmp_path):
    test_ids = [f"item-{i}" for i in range(0, 60, 3)]
    splits = load_splits(files_config(tmp_path, test_ids))
    assert sorted(splits.test.image.ids) == sorted(test_ids)
    for table in (splits.pairs.image, splits.unpaired_image, splits.unpaired_text):
        assert not set(table.ids) & set(test_ids)
    assert len(splits.pairs) + len(splits.unpaired_image) + len(splits.unpaired_text) == 40


@pytest.mark.parametrize(
    ("objective", "normalization", "expected"),
    [
        ("sail", "mean", 1 / 50),
        ("sotalign", "rows", 1 / 50),
        # 50 true pairs among 50 x 70, and among 80 x 50, each block weighing one half
        ("sail_semi", "mean", 0.5 / 70 + 0.5 / 80),
        # one weight for every entry of both blocks
        ("sail_semi", "rows", 100 / (50 * 70 + 80 * 50)),
    ],
)
def test_the_prior_is_the_share_of_true_pairs(objective, normalization, expected):
    config = default_config()
    config.objective = objective
    config.loss.normalization = normalization
    prior = OBJECTIVES[objective].prior(loss_settings(validate(config)), 50, 30, 20)
    assert prior == pytest.approx(expected)


def test_one_pair_has_no_prior():
    assert OBJECTIVES["sail"].prior(loss_settings(default_config()), 1, 0, 0) is None


def test_one_process_at_a_time(tmp_path):
    config = validate(default_config())
    with Workdir(tmp_path / "run", config).locked():
        other = Workdir(tmp_path / "run", config)
        with pytest.raises(ConfigError, match=r"workdir: another process is at work"):
            other.locked().__enter__()
    with other.locked():
        pass


def test_a_url_is_no_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"workdir: gs://bucket/run is a URL"):
        Workdir("gs://bucket/run", validate(default_config()))
    assert not list(tmp_path.iterdir())


def test_an_empty_configuration_file_is_named(tmp_path):
    (tmp_path / "config.json").write_text("")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        Workdir(tmp_path, validate(default_config()))


def test_what_is_compared_or_watched_may_change_on_a_restart(tmp_path):
    config = validate(default_config())
    Workdir(tmp_path, config).start(config)
    config.compare.seeds = (0, 1)
    config.metrics.tensorboard = True
    Workdir(tmp_path, config)
    config.steps = 7
    with pytest.raises(ConfigError, match=r"another configuration \(steps: 2000 -> 7\)"):
        Workdir(tmp_path, config)
