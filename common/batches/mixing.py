"""Mixup, CutMix and MixToken: two images in one, and labels that say how much of each.

Neighbours in a batch are partners, rows 2i and 2i + 1: as batches are in random order, so are partners, and no pair is
torn apart when processes or accumulation share a batch. What is drawn is one for a step (timm's `batch` mode), or one
for each pair (`pair`), or one for each image (`elem`): a function of the seed, and of the step or the sample.

MixToken mixes what a model made of the patches and not the pixels, so its box lies on whatever grid that model has.

Letters: B images, K classes, N = h*w patches, D width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .sampler import generator
from .views import View, height_width

Grid = tuple[int, int]
Box = tuple[int, int, int, int]  # patches in rows [top, bottom) and columns [left, right): (top, left, bottom, right)
NO_BOX = (0, 0, 0, 0)


@dataclass(frozen=True)
class Mixture:
    """Draw by which one batch is mixed: by mixup, unless it has a box or a centre."""

    share: float  # of an image's own label, and of its own pixels; of MixToken, of its own patches, about
    box: tuple[int, int, int, int] | None = None  # CutMix: top, bottom, left, right of what is pasted
    centre: tuple[float, float] | None = None  # MixToken: of the box, row and column in shares of the grid

    def tokens(self, grid: Grid) -> Box:
        """Box of patches of `grid` (h, w) that are exchanged; NO_BOX where pixels are mixed."""
        if self.centre is None:
            return NO_BOX
        row, column = (int(share * side) for share, side in zip(self.centre, grid, strict=True))
        return mix_box(grid, self.share, (row, column))

    def own(self, grid: Grid) -> float:
        """Weight of an image's own label on a `grid` (h, w) of patches."""
        return self.share if self.centre is None else kept(grid, self.tokens(grid))


def draw(
    rng: np.random.Generator,
    height: int,
    width: int,
    mixup: float,
    cutmix: float,
    probability: float = 1.0,
    switch: float = 0.5,
) -> Mixture | None:
    """Draw how to mix a batch of images of `height` x `width` pixels; None if it is not mixed.

    `mixup`, `cutmix`: alphas of Beta(alpha, alpha), 0 is off. `probability`: that a batch is mixed at all; `switch`:
    that it is CutMix, where both are on. Always takes the same number of draws, but for Beta's own.
    """
    mixed, switched, *middle = rng.random(4)
    enabled = {"mixup": mixup, "cutmix": cutmix}
    how = "cutmix" if cutmix > 0 and (mixup <= 0 or switched < switch) else "mixup"
    if enabled[how] <= 0 or mixed >= probability:
        return None
    share = float(rng.beta(enabled[how], enabled[how]))
    if how == "mixup":
        return Mixture(share)
    # the box lies around any pixel, and what of it is outside the image is cut off (arXiv 1905.04899, appendix A)
    sides = [int(side * math.sqrt(1 - share)) for side in (height, width)]
    centre = [int(share_of_side * side) for share_of_side, side in zip(middle, (height, width), strict=True)]
    ends = [
        (max(0, at - cut // 2), min(side, at + (cut + 1) // 2))
        for at, cut, side in zip(centre, sides, (height, width), strict=True)
    ]
    (top, bottom), (left, right) = ends
    return Mixture(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def draw_tokens(rng: np.random.Generator, alpha: float, probability: float = 1.0) -> Mixture | None:
    """Draw a box for MixToken (arXiv 2104.10858, section 3.2), whose share to keep is of Beta(alpha, alpha) and whose
    centre lies anywhere; None if nothing is exchanged. Always takes the same number of draws, but for Beta's own."""
    mixed, row, column = rng.random(3)
    if alpha <= 0 or mixed >= probability:
        return None
    return Mixture(float(rng.beta(alpha, alpha)), centre=(float(row), float(column)))


def partners(rows: Tensor) -> Tensor:
    """Rows (B, ...) with 2i and 2i + 1 exchanged. Raises ValueError if B is odd."""
    if len(rows) % 2:
        raise ValueError(f"{len(rows)} rows cannot be paired: an even number is mixed")
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def drawn(view: View, seed: int, step: int, keys: Sequence[tuple[int, int]]) -> list[Mixture | None]:
    """Draw the mixtures of a part of step number `step` (0-based), whose images have these keys (epoch, index): one for
    all, or one for each image."""
    if view.mix_token > 0:
        return [draw_tokens(generator(seed, 0, step, "mixing"), view.mix_token, view.mix)]
    h, w = height_width(view.size)
    options = (h, w, view.mixup, view.cutmix, view.mix, view.switch)
    if view.mix_by == "batch":
        return [draw(generator(seed, 0, step, "mixing"), *options)]
    owners = keys if view.mix_by == "element" else [keys[row // 2 * 2] for row in range(len(keys))]
    return [draw(generator(seed, *key, "mixing"), *options) for key in owners]


def shares(mixtures: Sequence[Mixture | None], rows: int, grid: Grid = (1, 1)) -> Tensor:
    """How much of its own label each image keeps, and how much it takes of its partner's: float32 (B, 2). `grid`: of
    the patches that MixToken mixes."""
    own = [1.0 if mixture is None else mixture.own(grid) for mixture in mixtures]
    return torch.tensor([[share, 1 - share] for share in (own if len(own) == rows else own * rows)])


def mix(images: Tensor, mixtures: Sequence[Mixture | None]) -> Tensor:
    """Blend images with their partners (mixup, arXiv 1710.09412), or paste a box of the partner's into them (CutMix,
    arXiv 1905.04899): uint8 (B, C, H, W). `mixtures`: one for all, or one for each.

    Blended pixels are rounded to whole numbers, as where timm mixes in its loader.
    """
    if all(mixture is None or mixture.centre is not None for mixture in mixtures):
        return images
    others = partners(images)
    if len(mixtures) == 1 and (mixture := mixtures[0]) is not None:
        if mixture.box is None:
            return torch.lerp(others.float(), images.float(), mixture.share).round_().to(torch.uint8)
        top, bottom, left, right = mixture.box
        images = images.clone()
        images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        return images
    weights = torch.ones(len(images), 1, *images.shape[-2:])
    for weight, mixture in zip(weights, mixtures, strict=True):
        if mixture is not None and mixture.box is not None:
            top, bottom, left, right = mixture.box
            weight[:, top:bottom, left:right] = 0.0
        elif mixture is not None:
            weight.fill_(mixture.share)
    return torch.lerp(others.float(), images.float(), weights.to(images.device)).round_().to(torch.uint8)


def mix_targets(targets: Tensor, shares: Tensor) -> Tensor:
    """Mix rows (B, K) as the images were, by their `shares` (B, 2)."""
    return shares[:, :1] * targets + shares[:, 1:] * partners(targets)


# ---------------------------------------------------------------------------- MixToken


def mix_box(grid: Grid, lam: float, centre: tuple[int, int]) -> Box:
    """The patches (top, left, bottom, right) that MixToken takes from another image (arXiv 2104.10858, section 3.2).

    About sqrt(1 - lam) of each side of `grid` (h, w) around `centre` (row, column), cut off at the border; ends are
    exclusive. `lam` in [0, 1] is the share to keep; the share kept is `kept(grid, box)`.
    """
    extents = [int(side * (1 - lam) ** 0.5) // 2 for side in grid]
    top, left = (max(middle - extent, 0) for middle, extent in zip(centre, extents, strict=True))
    bottom, right = (min(middle + extent, side) for middle, extent, side in zip(centre, extents, grid, strict=True))
    return top, left, bottom, right


def kept(grid: Grid, box: Box) -> float:
    """Share of the N patches outside of the box: the weight of an image's own class target."""
    top, left, bottom, right = box
    return 1 - (bottom - top) * (right - left) / (grid[0] * grid[1])


def swap_box(tokens: Tensor, grid: Grid, box: Box) -> Tensor:
    """Exchange tokens (B, N, D) or (B, h, w, D) in the box between partners; without one, the last of an odd number of
    images keeps its own. It is its own inverse: what was mixed before the blocks, the same call puts back after.

    The published code pairs image b with B-1-b, which would depend on how processes share a batch.
    Raises ValueError for a box that leaves the grid.
    """
    top, left, bottom, right = box
    if not (0 <= top <= bottom <= grid[0] and 0 <= left <= right <= grid[1]):
        raise ValueError(f"box {tuple(box)} (top, left, bottom, right) leaves the grid of {grid[0]}x{grid[1]} patches")
    if top >= bottom or left >= right:
        return tokens
    paired = tokens.shape[0] // 2 * 2
    mixed = tokens.reshape(tokens.shape[0], *grid, -1).clone()
    mixed[:paired, top:bottom, left:right] = partners(tokens.reshape(mixed.shape)[:paired, top:bottom, left:right])
    return mixed.view(tokens.shape)
