"""Any folder of images: recursive, any shape, with first-level sub-folders as classes or with no labels at all."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
from torch import Tensor

from ..errors import Refusal
from ..printable import printable
from .decode import decode, endings, formats
from .images import Images
from .listing import LeftOut, images_of, is_hidden, walk

TEST_NAMES = ("test", "val", "validation")

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


def holds_images(folder: Path) -> bool:
    try:
        return folder.is_dir() and any(True for _ in walk(str(folder), endings(), LeftOut()))
    except OSError:
        return False


def classes_of(names: list[bytes]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels and class names from the first folder of each name, if every image has one and there are two or more."""
    first = [name.partition(b"/") for name in names]
    if not all(slash for _, slash, _ in first):
        return None, None
    folders = sorted({folder for folder, _, _ in first})
    if len(folders) < 2:
        return None, None
    index = {folder: i for i, folder in enumerate(folders)}
    labels = np.fromiter((index[folder] for folder, _, _ in first), np.int64, len(first))
    return labels, tuple(map(printable, folders))


def load(root: str) -> Images:
    """All images under `root`; Refusal when there are none."""
    names, left = scan(root)
    if not names:
        raise Refusal(no_images(printable(root), left))
    labels, classes = classes_of(names)
    images = Images(Files(root, names), printable(root), labels, classes)
    images.left_out = left.note(names, labels is not None)
    return images


def no_images(root: str, left: LeftOut) -> str:
    expected = f"expected images ({', '.join(formats())}) in it or in its sub-folders"
    if not (seen := left.kinds()):
        return f"no images in {root}: the folder is empty; {expected}"
    hint = "; to read tables, write data=hf:PATH" if {".parquet", ".arrow"} & set(left.others) else ""
    return f"no images in {root}: only other files ({seen}); {expected}{hint}"


def open_folder(path: Path, split: str) -> Images | None:
    """The `split` of a folder, or None when it has no test split. Refusal when there is nothing to read."""
    root = str(path)
    train = training_folder(path)
    if train is None:
        return load(root) if split == "train" else None
    if split == "train":
        return load(str(train))
    candidates = [load(str(path / name)) for name in TEST_NAMES if holds_images(path / name)]
    # ImageNet's test images come without labels, its val images with them: only a labelled split can judge.
    return next((images for images in candidates if images.labels is not None), next(iter(candidates), None))


def training_folder(path: Path) -> Path | None:
    """PATH/train where the folder is laid out in splits, None where PATH itself holds the images."""
    train = path / "train"
    if not holds_images(train):
        return None
    if any((path / name).is_dir() for name in TEST_NAMES):
        return train
    # No other split beside it: `train` may be the railway class of bus/ car/ train/.
    siblings = [entry for entry in path.iterdir() if entry != train and not is_hidden(entry.name)]
    railway = any(map(holds_images, siblings)) and not any(entry.is_dir() for entry in train.iterdir())
    return None if railway else train
