"""Strong augmentation of training crops: RandAugment, patches cut apart, random erasing.

As everything that a sample is made of, a pure function of (seed, epoch, index): see `sampler`.
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
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from ..errors import Refusal
from .colour import luma
from .sampler import generator
from .views import View, height_width

Colours = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of the channels, in [0, 1]
GREY: Colours = ((0.5,) * 3, (0.25,) * 3)

# Kinds of moves of a policy, with one value each: degrees, a slope, shares of a side; 0 is none.
MOVES = ("", "Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
Moves = list[tuple[int, float]]
ERASED_AREA = (0.02, 1 / 3)  # smallest and largest share of the image in an erased box (arXiv 1708.04896)
ERASED_RATIO = (0.3, 1 / 0.3)  # narrowest and widest height:width
ERASING_TRIES = 10
DROPPED_NOISE = 100  # a dropped channel's noise has a deviation so many times smaller than the channel that is kept


def auto_augment(
    spec: str, size: Sequence[int], mean: Sequence[float], option: str = "auto_augment="
) -> Callable[[Image.Image], Image.Image]:
    """Build timm's policy `spec` for crops of `size` (h, w): RandAugment (rand-m9-mstd0.5-inc1; arXiv 1909.13719),
    AutoAugment (original, v0; arXiv 1805.09501), AugMix (augmix-m3-w3; arXiv 1912.02781) or 3-Augment (3a; arXiv
    2204.07118).

    It reads Python's and NumPy's global generators: see `seeded`. What moves into the picture has the colour `mean`
    ([0, 1], one a channel). Raises Refusal, which names the `option`, for a spec that timm does not know.
    """
    fill = tuple(min(255, round(255 * value)) for value in mean)
    options = {
        "translate_const": int(min(size) * 0.45),
        "img_mean": fill if len(fill) == 3 else fill[0],
        "interpolation": Image.Resampling.BICUBIC,
    }
    moves: Moves = []
    try:
        kind = KINDS.get(spec.partition("-")[0], auto_augment_transform)
        made = kind(spec, options)
        for operation in _operations(made):
            if operation.name.startswith("Posterize"):
                operation.aug_fn = functools.partial(_posterize, operation.aug_fn)
            elif (kind_of_move := operation.name.removesuffix("Rel")) in MOVES:
                in_pixels = operation.name.startswith("Translate") and not operation.name.endswith("Rel")
                operation.aug_fn = functools.partial(_noted, kind_of_move, in_pixels, operation.aug_fn, moves)
        made.moves = moves
        with seeded(np.random.default_rng(0)):
            made(Image.new("RGB" if len(fill) == 3 else "L", (size[1], size[0])))
    except Exception as error:  # timm asserts, and looks names up
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(
            f"{option}{spec}: timm cannot read it ({reason}); expected such as rand-m9-mstd0.5-inc1, original, "
            "augmix-m3-w3 or 3a, or null"
        ) from None
    return made


def num_moves(spec: str | None) -> int:
    """Count the moves that policy `spec` makes of an image at most. Raises Refusal where they cannot be said."""
    if spec is None:
        return 0
    if spec.startswith("augmix"):
        raise Refusal(
            f"auto_augment={spec}: it lays differently moved pictures over each other, and no dense labels can follow; "
            "expected a policy such as rand-m9-mstd0.5-inc1 beside dense labels"
        )
    made: Any = _made(spec, (32, 32), GREY[0])
    return max(map(len, made.policy)) if hasattr(made, "policy") else made.num_layers


KINDS = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}  # by how a spec begins


def _operations(made: Any) -> Iterator[Any]:
    """Every operation of a policy of timm's."""
    if hasattr(made, "policy"):
        yield from (operation for steps in made.policy for operation in steps)
    else:
        yield from made.ops


def _posterize(posterize: Callable[..., Image.Image], image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """Posterise. timm's strongest leaves no bits: that was a black picture, and Pillow 13 raises ValueError."""
    return posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def _noted(
    kind: str, in_pixels: bool, move: Callable[..., Image.Image], moves: Moves, image: Image.Image,
    value: float, **options: Any,
) -> Image.Image:  # fmt: skip
    """Move an image, and note by what."""
    side = image.width if kind.endswith("X") else image.height
    moves.append((MOVES.index(kind), value / side if in_pixels else value))
    return move(image, value, **options)


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


def patchwork(crop: Tensor, view: View, rng: np.random.Generator, mean: Sequence[float]) -> Tensor:
    """Cut the patches of a view out of a crop of its `cut_size` and change their colours one by one, as the view says:
    uint8 (C, H, W) -> contiguous uint8 (C, h, w). `mean`: of the channels, in [0, 1].

    Each patch takes the same draws, whatever the options: they do not change each other's. Noise is drawn after them.
    """
    (height, width), (patch_height, patch_width) = height_width(view.size), height_width(view.patch, "patch")
    grid = height // patch_height, width // patch_width
    top, left, brightness, contrast, drop, kept = rng.random((*grid, 6)).transpose(2, 0, 1)  # each (gh, gw)
    if view.patch_at == "centre":
        top = left = np.full(grid, 0.5)
    cell = patch_height + view.gap, patch_width + view.gap
    y = (top * (view.gap + 1)).astype(int) + cell[0] * np.arange(grid[0])[:, None]  # where each patch begins
    x = (left * (view.gap + 1)).astype(int) + cell[1] * np.arange(grid[1])
    rows, columns = y[..., None, None] + np.arange(patch_height)[:, None], x[..., None, None] + np.arange(patch_width)
    patches = crop.numpy()[:, rows, columns]  # (C, gh, gw, ph, pw)
    if view.patch_jitter:
        factors = [1 + view.patch_jitter * (2 * draws[..., None, None] - 1) for draws in (brightness, contrast)]
        patches = _lit(patches, *factors)
    for i, j in np.argwhere(drop < view.patch_drop_colour):
        _drop_colour(patches[:, i, j], int(kept[i, j] * len(patches)), rng, mean)
    rows_of_pixels = np.ascontiguousarray(patches.transpose(0, 1, 3, 2, 4))
    return torch.from_numpy(rows_of_pixels.reshape(-1, height, width))


def _lit(patches: np.ndarray, brightness: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Multiply brightness, then contrast, of patches, uint8 (C, ..., ph, pw), as `recolour` does to a crop; factors
    (..., 1, 1)."""
    planes = np.clip(patches.astype(np.float32) * brightness.astype(np.float32), 0, 255)
    sums = np.rint(luma(planes)).sum((-2, -1), dtype=np.float64, keepdims=True)  # of whole numbers: exact
    grey = (sums / math.prod(planes.shape[-2:])).astype(np.float32)
    planes *= contrast.astype(np.float32)
    planes += grey * (1 - contrast).astype(np.float32)
    return (np.clip(planes, 0, 255) + np.float32(0.5)).astype(np.uint8)


def _drop_colour(patch: np.ndarray, kept: int, rng: np.random.Generator, mean: Sequence[float]) -> None:
    """Replace the channels of a patch, uint8 (3, ph, pw), but the one that is `kept`, by noise, in place."""
    values = patch[kept].astype(np.int64)  # whole numbers: their sums are exact
    deviation = math.sqrt(values.size * int((values**2).sum()) - int(values.sum()) ** 2) / values.size / DROPPED_NOISE
    for channel in (other for other in range(len(patch)) if other != kept):
        noise = 255 * mean[channel] + deviation * rng.standard_normal(patch.shape[1:])
        patch[channel] = np.clip(np.rint(noise), 0, 255)


def strengthen(
    crop: Tensor, view: View, key: tuple[int, int, int], where: str, colours: Colours
) -> tuple[Tensor, Moves]:
    """Change one crop of a view, uint8 (C, H, W) of its `cut_size`, which may be overwritten: its policy, its patches,
    then random erasing, as the view says. Returns the crop (C, h, w), and what the policy moved it by: (kind, in
    MOVES; value).

    `key`: (seed, epoch, index) of the sample; `where`: "" for the first crop of the first view, else which it is.
    """
    mean, std = colours
    moves: Moves = []
    if view.auto_augment is not None:
        operation: Any = _made(view.auto_augment, tuple(crop.shape[1:]), tuple(mean))
        operation.moves.clear()
        with seeded(generator(*key, f"rand_augment{where}")):
            crop.copy_(pil_to_tensor(operation(to_pil_image(crop))))
        moves = list(operation.moves)
    if view.by_patch:
        crop = patchwork(crop, view, generator(*key, f"patches{where}"), mean)
    if view.erasing > 0:
        erase(crop, generator(*key, f"erasing{where}"), view.erasing, mean, std)
    return crop, moves


_made = functools.lru_cache(maxsize=4)(auto_augment)  # once in every worker: it cannot be pickled on every platform
