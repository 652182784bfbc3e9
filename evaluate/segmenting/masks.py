"""Masks in files: which of their values are classes, and which say that a pixel has none.

Of 8 bits 255 means none; of 16 bits 65535 does, and 255 too unless there are more than 255 labels; of 32 bits -1 too.
Where zero is left out (`reduce_zero_label`, ADE20K), label 0 means none and label 1 is the first class.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ImageFile

from common.data import UNLABELLED
from common.data.folder import Files
from common.decoding.decode import open_picture, upright
from common.decoding.headers import Header
from common.errors import Refusal
from common.printable import printable
from common.processes.launch import usable_cores

IGNORED = UNLABELLED  # in memory
VOID, DEEP_VOID = 255, 65535
MOST_CLASSES = 1 << 15  # an int16 holds them
MASK_MODES = ("L", "P", "1", "I", "I;16", "I;16B", "I;16L")  # of PIL; the others hold colours
LOSSY = ("JPEG", "JPEG2000", "WEBP", "AVIF")
ReduceZero = Literal["auto", "yes", "no"]


@dataclass(frozen=True)
class Labels:
    """Rule by which values of masks become classes.

    reduce_zero  label 0 means none, and label 1 is the first class
    wide         there are more than 255 labels, so that 255 is one of them in masks of more than 8 bits
    """

    reduce_zero: bool = False
    wide: bool = False

    def classes(self, values: np.ndarray, deep: bool) -> np.ndarray:
        """Classes, or IGNORED, of a mask's values: int32 (H, W); `deep`: it has more than 8 bits."""
        none = (values < 0) | (values == (DEEP_VOID if deep else VOID))
        if deep and not self.wide:
            none |= values == VOID
        return np.where(none, IGNORED, np.maximum(values - 1, IGNORED) if self.reduce_zero else values)

    def __str__(self) -> str:
        zero = "label 0 is ignored" if self.reduce_zero else "label 0 is a class"
        none = f"{DEEP_VOID} and, in masks of 8 bits, {VOID} mean" if self.wide else f"{VOID} means"
        return f"{zero}, {none} that there is none"


def read_mask(path: str | Path) -> tuple[np.ndarray, bool]:
    """Read a mask: (its values, int32 (H, W), upright; whether they have more than 8 bits).

    Of a palette's picture they are the indices, whatever their colours. Raises Refusal for what holds no indices.
    """
    shown = printable(os.fspath(path))
    try:
        with open_picture(np.fromfile(path, np.uint8)) as (image, header):
            _refuse_no_indices(image, header, shown)
            values = np.asarray(image)
    except Refusal:
        raise
    except Exception as error:  # decoders raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise Refusal(f"the mask {shown} cannot be read: {printable(reason)}; write it anew") from None
    deep = values.dtype.itemsize > 1
    values = upright(torch.from_numpy(values.astype(np.int32))[None], header.orientation)[0].contiguous().numpy()
    if values.size and not -1 <= int(values.min()) <= int(values.max()) <= DEEP_VOID:
        raise Refusal(
            f"the mask {shown} has labels {values.min()} to {values.max()}: expected class indices below "
            f"{MOST_CLASSES:,}, or {VOID}, {DEEP_VOID} or -1 where there is none"
        )
    return values, deep


def _refuse_no_indices(image: ImageFile.ImageFile, header: Header, shown: str) -> None:
    """Raises Refusal for colours, and for values that are not as they were written."""
    lossy = image.format in LOSSY or image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp")
    if image.mode not in MASK_MODES or lossy:
        what = f"a {image.format}, which changes values" if lossy else f"a picture of mode {image.mode}"
        raise Refusal(
            f"the mask {shown} is {what}: expected a PNG of one channel with class indices (mode L, P or 16 bits), "
            f"{VOID} where there is none"
        )
    stretched = "ppm" if image.format == "PPM" and image.tile[0][0] != "raw" else ""
    if image.mode == "L" and header.kind in ("PNG", "TIFF") and header.bits < 8:
        stretched = f"grey {header.kind}"
    if stretched:
        raise Refusal(
            f"the mask {shown} is a {stretched} of less than 8 bits a pixel, or another largest value, whose values "
            "are stretched when it is read: write it with 8 bits, or with a palette"
        )
    if header.inverted and image.mode in ("L", "1"):
        raise Refusal(
            f"the mask {shown} is a TIFF in which zero is white, whose values are turned around when it is read: write "
            "it as a PNG"
        )


class FileMasks:
    """Masks in files, whose values become classes as `labels` says."""

    def __init__(self, files: Files, labels: Labels) -> None:
        self.files, self.labels = files, labels

    def read(self, i: int) -> np.ndarray:
        """Read classes, or IGNORED: int16 (H, W)."""
        classes = self.labels.classes(*read_mask(self.files.path(i)))
        if classes.size and int(classes.max()) >= MOST_CLASSES:
            raise Refusal(
                f"the mask {self.files.name(i)} has label {int(classes.max()) + self.labels.reduce_zero}: expected "
                f"class indices below {MOST_CLASSES:,}, or {VOID} or {DEEP_VOID} where there is none"
            )
        return classes.astype(np.int16)

    def identity(self) -> bytes:
        """Digest of the files and of what their values mean."""
        return self.files.identity() + self._meaning()

    def first_identity(self) -> bytes:
        """Identity as it was in the first kind of fingerprints."""
        return self.files.first_identity() + self._meaning()

    def _meaning(self) -> bytes:
        return bytes([self.labels.reduce_zero]) + (b"wide" if self.labels.wide else b"")


@dataclass
class Survey:
    """Images of a folder with their masks, every one of which was looked at.

    values, counts  of each mask: the values that occur, and of how many pixels; deep: whether it has more than 8 bits
    """

    images: Files
    masks: Files
    values: list[np.ndarray]
    counts: list[np.ndarray]
    deep: list[bool]
    left_out: str = ""

    def labels(self, wide: bool) -> list[np.ndarray]:
        """Values in each mask, without those that mean none."""
        rule = Labels(wide=wide)
        return [values[rule.classes(values, deep) >= 0] for values, deep in zip(self.values, self.deep, strict=True)]

    def pixels(self, rule: Labels, names: Sequence[str] | None) -> np.ndarray:
        """Count the pixels of each class in every mask, (n, C) int64. Raises Refusal for a label that is no class."""
        rows = []
        for i, (values, counts, deep) in enumerate(zip(self.values, self.counts, self.deep, strict=True)):
            classes = rule.classes(values, deep)
            highest = int(classes.max(initial=IGNORED))
            most = MOST_CLASSES if names is None else len(names)
            if highest >= most:
                self.refuse_label(i, highest, rule, names)
            row = np.zeros(max(highest + 1, len(names or ())), np.int64)
            row[classes[classes >= 0]] = counts[classes >= 0]
            rows.append(row)
        width = max(map(len, rows))
        return np.stack([np.pad(row, (0, width - len(row))) for row in rows])

    def refuse_label(self, i: int, highest: int, rule: Labels, names: Sequence[str] | None) -> None:
        """Raises Refusal for the class `highest` in mask `i`."""
        first = int(rule.reduce_zero)
        wrong = f"the mask {self.masks.name(i)} has label {highest + first}: expected"
        if names is None:
            raise Refusal(f"{wrong} class indices below {MOST_CLASSES:,}, or {VOID} or {DEEP_VOID} where there is none")
        shifted = not rule.reduce_zero and highest == len(names)
        hint = "; where label 0 means none, say --reduce-zero-label yes" if shifted else ""
        last = len(names) - 1 + first
        raise Refusal(f"{wrong} {first} to {last} of {len(names)} classes, or {VOID} where there is none{hint}")


def survey(images: Files, masks: Files, left_out: str = "") -> Survey:
    """Look at every mask. Raises Refusal for one that cannot be read or is not of its image's size."""

    def look(i: int) -> tuple[np.ndarray, np.ndarray, bool]:
        values, deep = read_mask(masks.path(i))
        size = _size(images.path(i))
        if size is not None and size != values.shape:
            raise Refusal(
                f"the mask {masks.name(i)} is of {values.shape[1]}x{values.shape[0]} pixels and its image "
                f"{images.name(i)} of {size[1]}x{size[0]}: expected the same"
            )
        counts = np.bincount(values.ravel() + 1)  # from -1
        occur = np.flatnonzero(counts)
        return occur - 1, counts[occur], deep

    with ThreadPoolExecutor(min(16, usable_cores())) as threads:
        rows = list(threads.map(look, range(len(masks))))
    return Survey(images, masks, [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows], left_out)


def _size(path: str) -> tuple[int, int] | None:
    """Size (height, width) of a picture, upright; None if it cannot be read, which is reported where it is used."""
    try:
        with open_picture(np.fromfile(path, np.uint8)) as (image, header):
            return (image.width, image.height) if header.orientation >= 5 else (image.height, image.width)
    except Exception:
        return None


def settle(surveys: Sequence[Survey], names: Sequence[str] | None, asked: ReduceZero, ade: int | None) -> Labels:
    """Settle what the labels of all masks mean.

    names  of the classes, None if they are those that occur
    asked  what the option reduce_zero_label says
    ade    in ADE20K's layout the number of its classes, else None: label 0 is a class unless it is asked otherwise

    Raises Refusal where ADE20K's layout and the labels leave it open, see `_zero_means_none`.
    """
    reduce_zero = asked == "yes"
    if asked == "auto" and ade is not None and names is not None:
        reduce_zero = _zero_means_none(surveys, names, ade)
    if names is not None:
        return Labels(reduce_zero, len(names) + reduce_zero > VOID)
    wide = any(((labels > VOID) & (labels < DEEP_VOID)).any() for split in surveys for labels in split.labels(True))
    return Labels(reduce_zero, bool(wide))


def _zero_means_none(surveys: Sequence[Survey], names: Sequence[str], ade: int) -> bool:
    """Whether label 0 means none in ADE20K's layout, by the labels 0 to K that occur beside K names.

    Yes if K does, or with ADE20K's own number of names; no if 0 and K - 1 do, and not K. Raises Refusal if neither K
    nor both of those do, or if of as many names as ADE20K has exactly 0 to K - 1 do: shifted by one they fit as well.
    """
    count = len(names)
    occur = {int(label) for split in surveys for labels in split.labels(count > VOID) for label in labels}
    if not occur or max(occur) > count:
        return count == ade  # refused elsewhere
    if count in occur:
        return True
    if count == ade and not occur >= set(range(count)):
        return True
    if count != ade and {0, count - 1} <= occur:
        return False
    raise Refusal(
        f"the masks in {printable(surveys[0].masks.root)} have labels {min(occur)} to {max(occur)} beside {count:,} "
        f"names of classes, so label 0 may mean none or be the first class: say --reduce-zero-label no if label 0 is "
        f"the first class ({names[0]}), yes if label 1 is"
    )
