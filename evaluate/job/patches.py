"""A baseline that has learned nothing: whitened random patches of the training images as filters, after Coates and Ng
(The importance of encoding versus training with sparse coding and vector quantization, ICML 2011).

Letters: B images, C channels, h x w pixels, F filters, P positions of a patch, D = C * side * side numbers of a patch.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data import Images
from common.features.extraction import PIXELS, Eye, FeaturesOf, shown_key
from common.features.whitened import DRAWN, IMAGES, WHITENING, learn
from common.models.stem import CONTRAST
from evaluate.probing.quarters import halved

FILTERS, SIDE = 400, 6  # patches that are filters, and their pixels a side
THRESHOLD = 0.25  # of the soft threshold
AT_ONCE = 32  # images whose answers are in memory: 2.3 MB each


@dataclass(frozen=True)
class Filters:
    """Filters that patches of images of `size` pixels are compared with."""

    weights: Tensor  # (F, C, side, side): whitening and filter in one
    offsets: Tensor  # (F,): what the mean patch answers
    size: tuple[int, int]

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """Answer uint8 (B, C, H, W) with (B, 2 * F * 4): how much of each filter, or its negative, each quarter has."""
        return torch.cat([self._answers(some) for some in images.split(AT_ONCE)])

    def _answers(self, images: Tensor) -> Tensor:
        pixels = smaller(images.to(self.weights.device), self.size)
        _, _, side, other = self.weights.shape
        rows, columns = self.size[0] - side + 1, self.size[1] - other + 1
        patches_BPD = F.unfold(pixels, (side, other)).mT.contiguous()
        patches_BPD -= patches_BPD.mean(2, keepdim=True)
        variance = patches_BPD.square().sum(2, keepdim=True) / (patches_BPD.shape[2] - 1)
        patches_BPD *= (variance + CONTRAST).rsqrt()
        found_BPF = patches_BPD @ self.weights.flatten(1).T - self.offsets
        halves = []
        for signed in ((found_BPF - THRESHOLD).relu_(), found_BPF.neg_().sub_(THRESHOLD).relu_()):
            grid = signed.unflatten(1, (rows, columns))  # (B, rows, columns, F): sums over F-vectors are quick
            quarters = [grid[:, i, j].mean((1, 2)) for i in halved(rows) for j in halved(columns)]
            halves.append(torch.cat(quarters, 1))
        return torch.cat(halves, 1)


def smaller(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Convert uint8 (B, C, H, W) to float32 (B, C, h, w) from -128 to 127, averaged down where `size` is smaller."""
    pixels = images.float().sub_(128)
    return pixels if pixels.shape[-2:] == size else F.adaptive_avg_pool2d(pixels, size)


def learned(images: Images, eye: Eye, seed: int) -> Filters:
    """Learn filters from training `images` as they are shown to `eye`; `seed` decides what is drawn."""
    small = (min(eye.size[0], PIXELS), min(eye.size[1], PIXELS))  # as of raw pixels
    side = min(SIDE, small[0]), min(SIDE, small[1])
    shrink = functools.partial(smaller, size=small)
    return Filters(*learn(images, eye, seed, shrink, side, FILTERS, CONTRAST), small)


def patches(train: Images, eye: Eye, seed: int, device: torch.device | str = "cpu") -> FeaturesOf:
    """Features by filters of `train`, learned when the first are asked for: {"patches": (b, 3200)}."""

    @functools.cache
    def filters() -> Filters:
        made = learned(train, eye, seed)
        return replace(made, weights=made.weights.to(device), offsets=made.offsets.to(device))

    return lambda batch: {"patches": filters().answers(batch).cpu()}


def patch_key(train: Images, images: Images, eye: Eye, seed: int) -> dict[str, Any]:
    """Settings that determine features by `patches`."""
    numbers = [FILTERS, SIDE, THRESHOLD, CONTRAST, WHITENING, IMAGES, DRAWN, PIXELS]
    return {"patches": numbers, "of": train.fingerprint(), "seed": seed} | shown_key(images, eye)


def described() -> str:
    """Description of the filters for a report."""
    return (
        f"{FILTERS} random {SIDE}x{SIDE} patches of the training images, contrast-normalised (variance + "
        f"{CONTRAST:g}), ZCA-whitened (+ {WHITENING:g}), of unit length; soft threshold {THRESHOLD:g}, "
        f"positive and negative halves, averaged over the quarters of at most {PIXELS}x{PIXELS} pixels"
    )
