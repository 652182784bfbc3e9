"""What training crops of images with masks look like: mmsegmentation's pipeline for ADE20K.

Scale, crop, flip, distort the colours: each draw a function of (seed, epoch, index). Letters: B images, H x W pixels
before and h x w after, C channels. Images are uint8 (C, H, W), masks int16 (H, W).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as tv

from common.batches.sampler import generator
from common.batches.samples import Batch, Samples
from common.batches.views import FIRST_VIEW
from evaluate.segmenting.data import IGNORED, Scenes
from evaluate.segmenting.options import SegmentationConfig

MASK = "segmentation/mask"  # among a batch's draws
TRIES = 10  # crops tried for one in which no class has too large a share
BRIGHTNESS, CONTRAST, SATURATION, HUE = 32, (0.5, 1.5), (0.5, 1.5), 18 / 180  # of SSD (arXiv 1512.02325)


def scaled_size(height: int, width: int, short: int | None, long: int | None, factor: float = 1.0) -> tuple[int, int]:
    """Size (h, w) of an image whose short side becomes `short`, or less where its long side would exceed `long`; both
    times `factor`. short=None: as it is; long=None: four times `short`, ADE20K's 2048 to 512."""
    if long is None:
        long = 4 * short if short is not None else max(height, width)
    zoom = factor * min(long / max(height, width), (short or min(height, width)) / min(height, width))
    return max(1, int(height * zoom + 0.5)), max(1, int(width * zoom + 0.5))


def rescaled(image: Tensor, size: tuple[int, int], mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Rescale (image, mask) to `size`: bilinear and antialiased; a mask keeps its labels (nearest pixel)."""
    if tuple(image.shape[-2:]) != size:
        image = tv.resize(tv_tensors.Image(image), list(size), antialias=True).as_subclass(Tensor)
        if mask is not None:
            mask = tv.resize(tv_tensors.Mask(mask), list(size)).as_subclass(Tensor)
    return image, mask


def padded_image(image: Tensor, size: tuple[int, int], fill: Sequence[int]) -> Tensor:
    """An image of at least `size`, continued to the right and below in the colour `fill`, uint8 one a channel."""
    border = _border(image, size)
    return image if border is None else tv.pad(tv_tensors.Image(image), border, fill=list(fill)).as_subclass(Tensor)


def padded(image: Tensor, mask: Tensor, size: tuple[int, int], fill: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Pad as `padded_image`, and the mask too, without a class there."""
    border = _border(image, size)
    if border is not None:
        mask = tv.pad(tv_tensors.Mask(mask), border, fill=IGNORED).as_subclass(Tensor)
    return padded_image(image, size, fill), mask


def _border(image: Tensor, size: tuple[int, int]) -> list[int] | None:
    """Pixels left, above, right and below; None where none are lacking."""
    down, across = (max(0, side - have) for side, have in zip(size, image.shape[-2:], strict=True))
    return [0, 0, across, down] if down or across else None


def fill_of(mean: Sequence[float]) -> list[int]:
    """Colour that is zero after normalisation: uint8, one a channel, of means in [0, 1]."""
    return [min(255, round(255 * value)) for value in mean]


def random_crop(mask: Tensor, size: tuple[int, int], most_of_one: float, rng: np.random.Generator) -> tuple[int, int]:
    """Draw (top, left) of a crop; of ten the first with two classes, none above a share of `most_of_one`, if any."""
    room = [max(0, have - side) for have, side in zip(mask.shape, size, strict=True)]
    draws = rng.random((TRIES + 1, 2))
    top = left = 0
    for attempt in draws if most_of_one < 1 else draws[:1]:
        top, left = (int(draw * (margin + 1)) for draw, margin in zip(attempt, room, strict=True))
        if most_of_one >= 1:
            break
        cut = mask[top : top + size[0], left : left + size[1]]
        counts = torch.bincount(cut[cut != IGNORED].long())
        if (counts > 0).sum() > 1 and counts.max() < most_of_one * counts.sum():
            break
    return top, left


def distorted(image: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply SSD's photometric distortion: brightness, contrast, saturation and hue, each with probability one half;
    contrast comes before or after the colours. Grey images have no colours.

    Saturation blends with grey (as torchvision's), which in HSV, where the authors scale it, is nearly the same.
    """
    chances, values, last = rng.random(4) < 0.5, rng.random(4), bool(rng.random() < 0.5)

    def between(draw: float, limits: tuple[float, float]) -> float:
        return limits[0] + (limits[1] - limits[0]) * draw

    if chances[0]:
        image = _clipped(image.float() + between(values[0], (-BRIGHTNESS, BRIGHTNESS)))
    for contrast in (False, True) if last else (True, False):
        if contrast and chances[1]:
            image = _clipped(image.float() * between(values[1], CONTRAST))
        if not contrast and image.shape[0] == 3:
            if chances[2]:
                image = tv.adjust_saturation(image, between(values[2], SATURATION))
            if chances[3]:
                image = tv.adjust_hue(image, between(values[3], (-HUE, HUE)))
    return image


def _clipped(image: Tensor) -> Tensor:
    return image.clamp_(0, 255).to(torch.uint8)


def augmented(
    image: Tensor,
    mask: Tensor,
    size: tuple[int, int],
    config: SegmentationConfig,
    fill: Sequence[int],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """Make (image, mask) of a training crop: scaled, cropped, mirrored, distorted, and padded where too small."""
    scale, flip = rng.uniform(config.scale[0], config.scale[1]), rng.random() < config.flip
    H, W = image.shape[-2:]
    image, scaled = rescaled(image, scaled_size(H, W, config.short, config.long, scale), mask)
    assert scaled is not None
    top, left = random_crop(scaled, size, config.most_of_one, rng)
    rows, columns = slice(top, top + size[0]), slice(left, left + size[1])
    image, scaled = image[:, rows, columns], scaled[rows, columns]
    if flip:
        image, scaled = image.flip(-1), scaled.flip(-1)
    if config.photometric:
        image = distorted(image, rng)
    return padded(image, scaled, size, fill)


class Crops(Samples):
    """Data set of (epoch, index) -> `Batch` whose first view are crops; their masks, int16 (B, h, w), are MASK."""

    def prepare(self, size: tuple[int, int], config: SegmentationConfig, mean: Sequence[float]) -> "Crops":
        """Set the `size` of crops and the `mean` of the channels, in [0, 1]; returns itself."""
        self.size, self.config, self.fill = size, dataclasses.replace(config), fill_of(mean)
        return self

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        """One batch for a list of (epoch, index)."""
        scenes = self.images
        assert isinstance(scenes, Scenes)
        crops: list[tuple[Tensor, Tensor]] = []
        unreadable: list[str] = []
        hopeless = False
        for epoch, index in keys:
            image, _, shown, _ = self._read(index, unreadable)
            if image is None:
                hopeless, image = True, torch.zeros(self.channels, *self.size, dtype=torch.uint8)
                mask = torch.full(self.size, IGNORED, dtype=torch.int16)
            else:
                mask = scenes.mask(shown)
            rng = generator(self.seed, epoch, index, "segmentation")
            crops.append(augmented(image, mask, self.size, self.config, self.fill, rng))
        return Batch(
            {FIRST_VIEW: torch.stack([image for image, _ in crops]).contiguous()},
            torch.tensor([index for _, index in keys]),
            {MASK: torch.stack([mask for _, mask in crops])},
            unreadable,
            hopeless,
        )
