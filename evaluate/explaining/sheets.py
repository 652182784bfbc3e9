"""Sheets of images with attention and attributions, of nearest images, and the curves of deletion."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from common.batches.unreadable import NO_LIMIT
from common.features.extraction import shown
from evaluate.explaining.attribution import SHARES, components
from evaluate.explaining.curves import BLUE, GREY, INK, ORANGE
from evaluate.explaining.observation import NEIGHBORS, Observation
from evaluate.job.evaluation import Evaluation

CELL, GAP, DPI = 112, 6, 110  # pixels of an image on a sheet, between two, and in an inch
GREEN, PURPLE = "#009e73", "#cc79a7"
CURVES = {
    "attention": (BLUE, "o"),
    "rollout": (GREEN, "s"),
    "gradient x attention": (ORANGE, "^"),
    "transformer attribution": (PURPLE, "D"),
    "random": (GREY, ""),
}


def draw_sheets(
    job: Evaluation,
    observation: Observation,
    areas: Mapping[str, Any],
    curves: Mapping[str, Tensor],
) -> dict[str, Figure]:
    """Draw all sheets, by name."""
    name, grid = named(job), observation.grid
    whole = "class token" if observation.by_class else "patches, on average"
    pictures = [cell(image) for image in observation.images[: len(observation.tokens)]]
    colours = [enlarged(patches.view(*grid, 3)) for patches in components(observation.tokens)]
    rows = [
        [picture, *(overlaid(picture, maps[at].view(grid)) for maps in observation.maps.values()), colours[at]]
        for at, picture in enumerate(pictures)
    ]
    titles = ["image", *observation.maps, "patch features"]
    subtitle = (
        f"Attention is that of the {whole}. Bright is most, in each image. Target: {observation.target_in_words}."
    )
    basis = "Patch features: first three principal components as red, green, blue; one basis for the sheet."
    sheets = {"maps": mosaic(rows, titles, f"What matters to {name}", f"{subtitle} {basis}")}
    heads = observation.heads.shape[1]
    rows = [
        [picture, *(overlaid(picture, head.view(grid)) for head in observation.heads[at])]
        for at, picture in enumerate(pictures)
    ]
    titles = ["image", *(f"head {number + 1}" for number in range(heads))]
    sheets["heads"] = mosaic(rows, titles, f"Attention by head: {name}", f"Of the {whole}, in the last block.")
    sheets["neighbors"] = neighbors(job, observation, name)
    sheets["deletion"] = deletion_curves(
        areas, curves, f"{name}: {observation.target_in_words}", len(observation.images)
    )
    return sheets


def named(job: Evaluation) -> str:
    """Name of a backbone on a sheet, which says where it is untrained."""
    return job.subject.name if job.subject.state is not None else f"{job.subject.description['name']}, untrained"


def beside(observations: Mapping[str, Observation]) -> Figure:
    """Draw backbones, by name, side by side: the last attribution of each, over what it saw of the image."""
    methods = {name: list(observation.maps)[-1] for name, observation in observations.items()}
    first = next(iter(observations.values()))
    rows = [[cell(image)] for image in first.images[: len(first.tokens)]]
    for name, observation in observations.items():
        for row, image, heat in zip(rows, observation.images, observation.maps[methods[name]], strict=False):
            row.append(overlaid(cell(image), heat.view(observation.grid)))
    targets = {name: observation.target_in_words for name, observation in observations.items()}
    about = f"{_once(methods)}. Bright is most, in each image. Target: {_once(targets)}."
    return mosaic(rows, ["image", *methods], "What matters to each", about[0].upper() + about[1:])


def _once(words: Mapping[str, str]) -> str:
    """What all say, or what each says."""
    said = set(words.values())
    return said.pop() if len(said) == 1 else "; ".join(f"{name}: {each}" for name, each in words.items())


def neighbors(job: Evaluation, observation: Observation, name: str) -> Figure:
    """Draw the sheet of nearest training images; frames tell whether the class is the same."""
    labels = (job.train.labels, job.test.labels) if job.classes else None
    rows, same = [], []
    for at in range(len(observation.tokens)):
        places = observation.references["index"][observation.neighbors[at].cpu()].tolist()
        near = job.train.subset(places)
        batches = shown(near, replace(job.eye, workers=0, limit=NO_LIMIT))
        cells = [cell(image) for batch, _ in batches for image in batch]
        if labels is not None:
            alike = [bool(labels[0][place] == labels[1][int(observation.index[at])]) for place in places]  # type: ignore[index]
            cells = [
                framed(picture, GREEN if same_class else ORANGE)
                for picture, same_class in zip(cells, alike, strict=True)
            ]
            same += alike
        rows.append([cell(observation.images[at]), *cells])
    kind = "class tokens" if observation.by_class else "mean patches"
    subtitle = f"By the cosine of {kind}, centred, among {len(job.train):,} images."
    if same:
        subtitle += f" Green frame: of the same class ({100 * sum(same) / len(same):.0f} %), orange: of another."
    return mosaic(rows, ["image", *map(str, range(1, NEIGHBORS + 1))], f"Nearest training images: {name}", subtitle)


def cell(image: Tensor) -> np.ndarray:
    """Fit a uint8 image (C, H, W) into a white cell (CELL, CELL, 3) in [0, 1]."""
    picture = (image.expand(3, -1, -1) if len(image) == 1 else image[:3]).permute(1, 2, 0).float() / 255
    return enlarged(picture)


def enlarged(values: Tensor, smooth: bool = False) -> np.ndarray:
    """Enlarge (h, w, 3) to (CELL, CELL, 3) by the nearest pixel, or smoothly; a narrow one is centred on white."""
    h, w = values.shape[:2]
    size = round(CELL * h / max(h, w)), round(CELL * w / max(h, w))
    mode: dict[str, Any] = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest-exact"}
    large = F.interpolate(values.permute(2, 0, 1)[None].float().cpu(), size=size, **mode)[0].permute(1, 2, 0)
    top, left = (CELL - size[0]) // 2, (CELL - size[1]) // 2
    canvas = np.ones((CELL, CELL, 3), np.float32)
    canvas[top : top + size[0], left : left + size[1]] = large.clamp(0, 1).numpy()
    return canvas


def overlaid(picture: np.ndarray, heat: Tensor) -> np.ndarray:
    """Lay heat (h, w), stretched to [0, 1], in colour over the grey picture (CELL, CELL, 3)."""
    low, high = heat.min(), heat.max()
    stretched = (heat - low) / (high - low).clamp(min=1e-12)
    smooth = enlarged(stretched[..., None].expand(-1, -1, 3), smooth=True)[..., 0]
    grey = picture.mean(-1, keepdims=True)
    return 0.35 * grey + 0.65 * colormaps["inferno"](smooth)[..., :3]


def framed(picture: np.ndarray, colour: str) -> np.ndarray:
    """Frame the picture."""
    edged, thick = np.empty_like(picture), 4
    edged[:] = to_rgb(colour)
    edged[thick:-thick, thick:-thick] = picture[thick:-thick, thick:-thick]
    return edged


def mosaic(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], title: str, subtitle: str) -> Figure:
    """Put cells in rows and columns under a title and column titles, one pixel of a cell to one of the sheet."""
    step = CELL + GAP
    width, height = len(titles) * step + GAP, len(rows) * step
    lines = textwrap.wrap(subtitle, max(40, width // 6))
    column_titles = [textwrap.wrap(word, 16) for word in titles]
    above = 12 + 12 * max(map(len, column_titles))  # pixels of the column titles
    head = 34 + 14 * len(lines) + above
    canvas = np.ones((head + height, width, 3), np.float32)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            canvas[head + i * step : head + i * step + CELL, GAP + j * step : GAP + j * step + CELL] = picture
    figure = Figure((width / DPI, (head + height) / DPI), dpi=DPI)
    figure.figimage(canvas, origin="upper")
    total = head + height
    text = partial(figure.text, va="top", color=INK)
    text(GAP / width, 1 - 8 / total, title, size=11, weight="bold")
    text(GAP / width, 1 - 30 / total, "\n".join(lines), size=7.5, color=GREY, linespacing=1.25)
    for j, parts in enumerate(column_titles):
        place = (GAP + j * step + CELL / 2) / width, 1 - (head - 8) / total
        figure.text(*place, "\n".join(parts), size=8, ha="center", va="baseline", color=INK, linespacing=1.1)
    return figure


def deletion_curves(areas: Mapping[str, Any], curves: Mapping[str, Tensor], title: str, images: int) -> Figure:
    """Plot the score over the share of patches that were deleted."""
    figure = Figure((6.4, 4.0), dpi=DPI, layout="constrained")
    axes: Axes = figure.subplots()
    percent = [100 * share for share in SHARES]
    for name in (name for name in CURVES if name in curves):
        (colour, marker), curve = CURVES[name], curves[name]
        mean, half = curve.mean(0), 1.96 * curve.std(0) / len(curve) ** 0.5
        label = f"{name}, area {areas[name]['area']:.3f}"
        axes.plot(percent, mean, color=colour, marker=marker, markersize=4, linewidth=1.6, label=label)
        axes.fill_between(percent, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0)
    axes.set_xlabel("patches deleted, most relevant first (%)", size=9, color=INK)
    axes.set_ylabel("score", size=9, color=INK)
    axes.set_title("\n".join(textwrap.wrap(f"{title}; {images} images, 95 % bands", 80)), size=9, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=8)
    return figure
