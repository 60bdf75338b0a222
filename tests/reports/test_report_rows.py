"""What a person sees of features in files: thumbnails, captions, or row numbers alone."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from report_runs import Page, emoji_config, finish_anyhow, write_run

from sotalign_jax import features
from sotalign_jax.reports import write_report

N = 12


def picture(i, kind="PNG", mode="RGB", size=(300, 200)):
    file = io.BytesIO()
    Image.new(mode, size, (20 * i, 255 - 20 * i, 90, 255)[: len(mode)]).save(file, kind)
    return file.getvalue()


def config_of(root):
    """A configuration that trains on two stores and tests on two more."""
    paths = {
        f"data__files__{split}{side}": str(root / f"{split}{side}")
        for split in ("", "test_")
        for side in ("image", "text")
    }
    return emoji_config(data__name="files", data__n_pairs=8, teacher__dim=4, **paths)


def files_run(root, *, ids=True, captions=2):
    """A finished run on stores of N images with so many captions each."""
    rng = np.random.default_rng(0)
    for split in ("", "test_"):
        image = rng.normal(size=(N, 8)).astype(np.float32)
        text = np.repeat(image, captions, axis=0)[:, :6]
        text += 0.1 * rng.normal(size=text.shape).astype(np.float32)
        names = [f"{split or 'train_'}im/{i:03d}" for i in range(N)]
        owners = [name for name in names for _ in range(captions)]
        features.write_store(root / f"{split}image", image, ids=names if ids else None)
        features.write_store(root / f"{split}text", text, ids=owners if ids else None)
    path = write_run(root / "run", config_of(root), steps=0)
    finish_anyhow(path, 8, 6)
    return path


def illustrate(root):
    """A run whose images have pictures (but for two) and whose texts have captions."""
    path = files_run(root)
    folder = root / "test_image.thumbnails" / "test_im"
    folder.mkdir(parents=True)
    for i in range(N - 1):
        kind, mode = (("PNG", "RGBA"), ("JPEG", "RGB"), ("WEBP", "RGB"))[i % 3]
        content = b"<svg onload=alert(1)>" if i == 4 else picture(i, kind, mode)
        suffix = kind.lower() if kind != "JPEG" else "jpg"
        (folder / f"{i:03d}.{suffix}").write_bytes(content)
    lines = [json.dumps(f"<i>caption {k}</i> of {k // 2}") for k in range(2 * N)]
    (root / "test_text.captions.jsonl").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def illustrated(tmp_path_factory):
    path = illustrate(tmp_path_factory.mktemp("files"))
    return path, *write_report(path)


def test_pictures_are_small_and_part_of_the_page(illustrated):
    _, written, (problem,) = illustrated
    assert problem.startswith("thumbnail of test_im/004: not a readable picture")
    page = Page(written.read_text())
    assert "thumbnail of test_im/004: not a readable picture" in page.text
    images = page.all("img")
    seen = {one["alt"] for one in images}
    assert seen <= {f"test_im/{i:03d}" for i in range(N)} - {"test_im/004", f"test_im/{N - 1:03d}"}
    assert len(seen) >= 6
    for one in images:
        assert one["src"].startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
        assert (one["width"], one["height"]) == ("128", "85") and len(one["src"]) < 10_000
    assert "onload" not in written.read_text()


def test_captions_are_shown_and_escaped(illustrated):
    page = Page(illustrated[1].read_text())
    assert "<i>caption 3</i> of 1 test_im/001" in page.text and not page.all("i")


def test_without_either_rows_have_their_names(tmp_path):
    path = files_run(tmp_path, ids=False, captions=1)
    written, problems = write_report(path)
    page = Page(written.read_text())
    assert problems == [] and not page.all("img")
    assert "row 3" in page.text and "best-t2i" in {a.get("id") for _, a in page.tags}


def test_captions_that_do_not_fit_cost_the_captions_alone(tmp_path):
    path = files_run(tmp_path)
    (tmp_path / "test_text.captions.jsonl").write_text('"one"\n')
    written, (problem,) = write_report(path)
    assert "1 captions for 24 rows" in problem
    page = Page(written.read_text())
    assert "1 captions for 24 rows" in page.text and "test_im/003" in page.text


def test_stores_of_emoji_are_known_by_their_ids(tmp_path):
    for split, of in (("", "train"), ("test_", "test")):
        pairs = features.emoji_pairs(of)
        for side in ("image", "text"):
            some = getattr(pairs, side).select(np.arange(N))
            features.write_store(tmp_path / f"{split}{side}", some)
    path = write_run(tmp_path / "run", config_of(tmp_path), steps=0)
    finish_anyhow(path, 1280, 384)
    page = Page(write_report(path)[0].read_text())
    known = features.emoji_metadata()
    row = known["id"].tolist().index(str(features.emoji_pairs("test").image.ids[0]))
    assert str(known["character"][row]) in page.text and str(known["label"][row]) in page.text
