"""What ``sotalign export`` and ``sotalign import-sail`` do, and their flag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console

from sotalign_jax import commands, features, interop, training
from sotalign_jax.config import default_config, flatten
from sotalign_jax.features import Pairs
from sotalign_jax.files import check_absent
from sotalign_jax.reports.tables import shorten_paths
from sotalign_jax.training.metrics import make_console
from sotalign_jax.training.workdir import NO_MATTER, read_json

__all__ = ["WORDS", "export_embeddings", "export_model", "import_sail"]

_FORMATS = ("torch", "clip-retrieval")
_FORMAT = flags.DEFINE_enum(
    "format", "torch", _FORMATS, "export: the aligner for PyTorch, or embeddings of pairs."
)


def _export(words: Sequence[str]) -> None:
    """The command by its flags."""
    if words:
        raise ValueError(f"{words[0]}: unexpected; write sotalign export --workdir=RUN --out=DIR")
    workdir, out = commands.needed("workdir"), commands.needed("out")
    image, text = flags.FLAGS.image, flags.FLAGS.text
    if _FORMAT.value == "clip-retrieval":
        export_embeddings(workdir, out, image, text)
    elif image is not None or text is not None:
        raise ValueError("--image, --text: they belong to --format=clip-retrieval")
    else:
        export_model(workdir, out)


def export_model(workdir: str, out: str, console: Console | None = None) -> Path:
    """Write the aligner of a run as a folder that PyTorch reads, with a card."""
    console = console or make_console()
    check_absent(out)
    aligner = commands.load_aligner(workdir)
    document = read_json(commands.aligner_path(workdir) / "aligner.json")
    document["metadata"] = metadata = _without_places(document.get("metadata") or {})
    recorded = Path(workdir) / "results.json"
    card = interop.model_card(
        document,
        read_json(recorded) if recorded.exists() else _fitted_scores(metadata),
        name=Path(out).name,
        changed=_changed(metadata.get("config") or {}),
    )
    about = {name: metadata[name] for name in ("data", "features", "step") if name in metadata}
    written = interop.export_heads(aligner, out, card=card, metadata=about)
    said = f"heads of {aligner.image_dim} and {aligner.text_dim} to {aligner.dim} columns: {out}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    return written


def export_embeddings(
    workdir: str,
    out: str,
    image: str | None = None,
    text: str | None = None,
    console: Console | None = None,
) -> int:
    """Embed pairs, the run's own test pairs by default, in clip-retrieval's layout."""
    console = console or make_console()
    check_absent(out)
    aligner = commands.load_aligner(workdir)
    pairs = commands.given_pairs(aligner, image, text) or commands.test_pairs(workdir)
    captions = _captions(text, pairs)

    def rows(side: str, table: features.FeatureTable) -> Iterator[np.ndarray]:
        return training.embed_chunks(aligner, side, table, progress=advance)

    owners = pairs.image.select(pairs.text_to_image)
    ids = np.arange(len(pairs.image)).astype(str) if pairs.image.ids is None else pairs.image.ids
    with commands.progress(console, "rows", 2 * len(pairs)) as advance:
        shards = interop.write_clip_retrieval(
            out,
            rows("image", owners),
            rows("text", pairs.text),
            ids=ids[pairs.text_to_image].tolist(),
            captions=captions,
        )
    said = f"{len(pairs):,} pairs, {aligner.dim} columns, {shards} shards: {out}"
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    return shards


def _import_sail(words: Sequence[str]) -> None:
    """The command by its flags."""
    if len(words) != 1:
        raise ValueError(f"import-sail: give one checkpoint, got {len(words)}")
    import_sail(words[0], commands.needed("out"))


def import_sail(path: str, out: str, console: Console | None = None) -> Path:
    """Read heads that SAIL's code saved, and save them as an aligner."""
    console = console or make_console()
    check_absent(out)
    aligner = interop.read_sail_heads(path)
    aligner.save(out, metadata={"imported": f"SAIL heads, {Path(path).name}"})
    said = (
        f"{aligner.layer.kind} heads of {aligner.image_dim} and {aligner.text_dim} to "
        f"{aligner.dim} columns: {out}"
    )
    console.print(said, highlight=False, markup=False, soft_wrap=True)
    return Path(out)


def _captions(text: str | None, pairs: Pairs) -> list[str] | None:
    """Of all texts, where they are kept beside their features."""
    if text is None:
        return None
    found = features.read_captions(text, pairs.text, range(len(pairs.text)))
    return [found[row] for row in range(len(pairs.text))] if found else None


def _fitted_scores(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `fit-teacher` found of a teacher, in the form of a run's results."""
    return {name: metadata[name] for name in ("val", "test") if name in metadata} or None


def _changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are not as by default."""
    known = flatten(default_config())
    changed = {}
    for name, value in flatten(config).items():  # pyright: ignore[reportArgumentType]
        default = known.get(name)
        default = list(default) if isinstance(default, tuple) else default
        if not name.startswith(NO_MATTER) and value != default:
            changed[name] = _last_part(value)
    return changed


def _without_places(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Without the directories of this machine: what is exported is passed on."""
    found = dict(metadata)
    if isinstance(found.get("data"), str):
        found["data"] = shorten_paths(found["data"])
    if features_of := found.get("features"):
        found["features"] = {
            side: {name: _last_part(value) for name, value in values.items()}
            for side, values in features_of.items()
        }
    return found


def _last_part(value: Any) -> Any:
    """Of absolute paths the last part alone."""
    if isinstance(value, list | tuple):
        return [_last_part(one) for one in value]
    absolute = isinstance(value, str) and Path(value).is_absolute()
    return Path(value).name if absolute else value


# By the command's name, for `main`.
WORDS = {"export": _export, "import-sail": _import_sail}
