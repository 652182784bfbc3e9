"""The stateless sampler: which images make up step s, and what each looks like, as pure functions of the seed.

Epoch e visits the images in an order drawn from (seed, e); step s takes the next `batch` of them; process r of R takes
the r-th part. Sample i of epoch e is augmented with a generator of its own, keyed by (seed, e, i). So neither workers,
nor processes, nor an interruption change what the model sees, and resuming at step s needs no stored state but s.
"""

import functools
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..data import UNLABELLED, Images, Unreadable
from ..errors import Refusal
from .loading import Loader
from .transforms import View, augment

HELD_OUT_EPOCH = 2**62  # the "epoch" of held-out samples: always the same crops, none that training sees
FIRST_VIEW = "global"  # which every recipe has; its crops need no purpose (see `generator`)
Draw = Callable[[np.random.Generator], Mapping[str, np.ndarray]]
Collate = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass
class Batch:
    """Input of a training step, from B images. It holds labels only as draws, for the objectives that read them.

    Crops are crop-major: with `count` crops per image, row c * B + i of a view is crop c of image i.
    """

    views: dict[str, Tensor]  # name -> uint8 (count * B, C, h, w)
    index: Tensor  # (B,) which images
    draws: dict[str, Tensor] = field(default_factory=dict)  # "purpose/what" -> (B, ...); what is collated: any shape
    unreadable: list[str] = field(default_factory=list)  # files that were replaced by another image
    hopeless: bool = False  # so many of them in a row that none was found to take the place

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on `device`."""
        views = {name: view.to(device, non_blocking=True) for name, view in self.views.items()}
        draws = {name: draw.to(device, non_blocking=True) for name, draw in self.draws.items()}
        return replace(self, views=views, draws=draws)

    def pin_memory(self) -> "Batch":
        """Return the same batch in page-locked memory, from which copies to a GPU are asynchronous."""
        self.views = {name: view.pin_memory() for name, view in self.views.items()}
        self.draws = {name: draw.pin_memory() for name, draw in self.draws.items()}
        return self


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
    any part and process. So the number of those with a label is known before any is read."""

    def __init__(self, keys: Iterable[tuple[int, int]], step: np.ndarray) -> None:
        super().__init__(keys)
        self.step = step  # (batch,) int64


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Iterable of a `StepPart` for each part of each step of one process, from step `start` (0-based) up to `steps`.

    Every epoch drops the images that do not fill a last global batch; they come first nowhere, as each epoch has an
    order of its own. Raises Refusal if a global batch does not fit the data, the processes or the accumulation.
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
        self.per_epoch = size // batch

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
            first = (step % self.per_epoch) * self.batch
            step_images = images[first : first + self.batch]
            for part in range(self.accumulate):
                begin = part * micro + self.rank * share
                yield StepPart(((epoch, int(index)) for index in step_images[begin : begin + share]), step_images)


class Samples(Dataset):
    """Data set that decodes, crops and draws: (epoch, index) pairs in, one `Batch` out. It runs in the loader's
    workers.

    `draws` (purpose -> function of a generator) is called for every image. `collate` (purpose -> function) is called
    once per batch, with the stacked draws of its purpose, {what: (B, ...)}; the tensors it returns join them.
    Each purpose in `labelled` finds among its draws "label" (B,), the class of the image that is shown, or -1, and
    "known" (), the images with a label in the whole step, divided by its parts: the same in all parts of the step.
    """

    ATTEMPTS = 64  # other images tried when one cannot be read

    def __init__(
        self,
        images: Images,
        views: Mapping[str, View],
        seed: int,
        channels: int,
        draws: Mapping[str, Draw] | None = None,
        collate: Mapping[str, Collate] | None = None,
        labelled: Collection[str] = (),
    ) -> None:
        self.images, self.views, self.seed, self.channels = images, dict(views), seed, channels
        self.draws, self.collate, self.labelled = dict(draws or {}), dict(collate or {}), tuple(labelled)

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        """Make one batch of a list of (epoch, index)."""
        crops: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(v.count)] for name, v in self.views.items()}
        draws: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in (*self.draws, *self.labelled)}
        unreadable: list[str] = []
        hopeless = False
        for epoch, index in keys:
            image, shown = self._read(index, unreadable)
            for name in self.labelled:
                draws[name].setdefault("label", []).append(self._label(shown))
            if image is None:  # `watch` ends the run; an exception would come out of the worker with its traceback
                hopeless, image = True, torch.zeros(self.channels, 1, 1, dtype=torch.uint8)
            for name, draw in self.draws.items():
                for what, value in draw(generator(self.seed, epoch, index, name)).items():
                    draws[name].setdefault(what, []).append(value)
            for name, view in self.views.items():
                rng = generator(self.seed, epoch, index, "" if name == FIRST_VIEW else f"view/{name}")
                for number, row in enumerate(crops[name]):  # each takes equally many numbers: more crops change none
                    row.append(augment(image, view, rng, number))
        stacked = self._stacked(draws)
        for name in self.labelled:
            stacked[f"{name}/known"] = torch.tensor(self._known(keys))
        return Batch(
            {name: torch.stack([crop for row in rows for crop in row]) for name, rows in crops.items()},
            torch.tensor([index for _, index in keys]),
            stacked,
            unreadable,
            hopeless,
        )

    def _stacked(self, draws: Mapping[str, Mapping[str, list[np.ndarray]]]) -> dict[str, Tensor]:
        """Return {"purpose/what": (B, ...)}: the draws, and what `collate` makes of them."""
        tensors: dict[str, Tensor] = {}
        for name in {**draws, **self.collate}:
            stacked = {what: torch.from_numpy(np.stack(values)) for what, values in draws.get(name, {}).items()}
            if name in self.collate:
                stacked |= self.collate[name](dict(stacked))
            tensors |= {f"{name}/{what}": tensor for what, tensor in stacked.items()}
        return tensors

    def _read(self, index: int, unreadable: list[str]) -> tuple[Tensor | None, int]:
        """Return (image, its index): image `index` or, where it cannot be read, another one, always the same; None if
        no other can be read. Where labels are asked for, the other one has a label if this one has, so that as many
        images of a step have one as was known before."""
        for attempt in range(self.ATTEMPTS):
            at = self._instead(index, attempt) if attempt else index
            try:  # layout is left to the decoder: augment copies what it crops
                return self.images.read(at, self.channels, contiguous=False), at
            except Unreadable as error:
                unreadable.append(str(error))
        return None, index

    def _instead(self, index: int, attempt: int) -> int:
        """Return the index of the image that stands for image `index` at this attempt, counted from 1."""
        candidates = np.flatnonzero(self._has_label == self._has_label[index])  # seldom: not worth remembering
        size = len(candidates)
        return int(candidates[(int(np.searchsorted(candidates, index)) + attempt * (size // 3 + 1)) % size])

    @functools.cached_property
    def _has_label(self) -> np.ndarray:
        """Mask, bool (n,), of the images with a label; none has one where labels are not asked for."""
        labels = self.images.labels if self.labelled else None
        return np.zeros(len(self.images), bool) if labels is None else labels >= 0

    def _known(self, keys: list[tuple[int, int]]) -> float:
        """Count the images with a label in the step that `keys` are a part of, divided by its parts; `keys` that are no
        `StepPart` are a whole step."""
        step = keys.step if isinstance(keys, StepPart) else np.array([index for _, index in keys])
        return int(self._has_label[step].sum()) * len(keys) / len(step)

    def _label(self, index: int) -> np.ndarray:
        """Return the class of image `index`, int64 (), or -1."""
        labels = self.images.labels
        return np.asarray(UNLABELLED if labels is None else labels[index], np.int64)


def loader(samples: Samples, sampler: Any, workers: int, pin: bool) -> Loader:
    """Return a loader of batches from `workers` processes (0: in this one), in the sampler's order."""
    return Loader(samples, sampler, workers, prefetch=4, held=sampler.accumulate + 1, pin=pin)


def held_out(size: int, share: float, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Split `size` images: (indices to train on, indices held out for monitors), both sorted.

    The split depends on `size` alone, so that runs with different seeds are judged on the same images.
    """
    count = min(int(size * share), most)
    shuffled = order(0, HELD_OUT_EPOCH, size)
    return np.sort(shuffled[count:]), np.sort(shuffled[:count])
