"""``sotalign`` in processes of its own, alone or several that know of each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start(*arguments: object, processes: int = 1, devices: int = 1) -> list[subprocess.Popen]:
    """``python -m sotalign_jax`` in so many processes of so many devices."""
    environment = os.environ | {
        "PYTHONPATH": str(TESTS),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    if processes > 1:
        environment["SOTALIGN_COORDINATOR"] = f"127.0.0.1:{free_port()}"
        environment["SOTALIGN_NUM_PROCESSES"] = str(processes)
        environment["SOTALIGN_HEARTBEAT_TIMEOUT"] = "15"
    return [
        subprocess.Popen(
            [sys.executable, "-m", "sotalign_jax", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=TESTS.parent,
            env=environment | ({"SOTALIGN_PROCESS_ID": str(i)} if processes > 1 else {}),
        )
        for i in range(processes)
    ]


def finish(group: Sequence[subprocess.Popen], statuses: Sequence[int] = (0,)) -> list[str]:
    """What each process wrote; its exit status must be one of those expected."""
    try:
        outputs = [process.communicate(timeout=240)[0] for process in group]
    finally:
        for process in group:
            process.kill()
            process.communicate()
    for process, output in zip(group, outputs, strict=True):
        assert process.returncode in statuses, output
    return outputs
