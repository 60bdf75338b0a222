"""How exactly Sinkhorn has to be solved, and from where: whole runs against threshold and start.

``python -m sotalign_jax.benchmarks.thresholds --config configs/emoji.py`` trains a config at each
marginal error at which Sinkhorn may stop (``loss.threshold``), with every solve started from
nothing (cold) and from the potentials that the images had when they were last seen (warm, as the
config's ``loss.warm_student`` and ``loss.warm_teacher`` have it), on each seed. The table tells
what the solves took and what the aligner is worth: scores are on the validation pairs, differences
paired by seed. Times are medians over the dispatches of all seeds, the first of each run left
out because it compiles; measure them on an idle machine, without cutting a run off.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sotalign_jax.benchmarks.programs import read_config, whole_numbers
from sotalign_jax.config import Config, ConfigError, validate
from sotalign_jax.files import replace_text
from sotalign_jax.training.build import load_inputs
from sotalign_jax.training.loop import train
from sotalign_jax.training.workdir import Workdir

__all__ = ["STARTS", "main", "run"]

STARTS = ("cold", "warm")
_PLANS = ("student", "teacher")


def run(
    config: Config,
    thresholds: Sequence[float],
    *,
    starts: Sequence[str] = STARTS,
    seeds: Sequence[int] = (0,),
    workdir: str | os.PathLike,
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Train a config at every threshold, from every start, on every seed.

    Args:
        config: a validated configuration whose objective solves transport plans, with validation
            pairs.
        thresholds: L1 marginal errors at which Sinkhorn stops.
        starts: of ``"cold"`` and ``"warm"``.
        seeds: of the runs.
        workdir: has a directory for each run; runs that are finished there are not repeated.
        console: shows the progress; by default nothing is shown.

    Returns:
        A JSON-able dict for each threshold and start, the tightest threshold first: ``threshold``,
        ``start``; ``iterations`` and ``error`` (L1, the largest of a dispatch) by plan, means over
        all dispatches but the first; ``seconds`` a step, the median; ``scores``, validation
        ``config.select_metric`` by seed; and ``difference`` to the first entry by seed.

    Raises:
        ValueError: nothing to measure, or a threshold or start that cannot be used; as `train`.
    """
    _check(config, thresholds, starts, seeds)
    cells = [(value, start) for value in sorted(set(thresholds)) for start in starts]
    found: dict[tuple[float, str], list[dict[str, Any]]] = {cell: [] for cell in cells}
    with Progress(console=console or Console(quiet=True), transient=True) as progress:
        task = progress.add_task("runs", total=len(seeds) * len(cells))
        for seed in seeds:
            inputs = None
            for threshold, start in cells:
                one = _with(config, threshold, start, seed)
                home = pathlib.Path(workdir) / f"threshold_{threshold:g}" / start / f"seed_{seed}"
                if inputs is None and not (home / "results.json").exists():
                    inputs = load_inputs(one)
                results = train(one, home, quiet=True, inputs=inputs)
                if "val" not in results:
                    raise ConfigError("config.data: has no validation pairs to score on")
                found[threshold, start].append(_measured(one, home, results))
                progress.advance(task)
    reference = np.array([each["score"] for each in found[cells[0]]])
    rows = []
    for (threshold, start), runs in found.items():
        scores = np.array([each["score"] for each in runs])
        rows.append(
            {
                "threshold": threshold,
                "start": start,
                "iterations": _mean_by_plan(runs, "iterations"),
                "error": _mean_by_plan(runs, "error"),
                "seconds": statistics.median(t for each in runs for t in each["seconds"]),
                "scores": dict(zip(map(str, seeds), scores.tolist(), strict=True)),
                "difference": dict(
                    zip(map(str, seeds), (scores - reference).tolist(), strict=True)
                ),
            }
        )
    return rows


def _check(config: Config, thresholds, starts, seeds) -> None:
    if config.objective != "sotalign" or config.loss.divergence != "klot" or not config.loss.alpha:
        raise ConfigError(
            "config.objective: only 'sotalign' with loss.divergence='klot' and a positive "
            "loss.alpha solves transport plans, and there is nothing to measure"
        )
    if config.loss.iterations:
        raise ConfigError(
            f"config.loss.iterations: {config.loss.iterations} is a fixed number that no threshold "
            "changes; must be 0"
        )
    if config.steps <= config.log_every:
        raise ConfigError(
            f"config.steps: must be more than log_every ({config.log_every}), since the first "
            f"dispatch compiles and is not timed, got {config.steps}"
        )
    if not thresholds or min(thresholds) <= 0:
        raise ValueError(f"thresholds: must be positive numbers, got {list(thresholds)}")
    if not starts or not set(starts) <= set(STARTS) or len(set(starts)) < len(starts):
        raise ValueError(f"starts: must be of {', '.join(STARTS)}, each once, got {list(starts)}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: must be distinct whole numbers, got {list(seeds)}")
    if "warm" in starts and not (config.loss.warm_student or config.loss.warm_teacher):
        raise ConfigError(
            "config.loss.warm_student, warm_teacher: both are 0, so that a warm start is a cold "
            "one; set one of them, or measure cold starts only"
        )


def _with(config: Config, threshold: float, start: str, seed: int) -> Config:
    one: Config = ConfigDict(config).copy_and_resolve_references()
    one.seed = seed
    one.loss.threshold = threshold
    if start == "cold":
        one.loss.warm_student = one.loss.warm_teacher = 0.0
    # Only the end counts, and nothing else should take time.
    one.eval_every = one.checkpoint_every = 0
    one.select = "last"
    return validate(one)


def _measured(config: Config, home: pathlib.Path, results: dict[str, Any]) -> dict[str, Any]:
    """What one run took, and its score."""
    lines = Workdir(home, config).metrics.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines][1:]
    return {
        "score": results["val"][config.select_metric],
        "seconds": [1 / record["time/steps_per_second"] for record in records],
        "iterations": {
            plan: statistics.fmean(record[f"train/{plan}_iterations"] for record in records)
            for plan in _PLANS
        },
        "error": {
            plan: statistics.fmean(record[f"train/{plan}_marginal_error"] for record in records)
            for plan in _PLANS
        },
    }


def _mean_by_plan(runs: list[dict[str, Any]], name: str) -> dict[str, float]:
    return {plan: statistics.fmean(each[name][plan] for each in runs) for plan in _PLANS}


def _table(rows: list[dict[str, Any]], title: str, metric: str) -> Table:
    seeds = len(rows[0]["scores"])
    table = Table(
        title=title,
        title_justify="left",
        caption=f"Iterations and L1 errors: student, teacher. Scores: {metric} on validation, in "
        f"percent, mean over {seeds} seeds; difference to the first line: mean ± sd (smallest, "
        f"largest), in points.",
    )
    for name in ("threshold", "start", "iterations", "error", "ms a step", "score", "difference"):
        table.add_column(name, justify="left" if name == "start" else "right")
    for row in rows:
        delta = 100 * np.array(list(row["difference"].values()))
        spread = delta.std(ddof=1) if seeds > 1 else 0.0
        table.add_row(
            f"{row['threshold']:g}",
            row["start"],
            " / ".join(f"{row['iterations'][plan]:.1f}" for plan in _PLANS),
            " / ".join(f"{row['error'][plan]:.1e}" for plan in _PLANS),
            f"{1e3 * row['seconds']:.2f}",
            f"{100 * statistics.fmean(row['scores'].values()):.2f}",
            f"{delta.mean():+.2f} ± {spread:.2f} ({delta.min():+.2f}, {delta.max():+.2f})",
        )
    return table


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: must be numbers, as in 0.1,0.01, got {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: train, print one table, and with ``--json`` write the numbers.

    Args:
        arguments: command-line arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sotalign_jax.benchmarks.thresholds",
        description="Runs against the error at which Sinkhorn stops, started cold and warm.",
    )
    parser.add_argument("--config", default="configs/emoji.py", help="FILE.py or FILE.py:arg")
    parser.add_argument("--thresholds", default="0.3,0.1,0.03,0.01,0.001,0.0001")
    parser.add_argument("--starts", default=",".join(STARTS), help="cold, warm or both")
    parser.add_argument("--seeds", type=int, default=5, help="how many, from 0")
    parser.add_argument("--workdir", help="keep the runs here, and go on with those of before")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.resolve().parent}")
    console = Console(width=max(120, Console().width))
    try:
        (seeds,) = whole_numbers("--seeds", str(options.seeds))
        config = read_config(options.config)
        with tempfile.TemporaryDirectory() as temporary:
            rows = run(
                config,
                _numbers("--thresholds", options.thresholds),
                starts=options.starts.split(","),
                seeds=range(seeds),
                workdir=options.workdir or temporary,
                console=console,
            )
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))
    device = jax.devices()[0].device_kind
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    title = f"{options.config} on {device}, {os.cpu_count()} CPUs, load average {load or 0:.1f}"
    console.print(_table(rows, title, config.select_metric))
    if options.json is not None:
        report = {"config": options.config, "device": device, "load_average": load, "rows": rows}
        replace_text(options.json, json.dumps(report | {"jax": jax.__version__}, indent=2) + "\n")


if __name__ == "__main__":
    main()
