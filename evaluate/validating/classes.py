"""What a classifier said of each class: counts, a table, a file, and the picture of what is taken for what.

Letters: n images, C classes of the data, k likeliest classes of an image.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.checkpoints.storage import write_atomically
from common.features.metrics import wilson
from evaluate.job.report import table

SHOWN = 10  # classes on the screen: all, or those that fare worst
NAMED, NUMBERED = 60, 20  # classes up to which the picture names them, and writes numbers
DPI = 110
NONE = "none of these"  # what a classifier says that knows more classes than the data


def counts(labels: np.ndarray, said: np.ndarray, num_classes: int) -> np.ndarray:
    """Count (C, C + 1) images of each class (row) that were taken for each (column); the last column is for none of
    them, which is -1 in `said` (n,)."""
    table = np.zeros((num_classes, num_classes + 1), np.int64)
    np.add.at(table, (labels, said), 1)
    return table


def by_class(confusion: np.ndarray, in_top: np.ndarray | None, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Describe each class: how many images it has and was said of, the share of them that is right with its interval,
    the share whose class is among the likeliest five (`in_top` (C,) of them), and what else it is taken for most."""
    rows = []
    for k, name in enumerate(classes):
        images, wrong = int(confusion[k].sum()), confusion[k].copy()
        right, wrong[k] = int(confusion[k, k]), 0
        other = int(wrong.argmax())
        row = {"class": name, "images": images, "predicted": int(confusion[:, k].sum()), "right": right}
        row |= {"top1": right / images, "interval": list(wilson(right / images, images))} if images else {}
        row |= {"top5": int(in_top[k]) / images} if images and in_top is not None else {}
        row |= {"mistaken_for": (*classes, NONE)[other], "mistaken": int(wrong[other])} if wrong[other] else {}
        rows.append(row)
    return rows


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """Format the table of classes, of many those that fare worst."""
    judged = [row for row in rows if row["images"]]
    some = judged if len(judged) <= SHOWN else sorted(judged, key=lambda row: row["top1"])[:SHOWN]
    lines = []
    for row in some:
        low, high = row["interval"]
        mistaken = f"{row['mistaken_for']} ({row['mistaken']})" if "mistaken" in row else ""
        share = f"{100 * row['top1']:.1f}"
        lines.append([row["class"], mistaken, str(row["images"]), share, f"{100 * low:.1f}-{100 * high:.1f}"])
    few = f"\nthe {SHOWN} of {len(judged)} classes that fare worst" if len(some) < len(judged) else ""
    return table(["class", "most taken for", "images", "top-1", "95 %"], lines) + few


def write_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of numbers as a CSV file, a column for each of their names; intervals become two columns."""
    flat = []
    for row in rows:
        pairs = {name: each for name, each in row.items() if isinstance(each, list)}
        ends = {f"{name}_{end}": pair[at] for name, pair in pairs.items() for at, end in enumerate(("low", "high"))}
        flat.append({name: each for name, each in row.items() if name not in pairs} | ends)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = text.getvalue().encode("utf-8", errors="backslashreplace")
    write_atomically(file, lambda aside: aside.write_bytes(content))


def draw(file: Path, confusion: np.ndarray, classes: Sequence[str], title: str) -> None:
    """Draw what is taken for what into a PNG `file`: each row the shares of the images of a class."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure  # no pyplot, which would keep the figure and ask for a display

    whole = confusion if confusion[:, -1].any() else confusion[:, :-1]
    columns, totals = [*classes, NONE][: whole.shape[1]], whole.sum(1, keepdims=True)
    shares = whole / np.maximum(totals, 1)
    side = min(12.0, 3.0 + 0.35 * len(classes)) if len(classes) <= NAMED else 9.0
    figure = Figure((side + 1.2, side), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    # half of the colours for shares below a quarter: what is seldom taken for something else shall be seen
    seen = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0.0, 1.0), interpolation="nearest", aspect="auto")
    figure.colorbar(seen, ax=axes, label="share of the images of a class")
    axes.set(xlabel="taken for", ylabel="class")
    axes.set_title(title.replace("$", r"\$"), fontsize=9)
    if len(classes) <= NAMED:
        axes.set_xticks(range(len(columns)), [name.replace("$", r"\$")[:24] for name in columns], rotation=90)
        axes.set_yticks(range(len(classes)), [name.replace("$", r"\$")[:24] for name in classes])
        axes.tick_params(labelsize=8)
    if len(classes) <= NUMBERED:
        for (row, column), share in np.ndenumerate(shares):
            if share:
                colour = "white" if share > 0.4 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", size=7, color=colour)
    canvas = FigureCanvasAgg(figure)
    write_atomically(file, lambda aside: canvas.print_png(str(aside)))
