"""What it saves to train several runs in one program, and how close their parameters stay.

``python -m sotalign_jax.benchmarks.many --config configs/emoji.py --runs 8`` trains a config on so
many seeds three times, each time in fresh processes: with a ``sotalign train`` process a run, as a
shell loop would; one after another in one process, where rows are read and programs compiled as
little as possible; and together, by `sotalign_jax.training.train_many`. The table tells seconds
start to end, all of it counted, and how far the parameters of the last are from those of the first.
Measure on an idle machine.

Lion steps by signs: where a momentum is zero up to rounding, a sum formed in another order turns a
coordinate by two steps, in any two programs. ``--optimizer adamw`` compares without that.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from rich.console import Console
from rich.table import Table

from sotalign_jax.benchmarks.programs import read_config, whole_numbers
from sotalign_jax.config import Config, ConfigError, validate
from sotalign_jax.files import replace_text
from sotalign_jax.training.workdir import write_json

__all__ = ["WAYS", "main", "run"]

WAYS = ("processes", "one process", "together")

_ONE_PROCESS = """
import sys
from sotalign_jax.benchmarks.programs import read_config
from sotalign_jax.training.build import InputCache
from sotalign_jax.training import train, train_many

way, *paths = sys.argv[1:]
configs = [read_config(f"{path}.py") for path in paths]
if way == "together":
    train_many(configs, paths, quiet=True)
else:
    cache = InputCache()
    for config, path in zip(configs, paths):
        train(config, path, quiet=True, inputs=cache.get(config))
"""


def run(
    config: Config, count: int, *, vary: str = "seed", workdir: str | os.PathLike
) -> dict[str, Any]:
    """Train so many runs of a config in each of the `WAYS`.

    Args:
        config: a validated configuration.
        count: of runs, at least 2.
        vary: ``"seed"``: runs differ in their seed, and so in pairs, weights and batches;
            ``"alpha"``: in ``loss.alpha``, on the same batches.
        workdir: directory that everything is written to.

    Returns:
        A JSON-able dict: ``seconds`` of each way; ``difference``, the largest over the runs of
        the norm of the parameters trained together less those of processes of their own, over the
        norm of the latter; and ``largest``, of a single parameter.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: a process failed; with what it wrote.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, got {count}")
    if vary not in ("seed", "alpha"):
        raise ValueError(f"vary must be 'seed' or 'alpha', got {vary!r}")
    if vary == "alpha" and not config.loss.alpha > 0:
        raise ConfigError("config.loss.alpha: is 0, of which there are no multiples to compare")
    seconds: dict[str, float] = {}
    parameters: dict[str, list[np.ndarray]] = {}
    for way in WAYS:
        home = pathlib.Path(workdir) / way.replace(" ", "_")
        home.mkdir(parents=True)
        paths = []
        for number in range(count):
            one: Config = config.copy_and_resolve_references()
            if vary == "seed":
                one.seed = config.seed + number
            else:
                one.loss.alpha = config.loss.alpha * 2.0**number
            paths.append(str(home / f"run_{number}"))
            _write_config(pathlib.Path(f"{paths[-1]}.py"), validate(one))
        start = time.perf_counter()
        if way == "processes":
            for path in paths:
                command = ["-m", "sotalign_jax", "train", f"--config={path}.py"]
                _process([*command, f"--workdir={path}"])
        else:
            _process(["-c", _ONE_PROCESS, way, *paths])
        seconds[way] = time.perf_counter() - start
        parameters[way] = [_parameters(pathlib.Path(path)) for path in paths]
    pairs = list(zip(parameters["together"], parameters["processes"], strict=True))
    return {
        "runs": count,
        "vary": vary,
        "optimizer": config.optimizer.name,
        "seconds": seconds,
        "difference": float(max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)),
        "largest": float(max(np.abs(a - b).max() for a, b in pairs)),
    }


def _write_config(path: pathlib.Path, config: Config) -> None:
    """A config file that holds every field of ``config``."""
    values = path.with_suffix(".json")
    write_json(values, json.loads(config.to_json()))
    path.write_text(
        "import json\nfrom ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict(json.load(open({str(values)!r})))\n",
        encoding="utf-8",
    )


def _process(arguments: Sequence[str]) -> None:
    ended = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"a run failed with status {ended.returncode}: {ended.stderr[-2000:]}")


def _parameters(path: pathlib.Path) -> np.ndarray:
    """All tensors of the aligner of a run, as one vector."""
    found = safetensors.numpy.load_file(path / "aligner" / "aligner.safetensors")
    return np.concatenate([found[name].ravel().astype(np.float64) for name in sorted(found)])


def _table(report: dict[str, Any], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("seconds", justify="right")
    table.add_column("of the first", justify="right")
    for way, seconds in report["seconds"].items():
        share = seconds / report["seconds"][WAYS[0]]
        table.add_row(way, f"{seconds:.1f}", f"{share:.3f}")
    table.caption = (
        f"Parameters differ by at most {report['difference']:.1e} of their norm, none by more "
        f"than {report['largest']:.1e}."
    )
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: train, print one table, and with ``--json`` write the numbers.

    Args:
        arguments: command-line arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sotalign_jax.benchmarks.many",
        description="Runs in processes of their own, one after another, and together.",
    )
    parser.add_argument("--config", default="configs/emoji.py", help="FILE.py or FILE.py:arg")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--vary", default="seed", choices=("seed", "alpha"))
    parser.add_argument("--optimizer", choices=("lion", "adamw"), help="in place of the config's")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.resolve().parent}")
    try:
        (count,) = whole_numbers("--runs", str(options.runs))
        config = read_config(options.config)
        if options.optimizer is not None:
            config.optimizer.name = options.optimizer
            config = validate(config)
        with tempfile.TemporaryDirectory() as temporary:
            report = run(config, count, vary=options.vary, workdir=temporary)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    device = jax.devices()[0].device_kind
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    title = (
        f"{count} runs of {options.config} that differ in {options.vary}, on {device}, "
        f"{os.cpu_count()} CPUs, load average {'unknown' if load is None else f'{load:.1f}'}"
    )
    Console(width=max(120, Console().width)).print(_table(report, title))
    if options.json is not None:
        report |= {"config": options.config, "device": device, "load_average": load}
        replace_text(options.json, json.dumps(report | {"jax": jax.__version__}, indent=2) + "\n")


if __name__ == "__main__":
    main()
