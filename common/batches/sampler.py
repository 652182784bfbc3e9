"""The stateless sampler: which images make up step s, as a pure function of the seed.

Epoch e visits the images in an order drawn from (seed, e); step s takes the next `batch` of them; process r of R takes
the r-th part. Sample i of epoch e is augmented with a generator of its own, keyed by (seed, e, i). So neither workers,
nor processes, nor an interruption change what the model sees, and resuming at step s needs no stored state but s.
"""

import zlib
from collections.abc import Iterable, Iterator

import numpy as np
from torch.utils.data import Sampler

from ..errors import Refusal

HELD_OUT_EPOCH = 2**62  # the "epoch" of held-out samples: always the same crops, none that training sees


def generator(seed: int, epoch: int, index: int, purpose: str = "") -> np.random.Generator:
    """Return the random generator of one sample: counter-based, so that streams of different samples never overlap.

    What is drawn for one `purpose` does not depend on what else is drawn: a second objective, or view, changes no crop.
    """
    stream = zlib.crc32(purpose.encode())  # 0 for the global crops, which have none
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, stream, index, epoch]))


def order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order in which epoch `epoch` visits `size` images, int64 (size,)."""
    return generator(seed, epoch, 2**63).permutation(size)


class StepPart(list[tuple[int, int]]):
    """Keys (epoch, index) of the images of one part of a step, and `step`: the indices of all images of the step, in
    any part and process. So the number of those with a label is known before any is read. `number`: of a training's
    step, 0-based; None where nothing is trained, and no image mixed with another."""

    def __init__(self, keys: Iterable[tuple[int, int]], step: np.ndarray, number: int | None = None) -> None:
        super().__init__(keys)
        self.step, self.number = step, number  # step: (batch,) int64


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Iterable of a `StepPart` for each part of each step of one process, from step `start` (0-based) up to `steps`.

    Each epoch drops its incomplete last batch. The order changes every epoch, so no image is dropped for good. Raises
    Refusal if a global batch does not fit the data, the processes or the accumulation.

    repeats  so many crops of an image in a row of steps (repeated augmentation, arXiv 1902.05509). An epoch has as many
             steps as without, so it shows one of `repeats` images: as in DeiT's code. Copies of one image are of
             different "epochs", of which there are `repeats` in each; within a batch they lie far apart
    """

    def __init__(
        self,
        size: int,
        batch: int,
        seed: int,
        steps: int,
        start: int = 0,
        rank: int = 0,
        processes: int = 1,
        accumulate: int = 1,
        repeats: int = 1,
    ) -> None:
        if batch < 1:
            raise Refusal(f"batch={batch}: expected at least 1")
        if accumulate < 1:
            raise Refusal(f"accumulate={accumulate}: expected at least 1")
        if batch > size:
            raise Refusal(f"batch={batch} is larger than the training data, {size} images: set batch={size} or less")
        if batch % (processes * accumulate):
            raise Refusal(
                f"batch={batch} (global) cannot be shared by {processes} processes x {accumulate} accumulation steps: "
                f"choose a multiple of {processes * accumulate}"
            )
        self.size, self.batch, self.seed, self.steps, self.start = size, batch, seed, steps, start
        self.rank, self.processes, self.accumulate = rank, processes, accumulate
        self.per_epoch, self.repeats = size // batch, repeats

    def __len__(self) -> int:
        return max(0, self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[StepPart]:
        epoch, images = -1, np.empty(0, np.int64)
        micro = self.batch // self.accumulate
        share = micro // self.processes
        for step in range(self.start, self.steps):
            if step // self.per_epoch != epoch:
                epoch = step // self.per_epoch
                images = order(self.seed, epoch, self.size)
            keys = self._keys(epoch, step % self.per_epoch, images)
            indices = np.array([index for _, index in keys])
            for part in range(self.accumulate):
                begin = part * micro + self.rank * share
                yield StepPart(keys[begin : begin + share], indices, step)

    def _keys(self, epoch: int, at: int, images: np.ndarray) -> list[tuple[int, int]]:
        """Keys of the whole step number `at` of an epoch."""
        places = range(at * self.batch, (at + 1) * self.batch)  # in the list of all, each `repeats` times
        if self.repeats == 1:
            return [(epoch, int(images[place])) for place in places]
        chosen = sorted((place % self.repeats, place // self.repeats) for place in places)
        return [(epoch * self.repeats + copy, int(images[which])) for copy, which in chosen]


def held_out(size: int, share: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Split `size` images: (indices to train on, indices held out for monitors), both sorted.

    The split depends on `size` alone, so that runs with different seeds are judged on the same images.
    """
    count = min(int(size * share), most)
    shuffled = order(0, HELD_OUT_EPOCH, size)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])
