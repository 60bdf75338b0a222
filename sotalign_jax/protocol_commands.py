"""What ``sotalign evaluate --protocol`` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sotalign_jax import commands, features, protocols
from sotalign_jax.files import check_absent
from sotalign_jax.protocols import Protocol
from sotalign_jax.training.metrics import make_console
from sotalign_jax.training.workdir import write_json

__all__ = ["run_protocol"]

# More metrics than that stand below one another.
_COLUMNS = 7


def run_protocol(
    workdir: str,
    name: str,
    image: str | None,
    text: str | None,
    out: str | None = None,
    labels: str | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score an aligner by a protocol, print it beside published figures, write it as JSON."""
    console = console or make_console()
    protocol = protocols.find(name)
    if image is None or text is None:
        raise ValueError(
            f"--image, --text: protocol {name} needs both: {protocol.expected} ({protocol.split})"
        )
    classifies = isinstance(protocol, protocols.ClassificationProtocol)
    if labels is not None and not classifies:
        raise ValueError(f"--labels: protocol {name} is no classification and has none")
    if out is not None:
        check_absent(out, what="file")
    options = {"labels": protocols.read_labels(labels)} if labels is not None else {}
    aligner = commands.load_aligner(workdir)
    tables = [
        features.open_features(path, modality=side)
        for side, path in (("image", image), ("text", text))
    ]
    with commands.progress(console, "rows", sum(map(len, tables))) as advance:
        result = protocol.run(aligner, *tables, progress=advance, **options)
    result |= {"workdir": workdir, "image": image, "text": text}
    console.print(_table(protocol, result["metrics"]))
    for note in result["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(out), result)
    return result


def _table(protocol: Protocol, metrics: dict[str, float]) -> Table:
    """Our figures in percent above those of others; metrics stand in rows where they are many."""
    ours = {name: f"{100 * metrics[name]:.1f}" for name in protocol.shown if name in metrics}
    rows = [("this aligner", ours, "")]
    for one in protocol.published:  # to as many digits as were published
        rows.append((one.label, {name: str(v) for name, v in one.percent.items()}, one.source))
    table = Table(title=escape(f"{protocol.title}: {protocol.split}"), title_justify="left")
    sources = list(dict.fromkeys(source for *_, source in rows if source))
    numbered = [
        f"{label} \\[{sources.index(source) + 1}]" if source else label for label, _, source in rows
    ]
    if len(protocol.shown) > _COLUMNS:
        table.add_column("")
        for label in numbered:
            table.add_column(label, justify="right")
        for metric, head in protocol.shown.items():
            table.add_row(head, *(cells.get(metric, "") for _, cells, _ in rows))
    else:
        table.add_column("", no_wrap=True)
        for head in protocol.shown.values():
            table.add_column(head.replace(" R@", "\nR@"), justify="right")
        for label, (_, cells, _) in zip(numbered, rows, strict=True):
            table.add_row(label, *(cells.get(metric, "") for metric in protocol.shown))
    notes = [f"[{number}] {source}" for number, source in enumerate(sources, 1)]
    table.caption = escape("\n".join(["in percent; " + protocol.rule, *notes]))
    table.caption_justify = "left"
    return table
