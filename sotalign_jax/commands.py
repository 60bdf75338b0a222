"""What each ``sotalign`` command does, as functions of plain arguments."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from sotalign_jax import evaluation, features, fitted, reports, sweeps, training
from sotalign_jax.config import Config, validate
from sotalign_jax.features import FeatureTable, Pairs
from sotalign_jax.fitted import FittedAligner
from sotalign_jax.interop.heads import FORMAT as HEADS
from sotalign_jax.models import Aligner
from sotalign_jax.training import distributed
from sotalign_jax.training.evaluate import CHUNK, check_width
from sotalign_jax.training.metrics import ProgressBar, make_console
from sotalign_jax.training.workdir import read_json, write_json

__all__ = [
    "USAGE",
    "aligner_path",
    "compare",
    "diagnose",
    "embed",
    "evaluate",
    "fit_teacher",
    "given_pairs",
    "inspect",
    "load_aligner",
    "needed",
    "progress",
    "report",
    "say",
    "test_pairs",
    "train",
]

USAGE = """sotalign: semi-supervised alignment of frozen image and text encoders

  sotalign train       --config=FILE.py --workdir=DIR    train an aligner; the same again resumes
  sotalign compare     --config=FILE.py --workdir=DIR    train methods on several seeds, one table
  sotalign sweep run   FILE.py --workdir=DIR             many runs; then: status, table, plot
  sotalign evaluate    --workdir=DIR [--image=F --text=F] [--out=FILE.json]    retrieval
  sotalign evaluate    --workdir=DIR --protocol=NAME --image=F --text=F        COCO, ImageNet, ...
  sotalign embed       --workdir=DIR [--image=F] [--text=F] [--out=DIR]    features to embeddings
  sotalign fit-teacher --config=FILE.py --out=DIR        the linear teacher alone, as an aligner
  sotalign diagnose    --config=FILE.py [--out=FILE.json]    is its data worth training on?
  sotalign export      --workdir=DIR --out=DIR [--format=torch|clip-retrieval]    for other tools
  sotalign import-sail FILE.pt --out=DIR                 heads that SAIL's code saved, as an aligner
  sotalign report      DIR [--out=FILE.html]    a page on a run, a comparison or a sweep
  sotalign encode      --images=PATH|--texts=PATH --encoder=NAME --out=DIR    items to features
  sotalign inspect     PATH ...                          features, an aligner or a run, described
  sotalign data        list | describe NAME | captions NAME | prompts NAME | labels PATH    data

Any field of a config can be set on the command line: --config.loss.alpha=0.1
"""

_SHOWN = (1, 5, 10)
# Rows of each table that a diagnosis reads.
_LOOKED_AT = 10_000


def train(config: Config, workdir: str, console: Console | None = None) -> dict[str, Any]:
    """Train, or go on training, and print held-out retrieval beside the teacher's."""
    started = distributed.start()
    console = console or make_console()
    results = training.train(config, workdir, console=console)
    if started.process_index != 0:
        return results
    for name in ("val", "test"):
        if name in results:
            table = retrieval_table(f"Retrieval on the {name} pairs")
            add_scores(table, f"teacher ({config.teacher.name})", results[f"teacher_{name}"])
            trained = config.aligner == "layers"
            label = f"aligner (step {results['selected_step']})" if trained else config.aligner
            add_scores(table, label, results[name])
            console.print(table)
    console.print(f"aligner saved in {Path(workdir) / 'aligner'}", highlight=False, soft_wrap=True)
    return results


def compare(config: Config, workdir: str, console: Console | None = None) -> dict[str, Any]:
    """Train every method on every seed and print one table."""
    distributed.start()
    return sweeps.compare(config, workdir, console=console or make_console())


def fit_teacher(
    config: Config, out: str, console: Console | None = None
) -> dict[str, dict[str, float]]:
    """Fit the linear teacher alone, save it as an aligner, print its retrieval."""
    console = console or make_console()
    config = validate(config)
    if (Path(out) / "aligner").exists():
        raise ValueError(f"out: {Path(out) / 'aligner'} exists; give another directory")
    splits = training.load_splits(config)
    teacher = Aligner.from_teacher(training.fit_teacher(config, splits))
    scores = {
        name: training.evaluate(teacher, pairs)
        for name, pairs in (("val", splits.val), ("test", splits.test))
        if pairs is not None
    }
    metadata = {"data": splits.description, "config": json.loads(config.to_json()), **scores}
    teacher.save(Path(out) / "aligner", metadata=metadata)
    table = retrieval_table(f"Retrieval of the {config.teacher.name} teacher")
    for name, values in scores.items():
        add_scores(table, name, values)
    console.print(table)
    console.print(f"teacher saved in {Path(out) / 'aligner'}", highlight=False, soft_wrap=True)
    return scores


def diagnose(
    config: Config, out: str | None = None, console: Console | None = None
) -> dict[str, Any]:
    """Say whether a run's encoders, pairs and unpaired rows look worth training on."""
    console = console or make_console()
    config = validate(config)
    if out is not None and Path(out).exists():
        raise ValueError(f"out: {out} exists; give another file or remove it")
    splits = training.load_splits(config)
    rng = np.random.default_rng(config.seed)

    def some(table: FeatureTable, of: np.ndarray | None = None) -> np.ndarray:
        """Up to so many rows, in their order; or the given ones."""
        if of is None:
            of = np.sort(rng.permutation(len(table))[:_LOOKED_AT])
        return np.asarray(table.select(of).array())

    chosen = np.sort(rng.permutation(len(splits.pairs))[:_LOOKED_AT])
    held_out = {"val": splits.val, "test": splits.test}
    found = evaluation.diagnose(
        some(splits.pairs.image, chosen),
        some(splits.pairs.text, chosen),
        some(splits.unpaired_image),
        some(splits.unpaired_text),
        held_out={
            name: (some(pairs.image), some(pairs.text))
            for name, pairs in held_out.items()
            if pairs is not None
        },
        max_rows=_LOOKED_AT,
        seed=config.seed,
    )
    console.print(f"data: {splits.description}", highlight=False)
    console.print(evaluation.describe(found), highlight=False, markup=False, soft_wrap=True)
    found["findings"] = [finding._asdict() for finding in found["findings"]]
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(out), found)
    return found


def evaluate(
    workdir: str,
    image: str | None = None,
    text: str | None = None,
    out: str | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Retrieval of a trained aligner on the run's own test pairs, or on given features."""
    console = console or make_console()
    if out is not None and Path(out).exists():
        raise ValueError(f"out: {out} exists; give another file or remove it")
    aligner = load_aligner(workdir)
    pairs = given_pairs(aligner, image, text) or test_pairs(workdir)
    with progress(console, "rows", len(pairs.image) + len(pairs.text)) as advance:
        scores = training.evaluate(aligner, pairs, progress=advance)
    table = retrieval_table(f"{len(pairs.image)} images, {len(pairs.text)} texts")
    add_scores(table, "aligner", scores)
    console.print(table)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(out), scores)
    return scores


def embed(
    workdir: str,
    image: str | None = None,
    text: str | None = None,
    out: str | None = None,
    console: Console | None = None,
) -> list[Path]:
    """Embed raw features into feature stores; without any, the run's own test pairs.

    Rows are written as they are embedded, so that memory does not grow with their number. A store
    stands under its name once it is whole.
    """
    console = console or make_console()
    aligner = load_aligner(workdir)
    given = {s: path for s, path in (("image", image), ("text", text)) if path is not None}
    root = Path(out) if out is not None else Path(workdir) / "embeddings"
    for side in given or ("image", "text"):
        if (root / side).exists():
            raise ValueError(f"out: {root / side} exists; give another directory or remove it")
    tables = {side: features.open_features(path, modality=side) for side, path in given.items()}
    if not given:
        pairs = test_pairs(workdir)
        tables = {"image": pairs.image, "text": pairs.text}
    for side, table in tables.items():
        check_width(aligner, side, table)
    for side in given:  # the run's own test pairs were checked as they were loaded
        features.check_finite(tables[side])
    written = []
    for side, table in tables.items():
        target = root / side
        with progress(console, f"{side} rows", len(table)) as advance:
            features.write_store(
                target,
                training.embed_chunks(aligner, side, table, progress=advance),
                ids=table.ids,
                encoder=f"aligner of {workdir}",
                normalized=isinstance(aligner, Aligner) or aligner.unit,
                source=table.name,
                dtype="float32",
            )
        console.print(
            f"{len(table)} {side} rows, {aligner.dim} columns: {target}",
            highlight=False,
            soft_wrap=True,
        )
        written.append(target)
    return written


def inspect(paths: list[str], console: Console | None = None) -> None:
    """Describe feature files, aligners and runs."""
    console = console or make_console()
    if not paths:
        raise ValueError("inspect: give one or more paths of features, aligners or runs")
    for path in paths:
        table = Table(title=path, show_header=False, title_justify="left")
        if (Path(path) / "aligner.json").exists():
            _describe_aligner(table, Path(path))
        elif (Path(path) / "config.json").exists():
            _describe_run(table, Path(path))
        else:
            _describe_features(table, path)
        console.print(table)


def report(paths: list[str], out: str | None = None, console: Console | None = None) -> Path:
    """Write one HTML page on a run, a comparison or a sweep, finished or not."""
    if len(paths) != 1:
        raise ValueError(f"report: give one directory of a run or a sweep, got {len(paths)}")
    console = console or make_console()
    written, problems = reports.write_report(paths[0], out)
    for problem in problems:
        console.print(problem, highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {written}", highlight=False, markup=False, soft_wrap=True)
    return written


def tell(name: str, what: str, message: str, status: int) -> int:
    """Say in one line on standard error why a command ends; returns the exit status."""
    print(f"sotalign {name}: {what}: {' '.join(message.splitlines())}", file=sys.stderr)
    return status


def needed(name: str) -> Any:
    """The value of a flag that a command cannot do without."""
    value = getattr(flags.FLAGS, name)
    if value is None:
        raise ValueError(f"--{name}: this command needs it")
    return value


def say(console: Console, text: str) -> None:
    """Print a line as it is, however long, without colours and markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def aligner_path(workdir: str) -> Path:
    """Where the aligner of a run or of a fitted teacher is, or one saved in the directory."""
    for directory in (Path(workdir) / "aligner", Path(workdir)):
        if (directory / "aligner.json").exists():
            return directory
    raise ValueError(f"workdir: {workdir} holds no aligner; train one with `sotalign train`")


def load_aligner(workdir: str) -> Aligner | FittedAligner:
    """The aligner that `aligner_path` finds."""
    return fitted.load_aligner(aligner_path(workdir))


def retrieval_table(title: str) -> Table:
    """An empty table with a column a metric."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for direction in ("T2I", "I2T", "mean"):
        for k in _SHOWN:
            table.add_column(f"{direction}\nR@{k}", justify="right")
    table.add_column("FOSCTTM", justify="right")
    return table


def add_scores(table: Table, label: str, scores: dict[str, float]) -> None:
    """One row of recalls, in percent."""
    cells = [
        f"{100 * scores[f'{prefix}recall@{k}']:.1f}"
        for prefix in ("t2i/", "i2t/", "mean_")
        for k in _SHOWN
    ]
    table.add_row(label, *cells, f"{scores['foscttm']:.4f}")


@contextlib.contextmanager
def progress(console: Console, unit: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that counts rows; off a terminal, no line for what one chunk does at once."""
    quiet = not console.is_terminal and total <= CHUNK
    bar = ProgressBar(console, total, 0, unit=unit, quiet=quiet)
    done = 0

    def advance(rows: int) -> None:
        nonlocal done
        done += rows
        bar.update(done, {})

    try:
        yield advance
    finally:
        bar.close()


def given_pairs(
    aligner: Aligner | FittedAligner, image: str | None, text: str | None
) -> Pairs | None:
    """Pairs of two paths of features that the aligner takes; None without any."""
    if image is None and text is None:
        return None
    if image is None or text is None:
        raise ValueError("--image, --text: give both, or neither for the run's own test pairs")
    pairs = features.pair(
        features.open_features(image, modality="image"),
        features.open_features(text, modality="text"),
    )
    check_width(aligner, "image", pairs.image)  # before rows are read
    check_width(aligner, "text", pairs.text)
    features.check_finite(pairs.image)
    features.check_finite(pairs.text)
    return pairs


def test_pairs(workdir: str) -> Pairs:
    """The test pairs of the run in a directory."""
    recorded = Path(workdir) / "config.json"
    if recorded.exists():
        config = read_json(recorded)
    elif (aligner := Path(workdir) / "aligner" / "aligner.json").exists():
        config = read_json(aligner).get("metadata", {}).get("config")
    else:
        config = None
    if config is None:
        raise ValueError(
            f"workdir: {workdir} does not say which data it was trained on; give --image and --text"
        )
    test = training.load_test_pairs(validate(config))
    if test is None:
        raise ValueError(
            f"workdir: the run in {workdir} has no test pairs; give --image and --text"
        )
    return test


def _describe_features(table: Table, path: str) -> None:
    for modality in ("image", "text"):
        try:
            opened = features.open_features(path, modality=modality)
        except ValueError:
            if modality == "text":
                raise
            continue
        break
    sample = opened.take(np.arange(min(len(opened), 10_000)))
    norms = np.linalg.norm(sample, axis=1)
    table.add_row("rows x dim", f"{len(opened):,} x {opened.dim:,} ({opened.dtype})")
    table.add_row("ids", "none" if opened.ids is None else f"{opened.ids[0]}, ...")
    table.add_row("row norms", f"{norms.min():.4g} .. {norms.max():.4g}, mean {norms.mean():.4g}")
    table.add_row("rows with NaN or Inf", f"{int((~np.isfinite(sample).all(1)).sum())}")
    table.add_row("rows of zeros", f"{int((norms == 0).sum())}")
    table.add_row("constant columns", f"{int((np.ptp(sample, axis=0) == 0).sum())}")
    if len(sample) < len(opened):
        table.caption = f"of the first {len(sample):,} rows"
    for name in ("encoder", "pooling", "normalized", "source", "licence"):
        value = getattr(opened.manifest, name, None)
        if value not in (None, ""):
            table.add_row(name, str(value))


def _describe_aligner(table: Table, path: Path) -> None:
    description = read_json(path / "aligner.json")
    metadata = description.pop("metadata", {}) or {}
    for name, value in description.items():
        table.add_row(name, json.dumps(value))
    for name, value in metadata.items():
        if name != "config":
            table.add_row(name, json.dumps(value))


def _describe_run(table: Table, path: Path) -> None:
    config = read_json(path / "config.json")
    if config.get("format") == HEADS:
        for name, value in config.items():
            table.add_row(name, json.dumps(value))
        return
    if not {"objective", "data", "steps"} <= config.keys():
        raise ValueError(
            f"{path}: config.json is of no run; give features, an aligner, a run or what "
            "`sotalign export` wrote"
        )
    if (aligner := config.get("aligner", "layers")) == "layers":
        start = f"{config['objective']} from a {config['model']['init']} start"
        table.add_row("objective", start)
    else:
        table.add_row("aligner", f"{aligner}, {json.dumps(config[aligner])}")
    table.add_row("data", f"{config['data']['name']}, {config['data']['n_pairs']} pairs")
    metrics = path / "metrics.jsonl"
    if metrics.exists() and (lines := metrics.read_text(encoding="utf-8").splitlines()):
        # A kill may have cut the last line off.
        whole = [line for line in lines[-2:] if line.endswith("}")]
        last = json.loads(whole[-1]) if whole else {"step": 0}
        table.add_row("step", f"{last['step']} of {config['steps']}")
        if "train/loss" in last:
            table.add_row("loss", f"{last['train/loss']:.6g}")
    if (path / "results.json").exists():
        results = read_json(path / "results.json")
        for name in ("val", "teacher_val", "test", "teacher_test"):
            if name in results:
                table.add_row(f"{name} mean_recall@10", f"{results[name]['mean_recall@10']:.4f}")
