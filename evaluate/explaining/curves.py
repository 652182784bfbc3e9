"""Figures of accuracies layer by layer."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from evaluate.job.arguments import LABELS

Values = dict[str, dict[str, Any]]  # row -> layer -> what was found


BLUE, ORANGE, GREY, INK = "#0072b2", "#d55e00", "#6e6e6e", "#222222"  # Okabe and Ito's, told apart by everyone
CURVES = {"subject": (BLUE, "o", "-"), "random": (ORANGE, "s", "--")}  # told apart without colour too


def draw_layers(values: Values, title_and_subtitle: tuple[str, str], notes: Sequence[str], k: int | None) -> Figure:
    """Draw position by layer; with labels (`k` neighbours) meaning too; on one grid, the two against each other."""
    rows = [row for row in CURVES if row in values]
    one_grid = len({tuple(entry["grid"]) for entry in values[rows[0]].values()}) == 1
    panels = 1 if k is None else 3 if one_grid else 2
    width, height = (6.4 if panels == 1 else 1.2 + 3.6 * panels), 3.45
    subtitle = [line for text in (title_and_subtitle[1], *notes) for line in textwrap.wrap(text, int(15.5 * width))]
    head = 0.36 + 0.16 * len(subtitle)  # inches
    figure = Figure(figsize=(width, height + head), layout="constrained", facecolor="white")
    top = 1 - 0.06 / (height + head)
    figure.text(0.1 / width, top, title_and_subtitle[0], ha="left", va="top", size=12, weight="bold", color=INK)
    top -= 0.25 / (height + head)
    figure.text(0.1 / width, top, "\n".join(subtitle), ha="left", va="top", size=8, color=GREY)
    figure.get_layout_engine().set(rect=(0, 0, 1, height / (height + head)), wspace=0.06)  # type: ignore
    axes = figure.subplots(1, panels, squeeze=False)[0]
    depth_name = "block" if one_grid else "stage"
    names = ["Where: place of a single token, linear probe"]
    by_layer(axes[0], values, rows, "position", depth_name)
    if panels > 1:
        names.append(f"What: class of the image, {k}-NN of the mean token")
        by_layer(axes[1], values, rows, "knn", depth_name)
    if panels > 2:
        names.append(f"What against where, {depth_name} by {depth_name}")
        path(axes[2], values, rows)
    for panel, name in zip(axes, names, strict=True):
        panel.set_title(name, loc="left", size=9.5, color=INK)
    return figure


def by_layer(axes: Axes, values: Values, rows: Sequence[str], half: str, depth_name: str) -> None:
    """Plot one half of the question: accuracy (%) over depth, with intervals as bands, from the pixels on."""
    layers = list(values[rows[0]].values())
    pixels = [values["pixels"]["x".join(map(str, entry["grid"]))] for entry in layers]
    at, labels = range(len(layers) + 1), []
    start = pixels[0][half]
    for row in rows:
        colour = CURVES[row][0]
        entries = [start, *(entry[half] for entry in values[row].values())]
        low, high = ([100 * entry["interval"][side] for entry in entries] for side in (0, 1))
        axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
        heights = [100 * entry["accuracy"] for entry in entries]
        curve(axes, at, heights, row)
        labels.append((heights[-1], LABELS[row], colour))
    if half == "position":
        for line, word, heights in (
            ("-.", "pixels of one patch", [100 * entry[half]["accuracy"] for entry in pixels]),
            (":", "chance", [100 * entry["chance"] for entry in layers]),
        ):
            axes.plot(at, [heights[0], *heights], line, color=GREY, linewidth=1.2, drawstyle="steps-mid")
            labels.append((heights[-1], word, GREY))
        axes.set_ylim(0, min(101, 1.08 * axes.get_ylim()[1]))
    else:
        whole = 100 * values["pixels"]["image"][half]["accuracy"]
        axes.axhline(whole, color=GREY, linewidth=1.2, linestyle="-.")
        labels.append((whole, "pixels of the image", GREY))
    axes.plot([0], [100 * start["accuracy"]], "D", color=GREY, markersize=5, zorder=3)
    step = math.ceil(len(layers) / 8)  # further apart than `pixels` is wide
    ticks = [0, *range(step, len(layers) + 1, step)]
    axes.set_xticks(ticks, ["pixels", *map(str, ticks[1:])])
    axes.set_xlabel(depth_name)
    axes.set_ylabel("accuracy (%)")
    dress(axes)
    beside(axes, labels)


def path(axes: Axes, values: Values, rows: Sequence[str]) -> None:
    """Plot the two halves against each other: a point for every layer, joined in the order of depth."""
    start = next(iter(values["pixels"].values()))
    for row in rows:
        colour = CURVES[row][0]
        positions, meanings = (
            [100 * entry[half]["accuracy"] for entry in (start, *values[row].values())] for half in ("position", "knn")
        )
        curve(axes, positions, meanings, row)
        last = len(positions) - 1
        for number, word, offset in ((1, "1", (-7, 5)), (last, f"{last}  {LABELS[row]}", (7, -3))):
            at = (positions[number], meanings[number])
            text = axes.annotate(word, at, offset, textcoords="offset points", size=8, color=colour)
            text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])  # readable where it meets a line
    x, y = 100 * start["position"]["accuracy"], 100 * start["knn"]["accuracy"]
    axes.plot([x], [y], "D", color=GREY, markersize=5, zorder=3)
    axes.annotate("pixels of patches", (x, y), (8, 0), textcoords="offset points", va="center", size=8, color=GREY)
    axes.set_xlabel("position accuracy (%)")
    axes.set_ylabel("class accuracy (%)")
    axes.margins(0.08)
    dress(axes)


def curve(axes: Axes, xs: Sequence[float], ys: Sequence[float], row: str) -> None:
    """Plot a row of the table as a line, marked at every layer but not at the pixels it begins with."""
    colour, marker, line = CURVES[row]
    axes.plot(xs, ys, line, color=colour, marker=marker, markersize=4.5, linewidth=1.6, markevery=slice(1, None))


def dress(axes: Axes) -> None:
    """Keep only the lines that help to read a value."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelcolor=INK, labelsize=8, color=GREY)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(size=9, color=INK)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def beside(axes: Axes, labels: Sequence[tuple[float, str, str]], gap: float = 0.062) -> None:
    """Write (height, word, colour) right of the curves they belong to, `gap` of the axis apart at least."""
    low, high = axes.get_ylim()
    places: list[float] = []
    for height, *_ in sorted(labels):
        wished = (height - low) / (high - low)
        places.append(max(wished, places[-1] + gap) if places else wished)
    down = max(0.0, places[-1] - 1)  # a stack that ends above the axis would run into the title
    for place, (_, word, colour) in zip(places, sorted(labels), strict=True):
        axes.annotate(
            word, (1.02, place - down), xycoords="axes fraction", va="center", size=8, color=colour,
            annotation_clip=False,
        )  # fmt: skip
