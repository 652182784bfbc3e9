"""Any folder of images: recursive, any shape, with first-level sub-folders as classes or with no labels at all."""

from __future__ import annotations

import hashlib
import os

import numpy as np
from torch import Tensor

from ..errors import Refusal
from ..printable import printable
from .decode import decode, endings, formats
from .images import Images
from .layout import Layout, folders, layout_of, without_masks
from .listing import LeftOut, images_of
from .location import Location
from .splits import judge

MAX_SIZES = 4096  # files whose size enters the fingerprint: each costs a stat, slow on network disks


class Files:
    """Source: files under `root`, their names in one buffer.

    A list of a million str objects would be copied into every forked worker, one reference count at a time.
    """

    def __init__(self, root: str, names: list[bytes]):
        self.root = root
        self.ends = np.cumsum([len(name) for name in names], dtype=np.int64)
        self.buffer = np.frombuffer(b"".join(names), np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def relative(self, i: int) -> str:
        """Name of file `i` as seen from `root`."""
        start = self.ends[i - 1] if i else 0
        return os.fsdecode(self.buffer[start : self.ends[i]].tobytes())

    def path(self, i: int) -> str:
        """Path of file `i`, to open it by."""
        return os.path.join(self.root, self.relative(i))

    def name(self, i: int) -> str:
        """Path of file `i`, to be shown."""
        return printable(self.path(i))

    def read(self, i: int, channels: int) -> Tensor:
        return decode(np.fromfile(self.path(i), np.uint8), channels)

    def identity(self) -> bytes:
        digest = hashlib.sha256(self.buffer.tobytes())
        digest.update(self.ends.tobytes())
        for i in np.unique(np.linspace(0, len(self) - 1, min(len(self), MAX_SIZES)).astype(int)):
            try:
                digest.update(os.stat(self.path(int(i))).st_size.to_bytes(8, "little"))
            except OSError:
                digest.update(b"missing!")
        return digest.digest()


def scan(root: str) -> tuple[list[bytes], LeftOut]:
    """Sorted relative names of the images under `root`, and what else is there. Raises Refusal."""
    return images_of(root, endings())


def classes_of(
    names: list[bytes], known: frozenset[str] = frozenset()
) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels and class names from the first folder of each name, if every image has one and there are two or more, or
    one that is among the `known` classes."""
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
    """All images under `root`, and the classes that their first folders are, or the one among the `known`; Refusal when
    there are no images."""
    names, left = scan(root)
    if not names:
        raise Refusal(no_images(printable(root), left))
    labels, classes = classes_of(names, known)
    images = Images(Files(root, names), printable(root), labels, classes)
    images.left_out = left.note(names, labels is not None)
    return images


def no_images(root: str, left: LeftOut) -> str:
    expected = f"expected images ({', '.join(formats())}) in it or in its sub-folders"
    if not (seen := left.kinds()):
        return f"no images in {root}: the folder is empty; {expected}"
    hint = "; to read tables, write data=hf:PATH" if {".parquet", ".arrow"} & set(left.others) else ""
    return f"no images in {root}: only other files ({seen}); {expected}{hint}"


def open_folder(where: Location, split: str) -> Images | None:
    """The `split` of a folder, or None when it has no test split. Refusal when there is nothing to read."""
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
    inner = training if where.train is not None else without_masks(training, endings())[0]
    known = frozenset(map(printable, folders(inner)))
    return judge(
        division,
        lambda name: _part(layout, name, where.validation is not None, known),
        lambda images: images.labels is not None,
        printable(str(layout.root)),
    )


def _part(layout: Layout, name: str, asked: bool, known: frozenset[str] = frozenset()) -> Images:
    """The images of a part; where it was not `asked` for by name, without the masks in it."""
    folder, note = layout.root / name, ""
    if not asked:
        folder, note = without_masks(folder, endings())
    images = load(str(folder), known)
    images.part, images.note = "" if name == "." else printable(name), note
    return images
