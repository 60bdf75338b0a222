"""The directory of a run: what was asked, with what, and what came out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import sotalign_jax
from sotalign_jax.config import ConfigError, differences
from sotalign_jax.files import lock, replace_text
from sotalign_jax.training.distributed import together

__all__ = ["NO_MATTER", "InUse", "Workdir", "lock", "provenance", "read_json", "write_json"]

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "ott-jax",
    "orbax-checkpoint",
    "grain",
    "ml-collections",
    "numpy",
)


# Fields that say what is compared or watched, and where a run is computed: none changes what comes
# of it, and they may differ on a restart.
NO_MATTER = ("compare.", "metrics.", "mesh.")


class InUse(ConfigError):
    """Another process is at work in the directory."""


class Workdir:
    """Where one run lives. Opening it again with the same configuration means: go on.

    Args:
        path: directory, made if absent.
        config: the validated configuration of the run; on disk once :meth:`start` was called, so
            that a start that fails on its input leaves the directory open to a corrected one.

    Raises:
        ConfigError: ``path`` holds a run of another configuration, or is not a directory.
    """

    def __init__(self, path: str | os.PathLike, config):
        if "://" in str(path):
            raise ConfigError(f"workdir: {path} is a URL; give a path of a mounted file system")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"workdir: {self.path} is a file; give a directory")
        self.path.mkdir(parents=True, exist_ok=True)
        new = json.loads(config.to_json())
        recorded = self.path / "config.json"
        if recorded.exists():
            changed = [
                line
                for line in differences(read_json(recorded), new)
                if not line.startswith(NO_MATTER)
            ]
            if changed:
                shown = "; ".join(changed[:5]) + ("; ..." if len(changed) > 5 else "")
                raise ConfigError(
                    f"workdir: {self.path} holds a run of another configuration ({shown}); give "
                    "another workdir or the same configuration"
                )
        # Hidden files are a lock, or what a kill in the middle of `start` may leave.
        elif any(not file.name.startswith(".") for file in self.path.iterdir()):
            raise ConfigError(
                f"workdir: {self.path} is not empty and holds no run; give a new or empty directory"
            )

    @property
    def started(self) -> bool:
        """Whether a run was started here before."""
        return (self.path / "config.json").exists()

    def start(self, config, **more: Any) -> None:
        """Record the configuration, and what runs it beside the starts before this one.

        Process 0 of several writes, and the others wait for it.

        Args:
            config: of the run.
            more: further things to say of this start.
        """
        together(lambda: self._record(config, more))

    def _record(self, config, more: dict[str, Any]) -> None:
        if jax.process_index() != 0:
            return
        write_json(self.path / "config.json", json.loads(config.to_json()))
        with open(self.path / "provenance.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(provenance(config.seed) | more) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the directory; the lock ends with the process.

        Of the processes of one run, the first holds the lock.

        Raises:
            InUse: another run is at work here.
        """
        if jax.process_index() != 0:
            yield
            return
        with lock(self.path / ".lock") as held:
            if not held:
                raise InUse(
                    f"workdir: another process is at work in {self.path}; wait for it, or give "
                    "another workdir"
                )
            yield

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def aligner(self) -> Path:
        """The trained aligner."""
        return self.path / "aligner"

    @property
    def teacher(self) -> Path:
        """The teacher, as an aligner."""
        return self.path / "teacher"

    @property
    def results(self) -> Path:
        """Held-out metrics of both; written last, so that its presence means the run is done."""
        return self.path / "results.json"


def provenance(seed: int) -> dict[str, Any]:
    """What it takes to know where a number came from."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "seed": seed,
        "sotalign_jax": sotalign_jax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
        "devices": [str(device) for device in jax.devices()],
        "cpu_count": os.cpu_count(),
        "git": _git_state(),
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this package runs from, and whether it was changed since."""
    root = Path(sotalign_jax.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None  # installed into some other project's checkout
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON; a reader never sees half of it."""
    replace_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; ValueError that names the file if it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); restore or remove it") from None
