"""One page on a run, a comparison or a sweep."""

from __future__ import annotations

import os
from pathlib import Path

from sotalign_jax.files import replace_text
from sotalign_jax.reports.figures import check_plots
from sotalign_jax.reports.markup import GENERATOR
from sotalign_jax.reports.points import read_points
from sotalign_jax.reports.run_page import run_page
from sotalign_jax.reports.runs import read_run
from sotalign_jax.reports.sweep_page import sweep_page

__all__ = ["write_report"]


def write_report(
    directory: str | os.PathLike, out: str | os.PathLike | None = None
) -> tuple[Path, list[str]]:
    """Writes one HTML file that needs no other: no script, no network.

    Args:
        directory: of a run, of a comparison or of a sweep, finished or not. Nothing in it is
            changed but ``report.html``.
        out: the file; by default ``report.html`` in the directory. One that is there is replaced
            if it is a report.

    Returns:
        The file, and what it could not show.

    Raises:
        ValueError: no run, comparison or sweep in the directory, or another file under ``out``.
        ImportError: matplotlib is missing.
        OSError: a file that cannot be read or written.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"report: {directory} is not a directory; give that of a run or a sweep")
    target = directory / "report.html" if out is None else Path(out)
    _check_target(target)
    check_plots()
    points = read_points(directory)
    text, problems = run_page(read_run(directory)) if points is None else sweep_page(points)
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, text)
    return target, problems


def _check_target(target: Path) -> None:
    """Raises ValueError where something stands that is no report."""
    if not target.exists():
        return
    if target.is_file():
        with open(target, "rb") as file:
            if f'name="generator" content="{GENERATOR}"'.encode() in file.read(512):
                return
    raise ValueError(f"out: {target} exists and is no report; give another file or remove it")
