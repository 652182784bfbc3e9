"""Pixels of a data set that was decoded before: where they are kept, how large they are, and how one is read."""

import contextlib
import functools
import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..batches.crops import resize
from ..data import Images
from ..data.images import evenly, with_channels
from ..decoding.headers import read_header
from ..errors import Refusal, nearest
from ..kept import cache_folder
from .parts import FORMAT, Damaged, Part

FULL = "full"
LEAST, MOST_PARTS = 64, 128  # images of a part, at least, and parts of a data set: each is an open file
SAMPLE = 256  # images by which the size is estimated
CHECKED = 2  # images of a part whose pixels are compared with what was written


def check_option(value: Any, option: str) -> None:
    """Raises Refusal for what is no value of an option that says how images are cached."""
    if value is None or value == FULL or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return
    near = nearest(str(value), [FULL])
    raise Refusal(
        f"{option}{value}: expected full, the pixels that a shorter side has at most (a whole number of at least 1), "
        f"or null{near}"
    )


def scaled(height: int, width: int, side: int | None) -> tuple[int, int]:
    """Return (height, width) of an image in the cache: its shorter side is at most `side`; None: as it is."""
    if side is None or min(height, width) <= side:
        return height, width
    ratio = side / min(height, width)
    return max(side, round(height * ratio)), max(side, round(width * ratio))


def shrink(image: Tensor, side: int | None) -> Tensor:
    """Return uint8 (C, H, W) as it is cached: `scaled`, bicubic and antialiased."""
    return resize(image, scaled(int(image.shape[1]), int(image.shape[2]), side), "bicubic")


@dataclass(frozen=True)
class Cache:
    """Where the decoded images of a source are, or will be.

    images    all of the source
    side      pixels of the shorter side, at most; None: as they are
    channels  1 or 3
    root      folder in which caches are kept
    """

    images: Images
    side: int | None
    channels: int
    root: Path

    @classmethod
    def of(cls, images: Images, option: Any, channels: int, root: str | None) -> "Cache":
        """Return the cache of the source of `images`; `option` as `check_option` takes it, `root`: None is usual."""
        source = images.source
        whole = Images(source, images.where)
        place = cache_folder() / "decoded" if root is None else Path(root).expanduser()
        return cls(whole, None if option == FULL else int(option), channels, place)

    @functools.cached_property
    def about(self) -> str:
        """Digest of the images as they are now, and of what was done to them."""
        source: Any = self.images.source
        facts = f"{FORMAT} {self.side} {self.channels} {getattr(source, 'span', None)}".encode()
        return hashlib.sha256(source.stamp() + source.identity() + facts).hexdigest()[:32]

    @property
    def folder(self) -> Path:
        """Folder of this cache alone."""
        place = hashlib.sha256(self.images.where.encode(errors="backslashreplace")).hexdigest()[:16]
        return self.root / f"{place}-{self.about[:16]}"

    @property
    def per_part(self) -> int:
        """Images of a part; the last one may have fewer."""
        return max(LEAST, math.ceil(len(self.images) / MOST_PARTS))

    @property
    def num_parts(self) -> int:
        """Parts of the whole."""
        return math.ceil(len(self.images) / self.per_part)

    def path(self, number: int) -> Path:
        """Return the file of part `number`."""
        return self.folder / f"{number:03d}-of-{self.num_parts:03d}.pixels"

    def range_of(self, number: int) -> range:
        """Return which images of the source are in part `number`."""
        return range(len(self.images))[number * self.per_part : (number + 1) * self.per_part]

    def opened(self, number: int) -> Part:
        """Open part `number`. Raises Damaged or OSError."""
        part = Part(self.path(number), self.about, self.channels)
        if len(part.index) != len(self.range_of(number)):
            raise Damaged(f"it has {len(part.index):,} images, expected {len(self.range_of(number)):,}")
        return part

    def missing(self, say: Callable[[str], None] = lambda line: None) -> list[int]:
        """Return the parts that are not there, or damaged, which is said."""
        numbers = []
        for number in range(self.num_parts):
            try:
                part = self.opened(number)
                for place in evenly(len(part.index), CHECKED):
                    part.check(place)
            except FileNotFoundError:
                numbers.append(number)
            except (Damaged, OSError) as error:
                say(f"warning: {self.path(number)} is damaged and made again: {error}")
                numbers.append(number)
        return numbers

    @functools.cached_property
    def num_bytes(self) -> int:
        """Bytes that the whole will take, by the headers of a sample; of few images of all."""
        chosen = evenly(len(self.images), SAMPLE)
        areas = [math.prod(scaled(*size, self.side)) for i in chosen if (size := self._size(i)) is not None]
        return round(sum(areas) / max(1, len(areas)) * self.channels * len(self.images))

    def _size(self, i: int) -> tuple[int, int] | None:
        """Return (height, width) of an image of the source, or in the other order; None for one that is broken."""
        encoded = getattr(self.images.source, "encoded", None)
        try:
            if encoded is not None:
                header, _ = read_header(encoded(i).data, bare=False)
                if header.height and header.width:
                    return header.height, header.width
            height, width = self.images.read(i, self.channels, contiguous=False).shape[1:]
            return height, width
        except (OSError, ValueError):
            return None

    @property
    def free(self) -> int:
        """Bytes that are free where it is kept."""
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def refuse_too_large(self, missing: int, option: str) -> None:
        """Raises Refusal if the disk has no room for so many parts."""
        needed = self.num_bytes * missing // self.num_parts
        if needed > self.free:
            raise Refusal(
                f"{option}{FULL if self.side is None else self.side}: {self} take about {size_of(self.num_bytes)}, "
                f"{size_of(needed)} of it still to be written to {self.root}, where {size_of(self.free)} are free: "
                "make room, or choose a smaller side, another disk (cache_root), or no cache"
            )

    @property
    def beside(self) -> int:
        """Bytes of other caches of images at the same place: of another side, or as they were before."""
        sizes = [0]
        for path in self.root.glob(f"{self.folder.name.partition('-')[0]}-*/*.pixels"):
            with contextlib.suppress(FileNotFoundError):  # it is being removed
                sizes += [path.stat().st_size] if path.parent != self.folder else []
        return sum(sizes)

    def size(self) -> str:
        """Return what it is and how large, in words."""
        return f"{self}: about {size_of(self.num_bytes)} in {self.folder} ({size_of(self.free)} free)"

    def __str__(self) -> str:
        how = "as they are" if self.side is None else f"at {self.side} px"
        return f"{len(self.images):,} images {how}"


def size_of(count: int) -> str:
    """Return a number of bytes as MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


class Pixels:
    """Decoded images, read where they lie; what `Images.read_from` takes. It is pickled without its maps."""

    def __init__(self, cache: Cache) -> None:
        """Raises Refusal for a cache that this process does not see whole."""
        self.folder, self.about = cache.folder, cache.about
        self.channels, self.per_part = cache.channels, cache.per_part
        self.paths = [cache.path(number) for number in range(cache.num_parts)]
        self._parts: dict[int, Part] = {}
        try:
            for number in range(cache.num_parts):
                self._parts[number] = cache.opened(number)
        except (Damaged, OSError) as error:
            raise Refusal(
                f"the cache {self.folder} is not whole where this process runs ({error}): give the same command again; "
                "processes on several machines need a disk that all of them share (cache_root)"
            ) from None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": {}}  # opened again where it is unpickled, as one is read

    def unreadable(self) -> list[tuple[int, str]]:
        """List the images of the source that cannot be read, with reasons."""
        return [
            (number * self.per_part + place, why)
            for number, part in sorted(self._parts.items())
            for place, why in sorted(part.reasons.items())
        ]

    @property
    def num_bytes(self) -> int:
        """Bytes of the pixels."""
        return sum(part.pixels for part in self._parts.values())

    def read(self, i: int, channels: int) -> Tensor:
        """Read image `i` of the source, uint8 (channels, H, W), which nobody may write to. Raises ValueError for one
        that cannot be read."""
        number, place = divmod(i, self.per_part)
        if number not in self._parts:
            self._parts[number] = Part(self.paths[number], self.about, self.channels)
        return with_channels(self._parts[number].read(place), channels)
