"""Pages of comparisons and sweeps, on numbers that were worked out by hand."""

import json
import re

import pytest
import tiny_sweep
from report_runs import Page, emoji_config, scores, write_comparison, write_run, write_sweep

from sotalign_jax.reports import sweep_page, write_report
from sotalign_jax.reports.points import Choice, read_points
from sotalign_jax.sweeps.points import SweepDir, load_sweep


def page_of(path, tmp_path):
    written, problems = write_report(path, tmp_path / "page.html")
    assert problems == []
    return Page(written.read_text())


def table_of(page, head):
    """The table one of whose columns has that head."""
    return next(table for table in page.tables if head in table[0])


# ---- comparisons

VALUES = {"base": {1: 0.2, 2: 0.4}, "ours": {1: 0.3, 2: 0.6}}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    home = tmp_path_factory.mktemp("compare")
    path = write_comparison(home / "home", VALUES, ours={"teacher": {"ridge": 0.5}})
    return path, page_of(path, home)


def test_a_comparison_is_means_and_spreads_over_seeds(compared):
    _, page = compared
    heads, *rows = table_of(page, "seeds")
    assert heads[:4] == ["method", "T2I R@1", "R@5", "R@10"] and len(heads) == 11
    # Standard deviations of two: half the difference, times the root of two.
    assert rows[0] == ["cca", *["25.0 ±0.0"] * 9, "2"]
    assert rows[1] == ["base", *["30.0 ±14.1"] * 9, "2"]
    assert rows[2] == ["ours", *["45.0 ±21.2"] * 9, "2"]
    assert "4 of 4 runs finished" in page.text


def test_differences_are_paired_by_seed(compared):
    _, page = compared
    tables = [table for table in page.tables if "− base" in table[0]]
    assert len(tables) == 2  # R@1 and R@10
    for heads, *rows in tables:
        assert heads == ["", "− cca", "− base"]
        assert rows[0] == ["base", "+5.0 ± 14.1(-5.0, +15.0)", ""]
        assert rows[1] == ["ours", "+20.0 ± 21.2(+5.0, +35.0)", "+15.0 ± 7.1(+10.0, +20.0)"]


def test_the_teacher_of_a_comparison_is_that_of_methods_without_their_own(tmp_path):
    path = write_comparison(
        tmp_path / "home", VALUES, ours={"teacher": {"ridge": 0.5}}, base={"data": {"n_pairs": 9}}
    )
    points = read_points(path)
    assert points is not None and not points.more
    assert "cca" not in {row[0] for row in table_of(page_of(path, tmp_path), "seeds")}


def test_a_comparison_that_is_not_finished(tmp_path):
    values = {"base": {1: 0.2, 2: None}, "ours": {1: None, 2: None}}
    path = write_comparison(tmp_path / "home", values)
    page = page_of(path, tmp_path)
    _, teacher, base, ours = table_of(page, "seeds")
    assert teacher[-1] == "1 of 2" and base[1:] == ["20.0"] * 9 + ["1 of 2"]
    assert ours == ["ours", *["–"] * 9, "0 of 2"]
    assert "1 of 4 runs finished" in page.text
    states = [row[3] for row in table_of(page, "directory")[1:]]
    assert states == ["finished", "started", "started", "started"]


def test_a_run_with_a_comparison_in_its_configuration_is_a_run(tmp_path):
    config = emoji_config()
    with config.unlocked():
        config.compare.methods = {"base": {"objective": "sail"}}
    assert read_points(write_run(tmp_path / "run", config)) is None


def test_what_tuning_chose_is_shown(tmp_path):
    path = write_comparison(tmp_path / "home", VALUES)
    (path / "tuning.json").write_text(json.dumps({"ours": {"loss": {"alpha": 0.25}}}))
    page = page_of(path, tmp_path)
    (row,) = [row for table in page.tables for row in table if row[0] == "ours" and len(row) == 2]
    assert row[1] == "loss.alpha=0.25"


# ---- sweeps


def grid():
    """Recall grows with the pairs, and SOTAlign is ahead by a tenth."""
    return [
        (
            {"method": method},
            {"objective": method.lower(), "data.n_pairs": count, "seed": seed},
            count / 200 + 0.1 * (method == "SOTAlign") + 0.01 * seed,
        )
        for method in ("SAIL", "SOTAlign")
        for count in (10, 50, 100)
        for seed in (0, 1)
    ]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    home = tmp_path_factory.mktemp("sweep")
    points = grid()
    points[-1] = (*points[-1][:2], None)  # not started
    path = write_sweep(home / "home", points)
    return path, page_of(path, home), home / "page.html"


def test_the_record_of_a_sweep_is_read_as_it_is_written(tmp_path):
    sweep = load_sweep(tiny_sweep.__file__)
    home = SweepDir(tmp_path)
    home.start(sweep)
    failure = {"message": "the loss is not finite"}
    home.failure(sweep.points[1].key).write_text(json.dumps(failure))
    points = read_points(tmp_path)
    assert points is not None and points.name == sweep.name
    assert [point.path for point in points.points] == [home.run(p.key) for p in sweep.points]
    assert [point.state for point in points.points] == [home.state(p.key) for p in sweep.points]
    labels = [{f"label.{n}": value for n, value in p.labels.items()} for p in sweep.points]
    assert [p.given for p in points.points] == [
        label | p.fields for label, p in zip(labels, sweep.points, strict=True)
    ]
    assert points.choice == Choice(("label.method",), "val/mean_recall@1", "seed")
    # The steps are told by the method.
    assert points.axes == ("label.method", "optimizer.learning_rate")
    assert [group.title for group in points.groups()] == ["slow", "fast, 0.001", "fast, 0.01"]
    assert [group.wanted for group in points.groups()] == [2, 2, 2]
    page = page_of(tmp_path, tmp_path)
    assert "0 of 6 runs finished, 1 failed" in page.text


def test_a_sweep_is_grouped_by_labels_and_numbers(swept):
    _, page, _ = swept
    heads, teacher, *rows = table_of(page, "seeds")
    # The teacher, which all of them have; nothing was varied in it.
    assert teacher == ["teacher", "", *["25.0 ±0.0"] * 9, "2"]
    # The objective is told by the label, and is no column of its own.
    assert heads[:3] == ["method", "data.n_pairs", "T2I R@1"]
    assert [row[:2] for row in rows] == [
        [method, count] for method in ("SAIL", "SOTAlign") for count in ("10", "50", "100")
    ]
    assert rows[0][2] == "5.5 ±0.7" and rows[4][2] == "35.5 ±0.7"
    assert rows[5][2] == "60.0" and rows[5][-1] == "1 of 2"
    assert "11 of 12 runs finished" in page.text


def test_recall_is_drawn_against_what_was_varied(swept):
    _, page, file = swept
    assert [a["aria-label"] for a in page.all("svg")] == [
        "Mean R@1 against data.n_pairs",
        "Mean R@10 against data.n_pairs",
    ]
    first = file.read_text().split("<svg")[1]
    assert "SAIL" in first and "SOTAlign" in first
    assert len(re.findall(r"stroke: var\(--s[01]\); stroke-width: 1.4", first)) >= 2
    assert "fill-opacity: 0.15" in first  # the bands
    # One seed of the last point is missing.
    assert len(re.findall(r"<use [^>]*fill-opacity: 0; stroke", first)) == 1
    assert ">teacher</text>" in first


def test_every_point_leads_to_what_differs_in_it(swept):
    _, page, _ = swept
    heads, *rows = table_of(page, "directory")
    assert heads[:5] == ["", "method", "data.n_pairs", "seed", "state"]
    assert [row[0] for row in rows] == [str(i) for i in range(1, 13)]
    assert rows[-1][4] == "waiting" and rows[0][5] == "points/000000000001"
    ids = {a["id"] for _, a in page.tags if "id" in a}
    links = [a["href"] for a in page.all("a")]
    assert len(links) == 12 and {link[1:] for link in links} <= ids
    cards = [table for table in page.tables if ["objective", "sail"] in table]
    assert len(cards) == 3
    own = {row[0] for row in cards[0][1:]}
    assert own == {"objective", "data.n_pairs"}
    shared = next(table for table in page.tables if ["teacher.dim", "16"] in table)
    assert not {row[0] for row in shared} & (own | {"seed"})


def test_points_that_differ_in_labels_alone_are_one_run(tmp_path):
    points = [({"table": t}, {"loss.alpha": a}, 0.5) for t in ("x", "y") for a in (0.1, 0.2)]
    path = write_sweep(tmp_path / "home", points)
    record = json.loads((path / "sweep.json").read_text())
    for point in record["points"][2:]:
        point["key"] = f"{point['number'] - 2:012x}"
    (path / "sweep.json").write_text(json.dumps(record))
    page = page_of(path, tmp_path)
    assert "2 of 2 runs finished" in page.text and "sweep: 2 runs" in page.text
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for a in page.all("a")]
    assert len(set(links)) == 4 and set(links) <= set(ids)


def test_values_of_any_kind_tell_points_apart(tmp_path):
    values = [1, 2.5, True, None, "<b>", [1, 2], {"a": 1}]
    page = page_of(write_sweep(tmp_path, [({}, {"new": v}, None) for v in values]), tmp_path)
    shown = [row[1] for row in table_of(page, "directory")[1:]]
    assert shown == ["1", "2.5", "True", "", "<b>", "(1, 2)", "{'a': 1}"]


def test_teachers_that_differ_are_a_line_where_there_is_one_at_each_number(tmp_path):
    points = [({}, {"data.n_pairs": n, "seed": s}, 0.5) for n in (10, 100) for s in (0, 1)]
    path = write_sweep(tmp_path / "home", points)
    for number, file in enumerate(sorted(path.rglob("results.json"))):
        results = json.loads(file.read_text())
        results["teacher_test"] = scores(0.1 * (number + 1))
        file.write_text(json.dumps(results))
    groups = read_points(path).groups()
    assert [group.values for group in groups] == [(10,), (100,)]  # and no row for a teacher
    lines = {"": {group.values[0]: group for group in groups}}
    taught = sweep_page._teachers(lines)
    assert [taught[n][s]["t2i/recall@1"] for n in (10, 100) for s in (0, 1)] == pytest.approx(
        [0.1, 0.2, 0.3, 0.4]
    )
    two = lines | {"other": {10: groups[1]}}
    assert sweep_page._teachers(two) == {}


def test_the_table_that_a_sweep_wrote_is_shown(tmp_path):
    path = write_sweep(tmp_path / "home", grid())
    (path / "table.csv").write_text(
        "label.method,metric,mean,sd,n,wanted,runs,finished,failed,chosen,paper\n"
        'SAIL,test/t2i/recall@1,0.5,0.01,2,2,6,6,0,"{""data.n_pairs"": 100}",0.21\n'
        "SAIL,seconds,12.5,,1,2,6,6,0,,\n"
        "<b>,test/t2i/recall@1,0.4,0.01,2,2,6,5,1,,\n"
    )
    page = page_of(path, tmp_path)
    assert page.tables[0] == [
        ["method", "test T2I R@1", "paper", "seconds", "chosen on validation", "finished"],
        ["SAIL", "50.0 ±1.0", "21.0", "12.5", '{"data.n_pairs": 100}', "all"],
        ["<b>", "40.0 ±1.0", "", "–", "", "5 of 6 runs, 1 failed"],
    ]
    (path / "table.csv").write_text("a,metric,mean,sd,chosen\nx,seconds,12.5,,\n")
    assert page_of(path, tmp_path).tables[0] == [["a", "seconds"], ["x", "12.5"]]
    heads = "a,metric,mean,sd,chosen,paper\n"
    for text in ("a,b\n1,2\n", f"{heads}x,seconds,many,,,\n", f"{heads}x,y\n", "metric\na,b\n"):
        (path / "table.csv").write_text(text)
        with pytest.raises(ValueError, match=r"table.csv: not the table of a sweep"):
            write_report(path, tmp_path / "page.html")


def set_val(path, value):
    """Gives a run other recalls on validation than `write_point` did."""
    results = json.loads((path / "results.json").read_text())
    results["val"] = scores(value)
    (path / "results.json").write_text(json.dumps(results))


def test_test_recall_is_shown_of_what_was_chosen_on_validation(tmp_path):
    # On test alpha 0.2 is ahead, on validation 0.1; a third one has one lucky seed of two.
    recall = {0.1: 0.5, 0.2: 0.8, 0.3: 0.9}
    points = [
        ({"method": "ours"}, {"loss.alpha": a, "seed": s}, None if (a, s) == (0.3, 1) else v)
        for a, v in recall.items()
        for s in (0, 1)
    ]
    points += [({"method": "plain"}, {"loss.alpha": 0.0, "seed": s}, 0.4) for s in (0, 1)]
    layout = {"rows": ["label.method"], "select": "val/mean_recall@1"}
    path = write_sweep(tmp_path / "home", points, layout)
    for number, val in enumerate((0.7, 0.7, 0.6, 0.6, 0.9), 1):
        set_val(path / "points" / f"{number:012x}", val)
    page = page_of(path, tmp_path)
    table, candidates = (t for t in page.tables if "seeds" in t[0])
    assert [row[:3] for row in table[1:]] == [
        ["teacher", "", "25.0 ±0.0"],
        ["ours", "0.1", "50.0 ±0.0"],
        ["plain", "0", "40.0 ±0.0"],
    ]
    assert [[*row[1:3], *row[-2:]] for row in candidates[1:]] == [
        ["0.1", "70.0 ±0.0", "2", "chosen"],
        ["0.2", "60.0 ±0.0", "2", ""],
        ["0.3", "90.0", "1 of 2", ""],
        ["0", "20.0 ±0.0", "2", "chosen"],
    ]
    # Neither curves nor points tell the test recall of what was not chosen.
    assert "80.0" not in page.text and "on the validation pairs" in page.text
    heads = next(t for t in page.tables if "directory" in t[0])[0]
    assert "val mean R@1" in heads and "mean R@1" not in heads


def test_what_is_chosen_by_may_be_better_if_smaller(tmp_path):
    points = [({"method": "ours"}, {"loss.alpha": a}, 0.5) for a in (0.1, 0.2)]
    layout = {"rows": ["label.method"], "select": "val/foscttm"}
    path = write_sweep(tmp_path / "home", points, layout)
    for number, foscttm in ((1, 0.3), (2, 0.2)):
        file = path / "points" / f"{number:012x}" / "results.json"
        results = json.loads(file.read_text())
        results["val"] |= {"foscttm": foscttm, "mean_recall@1": foscttm}
        file.write_text(json.dumps(results))
    points = read_points(path)
    assert points is not None
    assert [(g.values, g.chosen) for g in points.groups() if g.val] == [
        ((0.1,), False),
        ((0.2,), True),
    ]


def test_bold_is_for_rows_with_no_run_missing(tmp_path):
    points = [
        ({"method": name}, {"seed": s}, None if name == "c" and s else value)
        for name, value in (("a", 0.3), ("b", 0.4), ("c", 0.5))
        for s in (0, 1)
    ]
    for layout, bold in (({"rows": ["label.method"]}, {"40.0"}), (None, set())):
        folder = tmp_path / str(bool(layout))
        page_of(write_sweep(folder / "home", points, layout), folder)
        found = re.findall(r"<b>([\d.]+)</b>", (folder / "page.html").read_text())
        assert set(found) == bold


def test_of_too_many_bars_the_best_on_validation_remain(tmp_path):
    points = [({"method": f"m{i:02}"}, {}, (i + 1) / 100) for i in range(42)]
    path = write_sweep(tmp_path / "home", points, {"rows": ["label.method"]})
    for i in range(42):  # the other way round
        set_val(path / "points" / f"{i + 1:012x}", (50 - i) / 100)
    page_of(path, tmp_path)
    svg = (tmp_path / "page.html").read_text().split("<svg")[1]
    names = set(re.findall(r">(m\d\d)</text>", svg))
    assert {"m00", "m30"} <= names and not {"m40", "m41"} & names


def test_a_failure_is_told(tmp_path):
    path = write_sweep(tmp_path / "home", [({}, {"loss.alpha": a}, None) for a in (0.1, 0.2)])
    (path / "points").mkdir()
    failed = path / "points" / "000000000002.failed.json"
    failed.write_text(json.dumps({"message": f"{failed}: loss is <nan> in '/home/me/a.npy'"}))
    page = page_of(path, tmp_path)
    assert "0 of 2 runs finished, 1 failed" in page.text
    told = "000000000002.failed.json: loss is <nan> in '…/a.npy'"
    assert f"failed: {told}" in page.text
    assert told in [a.get("title") for a in page.all("span")]
    assert [row[3] for row in table_of(page, "directory")[1:]] == ["waiting", "failed"]


def test_of_too_many_lines_the_best_on_validation_remain(tmp_path):
    # Over the pairs, ten rates would be ten lines; validation prefers the largest one.
    points = [
        ({}, {"data.n_pairs": count, "optimizer.learning_rate": 0.001 * k}, k / 100 + count / 1000)
        for count in (10, 100)
        for k in range(1, 11)
    ]
    path = write_sweep(tmp_path / "home", points)
    page = page_of(path, tmp_path)
    titles = [a["aria-label"] for a in page.all("svg")]
    assert titles[0] == "Mean R@1 against data.n_pairs" and len(titles) == 4
    assert "optimizer.learning_rate chosen on validation" in page.text


def test_curves_choose_as_the_table_does_and_prefer_whole_groups(tmp_path, monkeypatch):
    # By `select` the rate 0.2 is best; 0.3 has one lucky seed of two; mean_recall@1 prefers 0.1.
    rates = {0.1: (0.6, 0.3), 0.2: (0.4, 0.5), 0.3: (0.9, 0.9)}
    points = [
        ({}, {"data.n_pairs": n, "optimizer.learning_rate": r, "seed": s}, r + n / 1000)
        for n in (10, 100)
        for r in rates
        for s in (0, 1)
    ]
    points = [(*p[:2], None) if p[1]["seed"] and i % 6 > 3 else p for i, p in enumerate(points)]
    layout = {"rows": ["data.n_pairs"], "select": "val/mean_recall@10"}
    path = write_sweep(tmp_path / "home", points, layout)
    for number, (_, fields, value) in enumerate(points, 1):
        if value is not None:
            file = path / "points" / f"{number:012x}" / "results.json"
            results = json.loads(file.read_text())
            ones, tens = rates[fields["optimizer.learning_rate"]]
            results["val"] |= {"mean_recall@1": ones, "mean_recall@10": tens}
            file.write_text(json.dumps(results))
    points = read_points(path)
    assert points is not None
    place = points.axes.index("data.n_pairs")
    monkeypatch.setattr(sweep_page, "_MOST_LINES", 2)  # of the three rates
    lines, note = sweep_page._lines(points, points.groups(), place)
    assert note == "optimizer.learning_rate chosen on validation"
    (line,) = lines.values()
    rate = points.axes.index("optimizer.learning_rate")
    assert {n: group.values[rate] for n, group in line.items()} == {10: 0.2, 100: 0.2}


def test_a_zero_among_powers_has_its_place(tmp_path):
    points = [({}, {"loss.alpha": alpha}, 0.5) for alpha in (0.0, 1e-5, 1e-3, 1e-1)]
    page = page_of(write_sweep(tmp_path / "home", points), tmp_path)
    assert page.all("svg")[0]["aria-label"] == "Mean R@1 against loss.alpha"


def test_without_numbers_runs_are_drawn_side_by_side(tmp_path):
    points = [
        ({"method": f"m{i} <i>"}, {"teacher.name": name}, 0.1 * i + 0.1)
        for i, name in enumerate(("cca", "procrustes"))
    ]
    page = page_of(write_sweep(tmp_path / "home", points), tmp_path)
    assert [a["aria-label"] for a in page.all("svg")] == ["Mean R@1", "Mean R@10"]
    assert "m1 <i>" in page.text and not page.all("i")


def test_a_sweep_without_test_pairs_is_about_validation(tmp_path):
    path = write_sweep(tmp_path / "home", [({}, {"seed": s}, 0.5) for s in (0, 1)])
    for file in path.rglob("results.json"):
        results = json.loads(file.read_text())
        del results["test"], results["teacher_test"]
        file.write_text(json.dumps(results))
    page = page_of(path, tmp_path)
    assert "Recall on the validation pairs" in page.text
    assert [row[1] for row in table_of(page, "seeds")[1:]] == ["12.5 ±0.0", "25.0 ±0.0"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", "sweep.json: not JSON"),
        ("[]", "sweep.json: must hold a JSON object, got list"),
        ('{"points": [{"key": "a"}]}', "a point lacks its key, labels or fields"),
        ("{}", "a point lacks its key, labels or fields"),
        ('{"points": [], "layout": {"rows": []}}', "layout: must hold rows, columns, select"),
    ],
)
def test_a_broken_record_is_named(record, message, tmp_path):
    path = tmp_path / "home"
    path.mkdir()
    (path / "sweep.json").write_text(record)
    with pytest.raises(ValueError, match=message):
        write_report(path)


def test_a_sweep_is_left_as_it_was(swept):
    path = swept[0]
    before = {f: f.stat().st_mtime_ns for f in path.rglob("*") if f.is_file()}
    written, _ = write_report(path)
    after = {f: f.stat().st_mtime_ns for f in path.rglob("*") if f.is_file()}
    assert written in after
    del after[written]
    assert after == before
    written.unlink()
