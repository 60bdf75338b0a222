"""The pages in a real browser engine: what it shows, what it asks for, what it complains of."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from report_runs import write_comparison, write_sweep
from test_report_rows import illustrate
from test_report_sweep import VALUES, grid

from sotalign_jax.reports import write_report

PROGRAM = Path(__file__).with_name("browser.py")


def look(scheme, folder, pages):
    """What a browser in a process of its own sees of each page, by the name of the file."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), scheme, str(folder), *map(str, pages)],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {page.stem: found for page, found in zip(pages, json.loads(done.stdout), strict=True)}


@pytest.fixture(scope="module")
def browser():
    """Skips where there is no engine, or where it cannot start for want of system libraries."""
    if importlib.util.find_spec("PySide6") is None:
        pytest.skip("no browser engine: install the extra, sotalign-jax[browser]")
    code = "from PySide6 import QtWebEngineWidgets"
    tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if tried.returncode:
        reason = tried.stderr.strip().splitlines()[-1]
        pytest.skip(f"the browser engine of the extra `browser` does not load: {reason}")
    return look


@pytest.fixture(scope="module")
def seen(browser, finished, tmp_path_factory):
    """All pages, light and dark, and two that are wrong on purpose."""
    home = tmp_path_factory.mktemp("pages")
    sources = {
        "run": finished.path,
        "files": illustrate(home / "files"),
        "comparison": write_comparison(home / "comparison", VALUES),
        "sweep": write_sweep(home / "sweep", grid()),
    }
    pages = [write_report(path, home / f"{name}.html")[0] for name, path in sources.items()]
    text = pages[0].read_text()
    smuggled = '<img src="http://127.0.0.1:9/a.png"><script>document.title = "no"</script></main>'
    (home / "smuggled.html").write_text(text.replace("</main>", smuggled))
    (home / "wrong.html").write_text(
        '<!doctype html><p>x<img src="http://127.0.0.1:9/a.png"><script>boom()</script>'
        '<a href="#nothing">y</a>'
    )
    (home / "blank.html").write_text("<!doctype html>")
    light = [*pages, *(home / f"{name}.html" for name in ("smuggled", "wrong", "blank"))]
    return {"light": browser("light", home, light), "dark": browser("dark", home, pages)}


PAGES = ("run", "files", "comparison", "sweep")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_asked_for_and_nothing_complains(name, scheme, seen):
    page = seen[scheme][name]
    (request,) = [one for one in page["requests"] if not one.startswith("data:")]
    assert request.startswith("file:") and request.endswith(f"/{name}.html")
    assert page["console"] == [] and page["broken"] == 0 and page["twice"] == []
    assert not page["wide"]  # wide tables scroll for themselves


def test_the_watch_would_have_seen_it(seen):
    page = seen["light"]["wrong"]
    assert "http://127.0.0.1:9/a.png" in page["requests"] and page["broken"] == 1
    assert any("boom" in message for message in page["console"])
    assert [width for _, width, _ in page["images"]] == [0]
    assert seen["light"]["blank"]["shades"] == [1, 1, 1, 1]


def test_what_slipped_in_could_do_nothing(seen):
    page = seen["light"]["smuggled"]
    assert not any("127.0.0.1" in request for request in page["requests"])
    assert page["title"] == seen["light"]["run"]["title"]
    assert any("Content Security Policy" in message for message in page["console"])


def test_a_run_in_the_browser(seen, finished):
    page = seen["light"]["run"]
    assert page["title"] == "emoji & co: sotalign run"
    assert page["headings"] == [
        "emoji & co finished",
        "Retrieval",
        "Training",
        "Best and worst retrievals",
        "Configuration",
        "Provenance",
    ]
    assert page["figures"] == page["drawn"] == 13
    assert {"step", "R@10", "siglip", "student", "teacher"} <= set(page["labels"])
    assert list(page["examples"]) == ["best-t2i", "worst-t2i", "best-i2t", "worst-i2t"]
    assert all(len(items) == 6 for items in page["examples"].values())
    assert all(item.startswith("rank 1") for item in page["examples"]["best-t2i"])
    expected = f"{100 * finished.results['test']['t2i/recall@1']:.1f}"
    assert page["tables"][0][2][1] == expected


def test_pictures_decode_and_captions_are_read(seen):
    page = seen["light"]["files"]
    assert len(page["images"]) > 20
    assert all(done and (width, height) == (128, 85) for done, width, height in page["images"])
    assert "<i>caption" in page["examples"]["best-t2i"][0]


def test_sweeps_and_comparisons_in_the_browser(seen):
    page = seen["light"]["comparison"]
    assert page["figures"] == page["drawn"] == 2 and page["tables"][0][2][0] == "base"
    page = seen["light"]["sweep"]
    assert page["figures"] == page["drawn"] == 2
    assert {"SAIL", "SOTAlign", "data.n_pairs"} <= set(page["labels"])


@pytest.mark.parametrize("name", PAGES)
def test_text_stands_out_in_light_and_in_dark(name, seen):
    for scheme in ("light", "dark"):
        page = seen[scheme][name]
        assert page["dark"] == (scheme == "dark")
        ground = luminance(page["ground"])
        assert (ground < 0.1) == page["dark"]
        for colour in page["colours"]:
            low, high = sorted((ground, luminance(colour)))
            assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2, level AA
    assert seen["light"][name]["colours"] != seen["dark"][name]["colours"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_the_screenshot_shows_something(name, scheme, seen):
    page = seen[scheme][name]
    assert min(page["shades"]) > 20 and max(page["shades"]) > 200  # each quarter, any quarter
    with Image.open(page["screenshot"]) as shot:
        assert shot.width >= 1200 and shot.height >= 900


def luminance(colour):
    """Relative luminance of ``rgb(r, g, b)``, as WCAG defines it."""
    channels = [int(part) / 255 for part in colour.strip("rgb()").split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
