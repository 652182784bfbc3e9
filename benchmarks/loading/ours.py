"""Our loader's work on the same files as its peers': decode, crop, and a batch of uint8 or of normalised floats."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.loading.measuring import Method
from benchmarks.loading.peers import MEAN, MULTI, ONE, STD
from common.batches.samples import Batch, Faster, Samples
from common.batches.views import PRESETS, View
from common.data import Images

OURS = ("ours, uint8 batch", "ours + normalise")
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


def ours(images: Images, work: str, batch: int) -> dict[str, Method]:
    """Our ways by name: what a worker hands over (uint8), and the same normalised on this core."""
    method = partial(by_samples, images, work, batch)
    return {OURS[0]: method(unchanged), OURS[1]: method(normalised)}
