"""Our loader's work on the same files as its peers': decode, crop, and a batch of uint8 or of normalised floats."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from benchmarks.loading.measuring import Method
from benchmarks.loading.peers import MEAN, MULTI, ONE, STD
from common.batches.samples import Batch, Faster, Samples
from common.batches.unreadable import Limit
from common.batches.views import PRESETS, View
from common.caching.building import Builders, build
from common.caching.pixels import Cache
from common.data import Images, open_data

PLAIN = "ours"
VIEWS = {
    ONE: {"global": View(size=224, scale=[0.08, 1.0], flip=0.5, jitter=0.0, grayscale=0.0)},
    MULTI: {name: View(**values) for name, values in PRESETS["dino"].items()},
}


def normalise(batch: Tensor) -> Tensor:
    """uint8 (B, C, h, w) -> float32, with one new array: a second temporary doubles the time at large batches."""
    mean, std = (torch.tensor(values[: batch.shape[1]])[:, None, None] for values in (MEAN, STD))
    return batch.float().mul_(1 / (255 * std)).add_(-mean / std)


def unchanged(batch: Batch) -> Batch:
    return batch


def normalised(batch: Batch) -> list[Tensor]:
    return [normalise(view) for view in batch.views.values()]


def by_samples(images: Images, work: str, batch: int, finish: Callable, scaled: bool = False) -> Method:
    samples = Samples(images, VIEWS[work], 0, 3, faster=Faster(scaled=scaled))

    def run(numbers: range) -> None:
        for start in range(0, len(numbers), batch):
            finish(samples.__getitems__([(0, i) for i in numbers[start : start + batch]]))

    return run


def cached(folder: Path, option: object, root: Path) -> Images:
    """The images of `folder`, read from a cache as loader.cache=`option` makes it."""
    images = open_data(str(folder))
    cache = Cache.of(images, option, 3, str(root))
    images.read_from(build(cache, Builders(PartialState(), 0, lambda line: None), Limit("auto"), "loader.cache="))
    return images


def ours(folder: Path, work: str, batch: int, root: Path) -> dict[str, Method]:
    """Our ways by name: what a worker hands over (uint8), and the same normalised on this core; `root`: of caches."""
    ways = {PLAIN: open_data(str(folder))} | {
        f"ours, cache={option}": cached(folder, option, root) for option in (256, "full")
    }
    methods = {name: by_samples(images, work, batch, unchanged) for name, images in ways.items()}
    return methods | {
        f"{name}, normalised": by_samples(images, work, batch, normalised) for name, images in ways.items()
    }
