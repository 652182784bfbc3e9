"""Crops of a whole batch on the device: what `crops.cut` does to one image after another in a worker.

Workers decode, and decide by the same draws how every crop is made (`crops.decide`); the rest, resizing, flip, colour,
blur and solarisation, is done here for all images at once, in plain torch, in float32. Sums are exact and the rest is
in the order in which `cut` does it, rounded where `cut` rounds: so a crop depends on none beside it, and the pixels are
the same (on a CPU to the bit), but where a box is made smaller than about a quarter: see docs/data.md.

Letters: B images, n crops, C channels, P pixels of all images together, h x w pixels of a crop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .colour import JITTERED, LUMA
from .crops import gaussian

CHANGES = ("", *JITTERED, "grayscale")  # by number; the first is none
MOST_CHANGES = len(CHANGES) - 1  # of a crop
MIDDLE = 128.0  # grey level
ELEMENTS = 1 << 26  # float32 values of a step in between, at most: crops are made in so many parts


class How(NamedTuple):
    """What is done to each of n crops, see `crops.Cut`."""

    image: Tensor  # (n,) int64: the image of the batch that it is cut out of
    box: Tensor  # (n, 4) int64: top, left, height, width
    flipped: Tensor  # (n,) bool
    changes: Tensor  # (n, MOST_CHANGES) int64: which of CHANGES, in their order
    amounts: Tensor  # (n, MOST_CHANGES) float64: how much
    sigma: Tensor  # (n,) float64; 0: no blur
    solarised: Tensor  # (n,) bool

    def part(self, rows: slice) -> How:
        """Return that of some of the crops."""
        return How(*(each[rows] for each in self))

    def packed(self) -> Tensor:
        """Return all of it in one tensor, float64 (n, columns), which holds whole numbers exactly: each tensor of a
        batch on its way from a loader's process takes a file descriptor and a page."""
        return torch.cat([each.double().reshape(len(each), -1) for each in self], 1)

    @classmethod
    def of(cls, packed: Tensor) -> How:
        """Return what was `packed`."""
        image, box, flipped, changes, amounts, sigma, solarised = packed.split(
            (1, 4, 1, MOST_CHANGES, MOST_CHANGES, 1, 1), 1
        )
        return cls(
            image[:, 0].long(), box.long(), flipped[:, 0] > 0, changes.long(), amounts, sigma[:, 0], solarised[:, 0] > 0
        )


@dataclass
class Uncut:
    """Images of a batch from which its crops are still to be made.

    pixels   (P, C) uint8: the pixels of all images, row after row, one image after the other
    lines    (B, 2) int64: where each image begins, and its width
    how      name of a view -> its crops, crop-major, as `How` packs them; on the CPU until they are made
    views    name of a view -> its size and interpolation
    """

    pixels: Tensor
    lines: Tensor
    how: dict[str, Tensor]
    views: dict[str, tuple[int, int, str]]

    def pin_memory(self) -> Uncut:
        """Return the same with the pixels in page-locked memory."""
        return replace(self, pixels=self.pixels.pin_memory())

    def crops(self, device: torch.device) -> dict[str, Tensor]:
        """Make the crops of all views on `device`: {name: uint8 (n, C, h, w)}."""
        pixels = self.pixels.to(device, non_blocking=True)
        starts, widths = self.lines.to(device, non_blocking=True).unbind(1)
        made = {}
        with torch.no_grad(), torch.autocast(device.type, enabled=False), _exact_products():
            for name, packed in self.how.items():
                how = How.of(packed)
                height, width, interpolation = self.views[name]
                values = pixels.shape[1] * int(how.box[:, 2:].amax(0).prod())
                step = max(1, ELEMENTS // max(values, pixels.shape[1] * height * width))
                parts = [how.part(slice(at, at + step)) for at in range(0, len(how.image), step)]
                made[name] = torch.cat([
                    _crops(pixels, starts, widths, part, (height, width), interpolation) for part in parts
                ])  # fmt: skip
        return made


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Multiply matrices in float32, not in TF32, whose weights have 10 bits."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _crops(
    pixels: Tensor, starts: Tensor, widths: Tensor, how: How, size: tuple[int, int], interpolation: str
) -> Tensor:
    """Make crops of one view: uint8 (n, C, h, w)."""
    device = pixels.device
    boxes = _boxes(pixels, starts, widths, how)
    planes = _resized(boxes, how.box.to(device, non_blocking=True), size, interpolation)
    flipped = how.flipped.to(device, non_blocking=True)[:, None, None, None]
    planes = torch.where(flipped, planes.flip(-1), planes)
    planes = recoloured(planes, how.changes, how.amounts)
    planes = blurred(planes, how.sigma)
    solarised = how.solarised.to(device, non_blocking=True)[:, None, None, None]
    return torch.where(solarised, torch.minimum(planes, 255 - planes), planes).to(torch.uint8)


def _boxes(pixels: Tensor, starts: Tensor, widths: Tensor, how: How) -> Tensor:
    """Copy the boxes out of the images: float32 (n, C, y, x) as large as the largest, with anything beside a box."""
    device = pixels.device
    most_y, most_x = how.box[:, 2:].amax(0).tolist()  # on the CPU: waits for nothing
    image, box = how.image.to(device, non_blocking=True), how.box.to(device, non_blocking=True)
    y = torch.minimum(torch.arange(most_y, device=device), box[:, 2:3] - 1) + box[:, 0:1]  # (n, y)
    x = torch.minimum(torch.arange(most_x, device=device), box[:, 3:4] - 1) + box[:, 1:2]  # (n, x)
    at = (starts[image][:, None] + y * widths[image][:, None])[:, :, None] + x[:, None]  # (n, y, x)
    return pixels[at.flatten()].view(*at.shape, -1).permute(0, 3, 1, 2).float()


def _resized(boxes: Tensor, box: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize each box to `size`, antialiased, along the rows first: whole numbers, float32 (n, C, h, w).

    Sums are exact, so neither their order nor the width of other boxes of the batch can change one: of multiples of
    2^-16 that stay below 2^8, as grey levels are counted from the middle one.
    """
    (n, channels, most_y, most_x), (height, width) = boxes.shape, size
    along = _weights(box[:, 3], most_x, width, interpolation)  # (n, x, w)
    down = _weights(box[:, 2], most_y, height, interpolation).transpose(1, 2)  # (n, h, y)
    rows = (boxes.reshape(n, channels * most_y, most_x) - MIDDLE) @ along
    rows = whole(rows + MIDDLE * along.sum(1, keepdim=True)).view(n, channels, most_y, width)
    return whole(down[:, None] @ (rows - MIDDLE) + MIDDLE * down.sum(-1)[:, None, :, None])


def _weights(lengths: Tensor, most: int, size: int, interpolation: str) -> Tensor:
    """Return float32 (n, most, size): what of each place of a line of `lengths` (n,) is in each place of the resized
    one, as Pillow and torch have it: the kernel is as wide as `size` is smaller, and a bicubic one has a = -0.5.

    Rounded as torch's uint8 kernels round them, to 15 bits and a sign for the largest, but to 2^-16 at most: theirs
    are finer where a line gets shorter than about a quarter.
    """
    reach = 2.0 if interpolation == "bicubic" else 1.0
    scale = lengths.double()[:, None] / size  # (n, 1)
    wide = scale.clamp(min=1.0)
    centre = scale * (torch.arange(size, device=lengths.device) + 0.5)  # (n, size)
    first = (centre - reach * wide + 0.5).long().clamp(min=0)
    last = torch.minimum((centre + reach * wide + 0.5).long(), lengths[:, None])
    taps = int(2 * reach * max(1.0, most / size)) + 2
    at = first[:, :, None] + torch.arange(taps, device=lengths.device)  # (n, size, taps)
    away = ((at + 0.5 - centre[:, :, None]) * (1 / wide)[:, :, None]).abs()
    near = 1 - away
    if interpolation == "bicubic":
        near = torch.where(away < 1, (1.5 * away - 2.5) * away**2 + 1, ((-0.5 * away + 2.5) * away - 4) * away + 2)
    near = torch.where((away < reach) & (at < last[:, :, None]), near, 0.0)
    near = near / near.sum(-1, keepdim=True)
    unit = torch.full_like(largest := near.amax((1, 2), keepdim=True), 2.0**-14)
    for digits in (15, 16):
        unit = torch.where(largest * 2.0**digits < 2**15 - 0.5, 2.0**-digits, unit)
    near = ((near / unit).abs() + 0.5).floor() * unit * near.sign()
    lines = torch.zeros(len(lengths), size, most + taps, device=lengths.device)  # what lies beyond `most` is 0
    return lines.scatter_(2, at, near.float())[:, :, :most].transpose(1, 2)


def whole(values: Tensor) -> Tensor:
    """Round to grey levels, whole numbers from 0 to 255."""
    return (values + 0.5).floor().clamp(0, 255)


def recoloured(planes: Tensor, changes: Tensor, amounts: Tensor) -> Tensor:
    """Change colours as `colour.recolour`, each crop in its own order: float32 (n, C, h, w), whole numbers.

    changes, amounts  (n, MOST_CHANGES), on the CPU
    """
    for place in range(changes.shape[1]):
        for number in changes[:, place].unique().tolist():
            if not number:
                continue
            rows = (changes[:, place] == number).nonzero()[:, 0]
            amount = amounts[rows, place].to(planes.device, non_blocking=True)[:, None, None, None]
            rows = rows.to(planes.device, non_blocking=True)
            planes = planes.index_copy(0, rows, _changed(planes[rows], CHANGES[number], amount))
    return whole(planes)


def _changed(planes: Tensor, name: str, amount: Tensor) -> Tensor:
    """Make one change; `amount` float64 (n, 1, 1, 1)."""
    if name == "grayscale":
        return _luma(planes).expand_as(planes)
    if name == "hue":
        return _turned(planes, amount)
    blended = planes * amount.float()
    if name == "contrast":
        total = _luma(planes).round().sum((1, 2, 3), keepdim=True, dtype=torch.float64)
        blended += (total / planes[0, 0].numel()).float() * (1 - amount).float()
    elif name == "saturation":
        blended += _luma(planes) * (1 - amount).float()
    return torch.where(amount > 1, blended.clamp(0, 255), blended)  # else it stays within the colours


def _luma(planes: Tensor) -> Tensor:
    """Return the luma of three channels, (n, 1, h, w); the mean of any other number."""
    if planes.shape[1] != len(LUMA):
        return sum(planes.split(1, 1)) / planes.shape[1]  # type: ignore[return-value]
    red, green, blue = planes.split(1, 1)
    return red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]


def _turned(planes: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of three channels by `turn` of the circle, as `colour` does and explains."""
    red, green, blue = planes.split(1, 1)
    largest = planes.amax(1, keepdim=True)
    span = largest - planes.amin(1, keepdim=True)
    of_green, of_blue = blue - red + 2 * span, red - green + 4 * span  # in sixths of the circle, times the span
    hue = torch.where(largest == red, green - blue, torch.where(largest == green, of_green, of_blue))
    hue = hue / span.clamp(min=1e-6) + (6 * turn).float()
    hue -= (hue / 6).floor() * 6
    away = (hue - hue.new_tensor([3.0, 2.0, 4.0]).view(1, 3, 1, 1)).abs()
    less = torch.cat([2 - away[:, :1], away[:, 1:] - 1], 1).clamp(0, 1)
    return largest - less * span


def blurred(planes: Tensor, sigma: Tensor) -> Tensor:
    """Blur as `crops.blur`, each crop by its own sigma (n,), on the CPU; 0: not at all. float32 (n, C, h, w).

    Sums are exact in any order, as is explained there: nothing here rounds but what is meant to be.
    """
    rows = sigma.nonzero()[:, 0]
    kernels = [gaussian(each) for each in sigma[rows].tolist()]
    reach = max((len(kernel) // 2 for kernel in kernels), default=0)
    if not reach:
        return planes
    taps = torch.zeros(len(kernels), 2 * reach + 1)
    for row, kernel in enumerate(kernels):
        taps[row, reach - len(kernel) // 2 : reach + len(kernel) // 2 + 1] = torch.from_numpy(kernel)
    taps, rows = (each.to(planes.device, non_blocking=True) for each in (taps, rows))
    height, width = planes.shape[2:]
    wide = F.pad(planes[rows], (reach, reach, 0, 0), mode="replicate")
    along = (_summed(wide, taps, width, 3) * 16).round() / 16
    tall = F.pad(along, (0, 0, reach, reach), mode="replicate")
    return planes.index_copy(0, rows, whole(_summed(tall, taps, height, 2)))


def _summed(values: Tensor, taps: Tensor, size: int, axis: int) -> Tensor:
    """Add up shifted `values` (n, C, y, x), each times its tap (n, taps): `size` of them along an axis."""
    total = torch.zeros_like(values.narrow(axis, 0, size))
    for place, tap in enumerate(taps.unbind(1)):
        total += tap[:, None, None, None] * values.narrow(axis, place, size)
    return total
