"""Filters that are whitened random patches of images, after Coates and Ng (The importance of encoding versus training
with sparse coding and vector quantization, ICML 2011): of the baseline `patches`, and what a stem begins from.

Letters: b images, C channels, h x w pixels, M patches that are drawn, F of them filters, D = C * side * side numbers of
a patch.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..batches.sampler import generator, order
from ..batches.unreadable import NO_LIMIT
from ..data import Images
from ..errors import Refusal
from ..models import Backbone
from ..models.stem import FilterStem
from .extraction import Eye, shown

WHITENING = 0.1  # added to the variance along every direction
IMAGES, DRAWN = 10_000, 100_000  # images that are read, at most, and patches that are drawn from them
OF_STEM = 2_000  # images that are read for a stem: 50 patches of each, before every pretraining
NUMBERS = 20_000_000  # of all patches drawn, at most: large ones are fewer


@torch.no_grad()
def learn(
    images: Images,
    eye: Eye,
    seed: int,
    prepare: Callable[[Tensor], Tensor],
    side: tuple[int, int],
    count: int,
    contrast: float,
    most: int = IMAGES,
) -> tuple[Tensor, Tensor]:
    """Learn `count` filters from at most so many of `images`: (whitening and filter in one (F, C, side, side), what the
    mean patch answers (F,)), float32. `seed` decides what is drawn.

    `prepare`: uint8 (b, C, H, W), as they are shown to `eye`, to float32 (b, C, h, w) of which patches are cut;
    `contrast`: added to a patch's variance, in the units of that. Raises Refusal where no image can be read.
    """
    chosen_images = images.subset(sorted(order(seed, 0, len(images))[:most]))
    patch = eye.channels * side[0] * side[1]
    per_image = -(-max(count, min(DRAWN, NUMBERS // patch)) // len(chosen_images))
    drawn: list[Tensor] = []
    for batch, index in shown(chosen_images, replace(eye, limit=NO_LIMIT), warn=lambda line: None):
        for pixels, i in zip(prepare(batch), index.tolist(), strict=True):
            rng = generator(seed, 0, i, "patches")
            tops = rng.integers(0, pixels.shape[1] - side[0] + 1, per_image)
            lefts = rng.integers(0, pixels.shape[2] - side[1] + 1, per_image)
            windows = pixels.unfold(1, side[0], 1).unfold(2, side[1], 1)  # a view: (C, rows, columns, side, side)
            drawn.append(windows[:, tops, lefts].transpose(0, 1).flatten(1))
    if not drawn:
        raise Refusal(f"{images.where}: none of {len(chosen_images):,} images, of which filters are made, can be read")
    patches = torch.cat(drawn).double()  # (M, D)
    patches -= patches.mean(1, keepdim=True)
    patches *= (patches.square().sum(1, keepdim=True) / (patches.shape[1] - 1) + contrast).rsqrt()
    mean = patches.mean(0)
    patches -= mean
    variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
    whiten = directions * (variances.clamp_min(0) + WHITENING).rsqrt() @ directions.T  # ZCA
    chosen = np.resize(generator(seed, 0, 0, "filters").permutation(len(patches)), count)  # twice if there are fewer
    filters = F.normalize(patches[torch.from_numpy(chosen)] @ whiten, dim=1) @ whiten
    return filters.float().view(-1, eye.channels, *side), (filters @ mean).float()


def stem_of(backbone: Backbone) -> FilterStem | None:
    """The stem of filters of a backbone; None if it has none."""
    stem = getattr(backbone.model, "patch_embed", None)
    return stem if isinstance(stem, FilterStem) else None


def filters_for(backbone: Backbone, images: Images, seed: int, workers: int = 0) -> tuple[Tensor, Tensor]:
    """Filters and offsets for the stem of `backbone`: learned from `images` under the evaluation transform, normalised
    as the backbone does. A function of `seed` and the images; torch's generator is left as it was."""
    stem = stem_of(backbone)
    assert stem is not None
    eye = Eye.of(backbone, workers=workers)
    return _filters(images, eye, seed, (stem.side, len(stem.filters), stem.contrast), *_normalisation(backbone))


def _normalisation(backbone: Backbone) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(backbone.config.mean), tuple(backbone.config.std)


@functools.lru_cache(maxsize=4)  # an evaluation builds its baseline several times
def _filters(
    images: Images,
    eye: Eye,
    seed: int,
    of_stem: tuple[int, int, float],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[Tensor, Tensor]:
    side, count, contrast = of_stem
    shift, scale = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))

    def prepare(batch: Tensor) -> Tensor:
        return batch.float().div_(255).sub_(shift).div_(scale)

    with torch.random.fork_rng(devices=[]):  # which a loader would draw from
        return learn(images, eye, seed, prepare, (side, side), count, contrast, OF_STEM)


@torch.no_grad()
def fill(backbone: Backbone, filters: tuple[Tensor, Tensor]) -> None:
    """Let the stem of a backbone begin with `filters` and their offsets."""
    stem = stem_of(backbone)
    assert stem is not None
    stem.filters.copy_(filters[0])
    stem.offsets.copy_(filters[1])
