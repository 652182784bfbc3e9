"""A look at the pixels of images: sizes, colours, what cannot be read, and what repeats must be found by.

Letters: n images that could be read, S side of a thumbnail.
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..data import Images, Unreadable
from ..data.images import evenly
from .repeats import SIDE

TIMED = 256  # images that are decoded one after the other, to say how fast that is
SECONDS = 10.0  # and for how long at most
AT_ONCE = 64  # images that are being decoded: memory
WEIGHTS = torch.tensor([0.299, 0.587, 0.114])  # of red, green and blue in luma (BT.601)


@dataclass
class Survey:
    """What was found in the pixels of some images of one split."""

    looked: int = 0
    index: list[int] = field(default_factory=list)  # of each readable one, among the images of the split
    sizes: list[tuple[int, int]] = field(default_factory=list)  # height, width, in pixels
    means: list[np.ndarray] = field(default_factory=list)  # (3,) of the channels, in [0, 1]
    squares: list[np.ndarray] = field(default_factory=list)  # (3,) means of their squares
    grey: list[bool] = field(default_factory=list)  # all channels are alike
    digests: list[bytes] = field(default_factory=list)  # of the pixels and their shape
    thumbnails: list[np.ndarray] = field(default_factory=list)  # uint8 (S, S), luma
    bad: list[str] = field(default_factory=list)  # "name: reason"

    @property
    def mean(self) -> np.ndarray:
        """Mean of each channel over all pixels, every image counted alike, (3,)."""
        return np.mean(self.means, 0)

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of each channel, likewise, (3,)."""
        return np.sqrt(np.maximum(np.mean(self.squares, 0) - self.mean**2, 0))


@dataclass
class _Seen:
    size: tuple[int, int]
    mean: np.ndarray
    square: np.ndarray
    grey: bool
    digest: bytes
    thumbnail: np.ndarray


def survey(images: Images, chosen: Sequence[int], threads: int, step: Callable[[], None]) -> Survey:
    """Look at the `chosen` images, in so many threads; `step` is called after each."""
    found = Survey()
    for at, seen in _in_order(images, chosen, threads):
        found.looked += 1
        if isinstance(seen, str):
            found.bad.append(seen)
        else:
            found.index.append(at)
            found.sizes.append(seen.size)
            found.means.append(seen.mean)
            found.squares.append(seen.square)
            found.grey.append(seen.grey)
            found.digests.append(seen.digest)
            found.thumbnails.append(seen.thumbnail)
        step()
    return found


def _in_order(images: Images, chosen: Sequence[int], threads: int) -> Iterator[tuple[int, _Seen | str]]:
    def look(at: int) -> _Seen | str:
        try:
            return seen(images.read(at, 3, contiguous=False))
        except Unreadable as error:
            return str(error)

    rest = iter(chosen)
    with ThreadPoolExecutor(threads) as pool:
        waiting = [(at, pool.submit(look, at)) for at in islice(rest, AT_ONCE)]
        while waiting:
            at, future = waiting.pop(0)
            yield at, future.result()
            waiting += [(more, pool.submit(look, more)) for more in islice(rest, 1)]


def seen(image: Tensor) -> _Seen:
    """What is kept of an image, uint8 (3, H, W)."""
    values = image.float().div_(255)
    luma = (values * WEIGHTS[:, None, None]).sum(0)[None, None]
    small = F.adaptive_avg_pool2d(luma, SIDE)[0, 0].mul_(255).round_().to(torch.uint8)
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.data)
    return _Seen(
        (image.shape[1], image.shape[2]),
        values.mean((1, 2)).double().numpy(),
        values.square().mean((1, 2)).double().numpy(),
        bool((image[0] == image[1]).all() and (image[1] == image[2]).all()),
        digest.digest(),
        small.numpy(),
    )


def pace(images: Images) -> float | None:
    """Images/s that one thread decodes, of an even sample; None where nothing has to be decoded."""
    if images.in_memory:
        return None
    began, count = time.perf_counter(), 0
    for at in evenly(len(images), TIMED):
        try:
            images.read(at, 3, contiguous=False)
        except Unreadable:
            continue
        count += 1
        if time.perf_counter() - began > SECONDS:
            break
    return count / (time.perf_counter() - began) if count else None
