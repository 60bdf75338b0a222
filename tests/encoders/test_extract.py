"""Encoding into a store: what is written, what is left out, and the same after any interruption."""

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_encoder
from PIL import Image
from tiny_encoder import encoder, png

import sotalign_jax
from sotalign_jax.encoders import assemble, callables, extract, parts, workers
from sotalign_jax.encoders.parts import WorkingDirectory
from sotalign_jax.encoders.sources import open_source
from sotalign_jax.features import open_store, pair, read_captions
from sotalign_jax.files import lock

TESTS = Path(__file__).parent
extract_to = extract.extract


def image_folder(root, count):
    (root / "images").mkdir()
    for n in range(count):
        (root / f"images/{n:03d}.png").write_bytes(png(n))
    return root / "images"


def caption_table(root, count):
    lines = [f'{{"id": "{n:03d}", "caption": ["first {n}", "second {n}"]}}\n' for n in range(count)]
    (root / "captions.jsonl").write_text("".join(lines))
    return root / "captions.jsonl"


def run(path, modality, out, *, rows_per_shard=7, function=None, workers=0, **options):
    source = open_source(path, modality, rows_per_shard=rows_per_shard)
    made = encoder(modality, function)
    return extract_to(source, made, out, batch_size=3, workers=workers, **options)


def skipped(out):
    lines = Path(f"{out}.skipped.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).values()) for line in lines]


def everything(out):
    """All files of an encoding, by name; of the report what tells of the data."""
    report = json.loads(Path(f"{out}.encode.json").read_text())
    del report["seconds"], report["versions"]
    found = {"report": report} | {file.name: file.read_bytes() for file in out.iterdir()}
    for name in ("captions.jsonl", "skipped.jsonl"):
        if (file := Path(f"{out}.{name}")).exists():
            found["beside " + name] = file.read_bytes()
    return found


def test_images_and_their_captions_can_be_paired(tmp_path):
    folder, table = image_folder(tmp_path, 20), caption_table(tmp_path, 20)
    summary = run(folder, "image", tmp_path / "i", dtype="float32", licence="CC0")
    assert summary.complete and (summary.rows, summary.dim, summary.skipped) == (20, 48, {})
    run(table, "text", tmp_path / "t", dtype="float32")
    image, text = open_store(tmp_path / "i"), open_store(tmp_path / "t")

    expected = tiny_encoder.image([tiny_encoder.colours(n) for n in range(20)])
    np.testing.assert_array_equal(image.array(), expected)
    captions = [f"{which} {n}" for n in range(20) for which in ("first", "second")]
    np.testing.assert_array_equal(text.array(), tiny_encoder.text(captions))
    found = read_captions(tmp_path / "t", text, range(40))
    assert list(found.values()) == captions
    pairs = pair(image, text)
    np.testing.assert_array_equal(pairs.text_to_image, np.arange(40) // 2)

    manifest = image.manifest
    assert manifest.shards == tuple((f"features-{k:05d}.npy", n) for k, n in enumerate((7, 7, 6)))
    assert (manifest.encoder, manifest.licence, manifest.source) == ("tiny", "CC0", str(folder))
    assert not list(tmp_path.glob(".*"))
    assert {path.name for path in tmp_path.iterdir()} == {
        *("images", "captions.jsonl", "i", "i.skipped.jsonl", "i.encode.json"),
        *("t", "t.captions.jsonl", "t.skipped.jsonl", "t.encode.json"),
    }
    report = json.loads((tmp_path / "t.encode.json").read_text())
    assert report["rows"] == 40 and report["settings"]["batch_size"] == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_number_formats(tmp_path, dtype):
    run(image_folder(tmp_path, 4), "image", tmp_path / "o", dtype=dtype)
    expected = tiny_encoder.image([tiny_encoder.colours(n) for n in range(4)])
    stored = expected.astype(getattr(ml_dtypes, dtype, None) or dtype).astype(np.float32)
    np.testing.assert_array_equal(open_store(tmp_path / "o").array(), stored)


def test_what_cannot_be_encoded_is_left_out_and_listed(tmp_path):
    folder = image_folder(tmp_path, 9)
    (folder / "001.png").write_bytes(b"")
    (folder / "003.png").write_bytes(png(3)[:-40])
    (folder / "004.png").unlink()
    (folder / "004.png").symlink_to(tmp_path / "nothing")
    (folder / "005.jpg").write_bytes(png(50))  # the id of 005.png, and first in order

    def with_holes(items):
        rows = tiny_encoder.image(items)
        rows[np.abs(rows - tiny_encoder.image([tiny_encoder.colours(7)])).max(axis=1) == 0, 3] = (
            np.nan
        )
        return rows

    summary = run(folder, "image", tmp_path / "o", function=with_holes, rows_per_shard=5)
    part = ["rows 0 to 4", "rows 5 to 9"]
    assert skipped(tmp_path / "o") == [
        ("001", part[0], "not an image: 0 bytes"),
        ("003", part[0], skipped(tmp_path / "o")[1][2]),
        ("004", part[0], "not readable: No such file or directory"),
        ("007", part[1], "not finite: the encoder gave NaN or Inf"),
        ("005", part[1], "duplicate id"),
    ]
    assert summary.skipped == {
        "not an image": 1,
        "broken image": 1,
        "not readable": 1,
        "not finite": 1,
        "duplicate id": 1,
    }
    store = open_store(tmp_path / "o")
    assert store.ids is not None and store.ids.tolist() == ["000", "002", "005", "006", "008"]
    seeds = (0, 2, 50, 6, 8)
    expected = tiny_encoder.image([tiny_encoder.colours(n) for n in seeds])
    np.testing.assert_array_equal(store.array(), expected.astype(np.float16).astype(np.float32))


def test_duplicates_are_found_across_parts(tmp_path):
    archives = [(0, 1, 2), (1, 2), (3, 1)]
    for part, seeds in enumerate(archives):
        with tarfile.open(tmp_path / f"{part}.tar", "w") as archive:
            for seed in seeds:
                for suffix, data in (("png", png(seed + 10 * part)), ("txt", b"caption")):
                    info = tarfile.TarInfo(f"{seed}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    run(f"{tmp_path}/*.tar", "image", tmp_path / "o", dtype="float32")
    store = open_store(tmp_path / "o")
    assert store.ids is not None and store.ids.tolist() == ["0", "1", "2", "3"]
    assert store.manifest.shards == (("features-00000.npy", 3), ("features-00002.npy", 1))
    expected = tiny_encoder.image([tiny_encoder.colours(seed) for seed in (0, 1, 2, 23)])
    np.testing.assert_array_equal(store.array(), expected)
    reason = "duplicate id"
    assert skipped(tmp_path / "o") == [
        *(("1", "1.tar", reason), ("2", "1.tar", reason), ("1", "2.tar", reason))
    ]
    # Several captions of an image are no duplicates.
    assert run(f"{tmp_path}/*.tar", "text", tmp_path / "t").rows == 7


def test_captions_stay_beside_their_rows(tmp_path):
    (tmp_path / "t.txt").write_text("".join(f"caption {n}\n\n" for n in range(10)))

    calls = []

    def with_holes(items):
        calls.append(len(items))
        return np.array([[float(item[-1]), np.inf if item[-1] == "4" else 0] for item in items])

    run(tmp_path / "t.txt", "text", tmp_path / "o", function=with_holes)
    assert calls == [3, 1, 3, 3]  # full ones, whatever is left out
    store = open_store(tmp_path / "o")
    rows = store.array()[:, 0].astype(int).tolist()
    assert rows == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    found = read_captions(tmp_path / "o", store, range(9))
    assert found == {row: f"caption {n}" for row, n in enumerate(rows)}
    assert store.ids is not None and store.ids.tolist() == [str(2 * n) for n in rows]


def test_parts_of_which_nothing_is_left(tmp_path):
    lines = [*["x"] * 3, *["", " ", "\t\n"] * 2, *["y"] * 3, '"\ud83d"']
    rows = [{"id": "0", "caption": text} for text in lines]
    rows[-1]["caption"] = "\ud83d"
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run(tmp_path / "t.jsonl", "text", tmp_path / "o", rows_per_shard=3)
    assert summary.skipped == {"empty caption": 6, "not Unicode": 1}
    store = open_store(tmp_path / "o")
    assert store.manifest.shards == (("features-00000.npy", 3), ("features-00003.npy", 3))
    assert (tmp_path / "o.captions.jsonl").read_text().split() == ['"x"'] * 3 + ['"y"'] * 3

    (tmp_path / "none.txt").write_text("\n\n")
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"none of 2 items could be encoded \(2 empty caption\)"
        ):
            run(tmp_path / "none.txt", "text", tmp_path / "n")
    assert len(skipped(tmp_path / "n")) == 2 and not (tmp_path / "n").exists()


def test_a_value_too_large_says_which_and_what_would_do(tmp_path):
    (tmp_path / "t.txt").write_text("a\nb\n")
    huge = lambda items: [[1e5 if item == "b" else 0.0] for item in items]  # noqa: E731
    message = r"the features of '1' \(rows 0 to 1\) holds .* 100000, .*store as bfloat16 or float32"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "t.txt", "text", tmp_path / "o", function=huge)
    run(tmp_path / "t.txt", "text", tmp_path / "p", function=huge, dtype="bfloat16")


def test_workers_change_nothing(tmp_path):
    folder = image_folder(tmp_path, 20)
    (folder / "003.png").write_bytes(b"\x89PNG no")
    run(folder, "image", tmp_path / "a")
    run(folder, "image", tmp_path / "b", workers=2)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


@pytest.mark.parametrize("count", [0, 1])
def test_transparent_images_are_laid_over_a_background(tmp_path, count):
    (tmp_path / "images").mkdir()
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    (tmp_path / "images/0.png").write_bytes(tiny_encoder.file_of(clear))
    out, options = tmp_path / "o", {"dtype": "float32", "workers": count}
    run(tmp_path / "images", "image", out, background=(0, 255, 51), **options)
    rows = open_store(out).array()
    np.testing.assert_array_equal(rows, np.tile([[0, 1, 0.2]], (1, 16)).astype(np.float32))
    with pytest.raises(ValueError, match=r"background is .* there and None now"):
        run(tmp_path / "images", "image", out, **options)
    with pytest.raises(ValueError, match=r"background must be three numbers of 0 to 255, got \(0,"):
        run(tmp_path / "images", "image", out, background=(0, 0, 256), **options)


class Dies:
    def __call__(self, item):
        os.kill(os.getpid(), signal.SIGKILL)


class OnlyHere:
    def __call__(self, item):
        return {}

    def __setstate__(self, state):
        raise ImportError("no module of that name")

    def __getstate__(self):
        return {"some": "state"}


class Fails:
    def __call__(self, item):
        raise KeyError("pixel_values")


class Refuses:
    def __call__(self, item):
        raise ValueError("longer than wide")


@pytest.mark.parametrize("count", [0, 1])
def test_preprocessors_that_fail(tmp_path, count):
    folder, made = image_folder(tmp_path, 4), encoder("image")
    source = open_source(folder, "image")
    made.preprocess = Fails()
    with pytest.raises(
        ValueError, match=r"'000': the preprocessor fails \(KeyError: 'pixel_values'\)"
    ):
        extract_to(source, made, tmp_path / "o", workers=count)
    made.preprocess = Refuses()
    with pytest.raises(ValueError, match=r"none of 4 items .*\(4 cannot be encoded"):
        extract_to(source, made, tmp_path / "o", workers=count)
    made.preprocess = lambda item: {}
    if count:
        with pytest.raises(ValueError, match="workers: the encoder's preprocessor cannot be sent"):
            extract_to(source, made, tmp_path / "p", workers=count)
        made.preprocess = OnlyHere()
        with pytest.raises(
            ValueError, match="cannot be loaded in a worker, ImportError: no module"
        ):
            extract_to(source, made, tmp_path / "p", workers=count)
        made.preprocess = Dies()
        with pytest.raises(ChildProcessError, match="workers: one died"):
            extract_to(source, made, tmp_path / "q", workers=count)


def test_a_failure_leaves_the_parts_that_are_whole(tmp_path):
    folder = image_folder(tmp_path, 20)
    through, cut = tmp_path / "through", tmp_path / "cut"
    run(folder, "image", through)
    calls = []

    def fails_later(items):
        calls.append(len(items))
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return tiny_encoder.image(items)

    with pytest.raises(RuntimeError, match="out of memory"):
        run(folder, "image", cut, function=fails_later)
    assert calls == [3, 3, 1, 3, 3]  # no batch reaches over the end of a part
    home = WorkingDirectory(cut)
    assert [home.done(part) for part in range(3)] == [True, False, False]
    assert not list(home.path.glob(".part*")) and not cut.exists()
    calls.clear()
    seen = []
    run(folder, "image", cut, function=fails_later_never(calls), progress=seen.append)
    assert calls == [3, 3, 1, 3, 3]
    assert seen[0] == (1, 7) and seen[-1] == (3, 20)
    assert everything(cut) == everything(through)


def fails_later_never(calls):
    def function(items):
        calls.append(len(items))
        return tiny_encoder.image(items)

    return function


class Device:
    """An encoder that begins a batch when it is given and ends it when it is asked for its rows."""

    def __init__(self, modality, fails=None):
        self._encoder, self.events, self._fails = encoder(modality), [], fails
        self.preprocess, self.description = self._encoder.preprocess, self._encoder.description

    def encode(self, batch):
        raise AssertionError("begun and waited for at once")

    def submit(self, batch):
        number = sum(event > 0 for event in self.events) + 1
        if number == self._fails:
            raise ValueError("out of memory")
        self.events.append(number)

        def rows():
            self.events.append(-number)
            return self._encoder.encode(batch)

        return rows


def test_a_device_begins_a_batch_before_the_last_one_is_waited_for(tmp_path):
    folder = image_folder(tmp_path, 14)
    (folder / "005.png").write_bytes(b"")
    run(folder, "image", tmp_path / "a" / "o")
    source = open_source(folder, "image", rows_per_shard=7)
    device = Device("image")
    extract_to(source, device, tmp_path / "b" / "o", batch_size=3, workers=0)
    # Two batches of the first part, three of the second: never more than two begun.
    assert device.events == [1, 2, -1, 3, -2, 4, -3, 5, -4, -5]
    assert everything(tmp_path / "a" / "o") == everything(tmp_path / "b" / "o")


def test_what_was_begun_before_a_failure_is_kept(tmp_path):
    folder = image_folder(tmp_path, 14)
    source = open_source(folder, "image", rows_per_shard=7)
    device = Device("image", fails=4)  # the first batch of the second part
    with pytest.raises(ValueError, match="out of memory"):
        extract_to(source, device, tmp_path / "o", batch_size=3, workers=0)
    assert device.events == [1, 2, -1, 3, -2, -3]
    home = WorkingDirectory(tmp_path / "o")
    assert home.done(0) and not home.done(1)


def test_ranges_of_parts_by_several_calls(tmp_path):
    table = caption_table(tmp_path, 20)
    run(table, "text", tmp_path / "a")
    for shards, left in (((2, 3), 2), ((0, 1), 1)):
        summary = run(table, "text", tmp_path / "b", shards=shards)
        assert not summary.complete and summary.parts_left == left
        assert not (tmp_path / "b").exists()
    assert run(table, "text", tmp_path / "b", shards=(1, 3)).complete
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_a_part_that_another_process_has_is_left_to_it(tmp_path):
    folder, home = image_folder(tmp_path, 20), WorkingDirectory(tmp_path / "b")
    run(folder, "image", tmp_path / "b", shards=(0, 1))
    with lock(home.lock(2)) as held:
        assert held
        summary = run(folder, "image", tmp_path / "b")
        assert not summary.complete and summary.parts_left == 1
    with lock(home.path / "assemble.lock"):
        summary = run(folder, "image", tmp_path / "b")
        assert not summary.complete and summary.parts_left == 0
    run(folder, "image", tmp_path / "a")
    assert run(folder, "image", tmp_path / "b").complete
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_a_part_whose_process_died_meanwhile_is_done_too(tmp_path):
    folder, home = image_folder(tmp_path, 20), WorkingDirectory(tmp_path / "b")
    run(folder, "image", tmp_path / "b", shards=(2, 3))
    with contextlib.ExitStack() as other:
        assert other.enter_context(lock(home.lock(0)))

        def dies(items):
            other.close()
            return tiny_encoder.image(items)

        assert run(folder, "image", tmp_path / "b", function=dies).complete
    run(folder, "image", tmp_path / "a")
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_a_part_that_another_process_has_just_finished_is_left_as_it_is(tmp_path, monkeypatch):
    folder, calls = image_folder(tmp_path, 20), []
    run(folder, "image", tmp_path / "b", shards=(2, 3))

    @contextlib.contextmanager
    def late(path):
        if path.name == "part-00000.lock" and not calls:
            calls.append("another")
            run(folder, "image", tmp_path / "b", shards=(0, 1))
        with lock(path) as free:
            yield free

    monkeypatch.setattr(extract, "lock", late)
    assert run(folder, "image", tmp_path / "b", function=fails_later_never(calls)).complete
    assert calls == ["another", 3, 3, 1]  # of part 1 alone


def test_a_part_that_another_host_has_finished_unseen(tmp_path, monkeypatch):
    """As over NFS, where a directory is believed to be as it was."""
    folder, home = image_folder(tmp_path, 20), WorkingDirectory(tmp_path / "b")
    run(folder, "image", tmp_path / "a")
    run(folder, "image", tmp_path / "b", shards=(0, 1))
    done, calls = WorkingDirectory.done, []
    hidden = {0}

    def stale(self, number):
        return number not in hidden and done(self, number)

    def hides(items):
        calls.append(len(items))
        hidden.add(0)
        return tiny_encoder.image(items)

    monkeypatch.setattr(WorkingDirectory, "done", stale)
    with monkeypatch.context() as patch:
        patch.setattr(WorkingDirectory, "look_again", lambda self: hidden.clear())
        assert run(folder, "image", tmp_path / "b", shards=(0, 2), function=hides).parts_left == 1
        assert calls == [3, 3, 1]  # of part 1 alone
        hidden.add(0)
        patch.setattr(WorkingDirectory, "look_again", lambda self: None)  # and if that is no help
        run(folder, "image", tmp_path / "b", shards=(0, 1), function=hides)
        assert calls == [3, 3, 1] * 2 and not list(home.path.glob(".*"))
        hidden.clear()
        patch.setattr(WorkingDirectory, "look_again", lambda self: hidden.clear())
        assert run(folder, "image", tmp_path / "b", shards=(2, 3), function=hides).complete
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_looking_again_changes_the_directory_for_a_moment(tmp_path):
    home = WorkingDirectory(tmp_path / "o")
    home.look_again()  # none there: nothing
    home.open({})
    os.utime(home.path, (0, 0))
    home.look_again()
    assert home.path.stat().st_mtime > 0
    assert [path.name for path in home.path.iterdir()] == ["settings.json"]


def test_a_store_that_is_put_together_while_another_process_begins(tmp_path, monkeypatch):
    folder, calls = image_folder(tmp_path, 10), []
    run(folder, "image", tmp_path / "b", shards=(0, 1))
    read_json = parts.read_json

    def late(path):
        if path.name == "settings.json" and not calls:
            calls.append("another")
            run(folder, "image", tmp_path / "b")
        return read_json(path)

    monkeypatch.setattr(parts, "read_json", late)
    summary = run(folder, "image", tmp_path / "b", function=fails_later_never(calls))
    assert summary.complete and calls == ["another"]


def test_a_store_that_another_process_puts_together_just_before(tmp_path, monkeypatch):
    folder, calls = image_folder(tmp_path, 10), []

    @contextlib.contextmanager
    def late(path):
        if path.name == "assemble.lock" and not calls:
            calls.append("another")
            assert run(folder, "image", tmp_path / "b").complete
            yield True  # of the file as it was opened before
            return
        with lock(path) as free:
            yield free

    monkeypatch.setattr(extract, "lock", late)
    assert run(folder, "image", tmp_path / "b").complete
    assert calls == ["another"] and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("at", ["features.npy", "ids.jsonl", "assembling"])
def test_a_full_disk_is_said_and_the_same_call_goes_on(tmp_path, monkeypatch, at):
    folder = image_folder(tmp_path, 20)
    run(folder, "image", tmp_path / "a")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = {
        "features.npy": (parts.ShardWriter, "write"),
        "ids.jsonl": (parts, "flush_files"),
        "assembling": (assemble.shutil, "rmtree"),
    }[at]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left") as caught:
        patch.setattr(*place, full)
        run(folder, "image", tmp_path / "b")
    assert str(caught.value) == (
        "[Errno 28] No space left on device; once there is room for it, the same command goes on: "
        f"'{tmp_path / 'b'}'"
    )
    assert run(folder, "image", tmp_path / "b").complete
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_a_directory_that_is_read_only(tmp_path, monkeypatch):
    folder = image_folder(tmp_path, 10)
    run(folder, "image", tmp_path / "done")
    run(folder, "image", tmp_path / "begun", shards=(0, 1))
    monkeypatch.setattr(os, "access", lambda *_: False)

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for change in ("rename", "mkdir", "link"):
        monkeypatch.setattr(os, change, refuse)
    assert run(folder, "image", tmp_path / "done").complete
    for out in (tmp_path / "begun", tmp_path / "new/one"):
        with pytest.raises(ValueError, match=r"out: .* cannot be made, nothing can be written in"):
            run(folder, "image", out)


def test_a_disk_without_links(tmp_path, monkeypatch):
    folder = image_folder(tmp_path, 20)
    run(folder, "image", tmp_path / "a")

    def refuse(*_):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", refuse)
    run(folder, "image", tmp_path / "b")
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


@pytest.mark.parametrize(
    "after,message",
    [(3, "encoder: gives 3 columns, and 2 before"), (7, r"gave parts of different dim, \[2, 3\]")],
)
def test_rows_of_different_length_are_refused(tmp_path, after, message):
    given = []

    def grows(items):
        rows = np.zeros((len(items), 2 + (len(given) >= after)))
        given.extend(items)
        return rows

    folder = image_folder(tmp_path, 14)
    with pytest.raises(ValueError, match=message):
        run(folder, "image", tmp_path / "o", function=grows)
    assert not (tmp_path / "o").exists()


def test_settings_that_cannot_be_read(tmp_path):
    folder = image_folder(tmp_path, 10)
    run(folder, "image", tmp_path / "o", shards=(0, 1))
    (WorkingDirectory(tmp_path / "o").path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"settings\.json: not JSON"):
        run(folder, "image", tmp_path / "o")


def test_what_is_done_is_not_done_again(tmp_path):
    folder, calls = image_folder(tmp_path, 4), []
    first = run(folder, "image", tmp_path / "o")
    before = everything(tmp_path / "o")
    again = run(folder, "image", tmp_path / "o", function=fails_later_never(calls))
    assert not calls and again.complete and (again.rows, again.dim) == (first.rows, first.dim)
    # Killed between the store's new name and the end of the working directory.
    WorkingDirectory(tmp_path / "o").path.mkdir()
    run(folder, "image", tmp_path / "o", function=fails_later_never(calls))
    assert not calls and everything(tmp_path / "o") == before
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("done", [False, True])
def test_other_settings_are_refused_by_name(tmp_path, done):
    folder = image_folder(tmp_path, 10)
    run(folder, "image", tmp_path / "o", shards=None if done else (0, 1))
    for options, message in (
        ({"dtype": "float32"}, "dtype is 'float16' there and 'float32' now"),
        ({"rows_per_shard": 6}, "source.rows_per_shard is 7 there and 6 now"),
    ):
        with pytest.raises(ValueError, match=f"out: .* holds another encoding .*{message}"):
            run(folder, "image", tmp_path / "o", **options)
    made = callables.CallableEncoder(tiny_encoder.image, "image", "other")
    source = open_source(folder, "image", rows_per_shard=7)
    with pytest.raises(ValueError, match=r"encoder\.name is 'tiny' there and 'other' now"):
        extract_to(source, made, tmp_path / "o", batch_size=3, workers=0)
    (folder / "new.png").write_bytes(png(0))
    with pytest.raises(ValueError, match=r"source\.contents is .* there"):
        run(folder, "image", tmp_path / "o")


def with_files(digest):
    """An encoder whose model lies in a directory."""
    settings = {} if digest is None else {"files": digest}
    return callables.CallableEncoder(tiny_encoder.image, "image", "tiny", settings)


@pytest.mark.parametrize("done", [False, True])
def test_a_model_whose_files_changed_is_refused(tmp_path, done):
    source = open_source(image_folder(tmp_path, 10), "image", rows_per_shard=7)

    def encode(out, digest, **options):
        return extract_to(source, with_files(digest), tmp_path / out, workers=0, **options)

    begin = {} if done else {"shards": (0, 1)}
    encode("o", "old", **begin)
    with pytest.raises(ValueError, match=r"encoder\.settings\.files is 'old' there and 'new' now"):
        encode("o", "new")
    assert encode("o", "old").complete
    # Begun before there were digests: it goes on, and says nothing that it does not know.
    encode("p", None, **begin)
    assert encode("p", "new").complete
    settings = json.loads((tmp_path / "p.encode.json").read_text())["settings"]
    assert settings["encoder"]["settings"] == {}


def test_settings_that_only_one_side_has_differ():
    parts.compare_settings({"a": {"b": 1}}, {"a": {"b": 1}}, "there")
    for recorded, now, message in (
        ({"a": {"b": 1}}, {"a": {}}, r"there holds another encoding \(a\.b is 1 there and absent"),
        ({"a": 1}, {"a": 1, "b": 2}, "b is absent there and 2 now"),
    ):
        with pytest.raises(ValueError, match=message):
            parts.compare_settings(recorded, now, "there")


def test_arguments_that_are_refused(tmp_path):
    folder = image_folder(tmp_path, 3)
    source, made = open_source(folder, "image"), encoder("image")
    out = tmp_path / "o"
    for options, message in (
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"workers": -1}, "workers must not be negative"),
        ({"shards": (1, 2)}, "shards: 1:2 is no range of the 1 parts"),
        ({"shards": (0, 0)}, "shards: 0:0 is no range"),
    ):
        with pytest.raises(ValueError, match=message):
            extract_to(source, made, out, **options)
    with pytest.raises(ValueError, match=r"encoder: is for texts, .* is read as images"):
        extract_to(source, encoder("text"), out)
    (tmp_path / "o.skipped.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"o\.skipped\.jsonl exists and would be replaced"):
        extract_to(open_source(folder, "image"), made, tmp_path / "o", workers=0, dtype="float32")
    for name in ("gs://bucket/o", "", ".."):
        with pytest.raises(ValueError, match="is not a name for a new directory"):
            extract_to(source, made, name)
    out = tmp_path / "p"
    out.mkdir()
    with pytest.raises(ValueError, match="p exists; give another out"):
        extract_to(source, made, out, workers=0)
    for wrong in (tiny_encoder.broken, lambda items: np.zeros((len(items), 0))):
        with pytest.raises(ValueError, match=r"must give 3 rows|array of shape \(3, 0\)"):
            run(folder, "image", tmp_path / "q", function=wrong)


# Interruptions


@pytest.fixture
def start():
    """Starts an encoding in a process of its own; at the end none is left."""
    begun = []

    def launch(path, modality, out, count=0, shards=(0, 3)):
        root, numbers = Path(sotalign_jax.__file__).parents[1], map(str, (count, *shards))
        process = subprocess.Popen(
            [sys.executable, TESTS / "tiny_encode.py", modality, path, out, *numbers],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{TESTS}"},
        )
        begun.append(process)
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
        return process

    yield launch
    for process in begun:
        process.kill()
        process.communicate()


def finish(process, status=0):
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    return errors


def archives(root, count):
    (root / "archives").mkdir()
    for part in range(3):
        with tarfile.open(root / f"archives/{part}.tar", "w") as archive:
            for n in range(7 * part, min(7 * part + 7, count)):
                for suffix, data in (("png", png(n)[: 40 if n == 9 else None]), ("txt", b"")):
                    info = tarfile.TarInfo(f"{n % 15:03d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    broken = root / "archives/2.tar"
    broken.write_bytes(broken.read_bytes()[:5000])
    return root / "archives"


def csv_table(root, count):
    rows = "".join(f'{n},"caption ""{n}"",\nnext"\n' for n in range(count))
    (root / "captions.csv").write_text(f"id,caption\n{rows}20,a,b\n")
    return root / "captions.csv"


@pytest.mark.parametrize(
    ("modality", "make"),
    [
        ("image", image_folder),
        pytest.param("text", caption_table, marks=pytest.mark.slow),
        pytest.param("text", csv_table, marks=pytest.mark.slow),
        pytest.param("image", archives, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(tmp_path, start, modality, make):
    path, through, cut = make(tmp_path, 20), tmp_path / "through", tmp_path / "cut"
    run(path, modality, through)
    home, killed = WorkingDirectory(cut), []
    moments = ("", ".part-00000.*", "part-00000", ".part-00001.*", "part-00001", "store")
    for moment, delay in zip(moments, np.random.default_rng(0).uniform(0, 0.03, 6), strict=True):
        process = start(path, modality, cut)
        wait_for(lambda: process.poll() is not None or any(home.path.glob(moment or "*")))  # noqa: B023
        time.sleep(delay)
        process.kill()
        killed.append(finish_anyhow(process) == -signal.SIGKILL)
    assert all(killed[:-1])  # the last part of the work may be too quick
    finish(start(path, modality, cut))
    assert everything(cut) == everything(through)
    assert not list(tmp_path.glob(".*"))


def finish_anyhow(process):
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(
    "moment", ["part-00000", "ids.jsonl", "links", "report", "store", "remove"]
)
def test_killed_while_the_store_is_put_together(tmp_path, monkeypatch, moment):
    """A failure where a kill would fall."""
    folder = image_folder(tmp_path, 20)
    run(folder, "image", tmp_path / "a")

    class Kill(BaseException):
        pass

    def kill(*_, **__):
        raise Kill

    place = {
        "part-00000": (parts.os, "rename"),
        "ids.jsonl": (assemble.os, "replace"),
        "links": (assemble, "_place"),
        "report": (assemble, "to_json"),
        "store": (assemble, "move_into_place"),
        "remove": (WorkingDirectory, "remove"),
    }[moment]
    if moment == "part-00000":
        run(folder, "image", tmp_path / "b", shards=(1, 2))  # the directory itself is renamed too
    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(*place, kill)
        run(folder, "image", tmp_path / "b")
    assert (tmp_path / "b").exists() == (moment == "remove")
    assert run(folder, "image", tmp_path / "b").complete
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert not list(tmp_path.glob(".*"))


def test_sigterm_while_the_store_is_put_together(tmp_path, monkeypatch):
    folder = image_folder(tmp_path, 20)
    run(folder, "image", tmp_path / "a")
    with monkeypatch.context() as patch, pytest.raises(extract.Interrupted):
        patch.setattr(assemble, "_place", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        run(folder, "image", tmp_path / "b")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert run(folder, "image", tmp_path / "b").complete
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_what_a_kill_left_of_a_part_is_removed_when_it_is_done_again(tmp_path):
    folder, home = image_folder(tmp_path, 20), WorkingDirectory(tmp_path / "b")
    run(folder, "image", tmp_path / "b", shards=(0, 1))
    left = [home.path / f".part-0000{part}.0123abcd" for part in (1, 2)]
    for directory in left:
        directory.mkdir()
        (directory / "features.npy").write_bytes(b"half of it")
    run(folder, "image", tmp_path / "b", shards=(1, 2))
    assert [directory.exists() for directory in left] == [False, True]  # the other may be at work


@pytest.mark.parametrize("ranges", [((0, 3), (0, 3)), ((0, 2), (2, 3))])
def test_two_processes_at_once(tmp_path, start, ranges):
    folder = image_folder(tmp_path, 20)
    run(folder, "image", tmp_path / "a")
    both = [start(folder, "image", tmp_path / "b", shards=shards) for shards in ranges]
    for process in both:
        finish(process)
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "number,said", [(signal.SIGTERM, "stopped by SIGTERM"), (signal.SIGINT, "Ctrl-C")]
)
def test_signals_leave_whole_parts_and_no_processes(tmp_path, start, number, said):
    folder = image_folder(tmp_path, 20)
    process = start(folder, "image", tmp_path / "b", count=1)
    home = WorkingDirectory(tmp_path / "b")
    wait_for(lambda: home.done(0) or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    ids = [int(n) for n in children.read_text().split()] if children.exists() else []
    process.send_signal(number)
    assert said in finish(process, 1)
    wait_for(lambda: not any(Path(f"/proc/{n}").exists() for n in ids))
    assert not list(home.path.glob(".part*")) and home.done(0)
    run(folder, "image", tmp_path / "a")
    assert run(folder, "image", tmp_path / "b").complete
    assert everything(tmp_path / "a") == everything(tmp_path / "b")


def test_workers_end_with_a_killed_parent(tmp_path, start):
    process = start(image_folder(tmp_path, 20), "image", tmp_path / "b", count=1)
    home = WorkingDirectory(tmp_path / "b")
    wait_for(lambda: home.done(0) or process.poll() is not None)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("no list of child processes on this system")
    ids = [int(n) for n in children.read_text().split()]
    process.kill()
    process.communicate()
    assert ids
    wait_for(lambda: not any(Path(f"/proc/{n}").exists() for n in ids))


def wait_for(happened):
    deadline = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Reading ahead


def test_reading_ahead_is_bounded_and_ends_with_its_reader():
    drawn = []

    def numbers():
        for number in range(100):
            drawn.append(number)
            yield number

    before = threading.active_count()
    with workers.read_ahead(numbers(), 2) as ahead:
        assert [next(ahead) for _ in range(3)] == [0, 1, 2]
        wait_for(lambda: len(drawn) == 6)
        time.sleep(0.05)
        assert len(drawn) == 6  # three given, two held, one in hand
    assert threading.active_count() == before
    with workers.read_ahead(iter(range(5)), 2) as ahead:
        assert list(ahead) == [0, 1, 2, 3, 4]


def test_what_fails_in_the_thread_fails_in_the_reader():
    def numbers():
        yield 1
        raise OSError("disk")

    with workers.read_ahead(numbers(), 2) as ahead:
        assert next(ahead) == 1
        with pytest.raises(OSError, match="disk"):
            next(ahead)


def test_workers_import_nothing_heavy():
    code = (
        "import sys, sotalign_jax.__main__, sotalign_jax.encoders.extract\n"
        "heavy = 'jax torch transformers tensorflow_datasets pyarrow absl PIL'.split()\n"
        "sys.exit(', '.join(name for name in heavy if name in sys.modules) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
