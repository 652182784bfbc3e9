"""Dense labels of a data set's images: from a packed file, or from the published layout of one .pt file an image.

labels = open_labels("labels.bin", images, classes=1000)
labels.read(17)                   # {"record": int16 (2, k, H, W)} of image 17 of the source, see `maps.unpack`

Both are `Beside` of a loader's samples. An image's labels stay one array of 16 bits up to the device, because what the
loader pays for is mostly fresh memory. Letters: k classes of each cell, H x W cells of a map.
"""

import os
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batches.unreadable import Limit
from common.data import Images, Unreadable
from common.data.images import NamedFiles, evenly
from common.errors import Refusal
from common.printable import printable
from pretrain.token_labels.packed import LABELLED, MOST_CLASSES, Packed

CHECKED = 8  # images whose pixels are compared with what was labelled
LOOKED = 64  # of one file an image: files whose classes and shapes are looked at
NAMED = 3  # images that a message names


@dataclass
class Labels:
    """Dense labels of the images of one source."""

    where: str
    annotator: str
    top: int  # k
    grid: tuple[int, int]  # (H, W)
    crop: float | None  # as `maps.in_map` takes it
    size: tuple[int, int]  # as `maps.in_map` takes it
    classes: int
    images: Images  # none of them, of that source: to name an image by
    missing: list[str]  # names of the images that have none

    def __post_init__(self) -> None:
        self.shape = (2, self.top, *self.grid)  # of a record

    def read(self, i: int) -> dict[str, np.ndarray]:
        """Read the labels of image `i` of the source: {"record": int16 (2, k, H, W)}. Raises Unreadable."""
        try:
            record = self.record(i)
        except (LookupError, Refusal, OSError) as error:
            raise Unreadable(self.images.source.name(i), str(error)) from None
        if unlike := self.unlike(record):
            raise Unreadable(self.images.source.name(i), f"its labels in {self.where} {unlike}")
        return {"record": record.view(np.int16)}

    def unlike(self, record: np.ndarray) -> str:
        """What is wrong with a record; nothing if nothing is."""
        if record.shape != self.shape:
            return f"have the shape {record.shape}: expected {self.shape} as in the others"
        if (most := int(record[1].max())) >= self.classes:
            return f"name class {most}: expected 0 to {self.classes - 1}, the model's {self.classes:,} classes"
        return ""

    def record(self, i: int) -> np.ndarray:
        """Record of image `i`, uint16 (2, k, H, W): logits as float16, classes. Raises LookupError if it has none."""
        raise NotImplementedError

    def blank(self) -> dict[str, np.ndarray]:
        """Return labels that say nothing."""
        return {"record": np.zeros(self.shape, np.int16)}

    def __str__(self) -> str:
        cells = f"{self.grid[0]}x{self.grid[1]}"
        how = "whole images" if self.crop is None else f"the central {self.crop:g} of images"
        without = f"; {len(self.missing):,} images have none" if self.missing else ""
        known = f"{self.top} of {self.classes:,} classes in {cells} cells of {how}"
        return f"{self.where}: {known}, by {self.annotator}{without}"


def open_labels(where: str | Path, images: Images, classes: int, limit: Limit) -> Labels:
    """Open the dense labels of `images` for a model of so many `classes`; `where`: a packed file, or a folder of .pt
    files. Images without labels may be as many as `limit` allows; reading one raises Unreadable.

    Raises Refusal for labels of other images, of another number of classes or format, cut off or damaged.
    """
    path = Path(where).expanduser()
    if not path.exists():
        raise Refusal(f"labels {path}: no such file or folder; expected one made by generate_labels")
    labels = _per_image(path, images, classes) if path.is_dir() else _packed(path, images, classes)
    if len(labels.missing) > limit.allowed(len(images)):
        some = ", ".join(labels.missing[:NAMED]) + (", …" if len(labels.missing) > NAMED else "")
        raise Refusal(
            f"labels {path}: {len(labels.missing):,} of {len(images):,} images in {images.where} have none ({some}), "
            f"more than the {limit.allowed(len(images)):,} that {limit.option}{limit.max_bad} allows; generate labels "
            f"of these images, or allow more with {limit.option}N"
        )
    return labels


def names_of(images: Images) -> tuple[np.ndarray, bytes, bool]:
    """(where each name ends, int64 (n,); all names; whether they are of files) of images: files as seen from their
    folder, other images by their number."""
    source, indices = images.source, images.source_indices()
    if isinstance(source, NamedFiles) and len(indices) == len(source):
        return source.ends, source.buffer.tobytes(), True
    if isinstance(source, NamedFiles):
        names = [source.relative_bytes(i) for i in indices]
    else:
        names = [str(i).encode() for i in indices]
    return np.cumsum([len(name) for name in names], dtype=np.int64), b"".join(names), isinstance(source, NamedFiles)


def _split(ends: np.ndarray, names: bytes) -> list[bytes]:
    starts = [0, *ends[:-1].tolist()]
    return [names[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]


def digest(image: Tensor) -> int:
    """CRC-32 of the pixels of an image, uint8 (C, H, W), and of its shape."""
    return zlib.crc32(image.contiguous().numpy().tobytes(), zlib.crc32(repr(tuple(image.shape)).encode()))


# ---------------------------------------------------------------------------------------------------- one file


@dataclass
class PackedLabels(Labels):
    """Records of a packed file."""

    packed: Packed
    rows: np.ndarray  # int64, for each image of the source; -1: it has none

    def record(self, i: int) -> np.ndarray:
        """Record of image `i`."""
        if self.rows[i] < 0:
            raise LookupError(f"it has no labels in {self.where}")
        return self.packed.record(int(self.rows[i]))


def _packed(path: Path, images: Images, classes: int) -> PackedLabels:
    packed = Packed(path)
    header, source = packed.header, images.source
    if header.classes != classes:
        raise Refusal(
            f"labels {path}: they are of {header.classes:,} classes (annotator {header.annotator}), and the model has "
            f"{classes:,}: expected labels and a model of the same classes"
        )
    ends, names, named = names_of(images)
    if header.named != named or (not named and header.images != len(source)):
        kind = "files" if header.named else "images known by their number"
        raise Refusal(
            f"labels {path}: they are of {header.images:,} {kind}, and {images.where} has {len(source):,} "
            f"{'files' if named else 'of the latter'}: they are labels of other images; generate them again"
        )
    row_of = {name: row for row, name in enumerate(_split(packed.ends, packed.names.tobytes()))}
    found = np.array([row_of.get(name, -1) for name in _split(ends, names)], np.int64)
    if (found < 0).all():
        first = printable(next(iter(row_of)))
        raise Refusal(
            f"labels {path}: they are of other images: none of the {len(images):,} in {images.where} is among their "
            f"{header.images:,} (such as {first}); give the labels of these, or generate them"
        )
    found[(found >= 0) & (packed.states[found] != LABELLED)] = -1
    missing = [images.name(int(i)) for i in np.flatnonzero(found < 0)]
    rows = np.full(len(source), -1, np.int64)
    rows[images.source_indices()] = found
    _compare(packed, images, found)
    grid, size = (header.grid[0], header.grid[1]), (header.size[0], header.size[1])
    about = str(path), header.annotator, header.top, grid, header.crop, size, classes
    return PackedLabels(*about, images.subset([]), missing, packed, rows)


def _compare(packed: Packed, images: Images, found: np.ndarray) -> None:
    """Raises Refusal if the pixels of some images are not those that were labelled under their names."""
    known = np.flatnonzero(found >= 0)
    for i in known[evenly(len(known), CHECKED)].tolist():
        try:
            image = images.read(i, packed.header.channels)
        except Unreadable:
            continue
        if digest(image) != packed.digests[found[i]]:
            raise Refusal(
                f"labels {packed.path}: {images.name(i)} is another image than the one that was labelled under this "
                "name; generate the labels of these images"
            )


# ---------------------------------------------------------------------------------------------------- one an image


@dataclass
class ImageLabels(Labels):
    """The published layout: LABEL_ROOT/<class>/<stem>.pt, float16 (2, k, H, W): logits, and classes as numbers."""

    others: dict[int, str]  # image of the source -> its file, where that is not the `usual` one
    absent: frozenset[int]  # images of the source that have none

    def file(self, i: int) -> Path:
        """The file with the labels of image `i`."""
        return Path(self.where) / (self.others.get(i) or usual(_relative(self.images, i)))

    def record(self, i: int) -> np.ndarray:
        """Record of image `i`."""
        if i in self.absent:
            raise LookupError(f"it has no labels in {self.where}")
        return load(self.file(i))


def _relative(images: Images, i: int) -> str:
    source: Any = images.source
    return source.relative(i)


def usual(name: str) -> str:
    """The file with the labels of an image, both as seen from their folders: class/x.y.JPEG -> class/x.y.pt."""
    return f"{os.path.splitext(name)[0]}.pt"


def published(name: str) -> str:
    """The same as the published code names it: the last two parts, cut off at the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    return f"{os.path.basename(folder)}/{file.partition('.')[0]}.pt"


def load(file: Path) -> np.ndarray:
    """The record of one .pt file, uint16 (2, k, H, W): logits as float16, classes. Nothing in it is run. Raises
    Refusal."""
    try:
        tensor = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch, pickle and zipfile have many
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise Refusal(f"labels {file} cannot be read: {reason}") from None
    if not isinstance(tensor, Tensor) or tensor.ndim != 4 or len(tensor) != 2 or not tensor.numel():
        what = f"{tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise Refusal(f"labels {file} hold {what}: expected a tensor (2, k, H, W) of logits and classes")
    scores, ids = tensor.to(torch.float16).numpy(), tensor[1].float().numpy()
    if not (np.isfinite(scores[0]) & (ids >= 0) & (ids < MOST_CLASSES) & (ids == np.floor(ids))).all():
        raise Refusal(f"labels {file} hold numbers that are no logits and classes")
    return np.stack([scores[0].view(np.uint16), ids.astype(np.uint16)])


def _per_image(root: Path, images: Images, classes: int) -> ImageLabels:
    if not isinstance(images.source, NamedFiles):
        raise Refusal(f"labels {root}: a file an image goes with images in files, and {images.where} is none")
    present = {
        os.path.relpath(os.path.join(folder, file), root)
        for folder, _, files in os.walk(root)
        for file in files
        if file.endswith(".pt")
    }
    if not present:
        raise Refusal(f"labels {root}: no .pt file in it; expected <class>/<stem>.pt, as published, or a packed file")
    names = {at: _relative(images, at) for at in images.source_indices()}
    short = Counter(published(name) for name in names.values())  # a.1.jpg and a.2.jpg would share a.pt
    others = {
        at: published(name)
        for at, name in names.items()
        if usual(name) not in present and published(name) in present and short[published(name)] == 1
    }
    absent = frozenset(at for at, name in names.items() if usual(name) not in present and at not in others)
    missing = [images.name(i) for i, at in enumerate(images.source_indices()) if at in absent]
    have = [at for at in names if at not in absent]
    if not have:
        raise Refusal(
            f"labels {root}: they are of other images: none of the {len(images):,} in {images.where} is among its "
            f"{len(present):,} files (such as {printable(min(present))}); give the labels of these"
        )
    about = str(root), "an unknown annotator, one file an image"
    shape = load(root / (others.get(have[0]) or usual(names[have[0]]))).shape
    grid = (shape[2], shape[3])
    labels = ImageLabels(*about, shape[1], grid, None, grid, classes, images.subset([]), missing, others, absent)
    for at in [have[k] for k in evenly(len(have), LOOKED)]:
        if unlike := labels.unlike(load(labels.file(at))):
            raise Refusal(f"labels {labels.file(at)} {unlike}")
    return labels
