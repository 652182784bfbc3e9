"""Building a cache of decoded images: once, by all processes of a job together; what was stopped is gone on with."""

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.utils.data import Dataset

from ..batches.loading import Loader
from ..batches.unreadable import Limit
from ..data import Images, Unreadable
from ..errors import Refusal
from ..processes.stopping import Stopped
from ..training.tracking import clock
from . import parts
from .pixels import Cache, Pixels, shrink, size_of

T = TypeVar("T")
OFTEN = 5.0  # seconds between lines about progress
PREFETCH = 4


@dataclass(frozen=True)
class Builders:
    """Processes that build a cache.

    process  one of the job's, each of which takes its share
    workers  processes that each of them starts to decode; 0: it decodes itself
    say      prints a line
    stopped  the signal that asked to stop, if one did
    """

    process: PartialState
    workers: int
    say: Callable[[str], None]
    stopped: Callable[[], int | None] = lambda: None


def build(cache: Cache, builders: Builders, limit: Limit, option: str) -> Pixels:
    """Make what of a cache is missing, and open it. Every process of a job calls it.

    Raises Refusal, before anything is written, where the disk has no room for it, and where more images cannot be read
    than `limit` allows; Stopped, in all processes, where a signal came to one: a part that is whole is kept.
    """
    with contextlib.ExitStack() as held:
        missing: list[int] = []
        if builders.process.is_main_process:
            missing = cache.missing()
            if missing:
                cache.refuse_too_large(len(missing), option)
                held.enter_context(_lock(cache, builders))
                missing = cache.missing(builders.say)  # another job may have made them meanwhile
                _sweep(cache)
            if missing:
                there = cache.num_parts - len(missing)
                more = f"; {there} of {cache.num_parts} parts are there" if there else ""
                if others := cache.beside:
                    more += (
                        f"; other caches of these images, {size_of(others)}, are kept there until somebody removes them"
                    )
                builders.say(f"cache      {cache.size()}{more}; made once")
        missing = _first(builders.process, missing)
        if missing:
            _Building(cache, builders, limit, missing).run()
    pixels = Pixels(cache)
    _refuse_bad(cache, [f"{cache.images.name(i)}: {why}" for i, why in pixels.unreadable()], limit)
    return pixels


def _refuse_bad(cache: Cache, bad: Sequence[str], limit: Limit) -> None:
    """Raises Refusal for more images that cannot be read than `limit` allows."""
    total = len(cache.images)
    if len(bad) > limit.allowed(total):
        limit.refuse(len(bad), total, total, cache.images.where, bad)


def read_cached(
    images: Sequence[Images], cache: Cache, builders: Builders, limit: Limit, option: str, dry_run: bool = False
) -> str:
    """Let `images`, all of one source, be read from a cache, which is made where it is not there, but not in a dry run;
    returns what it is, in a line. Raises as `build` does."""
    if cache.images.in_memory:
        return f"none: {cache.images.where} is in memory, decoded"
    if dry_run and (missing := len(cache.missing())):
        cache.refuse_too_large(missing, option)
        return f"{cache.size()}, made when the training begins: until then each image is decoded"
    pixels = build(cache, builders, limit, option)
    for each in images:
        each.read_from(pixels)
    return f"{cache}, {size_of(pixels.num_bytes)} in {cache.folder}"


class _Building:
    """Making of the missing parts by all processes, which meet after each round of one part each."""

    def __init__(self, cache: Cache, builders: Builders, limit: Limit, missing: Sequence[int]) -> None:
        self.cache, self.builders, self.limit = cache, builders, limit
        rank, together = builders.process.process_index, builders.process.num_processes
        self.rounds = [missing[start : start + together] for start in range(0, len(missing), together)]
        self.mine = list(missing[rank::together])
        self.begun = self.last_line = time.monotonic()
        self.done, self.total = 0, sum(len(cache.range_of(number)) for number in missing)
        self.bad: list[str] = []

    def run(self) -> None:
        """Make all of them. Raises Stopped, and Refusal for too many unreadable images, in all processes alike."""
        with closing(self._decoded([i for number in self.mine for i in self.cache.range_of(number)])) as images:
            for turn, together in enumerate(self.rounds):
                if turn < len(self.mine):
                    self._write(self.mine[turn], images)
                self._meet(together)

    def _decoded(self, numbers: Sequence[int]) -> Generator[Tensor | str, None, None]:
        if numbers:  # of few parts a process may have none
            workers = min(self.builders.workers, len(numbers))
            yield from Loader(Shrunk(self.cache, numbers), None, workers, prefetch=PREFETCH)

    def _write(self, number: int, images: Iterator[Tensor | str]) -> None:
        """Write a part, unless a signal comes: the others learn of it when they meet."""
        with contextlib.suppress(_Cut):
            chosen = self.cache.range_of(number)
            parts.write(self.cache.path(number), self.cache.about, self._told(chosen, images))

    def _told(self, chosen: range, images: Iterator[Tensor | str]) -> Iterator[Tensor | str]:
        together = self.builders.process.num_processes
        for done, (i, image) in enumerate(zip(chosen, itertools.islice(images, len(chosen)), strict=True)):
            if self.builders.stopped() is not None and together > 1:
                raise _Cut
            if isinstance(image, str):
                self.bad.append(f"{self.cache.images.name(i)}: {image}")
            yield image
            now = time.monotonic()
            if now - self.last_line > OFTEN:
                self.last_line = now
                self._say(min(self.total, self.done + together * done))  # the others are about as far

    def _say(self, done: int) -> None:
        speed = max(1, done) / (time.monotonic() - self.begun)
        left = clock((self.total - done) / speed)
        self.builders.say(f"cache      {done:,} of {self.total:,} images, {speed:,.1f} img/s, ETA {left}")

    def _meet(self, numbers: Sequence[int]) -> None:
        """Learn what became of the parts of a round."""
        self.done += sum(len(self.cache.range_of(number)) for number in numbers)
        signal = self.builders.stopped()
        if self.builders.process.num_processes > 1:
            everybody = gather_object([(signal, self.bad)])
        else:
            everybody = [(signal, self.bad)]
        signals = [number for number, _ in everybody if number is not None]
        if signals:
            self.builders.say("cache      stopped; the parts that are whole are kept, the same command goes on")
            raise Stopped(signals[0])
        _refuse_bad(self.cache, sorted(message for _, messages in everybody for message in messages), self.limit)


class _Cut(Exception):
    """A part that is not written to its end."""


class Shrunk(Dataset):
    """Data set of the images of a cache, as they are stored; a text says why one cannot be read."""

    def __init__(self, cache: Cache, numbers: Sequence[int]) -> None:
        self.images, self.side, self.channels, self.numbers = cache.images, cache.side, cache.channels, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, at: int) -> Tensor | str:
        try:
            return shrink(self.images.read(self.numbers[at], self.channels, contiguous=False), self.side)
        except Unreadable as error:
            return error.reason


@contextlib.contextmanager
def _lock(cache: Cache, builders: Builders) -> Iterator[None]:
    """Wait until no other job builds this cache. A lock ends with the process that holds it."""
    from filelock import FileLock, Timeout

    try:
        cache.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"the cache cannot be kept in {cache.root}: {error.strerror}"
        raise Refusal(f"{reason}; choose another folder (cache_root)") from None
    lock = FileLock(str(cache.folder / ".lock"))
    waiting = False
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            if not waiting:
                builders.say(f"cache      waiting for another job, which makes {cache.folder}")
            waiting = True
            if (number := builders.stopped()) is not None:
                raise Stopped(number) from None
    try:
        yield
    finally:
        lock.release()


def _sweep(cache: Cache) -> None:
    """Remove what a killed process left of parts that it was writing; for the process that holds the lock."""
    for left in cache.folder.glob(".*.pixels.*"):
        left.unlink(missing_ok=True)


def _first(process: PartialState, value: T) -> T:
    """Return the first process's value, in all."""
    values: list[Any] = [value]
    if process.num_processes > 1:
        broadcast_object_list(values)
    return values[0]
