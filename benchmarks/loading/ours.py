"""Our loader's work on the same files as its peers': decode, crop, and a batch of uint8 or of normalised floats."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.loading.measuring import Method
from benchmarks.loading.peers import MEAN, MULTI, ONE, STD
from common.batches.samples import Batch, Faster, Samples
from common.batches.unreadable import Limit
from common.batches.views import PRESETS, View
from common.caching.building import Builders, read_cached
from common.caching.pixels import Cache
from common.data import Images
from common.processes import group

PLAIN, DEVICE = "ours", "crops left to the device"
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


def by_samples(images: Images, work: str, batch: int, finish: Callable, **faster: bool) -> Method:
    samples = Samples(images, VIEWS[work], 0, 3, faster=Faster(**faster))

    def run(numbers: range) -> None:
        for start in range(0, len(numbers), batch):
            finish(samples.__getitems__([(0, i) for i in numbers[start : start + batch]]))

    return run


def cached(images: Images, option: object, root: Path) -> Images:
    """The images, read from a cache that is made; its size is printed."""
    same = copy.copy(images)
    builders = Builders(group.join(cpu=True), 0, lambda line: None)
    print(read_cached([same], Cache.of(images, option, 3, str(root)), builders, Limit(), "--cache "))
    return same


def ours(images: Images, work: str, batch: int, root: Path) -> dict[str, Method]:
    """Our ways by name: what a worker hands over (uint8), the same normalised on this core, and what it hands over if
    the device makes the crops; `root`: of caches."""
    ways = {PLAIN: images} | {f"{PLAIN}, cache={option}": cached(images, option, root) for option in (256, "full")}
    methods = {name: by_samples(each, work, batch, unchanged) for name, each in ways.items()}
    methods |= {f"{name}, normalised": by_samples(each, work, batch, normalised) for name, each in ways.items()}
    return methods | {
        f"{name}, {DEVICE}": by_samples(each, work, batch, unchanged, on_device=True) for name, each in ways.items()
    }
