"""A sheet of segmented images: each image, its truth and what a model says, and the colours of the classes.

Letters: C classes, H x W pixels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data.images import with_channels
from evaluate.segmenting.data import IGNORED, Scenes
from evaluate.segmenting.inference import SINGLE, View, pairs, segment

SHOWN = 6
LISTED = 40  # classes in the legend, at most
NUMBERED = 0.01  # share of the image from which on a class is numbered in it
# Okabe and Ito's eight colours, which people of every colour vision tell apart; black is the first class's
FIRST = (0, 0, 0)
OKABE_ITO = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))
NO_CLASS = (128, 128, 128)


def palette(count: int) -> np.ndarray:
    """Colours of C classes, uint8 (C, 3): black, Okabe and Ito's colours, then the same lighter, darker, lighter still:
    as no palette tells more than a dozen classes apart, they are numbered in the pictures too."""
    colours: list[Any] = [FIRST]
    for k in range(count - 1):
        turn, at = divmod(k, len(OKABE_ITO))
        share, end = 1 - 0.5 ** ((turn + 1) // 2), 255 * (turn % 2)
        colours.append([round(value + (end - value) * share) for value in OKABE_ITO[at]])
    return np.array(colours[:count], np.uint8)


def coloured(classes: Tensor, count: int) -> np.ndarray:
    """Colour class indices (H, W): uint8 (H, W, 3); pixels without a class are grey."""
    colours = np.concatenate([palette(count), [NO_CLASS]]).astype(np.uint8)
    return colours[np.where(classes.numpy() == IGNORED, count, classes.numpy())]


@torch.no_grad()
def sheet(
    model: nn.Module, scenes: Scenes, view: View, channels: int, device: torch.device, shown: int = SHOWN
) -> np.ndarray:
    """Draw so many of the images, evenly chosen, with masks and what `model` gives: uint8 (H, W, 3)."""
    rows = np.unique(np.linspace(0, len(scenes) - 1, min(shown, len(scenes))).round().astype(int)).tolist()
    model.eval()
    examples = []
    for _, image, mask in pairs(scenes, rows, channels):
        if mask is not None:
            predicted = segment(model, image.to(device), view)[SINGLE].cpu()
            examples.append((with_channels(image, 3).permute(1, 2, 0).numpy(), mask, predicted))
    return _drawn(examples, scenes.classes or ())


def _drawn(examples: Sequence[tuple[np.ndarray, Tensor, Tensor]], classes: Sequence[str]) -> np.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # no pyplot, which would keep the figure and ask for a display
    from matplotlib.patches import Patch

    C, colours = len(classes), [tuple(colour) for colour in (palette(len(classes)) / 255).tolist()]
    figure = Figure((1.7 * len(examples) + 2.4, 5.4), dpi=110, layout="constrained")
    axes = figure.subplots(3, max(1, len(examples)), squeeze=False)
    for row, name in enumerate(("image", "truth", "prediction")):
        axes[row][0].set_ylabel(name, size=10)
    classes_drawn: set[int] = set()
    for (picture, mask, predicted), column in zip(examples, axes.T, strict=False):
        column[0].imshow(picture)
        for panel, values in zip(column[1:], (mask, predicted), strict=True):
            panel.imshow(coloured(values, C), interpolation="nearest")
            classes_drawn |= _number(panel, values)
        for panel in column:
            panel.set(xticks=[], yticks=[])
    listed = sorted(classes_drawn)[:LISTED]
    handles = [Patch(facecolor=colours[k], edgecolor="0.5", label=f"{k} {classes[k]}") for k in listed]
    handles.append(Patch(facecolor=(0.5, 0.5, 0.5), edgecolor="0.5", label="not labelled"))
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False, ncols=1 + len(listed) // 22)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _number(panel: Any, values: Tensor) -> set[int]:
    """Write the number of each larger class where it lies; returns the classes that occur."""
    from matplotlib.patheffects import withStroke

    classes = {int(k) for k in values.unique() if k != IGNORED}
    for k in classes:
        places = torch.nonzero(values == k)
        if len(places) >= NUMBERED * values.numel():
            middle = places[(places - places.double().mean(0)).square().sum(1).argmin()]
            edge = [withStroke(linewidth=1.5, foreground="black")]
            panel.text(int(middle[1]), int(middle[0]), str(k), size=7, color="white", ha="center", va="center",
                       path_effects=edge)  # fmt: skip
    return classes
