"""Listing of a folder: which files are its images, and what of the rest a user should know.

Names are relative to the folder, with slashes; neither the disk nor the locale decides about their order.
"""

from __future__ import annotations

import hashlib
import os
import stat
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..errors import Refusal
from ..printable import printable

# Made by systems beside a user's images, thumbnails among them; in lower case. Names that begin with a dot are hidden.
JUNK_FOLDERS = frozenset(
    {"@eadir", "@tmp", "@synoresource", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "$recycle.bin",
     "system volume information", "__macosx", "lost+found"}
)  # fmt: skip
JUNK_FILES = frozenset({"thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "icon\r"})
_JUNK = JUNK_FOLDERS | JUNK_FILES
# Endings of pictures that are not opened here: worth a word of what to do.
OTHER_PICTURES = frozenset(
    {".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".psd", ".xcf", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw",
     ".orf", ".raf", ".rw2", ".pef", ".dcm", ".nii", ".exr", ".hdr"}
)  # fmt: skip

STRETCH = 1000  # files that a thread asks for at a time
PIECE = 16 << 10  # bytes of a file that are read in one place
NAMED = 6  # kinds of files, or pairs of names, that a message lists


@dataclass
class LeftOut:
    """Files of a folder that are not read, except hidden ones and those that systems make."""

    others: Counter[str] = field(default_factory=Counter)  # by lower-case ending
    special: Counter[str] = field(default_factory=Counter)  # FIFOs, sockets, devices
    linked: list[tuple[str, str]] = field(default_factory=list)  # a name, and the one under which the same is read
    followed: list[bytes] = field(default_factory=list)  # not left out: names that are read and are links to files
    folders: list[str] = field(default_factory=list)  # not left out: those looked into, from the one that is listed
    links: int = 0  # met on the way

    def count(self, name: str) -> None:
        """Count a regular file that is no image."""
        if name.lower() not in JUNK_FILES:
            self.others[os.path.splitext(name)[1].lower() or "without an ending"] += 1

    def kinds(self) -> str:
        """Count the files by their endings, and what is no file: "500 .heic, 3 .mov, 1 FIFO"; or nothing."""
        counts = self.others.most_common() + self.special.most_common()
        words = [f"{count:,} {printable(kind)}" for kind, count in counts[:NAMED]]
        if rest := sum(count for _, count in counts[NAMED:]):
            words.append(f"{rest:,} of other kinds")
        return ", ".join(words)

    def note(self, images: list[bytes], in_classes: bool) -> str:
        """Say all of it in one line, or nothing; `images`: the sorted names that are read. `in_classes`: whether the
        first folder of a name is its class."""
        parts = [kinds] if (kinds := self.kinds()) else []
        if pictures := [ending for ending in self.others if ending in OTHER_PICTURES]:
            parts[0] += f" (convert pictures to .png or .jpg: {', '.join(sorted(pictures))} are not opened)"
        if self.linked:
            pairs = sorted(self.linked)
            examples = ", ".join(f"{printable(name)} is {printable(other)}" for name, other in pairs[:NAMED])
            more = f", … {len(pairs):,} links in all" if len(pairs) > NAMED else ""
            count = sum(_images_at(other, images) for _, other in pairs)
            where = ""
            if in_classes and (apart := sum(_first(other) not in (_first(name), ".") for name, other in pairs)):
                where = f"; {apart:,} of these links stand in another class than what they lead to, which counts"
            parts.append(f"{count:,} names of images that are read under another name ({examples}{more}{where})")
        return "; ".join(parts)


def _images_at(name: str, images: list[bytes]) -> int:
    """Count the images of this name, or in the folder of this name if it ends with a slash."""
    if not name.endswith("/"):
        return 1
    if name == "./":
        return len(images)
    start = os.fsencode(name)
    return bisect_left(images, start[:-1] + b"0") - bisect_left(images, start)  # "0" is what comes after "/"


def _first(name: str) -> str:
    return name.partition("/")[0]


def images_of(root: str, endings: Collection[str]) -> tuple[list[bytes], LeftOut]:
    """List the files under `root` with one of these lower-case endings, sorted, and what else is in it.

    Raises Refusal for a folder that cannot be listed.
    """
    left = LeftOut()
    try:
        names = [os.fsencode(name) for name in walk(root, endings, left)]
    except OSError as error:
        where = printable(os.fspath(error.filename or root))
        raise Refusal(f"cannot list {where}: {error.strerror}; expected a readable folder") from error
    names.sort()  # by bytes: the order of the disk and of the locale must not change the samples
    return names, left


def with_links(names: list[bytes], left: LeftOut) -> list[bytes]:
    """Return `names` and the names that links to the same files have."""
    all_ = list(names)
    for name, other in left.linked:
        start, other_start = os.fsencode(name), b"" if other == "./" else os.fsencode(other)
        if not name.endswith("/"):
            all_.append(start)
        else:
            all_ += [start + image[len(other_start) :] for image in names if image.startswith(other_start)]
    return all_


def walk(root: str, endings: Collection[str], left: LeftOut) -> Iterator[str]:
    """Yield the relative names of the visible files under `root` with one of these endings; count others in `left`.

    Each file is named once, however many links lead to it: under its own name if that is under `root`, else under the
    first link to it in the order of bytes. Links to folders come before links to files. (A second hard link is a file
    like any other, as is a copy.) Only folders and links cost a stat.
    """
    yield from _Walk(root, endings, left).names()


class _Walk:
    def __init__(self, root: str, endings: Collection[str], left: LeftOut) -> None:
        self.root, self.endings, self.left = root, endings, left
        self.folders: dict[tuple[int, int], str] = {}  # device and inode of a folder -> how its names begin
        self.parents: dict[str, str | None] = {}  # path of a folder -> how its names begin, if it is read
        self.links: list[str] = []  # still to be followed

    def names(self) -> Iterator[str]:
        yield from self._below("")
        files: list[tuple[str, os.stat_result | None]] = []
        while self.links:
            links, self.links = sorted(self.links, key=os.fsencode), []
            for name in links:
                try:
                    status: os.stat_result | None = os.stat(os.path.join(self.root, name))
                except OSError:  # it leads nowhere
                    status = None
                if status is not None and stat.S_ISDIR(status.st_mode):
                    yield from self._linked_folder(name, (status.st_dev, status.st_ino))
                else:
                    files.append((name, status))
        files.sort(key=lambda file: os.fsencode(file[0]))
        yield from self._linked_files(files)

    def _below(self, prefix: str) -> Iterator[str]:
        """Yield the names of files in a folder and in those below it, in the disk's order; its links are remembered."""
        todo = [prefix]
        while todo:
            prefix = todo.pop()
            folder = os.path.join(self.root, prefix)
            status = os.stat(folder)
            first = self.folders.setdefault((status.st_dev, status.st_ino), prefix)
            if first != prefix:  # mounted a second time
                self.left.linked.append((prefix, first or "./"))
                continue
            inner = []
            self.left.folders.append(prefix)
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    if entry.is_file(follow_symlinks=False):
                        if _has_ending(name, self.endings):
                            yield prefix + name
                        else:
                            self.left.count(name)
                    elif entry.is_symlink():
                        self.links.append(prefix + name)
                        self.left.links += 1
                    elif not entry.is_dir(follow_symlinks=False):
                        self.left.special[_kind(entry.stat(follow_symlinks=False).st_mode)] += 1
                    elif name.lower() not in JUNK_FOLDERS:
                        inner.append(f"{prefix}{name}/")
            todo += sorted(inner, reverse=True)

    def _linked_folder(self, name: str, identity: tuple[int, int]) -> Iterator[str]:
        if identity in self.folders:
            self.left.linked.append((f"{name}/", self.folders[identity] or "./"))
        elif os.path.basename(os.path.realpath(os.path.join(self.root, name))).lower() not in JUNK_FOLDERS:
            yield from self._below(f"{name}/")

    def _linked_files(self, files: list[tuple[str, os.stat_result | None]]) -> Iterator[str]:
        first_links: dict[tuple[int, int], str] = {}  # device and inode -> the first link to it
        for name, status in files:
            if status is not None and not stat.S_ISREG(status.st_mode):
                self.left.special[_kind(status.st_mode)] += 1
            elif not _has_ending(name, self.endings):
                self.left.count(os.path.basename(name))
            elif status is None:
                yield name  # an image that cannot be read, which is told where it is read
            else:
                same = self._real_name(name, status) or first_links.setdefault((status.st_dev, status.st_ino), name)
                if same == name:
                    self.left.followed.append(os.fsencode(name))
                    yield name
                else:
                    self.left.linked.append((name, same))

    def _real_name(self, name: str, status: os.stat_result) -> str | None:
        """Return the name under which the file that a link leads to is read anyway; None if it is not."""
        link = os.path.join(self.root, name)
        path = os.path.join(os.path.dirname(link), os.readlink(link))
        direct = os.lstat(path)
        if (direct.st_dev, direct.st_ino) != (status.st_dev, status.st_ino):  # a link to a link
            path = os.path.realpath(link)
        folder, file = os.path.split(path)
        if folder not in self.parents:
            parent = os.stat(folder)
            self.parents[folder] = self.folders.get((parent.st_dev, parent.st_ino))
        prefix = self.parents[folder]
        return prefix + file if prefix is not None and file[:1] != "." and _has_ending(file, self.endings) else None


def real_folder(folder: bytes) -> tuple[int, int]:
    """Return the device and inode of a folder, through links; (-1, -1) where there is none."""
    try:
        status = os.stat(folder)
        return status.st_dev, status.st_ino
    except OSError:
        return -1, -1


def stamps(paths: Sequence[str] | Sequence[bytes]) -> np.ndarray:
    """Return (n, 4) int64: size, times of the last change of content and of state in ns, and inode of each file; -1
    where there is none. A file that takes the place of another of its size and age has another inode, or another time
    of state."""

    def look(start: int) -> np.ndarray:
        rows = []
        for path in paths[start : start + STRETCH]:
            try:
                status = os.stat(path)
                rows.append((status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino))
            except OSError:
                rows.append((-1, -1, -1, -1))
        return np.array(rows, np.int64)

    with ThreadPoolExecutor(16) as threads:  # no faster on a local disk; one that is far away answers many at a time
        parts = list(threads.map(look, range(0, len(paths), STRETCH)))
    return np.concatenate([np.empty((0, 4), np.int64), *parts])


def sample(size: int, read: Callable[[int, int], bytes]) -> bytes:
    """Hash the size and some of the content of a file: all of a small one; beginning, middle and end of a large one.
    `read(start, count)` returns at most `count` bytes of it."""
    pieces = [(0, 4 * PIECE)] if size <= 4 * PIECE else [(start, PIECE) for start in (0, size // 2, size - PIECE)]
    return hashlib.sha256(size.to_bytes(8, "little") + b"".join(read(*piece) for piece in pieces)).digest()


def sample_of(path: str) -> bytes:
    """Hash the size and some of the content of the file at `path`."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))  # a FIFO waits
        with open(handle, "rb") as file:

            def read(start: int, count: int) -> bytes:
                file.seek(start)
                return file.read(count)

            return sample(os.fstat(handle).st_size, read)
    except OSError:
        return b"missing!"


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of this name is left out unsaid: a dot begins it, or a system made it."""
    return name[:1] == "." or name.lower() in _JUNK


def _has_ending(name: str, endings: Collection[str]) -> bool:
    return name[name.rfind(".") :].lower() in endings


def _kind(mode: int) -> str:
    return "FIFO" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
