"""Runs on files: stores, .npy and HDF5, joined by id, in all three modes; and what is refused."""

import shutil

import h5py
import numpy as np
import pytest
from rich.console import Console
from tiny_runs import tiny

from sotalign_jax import commands, features
from sotalign_jax.config import ConfigError, validate
from sotalign_jax.features import FeatureTable, platonic_world
from sotalign_jax.training import load_splits, load_test_pairs, train
from sotalign_jax.training.data import fit_teacher

ITEMS = 160


class Corpus:
    """A platonic world on disk: ids in another order on each side."""

    def __init__(self, root):
        rng = np.random.default_rng(0)
        world = platonic_world(n_pairs=ITEMS, n_unpaired=70, n_val=20, n_test=30)
        self.image, self.text = world.pairs.image.array(), world.pairs.text.array()
        ids = np.array([f"item-{i}" for i in range(ITEMS)])
        paths = {}
        for name, rows in (("image", self.image), ("text", self.text)):
            order = rng.permutation(ITEMS)
            paths[name] = root / f"{name}.store"
            features.write_store(
                paths[name], rows[order], ids=ids[order], encoder="world", dtype="float32"
            )
            paths[f"{name}_rows"] = root / f"{name}_rows.npy"
            np.save(paths[f"{name}_rows"], rows)
        # The test set has two captions an image, without order, in HDF5.
        test_ids = [f"test-{i}" for i in range(30)]
        paths["test_image"] = root / "test_image.store"
        features.write_store(
            paths["test_image"],
            world.test.image.array(),
            ids=test_ids,
            encoder="w",
            dtype="float32",
        )
        captions = np.r_[world.test.text.array(), world.test.text.array() + 0.01]
        order = rng.permutation(60)
        paths["test_text"] = root / "test_text.store"
        features.write_store(
            paths["test_text"],
            captions[order],
            ids=np.array(test_ids * 2)[order],
            encoder="w",
            dtype="float32",
        )
        for name, table in (("image", world.unpaired_image), ("text", world.unpaired_text)):
            paths[f"unpaired_{name}"] = root / f"unpaired_{name}.h5"
            with h5py.File(paths[f"unpaired_{name}"], "w") as file:
                file["embeddings"] = table.array()
        for name, table in (("val_image", world.val.image), ("val_text", world.val.text)):
            paths[name] = root / f"{name}.npy"
            np.save(paths[name], table.array())
        self.paths = {name: str(path) for name, path in paths.items()}

    def config(self, *names, **fields):
        """A configuration of these files; ``image=...`` replaces one path."""
        config = tiny(data__name="files", data__n_unpaired=0)
        config.data.files.image, config.data.files.text = self.paths["image"], self.paths["text"]
        for name in names:
            config.data.files[name] = self.paths[name]
        for name, value in fields.items():
            if name in config.data.files:
                config.data.files[name] = value
            else:
                config.update_from_flattened_dict({name.replace("__", "."): value})
        return config


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return Corpus(tmp_path_factory.mktemp("corpus"))


def true_rows(table, rows):
    """Which item of the world each row of a table is."""
    distance = np.abs(table.array()[:, None, :8] - rows[None, :, :8]).max(-1)
    assert distance.min(1).max() < 1e-6
    return distance.argmin(1)


@pytest.mark.parametrize("mode", ["aligned", "disjoint", "independent"])
def test_a_run_on_files(corpus, mode, tmp_path):
    unpaired = ("unpaired_image", "unpaired_text") if mode == "independent" else ()
    config = corpus.config(
        *unpaired, "test_image", "test_text", mode=mode, n_val=16, objective="sail_semi"
    )
    splits = load_splits(validate(config))
    image, text = (
        true_rows(getattr(splits.pairs, s), getattr(corpus, s)) for s in ("image", "text")
    )
    np.testing.assert_array_equal(image, text)
    assert len(set(image)) == 64
    assert splits.val is not None
    val = true_rows(splits.val.image, corpus.image)[splits.val.text_to_image]
    np.testing.assert_array_equal(val, true_rows(splits.val.text, corpus.text))
    assert len(val) == 16 and not set(val) & set(image)
    if mode != "independent":
        left = true_rows(splits.unpaired_image, corpus.image)
        right = true_rows(splits.unpaired_text, corpus.text)
        for side in (left, right):
            assert not set(side) & (set(image) | set(val))
        assert (set(left) == set(right)) == (mode == "aligned")
        assert not (mode == "disjoint" and set(left) & set(right))
        assert len(left) == {"aligned": 80, "disjoint": 40}[mode]
    found = train(config, tmp_path / "run", quiet=True)
    assert found["test"]["n_images"] == 30 and found["test"]["n_texts"] == 60
    assert found["val"]["n_images"] == 16
    assert found["teacher_test"]["mean_recall@10"] > 0.5


def test_validation_is_split_off_rows_without_ids(corpus):
    """Joined by row order, the pairs must stay pairs after some were taken for validation."""
    rows = {name: corpus.paths[f"{name}_rows"] for name in ("image", "text")}
    splits = load_splits(validate(corpus.config(**rows, n_val=30)))
    np.testing.assert_array_equal(
        true_rows(splits.pairs.image, corpus.image), true_rows(splits.pairs.text, corpus.text)
    )
    assert splits.val is not None and splits.val.one_to_one
    np.testing.assert_array_equal(
        true_rows(splits.val.image, corpus.image), true_rows(splits.val.text, corpus.text)
    )


@pytest.mark.parametrize("ids", [True, False])
def test_test_pairs_that_are_split_off(corpus, ids):
    """The same ones for every seed, in no other part, and what `evaluate` loads again."""
    rows = {} if ids else {name: corpus.paths[f"{name}_rows"] for name in ("image", "text")}
    seen = []
    for seed in (0, 1):
        config = validate(corpus.config(**rows, n_test=25, n_val=16, seed=seed, mode="aligned"))
        splits = load_splits(config)
        assert splits.val is not None and splits.test is not None
        parts = {
            "pairs": splits.pairs.image,
            "unpaired": splits.unpaired_image,
            "val": splits.val.image,
            "test": splits.test.image,
        }
        found = {name: true_rows(table, corpus.image) for name, table in parts.items()}
        assert [len(rows) for rows in found.values()] == [64, 160 - 64 - 16 - 25, 16, 25]
        assert len(np.unique(np.concatenate(list(found.values())))) == 160
        again = load_test_pairs(config)
        assert again is not None
        for test in (splits.test, again):
            owners = true_rows(test.image, corpus.image)[test.text_to_image]
            np.testing.assert_array_equal(owners, true_rows(test.text, corpus.text))
        np.testing.assert_array_equal(again.image.array(), splits.test.image.array())
        seen.append(found)
    np.testing.assert_array_equal(seen[0]["test"], seen[1]["test"])
    assert set(seen[0]["val"]) != set(seen[1]["val"])


def test_paths_may_name_one_array_of_several(corpus, tmp_path):
    np.savez(tmp_path / "both.npz", image=corpus.image, text=corpus.text)
    image, text = (f"{tmp_path / 'both.npz'}:{name}" for name in ("image", "text"))
    splits = load_splits(validate(corpus.config(image=image, text=text)))
    np.testing.assert_array_equal(
        true_rows(splits.pairs.image, corpus.image), true_rows(splits.pairs.text, corpus.text)
    )
    wrong = validate(corpus.config(image=image, text=str(tmp_path / "both.npz")))
    message = r"config.data.files.text: .*both.npz: several .*both.npz:KEY; it holds: image, text$"
    with pytest.raises(ConfigError, match=message):
        load_splits(wrong)


def test_validation_files(corpus):
    splits = load_splits(validate(corpus.config("val_image", "val_text")))
    assert splits.val is not None and len(splits.val) == 20 and splits.val.one_to_one


def test_means_of_the_unpaired_rows(corpus):
    config = corpus.config(
        "unpaired_image", "unpaired_text", mode="independent", teacher__center="unpaired"
    )
    splits = load_splits(validate(config))
    teacher = fit_teacher(validate(config), splits)
    for side in ("image", "text"):
        rows = getattr(splits, f"unpaired_{side}").array().astype(np.float64)
        expected = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).mean(0)
        np.testing.assert_allclose(getattr(teacher, f"{side}_mean"), expected, atol=1e-6)


TEST = ("test_image", "test_text")


def assert_same_pairs(found, expected):
    for side in ("image", "text"):
        table, other = getattr(found, side), getattr(expected, side)
        np.testing.assert_array_equal(table.array(), other.array())
        np.testing.assert_array_equal(table.ids, other.ids)
        assert table.name == other.name
    np.testing.assert_array_equal(found.text_to_image, expected.text_to_image)


@pytest.mark.parametrize("name", ["emoji", "platonic", "files"])
def test_the_test_pairs_alone_are_those_of_the_splits(corpus, name):
    config = corpus.config(*TEST, data__name=name, seed=3)
    config.data.emoji.image, config.data.emoji.text = "fluent3d", "label"
    config.data.platonic.n_test = 1_500  # more than one block of the world
    config.data.platonic.noise = 0.5
    config = validate(config)
    splits = load_splits(config)
    assert_same_pairs(load_test_pairs(config), splits.test)


def test_data_without_test_pairs_has_none(corpus):
    assert load_test_pairs(validate(corpus.config())) is None
    assert load_test_pairs(validate(tiny(data__platonic__n_test=0))) is None


def test_a_wrong_test_set_is_named(corpus, tmp_path):
    for config, message in (
        (corpus.config("test_image"), r"config.data.files.test_image, test_text: give both"),
        (
            corpus.config("test_image", test_text="none.npy"),
            r"config.data.files.test_text: none.npy: no such file",
        ),
        (
            corpus.config("test_text", test_image=store(tmp_path / "bad", bad_rows(np.nan))),
            r"ids: .* has ids and .*bad has none",
        ),
        (
            corpus.config(
                test_image=store(tmp_path / "nan", bad_rows(np.nan)),
                test_text=store(tmp_path / "texts", ones(ITEMS, 192)),
            ),
            r"nan: 1 of 160 rows hold NaN or Inf",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_test_pairs(validate(config))


def test_a_run_is_evaluated_and_embedded_without_its_training_rows(corpus, tmp_path):
    names = ("image", "text", "unpaired_image", "unpaired_text", *TEST)
    copies = {name: shutil.copy if name.startswith("un") else shutil.copytree for name in names}
    paths = {name: tmp_path / corpus.paths[name].rpartition("/")[2] for name in names}
    for name, copy in copies.items():
        copy(corpus.paths[name], paths[name])
    fields = {name: str(path) for name, path in paths.items()}
    config = corpus.config(mode="independent", objective="sail", steps=10, **fields)
    results = train(config, tmp_path / "run", quiet=True)
    for name in ("image", "text"):
        shutil.rmtree(paths[name])
        paths[f"unpaired_{name}"].unlink()
    console = Console(quiet=True)
    scores = commands.evaluate(str(tmp_path / "run"), console=console)
    assert scores == pytest.approx(results["test"], abs=1e-6)
    image, text = commands.embed(str(tmp_path / "run"), console=console)
    assert len(features.open_features(image)) == 30 and len(features.open_features(text)) == 60


def store(path, rows, ids=None):
    features.write_store(path, rows, ids=ids, encoder="x", dtype="float32")
    return str(path)


def ones(rows, dim):
    return np.random.default_rng(1).standard_normal((rows, dim)).astype(np.float32)


def bad_rows(value):
    rows = ones(ITEMS, 256)
    rows[7, 3] = value
    return rows


def wrong(corpus, root, case):
    """A configuration with one thing wrong, and what the message must say."""
    rows = {name: corpus.paths[f"{name}_rows"] for name in ("image", "text")}
    ids = [f"item-{i}" for i in range(ITEMS)]
    if case == "missing file":
        return corpus.config(image="nowhere.npy"), r"config.data.files.image: nowhere.npy: no such"
    if case == "no path":
        return corpus.config(text=""), r"config.data.files.text: no path given"
    if case == "rows differ":
        path = root / "short.npy"
        np.save(path, corpus.text[:-1])
        return corpus.config(**rows | {"text": str(path)}), r"160 rows and .*short.* has 159"
    if case == "ids do not join":
        path = store(root / "other", corpus.text, [f"other-{i}" for i in range(ITEMS)])
        return corpus.config(text=path), r"ids: .* share none; the first are 'item-\d+' and 'other-"
    if case == "ids on one side":
        return corpus.config(text=rows["text"]), r"ids: .* has ids and .* has none"
    if case in ("nan", "inf"):
        path = root / "bad.npy"
        np.save(path, bad_rows(float(case)))
        fields = {"data__n_pairs": ITEMS, "objective": "sail"}
        return corpus.config(**rows | {"image": str(path)}, **fields), r"bad.*(NaN|Inf)"
    if case == "more pairs":
        return corpus.config(data__n_pairs=161), r"n_pairs: 161 asked, but .* have 160"
    if case == "more unpaired":
        return corpus.config(data__n_unpaired=49), r"n_unpaired: 49 asked, but .* has 48"
    if case == "n_val":
        return corpus.config(n_val=160), r"config.data.files.n_val: 160 asked, .* 160 images"
    if case == "n_test":
        return corpus.config(n_test=160), r"config.data.files.n_test: 160 asked, .* 160 images$"
    if case == "n_val beside n_test":
        fields = {"n_test": 100, "n_val": 60}
        return corpus.config(**fields), r"n_val: 60 asked, .* has 60 images left$"
    if case == "n_test and files":
        return corpus.config("test_image", "test_text", n_test=3), r"n_test: give this or test_im"
    if case == "n_val and files":
        return corpus.config("val_image", "val_text", n_val=3), r"config.data.files.n_val: give"
    if case == "half a test set":
        return corpus.config("test_image"), r"config.data.files.test_image, test_text: give both"
    if case == "independent without files":
        return corpus.config(mode="independent"), r"config.data.files.unpaired_image, .*needed in"
    if case == "files without independent":
        return corpus.config("unpaired_image"), r"config.data.files.unpaired_image, .*neither"
    if case.endswith("dim"):
        part = case.removesuffix(" dim")
        path = root / "narrow.npy"
        np.save(path, ones(70, 99))
        if part == "unpaired":
            return (
                corpus.config("unpaired_text", mode="independent", unpaired_image=str(path)),
                r"dim: .*narrow.* has 99 columns, .* 256",
            )
        texts = root / "texts.npy"
        np.save(texts, ones(70, 192))
        fields = {f"{part}_image": str(path), f"{part}_text": str(texts)}
        return corpus.config(**fields), r"dim: .*narrow.* has 99 columns, .* has 256"
    assert case == "twice the same id"
    path = store(root / "twice", corpus.image, [*ids[:-1], ids[0]])
    return corpus.config(image=path), r"ids: 'item-0' occurs more than once"


@pytest.mark.parametrize(
    "case",
    [
        "missing file",
        "no path",
        "rows differ",
        "ids do not join",
        "ids on one side",
        "twice the same id",
        "nan",
        "inf",
        "more pairs",
        "more unpaired",
        "n_val",
        "n_test",
        "n_val beside n_test",
        "n_test and files",
        "n_val and files",
        "half a test set",
        "independent without files",
        "files without independent",
        "unpaired dim",
        "val dim",
        "test dim",
    ],
)
def test_wrong_input_is_named_before_training(corpus, case, tmp_path):
    config, message = wrong(corpus, tmp_path, case)
    with pytest.raises(ValueError, match=message) as caught:
        train(config, tmp_path / "run", quiet=True)
    assert "\n" not in str(caught.value)
    left = [file.name for file in (tmp_path / "run").iterdir()]
    assert left in ([], [".lock"])  # a corrected start may use it


def test_unpaired_means_need_unpaired_rows():
    config = validate(
        tiny(data__name="emoji", data__n_pairs=800, data__n_unpaired=0, teacher__center="unpaired")
    )
    with pytest.raises(ConfigError, match=r"config.teacher.center: 'unpaired'.* has none"):
        fit_teacher(config, load_splits(config))


def test_a_table_of_another_width_is_no_input_of_an_aligner(corpus, tmp_path):
    from sotalign_jax.models import Aligner
    from sotalign_jax.training import embed_chunks, embed_rows

    train(corpus.config(objective="sail", steps=10), tmp_path / "run", quiet=True)
    aligner = Aligner.load(tmp_path / "run" / "aligner")
    table = FeatureTable.from_array(corpus.text, name="texts")
    with pytest.raises(ValueError, match="image: texts has 192 columns, but the aligner takes 256"):
        embed_rows(aligner, "image", table)
    # Chunks do not change what comes out.
    whole = embed_rows(aligner, "text", table)
    told = []
    parts = embed_rows(aligner, "text", table, chunk_size=50, progress=told.append)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert told == [50, 50, 50, 10]
    assert [len(rows) for rows in embed_chunks(aligner, "text", table, chunk_size=150)] == [150, 10]
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
