"""Plots of a comparison as SVG, by matplotlib: curves over a common axis, and values with their intervals.

The colours of a plot are names of the page's style, so that it follows light and dark screens; its text is text.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

from common.printable import printable

# the page's --c0 to --c7
PALETTE = ("#0b62a4", "#c2500a", "#15795a", "#9a3f86", "#6e6a00", "#2b7f9e", "#8a5a44", "#5c5f66")
DASHES: tuple[Any, ...] = ("solid", (0, (4, 2)), (0, (1.3, 2)), (0, (5, 2, 1.3, 2)))
INK, SOFT, LINE = "#22252a", "#5d636d", "#dcdfe3"
VARIABLES = {INK: "--ink", SOFT: "--soft", LINE: "--line"} | {colour: f"--c{at}" for at, colour in enumerate(PALETTE)}
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "poslabel", "text.parse_math": False}
STYLE |= {"font.size": 8, "font.family": "sans-serif"}
OF_A_FILE = (  # what an SVG that is a file of its own needs, and one of several on a page must not have, or not twice
    *(r"<metadata>.*?</metadata>|<!--.*?-->|<style.*?</style>|<clipPath.*?</clipPath>", r' clip-path="[^"]*"'),
    *(r' (?:xmlns(?::xlink)?|version)="[^"]*"', r' id="[^"]*[_.][^"]*"', r" font-family: [^;]*;", r"(?<=\n)\s+"),
)
WIDTH, MOST_POINTS, LONGEST = 3.75, 400, 46  # inches; points of a curve; letters of a name


class Curve(NamedTuple):
    """A line of a plot; `number` decides its colour and dashes."""

    name: str
    points: Sequence[tuple[float, float]]
    number: int


class Bar(NamedTuple):
    """A value with its interval, as shares."""

    name: str
    value: float
    low: float | None
    high: float | None
    number: int


class Plot(NamedTuple):
    """A drawn plot: its title, what it shows in words, and the <svg> element."""

    title: str
    alt: str
    svg: str


def curves(title: str, lines: Sequence[Curve], across: str, percent: bool = False) -> Plot | None:
    """Draw curves over the axis `across`; points that are not finite are left out. None where no point is left."""
    scale = 100 if percent else 1
    kept = [(line, x, y) for line in lines for x, y in [_finite(line.points, scale)] if x]
    if not kept:
        return None
    ends = "; ".join(f"{line.name}: {number(y[0])} to {number(y[-1])}" for line, _, y in kept)

    def draw(axes: Any) -> None:
        for line, x, y in kept:
            axes.plot(x, y, marker="o" if len(x) == 1 else "", **_look(line.number))
        axes.set_xlabel(across)
        axes.grid(axis="y", color=LINE, linewidth=0.7)

    heading = title + (" (%)" if percent else "")
    return Plot(heading, f"Curves of {title} over {across}. {ends}", _svg(draw, 2.2))


def intervals(title: str, values: Sequence[Bar]) -> Plot:
    """Draw values as points with their intervals, one below the other, in percent."""
    spans = [[100 * (bar.value if end is None else end) for end in (bar.low, bar.high)] for bar in values]
    words = "; ".join(
        f"{bar.name} {100 * bar.value:.1f}, {low:.1f} to {high:.1f}"
        for bar, (low, high) in zip(values, spans, strict=True)
    )

    def draw(axes: Any) -> None:
        for line, (bar, span) in enumerate(zip(values, spans, strict=True)):
            look = _look(bar.number) | {"linestyle": "solid"}
            axes.plot(span, [-line, -line], **look)
            axes.plot([100 * bar.value], [-line], marker="o", **look)
            name = printable(bar.name)  # a font has no halves of characters
            name = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
            axes.text(0, -line + 0.3, name, color=INK, transform=axes.get_yaxis_transform())
        axes.set_ylim(-len(values) + 0.5, 0.8)
        axes.set_yticks([])
        axes.grid(axis="x", color=LINE, linewidth=0.7)

    return Plot(f"{title} (%)", f"{title} in percent with intervals. {words}", _svg(draw, 0.35 + 0.42 * len(values)))


def key(at: int) -> str:
    """The line of a curve's colour and dashes, for a list of names."""

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 0], **_look(at))
        axes.axis("off")

    return _svg(draw, 0.1, width=0.3)


def number(value: float) -> str:
    """Write a number shortly: 1,200 or 0.25 or 3e-05."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2g}"


def _look(at: int) -> dict[str, Any]:
    dashes = DASHES[(at // len(PALETTE) + at) % len(DASHES)]
    look = {"color": PALETTE[at % len(PALETTE)], "linestyle": dashes}
    return look | {"linewidth": 1.5, "markersize": 5, "clip_on": False}


def _finite(points: Sequence[tuple[float, float]], scale: float) -> tuple[list[float], list[float]]:
    """Keep the finite points, and of many every n-th with the last."""
    points = [(a, b * scale) for a, b in points if math.isfinite(a) and math.isfinite(b)]
    every = -(-len(points) // MOST_POINTS) if points else 1
    some = points[::every] + ([points[-1]] if (len(points) - 1) % every else [])
    return [a for a, _ in some], [b for _, b in some]


def _svg(draw: Any, height: float, width: float = WIDTH) -> str:
    """The <svg> element of what `draw(axes)` draws, the same on every call, without what a page of several has once."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0, colors=SOFT)
        axes.xaxis.label.set_color(SOFT)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = file.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    for pattern in OF_A_FILE:
        drawn = re.sub(pattern, "", drawn, flags=re.DOTALL)
    opening, _, rest = drawn.partition(">")
    drawn = re.sub(r' (?:width|height)="[^"]*"', "", opening) + ">" + rest  # the page says how wide
    for colour, variable in VARIABLES.items():
        drawn = drawn.replace(colour, f"var({variable})")
    return drawn.strip()
