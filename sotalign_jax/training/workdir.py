"""The directory of a run: what was asked, with what, and what came out."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

import sotalign_jax
from sotalign_jax.config import ConfigError, differences

__all__ = ["Workdir", "provenance", "write_json"]

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


class Workdir:
    """Where one run lives. Opening it again with the same configuration means: go on.

    Args:
        path: directory, made if absent.
        config: the validated configuration of the run.

    Raises:
        ConfigError: ``path`` holds a run of another configuration, or is not a directory.
    """

    def __init__(self, path: str | os.PathLike, config):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"workdir: {self.path} is a file; give a directory")
        self.path.mkdir(parents=True, exist_ok=True)
        new = json.loads(config.to_json())
        recorded = self.path / "config.json"
        if recorded.exists():
            changed = differences(read_json(recorded), new)
            if changed:
                shown = "; ".join(changed[:5]) + ("; ..." if len(changed) > 5 else "")
                raise ConfigError(
                    f"workdir: {self.path} holds a run of another configuration ({shown}); give "
                    "another workdir or the same configuration"
                )
        elif any(self.path.iterdir()):
            raise ConfigError(
                f"workdir: {self.path} is not empty and holds no run; give a new or empty directory"
            )
        else:
            write_json(recorded, new)

    def start(self, config) -> None:
        """Record versions, seed and git state of this start beside those before it."""
        with open(self.path / "provenance.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(provenance(config.seed)) + "\n")

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
    """Write ``value`` under a temporary name, then rename: a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
