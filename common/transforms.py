"""Named views of an image, and the one evaluation transform. uint8 tensors in, uint8 tensors out.

The crop is taken as a view first and only its pixels are resized, by torch's uint8 kernels. Everything here is exact
integer arithmetic (or floating point without rounding), so threads and workers cannot change a single bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import Refusal

INTERPOLATIONS = ("bicubic", "bilinear")
CROP_TRIES = 10  # as torchvision's RandomResizedCrop
LUMA = np.array([306, 601, 117]) / 1024  # ITU-R 601 in 1/1024, the unit of all colour arithmetic (see `recolour`)

# Places in the one row of uniform numbers that a view draws.
AREA, RATIO = slice(0, CROP_TRIES), slice(CROP_TRIES, 2 * CROP_TRIES)
TOP, LEFT, FLIP, JITTER, BRIGHTNESS, CONTRAST, SATURATION, HUE, GRAY = range(2 * CROP_TRIES, 2 * CROP_TRIES + 9)
DRAWS = 2 * CROP_TRIES + 9


@dataclass
class View:
    """One named view in a recipe: how a crop is cut out of an image, and how its colours are changed."""

    size: Any = 224
    """Pixels of the view: one number, or [height, width]."""
    scale: list[float] = field(default_factory=lambda: [0.4, 1.0])
    """Smallest and largest share of the image's area in a crop. A positional label means "where in this crop": with
    small crops the same object part appears under every label, so the default keeps most of the image."""
    ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    """Narrowest and widest width:height of a crop before it is stretched to the size."""
    flip: float = 0.0
    """Probability of a horizontal flip. 0 because a flip makes left and right ambiguous for positional labels."""
    brightness: float = 0.3
    """Brightness is multiplied by 1 ± this. Colour changes are on, mildly: they spoil shortcuts such as vignetting and
    chromatic aberration, which tell a patch's position without its content."""
    contrast: float = 0.3
    """Contrast is multiplied by 1 ± this."""
    saturation: float = 0.3
    """Saturation is multiplied by 1 ± this."""
    hue: float = 0.05
    """Hue is turned by at most this share of the colour circle, either way; up to 0.5."""
    jitter: float = 0.8
    """Probability that brightness, contrast, saturation and hue change at all."""
    grayscale: float = 0.1
    """Probability that colour is removed."""
    interpolation: str = "bicubic"
    """"bicubic" or "bilinear", antialiased either way."""

    def __post_init__(self) -> None:
        """Refusal that names the field when a value is impossible."""
        height_width(self.size)
        for name, low, high in (("scale", 0.0, 1.0), ("ratio", 0.0, math.inf)):
            pair = list(getattr(self, name))
            if len(pair) != 2 or not all(map(number, pair)) or not low < pair[0] <= pair[1] <= high or math.inf in pair:
                limits = "0 < low <= high <= 1" if high == 1 else "0 < low <= high"
                raise Refusal(f"view: {name}={pair}: expected two numbers [low, high] with {limits}")
        for name in ("flip", "jitter", "grayscale"):
            check_range(name, getattr(self, name), 1.0, "a probability")
        for name, high in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            check_range(name, getattr(self, name), high, "a strength")
        check_interpolation(self.interpolation)


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_range(name: str, value: Any, high: float, noun: str) -> None:
    if not number(value) or not 0 <= value <= high:
        raise Refusal(f"view: {name}={value}: expected {noun} from 0 to {high:g}")


def check_interpolation(value: str) -> None:
    if value not in INTERPOLATIONS:
        raise Refusal(f"view: interpolation={value}: expected {' or '.join(INTERPOLATIONS)}")


def height_width(size: Any) -> tuple[int, int]:
    """(height, width) from one number or a pair of them. Refusal unless both are whole and positive."""
    pair = (size, size) if isinstance(size, int) else tuple(size) if hasattr(size, "__iter__") else ()
    if len(pair) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in pair):
        raise Refusal(f"view: size={size}: expected a positive whole number of pixels, or [height, width]")
    return pair[0], pair[1]


def augment(image: Tensor, view: View, rng: np.random.Generator) -> Tensor:
    """One random view of an image: uint8 (C, H, W) -> contiguous uint8 (C, h, w), C 1 or 3.

    Always takes the same number of draws from `rng`, whatever the image and the view.
    """
    draws: list[float] = rng.random(DRAWS).tolist()
    height, width = int(image.shape[1]), int(image.shape[2])
    crop_height, crop_width = crop_size(height, width, view, draws)
    top, left = int(draws[TOP] * (height - crop_height + 1)), int(draws[LEFT] * (width - crop_width + 1))
    crop = image[:, top : top + crop_height, left : left + crop_width]
    out = resize(crop, height_width(view.size), view.interpolation)
    if draws[FLIP] < view.flip:
        out = out.flip(-1)
    colour = colour_change(view, draws, channels=int(image.shape[0]))
    if colour is not None:
        out = recolour(out, *colour)
    # A crop of the full size is still a view of the image: the caller gets memory of its own.
    return out.clone(memory_format=torch.contiguous_format) if out is crop else out.contiguous()


def crop_size(height: int, width: int, view: View, draws: list[float]) -> tuple[int, int]:
    """(height, width) of the random crop: the first of ten tries that fits, else the largest of a legal ratio."""
    low, high = view.scale
    narrow, wide = view.ratio
    log_narrow, log_wide = math.log(narrow), math.log(wide)
    for area_draw, ratio_draw in zip(draws[AREA], draws[RATIO], strict=True):
        area = height * width * (low + (high - low) * area_draw)
        ratio = math.exp(log_narrow + (log_wide - log_narrow) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return crop_height, crop_width
    ratio = min(max(width / height, narrow), wide)
    return max(1, min(height, round(width / ratio))), max(1, min(width, round(height * ratio)))


def resize(image: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """uint8 (C, H, W) -> uint8 (C, h, w), antialiased; the image itself when it has that size already."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size, mode=interpolation, antialias=True)[0]


def colour_change(view: View, draws: list[float], channels: int) -> tuple[np.ndarray, np.ndarray] | None:
    """The view's colour change as `(matrix, share)`: x -> matrix @ x + share * (mean luma); None for no change.

    Brightness, then contrast about the mean luma, saturation, hue (a turn of the chroma plane of YIQ) and grayscale are
    all linear in the colour, so one matrix does what would be five passes over the image.
    """
    jitter, gray = draws[JITTER] < view.jitter, draws[GRAY] < view.grayscale and channels == 3
    if not (jitter or gray):
        return None
    matrix, share = np.eye(channels), 0.0
    if jitter:
        strengths = (view.brightness, view.contrast, view.saturation)
        factors = (draws[BRIGHTNESS], draws[CONTRAST], draws[SATURATION])
        bright, contrast, saturation = (
            1.0 + strength * (2.0 * draw - 1.0) for strength, draw in zip(strengths, factors, strict=True)
        )
        share = bright * (1.0 - contrast)
        matrix = matrix * (bright * contrast)
        if channels == 3:
            matrix = (saturation * np.eye(3) + (1.0 - saturation) * LUMA) @ matrix
            if view.hue:
                matrix = turn_hue(2.0 * math.pi * view.hue * (2.0 * draws[HUE] - 1.0)) @ matrix
    if gray:
        matrix = np.tile(LUMA @ matrix, (3, 1))
    return matrix, np.full(channels, share)


TO_YIQ = np.array([LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
FROM_YIQ = np.linalg.inv(TO_YIQ)


def turn_hue(angle: float) -> np.ndarray:
    """(3, 3) matrix that turns every colour about the grey axis and keeps its luma."""
    cos, sin = math.cos(angle), math.sin(angle)
    return FROM_YIQ @ np.array([[1.0, 0.0, 0.0], [0.0, cos, -sin], [0.0, sin, cos]]) @ TO_YIQ


def recolour(image: Tensor, matrix: np.ndarray, share: np.ndarray) -> Tensor:
    """uint8 (C, h, w) -> uint8 (C, h, w): matrix @ colour + share * mean luma, rounded and clamped.

    Coefficients are rounded to 1/1024. Times 8-bit pixels every product and sum is then a multiple of 1/1024 below
    2^14, which float32 holds exactly: fused or not, in whatever order and number of threads, the bits are the same.
    """
    channels = image.shape[0]
    pixels = image.numpy().astype(np.float32)  # numpy: it converts faster, and on one thread
    offset = np.zeros(channels)
    if share.any():
        means = pixels.sum(axis=2).sum(axis=1, dtype=np.float64) / (image.shape[1] * image.shape[2])  # rows: below 2^24
        offset = share * (means @ LUMA if channels == 3 else means)
    coefficients = (np.round(matrix * 1024) / 1024).astype(np.float32)
    biases = (np.round((offset + 0.5) * 1024) / 1024).astype(np.float32)  # + 0.5: astype truncates
    out = np.empty_like(pixels)
    term = np.empty_like(pixels[0])
    for plane, row, bias in zip(out, coefficients, biases, strict=True):
        np.multiply(pixels[0], row[0], out=plane)
        for k in range(1, channels):
            plane += np.multiply(pixels[k], row[k], out=term)
        plane += bias
    return torch.from_numpy(np.clip(out, 0, 255, out=out).astype(np.uint8))


def evaluation(image: Tensor, size: Any, crop: float = 0.875, interpolation: str = "bicubic") -> Tensor:
    """The centre of an image: uint8 (C, H, W) -> contiguous uint8 (C, h, w).

    Resizes until the view, `crop` of it along the tighter side, is covered, and cuts out the middle; for a square size
    that is Resize(size / crop) on the short side and CenterCrop(size). crop=1.0 leaves no margin.
    """
    if not number(crop) or not 0 < crop <= 1:
        raise Refusal(f"crop={crop}: expected a share of the side, above 0 and up to 1")
    check_interpolation(interpolation)
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
