"""Mixup and CutMix: two images in one, and labels that say how much of each.

Neighbours in a batch are partners, rows 2i and 2i + 1: as batches are in random order, so are partners, and no pair is
torn apart when processes or accumulation share a batch. What is drawn is one for a step (timm's `batch` mode), or one
for each pair (`pair`), or one for each image (`elem`): a function of the seed, and of the step or the sample.

Letters: B images, K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .sampler import generator
from .views import View, height_width


@dataclass(frozen=True)
class Mixture:
    """Draw by which one batch is mixed."""

    share: float  # of an image's own label; of its own pixels too
    box: tuple[int, int, int, int] | None = None  # CutMix: top, bottom, left, right of what is pasted; None is mixup


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


def partners(rows: Tensor) -> Tensor:
    """Rows (B, ...) with 2i and 2i + 1 exchanged. Raises ValueError if B is odd."""
    if len(rows) % 2:
        raise ValueError(f"{len(rows)} rows cannot be paired: an even number is mixed")
    return rows.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def drawn(view: View, seed: int, step: int, keys: Sequence[tuple[int, int]]) -> list[Mixture | None]:
    """Draw the mixtures of a part of step number `step` (0-based), whose images have these keys (epoch, index): one for
    all, or one for each image."""
    h, w = height_width(view.size)
    options = (h, w, view.mixup, view.cutmix, view.mix, view.switch)
    if view.mix_by == "batch":
        return [draw(generator(seed, 0, step, "mixing"), *options)]
    owners = keys if view.mix_by == "element" else [keys[row // 2 * 2] for row in range(len(keys))]
    return [draw(generator(seed, *key, "mixing"), *options) for key in owners]


def shares(mixtures: Sequence[Mixture | None], rows: int) -> Tensor:
    """How much of its own label each image keeps, and how much it takes of its partner's: float32 (B, 2)."""
    own = [1.0 if mixture is None else mixture.share for mixture in mixtures]
    return torch.tensor([[share, 1 - share] for share in (own if len(own) == rows else own * rows)])


def mix(images: Tensor, mixtures: Sequence[Mixture | None]) -> Tensor:
    """Blend images with their partners (mixup, arXiv 1710.09412), or paste a box of the partner's into them (CutMix,
    arXiv 1905.04899): uint8 (B, C, H, W). `mixtures`: one for all, or one for each.

    Blended pixels are rounded to whole numbers, as where timm mixes in its loader.
    """
    if all(mixture is None for mixture in mixtures):
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
