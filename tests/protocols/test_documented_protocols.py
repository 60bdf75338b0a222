"""docs/protocols.md says what the registry says, and its example runs."""

import re
from pathlib import Path

from sotalign_jax.captions import CAPTIONS
from sotalign_jax.protocols import PROTOCOLS

TEXT = (Path(__file__).parents[2] / "docs" / "protocols.md").read_text(encoding="utf-8")


def test_every_protocol_is_in_the_table_with_its_counts():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", TEXT, re.MULTILINE))
    for name, protocol in PROTOCOLS.items():
        assert rows[name].startswith(protocol.expected), name


def test_every_table_of_captions_is_named():
    stems = [re.sub(r"(coco_karpathy|flickr30k)_", "_", name) for name in CAPTIONS]
    assert all(f"`{name}`" in TEXT or f"`{CAPTION}`" in TEXT
               for name, CAPTION in zip(stems, CAPTIONS, strict=True))  # fmt: skip


def test_the_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(code, "docs/protocols.md", "exec"), {})
    recall, notes = capsys.readouterr().out.split(" ", 1)
    assert 0.1 < float(recall) <= 1 and notes.strip().startswith("[")
