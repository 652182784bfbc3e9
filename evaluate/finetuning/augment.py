"""Strong augmentation of training crops: RandAugment, random erasing, repeated augmentation.

As everything that a sample is made of, a pure function of (seed, epoch, index): see `sampling`.
"""

import contextlib
import functools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from common.batches.sampler import StepPart, StepSampler, generator, order
from common.batches.samples import FIRST_VIEW, Batch, Samples
from common.errors import Refusal

ERASED_AREA = (0.02, 1 / 3)  # smallest and largest share of the image in an erased box (arXiv 1708.04896)
ERASED_RATIO = (0.3, 1 / 0.3)  # narrowest and widest height:width
ERASING_TRIES = 10


def rand_augment(spec: str, size: Sequence[int], mean: Sequence[float]) -> Callable[[Image.Image], Image.Image]:
    """Build timm's RandAugment (arXiv 1909.13719) of `spec`, such as rand-m9-mstd0.5-inc1, for crops of `size` (h, w).

    It reads Python's and NumPy's global generators: see `seeded`. What moves into the picture has the colour `mean`
    ([0, 1], one a channel). Raises Refusal for a spec that timm does not know.
    """
    fill = tuple(min(255, round(255 * value)) for value in mean)
    options = {
        "translate_const": int(min(size) * 0.45),
        "img_mean": fill if len(fill) == 3 else fill[0],
        "interpolation": Image.Resampling.BICUBIC,
    }
    try:
        made = rand_augment_transform(spec, options)
        for operation in made.ops:
            if operation.name.startswith("Posterize"):
                operation.aug_fn = functools.partial(_posterize, operation.aug_fn)
        with seeded(np.random.default_rng(0)):
            made(Image.new("RGB" if len(fill) == 3 else "L", (size[1], size[0])))
    except Exception as error:  # timm asserts, and looks names up
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(
            f"--rand-augment {spec}: timm cannot read it ({reason}); expected such as rand-m9-mstd0.5-inc1, or null"
        ) from None
    return made


def _posterize(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Posterise. timm's strongest leaves no bits: that was a black picture, and Pillow 13 raises ValueError."""
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


@contextlib.contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Seed Python's and NumPy's global generators from `rng`, and restore them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(int(rng.integers(2**63)))
    np.random.seed(int(rng.integers(2**32)))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def erase(
    image: Tensor, rng: np.random.Generator, probability: float, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Erase at random (arXiv 1708.04896): with `probability` a box of the image becomes noise. uint8 (C, H, W), changed
    in place, and returned.

    Each value is drawn from a normal distribution of the channel's `mean` and `std` (in [0, 1]) and rounded to 8 bits:
    timm's `pixel` mode, but for the twentieth that would be darker than black or brighter than white.
    """
    channels, height, width = image.shape
    if rng.random() >= probability:
        return image
    for _ in range(ERASING_TRIES):
        area = height * width * rng.uniform(*ERASED_AREA)
        ratio = math.exp(rng.uniform(math.log(ERASED_RATIO[0]), math.log(ERASED_RATIO[1])))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            noise = rng.standard_normal((channels, h, w)) * np.reshape(std, (-1, 1, 1)) + np.reshape(mean, (-1, 1, 1))
            image[:, top : top + h, left : left + w] = torch.from_numpy(
                np.clip(np.rint(255 * noise), 0, 255).astype(np.uint8)
            )
            break
    return image


class StrongSamples(Samples):
    """Samples whose first view then goes through RandAugment (`spec`; None: not) and random erasing."""

    def set_strength(self, spec: str | None, erasing: float, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the probability `erasing`, and `mean` and `std` of the channels in [0, 1]."""
        self.spec, self.erasing, self.mean, self.std = spec, erasing, tuple(mean), tuple(std)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        """One batch for a list of (epoch, index)."""
        batch = super().__getitems__(keys)
        crops = batch.views[FIRST_VIEW]
        for crop, (epoch, index) in zip(crops, keys, strict=True):
            if self.spec is not None:
                operation = _made(self.spec, tuple(crop.shape[1:]), self.mean)
                with seeded(generator(self.seed, epoch, index, "rand_augment")):
                    crop.copy_(pil_to_tensor(operation(to_pil_image(crop))))
            erase(crop, generator(self.seed, epoch, index, "erasing"), self.erasing, self.mean, self.std)
        return batch


_made = functools.lru_cache(maxsize=4)(rand_augment)  # once in every worker: it cannot be pickled on every platform


class RepeatedSampler(StepSampler):
    """Sampler of repeated augmentation (arXiv 1902.05509): every image comes `repeats` times in a row of steps, each
    time in another crop.

    An epoch has as many steps as without, so it shows one of `repeats` images: as in DeiT's code. Copies of one image
    are of different "epochs", of which there are `repeats` in each; within a batch they lie far apart.
    """

    def __init__(self, *arguments: int, repeats: int = 1, **options: int) -> None:
        super().__init__(*arguments, **options)
        self.repeats = repeats

    def __iter__(self) -> Iterator[StepPart]:
        if self.repeats == 1:
            yield from super().__iter__()
            return
        micro = self.batch // self.accumulate
        share = micro // self.processes
        for step in range(self.start, self.steps):
            epoch, at = divmod(step, self.per_epoch)
            images = order(self.seed, epoch, self.size)
            places = range(at * self.batch, (at + 1) * self.batch)  # in the list of all, each `repeats` times
            keys = sorted((place % self.repeats, place // self.repeats) for place in places)
            whole = [(epoch * self.repeats + copy, int(images[which])) for copy, which in keys]
            for part in range(self.accumulate):
                begin = part * micro + self.rank * share
                yield StepPart(whole[begin : begin + share], np.array([index for _, index in whole]))
