"""The sweeps of ``configs/sweeps``: what they run, what they read, and the figures they quote."""

import functools
import io
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sotalign_jax.config import default_config, validate
from sotalign_jax.features import write_store
from sotalign_jax.fitted import FITTED
from sotalign_jax.sweeps import load_sweep, run_sweep
from sotalign_jax.sweeps.layout import collect
from sotalign_jax.sweeps.points import SweepDir
from sotalign_jax.training.build import inputs_key
from sotalign_jax.training.data import load_splits

FOLDER = Path(__file__).parents[2] / "configs" / "sweeps"
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))
# Published figures that no point of ours stands beside: which alpha was best is not published, and
# a million pairs are one method's upper bound.
PAPER_ALONE = {
    ("ablation_alpha", "best on validation", None),
    ("fig4_pairs", "SAIL", 1_000_000),
}
# Sweeps whose points name feature files; the others take them from the command line.
NAME_FILES = (
    "table2_pair_source",
    "table3_encoders",
    "table6_single_dataset",
    "table7_unpaired_source",
)
each = pytest.mark.parametrize("name", NAMES)


@functools.cache
def shipped(name, arg=None):
    return load_sweep(f"{FOLDER / name}.py" + (f":{arg}" if arg else ""))


def header(name):
    return (FOLDER / f"{name}.py").read_text().split('"""')[1]


def figures(name):
    """``(row, column, metric, value)`` of every published figure of a sweep."""
    layout = shipped(name).layout
    for row, cells in layout.paper.items():
        for column, values in cells.items() if layout.columns else [(None, cells)]:
            for metric, value in values.items():
                yield row, column, metric, value


@each
def test_whole_it_reads_files_and_small_it_reads_embedded_data(name, monkeypatch):
    def open_features(*_, **__):
        raise AssertionError("a file is opened before anything runs")

    monkeypatch.setattr("sotalign_jax.features.open_features", open_features)
    whole, small = shipped(name), shipped(name, "runlocal")
    assert {point.config.data.name for point in whole.points} == {"files"}
    assert not {"files"} & {point.config.data.name for point in small.points}
    for sweep in (whole, small):
        seeds = {point.value("seed") for point in sweep.points}
        assert len(seeds) > 1 and len(sweep.runs()) % len(seeds) == 0
    assert min(point.config.steps for point in small.points) >= 20


@each
def test_its_header_gives_the_commands_and_the_figures(name):
    text = header(name)
    place = f"configs/sweeps/{name}.py"
    assert f"sotalign sweep run   {place}" in text or f"FILE={place}" in text
    assert "sotalign sweep table" in text and ("sotalign sweep plot" in text) == bool(
        shipped(name).layout.plot
    )
    assert "runlocal" in text and "The paper" in text
    for count in re.findall(r"(\d+)\s+runs", text):
        assert int(count) == len(shipped(name, "runlocal").runs())
    numbers = set(re.findall(r"\d+\.\d+", text))
    for row, column, metric, value in figures(name):
        assert f"{value:.1f}" in numbers, (row, column, metric)


@each
def test_its_published_figures_stand_where_ours_do(name):
    sweep = shipped(name)
    layout = sweep.layout
    assert layout.caption and layout.paper
    grid = collect(layout, sweep.points, lambda key: None, lambda key: False)
    cells = {tuple(k[0] if len(k) == 1 else k or None for k in place) for place in grid.cells}
    found = {}
    for row, column, metric, value in figures(name):
        assert metric in layout.metrics and 0 < value < 100
        assert (row, column) in cells or (name, row, column) in PAPER_ALONE, (row, column)
        found.setdefault((row, column), {})[metric] = value
    assert found.keys() & cells
    for values in found.values():  # a mean is that of both directions, as far as it is rounded
        sides = [values.get(f"test/{side}/recall@1") for side in ("t2i", "i2t")]
        if "test/mean_recall@1" in values and None not in sides:
            assert abs(values["test/mean_recall@1"] - sum(sides) / 2) <= 0.1 + 1e-9


@each
def test_small_its_rows_are_there(name):
    """Each data set of `runlocal` has the pairs and the unpaired rows that are asked for."""
    inputs = {}
    for point in shipped(name, "runlocal").points:
        data = point.config.data
        if point.config.seed == 0 and data.name == "emoji":
            inputs.setdefault(data.to_json(), point.config)
    for config in inputs.values():
        splits = load_splits(config)
        assert len(splits.pairs) == config.data.n_pairs
        for table in (splits.unpaired_image, splits.unpaired_text):
            assert len(table) == config.data.n_unpaired or not config.data.n_unpaired
        assert splits.val is not None and splits.test is not None


@each
def test_whole_it_goes_on_from_checkpoints_and_is_chosen_by_the_mean_recall_of_the_paper(name):
    sweep = shipped(name)
    assert all(0 < p.config.checkpoint_every < p.config.steps for p in sweep.points)
    assert sweep.layout.select in ("", "val/mean_recall@1")


def test_methods_of_figure_4_see_the_same_pairs():
    for name in ("fig4_pairs", "fig4_unpaired"):
        for arg in (None, "runlocal"):
            methods = {}
            for point in shipped(name, arg).points:
                methods.setdefault(inputs_key(point.config), set()).add(point.config.objective)
                assert point.config.select == "last"
            together = sum(found == {"sail", "sotalign"} for found in methods.values())
            # SAIL reads no unpaired rows, and is run beside one number of them.
            seeds = 3
            assert together == (len(methods) if name == "fig4_pairs" else seeds)


def test_each_pair_source_is_read_beside_the_unpaired_rows_of_cc3m():
    found = {}
    for point in shipped("table2_pair_source").points:
        files = point.config.data.files
        found[point.value("label.source")] = (
            files.mode,
            *(files[f"{part}{side}"] for part in ("", "unpaired_") for side in ("image", "text")),
        )
        assert files.val_image == "features/cc3m_val/dinov3_vitl16"
        assert files.test_text == "features/coco_val/nv_embed_v2"
    image, text = "features/cc3m/dinov3_vitl16", "features/cc3m/nv_embed_v2"
    assert found == {
        "CC3M": ("disjoint", image, text, "", ""),
        "CC3M, synthetic captions": (
            *("independent", image, "features/cc3m_synthetic/nv_embed_v2"),
            *(image, text),
        ),
        "CC12M": (
            *("independent", "features/cc12m/dinov3_vitl16", "features/cc12m/nv_embed_v2"),
            *(image, text),
        ),
        "COCO": (
            *("independent", "features/coco_train/dinov3_vitl16"),
            *("features/coco_train/nv_embed_v2", image, text),
        ),
    }


def test_an_encoder_is_the_same_in_all_splits():
    found = set()
    for point in shipped("table3_encoders").points:
        files = point.config.data.files
        sides = []
        for side in ("image", "text"):
            paths = [files[f"{split}{side}"] for split in ("", "val_", "test_")]
            folders, encoders = zip(*(path.rsplit("/", 1) for path in paths), strict=True)
            assert folders == ("features/cc3m", "features/cc3m_val", "features/coco_val")
            assert len(set(encoders)) == 1
            sides.append(encoders[0])
        found.add((point.value("label.encoders"), *sides))
    images = {"DINOv2": "dinov2_vitl14", "DINOv3": "dinov3_vitl16"}
    texts = {
        "Nemotron-8B": "nemotron_8b",
        "Qwen3-8B": "qwen3_embedding_8b",
        "NV-Embed-v2": "nv_embed_v2",
    }
    assert found == {(f"{i} + {t}", images[i], texts[t]) for i in images for t in texts}


def test_fitted_aligners_of_table_6_are_as_published_but_for_what_its_header_says():
    for arg in (None, "runlocal"):
        methods = {p.value("label.method"): p for p in shipped("table6_single_dataset", arg).points}
        for name in ("csa", "sue"):
            published, ours = methods[name.upper()], methods[f"{name.upper()}, defaults here"]
            assert published.config.aligner == ours.config.aligner == name
            assert ours.config[name] == default_config()[name]
            other = {"dim"} if name == "csa" else set()
            if arg == "runlocal":
                other |= {"hidden", "batch_size", "learning_rate"} & set(published.config[name])
            for option, value in FITTED[name].published.items():
                expected = default_config()[name][option] if option in other else value
                assert published.config[name][option] == expected
        contrastive = methods["contrastive"].config
        assert (contrastive.aligner, contrastive.objective) == ("layers", "clip")


def corpus(data):
    """Whose items a data set is about."""
    return data.removesuffix("_synthetic")


def ids_of(table):
    assert table.ids is not None
    return table.ids.tolist()


@pytest.mark.parametrize("name", NAME_FILES)
def test_on_files_every_row_reads_what_its_name_says(name, tmp_path, monkeypatch):
    """Small stores in the places of the real ones: their ids say which rows a point reads."""
    monkeypatch.chdir(tmp_path)
    points = {}
    for point in shipped(name).points:
        if point.config.seed == 0:
            points.setdefault(point.config.data.to_json(), point)
    fields = [one for point in points.values() for one in point.config.data.files.items()]
    stored = {}
    for path in {value for field, value in fields if value and field.endswith(("image", "text"))}:
        ids = [f"{corpus(path.split('/')[-2])}-{number}" for number in range(40)]
        rows = np.random.default_rng(len(stored)).standard_normal((40, 3))
        write_store(path, rows, ids=ids, dtype="float32")
        stored[path] = dict(zip(ids, rows.astype(np.float32), strict=True))
    for point in points.values():
        config = point.config.copy_and_resolve_references()
        files = config.data.files
        files.n_val = min(files.n_val, 6)
        config.data.n_pairs, few = 4, 15
        config.data.n_unpaired = config.data.n_unpaired and few
        splits = load_splits(validate(config))
        tables = {
            "image": splits.pairs.image,
            "text": splits.pairs.text,
            "unpaired_image": splits.unpaired_image,
            "unpaired_text": splits.unpaired_text,
        }
        for what, table in tables.items():
            side = what.removeprefix("unpaired_")
            path = files[what] or files[side]
            expected = [stored[path][name] for name in ids_of(table)]
            np.testing.assert_array_equal(table.array(), expected)
        counts = {len(splits.unpaired_image), len(splits.unpaired_text)}
        rest = 40 if files.mode == "independent" else 40 - 4 - files.n_val
        assert counts == {config.data.n_unpaired or rest}
        if files.mode == "disjoint":
            pairs, left, right = (
                set(ids_of(tables[what])) for what in ("image", "unpaired_image", "unpaired_text")
            )
            assert not (pairs & left or pairs & right or left & right)


@pytest.mark.parametrize("name", NAME_FILES)
def test_points_whose_files_are_missing_say_so(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep, printed = shipped(name), io.StringIO()
    point = sweep.points[-1]
    outcome = run_sweep(
        sweep, "home", points=[point.key], console=Console(file=printed, width=1_000)
    )
    path = point.config.data.files.image
    message = f"config.data.files.image: {path}: no such file or directory"
    assert outcome.failed == {point.key: message} and not outcome.finished
    assert f"failed  {point.title}  {message}" in printed.getvalue()
    assert SweepDir("home").failed(point.key)


@pytest.mark.slow
@each
def test_small_it_runs(name, tmp_path):
    """The first and the last point, two steps of each."""
    sweep = load_sweep(f"{FOLDER / name}.py:runlocal", {"steps": 2, "log_every": 2})
    runs = list(sweep.runs())
    outcome = run_sweep(
        sweep, tmp_path, points=[runs[0], runs[-1]], console=Console(file=io.StringIO())
    )
    assert set(outcome.finished) == {runs[0], runs[-1]} and not outcome.failed
    home = SweepDir(tmp_path)
    for key in outcome.finished:
        results = home.results(key)
        assert results is not None and 0 < results["test"]["mean_recall@10"] <= 1
    collect(sweep.layout, sweep.points, home.results, home.failed)
