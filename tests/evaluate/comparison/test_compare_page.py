"""The page that evaluate/compare.py writes: whole, escaped, without requests, and as a browser shows it."""

import html
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from by_hand.reports import comparer, maker, standard, write
from PIL import Image

from evaluate.comparison import page, plots


@pytest.fixture
def make(tmp_path):
    return maker(tmp_path)


@pytest.fixture
def compare(script, tmp_path):
    return comparer(script("compare").main, tmp_path)


class Checker(html.parser.HTMLParser):
    """Notes unbalanced tags, what would be requested, and what says nothing to who cannot see."""

    VOID = ("meta", "link", "img", "path", "use")

    def __init__(self, text):
        super().__init__()
        self.open, self.faults, self.tags = [], [], []
        self.feed(text)
        self.faults += self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if tag not in self.VOID or (tag == "path" and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)
        if tag == "script" or any(name.startswith("on") for name in given):
            self.faults.append(tag)
        for name in ("src", "href"):
            if not given.get(name, "data:").startswith("data:"):
                self.faults.append(given[name])
        if (tag == "img" and not given.get("alt")) or (tag == "th" and "scope" not in given):
            self.faults.append(given)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}>")


def illustrated(make):
    """Two runs with everything that a page shows."""
    runs = [make('a<b>&"x'), make("b", keep=0.5)]
    for at, run in enumerate(runs):
        standard(run, 0.7 + 0.05 * at, at)
        for place, name in (
            ("pictures", "board-00000100"),
            ("pictures", "board-00000050"),
            ("evaluate/explain", "maps"),
        ):
            (run / place).mkdir(exist_ok=True, parents=True)
            Image.fromarray(np.full((40, 2000 if name == "maps" else 60, 3), 90 * at, np.uint8)).save(
                run / place / f"{name}.png"
            )
        write(run, "explain", {"subject": {}})  # without it, its sheets may be of other weights
    return runs


def test_page_is_whole_escaped_and_asks_for_nothing(make, compare):
    a, b = illustrated(make)
    (b / "evaluate" / "explain" / "maps.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    text = compare(a, b, "random", "pixels")["compare.html"]
    checked = Checker(text)
    assert checked.faults == []
    assert "a<b>" not in text and "a&lt;b&gt;&amp;&#34;x" in text and "knn.py &lt;&amp;&gt;" in text
    assert not re.search(r"https?:|url\(|@import", text)
    pictures = [given for tag, given in checked.tags if tag == "img"]
    assert len(pictures) == 3 and "Cannot be read: maps.png" in text  # the newest board of each, and a's maps
    assert sorted(int(given["width"]) for given in pictures) == [60, 60, page.WIDEST]
    assert sum(tag == "svg" for tag, _ in checked.tags) >= 3 and ("html", {"lang": "en"}) in checked.tags
    assert text.count("<details>") == 1 + 4  # all numbers of k-NN, and a card for each report
    assert "fingerprint tttttttttttttttt" in text and "objectives.absolute.keep=0.5" in text


def test_plots_by_hand():
    plot = plots.curves("loss", [plots.Curve("one", [(0, 1.0), (10, float("nan")), (20, 3.0)], 0)], "step")
    assert plot.title == "loss" and plot.alt == "Curves of loss over step. one: 1 to 3"
    (line,) = re.findall(r'<path d="M ([^"]*)" style="[^"]*var\(--c0\)', plot.svg)
    (x0, y0), (x1, y1) = (map(float, point.split()) for point in line.split("L"))
    assert x1 > x0 and y1 < y0  # the point that is no number is left out, and upwards is more
    assert plots.curves("nothing", [plots.Curve("one", [(0, float("nan"))], 0)], "step") is None
    hostile = [plots.Bar("<b>$x_1$ & more", 0.5, 0.4, 0.7, 9), plots.Bar("y", 0.25, None, None, 1)]
    plot = plots.intervals("k-NN", hostile)
    assert plot.alt.endswith("<b>$x_1$ & more 50.0, 40.0 to 70.0; y 25.0, 25.0 to 25.0")  # escaped by the page
    assert "&lt;b&gt;$x_1$ &amp; more</text>" in plot.svg and plot.svg == plots.intervals("k-NN", hostile).svg
    assert not re.search(r"http|url\(", plot.svg)


FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
]  # fmt: skip
PROBE = """<script>addEventListener("load", () => parent.postMessage(JSON.stringify({width: innerWidth,
needs: document.documentElement.scrollWidth, pictures: [...document.images].map(image => image.naturalWidth),
requests: performance.getEntriesByType("resource").map(one => one.name.slice(0, 5)).filter(one => one != "data:")}),
"*"));</script></body>"""
FRAME = """<!doctype html><title>frame</title><link rel="icon" href="data:,"><pre id="found"></pre><script>
addEventListener("message", event => document.getElementById("found").textContent = event.data);</script>
<iframe width="{width}" height="1200" style="border: 0" srcdoc="{page}"></iframe>"""  # Chromium's windows start at 500


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1600])
def test_page_in_a_browser(make, compare, tmp_path, width):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    text = compare(*illustrated(make), "random", "pixels")["compare.html"]
    framed = tmp_path / "framed.html"
    framed.write_text(FRAME.format(width=width, page=html.escape(text.replace("</body>", PROBE))))

    def look(*flags):
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [browser, *FLAGS, profile, f"--window-size={width + 20},1300", *flags],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    dom = look("--dump-dom", framed.as_uri())
    found = json.loads(html.unescape(re.search(r'<pre id="found">(.*?)</pre>', dom)[1]))
    assert len(found["pictures"]) == 4 and min(found["pictures"]) > 0
    assert found["requests"] == [] and found["needs"] <= found["width"] == width  # only tables scroll sideways
    look(f"--screenshot={tmp_path / 'shot.png'}", framed.as_uri())
    with Image.open(tmp_path / "shot.png") as shot:
        assert shot.width == width + 20 and np.asarray(shot.convert("L")).std() > 5  # something is drawn
    look(f"--print-to-pdf={tmp_path / 'page.pdf'}", (tmp_path / "out" / "compare.html").as_uri())
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"
