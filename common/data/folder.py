"""Any folder of images: recursive, any shape, with first-level sub-folders as classes or with no labels at all."""

from __future__ import annotations

import contextlib
import json
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from .. import kept
from ..decoding.decode import endings, formats
from ..errors import Refusal
from ..printable import printable
from .images import Images, NamedFiles
from .layout import Layout, folders, inside, layout_of
from .listing import LeftOut, images_of, real_folder, sample_of, stamps
from .location import Location
from .splits import judge

PACKED = {".gz", ".tgz", ".bz2", ".xz", ".txz", ".zst", ".zip", ".7z", ".rar"}
ROOM, FORMAT = "folders", 1  # of listings that are kept
LARGE = 20_000  # images, from which on that pays
CALM = 2_000_000_000  # nanoseconds; times of change are told apart by as much as seconds
SHOWN = 3  # pairs of images that a message names


class Files(NamedFiles):
    """Source: files under `root`."""

    def __init__(self, root: str, names: list[bytes], links: Collection[bytes] = ()):
        ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        super().__init__(ends, np.frombuffer(b"".join(names), np.uint8))
        self.root = root
        self.links = frozenset(links)  # those of the names that are links to files

    @classmethod
    def listed(cls, root: str, ends: np.ndarray, buffer: np.ndarray) -> Files:
        """Return the files of these names, as `NamedFiles` has them."""
        files = cls(root, [])
        files.ends, files.buffer = ends, buffer
        return files

    def path(self, i: int) -> str:
        """Return the path of file `i`, to open it by."""
        return os.path.join(self.root, self.relative(i))

    def paths(self) -> list[bytes]:
        """Return the paths of all files, to open them by."""
        start, names = os.path.join(os.fsencode(self.root), b""), self.buffer.tobytes()
        return [start + names[begin:end] for begin, end in pairwise([0, *self.ends.tolist()])]

    def places(self, chosen: Iterable[int]) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Yield (i, (name of the file that is read, device and inode of its folder)) for the `chosen` files."""
        known: dict[bytes, tuple[int, int]] = {}
        paths = self.paths()
        for i in chosen:
            path = os.path.realpath(paths[i]) if self.links and self.relative_bytes(i) in self.links else paths[i]
            folder, _, name = path.rpartition(b"/")
            if folder not in known:
                known[folder] = real_folder(folder)
            yield i, (name, known[folder])

    def name(self, i: int) -> str:
        """Return the path of file `i`, to be shown."""
        return printable(self.path(i))

    def encoded(self, i: int) -> np.ndarray:
        """Return the bytes of file `i`, uint8 (bytes,)."""
        return np.fromfile(self.path(i), np.uint8)

    def size(self, i: int) -> int:
        return os.stat(self.path(i)).st_size

    def sample(self, i: int) -> bytes:
        return sample_of(self.path(i))

    def stamps(self) -> np.ndarray:
        return stamps(self.paths())


def scan(root: str) -> tuple[list[bytes], LeftOut]:
    """List the images under `root` by their sorted relative names, and what else is in it. Raises Refusal."""
    return images_of(root, endings())


def classes_of(
    files: NamedFiles, known: frozenset[str] = frozenset()
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels and class names from the first folder of each of the sorted names, if every file has one and there
    are two or more, or one that is among the `known` classes."""
    starts = first_folders(files)
    if starts is None or (len(starts) < 2 and not known.issuperset(map(printable, starts))):
        return None, None
    classes = sorted(starts)  # not the order of the names: a-b/1.png comes before a/1.png
    rank = {folder: number for number, folder in enumerate(classes)}
    numbers = [rank[folder] for folder in starts]
    labels = np.repeat(numbers, np.diff([*starts.values(), len(files)]))
    return labels, tuple(map(printable, classes))


def first_folders(files: NamedFiles) -> dict[bytes, int] | None:
    """Return {first folder of a name: number of the first file in it} of sorted names; None if some have no folder."""
    starts: dict[bytes, int] = {}
    at = 0
    while at < len(files):
        folder, slash, _ = files.relative_bytes(at).partition(b"/")
        if not slash:
            return None
        starts[folder] = at
        after = folder + b"0"  # "0" is what comes after "/"
        at = bisect_left(range(len(files)), after, at, key=files.relative_bytes)
    return starts


def load(root: str, known: frozenset[str] = frozenset()) -> Images:
    """Open all images under `root`; first folders are classes, also one alone if `known`. Raises Refusal if none."""
    files, left = _listed(root)
    if not len(files):
        raise Refusal(no_images(printable(root), left))
    labels, classes = classes_of(files, known)
    images = Images(files, printable(root), labels, classes)
    names = [files.relative_bytes(i) for i in range(len(files))] if left.linked else []
    images.left_out = left.note(names, labels is not None)
    return images


def _listed(root: str) -> tuple[Files, LeftOut]:
    """List the images under `root` as `scan` does; a large folder once, until one of its folders changes."""
    asked, where = json.dumps([FORMAT, sorted(endings())]), os.path.realpath(root)
    index = kept.load(ROOM, where, asked)
    if index is not None and index.arrays.keys() == {"ends", "buffer", "times"}:
        paths = [os.path.join(root, folder) for folder in index.facts["folders"]]
        if np.array_equal(stamps(paths), index.arrays["times"]):
            left = LeftOut(Counter(index.facts["others"]), Counter(index.facts["special"]))
            return Files.listed(root, index.arrays["ends"], index.arrays["buffer"]), left
    began = time.time_ns()
    names, left = scan(root)
    files = Files(root, names, left.followed)
    if len(files) >= LARGE and not left.links:
        times = stamps([os.path.join(root, folder) for folder in left.folders])
        if times[:, 1:3].max() < began - CALM:  # else it may have changed while it was listed
            arrays = {"ends": files.ends, "buffer": files.buffer, "times": times}
            facts = {"folders": left.folders, "others": left.others, "special": left.special}
            with contextlib.suppress(OSError):
                kept.keep(ROOM, where, asked, "", kept.Index(arrays, facts))
    return files, left


def no_images(root: str, left: LeftOut) -> str:
    expected = f"expected images ({', '.join(formats())}) in it or in its sub-folders"
    if not (kinds := left.kinds()):
        return f"no images in {root}: the folder is empty; {expected}"
    hint = "; to read tables, write data=hf:PATH" if {".parquet", ".arrow"} & set(left.others) else ""
    hint += "; unpack archives, or undo the compression of a .tar and name that" if PACKED & set(left.others) else ""
    return f"no images in {root}: only other files ({kinds}); {expected}{hint}"


def open_folder(where: Location, split: str) -> Images | None:
    """Open the `split` of a folder, or None when it has no test split. Raises Refusal when there is nothing to read."""
    layout = layout_of(where, endings())
    division = layout.division
    train = "." if division is None else division.train
    if split == "train":
        images = _part(layout, train, division is None or where.train is not None)
        images.note = "; ".join(filter(None, (images.note, layout.note)))
        return images
    if division is None:
        return None
    training = layout.root / train
    inner = training if where.train is not None else inside(training, endings())[0]
    known = frozenset(map(printable, folders(inner)))
    return judge(
        division,
        lambda name: _part(layout, name, where.validation is not None, known),
        lambda images: images.labels is not None,
        printable(str(layout.root)),
    )


def _part(layout: Layout, name: str, asked: bool, known: frozenset[str] = frozenset()) -> Images:
    """Open the images of a part, without the masks in it unless it was `asked` for by name."""
    folder, note = layout.root / name, ""
    if not asked:
        folder, note = inside(folder, endings())
    images = load(str(folder), known)
    images.part, images.note = "" if name == "." else printable(name), note
    return images


def shared_images(train: Images, test: Images) -> str:
    """Say in a line which test images are training images as well, through links; or nothing.

    A second hard link is a file like any other, as is a copy.
    """
    first, second = train.source, test.source
    if not isinstance(first, NamedFiles) or not isinstance(second, NamedFiles):
        return ""
    test_files = {place: i for i, place in second.places(test.source_indices())}
    pairs = [(test_files[place], i) for i, place in first.places(train.source_indices()) if place in test_files]
    if not pairs:
        return ""
    some = ", ".join(f"{second.name(at)} is {first.name(i)}" for at, i in sorted(pairs)[:SHOWN])
    more = ", …" if len(pairs) > SHOWN else ""
    return (
        f"WARNING: {len(pairs):,} of {len(test):,} test images are training images too, by links ({some}{more}): what "
        "was trained on is judged"
    )
