"""Any folder of images: recursive, any shape, with first-level sub-folders as classes or with no labels at all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from torch import Tensor

from ..decoding.decode import decode, endings, formats
from ..decoding.depth import Range
from ..errors import Refusal
from ..printable import printable
from .images import Images
from .layout import Layout, folders, inside, layout_of
from .listing import LeftOut, images_of, real_folder, sample_of, stamps
from .location import Location
from .splits import judge

SHOWN = 3  # pairs of images that a message names
MAX_CONTENTS = 512  # files some of whose content does
MAX_SIZES = 4096  # files whose size enters the fingerprint: each costs a stat, slow on network disks


class Files:
    """Source: files under `root`, their names in one buffer.

    A list of a million str objects would be copied into every forked worker, one reference count at a time.
    """

    def __init__(self, root: str, names: list[bytes], links: Collection[bytes] = ()):
        self.root = root
        self.links = frozenset(links)  # those of the names that are links to files
        self.span: Range | None = None
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.buffer = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def relative(self, i: int) -> str:
        """Return the name of file `i` as seen from `root`."""
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.buffer[start : self.ends[i]].tobytes())

    def path(self, i: int) -> str:
        """Return the path of file `i`, to open it by."""
        return os.path.join(self.root, self.relative(i))

    def paths(self) -> list[bytes]:
        """Return the paths of all files, to open them by."""
        start, names = os.path.join(os.fsencode(self.root), b""), self.buffer.tobytes()
        return [start + names[begin:end] for begin, end in pairwise([0, *self.ends.tolist()])]

    def folders_of(self, chosen: Iterable[int]) -> Iterator[tuple[int, bytes, tuple[int, int]]]:
        """Yield (i, name of the file that is read, device and inode of its folder) for the `chosen` files."""
        known: dict[bytes, tuple[int, int]] = {}
        paths = self.paths()
        for i in chosen:
            path = (
                os.path.realpath(paths[i]) if self.links and os.fsencode(self.relative(i)) in self.links else paths[i]
            )
            folder, _, name = path.rpartition(b"/")
            if folder not in known:
                known[folder] = real_folder(folder)
            yield i, name, known[folder]

    def name(self, i: int) -> str:
        """Return the path of file `i`, to be shown."""
        return printable(self.path(i))

    def read(self, i: int, channels: int) -> Tensor:
        return decode(np.fromfile(self.path(i), np.uint8), channels, self.span)

    def identity(self) -> bytes:
        """Hash all names, up to 4,096 sizes, and some of the content of up to 512 files, evenly spaced."""
        paths = [self.path(i) for i in evenly(len(self), MAX_CONTENTS)]
        with ThreadPoolExecutor(16) as threads:  # a disk that is far away answers many at a time
            contents = b"".join(threads.map(sample_of, paths))
        return hashlib.sha256(self.first_identity() + contents).digest()

    def stamp(self) -> bytes:
        """Hash what the disk says of every file: size, times, inode. A million files of a local disk take seconds."""
        return hashlib.sha256(stamps(self.paths()).tobytes()).digest()

    def ages(self) -> str:
        """Return 16 hex digits of the sizes and times of change of all files, which a faithful copy shares, and after a
        hyphen 16 of all that `stamp` looks at, which it does not share."""
        rows = stamps(self.paths())
        return "-".join(hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in (rows[:, :2], rows))

    def first_identity(self) -> bytes:
        """Hash what the first kind of fingerprints was made of: all names and up to 4,096 sizes."""
        digest = hashlib.sha256(self.buffer.tobytes())
        digest.update(self.ends.tobytes())
        for i in evenly(len(self), MAX_SIZES):
            try:
                digest.update(os.stat(self.path(i)).st_size.to_bytes(8, "little"))
            except OSError:
                digest.update(b"missing!")
        return digest.digest()


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of the numbers 0 … count - 1, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def scan(root: str) -> tuple[list[bytes], LeftOut]:
    """List the images under `root` by their sorted relative names, and what else is in it. Raises Refusal."""
    return images_of(root, endings())


def classes_of(
    names: list[bytes], known: frozenset[str] = frozenset()
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Return labels and class names from the first folder of each name, if every image has one and there are two or
    more, or one that is among the `known` classes."""
    first = [name.partition(b"/") for name in names]
    if not all(slash for _, slash, _ in first):
        return None, None
    classes = sorted({folder for folder, _, _ in first})
    if len(classes) < 2 and not known.issuperset(map(printable, classes)):
        return None, None
    index = {folder: i for i, folder in enumerate(classes)}
    labels = np.fromiter((index[folder] for folder, _, _ in first), np.int64, len(first))
    return labels, tuple(map(printable, classes))


def load(root: str, known: frozenset[str] = frozenset()) -> Images:
    """Open all images under `root`; first folders are classes, also one alone if `known`. Raises Refusal if none."""
    names, left = scan(root)
    if not names:
        raise Refusal(no_images(printable(root), left))
    labels, classes = classes_of(names, known)
    images = Images(Files(root, names, left.followed), printable(root), labels, classes)
    images.left_out = left.note(names, labels is not None)
    return images


def no_images(root: str, left: LeftOut) -> str:
    expected = f"expected images ({', '.join(formats())}) in it or in its sub-folders"
    if not (kinds := left.kinds()):
        return f"no images in {root}: the folder is empty; {expected}"
    hint = "; to read tables, write data=hf:PATH" if {".parquet", ".arrow"} & set(left.others) else ""
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
    if not isinstance(first, Files) or not isinstance(second, Files):
        return ""
    test_files = {(folder, name): i for i, name, folder in second.folders_of(test.source_indices())}
    test_folders = {folder for folder, _ in test_files}
    pairs = []
    for i, name, folder in first.folders_of(train.source_indices()):
        if folder in test_folders and (at := test_files.get((folder, name))) is not None:
            pairs.append((at, i))
    if not pairs:
        return ""
    some = ", ".join(f"{second.name(at)} is {first.name(i)}" for at, i in sorted(pairs)[:SHOWN])
    more = ", …" if len(pairs) > SHOWN else ""
    return (
        f"WARNING: {len(pairs):,} of {len(test):,} test images are training images too, by links ({some}{more}): what "
        "was trained on is judged"
    )
