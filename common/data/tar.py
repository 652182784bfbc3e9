"""Source of pictures in tar archives, each read where it lies: any order costs the same, and nothing is unpacked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..printable import printable
from .images import NamedFiles
from .listing import sample, stamps
from .tar_index import packed, split

KEPT_OPEN = 128  # archives; of more, each is opened for each picture


class Members(NamedFiles):
    """Source: pictures in tar archives, each read where it lies.

    archives               paths; `known`: size and time of change of each
    which, offsets, sizes  (n,): the archive of each picture, and where it lies there
    before                 what its names begin with, where they are shown
    """

    def __init__(self, archives: Sequence[str], names: tuple[np.ndarray, np.ndarray], *where: np.ndarray):
        super().__init__(*names)
        self.archives = list(archives)
        self.known = stamps(self.archives)[:, :2].tolist()
        self.which, self.offsets, self.sizes = where
        self.before = b""
        self._handles: dict[int, int] = {}  # archive -> descriptor, from when it is first read

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}  # descriptors are of one process; a forked one may go on with them

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # at the exit `os` may be gone before this
        for handle in self.__dict__.get("_handles", {}).values():
            close(handle)

    def inside(self, folder: bytes, start: int, stop: int) -> Members:
        """Return the pictures `start` to `stop`, which are all in `folder`, by their names in it."""
        cut = len(folder) + 1
        names = packed([name[cut:] for name in split(self.ends, self.buffer)[start:stop]])
        part = slice(start, stop)
        inner = Members(self.archives, names, self.which[part], self.offsets[part], self.sizes[part])
        inner.before = self.before + folder + b"/"
        return inner

    def name(self, i: int) -> str:
        """Return the path of the archive and the name of file `i` in it, to be shown."""
        return printable(os.fsencode(self.archives[self.which[i]]) + b"/" + self.before + self.relative_bytes(i))

    def encoded(self, i: int) -> np.ndarray:
        """Return the bytes of file `i`, uint8 (bytes,)."""
        content = np.empty(self.sizes[i], np.uint8)
        if self._read(int(self.which[i]), content, int(self.offsets[i])) < len(content):
            raise ValueError("the archive ends before it does")
        return content

    def _read(self, archive: int, into: np.ndarray, offset: int) -> int:
        """Read from a place in an archive; returns how many bytes. Raises ValueError if it is not what was indexed.

        No position is kept, so threads and forked processes may share a descriptor.
        """
        if (handle := self._handles.get(archive)) is not None:
            return self._read_by(handle, archive, into, offset)
        handle = os.open(self.archives[archive], os.O_RDONLY | getattr(os, "O_BINARY", 0))
        if len(self._handles) < KEPT_OPEN and self._handles.setdefault(archive, handle) == handle:
            return self._read_by(handle, archive, into, offset)
        try:  # there are many archives, or another thread was faster
            return self._read_by(handle, archive, into, offset)
        finally:
            os.close(handle)

    def _read_by(self, handle: int, archive: int, into: np.ndarray, offset: int) -> int:
        status = os.fstat(handle)
        if [status.st_size, status.st_mtime_ns] != self.known[archive]:
            raise ValueError("its archive has changed since it was indexed: start again")
        return os.preadv(handle, [into.data], offset)

    def size(self, i: int) -> int:
        return int(self.sizes[i])

    def sample(self, i: int) -> bytes:
        size, offset, archive = int(self.sizes[i]), int(self.offsets[i]), int(self.which[i])

        def read(start: int, count: int) -> bytes:
            into = np.empty(max(0, min(count, size - start)), np.uint8)
            return into[: self._read(archive, into, offset + start)].tobytes()

        try:
            return sample(size, read)
        except (OSError, ValueError):
            return b"missing!"

    def places(self, chosen: Iterable[int]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Yield (i, (device and inode of its archive, its offset there)) for the `chosen` files."""
        inodes = [(status.st_dev, status.st_ino) for status in map(os.stat, self.archives)]
        for i in chosen:
            yield i, (*inodes[self.which[i]], int(self.offsets[i]))

    def stamps(self) -> np.ndarray:
        """Return what the disk says of the archives, and where each picture lies in them."""
        rows = [stamps(self.archives), np.zeros((len(self), 4), np.int64)]
        rows[1][:, 0], rows[1][:, 1], rows[1][:, 2] = self.sizes, self.offsets, self.which
        return np.concatenate(rows)
