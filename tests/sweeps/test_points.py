"""Sweep files: what is read of them, what is refused, and where their points live."""

import json
from pathlib import Path

import pytest

from sotalign_jax.config import ConfigError, default_config, validate
from sotalign_jax.sweeps import base_config, load_sweep
from sotalign_jax.sweeps.points import SweepDir, run_key
from sotalign_jax.training.workdir import lock

BASE = """
from sotalign_jax.config import default_config

def get_config(arg=None):
    config = default_config()
    config.data.name = "platonic"
    if arg == "runlocal":
        config.steps = 20
    return config
"""
POINTS = """
def get_hyper(hyper, arg=None):
    return {points}
"""
TABLE = """
def get_table():
    return {table}
"""
ROWS = {"rows": "loss.alpha", "metrics": "test/mean_recall@1"}


@pytest.fixture
def sweep_file(tmp_path):
    """Writes a sweep file of an expression for its points, and of a table."""

    def write(points, table=ROWS, base=BASE, name="trial"):
        path = tmp_path / f"{name}.py"
        path.write_text(base + POINTS.format(points=points) + TABLE.format(table=repr(table)))
        return str(path)

    return write


def test_points_are_validated_configurations_of_base_and_fields(sweep_file):
    path = sweep_file(
        'hyper.product(hyper.fixed("label.method", "ours"), hyper.sweep("loss.alpha", [1, 0.1]))'
    )
    sweep = load_sweep(f"{path}:runlocal", {"model.dim": 32})
    assert sweep.name == "trial:runlocal" and sweep.source == f"{path}:runlocal"
    one, other = sweep.points
    assert (one.number, one.labels, one.fields) == (1, {"method": "ours"}, {"loss.alpha": 1})
    assert one.config.loss.alpha == 1.0 and one.config.data.name == "platonic"
    assert one.config.steps == other.config.steps == 20 and one.config.model.dim == 32
    assert (one.title, other.title) == ("loss.alpha=1", "loss.alpha=0.1")
    assert one.value("label.method") == "ours" and one.value("loss.alpha") == 1.0
    assert one.value("label.other") is None
    assert load_sweep(path).points[0].config.steps == 2_000


def test_arguments_can_shrink_the_grid(sweep_file):
    path = sweep_file('hyper.sweep("loss.alpha", [1.0] if arg == "runlocal" else [1.0, 2.0, 3.0])')
    assert len(load_sweep(path).points) == 3
    assert len(load_sweep(f"{path}:runlocal").points) == 1


def test_a_key_is_a_hash_of_what_changes_the_outcome():
    config = default_config()
    config.loss.alpha, config.seed = 0.5, 3
    # The first digits of SHA-256 of '{"loss.alpha": 0.5, "seed": 3}', by sha256sum.
    assert run_key(validate(config)) == GOLDEN
    config.mesh.devices, config.metrics.wandb = 8, "project"
    config.compare.seeds = (1, 2)
    assert run_key(validate(config)) == GOLDEN
    config.loss.epsilon = 0.1
    assert run_key(validate(config)) != GOLDEN
    config.loss.epsilon = default_config().loss.epsilon
    assert run_key(validate(config)) == GOLDEN


GOLDEN = "f1aeec704ebd"


def test_a_key_depends_neither_on_the_other_points_nor_on_their_order_or_labels(sweep_file):
    first = load_sweep(sweep_file('hyper.sweep("loss.alpha", [1.0, 2.0, 3.0])'))
    keys = {point.value("loss.alpha"): point.key for point in first.points}
    second = load_sweep(
        sweep_file(
            'hyper.product(hyper.fixed("label.a", 1), hyper.sweep("loss.alpha", [4.0, 3.0, 1.0]))'
        )
    )
    for point in second.points:
        assert keys.setdefault(point.value("loss.alpha"), point.key) == point.key
    assert len(set(keys.values())) == 4
    assert all(len(key) == 12 for key in keys.values())


def test_points_that_differ_in_labels_alone_are_one_run(sweep_file):
    path = sweep_file(
        'hyper.product(hyper.chain(hyper.fixed("label.part", "A"), hyper.fixed("label.part", "B")),'
        ' hyper.sweep("loss.alpha", [1.0, 2.0]))',
        {"rows": ["label.part", "loss.alpha"], "metrics": "test/mean_recall@1"},
    )
    sweep = load_sweep(path)
    assert len(sweep.points) == 4 and len(sweep.runs()) == 2


def test_points_are_named_by_number_key_or_its_beginning(sweep_file):
    sweep = load_sweep(sweep_file('hyper.sweep("loss.alpha", [1.0, 2.0])'))
    keys = [point.key for point in sweep.points]
    assert list(sweep.runs(["2"])) == [keys[1]]
    assert list(sweep.runs([keys[1], "1"])) == [keys[1], keys[0]]
    assert list(sweep.runs([keys[0][:6]])) == [keys[0]]
    for wrong in ("3", "0", "xyz", ""):
        with pytest.raises(ConfigError, match=f"point: '{wrong}' is no point of trial; give"):
            sweep.runs([wrong])


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("[]", "get_hyper: must return a list of points, at least one"),
        ("None", "get_hyper: must return a list of points"),
        ("[3]", "get_hyper: point 1: must be a dict of fields, got 3"),
        (
            'hyper.sweep("loss.alhpa", [1.0])',
            r"point 1 \(the base\): config.loss.alhpa: no such field; did you mean loss.alpha",
        ),
        (
            'hyper.sweep("loss.alpha", [1.0, "high"])',
            r"point 2 \(loss.alpha=high\): config.loss.alpha: must be of type float, got 'high'",
        ),
        ('hyper.sweep("steps", [3, -1])', r"point 2 .*config.steps: must not be negative, got -1"),
        ('hyper.fixed("loss", 3)', "config.loss: is a group of fields"),
        ('hyper.fixed("steps.x", 3)', "config.steps.x: no such field"),
        (
            'hyper.sweep("loss.alpha", [1.0, 2.0, 1.0])',
            r"points 1 and 3 \(loss.alpha=1\) are the same run",
        ),
        # A value that the base has already.
        (
            'hyper.chain(hyper.fixed(), hyper.fixed("loss.alpha", 1e-4))',
            "points 1 and 2 .*the same",
        ),
        (
            'hyper.sweep("mesh.devices", [1, 2])',
            "mesh.devices: changes nothing that comes of a run",
        ),
        ('hyper.fixed("compare.seeds", (1,))', "compare.seeds: changes nothing"),
        ('hyper.fixed("label.x", [1])', r"point 1: label.x: must be text or a number, got \[1\]"),
        ('hyper.fixed("label.x", "a\\nb")', "point 1: label.x: must be one line, got "),
        ("hyper.sweep('x', [])", r"trial.py:12: hyper.sweep: x: names no value"),
        ("1 / 0", r"trial.py:12: ZeroDivisionError: division by zero"),
    ],
)
def test_wrong_points_are_refused_before_anything_runs(points, message, sweep_file):
    with pytest.raises(ConfigError, match=message):
        load_sweep(sweep_file(points))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row": "seed"}, "get_table: 'row': no such key; did you mean rows"),
        ({"rows": ()}, "get_table: rows: names nothing to show"),
        ({"rows": 3}, "get_table: rows: must be a name or several, got 3"),
        ({"rows": "loss.alhpa"}, "get_table: loss.alhpa: no such field; did you mean loss.alpha"),
        ({"rows": "label.method"}, "get_table: label.method: point 1 has no such label"),
        ({"columns": "label.x"}, "get_table: label.x: point 1 has no such label"),
        ({"over": "sede"}, "get_table: sede: no such field; did you mean seed"),
        ({"metrics": "recall@1"}, "get_table: recall@1: must begin with one of test/, val/"),
        ({"select": "test/mean_recall@1"}, "select: must be a metric of the validation pairs"),
        ({"rows": "steps"}, "get_table: 2000: the points of this cell of the table differ in "
                            "loss.alpha; name it in rows, columns or over, or give select"),
        ({"teacher_rows": {"cca": 7.0}}, "teacher_rows: 'cca': 7.0 is no value of loss.alpha"),
        ({"teacher_rows": {1.0: 2.0}}, "teacher_rows: 1.0: is a row already"),
        ({"paper": [1]}, r"get_table: paper: must be a dict, got \[1\]"),
        ({"paper": {"x": 3.0}}, "get_table: paper: 'x': must be a dict, got 3.0"),
        ({"plot": {"y": "seed"}}, "get_table: plot: must be {'x': FIELD}"),
        ({"plot": {"x": "objective"}}, "plot: objective must be a number, and is 'sotalign' in po"),
        ({"plot": {"x": "seed"}}, None),
        ({"metrics": "test/mean_recal@1"}, "get_table: test/mean_recal@1: no such metric; did you "
                                           "mean mean_recall@1"),
        ({"select": "val/map"}, "get_table: val/map: no such metric; there are mean_recall@1, "),
        ({"plot": {"x": "seed", "metric": "test/foscttn"}}, "did you mean foscttm"),
        ({"decimals": "x"}, "get_table: decimals: must be a whole number, not negative, got 'x'"),
        ({"columns": "steps", "paper": {1.0: {"test/mean_recall@1": 2.0}}},
         "paper: 1.0: 'test/mean_recall@1': must be a dict of metrics"),
        ({"paper": {1.0: {"test/mean_recall@1": "24.2"}}},
         "paper: 1.0: test/mean_recall@1: must be a number, got '24.2'"),
        ({"paper": {1.0: {"test/mean_recall@5": 3.0}}}, "'test/mean_recall@5' is none of metrics;"),
        ({"paper": {(1.0, 2): {}}}, r"paper: \(1.0, 2\): must be a value of rows \(loss.alpha\)"),
        ({"rows": ("loss.alpha", "steps"), "paper": {1.0: {}}},
         r"paper: 1.0: must be a tuple of values of rows \(loss.alpha, steps\)"),
        ({"caption": "two\nlines"}, r"get_table: caption: must be one line, got 'two\\nlines'"),
        ({"names": {"steps": "a\nb"}}, "get_table: names: must be one line"),
        ({"names": {"steps": 3}}, "get_table: names: a heading must be text, got 3"),
    ],
)  # fmt: skip
def test_tables_that_the_points_cannot_fill_are_refused(change, message, sweep_file):
    path = sweep_file('hyper.sweep("loss.alpha", [1.0, 2.0])', ROWS | change)
    if message is None:
        load_sweep(path)
    else:
        with pytest.raises(ConfigError, match=message):
            load_sweep(path)


def test_a_table_that_would_show_the_best_seed_is_refused(sweep_file):
    points = 'hyper.product(hyper.sweep("loss.alpha", [1., 2.]), hyper.sweep("seed", range(2)))'
    table = {"rows": "objective", "metrics": "seconds", "select": "val/mean_recall@1"}
    load_sweep(sweep_file(points, table))
    load_sweep(sweep_file(points, table | {"over": "", "rows": "seed"}))
    with pytest.raises(ConfigError, match="differ in seed, and select would show the best one"):
        load_sweep(sweep_file(points, table | {"over": ""}))


def test_a_metric_of_held_out_pairs_that_are_not_given_is_refused(sweep_file):
    base = BASE.replace('"platonic"', '"files"')
    path = sweep_file("[{}]", ROWS | {"select": "val/mean_recall@1"}, base)
    load_sweep(path)  # files are given on the command line
    files = {f"data.files.{name}": "x" for name in ("image", "text", "test_image", "test_text")}
    with pytest.raises(ConfigError, match=r"val/mean_recall@1: point 1 has no val pairs; give con"):
        load_sweep(path, files)
    load_sweep(path, files | {"data.files.n_val": 5})
    val = {"data.files.val_image": "x", "data.files.val_text": "x"}
    load_sweep(path, files | val)


def test_a_table_may_depend_on_the_argument(sweep_file):
    path = sweep_file("[{}]")
    text = Path(path).read_text().replace("get_table():", "get_table(arg=None):")
    Path(path).write_text(text.replace("    return {'rows'", "    return {'caption': arg, 'rows'"))
    assert load_sweep(path).layout.caption == ""
    layout = load_sweep(f"{path}:small").layout
    assert layout.caption == layout.arg == "small"


def test_a_plot_whose_cells_hold_several_points_is_refused(sweep_file):
    points = 'hyper.product(hyper.sweep("loss.alpha", [1., 2.]), hyper.sweep("steps", [1, 2]))'
    table = {"rows": "loss.alpha", "columns": "steps", "metrics": "seconds"}
    load_sweep(sweep_file(points, table))
    load_sweep(sweep_file(points, table | {"plot": {"x": "steps"}}))
    with pytest.raises(ConfigError, match=r"of the plot differ in steps"):
        load_sweep(sweep_file(points, table | {"plot": {"x": "loss.alpha"}}))


def test_files_that_are_no_sweep_are_refused(tmp_path, sweep_file):
    for body, message in (
        ("x = ", r"bad.py:1: SyntaxError: invalid syntax"),
        ("1 / 0", r"bad.py:1: ZeroDivisionError"),
        ("", "bad.py: has no function get_config; a sweep file needs it"),
        ("def get_config(arg=None): return 3", "get_config: must return a configuration, got 3"),
        (BASE, "bad.py: has no function get_hyper"),
        (BASE + "def get_hyper(hyper): return []", r"get_hyper: must be defined as get_hyper\(hyp"),
        (BASE + POINTS.format(points="[{}]"), "has no function get_table"),
        (BASE + POINTS.format(points="[{}]") + TABLE.format(table=3), "get_table: must return a d"),
    ):
        (tmp_path / "bad.py").write_text(body)
        with pytest.raises(ConfigError, match=message):
            load_sweep(str(tmp_path / "bad.py"))
    with pytest.raises(ConfigError, match=r"none.py: no such file"):
        load_sweep(str(tmp_path / "none.py"))
    with pytest.raises(ConfigError, match=r"notes.txt: not a Python file"):
        (tmp_path / "notes.txt").write_text("")
        load_sweep(str(tmp_path / "notes.txt"))
    path = sweep_file("[{}]", base=BASE.replace("arg=None", ""))
    with pytest.raises(ConfigError, match=r"get_config: must be defined as get_config\(arg=None\)"):
        load_sweep(f"{path}:runlocal")


def test_fields_of_the_command_line_go_into_the_base_unless_the_points_set_them(sweep_file):
    path = sweep_file('hyper.sweep("loss.alpha", [1.0, 2.0])')
    plain, other = load_sweep(path), load_sweep(path, {"steps": 9, "log_every": 1})
    assert {p.config.steps for p in other.points} == {9}
    assert not {p.key for p in plain.points} & {p.key for p in other.points}
    with pytest.raises(ConfigError, match=r"--config.loss.alpha: the points of this sweep set"):
        load_sweep(path, {"loss.alpha": 3.0})
    with pytest.raises(ConfigError, match=r"config.stesp: no such field; did you mean steps"):
        load_sweep(path, {"stesp": 3})


def test_a_base_may_come_from_another_file(tmp_path):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "base.py").write_text(BASE)
    here = str(tmp_path / "sweeps" / "mine.py")
    assert base_config(here, "../base.py").steps == 2_000
    assert base_config(here, "../base.py", "runlocal").steps == 20
    with pytest.raises(ConfigError, match=r"sweeps/\.\./none.py: no such file"):
        base_config(here, "../none.py")


# ---- the directory


def test_a_directory_records_its_sweep_and_earlier_points(sweep_file, tmp_path):
    home = SweepDir(tmp_path / "home")
    one = load_sweep(sweep_file('hyper.sweep("loss.alpha", [1.0, 2.0])'), {"steps": 30})
    home.start(one)
    two = load_sweep(sweep_file('hyper.sweep("loss.alpha", [3.0, 2.0])'), {"steps": 30})
    home.start(two)
    record = json.loads(home.record.read_text())
    assert record["name"] == "trial" and record["overrides"] == {"steps": 30}
    assert record["directory"] == str(Path.cwd())
    assert [p["key"] for p in record["points"]] == [p.key for p in two.points]
    assert record["points"][0]["fields"] == {"loss.alpha": 3.0}
    assert [p["key"] for p in record["earlier"]] == [one.points[0].key]
    assert "jax" in record["versions"] and record["sotalign_jax"]
    home.start(one)  # what was dropped may come back
    assert [p["key"] for p in home.recorded()["earlier"]] == [two.points[0].key]


def test_directories_of_others_are_refused(sweep_file, tmp_path):
    sweep = load_sweep(sweep_file("[{}]"))
    home = tmp_path / "home"
    with pytest.raises(ConfigError, match=r"home holds no sweep; `sotalign sweep run` makes one"):
        SweepDir(home).recorded()
    home.mkdir()
    (home / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"home is not empty and holds no sweep"):
        SweepDir(home).start(sweep)
    with pytest.raises(ConfigError, match=r"thesis.tex is a file; give a directory"):
        SweepDir(home / "thesis.tex").start(sweep)
    (home / "thesis.tex").unlink()
    SweepDir(home).start(sweep)
    with pytest.raises(ConfigError, match=r"home holds the sweep trial, not other"):
        SweepDir(home).start(load_sweep(sweep_file("[{}]", name="other")))
    with pytest.raises(ConfigError, match=r"home holds the sweep trial, not trial:runlocal"):
        SweepDir(home).start(load_sweep(f"{sweep.source}:runlocal"))


def test_the_state_of_a_point_is_read_from_its_files(sweep_file, tmp_path):
    home = SweepDir(tmp_path / "home")
    sweep = load_sweep(sweep_file("[{}]"))
    home.start(sweep)
    key = sweep.points[0].key
    assert home.state(key) == "waiting" and home.results(key) is None and home.step(key) == 0
    with lock(home.lock(key)):
        assert home.state(key) == "running"
    home.run(key).mkdir()
    (home.run(key) / "config.json").write_text(sweep.points[0].config.to_json())
    (home.run(key) / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20}\n{"ste')
    assert home.state(key) == "interrupted" and home.step(key) == 20
    home.failure(key).write_text('{"message": "why"}')
    assert home.state(key) == "failed" and home.why_failed(key) == "why"
    (home.run(key) / "results.json").write_text('{"seconds": 1}')
    assert home.state(key) == "finished" and not home.failed(key)


def test_runs_under_other_defaults_are_not_mixed_in(sweep_file, tmp_path):
    home = SweepDir(tmp_path / "home")
    sweep = load_sweep(sweep_file("[{}]"))
    home.start(sweep)
    run = home.run(sweep.points[0].key)
    run.mkdir()
    recorded = json.loads(sweep.points[0].config.to_json())
    del recorded["loss"]["precision"]  # a field that did not exist yet
    recorded["mesh"]["devices"] = 4
    (run / "config.json").write_text(json.dumps(recorded))
    home.check(sweep)
    recorded["loss"]["threshold"] = 0.5
    (run / "config.json").write_text(json.dumps(recorded))
    with pytest.raises(ConfigError, match=r"other defaults \(loss.threshold: 0.5 -> 0.01\); move"):
        home.check(sweep)
