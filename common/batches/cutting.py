"""Crops of the images of a batch as they are read: made at once, or decided upon and left to the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .crops import Cut, Placed, cut, decide
from .device import CHANGES, MOST_CHANGES, How, Uncut
from .strong import Colours, Moves, strengthen
from .views import FIRST_VIEW, View, height_width

Size = tuple[int, int]  # height, width
CropDraws = dict[str, list[list[float]]]  # name of a view -> a row for each of its crops
Key = tuple[int, int]  # epoch and index of a sample


class Cutting:
    """Makes the crops of one image after the other: in a worker, pixel by pixel the same whoever does it."""

    def __init__(self, views: Mapping[str, View], seed: int, colours: Colours) -> None:
        self.views, self.seed, self.colours = views, seed, colours
        self.crops: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(v.count)] for name, v in views.items()}

    def add(self, key: Key, image: Tensor, whole: Size, rows: CropDraws) -> tuple[Placed | None, Moves]:
        """Cut the next image, uint8 (C, H, W), whose size was `whole` before it was reduced, by the `rows` of draws of
        its crops; return where the first crop of the first view lies, and how a policy moved it."""
        first: tuple[Placed | None, Moves] = None, []
        for name, view in self.views.items():
            for number, made in enumerate(self.crops[name]):
                crop, placed = cut(image, view, rows[name][number], number, whole)
                is_first = name == FIRST_VIEW and number == 0
                where = "" if is_first else f" {name} {number}"
                crop, moves = strengthen(crop, view, (self.seed, *key), where, self.colours)
                made.append(crop)
                first = (placed, moves) if is_first else first
        return first

    def done(self) -> tuple[dict[str, Tensor], Uncut | None]:
        """Return ({name of a view: uint8 (count * B, C, h, w), crop-major}, None)."""
        return {name: torch.stack([crop for row in rows for crop in row]) for name, rows in self.crops.items()}, None


class Uncutting:
    """Collects images and decides upon their crops, which the device makes; it takes what `Cutting` takes."""

    def __init__(self, views: Mapping[str, View]) -> None:
        self.views = views
        self.images: list[Tensor] = []
        self.cuts: dict[str, list[list[Cut]]] = {name: [[] for _ in range(v.count)] for name, v in views.items()}

    def add(self, key: Key, image: Tensor, whole: Size, rows: CropDraws) -> tuple[Placed | None, Moves]:
        """Take the next image, see `Cutting.add`. Nothing depends on its key but the rows."""
        channels, height, width = image.shape
        self.images.append(image)
        for name, view in self.views.items():
            for number, cuts in enumerate(self.cuts[name]):
                cuts.append(decide((height, width), channels, view, rows[name][number], number, whole))
        first = self.cuts.get(FIRST_VIEW)
        return (None if first is None else first[0][-1].placed), []

    def done(self) -> tuple[dict[str, Tensor], Uncut | None]:
        """Return (no views, what the views are made of)."""
        pixels = [image.permute(1, 2, 0).reshape(-1, image.shape[0]) for image in self.images]
        starts = np.cumsum([0, *map(len, pixels[:-1])], dtype=np.int64)
        lines = torch.tensor([[start, image.shape[2]] for start, image in zip(starts, self.images, strict=True)])
        sizes: dict[str, tuple[int, int, str]] = {
            name: (*height_width(view.size), view.interpolation) for name, view in self.views.items()
        }
        how = {name: _how(cuts).packed() for name, cuts in self.cuts.items()}
        return {}, Uncut(torch.cat(pixels), lines, how, sizes)


def _how(cuts: Sequence[Sequence[Cut]]) -> How:
    """Return the cuts of a view: a list for each of its crops, with one for each image."""
    flat = [cut for of_crop in cuts for cut in of_crop]
    changes = torch.zeros(len(flat), MOST_CHANGES, dtype=torch.int64)
    amounts = torch.zeros(len(flat), MOST_CHANGES, dtype=torch.float64)
    for row, each in enumerate(flat):
        for place, (name, amount) in enumerate(each.changes):
            changes[row, place], amounts[row, place] = CHANGES.index(name), amount
    return How(
        torch.arange(len(cuts[0])).repeat(len(cuts)),
        torch.tensor([each.box for each in flat]),
        torch.tensor([each.placed.flipped for each in flat]),
        changes,
        amounts,
        torch.tensor([each.sigma for each in flat], dtype=torch.float64),
        torch.tensor([each.solarised for each in flat]),
    )
