"""``sotalign`` in processes that begin with everything imported, so that many of them are cheap."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]

_SERVER = """
import json, os, sys, traceback
import sotalign_jax.main, sotalign_jax.training, sotalign_jax.sweeps

for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    child = os.fork()
    if child:
        print(child, flush=True)
        continue
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(out, 1), os.dup2(out, 2)
    sys.argv = ["sotalign", *order["argv"]]
    status = 1
    try:
        sotalign_jax.main.run()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)
"""


class Forks:
    """A server that forks; its children share a cache of compiled programs."""

    def __init__(self, directory: Path):
        self._directory = directory
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=TESTS.parent,
            env=os.environ
            | {
                "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}",
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(directory / "cache"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            },
        )

    def start(self, *argv: object) -> Fork:
        """``sotalign ARGV`` in a process of its own."""
        self._count += 1
        out = self._directory / f"out_{self._count}"
        pid = self.ask({"argv": list(map(str, argv)), "out": str(out)})
        return Fork(self, pid, out)

    def ask(self, order: dict) -> int:
        assert self._server.stdin and self._server.stdout
        print(json.dumps(order), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()


class Fork:
    """One of its processes."""

    def __init__(self, server: Forks, pid: int, out: Path):
        self._server, self.pid, self._out = server, pid, out
        self.status: int | None = None

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)  # not reaped before `finish`, so that the id is still its own

    def running(self) -> bool:
        stat = Path(f"/proc/{self.pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[0] != "Z"

    def finish(self, timeout: float = 120) -> str:
        """Its output, once it ended; its exit status is then in ``status``."""
        deadline = time.monotonic() + timeout
        while self.running():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise TimeoutError(self._out.read_text())
            time.sleep(0.01)
        self.status = self._server.ask({"wait": self.pid})
        return self._out.read_text() if self._out.exists() else ""
