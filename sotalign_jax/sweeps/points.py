"""The points of a sweep file: their configurations, their directories, and how far they are."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from sotalign_jax.config import (
    Config,
    ConfigError,
    default_config,
    differences,
    flatten,
    validate,
)
from sotalign_jax.sweeps import hyper
from sotalign_jax.sweeps.hyper import LABEL, Fields
from sotalign_jax.sweeps.layout import Layout
from sotalign_jax.training.workdir import NO_MATTER, lock, provenance, read_json, write_json

__all__ = ["Point", "Sweep", "SweepDir", "base_config", "load_sweep", "run_key"]


@dataclasses.dataclass(frozen=True)
class Point:
    """One point of a sweep. Points that differ in labels alone are one run.

    Attributes:
        number: place in the file, from 1.
        fields: what it puts into the base configuration.
        labels: its labels, by their names without ``label.``.
        config: its validated configuration.
        key: names its directory; see `run_key`.
        title: labels and the fields that vary, for people.
    """

    number: int
    fields: Fields
    labels: Fields
    config: Config
    key: str
    title: str

    def value(self, name: str) -> Any:
        """A field of the configuration, or a label as ``"label.NAME"``; None of a missing one."""
        if name.startswith(LABEL):
            return self.labels.get(name.removeprefix(LABEL))
        return self._flat[name]

    @functools.cached_property
    def _flat(self) -> Fields:
        return flatten(self.config)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep file says.

    Attributes:
        source: the file, absolute, with ``:arg`` where one was given.
        overrides: fields of the base configuration that were set beside the file.
        points: in the order of the file.
        layout: how its table and plot read.
    """

    source: str
    overrides: Fields
    points: tuple[Point, ...]
    layout: Layout

    @property
    def name(self) -> str:
        """File and argument, without the directory."""
        path, arg = _split(self.source)
        return path.stem + (f":{arg}" if arg is not None else "")

    def runs(self, given: Sequence[str] = ()) -> dict[str, Point]:
        """The first point of every run by its key: all, or those of some points.

        Args:
            given: numbers of points, or keys, or beginnings of keys.

        Raises:
            ConfigError: no such point, or several.
        """
        runs: dict[str, Point] = {}
        for point in self.points:
            runs.setdefault(point.key, point)
        if not given:
            return runs
        return {key: runs[key] for key in dict.fromkeys(self._key(one, runs) for one in given)}

    def _key(self, given: str, runs: Mapping[str, Point]) -> str:
        if given in runs:
            return given
        # A number has fewer digits than a key has letters, but a key may begin with digits alone.
        if given.isdecimal() and 1 <= int(given) <= len(self.points):
            return self.points[int(given) - 1].key
        found = [key for key in runs if given and key.startswith(given)]
        if len(found) == 1:
            return found[0]
        raise ConfigError(
            f"point: {given!r} is {'no point' if not found else f'{len(found)} points'} of "
            f"{self.name}; give a number from 1 to {len(self.points)} or the key of a point"
        )


def load_sweep(source: str, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Reads a sweep file and checks everything in it that can be checked before a run.

    The file has ``get_config(arg)``, the base configuration; ``get_hyper(hyper, arg)``, the points,
    made with the functions of `sotalign_jax.sweeps.hyper`; and ``get_table(arg)`` or
    ``get_table()``, a dict of how the table and the plot read: see `Layout`.

    Args:
        source: ``FILE.py`` or ``FILE.py:arg``.
        overrides: fields to put into the base configuration, as on the command line.

    Returns:
        The sweep, every point of it validated.

    Raises:
        ConfigError: a file that cannot be read or fails, an unknown field, a value that is out of
            range, two points that are the same, a table that the points cannot fill.
    """
    path, arg = _split(source)
    module = _module(path)
    base = _base(_call(module, path, "get_config", *([arg] if arg is not None else [])), path)
    overrides = dict(overrides or {})
    assigned = _call(module, path, "get_hyper", hyper, arg)
    layout = Layout.of(_table(module, path, arg), arg)
    if not isinstance(assigned, list) or not assigned:
        raise ConfigError(f"{path}: get_hyper: must return a list of points, at least one")
    points = tuple(_points(assigned, _nested(base, overrides), overrides))
    layout.check(points)
    shown = os.fspath(path.absolute()) + (f":{arg}" if arg is not None else "")
    return Sweep(shown, overrides, points, layout)


def base_config(sweep_file: str, path: str, arg: str | None = None) -> Config:
    """The configuration of another config file, for the ``get_config`` of a sweep file.

    Args:
        sweep_file: ``__file__`` of the caller.
        path: the other file, from the directory of the caller.
        arg: its argument.

    Returns:
        What its ``get_config`` returns.

    Raises:
        ConfigError: the file cannot be read, or fails.
    """
    other = Path(sweep_file).parent / path
    return _call(_module(other), other, "get_config", *([arg] if arg is not None else []))


def run_key(config: Config) -> str:
    """Twelve hexadecimal digits of a validated configuration, the same for the same outcome.

    Fields that do not change what comes of a run (``compare``, ``metrics``, ``mesh``) do not count,
    nor do those that have their default: a later version with further fields knows its runs again.
    """
    defaults = _defaults()
    fields = {
        name: value
        for name, value in flatten(config).items()
        if not f"{name}.".startswith(NO_MATTER) and value != defaults[name]
    }
    text = json.dumps(fields, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _defaults() -> Fields:
    return flatten(default_config())


class SweepDir:
    """The directory of a sweep: ``sweep.json``, a run directory a point under ``points``, tables.

    Args:
        path: the directory.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.record = self.path / "sweep.json"

    def run(self, key: str) -> Path:
        """The run directory of a point."""
        return self.path / "points" / key

    def failure(self, key: str) -> Path:
        """Why the point failed last, beside its directory; absent otherwise."""
        return self.path / "points" / f"{key}.failed.json"

    def failed(self, key: str) -> bool:
        """Whether a point failed last, and is not finished."""
        return self.failure(key).exists() and not self.finished(key)

    def why_failed(self, key: str) -> str:
        """The message of the failure of a point."""
        return read_json(self.failure(key))["message"]

    def lock(self, key: str) -> Path:
        """Held by the process that is at work on a point."""
        return self.path / "points" / f".{key}.lock"

    def results(self, key: str) -> dict[str, Any] | None:
        """What a finished run came to; None of another one."""
        path = self.run(key) / "results.json"
        return read_json(path) if path.exists() else None

    def finished(self, key: str) -> bool:
        """Whether the run of a point is done."""
        return (self.run(key) / "results.json").exists()

    def complete(self, sweep: Sweep) -> bool:
        """Whether all runs of a sweep are done."""
        return all(self.finished(key) for key in sweep.runs())

    def in_use(self, key: str) -> bool:
        """Whether a process is at work on a point."""
        if not self.lock(key).exists():
            return False
        with lock(self.lock(key), shared=True) as free:
            return not free

    def step(self, key: str) -> int:
        """The last step that the run of a point has reported."""
        path = self.run(key) / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        whole = [line for line in lines[-2:] if line.endswith("}")]  # a kill may cut one off
        return json.loads(whole[-1])["step"] if whole else 0

    def state(self, key: str) -> str:
        """``finished``, ``running``, ``failed``, ``interrupted`` or ``waiting``."""
        if self.finished(key):
            return "finished"
        if self.in_use(key):
            return "running"
        if self.failed(key):
            return "failed"
        return "interrupted" if (self.run(key) / "config.json").exists() else "waiting"

    def recorded(self) -> dict[str, Any]:
        """What ``sweep.json`` holds.

        Raises:
            ConfigError: there is none.
        """
        if not self.record.exists():
            raise ConfigError(
                f"workdir: {self.path} holds no sweep; `sotalign sweep run` makes one"
            )
        return read_json(self.record)

    def check(self, sweep: Sweep) -> None:
        """Raises ConfigError where a sweep cannot live here.

        Because something else does, or this sweep with other fields set beside its file; or where
        a finished point has another configuration than its key says, because a default is another
        one since.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"workdir: {self.path} is a file; give a directory")
        if self.record.exists():
            name = self.recorded()["name"]
            if name != sweep.name:
                raise ConfigError(
                    f"workdir: {self.path} holds the sweep {name}, not {sweep.name}; give another "
                    "directory"
                )
            recorded, given = (
                _that_matter(fields) for fields in (self.recorded()["overrides"], sweep.overrides)
            )
            if recorded != given:
                raise ConfigError(
                    f"workdir: {self.path} holds this sweep with {_overrides_shown(recorded)}, not "
                    f"with {_overrides_shown(given)}; give the same, or another directory"
                )
        elif self.path.exists() and any(not f.name.startswith(".") for f in self.path.iterdir()):
            raise ConfigError(
                f"workdir: {self.path} is not empty and holds no sweep; give a new or empty "
                "directory"
            )
        for key, point in sweep.runs().items():
            path = self.run(key) / "config.json"
            if path.exists():
                changed = differences(read_json(path), json.loads(point.config.to_json()))
                changed = [
                    c for c in changed if not c.startswith(NO_MATTER) and "'absent'" not in c
                ]
                if changed:
                    raise ConfigError(
                        f"workdir: {self.run(key)} was run with other defaults "
                        f"({'; '.join(changed)}); move it away, or set these fields as they were"
                    )

    def start(self, sweep: Sweep) -> None:
        """Records the sweep. Points that its file no longer has stay recorded as earlier ones."""
        self.check(sweep)
        self.path.mkdir(parents=True, exist_ok=True)
        old = self.recorded() if self.record.exists() else {}
        points = [
            {
                "number": p.number,
                "key": p.key,
                "title": p.title,
                "labels": p.labels,
                "fields": p.fields,
            }
            for p in sweep.points
        ]
        keys = {point.key for point in sweep.points}
        earlier = [
            p for p in [*old.get("earlier", []), *old.get("points", [])] if p["key"] not in keys
        ]
        about = provenance(0)
        write_json(
            self.record,
            {
                "name": sweep.name,
                "source": sweep.source,
                "overrides": sweep.overrides,
                "layout": {
                    name: getattr(sweep.layout, name)
                    for name in ("rows", "columns", "select", "over")
                },
                "directory": os.getcwd(),
                "points": points,
                "earlier": list({point["key"]: point for point in earlier}.values()),
                "sotalign_jax": about["sotalign_jax"],
                "versions": about["versions"],
                "git": about["git"],
            },
        )
        # After the record: another process may be starting the same sweep, and must see whose this
        # directory is.
        (self.path / "points").mkdir(exist_ok=True)


def _that_matter(fields: Mapping[str, Any]) -> Fields:
    """Fields that change what comes of a run, as a record has them: with lists for tuples."""
    fields = json.loads(json.dumps(fields))
    return {name: v for name, v in fields.items() if not f"{name}.".startswith(NO_MATTER)}


def _overrides_shown(fields: Fields) -> str:
    shown = [f"--config.{name}={value}" for name, value in sorted(fields.items())]
    return " ".join(shown) or "nothing set beside the file"


def _split(source: str) -> tuple[Path, str | None]:
    path, colon, arg = source.partition(":")
    return Path(path), arg if colon else None


def _module(path: Path) -> ModuleType:
    """A config file, run."""
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location("sotalign_config_file", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise _failed(path, error) from error
    return module


def _table(module: ModuleType, path: Path, arg: str | None) -> Any:
    """What ``get_table`` returns, given the argument if it takes one."""
    try:
        inspect.signature(getattr(module, "get_table", None)).bind(arg)  # pyright: ignore
    except TypeError:
        return _call(module, path, "get_table")
    return _call(module, path, "get_table", arg)


def _call(module: ModuleType, path: Path, name: str, *arguments: Any) -> Any:
    """A function of a config file, whose errors name the place."""
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{path}: has no function {name}; a sweep file needs it")
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        expected = {"get_hyper": "(hyper, arg=None)", "get_table": "(arg=None)"}.get(
            name, "(arg=None)"
        )
        raise ConfigError(f"{path}: {name}: must be defined as {name}{expected}") from None
    try:
        return function(*arguments)
    except Exception as error:  # a config file is a program: anything may come out of it
        raise _failed(path, error) from error


def _failed(path: Path, error: Exception) -> ConfigError:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError):
        lines = [error.lineno]
    kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
    message = " ".join(str(error).split())
    return ConfigError(f"{path}{f':{lines[-1]}' if lines else ''}: {kind}{message}")


def _base(config: Any, path: Path) -> dict[str, Any]:
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{path}: get_config: must return a configuration, got {config!r}")
    base = config.copy_and_resolve_references().to_dict()
    base.pop("compare", None)  # no comparison within a point
    return base


def _points(
    assigned: Sequence[Any], base: dict[str, Any], overrides: Mapping[str, Any]
) -> Iterable[Point]:
    """Validated points, no two of them the same."""
    for number, point in enumerate(assigned, 1):
        if not isinstance(point, dict) or not all(isinstance(name, str) for name in point):
            raise ConfigError(f"get_hyper: point {number}: must be a dict of fields, got {point!r}")
    names = dict.fromkeys(name for point in assigned for name in point)
    varying = [name for name in names if len({repr(p.get(name)) for p in assigned}) > 1]
    seen: dict[tuple[str, str], Point] = {}
    for number, point in enumerate(assigned, 1):
        fields = {name: v for name, v in point.items() if not name.startswith(LABEL)}
        labels = {k.removeprefix(LABEL): v for k, v in point.items() if k.startswith(LABEL)}
        for name, value in labels.items():
            if not isinstance(value, str | int | float):
                raise ConfigError(
                    f"point {number}: label.{name}: must be text or a number, got {value!r}"
                )
            if len(str(value).splitlines()) > 1:
                raise ConfigError(f"point {number}: label.{name}: must be one line, got {value!r}")
        title = " ".join(
            f"{n.removeprefix(LABEL)}={_shown(point[n])}" for n in varying if n in point
        )
        for name in fields:
            _check_field(name, overrides)
        try:
            config = validate(_nested(base, fields))
        except ConfigError as error:
            raise ConfigError(f"point {number} ({title or 'the base'}): {error}") from error
        made = Point(number, fields, labels, config, run_key(config), title)
        twin = seen.setdefault((made.key, repr(sorted(labels.items()))), made)
        if twin is not made:
            raise ConfigError(
                f"points {twin.number} and {number} ({title or 'the base'}) are the same run; "
                "leave one out, or give them different labels to show one run twice"
            )
        yield made


def _check_field(name: str, overrides: Mapping[str, Any]) -> None:
    if f"{name}.".startswith(NO_MATTER):
        raise ConfigError(
            f"{name}: changes nothing that comes of a run, and cannot be a field of a sweep; set "
            f"it for all points, as --config.{name}=..."
        )
    if name in overrides:
        raise ConfigError(
            f"--config.{name}: the points of this sweep set this field themselves; change the file"
        )


def _nested(base: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict with flat fields put in; wrong ones are left for `validate` to find."""
    nested: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in base.items()}
    for name, value in fields.items():
        *parents, leaf = name.split(".")
        node = nested
        for parent in parents:
            inner = node.get(parent)
            node[parent] = node = dict(inner) if isinstance(inner, Mapping) else {}
        node[leaf] = value
    return nested


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
