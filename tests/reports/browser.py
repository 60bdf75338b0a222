"""Opens pages in a real browser engine without a window, and tells what it saw of each as JSON.

Run as a program of its own, since an engine keeps its process::

    python browser.py light|dark SCREENSHOTS PAGE.html ...

Needs the extra ``browser``: Qt WebEngine, which is Chromium, from a wheel.
"""

import json
import os
import sys
from pathlib import Path

LOOK = """
JSON.stringify({
  title: document.title,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  headings: [...document.querySelectorAll("h1, h2")].map(e => e.textContent.trim()),
  figures: document.querySelectorAll("figure svg[role=img]").length,
  drawn: [...document.querySelectorAll("figure svg")].filter(
    e => e.getBoundingClientRect().width > 100 && e.querySelectorAll("path, use").length > 10
  ).length,
  labels: [...document.querySelectorAll("svg text")].map(e => e.textContent),
  colours: [document.body, document.querySelector("svg text"), document.querySelector("td"),
    document.querySelector("figcaption")].filter(e => e).map(e => getComputedStyle(e).color),
  ground: getComputedStyle(document.body).backgroundColor,
  tables: [...document.querySelectorAll("table")].map(
    t => [...t.rows].map(r => [...r.cells].map(c => c.textContent.trim()))),
  examples: Object.fromEntries([...document.querySelectorAll("ul.examples")].map(
    u => [u.id, [...u.children].map(e => e.textContent)])),
  images: [...document.images].map(e => [e.complete, e.naturalWidth, e.naturalHeight]),
  broken: [...document.querySelectorAll("a[href^='#']")].filter(
    e => !document.getElementById(e.getAttribute("href").slice(1))).length,
  twice: [...document.querySelectorAll("[id]")].map(e => e.id).filter(
    (id, i, all) => all.indexOf(id) != i),
  wide: document.documentElement.scrollWidth > innerWidth,
  height: document.documentElement.scrollHeight,
})
"""

# Two frames later, what was changed before has been drawn.
PAINT = """
requestAnimationFrame(() => requestAnimationFrame(() => { window.painted = true; }))
"""


def main(scheme, screenshots, pages):
    os.environ["QT_QPA_PLATFORM"] = "offscreen"
    # Pages of our own, and the sandbox wants rights that a container may not give.
    os.environ["QTWEBENGINE_CHROMIUM_FLAGS"] = (
        "--no-sandbox --disable-gpu --blink-settings=preferredColorScheme="
        + {"dark": "0", "light": "1"}[scheme]
    )
    from PySide6.QtCore import QTimer, QUrl
    from PySide6.QtWebEngineCore import (
        QWebEnginePage,
        QWebEngineProfile,
        QWebEngineSettings,
        QWebEngineUrlRequestInterceptor,
    )
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    app = QApplication(["browser"])
    requests, console, seen = [], [], []

    class Requests(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):
            requests.append(info.requestUrl().toString()[:200])

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):
            console.append(f"{level.name}: {message} ({line})")

    profile, watch = QWebEngineProfile(), Requests()
    profile.setUrlRequestInterceptor(watch)
    view = QWebEngineView()
    view.setPage(Page(profile, view))
    # Or a request to a network would not be made, and not be seen either.
    view.settings().setAttribute(QWebEngineSettings.LocalContentCanAccessRemoteUrls, True)
    view.resize(1200, 900)
    view.show()
    waiting = list(pages)

    def open_next():
        if not waiting:
            return app.quit()
        view.resize(1200, 900)
        requests.clear()
        console.clear()
        view.load(QUrl.fromLocalFile(str(Path(waiting[0]).resolve())))

    def loaded(ok):
        if not ok:
            app.exit(3)
        view.page().runJavaScript(LOOK, 0, looked)

    def looked(found):
        # Shown in full before it is photographed.
        found = json.loads(found)
        view.resize(1200, min(int(found["height"]), 8000))
        view.page().runJavaScript(PAINT)
        QTimer.singleShot(300, lambda: wait(found, None))

    def wait(found, before):
        """Until it is painted, and two pictures of it are the same."""
        now = view.grab().toImage()

        def answer(painted):
            if painted and before is not None and now == before:
                photograph(found, now)
            else:
                QTimer.singleShot(300, lambda: wait(found, now))

        view.page().runJavaScript("Boolean(window.painted)", 0, answer)

    def photograph(found, image):
        path = Path(waiting.pop(0))
        file = Path(screenshots) / f"{path.stem}-{scheme}.png"
        image.save(str(file))
        width, height = image.width(), image.height()
        bands = [
            {
                image.pixel(x, y)
                for x in range(0, width, 2)
                for y in range(height * quarter // 4, height * (quarter + 1) // 4, 2)
            }
            for quarter in range(4)
        ]
        found |= {"requests": list(requests), "console": list(console), "screenshot": str(file)}
        found["shades"] = [len(band) for band in bands]
        seen.append(found)
        open_next()

    view.loadFinished.connect(loaded)
    QTimer.singleShot(90_000, lambda: app.exit(4))
    open_next()
    status = app.exec()
    view.setPage(None)
    print(json.dumps(seen))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))
