"""Random crops of a view, and the one evaluation transform. uint8 tensors in, uint8 tensors out.

The crop is taken as a view first and only its pixels are resized, by torch's uint8 kernels. Everything here is exact
integer arithmetic, floating point without rounding, or rounded in an order that is fixed (`colour`), so threads and
workers cannot change a single bit.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..decoding.decode import REDUCTIONS
from ..errors import Refusal
from ..limits import Share, expected
from .colour import ORDERS, Change, recolour
from .views import View, height_width

CROP_TRIES = 10  # as torchvision's RandomResizedCrop

# Places in the row of uniform numbers that one crop draws.
AREA, RATIO = slice(0, CROP_TRIES), slice(CROP_TRIES, 2 * CROP_TRIES)
TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY = range(2 * CROP_TRIES, 2 * CROP_TRIES + 9)
JITTERS = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
BLUR, SIGMA, SOLARISE = range(2 * CROP_TRIES + 9, 2 * CROP_TRIES + 12)  # at the end: old recipes keep their crops
DRAWS = 2 * CROP_TRIES + 12


class Placed(NamedTuple):
    """Where a crop lies in its image."""

    box: tuple[float, float, float, float]  # top, left, height, width, in shares of the image
    flipped: bool  # horizontally, after it was cut


def augment(image: Tensor, view: View, rng: np.random.Generator, crop: int = 0) -> Tensor:
    """Cut crop number `crop` of a view out of an image at random: uint8 (C, H, W) -> contiguous uint8 (C, h, w).

    Always takes the same number of draws from `rng`, whatever the image, the view and the crop. The number only says
    which of the view's probabilities apply.
    """
    return cut(image, view, rng.random(DRAWS).tolist(), crop)[0]


def crop_draws(view: View, rng: np.random.Generator) -> list[list[float]]:
    """Draw a row of DRAWS numbers for each crop of a view: all that `cut` needs beside the image. Each crop takes
    equally many: more crops change none."""
    return rng.random((view.count, DRAWS)).tolist()


class Cut(NamedTuple):
    """Decisions that make a crop of an image, in the order in which they are carried out."""

    box: tuple[int, int, int, int]  # top, left, height, width in the image as it was read
    placed: Placed
    changes: list[Change]  # of colour
    sigma: float  # of the blur, in pixels of the crop; 0: none
    solarised: bool


def decide(
    read: tuple[int, int], channels: int, view: View, draws: list[float], crop: int, whole: tuple[int, int]
) -> Cut:
    """Decide by a row of draws how crop number `crop` of a view is made.

    read   (height, width) of the image as it was read, of so many `channels`
    whole  its (height, width) before one of REDUCTIONS divided both
    """
    height, width = whole
    top, left, crop_height, crop_width = box = crop_box(height, width, view, draws)
    if read != whole:
        box = reduced_box(box, divisor_of(read, whole))
    low, high = view.blur_sigma
    return Cut(
        box,
        Placed((top / height, left / width, crop_height / height, crop_width / width), draws[FLIP] < view.flip),
        colour_changes(view, draws, channels),
        low + (high - low) * draws[SIGMA] if draws[BLUR] < chance(view.blur, crop) else 0.0,
        draws[SOLARISE] < chance(view.solarise, crop),
    )


def cut(
    image: Tensor, view: View, draws: list[float], crop: int = 0, whole: tuple[int, int] | None = None
) -> tuple[Tensor, Placed]:
    """Cut a crop as `augment` does, by its row of draws: (the crop, where it lies). It has the view's `cut_size`.

    whole  (height, width) of the image before one of REDUCTIONS divided both; None: it was not reduced
    """
    channels, height, width = image.shape
    how = decide((height, width), channels, view, draws, crop, whole or (height, width))
    top, left, crop_height, crop_width = how.box
    part = image[:, top : top + crop_height, left : left + crop_width]
    out = resize(part, view.cut_size, view.interpolation)
    if how.placed.flipped:
        out = out.flip(-1)
    if how.changes:
        out = recolour(out, how.changes)
    if how.sigma:
        out = blur(out, how.sigma)
    if how.solarised:
        out = torch.minimum(out, 255 - out)  # from 128 on, the inverse is the smaller
    # A crop of the full size is still a view of the image: the caller gets memory of its own.
    out = out.clone(memory_format=torch.contiguous_format) if out is part else out.contiguous()
    return out, how.placed


def chance(value: Any, crop: int) -> float:
    """Return the probability for crop number `crop`: `value`, or its entry."""
    return value[crop] if hasattr(value, "__iter__") else value


def crop_box(height: int, width: int, view: View, draws: list[float]) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the random crop, as torchvision's RandomResizedCrop: the first of ten tries
    that fits, anywhere, else the largest of a legal ratio, in the centre."""
    low, high = view.scale
    narrow, wide = view.ratio
    log_narrow, log_wide = math.log(narrow), math.log(wide)
    for area_draw, ratio_draw in zip(draws[AREA], draws[RATIO], strict=True):
        area = height * width * (low + (high - low) * area_draw)
        ratio = math.exp(log_narrow + (log_wide - log_narrow) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(draws[TOP] * (height - crop_height + 1)), int(draws[LEFT] * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    ratio = min(max(width / height, narrow), wide)
    crop_height, crop_width = max(1, min(height, round(width / ratio))), max(1, min(width, round(height * ratio)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def reduction(height: int, width: int, crops: Sequence[tuple[View, list[float]]]) -> int:
    """Return the largest of REDUCTIONS of an image of height x width after which each of the crops, a view and its row
    of draws, still has the pixels of its view or more."""
    most = max(REDUCTIONS)
    for view, draws in crops:
        _, _, crop_height, crop_width = crop_box(height, width, view, draws)
        out_height, out_width = view.cut_size
        most = min(most, crop_height // out_height, crop_width // out_width)
    return max(divisor for divisor in REDUCTIONS if divisor <= max(1, most))


def divisor_of(read: tuple[int, int], whole: tuple[int, int]) -> int:
    """Return which of REDUCTIONS made an image of (height, width) `read` of one of `whole`."""
    return next(n for n in REDUCTIONS if (-(-whole[0] // n), -(-whole[1] // n)) == read)


def reduced_box(box: tuple[int, int, int, int], divisor: int) -> tuple[int, int, int, int]:
    """Return the (top, left, height, width) of a box in an image whose sides were divided: its edges, rounded. It is at
    least as high and wide as the quotients, rounded down."""
    top, left, height, width = box
    first, last = ((top, left), (top + height, left + width))
    (top, left), (bottom, right) = (tuple((edge + divisor // 2) // divisor for edge in each) for each in (first, last))
    return top, left, bottom - top, right - left


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize uint8 (C, H, W) to uint8 (C, h, w), antialiased; an image that has that size comes back itself."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size, mode=interpolation, antialias=True)[0]


def colour_changes(view: View, draws: list[float], channels: int) -> list[Change]:
    """Return the changes that `recolour` makes to a crop with these draws, in their order: as torchvision's
    ColorJitter, brightness, contrast, saturation and hue in an order of the crop's own, then RandomGrayscale."""
    changes: list[Change] = []
    if draws[JITTER] < view.jitter:
        # Below the threshold the draw is uniform, and says nothing of the others: it draws the order too.
        order = ORDERS[min(int(draws[JITTER] / view.jitter * len(ORDERS)), len(ORDERS) - 1)]
        strengths = {"brightness": view.brightness, "contrast": view.contrast, "saturation": view.saturation}
        either_way = {name: 2.0 * draws[place] - 1.0 for name, place in JITTERS.items()}
        amounts = {name: 1.0 + strength * either_way[name] for name, strength in strengths.items() if strength}
        if view.hue:
            amounts["hue"] = view.hue * either_way["hue"]
        changes = [(name, amounts[name]) for name in order if name in amounts]
    if draws[GRAY] < view.grayscale:
        changes.append(("grayscale", 1.0))
    return changes if channels == 3 else [change for change in changes if change[0] in ("brightness", "contrast")]


BLOCK = 16  # output rows (columns) of one product; products are too small for a BLAS to share among threads


def blur(image: Tensor, sigma: float) -> Tensor:
    """Blur uint8 (C, h, w) with a Gaussian, `sigma` in pixels, cut off at 4 sigma, edge pixels repeated.

    Coefficients are multiples of 2^-12 with sum 1; what the first pass leaves, along the rows, is rounded to 2^-4. So
    all products and sums are multiples of 2^-16 below 2^8, which float32 holds exactly: products of matrices may add in
    any order. Before it is rounded the result is within 0.2 grey levels of the real Gaussian, up to sigma 5.
    """
    kernel = gaussian(sigma)
    reach = len(kernel) // 2
    if reach == 0:
        return image
    channels, height, width = image.shape
    rows, columns = slice(reach, reach + height), slice(reach, reach + width)
    band = np.zeros((BLOCK + 2 * reach, BLOCK), np.float32)  # column j holds the kernel from row j on
    for j in range(BLOCK):
        band[j : j + len(kernel), j] = kernel
    wide = np.empty((channels, height, width + 2 * reach), np.float32)
    wide[:, :, columns] = image.numpy()
    wide[:, :, :reach], wide[:, :, columns.stop :] = wide[:, :, reach, None], wide[:, :, columns.stop - 1, None]
    tall = np.empty((channels, height + 2 * reach, width), np.float32)
    times = band * 16  # so that rounding to 2^-4 is rounding to whole numbers
    for j in range(0, width, BLOCK):
        size = min(BLOCK, width - j)
        near = size + 2 * reach
        np.matmul(wide[:, :, j : j + near], times[:near, :size], out=tall[:, rows, j : j + size])
    np.rint(tall[:, rows], out=tall[:, rows])
    tall[:, :reach], tall[:, rows.stop :] = tall[:, reach, None], tall[:, rows.stop - 1, None]
    out = np.empty((channels, height, width), np.float32)
    over = np.ascontiguousarray(band.T) / 16
    for i in range(0, height, BLOCK):
        size = min(BLOCK, height - i)
        near = size + 2 * reach
        np.matmul(over[:size, :near], tall[:, i : i + near], out=out[:, i : i + size])
    out += 0.5  # astype truncates
    return torch.from_numpy(out.astype(np.uint8))


def gaussian(sigma: float) -> np.ndarray:
    """Return (2r + 1,) float32 coefficients at -r..r, r = round(4 sigma): multiples of 2^-12 whose sum is 1.

    Sums from the ends are rounded, not single coefficients: their errors would add up to a spike in a wide kernel.
    """
    reach = int(4.0 * sigma + 0.5)
    half = np.exp(-0.5 * (np.arange(reach, -1, -1) / sigma) ** 2)  # from the far end to the centre
    half /= 2 * half.sum() - 1
    ends = np.round(np.cumsum(half[:-1]) * 4096) / 4096
    side = np.diff(ends, prepend=0.0)
    return np.concatenate([side, [1.0 - 2 * side.sum()], side[::-1]]).astype(np.float32)


def evaluation(image: Tensor, size: Any, crop: float = 0.875, interpolation: str = "bicubic") -> Tensor:
    """Cut out the centre of an image: uint8 (C, H, W) -> contiguous uint8 (C, h, w).

    Resizes until the view, `crop` of it along the tighter side, is covered, and cuts out the middle; for a square size
    that is Resize(size / crop) on the short side and CenterCrop(size). crop=1.0 leaves no margin.
    """
    if limits := expected(Share, crop):
        raise Refusal(f"crop={crop}: {limits}")
    out_height, out_width = height_width(size)
    height, width = int(image.shape[1]), int(image.shape[2])
    goal_height, goal_width = int(out_height / crop), int(out_width / crop)
    if goal_height * width >= goal_width * height:  # the height is the tighter side: scale it to its goal exactly
        whole = goal_height, max(out_width, width * goal_height // height)
    else:
        whole = max(out_height, height * goal_width // width), goal_width
    resized = resize(image, whole, interpolation)
    top, left = round((whole[0] - out_height) / 2), round((whole[1] - out_width) / 2)
    return resized[:, top : top + out_height, left : left + out_width].clone(memory_format=torch.contiguous_format)
