"""What a sharded step sends between devices and holds on each, read from the compiled programs.

``python -m sotalign_jax.benchmarks.scaling`` compiles KLOT's value and gradient, and the whole step
of a config, for 1, 2, 4 and 8 devices, and runs neither. With fewer devices than that it starts
itself again with fake ones of the CPU. ``--aot --config configs/cc3m.py --devices 16`` compiles one
config at full size and prints what a device must hold: no data is needed, and no pod.

Bytes are those that a collective takes or gives on one device, whichever is more. A Sinkhorn solve
is three nested loops: iterations; blocks of them, with a look at the marginal error after each; and
absorptions of the potentials, of which most problems need one or two. Memory is what XLA's buffer
assignment for this kind of device says: a program compiled for fake CPUs tells the size of
arguments and outputs exactly, and that of temporary arrays about.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from sotalign_jax.benchmarks.hlo import Loop, loops_of
from sotalign_jax.benchmarks.programs import (
    Memory,
    check_devices,
    compile_programs,
    compiled_klot,
    inputs_or_shapes,
    memory_of,
    read_config,
    whole_numbers,
)
from sotalign_jax.config import Config
from sotalign_jax.files import replace_text

__all__ = ["main", "run", "run_aot", "traffic_of"]

# The scope of a solve, and what its nested loops do, from the innermost out.
SOLVE = "_solve_balanced"
LOOPS = ("iteration", "look", "absorption")
# Set for the process that this one starts, so that it does not start another.
_STARTED = "SOTALIGN_SCALING_STARTED"


def traffic_of(text: str) -> dict[str, dict[str, int]]:
    """Bytes that collectives move in a program with Sinkhorn solves.

    Args:
        text: its HLO.

    Returns:
        Bytes by kind of collective: for one ``"iteration"`` of Sinkhorn, one ``"look"`` at the
        marginal error and one ``"absorption"``, the most that any solve moves; and ``"once"``,
        the sum of all outside the loops of the solves.
    """
    found: dict[str, Counter[str]] = {name: Counter() for name in (*LOOPS, "once")}

    def add(loop: Loop) -> None:
        if SOLVE in loop.op_name:
            if loop.height:
                name = LOOPS[min(loop.height, len(LOOPS)) - 1]
                found[name] |= loop.bytes()  # the larger of the two, kind by kind
        else:
            found["once"] += loop.bytes()
        for inner in loop.loops:
            add(inner)

    add(loops_of(text))
    return {name: dict(counts) for name, counts in found.items()}


def run(
    config: Config,
    devices: Sequence[int],
    *,
    memory: Memory = "auto",
    n: int = 4096,
    d: int = 256,
    image_dim: int = 2048,
    text_dim: int = 4096,
) -> dict[str, Any]:
    """Compile KLOT and the step of a config for each number of devices.

    Args:
        config: a validated configuration.
        devices: numbers of devices.
        memory: ``"dense"``, ``"streamed"`` or ``"auto"``; for the step, ``"auto"`` is what the
            config says.
        n: images and texts of KLOT.
        d: columns of its embeddings.
        image_dim: columns of the image features of a config that reads files.
        text_dim: columns of its text features.

    Returns:
        A JSON-able dict; ``programs`` lists, for each, its name, ``devices``, ``traffic`` (see
        `traffic_of`) and ``memory`` (see `memory_of`).

    Raises:
        ValueError: an argument that is out of range, named.
    """
    if n < 2 or d < 1:
        raise ValueError(f"n must be at least 2 and d at least 1, got {n} and {d}")
    check_devices(devices, n)
    inputs = inputs_or_shapes(config, image_dim, text_dim)
    rows = [_row("KLOT", count, compiled_klot(n, d, count, memory)) for count in devices]
    for count in devices:
        _, programs = compile_programs(_on(config, count, memory), inputs)
        rows.append(_row("step", count, programs["step"]))
    return _report(rows) | {"n": n, "d": d, "memory": memory}


def run_aot(
    config: Config,
    devices: Sequence[int],
    *,
    memory: Memory = "auto",
    image_dim: int = 2048,
    text_dim: int = 4096,
) -> dict[str, Any]:
    """Compile what a run of a config would execute, ahead of time and without its data.

    Args:
        config: as for `run`, as are the other arguments.
        devices: numbers of devices.
        memory: likewise.
        image_dim: likewise.
        text_dim: likewise.

    Returns:
        As `run`; a config whose rows are all held on the devices has a program ``"prepare"`` too.
    """
    check_devices(devices)
    inputs = inputs_or_shapes(config, image_dim, text_dim)
    rows = []
    for count in devices:
        _, programs = compile_programs(_on(config, count, memory), inputs)
        rows += [_row(name, count, program) for name, program in programs.items()]
    return _report(rows) | {"memory": memory}


def _on(config: Config, devices: int, memory: Memory) -> Config:
    config = config.copy_and_resolve_references()
    config.mesh.devices = devices
    if memory != "auto":
        config.loss.memory = memory
    return config


def _row(name: str, devices: int, compiled: Any) -> dict[str, Any]:
    return {
        "program": name,
        "devices": devices,
        "traffic": traffic_of(compiled.as_text()),
        "memory": memory_of(compiled),
    }


def _report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
        "programs": rows,
    }


def _size(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return (
                f"{count / size:.3g} {unit}"
                if count < 1000 * size
                else f"{count / size:.0f} {unit}"
            )
    return f"{count} B"


def _table(report: dict[str, Any], title: str) -> Table:
    table = Table(
        title=title,
        caption="Bytes of collectives, on one device: the larger of what goes in and comes out. "
        f"Memory of one device; compiled for {report['platform']} "
        f"({report['device']}) and not run.",
    )
    table.add_column("program")
    table.add_column("devices", justify="right")
    for heading in ("a Sinkhorn iteration", "a look", "an absorption", "once"):
        table.add_column(heading)
    for heading in ("arguments", "outputs", "temporary", "total"):
        table.add_column(heading, justify="right")
    for row in report["programs"]:
        traffic = [
            "\n".join(f"{kind} {_size(count)}" for kind, count in sorted(kinds.items())) or "-"
            for kinds in row["traffic"].values()
        ]
        memory = [_size(count) for count in row["memory"].values()]
        table.add_row(row["program"], str(row["devices"]), *traffic, *memory)
    return table


def _start_with_fake_devices(arguments: Sequence[str], count: int) -> int:
    """This command again, in a process with so many fake devices of the CPU; its exit status."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), _STARTED: "1"}
    # A setting of JAX's own would win over the flag.
    environment = {k: v for k, v in os.environ.items() if k != "JAX_NUM_CPU_DEVICES"} | settings
    command = [sys.executable, "-m", "sotalign_jax.benchmarks.scaling", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: compile, print one table, and with ``--json`` write the numbers.

    Args:
        arguments: command-line arguments; those of the process by default.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m sotalign_jax.benchmarks.scaling",
        description="Bytes sent and memory held by sharded programs, as compiled; nothing runs.",
    )
    parser.add_argument("--devices", default="1,2,4,8", help="numbers of devices")
    parser.add_argument("--memory", choices=("auto", "dense", "streamed"), default="auto")
    parser.add_argument("--n", type=int, default=4096, help="images and texts of KLOT")
    parser.add_argument("--d", type=int, default=256, help="columns of its embeddings")
    parser.add_argument("--config", default="configs/emoji.py", help="FILE.py or FILE.py:arg")
    parser.add_argument("--aot", action="store_true", help="only the config's own programs")
    parser.add_argument("--image-dim", type=int, default=2048, help="columns of image files")
    parser.add_argument("--text-dim", type=int, default=4096, help="columns of text files")
    parser.add_argument("--json", type=pathlib.Path, help="file to write the numbers to")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.resolve().parent.is_dir():
        parser.error(f"--json: there is no directory {options.json.resolve().parent}")
    widths = {"image_dim": options.image_dim, "text_dim": options.text_dim}
    try:
        devices = whole_numbers("devices", options.devices)
        config = read_config(options.config)
        if max(devices) > len(jax.devices()) and _STARTED not in os.environ:
            status = _start_with_fake_devices(arguments, max(devices))
            if status:
                sys.exit(status)
            return
        if options.aot:
            report = run_aot(config, devices, memory=options.memory, **widths)
            title = f"The programs of {options.config}"
        else:
            size = {"n": options.n, "d": options.d}
            report = run(config, devices, memory=options.memory, **size, **widths)
            title = (
                f"KLOT, value and gradient, n = {options.n:,}, d = {options.d:,}; "
                f"the step of {options.config}"
            )
    except ValueError as error:
        parser.error(str(error))
    report["config"] = options.config
    Console(width=max(160, Console().width)).print(_table(report, title))
    if options.json is not None:
        replace_text(options.json, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
