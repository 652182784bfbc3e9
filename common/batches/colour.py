"""Brightness, contrast, saturation, hue and grayscale of uint8 images, as torchvision changes them.

One after the other, each clamped, in float32 without rounding in between (torchvision rounds to whole numbers after
each; to both the same within a grey level). NumPy's elementwise operations round as IEEE 754 says, and the one sum is
of whole numbers: threads and workers cannot change a single bit. Letters: C channels of h x w pixels.
"""

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601
JITTERED = ("brightness", "contrast", "saturation", "hue")
ORDERS = tuple(itertools.permutations(JITTERED))

Change = tuple[str, float]  # one of JITTERED or "grayscale", and how much


def recolour(image: Tensor, changes: Iterable[Change]) -> Tensor:
    """Make the changes in their order: uint8 (C, h, w) -> uint8 (C, h, w).

    ("brightness" | "contrast" | "saturation", factor): 1 changes nothing. ("hue", turn): share of the colour circle,
    from red towards green, value and saturation kept as HSV has them. ("grayscale", _). The last three leave an image
    of other than three channels as it is.
    """
    planes = image.numpy().astype(np.float32)  # numpy: it converts faster than torch, and on one thread
    for name, amount in changes:
        if name == "brightness":
            planes *= np.float32(amount)
        elif name == "contrast":
            rows = np.rint(luma(planes)).sum(axis=1)  # of whole numbers below 2^24: exact
            _blend(planes, np.float32(rows.sum(dtype=np.float64) / planes[0].size), amount)
        elif len(planes) != 3:
            continue
        elif name == "saturation":
            _blend(planes, luma(planes), amount)
        elif name == "hue":
            _turn(planes, amount)
        else:
            planes[:] = luma(planes)
        if name in JITTERED[:3] and amount > 1:  # else it stays within the colours
            np.clip(planes, 0, 255, out=planes)
    planes += 0.5  # astype truncates
    return torch.from_numpy(planes.astype(np.uint8))


def luma(planes: np.ndarray) -> np.ndarray:
    """Return the luma of three channels, (C, ...) -> (...); the mean of any other number."""
    if len(planes) != 3:
        return planes[0] if len(planes) == 1 else planes.sum(0) / np.float32(len(planes))
    red, green, blue = (np.float32(share) for share in LUMA)
    total = planes[0] * red
    total += planes[1] * green
    total += planes[2] * blue
    return total


def _blend(planes: np.ndarray, other: np.ndarray | np.float32, share: float) -> None:
    """Set `planes` to share * planes + (1 - share) * other, in place."""
    planes *= np.float32(share)
    planes += other * np.float32(1 - share)


def _product(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Set `values` to 0 where `mask` is not, in place: a tenth of the time of np.where, which branches."""
    values *= mask.astype(np.float32)
    return values


def _turn(planes: np.ndarray, turn: float) -> None:
    """Turn the hue in place by `turn` of the circle. A colour of hue H in sixths, largest channel M and difference D to
    the smallest has the channels M - D * clip(1 - t, 0, 1), t = |H - 3| - 1 for red, 2 - |H - 2| for green and
    2 - |H - 4| for blue (the wheel of HSV)."""
    red, green, blue = planes
    largest, smallest = np.maximum(red, green), np.minimum(red, green)
    np.maximum(largest, blue, out=largest)
    range_ = np.subtract(largest, np.minimum(smallest, blue, out=smallest), out=smallest)
    is_red = largest == red
    is_green = largest == green
    is_green &= ~is_red
    twice = range_ * np.float32(2)
    hue = _product(is_red, green - blue)
    hue += _product(is_green, blue - red + twice)
    twice += twice
    hue += _product(~(is_red | is_green), red - green + twice)
    hue /= np.maximum(range_, np.float32(1e-6), out=twice)  # 0 where a pixel is grey
    hue += np.float32(6 * turn)
    away = np.floor(hue / np.float32(6))
    away *= np.float32(6)
    hue -= away  # in [0, 6]
    for plane, centre in zip(planes, (3.0, 2.0, 4.0), strict=True):
        np.abs(np.subtract(hue, np.float32(centre), out=away), out=away)
        if centre == 3:
            np.subtract(np.float32(2), away, out=away)
        else:
            away -= np.float32(1)
        np.clip(away, 0, 1, out=away)
        away *= range_
        np.subtract(largest, away, out=plane)
