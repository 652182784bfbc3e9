"""Batches from a stream: read in the training process, a step after the other, decoded in the loader's."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Sampler

from common.batches.cutting import CropDraws, Size
from common.batches.sampler import StepPart, StepSampler
from common.batches.samples import Batch, Samples
from common.data import Unreadable
from common.printable import printable
from pretrain.streaming.reading import Key, Stream, pixels
from pretrain.streaming.source import Item


class StreamPart(StepPart):
    """Keys of one part of a step, and the samples themselves."""

    def __init__(self, samples: Iterable[tuple[Key, Item]], number: int) -> None:
        keys, items = zip(*samples, strict=True)
        super().__init__(keys, np.array([index for _, index in keys]), number)
        self.items: dict[int, Item] = dict(zip((index for _, index in keys), items, strict=True))

    def __getitem__(self, which: Any) -> Any:
        """Return a key or, of a slice, a part with the samples of its keys."""
        keys = super().__getitem__(which)
        if not isinstance(which, slice) or self.number is None:
            return keys
        return StreamPart([(key, self.items[key[1]]) for key in keys], self.number)


class StreamSampler(Sampler[list[Key]]):
    """Iterable of a `StreamPart` for each part of each step of one process, from step `start` (0-based) up to `steps`,
    where the stream begins. It remembers the position behind each step before it hands out the last part of it."""

    def __init__(self, stream: Stream, batch: int, steps: int, start: int, accumulate: int) -> None:
        StepSampler(batch, batch, 0, steps, start, stream.rank, stream.processes, accumulate)  # refuses what cannot be
        self.stream, self.steps, self.start, self.accumulate = stream, steps, start, accumulate
        self.share = batch // accumulate // stream.processes

    def __len__(self) -> int:
        return max(0, self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[StreamPart]:
        samples = self.stream.samples()
        for step in range(self.start, self.steps):
            for part in range(self.accumulate):
                chosen = list(itertools.islice(samples, self.share))
                if part == self.accumulate - 1:
                    self.stream.remember(step + 1, chosen[-1][2])
                yield StreamPart([(key, item) for key, item, _ in chosen], step)


class StreamSamples(Samples):
    """Samples of a stream; of other keys, those of the images that were kept of its beginning."""

    _items: dict[int, Item] | None = None

    def __getitems__(self, keys: list[Key]) -> Batch:
        """Make one batch of a `StreamPart`, or of a list of (epoch, index)."""
        self._items = keys.items if isinstance(keys, StreamPart) else None
        return super().__getitems__(keys)

    def _read(
        self, index: int, unreadable: list[str], rows: CropDraws | None = None
    ) -> tuple[Tensor | None, Size, int, dict[str, Any]]:
        """Read as `Samples` does; in place of a sample that cannot be read stands the next one of the same part that
        can."""
        if self._items is None:
            return super()._read(index, unreadable, rows)
        span, indices = getattr(self.images.source, "span", None), list(self._items)
        at = indices.index(index)
        for other in indices[at:] + indices[:at]:
            item = self._items[other]
            try:
                image = pixels(item, self.channels, span)
            except Exception as error:  # decoders raise almost anything
                reason = printable(" ".join(str(error).split())) or type(error).__name__
                unreadable.append(str(Unreadable(item.name, reason)))
                continue
            return image, (image.shape[1], image.shape[2]), index, {}
        return None, (1, 1), index, {}
