"""From a configuration to a teacher: what standardised columns and a refit do to a run."""

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import reference
from tiny_runs import from_teacher, tiny

from sotalign_jax import commands, features
from sotalign_jax.config import ConfigError, validate
from sotalign_jax.features import FeatureTable, write_store
from sotalign_jax.models import Aligner
from sotalign_jax.teachers import cca, moments_of, refit
from sotalign_jax.training import data, evaluate, fit_teacher, init_aligner, load_splits, train

STANDARDIZED = {"teacher__standardize__image": 0.5}
REFIT = {"teacher__refit__weight": 0.3, "teacher__refit__epsilon": 0.1}


def fitted(**fields):
    config = validate(tiny(teacher__ridge=0.01, **fields))
    splits = load_splits(config)
    return config, splits, fit_teacher(config, splits)


def standardized64(splits, rows, power):
    pool = np.concatenate([splits.pairs.image.array(), splits.unpaired_image.array()])
    pool = reference.unit(pool)
    deviation = pool.std(axis=0)
    scale = np.maximum(deviation, 0.05 * np.median(deviation)) ** power
    return reference.unit((reference.unit(rows) - pool.mean(axis=0)) / scale)


def test_columns_are_those_of_pairs_and_unpaired_rows_together():
    _, splits, teacher = fitted(**STANDARDIZED)
    assert teacher.text_columns is None and teacher.image_columns is not None
    pairs = splits.pairs
    image = standardized64(splits, pairs.image.array(), 0.5)
    other = cca(
        moments_of([(image, reference.unit(pairs.text.array()))], normalize=False),
        ridge=0.01,
        dim=8,
    )
    np.testing.assert_allclose(teacher.image_mean, image.mean(axis=0), atol=1e-6)
    a = (image - image.mean(axis=0)) @ np.asarray(other.image_weight, np.float64)
    b = np.asarray(other.project_text(pairs.text.array()), np.float64)
    np.testing.assert_allclose(
        teacher.affinity(pairs.image.array(), pairs.text.array()),
        reference.cosines(a, b),
        atol=1e-4,
    )


@pytest.mark.parametrize("center", ["pairs", "unpaired"])
@pytest.mark.parametrize("name", ["cca", "procrustes"])
def test_the_mean_is_that_of_standardised_rows(name, center):
    fields = {"teacher__name": name, "teacher__center": center}
    _, splits, teacher = fitted(**STANDARDIZED, **fields)
    table = splits.pairs.image if center == "pairs" else splits.unpaired_image
    expected = standardized64(splits, table.array(), 0.5).mean(axis=0)
    np.testing.assert_allclose(teacher.image_mean, expected, atol=1e-6)


def test_the_contrastive_teacher_standardises_too():
    _, splits, teacher = fitted(
        **STANDARDIZED, teacher__name="contrastive", teacher__steps=5, teacher__dim=4
    )
    expected = standardized64(splits, splits.pairs.image.array(), 0.5).mean(axis=0)
    np.testing.assert_allclose(teacher.image_mean, expected, atol=1e-6)
    assert teacher.image_columns is not None


def test_the_refit_is_that_of_the_unpaired_rows():
    _, splits, plain = fitted(**STANDARDIZED)
    _, _, teacher = fitted(**STANDARDIZED, **REFIT)
    pairs = splits.pairs
    moments = moments_of(
        [(pairs.image.array(), pairs.text.array())], image_columns=plain.image_columns
    )
    expected = refit(
        plain,
        moments,
        splits.unpaired_image.array(),
        splits.unpaired_text.array(),
        weight=0.3,
        epsilon=0.1,
        ridge=0.01,
    )
    for found, wanted in zip(teacher[:5], expected[:5], strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert np.abs(np.asarray(teacher.correlations - plain.correlations)).max() > 1e-3


def test_without_them_the_teacher_is_the_papers_to_the_last_bit():
    config, splits, teacher = fitted()
    pairs = splits.pairs
    expected = cca(moments_of([(pairs.image.array(), pairs.text.array())]), ridge=0.01, dim=8)
    for found, wanted in zip(teacher[:5], expected[:5], strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert teacher.image_columns is None and teacher.text_columns is None
    assert init_aligner(config, splits, teacher).standardized == ()


@pytest.mark.parametrize("init", ["random", "teacher"])
def test_a_trained_aligner_takes_raw_rows_and_brings_its_columns(init, tmp_path):
    make = from_teacher if init == "teacher" else tiny
    config = validate(make(steps=10, **STANDARDIZED, **REFIT))
    splits = load_splits(config)
    train(config, tmp_path / "run", quiet=True)
    for name in ("aligner", "teacher"):
        assert Aligner.load(tmp_path / "run" / name).standardized == ("image",)
    loaded = Aligner.load(tmp_path / "run" / "aligner")
    teacher = fit_teacher(config, splits)
    np.testing.assert_array_equal(loaded.image_mean[...], teacher.image_mean)

    raw = 7 * splits.test.image.array()  # the length of a raw row does not matter
    write_store(tmp_path / "raw", raw, dtype="float32")
    (written,) = commands.embed(
        str(tmp_path / "run"), image=str(tmp_path / "raw"), out=str(tmp_path / "out")
    )
    found = features.open_features(str(written), modality="image").array()
    np.testing.assert_allclose(found, loaded.embed_image(raw), atol=1e-6)
    # By hand: the statistics from the data, the weights from the file.
    z = standardized64(splits, raw, 0.5) - np.asarray(loaded.image_mean[...], np.float64)
    if init == "random":
        z = z - z.mean(1, keepdims=True)
        z = z / np.sqrt((z**2).mean(1, keepdims=True) + 1e-5)
        norm = loaded.image.layer_norm
        z = z * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
    linear = loaded.image.linear
    expected = z @ np.asarray(linear.kernel[...], np.float64) + np.asarray(linear.bias[...])
    np.testing.assert_allclose(found, reference.unit(expected), atol=1e-5)


def test_no_steps_leave_the_start(tmp_path):
    config = validate(from_teacher(steps=0, **STANDARDIZED, **REFIT))
    splits = load_splits(config)
    results = train(config, tmp_path / "run", quiet=True)
    assert results["selected_step"] == 0
    assert results["test"] == results["teacher_test"]
    expected = evaluate(Aligner.from_teacher(fit_teacher(config, splits)), splits.test)
    assert results["test"] == expected
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert train(config, tmp_path / "run", quiet=True) == results


def test_what_the_rows_do_not_support_is_named():
    _, splits, _ = fitted()
    none = splits.unpaired_image.select([]), splits.unpaired_text.select([])
    empty = dataclasses.replace(splits, unpaired_image=none[0], unpaired_text=none[1])
    with pytest.raises(ConfigError, match=r"config.teacher.refit.weight: .* has none; set 0"):
        fit_teacher(validate(tiny(**REFIT)), empty)
    # Pairs alone will do for columns.
    assert fit_teacher(validate(tiny(**STANDARDIZED)), empty).image_columns is not None
    fields = REFIT | {"teacher__refit__epsilon": 1e-5}
    with pytest.raises(ConfigError, match=r"config.teacher.refit: epsilon=1e-05: the plan of the"):
        fit_teacher(validate(tiny(**fields)), splits)
    flat = splits.pairs.image.array().copy()
    flat[:, : flat.shape[1] // 2 + 1] = 0
    table = FeatureTable.from_array(flat, name="flat")
    held = dataclasses.replace(empty, pairs=dataclasses.replace(splits.pairs, image=table))
    with pytest.raises(ConfigError, match=r"config.teacher.standardize.image: .* do not vary"):
        fit_teacher(validate(tiny(**STANDARDIZED)), held)


# ---- several processes


class Processes:
    """Threads that take one another for processes: each has an index, and they exchange arrays."""

    def __init__(self, count, patch):
        self.count, self.local, self.slots = count, threading.local(), [None] * count
        self.barrier = threading.Barrier(count, timeout=60)
        patch.setattr(data.jax, "process_index", lambda: self.local.index)
        patch.setattr(data.jax, "process_count", lambda: count)
        patch.setattr(data, "gather", lambda array: self.exchange(array))
        patch.setattr(data, "together", lambda work: work())
        patch.setattr(data, "broadcast", lambda arrays, source: self.exchange(arrays)[source])
        patch.setattr(FeatureTable, "read", self.reading(FeatureTable.read))
        patch.setattr(FeatureTable, "take", self.reading(FeatureTable.take))
        self.rows_read = [0] * count

    def reading(self, method):
        def read(table, rows):
            found = method(table, rows)
            self.rows_read[self.local.index] += len(found)
            return found

        return read

    def exchange(self, value):
        self.slots[self.local.index] = value
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone

    def run(self, work):
        """What ``work`` returned or raised in each."""

        def one(index):
            self.local.index = index
            try:
                return work()
            except ValueError as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(one, range(self.count)))


@pytest.mark.parametrize("count", [2, 3])
def test_processes_read_parts_and_agree_to_the_last_bit(count, monkeypatch):
    monkeypatch.setattr(data, "_CHUNK", 30)  # 16 parts of a table
    config = validate(tiny(teacher__center="unpaired", data__n_pairs=500, **STANDARDIZED))
    splits = load_splits(config)

    def work():
        return data.fit_teacher(config, splits)

    with pytest.MonkeyPatch.context() as patch:
        alone = Processes(1, patch)
        (expected,) = alone.run(work)
    with pytest.MonkeyPatch.context() as patch:
        processes = Processes(count, patch)
        for teacher in processes.run(work):
            for found, wanted in zip(
                jax.tree.leaves(teacher), jax.tree.leaves(expected), strict=True
            ):
                np.testing.assert_array_equal(found, wanted)
    # The columns of images, the means of both sides, the moments: no row twice for one purpose.
    assert sum(processes.rows_read) == sum(alone.rows_read)
    assert max(processes.rows_read) < sum(alone.rows_read) / count * 1.5


@pytest.mark.parametrize("count", [1, 2, 3])
def test_processes_check_parts_and_raise_the_same_error(count, monkeypatch):
    splits = load_splits(validate(tiny()))
    rows = splits.unpaired_text.array().copy()
    rows[[3, 200], 1] = np.nan  # in parts of different processes
    bad = dataclasses.replace(splits, unpaired_text=FeatureTable.from_array(rows, name="texts"))
    processes = Processes(count, monkeypatch)
    assert processes.run(lambda: data._check_finite(splits)) == [None] * count
    tables = [splits.pairs, splits.val, splits.test]
    expected = sum(len(pairs.image) + len(pairs.text) for pairs in tables)
    expected += len(splits.unpaired_image) + len(splits.unpaired_text)
    assert sum(processes.rows_read) == expected
    assert max(processes.rows_read) <= expected / count + 8
    errors = processes.run(lambda: data._check_finite(bad))
    assert {str(error) for error in errors} == {
        "texts: 2 of 256 rows hold NaN or Inf; the first is row 3"
    }
    assert len(errors) == count
