"""The quarters readout: where in an image a backbone sees what, read off the quarters of its grid, block by block.

One vector for an image, the field's readout, is what losses on images train. Positional labels train patches: what is
where tells classes apart, and averaging over the image forgets it, as the patches of Coates and Ng (2011) show, which
are read off quarters too. Letters: B images, h x w patches, D width.
"""

import torch
from torch import Tensor

from common.features.extraction import depth
from common.models import Backbone
from common.models.plan import TokenPlan

VERSION = 1  # in the key of what is kept: another number is extracted anew
NAME = "quarters"  # of block 3: quarters3


def halved(length: int) -> tuple[slice, slice]:
    """Halves of so many positions; of an odd number, both have the one in the middle."""
    return slice(0, -(-length // 2)), slice(length // 2, length)


def moved(images: Tensor, down: int, right: int) -> Tensor:
    """Move the content of images (B, C, H, W) by so many pixels; what comes in is mirrored at the border."""
    rows = (torch.arange(images.shape[2], device=images.device) - down).abs()
    columns = (torch.arange(images.shape[3], device=images.device) - right).abs()
    return images[:, :, rows][:, :, :, columns]


def quarters(backbone: Backbone, plan: TokenPlan | None, images: Tensor) -> dict[str, Tensor]:
    """Return {"quarters1": (B, 4 D) float32, ...}: for each block (of a hierarchical model: stage) the mean patch of
    the four quarters of its grid, row-major, as the block leaves it, without the final norm.

    Patches are cut four times, the images moved down, right or both by half a patch, and the answers averaged: what
    crosses a border of one grid lies inside a patch of another. `images` are uint8 (B, C, H, W).
    """
    half = [side // count // 2 for side, count in zip(backbone.size, backbone.grid, strict=True)]
    moves = {(down, right): None for down in (0, half[0]) for right in (0, half[1])}  # fewer for patches of one pixel
    sums: dict[str, Tensor] = {}
    for down, right in moves:
        blocks = backbone.layers(moved(images, down, right), depth(backbone), plan, norm=False)
        for number, features in enumerate(blocks, 1):
            grid = features.tokens.float().unflatten(1, features.grid)  # (B, h, w, D)
            parts = [grid[:, i, j].mean((1, 2)) for i in halved(features.grid[0]) for j in halved(features.grid[1])]
            name = f"{NAME}{number}"
            sums[name] = sums.get(name, torch.zeros((), device=grid.device)) + torch.cat(parts, 1) / len(moves)
    return sums
