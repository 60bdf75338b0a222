"""Methods against each other, draw by draw of the pairs."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.table import Table

from sotalign_jax.config import Config, ConfigError, flatten, validate
from sotalign_jax.training.build import InputCache
from sotalign_jax.training.distributed import PreemptionWatch, from_first, together
from sotalign_jax.training.loop import train
from sotalign_jax.training.metrics import make_console
from sotalign_jax.training.workdir import Workdir, write_json

__all__ = ["compare"]

Scores = dict[str, float]
Results = dict[str, dict[str, Scores]]  # method -> seed -> metrics

_COLUMNS = tuple(f"{side}/recall@{k}" for side in ("t2i", "i2t") for k in (1, 5, 10))


def compare(config, workdir: str | os.PathLike, *, console: Console | None = None) -> Results:
    """Train every method of ``config.compare`` on every seed; print and save one table.

    A method is the configuration with the fields of ``config.compare.methods.NAME`` put in. All
    methods of a seed see the same pairs and unpaired rows, and those that have no fields of
    ``teacher`` the same teacher, which has a row of its own. Another teacher alone is a method with
    its fields, ``steps=0`` and ``model.init="teacher"``. Where
    ``config.compare.tune_seeds`` is not empty, each method that has a grid is first tuned on the
    validation pairs of those seeds. Started again, finished runs are not repeated.

    Writes ``results.json`` (method -> seed -> test metrics), ``summary.json`` (means, spreads,
    paired differences) and, after tuning, ``tuning.json``. In several processes all take part in
    every run, and process 0 alone writes and reports.

    Args:
        config: a configuration with ``compare.seeds`` and ``compare.methods``.
        workdir: directory of the comparison; each run has its own below.
        console: where to report; standard output by default.

    Returns:
        What ``results.json`` holds; metrics are fractions.

    Raises:
        ValueError: as `train`; or nothing to compare, or data without test pairs.
        OSError, FloatingPointError, Preempted: as `train`.
    """
    console = (console or make_console()) if _first() else Console(quiet=True)
    config = together(lambda: validate(config))
    if not config.compare.methods:
        raise ConfigError("config.compare.methods: names no method, nothing to compare")
    home = together(lambda: Workdir(workdir, config))
    methods = {name: fields.to_dict() for name, fields in config.compare.methods.items()}
    for name, fields in methods.items():
        validate(_with(config, fields, config.seed))  # all of them, before the first one runs
        if name in (config.compare.teacher, "tuning"):
            raise ConfigError(f"config.compare.methods.{name}: this name is taken, choose another")
    if not config.compare.seeds:
        raise ConfigError("config.compare.seeds: must name at least one seed, got none")
    with contextlib.ExitStack() as stack:
        together(lambda: stack.enter_context(home.locked()))
        watch = stack.enter_context(PreemptionWatch())
        return _compare(config, home, methods, console, watch)


def _compare(config, home: Workdir, methods, console: Console, watch: PreemptionWatch) -> Results:
    # Input is checked by reading it, before the directory is taken for this configuration.
    first = _with(config, next(iter(methods.values())), config.compare.seeds[0])
    inputs = InputCache(test=True)
    if not from_first(lambda: home.started):
        inputs.get(validate(first))
    home.start(config)
    if config.compare.tune_seeds:
        methods = _tune(config, methods, home.path / "tuning", console, watch)
        _write({home.path / "tuning.json": methods})

    results: Results = {name: {} for name in (config.compare.teacher, *methods) if name}
    for seed in config.compare.seeds:
        for name, fields in methods.items():
            outcome = _run(config, fields, seed, home.path / name / f"seed_{seed}", inputs, watch)
            if "test" not in outcome:
                raise ConfigError("config.data: has no test pairs to compare on")
            results[name][str(seed)] = outcome["test"]
            # Every method of a seed has the teacher of the base configuration, or one of its own.
            if config.compare.teacher and "teacher" not in fields and "data" not in fields:
                results[config.compare.teacher][str(seed)] = outcome["teacher_test"]
            _report_run(console, name, seed, outcome)
        inputs = InputCache(test=True)
    results = _ascending(results, config.select_metric)
    _write({home.results: results, home.path / "summary.json": _summary(results)})
    console.print(_table(results, config.data.n_pairs))
    for table in _difference_tables(results):
        console.print(table)
    return results


def _first() -> bool:
    """Whether this process is the one of several that writes and reports."""
    return jax.process_index() == 0


def _write(files: Mapping[Path, Any]) -> None:
    """JSON files, written by process 0 while the others wait for them."""

    def write() -> None:
        for path, value in files.items() if _first() else ():
            write_json(path, value)

    together(write)


def _with(config: Config, fields: Mapping[str, Any], seed: int) -> Config:
    """The configuration of one run: a method's fields put in, and no comparison within it."""
    run: Config = ConfigDict(config).copy_and_resolve_references()
    run.unlock()
    for name, value in flatten(fields).items():
        run.update_from_flattened_dict({name: value})
    run.seed = seed
    if run.select == "last":
        run.eval_every = 0  # only the end counts
    del run.compare
    return run


def _run(
    config, fields, seed: int, path: Path, inputs: InputCache, watch: PreemptionWatch
) -> dict[str, Any]:
    run = validate(_with(config, fields, seed))
    if from_first(lambda: (path / "results.json").exists()):
        return train(run, path, quiet=True)
    return train(run, path, quiet=True, inputs=inputs.get(run), watch=watch)


def _tune(
    config, methods, path: Path, console: Console, watch: PreemptionWatch
) -> dict[str, dict[str, Any]]:
    """Each method with the point of its grid that is best on validation, in the mean over seeds."""
    metric = config.select_metric
    tuned = {}
    for name, fields in methods.items():
        if name not in config.compare.grids:
            tuned[name] = fields
            continue
        table = Table("point")
        table.add_column("mean", justify="right")
        scored = []
        inputs = {seed: InputCache(test=False) for seed in config.compare.tune_seeds}
        for number, point in enumerate(_points(config.compare.grids[name])):
            candidate = _merged(fields, point)
            values = []
            for seed in config.compare.tune_seeds:
                target = path / name / f"point_{number}" / f"seed_{seed}"
                outcome = _run(config, candidate, seed, target, inputs[seed], watch)
                if "val" not in outcome:
                    raise ConfigError("config.data: has no validation pairs to tune on")
                values.append(outcome["val"][metric])
            scored.append((float(np.mean(values)), candidate))
            label = ", ".join(f"{key}={value}" for key, value in point.items())
            table.add_row(label, f"{scored[-1][0]:.4f}")
        console.print(f"{name}: {metric} on validation", highlight=False)
        console.print(table)
        tuned[name] = max(scored, key=lambda pair: pair[0])[1]
    return tuned


def _points(grid) -> Iterator[dict[str, Any]]:
    """All combinations of the values of a grid, each a flat ``{field: value}``."""
    flat = flatten(grid)
    for values in itertools.product(*flat.values()):
        yield dict(zip(flat, values, strict=True))


def _merged(fields: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    merged: Config = ConfigDict(fields)
    for name, value in point.items():
        node = merged
        *parents, leaf = name.split(".")
        for parent in parents:
            if parent not in node:
                node[parent] = ConfigDict()
            node = node[parent]
        node[leaf] = value
    return merged.to_dict()


def _report_run(console: Console, name: str, seed: int, outcome: dict[str, Any]) -> None:
    scores = outcome["test"]
    console.print(
        f"seed {seed}  {name:<28} mean R@1 {100 * scores['mean_recall@1']:5.1f}  "
        f"R@10 {100 * scores['mean_recall@10']:5.1f}  ({outcome['seconds']:.0f} s)",
        highlight=False,
    )


def _values(results: Results, method: str, metric: str) -> np.ndarray:
    return np.array([scores[metric] for scores in results[method].values()])


def _spread(values: np.ndarray) -> float:
    """Standard deviation over seeds; 0 of one seed."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _ascending(results: Results, metric: str) -> Results:
    """Methods that have scores, the best last."""
    scored = [name for name, scores in results.items() if scores]
    scored.sort(key=lambda name: float(_values(results, name, metric).mean()))
    return {name: results[name] for name in scored}


def _pairs_of_methods(results: Results) -> Iterator[tuple[str, str]]:
    """Every method against those below it."""
    names = list(results)
    for j, name in enumerate(names):
        for reference in names[:j]:
            yield name, reference


def _summary(results: Results) -> dict[str, Any]:
    metrics = list(next(iter(next(iter(results.values())).values())))
    means = {
        method: {
            metric: {"mean": float(values.mean()), "sd": _spread(values)}
            for metric in metrics
            for values in (_values(results, method, metric),)
        }
        for method in results
    }
    differences = {
        f"{name} - {reference}": {
            metric: {
                "mean": float(delta.mean()),
                "sd": _spread(delta),
                "min": float(delta.min()),
                "max": float(delta.max()),
            }
            for metric in ("mean_recall@1", "mean_recall@5", "mean_recall@10")
            for delta in (_values(results, name, metric) - _values(results, reference, metric),)
        }
        for name, reference in _pairs_of_methods(results)
    }
    return {"means": means, "differences": differences}


def _table(results: Results, n_pairs: int) -> Table:
    seeds = len(next(iter(results.values())))
    table = Table(
        title=f"Held-out retrieval, {n_pairs} pairs, in percent: mean ± sd over {seeds} seeds",
        title_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for metric in _COLUMNS:
        side, recall = metric.split("/recall@")
        table.add_column(f"{side.upper()}\nR@{recall}", justify="right")
    for k in (1, 10):
        table.add_column(f"mean\nR@{k}", justify="right")
    for method in results:
        cells = []
        for metric in (*_COLUMNS, "mean_recall@1", "mean_recall@10"):
            values = 100 * _values(results, method, metric)
            cells.append(f"{values.mean():.1f}±{_spread(values):.1f}")
        table.add_row(method, *cells)
    return table


def _difference_tables(results: Results) -> Iterator[Table]:
    for k in (1, 10):
        table = Table(
            title=f"Paired differences in mean R@{k}, in points: mean ± sd (smallest, largest)",
            title_justify="left",
        )
        table.add_column("method", no_wrap=True)
        references = list(results)[:-1]
        for reference in references:
            table.add_column(f"- {reference}", justify="right")
        for name in list(results)[1:]:
            cells = []
            for reference in references:
                if (name, reference) in set(_pairs_of_methods(results)):
                    metric = f"mean_recall@{k}"
                    delta = 100 * (
                        _values(results, name, metric) - _values(results, reference, metric)
                    )
                    cells.append(
                        f"{delta.mean():+.1f}±{_spread(delta):.1f}\n"
                        f"({delta.min():+.1f}, {delta.max():+.1f})"
                    )
                else:
                    cells.append("")
            table.add_row(name, *cells)
        yield table
