"""Data sets of small images kept whole in memory: the built-in extract, Fashion-MNIST, CIFAR and STL-10."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Refusal
from ..kept import cache_folder
from ..printable import printable
from .images import Arrays, Images
from .listing import stamps

EXTRACT = Path(__file__).with_name("fashion_mnist_extract.xz")
EXTRACT_SPLITS = {"train": 1000, "test": 200}  # images of each of the ten classes, in the order of the file
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # package dataset-fashion-mnist
IDX_FILES = {"train": ("train-images", "train-labels"), "test": ("t10k-images", "t10k-labels")}
IDX_FOLDERS = ("", "raw", "FashionMNIST/raw")  # the last two as torchvision keeps them


def open_builtin(split: str) -> Images:
    """Open the extract in this package: the first 1,000 and 200 images of each class in Fashion-MNIST's two splits.

    Ordered class after class in the file (which compresses best) and here by turns, so that any piece is balanced.
    """
    pixels = np.frombuffer(lzma.decompress(EXTRACT.read_bytes()), np.uint8).reshape(-1, 28, 28)
    start = 0
    for name, count in EXTRACT_SPLITS.items():
        if name == split:
            chosen = pixels[start : start + 10 * count].reshape(10, count, 28, 28).swapaxes(0, 1).reshape(-1, 28, 28)
            return Images(Arrays(chosen, "builtin"), "builtin", np.tile(np.arange(10), count), FASHION_CLASSES)
        start += 10 * count
    raise ValueError(split)


def find_idx(folder: Path, split: str) -> tuple[Path, Path] | None:
    """Find the image and the label file of a split in MNIST's format, gzipped or not, under `folder`, if any."""

    def first(stem: str, kind: str) -> Path | None:
        names = [f"{stem}{dot}{kind}{gz}" for dot in "-." for gz in ("", ".gz")]  # both spellings are in circulation
        return next((folder / name for name in names if (folder / name).is_file()), None)

    base = folder
    for inner in IDX_FOLDERS:
        folder = base / inner
        stems = IDX_FILES[split]
        images, labels = first(stems[0], "idx3-ubyte"), first(stems[1], "idx1-ubyte")
        if images and labels:
            return images, labels
    return None


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read the uint8 array in an IDX file. Raises Refusal when it is something else or cut short."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, ValueError) as error:  # gzip.BadGzipFile is an OSError
        raise Refusal(f"cannot read {path}: {error}; expected an IDX file, fetch it again") from error
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[k : k + 4], "big") for k in range(4, header, 4))
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != header + int(np.prod(shape)):
        raise Refusal(f"{path} is not a whole IDX file of {dimensions} dimensions of bytes; fetch it again")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def open_idx(folder: Path, split: str, where: str, classes: tuple[str, ...] | None = None) -> Images | None:
    """Open a split stored in IDX files, or None when the files are not there."""
    files = find_idx(folder, split)
    if files is None:
        return None
    pixels, labels = read_idx(files[0], 3), read_idx(files[1], 1)
    if len(pixels) != len(labels):
        raise Refusal(f"{files[0]} has {len(pixels)} images, {files[1]} {len(labels)} labels; expected as many")
    if classes is None:
        classes = tuple(str(k) for k in range(int(labels.max(initial=0)) + 1))
    return Images(Arrays(pixels, where), where, labels, classes)


def open_fashion(split: str, root: str | None, download: bool) -> Images:
    def read(place: Path) -> Images | None:
        return open_idx(place, split, "fashion-mnist", FASHION_CLASSES)

    def fetch(cache: str) -> None:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(cache, download=True)

    places, files = [*root_folder(root), DEBIAN, cache_folder()], f"{IDX_FILES[split][0]}-idx3-ubyte.gz and the like"
    return found_or_fetched("fashion-mnist", places, files, read, fetch if download else None)


def open_cifar(name: str, split: str, root: str | None, download: bool) -> Images:
    import torchvision.datasets

    reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]

    def read(place: Path) -> Images:
        data: Any = reader(str(place), train=split == "train")
        return Images(Arrays(np.asarray(data.data), name), name, np.asarray(data.targets), data.classes)

    fetch = (lambda cache: reader(cache, download=True)) if download else None
    return found_or_fetched(name, [*root_folder(root), cache_folder()], reader.base_folder, read, fetch)


STL_SHAPE = (3, 96, 96)


def open_stl(split: str, root: str | None, download: bool) -> Images:
    """Open STL-10; its training split is the 5,000 labelled images, then the 100,000 unlabelled ones (label -1)."""

    def fetch(cache: str) -> None:
        from torchvision.datasets import STL10

        STL10(cache, split="test", download=True)

    places, files = [*root_folder(root), cache_folder()], "stl10_binary/train_X.bin and the like"
    return found_or_fetched("stl10", places, files, lambda place: read_stl(place, split), fetch if download else None)


class Planes:
    """Source: STL-10's binary files, mapped: 2.9 GB that no worker needs a copy of."""

    def __init__(self, paths: list[Path]):
        self.paths = paths
        self.counts = [path.stat().st_size // int(np.prod(STL_SHAPE)) for path in paths]
        self.maps: list[Arrays] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": None}

    def __len__(self) -> int:
        return sum(self.counts)

    def arrays(self) -> list[Arrays]:
        if self.maps is None:
            maps = [np.memmap(path, np.uint8, "r").reshape(-1, *STL_SHAPE) for path in self.paths]
            self.maps = [Arrays(pixels.swapaxes(2, 3), "stl10", planar=True) for pixels in maps]  # columns come first
        return self.maps

    def read(self, i: int, channels: int) -> Any:
        for array in self.arrays():
            if i < len(array):
                return array.read(i, channels)
            i -= len(array)
        raise IndexError(i)

    def name(self, i: int) -> str:
        return f"stl10[{i}]"

    def identity(self) -> bytes:
        return b"".join(Arrays(array.pixels[:: 1 + len(array) // 500], "stl10").identity() for array in self.arrays())

    def stamp(self) -> bytes:
        return self.identity() + stamps([str(path) for path in self.paths]).tobytes()


def read_stl(place: Path, split: str) -> Images | None:
    for folder in (place / "stl10_binary", place):
        files = [folder / f"{name}_X.bin" for name in (("train", "unlabeled") if split == "train" else ("test",))]
        targets = folder / f"{split}_y.bin"
        if targets.is_file() and all(path.is_file() for path in files):
            break
    else:
        return None
    size = int(np.prod(STL_SHAPE))
    labels = np.fromfile(targets, np.uint8).astype(np.int64) - 1
    for path in files:
        bytes_ = path.stat().st_size
        if bytes_ == 0 or bytes_ % size or (path == files[0] and bytes_ != size * len(labels)):
            raise Refusal(f"{path} has {bytes_} bytes, not a whole number of the 96x96 images expected; fetch it again")
    source = Planes(files)
    names = folder / "class_names.txt"
    counted = [str(k) for k in range(int(labels.max()) + 1)]
    classes = list(map(printable, names.read_bytes().split())) if names.is_file() else counted
    labels = np.concatenate([labels, np.full(len(source) - len(labels), -1, np.int64)])
    return Images(source, "stl10", labels, classes)


def root_folder(root: str | None) -> list[Path]:
    """List the folder that a user named, if any. Raises Refusal if it does not exist."""
    if root is None:
        return []
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise Refusal(f"no such folder: {folder}; expected the folder that holds the data set, or none")
    return [folder]


def found_or_fetched(
    name: str,
    places: list[Path],
    files: str,
    read: Callable[[Path], Images | None],
    fetch: Callable[[str], object] | None,
) -> Images:
    """Read a data set in the first of `places` that has its `files`; without one, `fetch` it into the cache folder, one
    process at a time. Raises Refusal, a failure in one line."""
    from filelock import FileLock  # torch depends on it

    for place in places:
        with contextlib.suppress(RuntimeError):  # torchvision's, where files are absent or their checksum is wrong
            if (images := read(place)) is not None:
                return images
    absent = f"{name} is not here: looked in {', '.join(map(str, places))} for "
    advice = "; give its folder, or fetch it with a network connection"
    if fetch is not None:
        cache = cache_folder()
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(str(cache / f".{name}.lock")), contextlib.redirect_stdout(io.StringIO()):
                print(f"fetching {name} into {cache}", file=sys.stderr)
                fetch(str(cache))
                if (images := read(cache)) is not None:
                    return images
        except (urllib.error.URLError, OSError, RuntimeError) as error:  # the first is an OSError; named for the reader
            reason = " ".join(str(error).split())[:200]
            raise Refusal(f"{absent}its files{advice} (fetching it failed: {reason})") from error
    raise Refusal(f"{absent}{files}{advice}")
