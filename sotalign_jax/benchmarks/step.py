"""A whole train step of a config: its time, and which parts of it take that time.

``python -m sotalign_jax.benchmarks.step --config configs/emoji.py`` times dispatches as ``train``
makes them with all rows on the device, compilation excluded, and then profiles one more. Each op of
the profile is booked under the scope of the program that it comes from; an op that XLA fused from
several counts where XLA says it comes from. Ops run in parallel and a profile slows them down:
shares are of the time of all ops of all devices together. What no step of a dispatch changes, XLA
does once a dispatch: the teacher's plan where every step sees all rows. Waiting inside a loop
counts as the loop's own time, which is under "other".

Measure on an idle machine; the printed load average tells.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from sotalign_jax.benchmarks.hlo import op_names
from sotalign_jax.benchmarks.programs import memory_of, read_config
from sotalign_jax.config import Config, ConfigError
from sotalign_jax.files import replace_text
from sotalign_jax.training.build import build, check_splits, fits, load_inputs, sources
from sotalign_jax.training.devices import place_tables, replicate
from sotalign_jax.training.step import place_state, prepare, run_resident

__all__ = ["main", "part_of", "run", "self_times"]

# The parts of a step, and the scopes that tell them; the first that fits counts.
PARTS = (
    ("student's plan (Sinkhorn)", "student_plan"),
    ("teacher's plan (Sinkhorn)", "teacher_plan"),
    ("KLOT value and gradient", "jit(_contrast)"),
    ("sharpness of the plans", "sharpness"),
    ("projections, forward and backward", "project"),
    ("affinities of the divergence, and back", "divergence"),
    ("SigLIP, forward and backward", "siglip"),
    ("InfoNCE, forward and backward", "info_nce"),
    ("similarities within a modality, and back", "structure"),
    ("optimiser update", "optimizer"),
    ("drawing the batch", "draw"),
)
OTHER = "other (metrics, loop, copies)"


def run(config: Config, *, repeats: int = 5) -> dict[str, Any]:
    """Time the resident train step of a config, and profile it.

    Args:
        config: a validated configuration; the first steps of its run are what is measured.
        repeats: timed dispatches of ``log_every`` steps; the median counts.

    Returns:
        A JSON-able dict: ``seconds`` of the dispatches, ``steps_per_second``, ``rows_per_second``,
        ``metrics`` (means over the timed steps of what the loss reports, such as Sinkhorn
        iterations), ``compile_seconds``, ``memory`` (see `memory_of`), and
        ``parts``: for each part, from the costliest on, its name, ``seconds`` a step of its ops in
        the profile, and ``share`` of all ops.

    Raises:
        ValueError: ``repeats`` is too small, or the data cannot be loaded or does not fit.
        RuntimeError: the profile of this device shows no ops of the program.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if not config.steps:
        raise ConfigError("config.steps: 0 trains nothing, and there is no step to measure")
    splits, teacher = load_inputs(config)
    setup, state, rest = build(config, splits, teacher)
    check_splits(config, splits, setup.loss.reads)
    tables = sources(config, splits, setup, state, rest)
    if not fits(config, tables, teacher, setup.mesh):
        raise ConfigError(
            "config.data.resident: the step with all rows on the device is what is measured, and "
            f"{config.data.resident!r} keeps them off; raise data.resident_gib or take 'always'"
        )
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    state = place_state(state, setup.mesh)
    rest, teacher, key = replicate((rest, teacher, key), setup.mesh)
    raw = place_tables(tables, setup.mesh)
    tables = jax.jit(prepare)(setup, state.params, rest, teacher, raw)
    length = min(config.log_every, config.steps)

    start = time.perf_counter()
    program: Any = run_resident.lower(setup, length, state, rest, tables, key).compile()
    compile_seconds = time.perf_counter() - start
    state, _ = jax.block_until_ready(program(setup, state, rest, tables, key))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    seconds, metrics = [], []
    for _ in range(repeats):
        start = time.perf_counter()
        state, found = jax.block_until_ready(program(setup, state, rest, tables, key))
        seconds.append(time.perf_counter() - start)
        metrics.append(found)

    def dispatch() -> None:
        jax.block_until_ready(program(setup, state, rest, tables, key))

    ops = _profile(dispatch, "jit_run_resident")
    scopes = op_names(program.as_text())
    booked: defaultdict[str, float] = defaultdict(float)
    for op, taken in ops.items():
        booked[part_of(scopes.get(op, ""))] += taken
    total = sum(booked.values())
    median = statistics.median(seconds)
    return {
        "steps_a_dispatch": length,
        "seconds": seconds,
        "steps_per_second": length / median,
        "rows_per_second": length / median * sum(stream.size for stream in setup.streams),
        "rows_a_step": [stream.size for stream in setup.streams],
        "metrics": {
            name: float(np.mean([np.asarray(found[name]) for found in metrics]))
            for name in metrics[0]
        },
        "compile_seconds": compile_seconds,
        "memory": memory_of(program),
        "parts": [
            {"name": name, "seconds": taken / length, "share": taken / total}
            for name, taken in sorted(booked.items(), key=lambda part: -part[1])
        ],
        "devices": 1 if setup.mesh is None else setup.mesh.size,
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "load_average": load,
        "jax": jax.__version__,
    }


def part_of(op_name: str) -> str:
    """The part of a step that an op belongs to, by the scopes it comes from."""
    for name, scope in PARTS:
        if scope in op_name:
            return name
    return OTHER


def _profile(dispatch: Callable[[], None], module: str) -> dict[str, float]:
    """Seconds of each op of a compiled module during one call of ``dispatch``."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            dispatch()
        traces = list(pathlib.Path(directory).rglob("*.xplane.pb"))
        found: defaultdict[str, float] = defaultdict(float)
        for trace in traces:
            for plane in jax.profiler.ProfileData.from_file(str(trace)).planes:
                for line in plane.lines:
                    for op, taken in self_times(_events(line, module)).items():
                        found[op] += taken
    if not found:
        raise RuntimeError(
            f"the profile of {jax.devices()[0].device_kind} names no ops of {module}: their shares "
            "cannot be told on this device"
        )
    return {op: nanoseconds / 1e9 for op, nanoseconds in found.items()}


def _events(line: Any, module: str) -> Iterable[tuple[float, float, str | None]]:
    for event in line.events:
        stats = dict(event.stats)
        name = stats.get("hlo_op") if stats.get("hlo_module") == module else None
        yield event.start_ns, event.duration_ns, name


def self_times(events: Iterable[tuple[float, float, str | None]]) -> dict[str, float]:
    """Time of each op without that of what ran inside it, on one line of a trace.

    Args:
        events: start, duration and op of each event (None: something else); they nest.

    Returns:
        Time by op, in the unit of the durations.
    """
    times: defaultdict[str, float] = defaultdict(float)
    open_events: list[tuple[float, str | None]] = []  # end and op, from the outermost in
    for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
        while open_events and open_events[-1][0] <= start:
            open_events.pop()
        if open_events and (around := open_events[-1][1]) is not None:
            times[around] -= duration
        if name is not None:
            times[name] += duration
        open_events.append((start + duration, name))
    return dict(times)


def _table(report: dict[str, Any], config: str) -> Table:
    pairs, images, texts = report["rows_a_step"]
    metrics = report["metrics"]
    iterations = ""
    if "train/student_iterations" in metrics:
        iterations = (
            f" Sinkhorn iterations a step: student {metrics['train/student_iterations']:.1f}, "
            f"teacher {metrics['train/teacher_iterations']:.1f}."
        )
    named = [part["name"] for part in report["parts"] if part["name"] != OTHER]
    most = " > ".join(named[:3])
    table = Table(
        title=f"The step of {config}: {report['steps_per_second']:.3g} steps/s, "
        f"{report['rows_per_second']:,.0f} rows/s",
        caption=f"{pairs:,} pairs, {images:,} images, {texts:,} texts a step; {report['devices']} "
        f"x {report['device']}. Median of {len(report['seconds'])} dispatches of "
        f"{report['steps_a_dispatch']} steps, after {report['compile_seconds']:.1f} s of "
        f"compilation; load average {report['load_average'] or 0:.1f} before.{iterations} "
        f"The three largest costs with a name: {most}.",
    )
    table.add_column("part, by profile of one dispatch")
    table.add_column("time of its ops, a step", justify="right")
    table.add_column("share of all ops", justify="right")
    for part in report["parts"]:
        table.add_row(part["name"], f"{1e3 * part['seconds']:.3g} ms", f"{part['share']:.1%}")
    table.add_section()
    profiled = sum(part["seconds"] for part in report["parts"])
    table.add_row("all ops", f"{1e3 * profiled:.3g} ms", "")
    median = statistics.median(report["seconds"]) / report["steps_a_dispatch"]
    table.add_row("a step, without the profile", f"{1e3 * median:.3g} ms", "")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: measure, print one table, and with ``--json`` write the numbers.

    Args:
        arguments: command-line arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sotalign_jax.benchmarks.step",
        description="Time of a train step, and the parts that take it.",
    )
    parser.add_argument("--config", default="configs/emoji.py", help="FILE.py or FILE.py:arg")
    parser.add_argument("--repeats", type=int, default=5, help="timed dispatches")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.resolve().parent}")
    try:
        report = run(read_config(options.config), repeats=options.repeats)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    report["config"] = options.config
    Console(width=max(100, Console().width)).print(_table(report, options.config))
    if options.json is not None:
        replace_text(options.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
