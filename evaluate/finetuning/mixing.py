"""Mixup and CutMix: two images in one, and labels that say how much of each.

Neighbours in a batch are partners, rows 2i and 2i + 1: as batches are in random order, so are partners, and no pair is
torn apart when processes or accumulation share a batch. What is drawn is one for a batch, as in timm's `batch` mode.

Letters: B images, K classes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


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


def mix(images: Tensor, targets: Tensor, mixture: Mixture | None) -> tuple[Tensor, Tensor]:
    """Blend every image with its partner (mixup, arXiv 1710.09412), or paste a box of the partner's into it (CutMix,
    arXiv 1905.04899), and its label alike.

    images uint8 (B, C, H, W), targets (B, K) whose rows sum to one; the same shapes and types come back. Blended
    pixels are rounded to whole numbers, as where timm mixes in its loader.
    """
    if mixture is None:
        return images, targets
    share, others = mixture.share, partners(images)
    if mixture.box is None:
        images = torch.lerp(others.float(), images.float(), share).round_().to(torch.uint8)
    else:
        top, bottom, left, right = mixture.box
        images = images.clone()
        images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return images, share * targets + (1 - share) * partners(targets)
