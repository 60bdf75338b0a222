"""Directories as runs, comparisons and sweeps leave them, written by hand; and pages read back."""

from __future__ import annotations

import html.parser
import json
import math
from pathlib import Path
from typing import NamedTuple

from flax import nnx

from sotalign_jax import training
from sotalign_jax.config import Config, default_config, validate
from sotalign_jax.models import Aligner, LayerConfig

METRICS = tuple(f"{side}recall@{k}" for side in ("t2i/", "i2t/", "mean_") for k in (1, 5, 10))
PROVENANCE = {
    "time": "2026-01-02T03:04:05+0000",
    "command": ["/home/me/env/bin/sotalign", "train", "--workdir=/home/me/my runs/emoji"],
    "seed": 3,
    "sotalign_jax": "0.1.0",
    "python": "3.11.7",
    "platform": "Linux",
    "versions": {"jax": "0.10.2", "numpy": "2.4.6"},
    "devices": ["cpu:0"],
    "cpu_count": 2,
    "git": {"commit": "0123456789abcdef", "dirty": True},
}


def emoji_config(**fields) -> Config:
    """The embedded data, which needs no file."""
    config = default_config()
    config.data.name = "emoji"
    config.data.n_pairs = 100
    config.teacher.dim = 16
    config.seed = 3
    config.steps = 40
    for name, value in fields.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return validate(config)


def write_run(path: Path, config: Config, *, steps: int = 40, val: bool = True) -> Path:
    """A run that has reported so many steps and no results."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(config.to_json())
    (path / "provenance.jsonl").write_text(json.dumps(PROVENANCE) + "\n")
    lines = [json.dumps(record(step, val=val)) for step in range(10, steps + 1, 10)]
    (path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return path


def record(step: int, *, val: bool = True) -> dict[str, float]:
    fall = math.exp(-step / 20)
    found = {
        "step": step,
        "train/loss": 0.5 * fall,
        "train/siglip": 0.3 * fall,
        "train/klot": 2 * fall,
        "train/learning_rate": 1e-4 * fall,
        "train/gradient_norm": fall,
        "train/parameter_norm": 30.0,
        "train/scale": 20.0,
        "train/bias": -10.0,
        "train/student_marginal_error": 1e-3 * fall,
        "train/teacher_marginal_error": 2e-3,
        "train/student_iterations": 10.0,
        "train/teacher_iterations": 20.0,
        "train/student_perplexity": 50 * fall,
        "train/teacher_perplexity": 3.0,
        "time/steps_per_second": 10.0,
        "time/rows_per_second": 1e4,
    }
    if val:
        found |= {f"val/{metric}": 0.01 * i + step / 100 for i, metric in enumerate(METRICS)}
    return found


def finish(path: Path, config: Config) -> dict:
    """Gives a run its end: an aligner (a CCA), a teacher (no matter which), what they retrieve."""
    splits = training.load_splits(config)
    assert splits.val is not None and splits.test is not None
    aligner = Aligner.from_teacher(training.fit_teacher(config, splits))
    teacher = random_aligner(aligner.image_dim, aligner.text_dim)
    aligner.save(path / "aligner")
    teacher.save(path / "teacher")
    results = {"selected_step": config.steps, "pairs": len(splits.pairs), "seconds": 12.345}
    for name, pairs in (("val", splits.val), ("test", splits.test)):
        results[name] = training.evaluate(aligner, pairs)
        results[f"teacher_{name}"] = training.evaluate(teacher, pairs)
    (path / "results.json").write_text(json.dumps(results))
    return results


def finish_anyhow(path: Path, image_dim: int, text_dim: int) -> None:
    """Gives a run an aligner that was never trained, and no retrieval."""
    random_aligner(image_dim, text_dim).save(path / "aligner")
    (path / "results.json").write_text(json.dumps({"selected_step": 0, "seconds": 0.5}))


def random_aligner(image_dim: int, text_dim: int) -> Aligner:
    return Aligner(image_dim, text_dim, 16, layer=LayerConfig("linear"), rngs=nnx.Rngs(0))


class Finished(NamedTuple):
    """A finished run, what stood in its directory, and what a report made of it."""

    path: Path
    results: dict
    before: dict
    page: Path
    problems: list[str]


def snapshot(path: Path) -> dict:
    """Every file of a directory, with its contents and times."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return {file.relative_to(path): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


def scores(value: float) -> dict[str, float]:
    """Metrics of which all recalls are one number."""
    return dict.fromkeys(METRICS, value) | {"foscttm": 0.1, "n_images": 50.0, "n_texts": 50.0}


def write_point(path: Path, config: Config, value: float | None, teacher: float = 0.25) -> None:
    """A run of a sweep whose recalls are all one number, or that has not finished."""
    write_run(path, config)
    if value is not None:
        results = {
            "test": scores(value),
            "val": scores(value / 2),
            "teacher_test": scores(teacher),
            "teacher_val": scores(teacher / 2),
            "selected_step": config.steps,
            "seconds": 1.5,
            "pairs": config.data.n_pairs,
        }
        (path / "results.json").write_text(json.dumps(results))


def write_comparison(path: Path, values: dict[str, dict[int, float | None]], **more) -> Path:
    """Method to seed to recall; None of a run that has not finished."""
    config = emoji_config()
    with config.unlocked():
        config.compare.methods = {
            name: {"objective": "sail"} | more.get(name, {}) for name in values
        }
        config.compare.seeds = tuple(next(iter(values.values())))
        config.compare.teacher = "cca"
    path.mkdir(parents=True)
    (path / "config.json").write_text(config.to_json())
    for method, seeds in values.items():
        for seed, value in seeds.items():
            write_point(path / method / f"seed_{seed}", emoji_config(seed=seed), value)
    return path


def write_sweep(
    path: Path, points: list[tuple[dict, dict, float | None]], layout: dict | None = None
) -> Path:
    """Labels, fields and recall of every point; those without a recall were not started."""
    listed = []
    for number, (labels, fields, value) in enumerate(points, 1):
        key = f"{number:012x}"
        listed.append({"number": number, "key": key, "labels": labels, "fields": fields})
        if value is not None:
            config = emoji_config(**{name.replace(".", "__"): v for name, v in fields.items()})
            write_point(path / "points" / key, config, value)
    path.mkdir(parents=True, exist_ok=True)
    record = {"name": "ablation", "points": listed}
    if layout is not None:
        record["layout"] = {"columns": [], "over": "seed", "select": ""} | layout
    (path / "sweep.json").write_text(json.dumps(record))
    return path


class Page(html.parser.HTMLParser):
    """A page as a tree of text, which fails where tags are not closed in order."""

    VOID = frozenset({"br", "hr", "img", "meta"})

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.tables: list[list[list[str]]] = []
        self._open: list[str] = []
        self._text: list[str] = []
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = []
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"{tag} closed out of order"
        if tag in ("td", "th"):
            self.tables[-1][-1].append("".join(self._cell or []))
            self._cell = None

    def handle_data(self, data):
        if "style" not in self._open[-1:]:
            self._text.append(data)
        if self._cell is not None:
            self._cell.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self._text).split())

    def all(self, tag: str) -> list[dict]:
        """Attributes of the elements of that name."""
        return [attributes for name, attributes in self.tags if name == tag]
