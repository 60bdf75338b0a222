"""The schema of a run: every field there is, with a default, and what makes a value acceptable.

``configs/default.py`` says what each field means and what the paper uses; the two are held together
by a test. Objectives, divergences and fitted aligners that have options of their own have tables
named after them, which their files in ``sotalign_jax/objectives`` and ``sotalign_jax/fitted``
describe. An experiment starts from :func:`default_config` and assigns.
"""

import dataclasses
import difflib
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from sotalign_jax.fitted import FITTED
from sotalign_jax.objectives import DIVERGENCES, OBJECTIVES, option_tables
from sotalign_jax.objectives.fusemix import FuseMix, mixtures
from sotalign_jax.objectives.options import check_options

__all__ = [
    "Config",
    "ConfigError",
    "default_config",
    "differences",
    "explain",
    "flatten",
    "validate",
]


# ConfigDict, whose fields a type checker knows only as a union of everything.
Config = Any


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the field."""


def default_config() -> Config:
    """Every field of a run, with its default. Unknown fields are refused from here on."""
    config: Config = ml_collections.ConfigDict()
    config.seed = 0
    config.steps = 2_000
    config.aligner = "layers"
    config.objective = "sotalign"

    config.data = ml_collections.ConfigDict()
    config.data.name = "files"
    config.data.n_pairs = 10_000
    config.data.n_unpaired = 0
    config.data.resident = "auto"
    config.data.resident_gib = 8.0
    config.data.files = ml_collections.ConfigDict()
    config.data.files.image = ""
    config.data.files.text = ""
    config.data.files.unpaired_image = ""
    config.data.files.unpaired_text = ""
    config.data.files.on = "auto"
    config.data.files.mode = "disjoint"
    config.data.files.val_image = ""
    config.data.files.val_text = ""
    config.data.files.n_val = 0
    config.data.files.n_test = 0
    config.data.files.test_image = ""
    config.data.files.test_text = ""
    config.data.emoji = ml_collections.ConfigDict()
    config.data.emoji.image = "google"
    config.data.emoji.text = "label_tags"
    config.data.emoji.unpaired = "emoji"
    config.data.platonic = ml_collections.ConfigDict()
    config.data.platonic.noise = 1.0
    config.data.platonic.n_val = 500
    config.data.platonic.n_test = 1_000

    config.teacher = ml_collections.ConfigDict()
    config.teacher.name = "cca"
    config.teacher.dim = 0
    config.teacher.ridge = 0.1
    config.teacher.ridge_on = "covariance"
    config.teacher.weighted = False
    config.teacher.center = "pairs"
    config.teacher.steps = 1_000
    config.teacher.learning_rate = 1e-3
    config.teacher.standardize = ml_collections.ConfigDict()
    config.teacher.standardize.image = 0.0
    config.teacher.standardize.text = 0.0
    config.teacher.refit = ml_collections.ConfigDict()
    config.teacher.refit.weight = 0.0
    config.teacher.refit.epsilon = 0.02
    config.teacher.refit.rounds = 1

    config.model = ml_collections.ConfigDict()
    config.model.init = "random"
    config.model.dim = 1_024
    config.model.layer = "linear"
    config.model.layer_norm = True
    config.model.width_factor = 0
    config.model.normalize = True
    config.model.center = True
    config.model.scale = 20.0
    config.model.bias = -10.0

    config.loss = ml_collections.ConfigDict()
    config.loss.normalization = "mean"
    config.loss.divergence = "klot"
    config.loss.alpha = 1e-4
    config.loss.epsilon = 0.05
    config.loss.teacher_epsilon = 0.01
    config.loss.threshold = 1e-2
    config.loss.max_iterations = 500
    config.loss.iterations = 0
    config.loss.warm_student = 1.0
    config.loss.warm_teacher = 1.0
    config.loss.memory = "auto"
    config.loss.memory_gib = 4.0
    config.loss.precision = "float32"

    config.batch = ml_collections.ConfigDict()
    config.batch.pairs = 10_000
    config.batch.unpaired = 22_768

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "lion"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-5
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.99
    config.optimizer.warmup = 0.1

    config.mesh = ml_collections.ConfigDict()
    config.mesh.devices = 0

    config.log_every = 10
    config.eval_every = 100
    config.checkpoint_every = 100
    config.select = "last"
    config.select_metric = "mean_recall@1"

    config.metrics = ml_collections.ConfigDict()
    config.metrics.tensorboard = False
    config.metrics.wandb = ""

    config.compare = ml_collections.ConfigDict()
    config.compare.seeds = (0,)
    config.compare.teacher = "teacher"
    config.compare.methods = ml_collections.ConfigDict()
    config.compare.tune_seeds = ()
    config.compare.grids = ml_collections.ConfigDict()
    for name, options in _option_tables():
        if name in config:
            raise TypeError(f"{name}: a method with options needs a name that no field has")
        config[name] = ml_collections.ConfigDict(dataclasses.asdict(options()))
    config.lock()
    return config


def _option_tables() -> Iterator[tuple[str, type]]:
    """The tables of methods that have options of their own, and the classes of these."""
    yield from option_tables().items()
    for name, method in FITTED.items():
        yield name, method.options


# Fields that take one of a few names. Registries may grow; tables of names whose home is elsewhere
# are checked there.
_CHOICES: Mapping[str, Collection[str]] = {
    "objective": OBJECTIVES,
    "data.name": ("emoji", "platonic", "files"),
    "data.resident": ("auto", "always", "never"),
    "data.files.on": ("auto", "ids", "rows"),
    "data.files.mode": ("aligned", "disjoint", "independent"),
    "data.emoji.image": ("google", "fluent3d"),
    "data.emoji.text": ("label_tags", "label"),
    "data.emoji.unpaired": ("emoji", "openclipart"),
    "teacher.name": ("cca", "procrustes", "contrastive"),
    "teacher.ridge_on": ("covariance", "scatter"),
    "teacher.center": ("pairs", "unpaired"),
    "model.init": ("random", "teacher"),
    "model.layer": ("linear", "mlp", "star"),
    "loss.normalization": ("mean", "rows"),
    "loss.divergence": DIVERGENCES,
    "loss.memory": ("auto", "dense", "streamed"),
    "loss.precision": ("float32", "bfloat16_3x"),
    "optimizer.name": ("lion", "adamw"),
    "select": ("last", "best"),
    "select_metric": tuple(
        f"{side}recall@{k}" for side in ("mean_", "t2i/", "i2t/") for k in (1, 5, 10)
    ),
}
_POSITIVE = (
    "data.n_pairs",
    "data.resident_gib",
    "model.dim",
    "model.scale",
    "loss.epsilon",
    "loss.threshold",
    "loss.max_iterations",
    "loss.memory_gib",
    "batch.pairs",
    "batch.unpaired",
    "optimizer.learning_rate",
    "log_every",
    "teacher.steps",
    "teacher.learning_rate",
    "teacher.refit.epsilon",
    "teacher.refit.rounds",
)
_NOT_NEGATIVE = (
    "seed",
    "steps",
    "data.n_unpaired",
    "mesh.devices",
    "data.files.n_val",
    "data.files.n_test",
    "data.platonic.noise",
    "teacher.dim",
    "model.width_factor",
    "teacher.ridge",
    "loss.alpha",
    "loss.teacher_epsilon",
    "loss.iterations",
    "optimizer.weight_decay",
    "eval_every",
    "checkpoint_every",
)


def validate(config: Config) -> Config:
    """A locked copy of ``config`` with every field known, typed and in range.

    Args:
        config: a configuration, complete or partial; missing fields get their defaults.

    Returns:
        The complete configuration.

    Raises:
        ConfigError: for an unknown field (with the nearest known name), a wrong type or a value
            out of range.
    """
    complete = default_config()
    known = flatten(complete)
    for name, value in flatten(config).items():
        # The methods of a comparison and their grids are named by the user.
        if name.startswith(("compare.methods.", "compare.grids.")):
            continue
        if name not in known:
            raise ConfigError(f"config.{name}: {_unknown(name, known)}")
        if isinstance(value, ml_collections.ConfigDict):
            continue
        _assign(complete, name, type(known[name]), value)
    for table in ("methods", "grids"):
        given = config.get("compare", {}).get(table, {})
        with complete.compare.unlocked():
            complete.compare[table] = ml_collections.ConfigDict(given)
        for method, fields in given.items():
            _check_method(f"config.compare.{table}.{method}", fields, grid=table == "grids")
    for name in complete.compare.grids:
        if name not in complete.compare.methods:
            raise ConfigError(
                f"config.compare.grids.{name}: no such method"
                f"{_suggestion(name, list(complete.compare.methods))}"
            )
    _check_values(complete)
    return complete


def _check_method(path: str, fields: Any, *, grid: bool) -> None:
    """Fields of a method, or the values of each in its grid: known, and of the right type."""
    if not isinstance(fields, Mapping | ml_collections.ConfigDict):
        raise ConfigError(f"{path}: must be a table of fields, got {fields!r}")
    trial = default_config()
    known = flatten(trial)
    for name, value in flatten(fields).items():
        if name not in known:
            raise ConfigError(f"{path}.{name}: {_unknown(name, known)}")
        if name == "seed":
            raise ConfigError(f"{path}.seed: the seeds of a comparison are compare.seeds")
        if grid and (not isinstance(value, tuple | list) or not value):
            raise ConfigError(f"{path}.{name}: must be a tuple of values to try, got {value!r}")
        for one in value if grid else (value,):
            _assign(trial, name, type(known[name]), one, path=f"{path}.")


def _assign(config: Config, name: str, expected: type, value: Any, path: str = "config.") -> None:
    try:
        # ConfigDict would take None, and True as a number.
        if value is None or (isinstance(value, bool) and expected is not bool):
            raise TypeError
        config.update_from_flattened_dict({name: value})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}{name}: must be of type {expected.__name__}, got {value!r} "
            f"({type(value).__name__})"
        ) from error


def _check_values(config: Config) -> None:
    flat = flatten(config)
    for name, choices in {"aligner": ("layers", *FITTED), **_CHOICES}.items():
        if flat[name] not in choices:
            raise ConfigError(
                f"config.{name}: got {flat[name]!r}; must be one of {', '.join(choices)}"
            )
    for name in _POSITIVE:
        if not flat[name] > 0:
            raise ConfigError(f"config.{name}: must be positive, got {flat[name]}")
    for name in _NOT_NEGATIVE:
        if not flat[name] >= 0:
            raise ConfigError(f"config.{name}: must not be negative, got {flat[name]}")
    for name in ("warmup", "b1", "b2"):
        if not 0 <= config.optimizer[name] < 1:
            raise ConfigError(
                f"config.optimizer.{name}: must lie in [0, 1), got {config.optimizer[name]}"
            )
    if config.select == "best" and not config.checkpoint_every:
        raise ConfigError(
            "config.checkpoint_every: select='best' chooses among checkpoints; must be positive, "
            "got 0"
        )
    for name in ("eval_every", "checkpoint_every"):
        if flat[name] % config.log_every:
            raise ConfigError(
                f"config.{name}: must be a multiple of log_every ({config.log_every}), the steps "
                f"of one dispatch, got {flat[name]}"
            )
    if config.model.init == "teacher":
        if config.model.layer != "linear" or config.model.layer_norm:
            raise ConfigError(
                "config.model.init: 'teacher' is an exact start for a linear layer without "
                "LayerNorm only; set model.layer='linear' and model.layer_norm=False, or "
                "init='random'"
            )
        if not (config.model.normalize and config.model.center):
            raise ConfigError(
                "config.model.init: 'teacher' brings the teacher's preprocessing; set "
                "model.normalize=True and model.center=True, or init='random'"
            )
    if config.teacher.name == "contrastive":
        if not config.teacher.dim:
            raise ConfigError("config.teacher.dim: must be positive for the contrastive teacher")
        if config.teacher.center != "pairs":
            raise ConfigError(
                "config.teacher.center: the contrastive teacher centres on the pairs; must be "
                f"'pairs', got {config.teacher.center!r}"
            )
    _check_extensions(config)
    for name, options in _option_tables():
        try:
            check_options(options, config[name].to_dict())
        except ValueError as error:
            raise ConfigError(f"config.{name}.{error}") from error
    if config.fusemix.alpha:
        try:
            mixtures(
                FuseMix(**config.fusemix.to_dict()), min(config.batch.pairs, config.data.n_pairs)
            )
        except ValueError as error:
            raise ConfigError(f"config.fusemix.{error}") from error
    for name in ("seeds", "tune_seeds"):
        seeds = config.compare[name]
        if not all(isinstance(s, int) and s >= 0 for s in seeds) or len(set(seeds)) < len(seeds):
            raise ConfigError(
                f"config.compare.{name}: must be distinct whole numbers, not negative, got {seeds}"
            )
    for name in ("warm_student", "warm_teacher"):
        if not 0 <= config.loss[name] <= 1:
            raise ConfigError(f"config.loss.{name}: must lie in [0, 1], got {config.loss[name]}")
    if config.loss.teacher_epsilon == 0 and config.loss.divergence == "klot":
        raise ConfigError("config.loss.teacher_epsilon: must be positive for klot, got 0")


def _check_extensions(config: Config) -> None:
    """What standardised columns and a refit of the teacher need of the other fields."""
    refit, standardize = config.teacher.refit, config.teacher.standardize
    if not 0 <= refit.weight < 1:
        raise ConfigError(f"config.teacher.refit.weight: must lie in [0, 1), got {refit.weight}")
    if refit.weight and config.teacher.name != "cca":
        raise ConfigError(
            f"config.teacher.refit.weight: only a cca can be refitted, not "
            f"{config.teacher.name!r}; set 0 or teacher.name='cca'"
        )
    for side, power in standardize.items():
        if not 0 <= power <= 1:
            raise ConfigError(f"config.teacher.standardize.{side}: must lie in [0, 1], got {power}")
        if power and not config.model.normalize:
            raise ConfigError(
                f"config.teacher.standardize.{side}: columns are standardised of rows of unit "
                "length; set model.normalize=True, or 0"
            )


def flatten(config: Config, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; an empty table stays as it is."""

    def walk(node: Config, path: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            name = f"{path}{key}"
            if isinstance(value, Mapping | ml_collections.ConfigDict) and len(value):
                yield from walk(value, f"{name}.")
            else:
                yield name, value

    return dict(walk(config, prefix))


def differences(old: Config, new: Config) -> list[str]:
    """The fields in which two configurations differ, as ``name: old -> new``."""
    before, after = flatten(old), flatten(new)
    missing = object()
    return [
        f"{name}: {before.get(name, 'absent')!r} -> {after.get(name, 'absent')!r}"
        for name in sorted(before.keys() | after.keys())
        if _plain(before.get(name, missing)) != _plain(after.get(name, missing))
    ]


def _plain(value: Any) -> Any:
    """JSON knows no tuples."""
    return list(value) if isinstance(value, tuple) else value


def explain(error: Exception, arguments: Sequence[str]) -> str:
    """One line on why a config file, or a ``--config.FIELD`` on the command line, was not read.

    Args:
        error: what reading them raised.
        arguments: the command line.

    Returns:
        The field, or file and line of the config file, and what was wrong.
    """
    known = flatten(default_config())
    if isinstance(error, AttributeError | KeyError):
        for argument in arguments:
            name = argument.lstrip("-").split("=")[0].removeprefix("config.")
            if argument.lstrip("-").startswith("config.") and name not in known:
                return f"--config.{name}: {_unknown(name, known)}"
    message = str(error.args[0] if error.args else error)
    if found := re.search(r'Key "(\w+)" does not exist', message):
        near = re.search(r'Did you mean "(\w+)"', message)
        message = f"no such field {found[1]!r}" + (f"; did you mean {near[1]}?" if near else "")
    else:
        message = [line.strip() for line in message.splitlines() if line.strip()][-1]
    # A ValueError or TypeError of a config file reaches us with its traceback as text.
    trace = "".join(traceback.format_tb(error.__traceback__)) + str(error)
    places = re.findall(r'File "(.+)", line (\d+), in get_config', trace)
    return f"{':'.join(places[-1])}: {message}" if places else message


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    if any(field.startswith(f"{name}.") for field in known):
        return "is a group of fields, not a field"
    return f"no such field{_suggestion(name, known)}"


def _suggestion(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""
