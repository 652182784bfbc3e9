"""Images: one split of one data set, whatever it is stored in.

`Images` adds order, labels and errors to a *source*: files in folders or tar archives, arrays in memory, rows of a
Hugging Face table.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..decoding.decode import Reduce, decode, decode_reduced
from ..decoding.depth import Range
from ..errors import Refusal
from ..printable import printable

UNLABELLED = -1
MAX_CONTENTS = 512  # files some of whose content enters the fingerprint
MAX_SIZES = 4096  # files whose size does: each costs a stat, slow on network disks
KIND = "2-"  # before a fingerprint: what it is made of, see `Images.has_fingerprint`


class Unreadable(ValueError):
    """Error about an image that exists in the list but cannot be decoded; `.name` and `.reason` say which and why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both as arguments: the exception is pickled on its way out of a worker
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Source(Protocol):
    """Source of pixels. It must survive pickling, because spawned workers get a copy.

    Some have more: `encoded(i)`, the bytes that are decoded, uint8 (bytes,), and `span`, by which deep ones are.
    """

    def __len__(self) -> int: ...

    def read(self, i: int, channels: int) -> Tensor:
        """Read uint8 (channels, H, W) in any memory layout; may raise anything on a broken image."""
        ...

    def name(self, i: int) -> str: ...

    def identity(self) -> bytes:
        """Bytes that change with the content, as far as a sample shows, and not with the place it is kept in."""
        ...

    def stamp(self) -> bytes:
        """Bytes that change when any file is written or put in the place of another, and with the place: what was
        computed from these files is computed again."""
        ...


class Decoded(Protocol):
    """Pixels of a source that are read in its place, see `Images.read_from`. It must survive pickling."""

    def read(self, i: int, channels: int) -> Tensor:
        """Read uint8 (channels, H, W) in any memory layout, which nobody may write to; raises ValueError where the
        source could not be read."""
        ...


class Images:
    """One split of a data set with random access; cheap to pickle and to fork.

    where     path or name, for messages
    labels    (n,) int64 class of each image, -1 for an unlabelled one; None when the data has no labels at all
    classes   names of the classes, or None
    left_out  what is kept with the images and not read, in words; mostly nothing
    part      sub-folder or split that these are, where a data set is divided
    note      which part of the data set serves as what, in words; mostly nothing
    no_label  why there are no labels, where that is not plain
    """

    def __init__(
        self, source: Source, where: str, labels: Any = None, classes: Sequence[str] | None = None, indices: Any = None
    ):
        self.where = where
        self.labels: np.ndarray | None = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes: tuple[str, ...] | None = None if classes is None else tuple(classes)
        self.left_out = self.part = self.note = self.no_label = ""
        self._source = source
        self._indices: np.ndarray | None = indices  # into the source; None is all of it, in its own order
        self._decoded: Decoded | None = None  # what is read in place of the source

    def __len__(self) -> int:
        return len(self._source) if self._indices is None else len(self._indices)

    @property
    def has_labels(self) -> bool:
        """Whether there are classes, and an image with one."""
        return self.classes is not None and self.labels is not None and bool((self.labels >= 0).any())

    @property
    def why_unlabelled(self) -> str:
        """Reason why these images have no labels, or else what was expected of them."""
        return self.no_label or (
            "expected one sub-folder per class (two or more, and no images beside them), or a label column"
        )

    @property
    def in_memory(self) -> bool:
        """Whether the pixels themselves are kept, so that every image can be read."""
        return isinstance(self._source, Arrays)

    @property
    def source(self) -> Source:
        """Source of the pixels."""
        return self._source

    def source_indices(self) -> list[int]:
        """Return the index of each image in its source."""
        return list(range(len(self))) if self._indices is None else self._indices.tolist()

    def source_index(self, i: int) -> int:
        """Return the index of image `i` in its source."""
        return self._locate(i)

    def _locate(self, i: int) -> int:
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)} in {self.where}")
        return int(i if self._indices is None else self._indices[i])

    def read(self, i: int, channels: int = 3, contiguous: bool = True) -> Tensor:
        """Read image `i` as uint8 (channels, H, W); one channel is luma.

        `contiguous=False` returns the decoder's own memory layout (photographs: channels last), which saves a quarter
        of the loading time and is all that `augment` and `evaluation` need. Raises `Unreadable` on a broken image.
        """
        at = self._locate(i)
        try:
            image = (self._source if self._decoded is None else self._decoded).read(at, channels)
        except Exception as error:  # decoders raise almost anything: SyntaxError, struct.error, MemoryError, ...
            raise self._unreadable(at, error) from error
        if contiguous and self._decoded is not None:
            return image.clone(memory_format=torch.contiguous_format)
        return image.contiguous() if contiguous else image

    def read_from(self, decoded: Decoded) -> None:
        """Read the pixels of these images, and of subsets taken from now on, from what was decoded before. What they
        are called, their labels and their fingerprint stay."""
        self._decoded = decoded

    def read_reduced(self, i: int, channels: int, reduce: Reduce) -> tuple[Tensor, tuple[int, int]]:
        """Read image `i` as `read` does, a JPEG smaller by what `reduce` says, in the decoder's memory layout:
        (pixels, (height, width) of the whole image). For images that `are_encoded`."""
        at, source = self._locate(i), self._source
        try:
            return decode_reduced(source.encoded(at), channels, source.span, reduce)  # type: ignore[attr-defined]
        except Exception as error:
            raise self._unreadable(at, error) from error

    def _unreadable(self, at: int, error: Exception) -> Unreadable:
        reason = re.sub(r" <_io\.\w+ object at 0x\w+>", "", " ".join(str(error).split())) or type(error).__name__
        return Unreadable(self._source.name(at), printable(reason))

    @property
    def are_encoded(self) -> bool:
        """Whether these are files of pictures, decoded whenever they are read."""
        return hasattr(self._source, "encoded")

    def name(self, i: int) -> str:
        """Name image `i` for a message: its path, or `name[i]`."""
        return self._source.name(self._locate(i))

    def set_range(self, span: Range | None) -> None:
        """Set the values of black and white in deep pictures; None: by rules. Raises Refusal where none are deep."""
        if not hasattr(self._source, "span"):
            raise Refusal(f"data_range goes with files of pictures, and {self.where} holds values of 8 bits")
        self._source.span = span

    def subset(self, indices: Any) -> Images:
        """Take the images at `indices` (integers, or one boolean per image), in that order, as a new data set."""
        chosen = np.asarray(indices)
        if chosen.dtype == bool:
            if chosen.shape != (len(self),):
                raise ValueError(f"a mask of shape {chosen.shape} for {len(self)} images")
            chosen = np.flatnonzero(chosen)
        chosen = chosen.astype(np.int64).reshape(-1)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"indices {chosen.min()} … {chosen.max()} for {len(self)} images in {self.where}")
        labels = None if self.labels is None else self.labels[chosen]
        inner = chosen if self._indices is None else self._indices[chosen]
        part = Images(self._source, self.where, labels, self.classes, inner)
        for name in ("left_out", "part", "note", "no_label", "_decoded"):
            setattr(part, name, getattr(self, name))
        return part

    def with_classes(self, classes: Sequence[str]) -> Images:
        """Return the same images, their labels numbered as in `classes`, which have to include theirs."""
        assert self.labels is not None and self.classes is not None
        numbers = {name: number for number, name in enumerate(classes)}
        table = np.array([numbers.get(name, UNLABELLED) for name in self.classes] + [UNLABELLED])
        same = self.subset(np.arange(len(self)))
        same.labels, same.classes = table[self.labels], tuple(classes)
        return same

    def fingerprint(self) -> str:
        """Return a digest of the content: the same data kept at another path has the same one. Only a sample of many
        files is read: see `stamp`."""
        return f"{KIND}{self._digest(first=False)}"

    def has_fingerprint(self, known: str) -> bool:
        """Return whether `known` is the fingerprint of these images, or one of the first kind: of names and sizes."""
        if known.startswith(KIND):
            return known == self.fingerprint()
        bare = copy.copy(self)
        bare.labels = bare.classes = None  # as texts, true and false in a column once were no labels
        return known in (self._digest(first=True), bare._digest(first=True))

    def stamp(self) -> str:
        """Return 16 hex digits that change when any file of these images does, and when they are moved."""
        return hashlib.sha256(self._source.stamp()).hexdigest()[:16]

    def ages(self) -> str:
        """Return 16 hex digits of the sizes and times of change of all files, which a faithful copy shares, and 16 of
        all that the disk says of them; nothing for what is no folder of files."""
        ages = getattr(self._source, "ages", None)
        return "" if ages is None else ages()

    def _digest(self, first: bool) -> str:
        """Return 16 hex digits; `first`: those from before there were kinds of fingerprints."""
        digest = hashlib.sha256(identity_of(self._source, first))
        span: Range | None = getattr(self._source, "span", None)
        if span is not None:
            digest.update(f"range {span}".encode())
        for array in (self._indices, self.labels):
            digest.update(b"none" if array is None else np.ascontiguousarray(array, dtype="<i8").tobytes())
        digest.update("\0".join(self.classes or ()).encode(errors="backslashreplace"))
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        return f"Images({self.where!r}, {len(self)} images, {len(self.classes or ())} classes)"


def identity_of(source: Any, first: bool) -> bytes:
    """Return the identity of a source; `first`: as it was before there were kinds of fingerprints."""
    return getattr(source, "first_identity", source.identity)() if first else source.identity()


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers 0 … count - 1, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


class NamedFiles:
    """Source of files, in folders or archives; their names in one buffer. Its identity does not depend on which.

    A list of a million str objects would be copied into every forked worker, one reference count at a time.

    ends    (n,) int64: where each name ends in the buffer
    buffer  uint8: all names, as bytes, with slashes
    """

    def __init__(self, ends: np.ndarray, buffer: np.ndarray):
        self.ends, self.buffer = ends, buffer
        self.span: Range | None = None

    def __len__(self) -> int:
        return len(self.ends)

    def relative_bytes(self, i: int) -> bytes:
        """Return the name of file `i`, as seen from the folder or the archive."""
        start = self.ends[i - 1] if i else 0
        return self.buffer[start : self.ends[i]].tobytes()

    def relative(self, i: int) -> str:
        """Return the name of file `i`, as seen from the folder or the archive."""
        return os.fsdecode(self.relative_bytes(i))

    def encoded(self, i: int) -> np.ndarray:
        """Read the bytes of file `i`, uint8 (bytes,)."""
        raise NotImplementedError

    def read(self, i: int, channels: int) -> Tensor:
        """Decode file `i`."""
        return decode(self.encoded(i), channels, self.span)

    def size(self, i: int) -> int:
        """Return the bytes of file `i`; may raise OSError."""
        raise NotImplementedError

    def sample(self, i: int) -> bytes:
        """Hash the size and some of the content of file `i`, see `listing.sample`."""
        raise NotImplementedError

    def places(self, chosen: Iterable[int]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Yield (i, what tells its content's place on the disk from all others) for the `chosen` files."""
        raise NotImplementedError

    def stamps(self) -> np.ndarray:
        """Return what the disk says of the files that hold these, as `listing.stamps` does."""
        raise NotImplementedError

    def identity(self) -> bytes:
        """Hash all names, up to 4,096 sizes, and some of the content of up to 512 files, evenly spaced."""
        with ThreadPoolExecutor(16) as threads:  # a disk that is far away answers many at a time
            contents = b"".join(threads.map(self.sample, evenly(len(self), MAX_CONTENTS)))
        return hashlib.sha256(self.first_identity() + contents).digest()

    def first_identity(self) -> bytes:
        """Hash what the first kind of fingerprints was made of: all names and up to 4,096 sizes."""
        digest = hashlib.sha256(self.buffer.tobytes())
        digest.update(self.ends.tobytes())
        for i in evenly(len(self), MAX_SIZES):
            try:
                digest.update(self.size(i).to_bytes(8, "little"))
            except OSError:
                digest.update(b"missing!")
        return digest.digest()

    def stamp(self) -> bytes:
        """Hash what the disk says of every file: size, times, inode. A million files of a local disk take seconds."""
        return hashlib.sha256(self.stamps().tobytes()).digest()

    def ages(self) -> str:
        """Return 16 hex digits of the sizes and times of change of all files, which a faithful copy shares, and after a
        hyphen 16 of all that `stamp` looks at, which it does not share."""
        rows = self.stamps()
        return "-".join(hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in (rows[:, :2], rows))


class Arrays:
    """Source: images of one size in one uint8 array, (n, H, W) or (n, H, W, C) or, with `planar`, (n, C, H, W)."""

    def __init__(self, pixels: np.ndarray, label: str, planar: bool = False):
        self.pixels, self.label, self.planar = pixels, label, planar

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, i: int, channels: int) -> Tensor:
        image = torch.from_numpy(np.array(self.pixels[i]))  # a copy: nobody writes into the data set
        if image.ndim == 2:
            image = image[None]
        elif not self.planar:
            image = image.permute(2, 0, 1)
        return with_channels(image, channels)

    def name(self, i: int) -> str:
        return f"{self.label}[{i}]"

    def identity(self) -> bytes:
        digest = hashlib.sha256(repr((self.pixels.shape, self.planar)).encode())
        step = max(1, (1 << 26) // max(1, self.pixels[:1].nbytes))
        for start in range(0, len(self.pixels), step):  # in pieces: the array may be a map of a file of gigabytes
            digest.update(np.ascontiguousarray(self.pixels[start : start + step]).data)
        return digest.digest()

    def stamp(self) -> bytes:
        """Return its identity, for which all of it is read."""
        return self.identity()


def with_channels(image: Tensor, channels: int) -> Tensor:
    """Convert uint8 (1 or 3, H, W) to uint8 (channels, H, W): grey is repeated, colour becomes luma (ITU-R 601)."""
    have = image.shape[0]
    if have == channels:
        return image
    if have == 1:
        return image.expand(channels, -1, -1)
    if have != 3 or channels != 1:
        raise ValueError(f"cannot turn {have} channels into {channels}")
    red, green, blue = image.to(torch.int32)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)[None]  # PIL's own integers
