"""Pictures of images beside their label maps, to look at before anything is trained on them."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from common.batches.unreadable import NO_LIMIT
from common.checkpoints.storage import write_atomically
from common.data import Images, Unreadable
from common.data.images import evenly
from pretrain.token_labels.maps import unpack
from pretrain.token_labels.packed import header_of
from pretrain.token_labels.reader import PackedLabels, open_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LONGEST = 40  # letters of an image's name
NAMED = 5  # classes that a picture names
COLOURS = 10  # of matplotlib's map; further classes are grey


def draw(file: Path, images: Images, count: int) -> Path:
    """Draw `count` of the images, evenly spaced, each beside its labels, into FILE.png; returns its path.

    Each cell has the colour of its best class, stronger the surer it is. Raises Refusal as `open_labels` does.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    labels = open_labels(file, images, header_of(file)[0].classes, NO_LIMIT)
    assert isinstance(labels, PackedLabels)
    names = labels.packed.header.class_names or []
    if not names and len(images.classes or ()) == labels.classes:  # probably the same, in the same order
        names = [f"({name})" for name in images.classes or ()]
    chosen = evenly(len(images), count)
    figure = Figure(figsize=(9, 2.6 * len(chosen)), layout="constrained")
    axes = figure.subplots(len(chosen), 3, squeeze=False, width_ratios=(1, 1, 0.9))
    for i, (left, right, text) in zip(chosen, axes, strict=True):
        for one in (left, right, text):
            one.set_axis_off()
        name = images.name(i)
        left.set_title(name if len(name) <= LONGEST else f"…{name[-LONGEST:]}", fontsize=7)
        try:
            pixels = images.read(i, 3).permute(1, 2, 0).numpy()
            left.imshow(pixels)
            _draw_map(right, text, pixels, labels, images.source_index(i), names)
        except Unreadable as error:
            text.text(0, 0.5, error.reason, fontsize=7, wrap=True)
    figure.suptitle(f"{labels.annotator}, {labels.grid[0]}x{labels.grid[1]} cells", fontsize=9)
    path = file.with_name(f"{file.name}.png")
    write_atomically(path, lambda aside: figure.savefig(aside, format="png", dpi=110))
    return path


def _draw_map(
    axes: "Axes", legend: "Axes", pixels: np.ndarray, labels: PackedLabels, i: int, names: Sequence[str]
) -> None:
    import matplotlib

    scores, ids = (each[0] for each in unpack(torch.from_numpy(np.array(labels.read(i)["record"]))[None]))
    scores, best_ids = scores.float(), ids[0].numpy()
    if rest := labels.classes - labels.top:  # classes that are not kept have logit 0, as a training sees them
        scores = torch.cat([scores, torch.full_like(scores[:1], math.log(rest))])
    sure = scores.softmax(0)[0].numpy()
    best, counts = np.unique(best_ids, return_counts=True)
    order = best[np.argsort(-counts, kind="stable")].tolist()
    colour_of = {each: matplotlib.colormaps["tab10"](rank)[:3] for rank, each in enumerate(order[:COLOURS])}
    cells = np.array([[colour_of.get(each, (0.5, 0.5, 0.5)) for each in row] for row in best_ids.tolist()])
    top, left, height, width = _extent(labels, *pixels.shape[:2])
    axes.imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=255)
    extent = (left - 0.5, left + width - 0.5, top + height - 0.5, top - 0.5)
    axes.imshow(np.dstack([cells, 0.2 + 0.6 * sure]), extent=extent, interpolation="nearest")
    axes.set_xlim(-0.5, pixels.shape[1] - 0.5)
    axes.set_ylim(pixels.shape[0] - 0.5, -0.5)
    for line, each in enumerate(order[:NAMED]):
        share, mean = (best_ids == each).mean(), sure[best_ids == each].mean()
        name = f"{each} {names[each]}" if names else f"class {each}"
        legend.text(0, 0.9 - 0.17 * line, "■", color=colour_of[each], fontsize=12, va="center")
        legend.text(0.1, 0.9 - 0.17 * line, f"{name}: {share:.0%} of cells, {mean:.0%} sure", fontsize=7, va="center")


def _extent(labels: PackedLabels, height: int, width: int) -> tuple[float, float, float, float]:
    """Pixels of an image that its map covers: top, left, height, width."""
    if labels.crop is None:
        return 0.0, 0.0, float(height), float(width)
    zoom = max(int(labels.size[0] / labels.crop) / height, int(labels.size[1] / labels.crop) / width)
    h, w = labels.size[0] / zoom, labels.size[1] / zoom
    return (height - h) / 2, (width - w) / 2, h, w
