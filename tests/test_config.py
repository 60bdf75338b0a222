"""The schema of a run, and every config file against it."""

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from sotalign_jax.config import (
    ConfigError,
    default_config,
    differences,
    explain,
    flatten,
    validate,
)

CONFIGS = Path(__file__).parents[1] / "configs"


def load(path, *arg):
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*arg)


def partial(name, value):
    """A configuration of one field, ``a.b``."""
    for part in reversed(name.split(".")):
        value = {part: value}
    return ConfigDict(value)


def test_default_file_and_schema_hold_the_same_fields_and_values():
    from_file = load(CONFIGS / "default.py")
    assert differences(default_config(), from_file) == []
    assert list(flatten(default_config())) == list(flatten(from_file))


@pytest.mark.parametrize("arg", [(), ("runlocal",)], ids=["whole", "runlocal"])
@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.py")), ids=lambda path: path.stem)
def test_every_config_file_is_valid(path, arg):
    config = load(path, *arg)
    complete = validate(config)
    assert complete.is_locked
    assert differences(config, complete) == []
    if arg and not path.stem.startswith("_"):
        assert differences(config, load(path)), "runlocal changes nothing"


def test_missing_fields_get_their_defaults():
    complete = validate(ConfigDict({"steps": 7, "loss": {"alpha": 1}}))
    assert differences(default_config(), complete) == [
        "loss.alpha: 0.0001 -> 1.0",
        "steps: 2000 -> 7",
    ]
    assert validate(ConfigDict()).to_json() == default_config().to_json()


def test_what_is_validated_is_a_copy():
    given_config = default_config()
    validate(given_config).steps = 3
    assert given_config.steps == 2_000


def test_a_recorded_configuration_is_the_configuration():
    config = default_config()
    with config.unlocked():
        config.compare.seeds = (1, 2)
        config.compare.methods.sail = {"objective": "sail", "loss": {"alpha": 0.5}}
        config.compare.grids.sail = {"steps": (10, 20)}
    read = json.loads(validate(config).to_json())
    assert differences(read, json.loads(validate(read).to_json())) == []
    assert validate(read).compare.seeds == (1, 2)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss.alhpa", 1.0, r"config.loss.alhpa: no such field; did you mean loss.alpha\?"),
        ("zzzzz", 1.0, r"config.zzzzz: no such field$"),
        ("loss", 3, r"config.loss: is a group of fields, not a field"),
        ("steps", "many", r"config.steps: must be of type int, got 'many' \(str\)"),
        ("steps", 1.5, r"config.steps: must be of type int, got 1.5"),
        ("steps", True, r"config.steps: must be of type int, got True"),
        ("steps", None, r"config.steps: must be of type int, got None"),
        ("model.layer_norm", "yes", r"config.model.layer_norm: must be of type bool"),
        ("data.files.image", 3, r"config.data.files.image: must be of type str"),
        ("compare.seeds", 3, r"config.compare.seeds: must be of type tuple"),
        ("steps", -1, r"config.steps: must not be negative, got -1"),
        ("log_every", 0, r"config.log_every: must be positive, got 0"),
        ("teacher.refit.weight", 1.0, r"config.teacher.refit.weight: must lie in \[0, 1\), got 1"),
        ("teacher.refit.weight", -0.1, r"config.teacher.refit.weight: must lie in \[0, 1\)"),
        ("teacher.refit.epsilon", 0.0, r"config.teacher.refit.epsilon: must be positive, got 0"),
        ("teacher.refit.rounds", 0, r"config.teacher.refit.rounds: must be positive, got 0"),
        (
            "teacher.standardize.image",
            1.5,
            r"config.teacher.standardize.image: .*\[0, 1\], got 1.5",
        ),
        ("teacher.standardize.text", float("nan"), r"config.teacher.standardize.text: .*\[0, 1\]"),
        ("loss.epsilon", float("nan"), r"config.loss.epsilon: must be positive, got nan"),
        ("loss.alpha", -0.1, r"config.loss.alpha: must not be negative, got -0.1"),
        ("loss.warm_student", 1.5, r"config.loss.warm_student: must lie in \[0, 1\], got 1.5"),
        ("loss.warm_teacher", -1.0, r"config.loss.warm_teacher: must lie in \[0, 1\], got -1.0"),
        ("seed", -1, r"config.seed: must not be negative"),
        ("objective", "siglip", r"config.objective: got 'siglip'; must be one of sotalign, sail"),
        ("aligner", "cas", r"config.aligner: got 'cas'; must be one of layers, asif, csa"),
        ("csa.rigde", 0.1, r"config.csa.rigde: no such field; did you mean csa.ridge\?"),
        ("csa.ridge", -0.1, r"config.csa.ridge: got -0.1; must be finite and at least 0"),
        ("csa.ridge", "low", r"config.csa.ridge: must be of type float, got 'low'"),
        ("csa.weights", "none", r"config.csa.weights: got 'none'; must be one of correlation, eq"),
        ("asif.power", 0, r"config.asif.power: got 0; must be at least 1"),
        ("optimizer.name", "sgd", r"config.optimizer.name: .* lion, adamw"),
        ("select_metric", "mean_recall@3", r"config.select_metric: .* mean_recall@1, "),
        ("loss.precision", "bfloat16", r"config.loss.precision: .* float32, bfloat16_3x"),
        ("optimizer.warmup", 1.0, r"config.optimizer.warmup: must lie in \[0, 1\), got 1.0"),
        ("optimizer.b1", 1.0, r"config.optimizer.b1: must lie in \[0, 1\)"),
        ("optimizer.b2", -0.1, r"config.optimizer.b2: must lie in \[0, 1\)"),
        ("eval_every", 15, r"config.eval_every: must be a multiple of log_every \(10\).* got 15"),
        ("checkpoint_every", 5, r"config.checkpoint_every: must be a multiple of log_every"),
        ("model.init", "teacher", r"config.model.init: 'teacher' .* model.layer_norm=False"),
        ("loss.teacher_epsilon", 0.0, r"config.loss.teacher_epsilon: must be positive for klot"),
        ("compare.methods.sail.alhpa", 1, r"config.compare.methods.sail.alhpa: no such field"),
        ("compare.methods.sail.steps", "x", r"config.compare.methods.sail.steps: .* type int"),
        ("compare.methods.sail", 3, r"config.compare.methods.sail: must be a table"),
        ("compare.grids.sail.steps", (1,), r"config.compare.grids.sail: no such method"),
        ("compare.grids.sail.steps", 3, r"config.compare.grids.sail.steps: must be a tuple"),
        ("compare.grids.sail.steps", (1, "x"), r"config.compare.grids.sail.steps: .* type int"),
    ],
)
def test_what_cannot_be_run_is_named(name, value, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        validate(partial(name, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"select": "best", "checkpoint_every": 0}, r"config.checkpoint_every: select='best'"),
        (
            {"model": {"init": "teacher", "layer_norm": False, "center": False}},
            r"config.model.init: .*model.center=True",
        ),
        (
            {"model": {"init": "teacher", "layer_norm": False, "layer": "mlp"}},
            r"config.model.init: .*model.layer='linear'",
        ),
        (
            {"compare": {"methods": {"sail": {}}, "grids": {"sial": {"steps": (1,)}}}},
            r"config.compare.grids.sial: no such method; did you mean sail\?",
        ),
        (
            {"teacher": {"name": "procrustes", "refit": {"weight": 0.3}}},
            r"config.teacher.refit.weight: only a cca can be refitted, not 'procrustes'",
        ),
        (
            {"teacher": {"standardize": {"text": 0.5}}, "model": {"normalize": False}},
            r"config.teacher.standardize.text: .*set model.normalize=True",
        ),
    ],
)
def test_what_does_not_fit_together_is_named(fields, message):
    with pytest.raises(ConfigError, match=message):
        validate(ConfigDict(fields))


def test_zero_teacher_epsilon_is_the_arg_max_limit_of_info_nce():
    fields = {"loss": {"divergence": "info_nce", "teacher_epsilon": 0.0}}
    assert validate(ConfigDict(fields)).loss.teacher_epsilon == 0


def test_flatten_and_differences_by_hand():
    old = {"a": {"b": 1, "c": (1, 2)}, "d": {}, "e": 3}
    assert flatten(ConfigDict(old)) == {"a.b": 1, "a.c": (1, 2), "d": ConfigDict(), "e": 3}
    new = {"a": {"b": 2, "c": [1, 2]}, "d": {}, "f": 4}
    assert differences(old, new) == ["a.b: 1 -> 2", "e: 3 -> 'absent'", "f: 'absent' -> 4"]


NAMES = st.sampled_from("abcd")
TREES = st.recursive(
    st.integers(), lambda inner: st.dictionaries(NAMES, inner, min_size=1), max_leaves=8
).filter(lambda tree: isinstance(tree, dict))


@given(TREES)
def test_flatten_loses_nothing(tree):
    rebuilt = {}
    for name, value in flatten(tree).items():
        node = rebuilt
        *parents, leaf = name.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    assert rebuilt == tree
    assert differences(tree, rebuilt) == []


@given(TREES, TREES)
def test_differences_are_found_from_both_sides(one, other):
    there = {line.split(":")[0] for line in differences(one, other)}
    assert there == {line.split(":")[0] for line in differences(other, one)}
    assert bool(there) == (flatten(one) != flatten(other))


def test_errors_of_a_config_file_are_one_line_with_its_place(tmp_path):
    for body, expected in (
        ("config.loss.alhpa = 3", "no such field 'alhpa'; did you mean alpha?"),
        ("config.loss.alpha = 'a'", "cannot be casted to type <class 'float'>"),
        ("undefined_name", "name 'undefined_name' is not defined"),
    ):
        path = tmp_path / "mine.py"
        path.write_text(
            "from sotalign_jax.config import default_config\n"
            f"def get_config(arg=None):\n    config = default_config()\n    {body}\n"
        )
        with pytest.raises(Exception) as caught:
            load(path)
        line = explain(caught.value, ["sotalign", "train"])
        assert line.startswith(f"{path}:4: ") and line.endswith(expected)
        assert "\n" not in line
