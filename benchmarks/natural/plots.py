"""Pictures of the table of equal time, made only from what is stored: curves, and positions beside features."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.natural.rows import BASELINES, PEERS, ROWS

COLOURS = {
    "absolute": "#0b62a4", "relative": "#c2500a", "MP3": "#15795a", "Jigsaw-ViT": "#2b9f8e", "DropPos": "#6e6a00",
    "DINO": "#9a3f86", "SIGReg": "#c23b4e", "lightly": "#5c5f66",
}  # fmt: skip  # by how a name begins
DASHES: tuple[Any, ...] = ("solid", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1)))
MARKS = ("o", "s", "^", "D", "v")
GREY = {"untrained": "solid", "pixels": (0, (5, 2)), "patches": (0, (1, 1.5))}
TITLES = {"field": "the field's readout", "quarters": "quarters"}
STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "poslabel"}


def look(name: str) -> tuple[str, Any, str]:
    """(colour, dashes, mark) of a row: one colour for each family, dashes and marks in the family's order."""
    family = next(start for start in COLOURS if name.startswith(start))
    at = [each for each in (*ROWS, *PEERS) if each.startswith(family)].index(name)
    return COLOURS[family], DASHES[at % len(DASHES)], MARKS[at % len(MARKS)]


def mean_curve(runs: Sequence[Any], readout: str) -> list[tuple[int, float]]:
    """[(eighths of the training, k-NN accuracy in percent)], the mean over seeds."""
    by_seed = [dict(run.curve) for run in runs]
    return [(at, 100 * statistics.fmean(curve[at][readout] for curve in by_seed)) for at in by_seed[0]]


def curves(runs: Mapping[str, Mapping[int, Any]], minutes: float, batch: int) -> Figure:
    """k-NN accuracy over minutes and over images seen, in both readouts: a line for each row, the mean over seeds."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    panels = figure.subplots(2, 2, sharey="row")
    for axes_of, (readout, title) in zip(panels, TITLES.items(), strict=True):
        for axes, images in zip(axes_of, (False, True), strict=True):
            for name in (name for name in (*ROWS, *PEERS) if name in runs):
                of_row = list(runs[name].values())
                points = mean_curve(of_row, readout)
                full = of_row[0].training["steps"] * batch / 1000 if images else minutes
                colour, dashes, mark = look(name)
                axes.plot(
                    [full * at / 8 for at, _ in points], [y for _, y in points],
                    color=colour, linestyle=dashes, marker=mark, markersize=3.5, linewidth=1.2, label=name,
                )  # fmt: skip
            for name in (name for name in BASELINES if name in runs):
                level = 100 * statistics.fmean(run.right["knn", readout].mean() for run in runs[name].values())
                axes.axhline(level, color="#8b9098", linestyle=GREY[name], linewidth=1, label=name)
            axes.set_xlabel("images seen (thousands)" if images else "minutes of training")
            axes.set_title(f"{title}, at equal {'images' if images else 'time'}", loc="left", fontsize=9)
            axes.set_xlim(left=0)
        axes_of[0].set_ylabel("k-NN accuracy (%)")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def positions(runs: Mapping[str, Mapping[int, Any]]) -> Figure:
    """Linear probe over position accuracy, a point for each run that is asked for places."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (readout, title) in zip(panels, TITLES.items(), strict=True):
        for name in (name for name in ROWS if name in runs):
            points = [
                (100 * run.position, 100 * float(run.right["linear", readout].mean()))
                for run in runs[name].values()
                if run.position is not None
            ]
            if points:
                colour, _, mark = look(name)
                axes.scatter(*zip(*points, strict=True), s=26, color=colour, marker=mark, alpha=0.8, label=name)
        axes.set_xlabel("position accuracy on held-out images (%)")
        axes.set_ylabel("linear probe (%)")
        axes.set_title(title, loc="left", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    return figure


def draw(runs: Mapping[str, Mapping[int, Any]], minutes: float, batch: int, folder: Path) -> list[Path]:
    """Write natural_curves.png and natural_positions.png; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with rc_context(STYLE):
        for name, figure in (("curves", curves(runs, minutes, batch)), ("positions", positions(runs))):
            paths.append(folder / f"natural_{name}.png")
            figure.savefig(paths[-1], dpi=150, metadata={"Software": None})
    return paths
