"""Named views of an image, and the one evaluation transform. uint8 tensors in, uint8 tensors out.

The crop is taken as a view first and only its pixels are resized, by torch's uint8 kernels. Everything here is exact
integer arithmetic, floating point without rounding, or rounded in an order that is fixed (`colour`), so threads and
workers cannot change a single bit.

PRESETS holds the multi-crop views of DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Refusal
from ..limits import Count, Probability, Range, Share, Shares, check, expected
from .colour import ORDERS, Change, recolour

Interpolation = Literal["bicubic", "bilinear"]
Chances = Annotated[Any, Range(at_least=0, at_most=1)]  # a probability, or a list of them
CROP_TRIES = 10  # as torchvision's RandomResizedCrop

# Places in the row of uniform numbers that one crop draws.
AREA, RATIO = slice(0, CROP_TRIES), slice(CROP_TRIES, 2 * CROP_TRIES)
TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY = range(2 * CROP_TRIES, 2 * CROP_TRIES + 9)
JITTERS = {"brightness": BRIGHTNESS, "contrast": CONTRAST, "saturation": SATURATION, "hue": HUE}
BLUR, SIGMA, SOLARISE = range(2 * CROP_TRIES + 9, 2 * CROP_TRIES + 12)  # at the end: old recipes keep their crops
DRAWS = 2 * CROP_TRIES + 12


@dataclass
class View:
    """One named view in a recipe: how crops are cut out of an image, and how their colours are changed."""

    size: Any = 224
    """Pixels of the view: one number, or [height, width]."""
    preset: Literal["dino", "dinov2"] | None = None
    """The published values for the view of this name, `global` or `local`, wherever the recipe and
    the command line say nothing. Its blur_sigma is meant for its own size (224, 96) and scaled to any other."""
    count: Count = 1
    """Crops of each image. Those after the first leave the first as it is."""
    scale: Shares = field(default_factory=lambda: [0.4, 1.0])
    """Smallest and largest share of the image's area in a crop. A positional label means "where in this crop": with
    small crops the same object part appears under every label, so the default keeps most of the image."""
    ratio: Annotated[list[float], Range(above=0, length=2, rising=True)] = field(default_factory=lambda: [0.75, 4 / 3])
    """Narrowest and widest width:height of a crop before it is stretched to the size."""
    flip: Probability = 0.0
    """Probability of a horizontal flip. 0 because a flip makes left and right ambiguous for positional labels."""
    brightness: Probability = 0.3
    """Brightness is multiplied by 1 ± this. Colour changes are on, mildly: they spoil shortcuts such as vignetting and
    chromatic aberration, which tell a patch's position without its content."""
    contrast: Probability = 0.3
    """Contrast is multiplied by 1 ± this."""
    saturation: Probability = 0.3
    """Saturation is multiplied by 1 ± this."""
    hue: Annotated[float, Range(at_least=0, at_most=0.5)] = 0.05
    """Hue is turned by at most this share of the colour circle, either way."""
    jitter: Probability = 0.8
    """Probability that brightness, contrast, saturation and hue change at all."""
    grayscale: Probability = 0.1
    """Probability that colour is removed."""
    blur: Chances = 0.0
    """Probability of a Gaussian blur: one number, or a list with one per crop."""
    blur_sigma: Annotated[list[float], Range(above=0, at_most=100, length=2, rising=True)] = field(
        default_factory=lambda: [0.1, 2.0]
    )
    """Smallest and largest standard deviation of the blur, in pixels of the view (after it got its size): what suits
    224 pixels wipes out 28."""
    solarise: Chances = 0.0
    """Probability that values of 128 and more are inverted: one number, or a list with one per crop."""
    interpolation: Interpolation = "bicubic"
    """How pixels are resized, antialiased either way."""

    def __post_init__(self) -> None:
        """Refusal that names the field when a value is impossible."""
        check(self, "view: ")
        height_width(self.size)
        for name, chances in (("blur", self.blur), ("solarise", self.solarise)):
            if hasattr(chances, "__iter__") and len(chances) != self.count:
                raise Refusal(
                    f"view: {name}={chances}: expected a probability, or a list of one per crop, count={self.count}"
                )


def height_width(size: Any) -> tuple[int, int]:
    """(height, width) from one number or a pair of them. Refusal unless both are whole and positive."""
    pair = (size, size) if isinstance(size, int) else tuple(size) if hasattr(size, "__iter__") else ()
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise Refusal(f"view: size={size}: expected a positive whole number of pixels, or [height, width]")
    return pair[0], pair[1]


def augment(image: Tensor, view: View, rng: np.random.Generator, crop: int = 0) -> Tensor:
    """Crop number `crop` of a view of an image, at random: uint8 (C, H, W) -> contiguous uint8 (C, h, w), C 1 or 3.

    Always takes the same number of draws from `rng`, whatever the image, the view and the crop. The number only says
    which of the view's probabilities apply.
    """
    draws: list[float] = rng.random(DRAWS).tolist()
    height, width = int(image.shape[1]), int(image.shape[2])
    top, left, crop_height, crop_width = crop_box(height, width, view, draws)
    cut = image[:, top : top + crop_height, left : left + crop_width]
    out = resize(cut, height_width(view.size), view.interpolation)
    if draws[FLIP] < view.flip:
        out = out.flip(-1)
    if changes := colour_changes(view, draws, channels=int(image.shape[0])):
        out = recolour(out, changes)
    if draws[BLUR] < chance(view.blur, crop):
        low, high = view.blur_sigma
        out = blur(out, low + (high - low) * draws[SIGMA])
    if draws[SOLARISE] < chance(view.solarise, crop):
        out = torch.minimum(out, 255 - out)  # from 128 on, the inverse is the smaller
    # A crop of the full size is still a view of the image: the caller gets memory of its own.
    return out.clone(memory_format=torch.contiguous_format) if out is cut else out.contiguous()


def chance(value: Any, crop: int) -> float:
    """The probability for crop number `crop`: `value`, or its entry."""
    return value[crop] if hasattr(value, "__iter__") else value


def crop_box(height: int, width: int, view: View, draws: list[float]) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the random crop, as torchvision's RandomResizedCrop: the first of ten tries that
    fits, anywhere, else the largest of a legal ratio, in the centre."""
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


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, h, w), antialiased; the image itself when it has that size already."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size, mode=interpolation, antialias=True)[0]


def colour_changes(view: View, draws: list[float], channels: int) -> list[Change]:
    """What `recolour` is to do for a crop with these draws, in this order: as torchvision's ColorJitter, brightness,
    contrast, saturation and hue in an order of the crop's own, then RandomGrayscale."""
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
    """uint8 (C, h, w) -> uint8 (C, h, w): Gaussian blur, `sigma` in pixels, cut off at 4 sigma, edge pixels repeated.

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
    """(2r + 1,) float32 coefficients at -r..r, r = round(4 sigma): multiples of 2^-12 whose sum is 1.

    Sums from the ends are rounded, not single coefficients: their errors would add up to a spike in a wide kernel.
    """
    reach = int(4.0 * sigma + 0.5)
    half = np.exp(-0.5 * (np.arange(reach, -1, -1) / sigma) ** 2)  # from the far end to the centre
    half /= 2 * half.sum() - 1
    ends = np.round(np.cumsum(half[:-1]) * 4096) / 4096
    side = np.diff(ends, prepend=0.0)
    return np.concatenate([side, [1.0 - 2 * side.sum()], side[::-1]]).astype(np.float32)


# ---------------------------------------------------------------------------- presets

# Patches of 14 pixels need local crops of 98; without local crops DINO's authors set the global scale to [0.14, 1].
SHARED: dict[str, Any] = {
    "flip": 0.5, "jitter": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "grayscale": 0.2,
    "blur_sigma": [0.1, 2.0], "ratio": [0.75, 4 / 3], "interpolation": "bicubic",
}  # fmt: skip
GLOBAL: dict[str, Any] = SHARED | {"count": 2, "size": 224, "blur": [1.0, 0.1], "solarise": [0.0, 0.2]}
LOCAL: dict[str, Any] = SHARED | {"count": 8, "size": 96, "blur": 0.5, "solarise": 0.0}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "dino": {"global": GLOBAL | {"scale": [0.4, 1.0]}, "local": LOCAL | {"scale": [0.05, 0.4]}},
    "dinov2": {"global": GLOBAL | {"scale": [0.32, 1.0]}, "local": LOCAL | {"scale": [0.05, 0.32]}},
}


def presets(views: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What lies beneath the given views: {name: the values of its preset}, for those views that name one.

    A preset is fitted to the given count and size: lists with one number per crop are cut off, or end in repetitions of
    their last; sigma keeps its ratio to the (shorter) side. Raises Refusal for a name that the preset has not.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, given in views.items():
        preset = (given or {}).get("preset")
        if preset is None:
            continue
        named = PRESETS[preset]
        if name not in named:
            raise Refusal(f"views.{name}: preset={preset} has no view of that name: expected {' or '.join(named)}")
        values = dict(named[name])
        if "count" in given:
            for key in ("blur", "solarise"):
                if isinstance(values[key], list):
                    values[key] = [values[key][min(crop, len(values[key]) - 1)] for crop in range(given["count"])]
        if "size" in given:
            zoom = min(height_width(given["size"])) / values["size"]
            values["blur_sigma"] = [round(sigma * zoom, 5) for sigma in values["blur_sigma"]]
        found[name] = {key: list(value) if isinstance(value, list) else value for key, value in values.items()}
    return found


def evaluation(image: Tensor, size: Any, crop: float = 0.875, interpolation: str = "bicubic") -> Tensor:
    """The centre of an image: uint8 (C, H, W) -> contiguous uint8 (C, h, w).

    Resizes until the view, `crop` of it along the tighter side, is covered, and cuts out the middle; for a square size
    that is Resize(size / crop) on the short side and CenterCrop(size). crop=1.0 leaves no margin.
    """
    if wanted := expected(Share, crop):
        raise Refusal(f"crop={crop}: {wanted}")
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
