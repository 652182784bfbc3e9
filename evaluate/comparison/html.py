"""One HTML file that needs nothing else: tables, curves as SVG, pictures inlined; for screens, paper and ears.

Whatever is put in is escaped, unless it is `Html`, which only the functions here make. No scripts, no requests; colours
are few, told apart without colour too (dashes and names), and have a light and a dark set.
"""

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.decoding.decode import open_picture

WIDEST = 1600  # pixels of a picture; wider ones are made smaller
COLOURS = 8  # in STYLE; curves after them begin again, with other dashes
DASHES = ("", "6 3", "2 3", "8 3 2 3")
MOST_POINTS = 400  # of a curve

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #22252a; --soft: #5d636d; --line: #dcdfe3; --band: #f3f4f5;
  --up: #1a6b45; --down: #a23b1e; --c0: #0b62a4; --c1: #c2500a; --c2: #15795a; --c3: #9a3f86; --c4: #6e6a00;
  --c5: #2b7f9e; --c6: #8a5a44; --c7: #5c5f66; }
@media (prefers-color-scheme: dark) { :root { --paper: #17191c; --ink: #e4e6e9; --soft: #a2a8b1; --line: #363a41;
  --band: #1f2226; --up: #6fcf9f; --down: #f0937a; --c0: #6cb4ee; --c1: #f2a25c; --c2: #5fd0a5; --c3: #e39ad2;
  --c4: #d3cb5a; --c5: #8fd3ea; --c6: #d0a48f; --c7: #b3b7be; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main, header, footer { max-width: 84rem; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 3rem); }
header { padding-top: 2.5rem; }
footer { padding-bottom: 3rem; color: var(--soft); font-size: .85rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 3rem 0 .5rem; font-weight: 650; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; font-weight: 600; overflow-wrap: anywhere; }
p, ul { max-width: 46rem; margin: .4rem 0 .8rem; }
ul { padding-left: 1.2rem; }
li, .note { overflow-wrap: anywhere; }
.note, small, figcaption { color: var(--soft); font-size: .85rem; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; }
.scroll:focus-visible { outline: 2px solid var(--c0); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums lining-nums; font-size: .92rem; }
th, td { padding: .5rem .9rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 1.5px solid var(--ink); font-weight: 600; vertical-align: bottom; }
thead small { display: block; font-weight: 400; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 500; position: sticky; left: 0; background: var(--paper); min-width: 7rem; max-width: 20rem;
  overflow-wrap: anywhere; }
tbody th small { display: block; font-weight: 400; }
td small { display: block; white-space: nowrap; }
td.number { white-space: nowrap; } td.word, th.word { text-align: left; }
tbody tr.base th, tbody tr.base td { color: var(--soft); }
.up { color: var(--up); font-weight: 600; } .down { color: var(--down); font-weight: 600; }
.key { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; list-style: none; padding: 0; max-width: none;
  font-size: .88rem; }
.key svg { width: 30px; height: 10px; vertical-align: middle; margin-right: .4rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); gap: 1.6rem 2rem; }
.sheets { columns: 26rem; column-gap: 1.6rem; } .sheets figure { break-inside: avoid; margin-bottom: 1.6rem; }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 3px; background: #fff; }
figcaption { margin-top: .35rem; }
figure.chart figcaption { color: var(--ink); font-weight: 500; margin: 0 0 .2rem; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg .name { fill: var(--ink); } svg .axis { stroke: var(--line); stroke-width: 1; fill: none; }
svg .curve { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
details { border-top: 1px solid var(--line); padding: .5rem 0; }
summary { cursor: pointer; font-weight: 500; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) minmax(0, 1fr); gap: .15rem 1.2rem;
  font-size: .85rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
@media (max-width: 40rem) { body { font-size: 15px; } th, td { padding: .45rem .6rem; }
  tbody th { max-width: 9rem; } dl { grid-template-columns: minmax(0, 1fr); } dd { margin-bottom: .4rem; } }
@page { size: A4 landscape; margin: 14mm; }
@media print { :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --up: #1a6b45; --down: #a23b1e;
    --c0: #0b62a4; --c1: #c2500a; --c2: #15795a; --c3: #9a3f86; --c4: #6e6a00; --c5: #2b7f9e; --c6: #8a5a44;
    --c7: #5c5f66; color-scheme: light; }
  body { font-size: 10pt; } main, header, footer { max-width: none; padding: 0; }
  section + section { break-before: page; } h2 { margin-top: 0; } h2, h3, summary { break-after: avoid; }
  .scroll { overflow: visible; } table { width: 100%; font-size: 8pt; } th, td { padding: 3pt 4pt; }
  tbody th { position: static; max-width: 60mm; } td small, td.number { white-space: normal; }
  th small, td small { font-size: 7pt; } .grid { grid-template-columns: repeat(3, 1fr); gap: 5mm; }
  .sheets { columns: 2; } thead { display: table-header-group; }
  tr, figure, dl { break-inside: avoid; } figure img { max-height: 165mm; width: auto; }
  details::details-content { content-visibility: visible; block-size: auto; } }
"""
FORM = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    '<link rel="icon" href="data:,">\n<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n'
    "</body>\n</html>\n"
)


class Html(str):
    """Text that is markup already."""


def text(content: object) -> Html:
    """Escaped, unless it is `Html`."""
    return content if isinstance(content, Html) else Html(html.escape(str(content), quote=True))


def tag(name: str, *content: object, **attributes: object) -> Html:
    """<name attribute="...">content</name>, everything escaped; `class_` and `for_` lose their line, others of their
    lines become hyphens. An attribute None is left out."""
    given = {key.strip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    words = "".join(f' {key}="{html.escape(str(value), quote=True)}"' for key, value in given.items())
    return Html(f"<{name}{words}>{joined(content)}</{name}>")


def joined(parts: Sequence[object]) -> Html:
    """One after the other."""
    return Html("".join(text(part) for part in parts))


def document(title: str, header: Sequence[object], sections: Sequence[Html], footer: Sequence[object]) -> str:
    """The whole page."""
    body = [tag("header", *header), tag("main", *sections), tag("footer", *footer)]
    return FORM.format(title=text(title), style=STYLE, body=joined(body))


def section(name: str, *content: object) -> Html:
    """A part of the page, under its heading."""
    return tag("section", tag("h2", name), *content)


def listing(lines: Sequence[object]) -> Html:
    """A list, or nothing."""
    return tag("ul", *(tag("li", line) for line in lines)) if lines else Html("")


# ------------------------------------------------------------------------------------------------------------- tables


def table(
    caption: str,
    header: Sequence[object],
    rows: Sequence[Sequence[object]],
    classes: Sequence[str | None] = (),
    words: int = 1,
) -> Html:
    """A table that scrolls where it is too wide; the first column names the rows. `classes`: of the rows. `words`: how
    many columns are text, to the left; the others are numbers, to the right."""
    kinds = ["word"] * words + ["number"] * (len(header) - words)
    head = tag("tr", *(tag("th", each, scope="col", class_=kind) for each, kind in zip(header, kinds, strict=True)))
    lines = []
    for at, row in enumerate(rows):
        cells = [
            tag("th", row[0], scope="row"),
            *(tag("td", each, class_=kind) for each, kind in zip(row[1:], kinds[1:], strict=True)),
        ]
        lines.append(tag("tr", *cells, class_=classes[at] if at < len(classes) else None))
    whole = tag("table", tag("thead", head), tag("tbody", *lines), aria_label=caption)
    scrolled = tag("div", whole, class_="scroll", role="region", tabindex=0, aria_label=caption)
    return joined([tag("p", caption, class_="note"), scrolled])


def card(title: object, entries: Sequence[tuple[str, object]]) -> Html:
    """Names and values, folded under `title`."""
    pairs = [part for name, value in entries for part in (tag("dt", name), tag("dd", value))]
    return tag("details", tag("summary", title), tag("dl", *pairs))


# ------------------------------------------------------------------------------------------------------------ pictures


def picture(path: Path, alt: str, caption: object) -> Html | None:
    """A figure with the picture in it, or None if it cannot be read."""
    try:
        content = path.read_bytes()
        with open_picture(np.frombuffer(content, np.uint8)) as (image, _):
            image.load()
            kind, size = image.get_format_mimetype(), image.size  # type: ignore[attr-defined]
            if size[0] > WIDEST or kind not in ("image/png", "image/jpeg", "image/webp"):
                smaller = image.convert("RGB")
                smaller.thumbnail((WIDEST, WIDEST * 4))
                aside = io.BytesIO()
                smaller.save(aside, "PNG")
                content, kind, size = aside.getvalue(), "image/png", smaller.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow says of a damaged file
        return None
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    shown = Html(f'<img src="{source}" width="{size[0]}" height="{size[1]}" alt="{html.escape(alt, quote=True)}">')
    return tag("figure", shown, tag("figcaption", caption))


# -------------------------------------------------------------------------------------------------------------- charts


class Curve(NamedTuple):
    """A line of a chart; `number` decides its colour and dashes."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    number: int


class Bar(NamedTuple):
    """A value with its interval."""

    name: str
    value: float
    low: float | None
    high: float | None
    number: int


def key(names: Sequence[str]) -> Html:
    """What the curves are called."""
    return tag(
        "ul",
        *(
            tag("li", Html(f'<svg viewBox="0 0 30 10" aria-hidden="true">{_path([(1, 5), (29, 5)], at)}</svg>'), name)
            for at, name in enumerate(names)
        ),
        class_="key",
    )


def chart(title: str, curves: Sequence[Curve], across: str, percent: bool = False) -> Html:
    """Curves over a common axis `across`; points that are not finite are left out."""
    W, H, left, right, top, bottom = 360, 210, 46, 10, 8, 34
    kept = [Curve(c.name, *_finite(c.x, c.y), c.number) for c in curves]
    kept = [c for c in kept if c.x]
    if not kept:
        return Html("")
    scale = 100 if percent else 1
    xs = [value for c in kept for value in c.x]
    ys = [value * scale for c in kept for value in c.y]
    marks_x, marks_y = ticks(min(xs), max(xs), 4), ticks(min(ys), max(ys), 5)
    x0, x1 = min(xs), max(max(xs), min(xs) + 1e-9)
    y0, y1 = min(marks_y[0], min(ys)), max(marks_y[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across_ = left + (x - x0) / (x1 - x0) * (W - left - right)
        return across_, H - bottom - (y - y0) / (y1 - y0) * (H - top - bottom)

    parts = []
    for mark in marks_y:
        at = place(x0, mark)[1]
        parts.append(f'<path class="axis" d="M{left} {at:.1f}H{W - right}"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{number(mark)}</text>')
    for mark in marks_x:
        if x0 <= mark <= x1:
            at, anchor = place(mark, y0)[0], "middle" if mark < x0 + 0.93 * (x1 - x0) else "end"
            parts.append(f'<text x="{at:.1f}" y="{H - bottom + 15}" text-anchor="{anchor}">{number(mark)}</text>')
    parts.append(f'<text x="{(left + W - right) / 2}" y="{H - 4}" text-anchor="middle">{text(across)}</text>')
    parts += [_path([place(x, y * scale) for x, y in zip(c.x, c.y, strict=True)], c.number, c.name) for c in kept]
    told = "; ".join(f"{c.name}: {number(c.y[0] * scale)} to {number(c.y[-1] * scale)}" for c in kept)
    alt = f"Curves of {title} over {across}. {told}"
    shown = Html(f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{text(alt)}">{"".join(parts)}</svg>')
    return tag("figure", tag("figcaption", title + (" (%)" if percent else "")), shown, class_="chart")


def bars(title: str, found: Sequence[Bar]) -> Html:
    """Values as points with their intervals, one below the other, in percent."""
    W, step, left, right, top = 360, 40, 4, 4, 6
    H = top + step * len(found) + 24
    lows = [100 * (each.value if each.low is None else each.low) for each in found]
    highs = [100 * (each.value if each.high is None else each.high) for each in found]
    marks = ticks(min(lows), max(highs), 5)
    x0, x1 = min(marks[0], min(lows)), max(marks[-1], max(highs))

    def place(value: float) -> float:
        return left + 12 + (value - x0) / (x1 - x0) * (W - left - right - 24)

    parts = []
    for mark in marks:
        at = place(mark)
        parts.append(f'<path class="axis" d="M{at:.1f} {top}V{H - 22}"/>')
        parts.append(f'<text x="{at:.1f}" y="{H - 8}" text-anchor="middle">{number(mark)}</text>')
    for line, (each, low, high) in enumerate(zip(found, lows, highs, strict=True)):
        y, colour = top + step * line + 27, each.number % COLOURS
        parts.append(f'<text class="name" x="{left}" y="{y - 13}">{text(shortened(each.name, 46))}</text>')
        parts.append(
            f'<path class="curve" style="stroke:var(--c{colour})" d="M{place(low):.1f} {y}H{place(high):.1f}"/>'
        )
        parts.append(f'<circle style="fill:var(--c{colour})" cx="{place(100 * each.value):.1f}" cy="{y}" r="4"/>')
    told = "; ".join(
        f"{each.name} {100 * each.value:.1f}, {low:.1f} to {high:.1f}"
        for each, low, high in zip(found, lows, highs, strict=True)
    )
    alt = f"{title} in percent with intervals. {told}"
    shown = Html(f'<svg viewBox="0 0 {W} {H}" role="img" aria-label="{text(alt)}">{"".join(parts)}</svg>')
    return tag("figure", tag("figcaption", title + " (%)"), shown, class_="chart")


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round numbers that reach from below `low` to above `high`, two at least."""
    span = (high - low) or max(abs(high), 1.0) * 0.1
    raw = span / most
    unit = 10 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(at * step, 12) for at in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """Short: 1,200 or 0.25 or 3e-05."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2g}"


def shortened(words: str, most: int) -> str:
    """At most so many letters."""
    return words if len(words) <= most else words[: most - 1] + "…"


def _finite(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Points that are finite, and of many every n-th with the last."""
    points = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    every = -(-len(points) // MOST_POINTS) if points else 1
    some = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
    return [a for a, _ in some], [b for _, b in some]


def _path(points: Sequence[tuple[float, float]], at: int, name: str = "") -> str:
    """A curve, named for who points at it; a single point is a dot."""
    drawn = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in (points if len(points) > 1 else [points[0]] * 2))
    dash = DASHES[(at // COLOURS + at) % len(DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash and len(points) > 1 else ""
    thick = "" if len(points) > 1 else ";stroke-width:6"
    named = f"<title>{text(name)}</title>" if name else ""
    return f'<path class="curve" style="stroke:var(--c{at % COLOURS}){thick}"{dashes} d="{drawn}">{named}</path>'
