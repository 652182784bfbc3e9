"""Any folder of images: recursive, any shape, with first-level sub-folders as classes or with no labels at all."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import Refusal
from .decode import decode
from .images import Images

TEST_NAMES = ("test", "val", "validation")

# Formats that PIL only identifies, or hands to another program: not pictures one can train on.
NOT_PICTURES = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

MAX_SIZES = 4096  # files whose size enters the fingerprint: each costs a stat, slow on network disks


def extensions() -> frozenset[str]:
    """Lower-case file name endings that PIL can open, with the dot."""
    known = Image.registered_extensions()  # loads PIL's plugins
    return frozenset(ending for ending, kind in known.items() if kind in Image.OPEN and kind not in NOT_PICTURES)


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

    def name(self, i: int) -> str:
        return os.path.join(self.root, self.relative(i))

    def read(self, i: int, channels: int) -> Tensor:
        return decode(np.fromfile(self.name(i), np.uint8), channels)

    def identity(self) -> bytes:
        digest = hashlib.sha256(self.buffer.tobytes())
        digest.update(self.ends.tobytes())
        for i in np.unique(np.linspace(0, len(self) - 1, min(len(self), MAX_SIZES)).astype(int)):
            try:
                digest.update(os.stat(self.name(int(i))).st_size.to_bytes(8, "little"))
            except OSError:
                digest.update(b"missing!")
        return digest.digest()


def walk(folder: str, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[str]:
    """Relative names of all visible files under `folder`, in the disk's order, without a stat per file.

    Links to folders are followed unless they lead back to a folder above.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            else:
                yield prefix + entry.name
    for name in folders:
        yield from walk(os.path.join(folder, name), f"{prefix}{name}/", above | {here})


def scan(root: str) -> tuple[list[bytes], Counter[str]]:
    """Sorted relative names of the images under `root`, and the number of other files by their ending."""
    pictures = extensions()
    found: list[bytes] = []
    others: Counter[str] = Counter()
    try:
        for name in walk(root):
            ending = os.path.splitext(name)[1].lower()
            if ending in pictures:
                found.append(os.fsencode(name))
            else:
                others[ending or name] += 1
    except OSError as error:
        raise Refusal(f"cannot list {error.filename}: {error.strerror}; expected a readable folder") from error
    found.sort()  # by bytes: the order of the disk and of the locale must not change the samples
    return found, others


def holds_images(folder: Path) -> bool:
    pictures = extensions()
    try:
        return folder.is_dir() and any(os.path.splitext(name)[1].lower() in pictures for name in walk(str(folder)))
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
    return labels, tuple(os.fsdecode(folder) for folder in folders)


def load(root: str) -> Images:
    """All images under `root`; Refusal when there are none."""
    names, others = scan(root)
    if not names:
        raise Refusal(no_images(root, others))
    labels, classes = classes_of(names)
    return Images(Files(root, names), root, labels, classes)


def no_images(root: str, others: Counter[str]) -> str:
    expected = "expected images (.jpg, .png, .webp, … anything PIL opens) in it or in its sub-folders"
    if not others:
        return f"no images in {root}: the folder is empty; {expected}"
    seen = ", ".join(f"{count} {ending}" for ending, count in others.most_common(4))
    hint = "; to read tables, write data=hf:PATH" if {".parquet", ".arrow"} & set(others) else ""
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
    siblings = [entry for entry in path.iterdir() if entry != train and not entry.name.startswith(".")]
    railway = any(map(holds_images, siblings)) and not any(entry.is_dir() for entry in train.iterdir())
    return None if railway else train
