"""The page of a run: whole, interrupted, without validation; and what is never done to it."""

import builtins
import json
import re
import shutil
from pathlib import Path

import matplotlib
import pytest
from report_runs import METRICS, Page, emoji_config, record, snapshot, write_run

from sotalign_jax.reports import tables, write_report
from sotalign_jax.reports.curves import training_figures
from sotalign_jax.reports.figures import COLOURS, figure
from sotalign_jax.reports.markup import Markup, page, table, tag
from sotalign_jax.reports.series import read_series


def report_of(path, tmp_path):
    out = tmp_path / "page.html"
    _, problems = write_report(path, out)
    return Page(out.read_text()), problems


# ---- a finished run


def test_the_run_is_left_as_it_was(finished):
    assert finished.page == finished.path / "report.html" and finished.problems == []
    after = snapshot(finished.path)
    del after[finished.page.relative_to(finished.path)]
    assert after == finished.before


def test_nothing_is_fetched(finished):
    text = finished.page.read_text()
    found = Page(text)
    policy = next(m for m in found.all("meta") if "http-equiv" in m)
    assert policy["content"].startswith("default-src 'none'")
    assert not found.all("script") and not found.all("link")
    assert "http:" not in text and "https:" not in text and "@import" not in text
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))


def test_retrieval_of_aligner_and_teacher_and_their_difference(finished):
    results, found = finished.results, Page(finished.page.read_text())
    for table_of, split in zip(found.tables, ("test", "val"), strict=False):
        heads, teacher, aligner, difference = table_of
        assert heads[1:4] == ["T2I R@1", "R@5", "R@10"] and heads[-1] == "FOSCTTM"
        for i, metric in enumerate(METRICS, 1):
            assert teacher[i] == f"{100 * results[f'teacher_{split}'][metric]:.1f}"
            assert aligner[i] == f"{100 * results[split][metric]:.1f}"
            delta = 100 * (results[split][metric] - results[f"teacher_{split}"][metric])
            assert difference[i] == f"{delta:+.1f}"
        assert aligner[-1] == f"{results[split]['foscttm']:.4f}"
    assert "Test pairs, 400 images and 400 texts" in found.text
    assert "Validation pairs, 144 images" in found.text


def test_every_metric_of_training_is_drawn(finished):
    found = Page(finished.page.read_text())
    titles = [attributes["aria-label"] for attributes in found.all("svg")]
    assert titles == [
        "Recall",
        "Recall",
        "Loss",
        "KLOT",
        "Marginal errors of the plans",
        "Sharpness of the plans",
        "Sinkhorn iterations",
        "Learning rate",
        "Gradient norm",
        "Logit scale",
        "Logit bias",
        "Parameter norm",
        "Speed",
    ]
    for word in ("siglip", "student", "teacher", "T2I R@5", "step"):
        assert word in found.text


def test_best_and_worst_queries_are_emoji_and_their_captions(finished):
    text = finished.page.read_text()
    found = Page(text)
    lists = [a["id"] for a in found.all("ul") if a.get("class") == "examples"]
    assert lists == ["best-t2i", "worst-t2i", "best-i2t", "worst-i2t"]
    emoji = [a for a in found.all("span") if a.get("class") == "emoji"]
    assert len(emoji) >= 2 * 6 * 5 and all(a["role"] == "img" and a["aria-label"] for a in emoji)
    best, worst = (
        re.findall(r'class="rank">rank ([\d.,]+)<', text.split(f'id="{name}-t2i"')[1])[:6]
        for name in ("best", "worst")
    )
    assert best == ["1"] * 6
    ranks = [float(rank.replace(",", "")) for rank in worst]
    assert ranks == sorted(ranks, reverse=True) and ranks[-1] > 50
    assert found.text.count("Framed: the partner") == 1


def test_configuration_names_what_differs_first(finished):
    found = Page(finished.page.read_text())
    changed, rest = (t for t in found.tables if t[0][0] == "field")
    assert changed[0] == ["field", "value", "default"]
    assert ["data.n_pairs", "100", "10000"] in changed and [
        "data.name",
        "emoji",
        "files",
    ] in changed
    assert ["loss.epsilon", "0.05"] in rest
    assert not {row[0] for row in changed[1:]} & {row[0] for row in rest[1:]}
    folds = [a for a in found.all("details")]
    assert len(folds) == 4


def test_provenance_is_there(finished):
    text = Page(finished.page.read_text()).text
    for word in (
        "seed",
        "0.10.2",
        "2026-01-02T03:04:05+0000",
        "cpu:0",
        "commit 0123456789ab, changed",
    ):
        assert word in text


def test_no_place_of_the_machine_is_told(finished):
    text = finished.page.read_text()
    assert "sotalign train --workdir=…/emoji" in Page(text).text
    assert "/home/me" not in text and str(finished.path.parent) not in text


def test_what_is_not_shown_is_told_without_its_place(tmp_path):
    config = emoji_config()
    with config.unlocked():
        config.data.files.image = "/home/me/my rows/image.npy"
    path = write_run(tmp_path / "run", config)
    (path / "aligner").mkdir()
    (path / "aligner" / "aligner.json").write_text("{")
    (path / "results.json").write_text("{}")
    found, problems = report_of(path, tmp_path)
    assert "Not shown: run/aligner" in found.text
    assert str(tmp_path) not in found.text and "/home/me" not in found.text
    assert str(path / "aligner") in problems[0]  # on the terminal, where it helps


def test_paths_are_shortened_and_nothing_else():
    shorten = tables.shorten_paths
    text = "t2i/recall@1 and/or https://a.org/b/c, 1/2, /tmp, configs/sail.py"
    assert shorten(text) == text
    assert shorten("[Errno 2] No such file: '/a/b c/d.npy'", Path("/a/b c")) == (
        "[Errno 2] No such file: 'b c/d.npy'"
    )
    assert shorten("x=/a/b/c.npy: bad; ('/d/e',)") == "x=…/c.npy: bad; ('…/e',)"


def test_names_are_escaped_and_ids_unique(finished):
    text = finished.page.read_text()
    found = Page(text)
    assert "<h1>emoji &amp; co " in text and "emoji & co" in found.text
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r"url\(#([^)]+)\)", text) + [a["href"][1:] for a in found.all("use")]
    assert used and set(used) <= set(ids)


def test_the_same_run_gives_the_same_page_again(finished):
    written = finished.page
    text = written.read_text()
    assert write_report(finished.path)[0] == written and written.read_text() == text


# ---- other runs


def test_an_interrupted_run(tmp_path):
    path = write_run(tmp_path / "run", emoji_config(), steps=20)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "train/lo')
    with open(path / "provenance.jsonl", "a") as file:
        file.write('{"time": "20')
    found, problems = report_of(path, tmp_path)
    assert "not finished: step 20 of 40" in found.text and problems == []
    assert "Not shown: the run has saved no aligner yet." in found.text
    assert len(found.all("svg")) == 13
    assert "mean R@1, val, %" in found.text and "26.0 at step 20" in found.text  # of METRICS[6]


def test_a_run_that_has_reported_nothing(tmp_path):
    path = write_run(tmp_path / "run", emoji_config(), steps=0)
    (path / "metrics.jsonl").unlink()
    (path / "provenance.jsonl").unlink()
    found, _ = report_of(path, tmp_path)
    assert "no step reported" in found.text and "No metrics were recorded." in found.text
    assert "No start was recorded." in found.text


def test_a_run_without_validation(tmp_path):
    path = write_run(tmp_path / "run", emoji_config(), val=False)
    results = {"test": {"t2i/recall@1": 0.5}, "selected_step": 40, "seconds": 6000.0, "pairs": 100}
    (path / "results.json").write_text(json.dumps(results))
    found, problems = report_of(path, tmp_path)
    assert [a["aria-label"] for a in found.all("svg")][:2] == ["Loss", "KLOT"]
    assert found.tables[0][1][:3] == ["aligner", "50.0", "–"] and len(found.tables[0]) == 2
    assert "100 min" in found.text or "1.7 h" in found.text
    assert problems == ["no examples of retrieval: the run has saved no aligner yet"]


def test_data_that_is_gone_costs_the_examples_alone(finished, tmp_path):
    path = shutil.copytree(finished.path, tmp_path / "run")
    moved = json.loads((path / "config.json").read_text())
    moved["data"]["name"] = "files"
    moved["data"]["files"] |= {"test_image": "/nowhere/<image>.npy", "test_text": "/nowhere/t.npy"}
    (path / "config.json").write_text(json.dumps(moved))
    found, (problem,) = report_of(path, tmp_path)
    assert "/nowhere/<image>.npy: no such file" in problem
    assert "…/<image>.npy: no such file" in found.text and "/nowhere" not in found.text
    assert len(found.all("svg")) == 13


def test_fields_of_another_version_are_shown(tmp_path):
    path = write_run(tmp_path / "run", emoji_config(), steps=0)
    old = json.loads((path / "config.json").read_text())
    old["loss"]["<b>temperature"] = 0.07
    (path / "config.json").write_text(json.dumps(old))
    found, _ = report_of(path, tmp_path)
    changed = next(t for t in found.tables if t[0][0] == "field")
    assert ["loss.<b>temperature", "0.07", "no such field by default"] in changed
    assert not found.all("b") or "temperature" not in str(found.all("b"))


# ---- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "is not a directory; give that of a run or a sweep"),
        (lambda path: path.mkdir(), "holds no run, since there is no config.json"),
        (lambda path: write_run(path, emoji_config()) / "config.json", "not JSON"),
        (lambda path: write_run(path, emoji_config()) / "results.json", "not JSON"),
    ],
)
def test_what_is_no_run_is_named(make, message, tmp_path):
    broken = make(tmp_path / "run")
    if broken is not None:
        broken.write_text("{")
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "run", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_file_that_is_no_report_is_never_replaced(tmp_path):
    path = write_run(tmp_path / "run", emoji_config(), steps=0)
    for text in (
        "mine",
        "",
        "<!doctype html><html><head><title>sotalign report</title></head></html>",
    ):
        (path / "report.html").write_text(text)
        with pytest.raises(ValueError, match=r"out: .*report.html exists and is no report"):
            write_report(path)
        assert (path / "report.html").read_text() == text
    with pytest.raises(ValueError, match="exists and is no report"):
        write_report(path, tmp_path)  # a directory
    written, _ = write_report(path, tmp_path / "new" / "page.html")
    first = written.read_text()
    (path / "provenance.jsonl").write_text("")
    write_report(path, written)
    assert written.read_text() != first
    assert [file.name for file in written.parent.iterdir()] == ["page.html"]


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    path = write_run(tmp_path / "run", emoji_config())
    found = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("matplotlib"):
            raise ImportError("no module named matplotlib")
        return found(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"install the extra, sotalign-jax\[plots\]"):
        write_report(path)
    assert not (path / "report.html").exists()


# ---- parts


def test_text_is_escaped_wherever_it_goes():
    bad = "<script>alert('x')</script> & \"y\""
    made = tag("p", bad, tag("b", bad), Markup("<i>kept</i>"), None, title=bad, open=None)
    assert made.count("<script") == 0 and "<i>kept</i>" in made
    assert Page(made).text == f"{bad}{bad}kept" and Page(made).all("p") == [{"title": bad}]
    found = Page(page(bad, table([bad], [[bad]], caption=bad)))
    assert found.tables == [[[bad], [bad]]] and not found.all("script")


def test_a_figure_has_the_colours_of_the_page_and_ids_of_its_own():
    def draw(axes):
        axes.plot([1, 2, 3], color=COLOURS[0], label="<a> & b")
        axes.fill_between([0, 1], [0, 1], [2, 3], color=COLOURS[1], alpha=0.2)
        axes.set_xlabel("step <i>")
        axes.legend()

    one, other = (figure(name, draw, title="A <title>") for name in ("one", "other"))
    found = Page(one)
    assert "<a> & b" in found.text and "step <i>" in found.text and not found.all("i")
    assert "var(--s0)" in one and "var(--s1)" in one and "currentColor" in one
    assert not re.search("#0[0-9a-f]{5}", one) and "<style" not in one and "font-family" not in one
    ids = [{a["id"] for _, a in Page(f).tags if "id" in a} for f in (one, other)]
    assert ids[0] and not ids[0] & ids[1]
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "text.color": "red"}):
        assert figure("one", draw, title="A <title>") == one
        assert matplotlib.rcParams["font.size"] == 30


def test_a_metric_that_nobody_knows_has_a_figure_and_a_single_point_has_none(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "train/new_term": s, "train/loss": 1.0} for s in (1, 2)]
    lines.append({"step": 3, "train/alone": 1.0} | record(3) | {"val/foscttm": 0.1})
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    titles = [Page(f).all("svg")[0]["aria-label"] for f in training_figures(read_series(file))]
    assert titles == ["Loss", "New term"]
