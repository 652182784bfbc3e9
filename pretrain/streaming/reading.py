"""Order of a stream: every sample of a process's part once an epoch, shuffled, from any position on.

The shards are put in an order drawn from (seed, epoch). Process r of R reads every R-th of them or, of fewer shards
than processes, all of them, and of their samples every R-th. Samples are read a block at a time, and each block is put
in an order drawn from (seed, epoch, block). So a position is a few numbers and the state of one shard: whoever goes on
from it reads that block again, and no sample is left out or seen twice.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from common.batches.sampler import generator
from common.data import Images
from common.decoding.decode import decode
from common.decoding.depth import Range
from common.errors import Refusal
from pretrain.streaming.source import Item, Source

HEAD = 512  # samples at the beginning of a stream that are not trained on, at most: monitors look at them
LEAST = 16  # of them, at least: a step is measured on them


@dataclass(frozen=True)
class Position:
    """Place in a process's part of a stream: all that what follows depends on."""

    epoch: int = 0
    number: int = 0  # samples of the epoch before this one, in this part
    block: int = 0
    shard: int = 0  # place of the shard that the block begins in, in the order of the epoch
    state: Any = None  # of that shard at the beginning of the block; None: its beginning
    done: int = 0  # samples of the block that lie behind

    def stored(self) -> dict[str, Any]:
        """Return it as numbers and texts in containers."""
        return asdict(self)


Key = tuple[int, int]  # epoch and number of a sample, which no other sample has


class Stream:
    """A process's part of a stream.

    block      samples that are shuffled among each other, and in memory
    left_out   digests of what is not trained on
    positions  step -> where the next one begins; of the last steps that were asked for
    """

    REMEMBERED = 1000  # steps; more than loaders prepare ahead

    def __init__(self, source: Source, seed: int, rank: int, processes: int, block: int) -> None:
        self.source, self.seed, self.rank, self.processes, self.block = source, seed, rank, processes, block
        self.left_out: frozenset[bytes] = frozenset()
        self.begin_at = Position()
        self.positions: dict[int, Position] = {}
        self._kept: tuple[Any, list[Item], int, Any] | None = None  # the block that was read last

    def remember(self, step: int, position: Position) -> None:
        """Remember that what follows `step` begins at `position`."""
        self.positions[step] = position
        self.positions.pop(step - self.REMEMBERED, None)

    def go_on(self, step: int, stored: dict[str, Any]) -> None:
        """Begin behind `step`, at a stored position."""
        self.begin_at = Position(**stored)
        self.positions = {step: self.begin_at}

    def head(self, count: int) -> list[Item]:
        """Read the first samples of the stream, not shuffled; they are left out from here on."""
        shards = (self.source.shard(number) for number in range(self.source.num_shards))
        items = list(itertools.islice(itertools.chain.from_iterable(shards), count))
        self.left_out = frozenset(digest(item) for item in items)
        return items

    def samples(self) -> Iterator[tuple[Key, Item, Position]]:
        """Yield (key, sample, the position behind it) for ever, from `begin_at` on. Raises Refusal for a part without a
        sample, and where the stream breaks off."""
        at = self.begin_at
        while True:
            items, shard, state = self._block(at)
            if not items:
                if at.block == 0:  # in another epoch this process may have other shards
                    self._refuse_if_nothing_is_left()
                at = Position(at.epoch + 1)
                continue
            order = generator(self.seed, at.epoch, at.block, "stream/block").permutation(len(items))
            for place in order[at.done :].tolist():
                key = at.epoch, at.number * self.processes + self.rank
                at = replace(at, number=at.number + 1, done=at.done + 1)
                yield key, items[place], at
            at = Position(at.epoch, at.number, at.block + 1, shard, state)

    def _refuse_if_nothing_is_left(self) -> None:
        """Raises Refusal if this process could train on no sample of any shard."""
        for number in range(self.source.num_shards):
            if next(self._mine(self.source.shard(number)), None) is not None:
                return
        raise Refusal(
            f"the stream {self.source.where} has nothing to train on for process {self.rank} of {self.processes}: its "
            f"first {len(self.left_out)} samples are kept for monitors; use more data, or fewer processes"
        )

    def _block(self, at: Position) -> tuple[list[Item], int, Any]:
        """Read the block that begins at a position: (its samples, shard and state where the next one begins)."""
        begin = at.epoch, at.block
        if self._kept is None or self._kept[0] != begin:
            self._kept = (begin, *self._read(at))
        return self._kept[1:]

    def _read(self, at: Position) -> tuple[list[Item], int, Any]:
        shards = self._shards(at.epoch)
        place, state, items = at.shard, at.state, list[Item]()
        while place < len(shards):
            shard = self.source.shard(shards[place], state)
            for item in self._mine(shard):
                items.append(item)
                if len(items) == self.block:
                    return items, place, shard.state
            place, state = place + 1, None
        return items, place, None

    def _shards(self, epoch: int) -> list[int]:
        order = generator(self.seed, epoch, 0, "stream/shards").permutation(self.source.num_shards).tolist()
        return order[self.rank :: self.processes] if self._by_shards else order

    @property
    def _by_shards(self) -> bool:
        return self.source.num_shards >= self.processes

    def _mine(self, shard: Iterator[Item]) -> Iterator[Item]:
        """Yield the samples that this process trains on. Of a shard that all read, a sample's content says whose it is:
        a number would have to be counted from its beginning."""
        for item in shard:
            name = digest(item)
            whose = self.rank if self._by_shards else int.from_bytes(name[:8], "big") % self.processes
            if name not in self.left_out and whose == self.rank:
                yield item


def digest(item: Item) -> bytes:
    """Return what a sample is known by again: its content."""
    return hashlib.sha256(item.name.encode() if item.data is None else item.data).digest()[:16]


class Encoded:
    """Source of pictures in memory, as they were written."""

    def __init__(self, items: Collection[Item]) -> None:
        self.items = list(items)
        self.span: Range | None = None

    def __len__(self) -> int:
        return len(self.items)

    def read(self, i: int, channels: int) -> Tensor:
        """Read picture `i`; raises what `decode` does."""
        return pixels(self.items[i], channels, self.span)

    def name(self, i: int) -> str:
        """Return its name in the stream."""
        return self.items[i].name

    def identity(self) -> bytes:
        """Hash the content of all."""
        return hashlib.sha256(b"".join(map(digest, self.items))).digest()

    def stamp(self) -> bytes:
        """Return its identity."""
        return self.identity()


def pixels(item: Item, channels: int, span: Range | None) -> Tensor:
    """Decode a sample; raises ValueError, or what `decode` raises."""
    if item.data is None:
        raise ValueError("there is no picture under this name")
    return decode(np.frombuffer(item.data, np.uint8).copy(), channels, span)


def images_of(items: Collection[Item], where: str) -> Images:
    """Return samples as images without labels."""
    images = Images(Encoded(items), where)
    images.no_label = "the labels of a stream are not read"
    return images
