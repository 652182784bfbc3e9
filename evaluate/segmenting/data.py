"""Images whose every pixel has a class: ADE20K's folders, any folder of images and index masks, and built-in scenes.

Letters: n images, C classes, H x W pixels. In memory a pixel without a class is IGNORED, whatever the file says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batches.sampler import generator, held_out
from common.data import Images, Location, open_data
from common.data.folder import Files, scan, shared_images
from common.data.images import Arrays, identity_of
from common.data.layout import IMAGES, MASKS, folders
from common.data.listing import with_links
from common.data.splits import divide, judge, roles_of
from common.decoding.depth import parse_range
from common.errors import Refusal
from common.printable import printable
from evaluate.segmenting.masks import IGNORED, FileMasks, Labels, ReduceZero, Survey, settle, survey

ADE_CLASSES = 150
ADE_NAMES = "objectInfo150.txt"  # comes with ADE20K; the last column is the name
CLASSES = "classes.txt"
LAYOUTS = (
    "images/training, annotations/training and the same with validation (ADE20K), images/train, masks/train and the "
    "same with val, train/images, train/masks and the same with val, or images and masks"
)

CANVAS = 64  # pixels of a built-in scene, each side
ITEMS = (1, 4)  # fewest and most items in it
SCENES = {"train": 2000, "test": 400}
SOLID = 24  # grey levels above which a pixel belongs to an item; fainter ones are its blurred rim
PLACES = 10  # tried for an item; the one that covers the least of others is taken


class Scenes(Images):
    """Images with a mask each. `pixels` (n, C) int64: how many pixels of each class every image has."""

    def __init__(
        self,
        source: Any,
        where: str,
        classes: Sequence[str],
        masks: FileMasks | ArrayMasks,
        pixels: np.ndarray,
        indices: Any = None,
    ) -> None:
        super().__init__(source, where, None, classes, indices)
        self._masks, self.pixels = masks, pixels

    def mask(self, i: int) -> Tensor:
        """Classes of the pixels of image `i`, int16 (H, W); IGNORED where there is none."""
        return torch.from_numpy(self._masks.read(self._locate(i)))

    def subset(self, indices: Any) -> Scenes:
        """The images at `indices`, in that order."""
        chosen = super().subset(indices)
        rows = np.arange(len(self))[np.asarray(indices)]
        part = Scenes(self._source, self.where, self.classes or (), self._masks, self.pixels[rows], chosen._indices)
        part.left_out = self.left_out
        return part

    def _digest(self, first: bool) -> str:
        """Digest of the content, masks included: 16 hex digits."""
        return hashlib.sha256(super()._digest(first).encode() + identity_of(self._masks, first)).hexdigest()[:16]


def open_scenes(location: Location | str, reduce_zero: ReduceZero = "auto") -> tuple[Scenes, Scenes, str]:
    """Open (training images, test images, note) of `builtin` or of a folder in one of LAYOUTS. Raises Refusal.

    Every mask is read once, so that a label that is no class is met before anything is trained.
    reduce_zero  whether label 0 means none and label 1 is the first class: yes, no, or auto, see `masks.settle`
    """
    location = Location(location) if isinstance(location, str) else location
    spec, folder = location.spec, location.path
    if spec == "builtin":
        location.refuse_unused(True)
        return compose("train"), compose("test"), f"scenes of 1-4 items of Fashion-MNIST on {CANVAS}x{CANVAS} pixels"
    if not folder.is_dir():
        raise Refusal(f"data={spec}: segmentation needs masks: expected builtin, or a folder with {LAYOUTS}")
    location.refuse_unused(location.is_named)
    split, held, divided = _find_splits(location)
    is_ade = [part.name.lower() for part in (split[1].parent, split[1])] == ["annotations", "training"]
    if is_ade and held is None:
        held = split[0].parent / "validation", split[1].parent / "validation"
    if held is not None and not (held[0].is_dir() and scan(str(held[0]))[0]):
        raise Refusal(f"no test images in {held[0]}: add some, with their masks in {held[1]}")
    if is_ade and held is not None:
        return _in_range(*_open_ade(folder, split, held, divided, reduce_zero), location)
    names = _named(folder, *(pair for pair in (split, held) if pair is not None))
    surveys = [_survey(*pair) for pair in (split, held) if pair is not None]
    labels = settle(surveys, names, reduce_zero, None)
    train = _scenes(surveys[0], labels, names)
    if held is None:
        fit, rest = held_out(len(train), 0.2, len(train))
        if not len(rest):
            raise Refusal(f"no test images in {spec}: of {len(train)} none can be held out; expected five or more")
        train, test = train.subset(fit), train.subset(rest)
        note = f"no test split in {spec}: judged on a fixed fifth, which a pretraining on the same data has seen"
    else:
        test, note = _scenes(surveys[1], labels, names), f"as split in {spec}: {divided}"
    train, test = _with_classes(train, test, spec, names)
    return _in_range(train, test, f"{note}; {labels}{_never_seen(train)}", location)


def _in_range(train: Scenes, test: Scenes, note: str, location: Location) -> tuple[Scenes, Scenes, str]:
    """Apply the range of deep pictures that the location names, if it does."""
    if location.span is not None:
        for scenes in (train, test):
            scenes.set_range(parse_range(location.span))
    return train, test, "; ".join(filter(None, (note, shared_images(train, test))))


# ---------------------------------------------------------------------------------------------------- folders


def _survey(images: Path, masks: Path) -> Survey:
    """The images of a folder with their masks, all of which are looked at. Raises Refusal."""
    for folder in (images, masks):
        if not folder.is_dir():
            raise Refusal(f"no folder {folder}; expected {LAYOUTS}")
    names, left = scan(str(images))
    masks_of = with_links(*scan(str(masks)))  # one mask may serve many images
    by_stem = {os.path.splitext(name)[0]: name for name in masks_of}
    lacking = [printable(name) for name in names if os.path.splitext(name)[0] not in by_stem]
    if lacking:
        more = ", …" if len(lacking) > 3 else ""
        raise Refusal(
            f"{len(lacking)} of {len(names)} images in {images} have no mask of the same stem in {masks}: "
            f"{', '.join(lacking[:3])}{more}; add their masks, or remove them"
        )
    if not names:
        raise Refusal(f"no images in {images}; expected {LAYOUTS}")
    chosen = Files(str(masks), [by_stem[os.path.splitext(name)[0]] for name in names])
    return survey(Files(str(images), names, left.followed), chosen, left.note(names, False))


def _scenes(surveyed: Survey, labels: Labels, names: Sequence[str] | None) -> Scenes:
    """The images and masks that were looked at, as scenes; without names the classes are called by their labels."""
    pixels = surveyed.pixels(labels, names)
    classes = names or [str(k + labels.reduce_zero) for k in range(pixels.shape[1])]
    masks = FileMasks(surveyed.masks, labels)
    scenes = Scenes(surveyed.images, printable(surveyed.images.root), classes, masks, pixels)
    scenes.left_out = surveyed.left_out
    return scenes


def _find_splits(location: Location) -> tuple[tuple[Path, Path], tuple[Path, Path] | None, str]:
    """Find (images, masks) to train on, and to judge on if there are any; which they are. Raises Refusal."""
    folder = location.path
    images, masks = _kind(folder, IMAGES, "images"), _kind(folder, MASKS, "masks")
    if images.is_dir():
        inside = folders(images)
        names = [name for name in inside if name in roles_of(inside) or name == location.train]
        pairs = {name: (images / name, _alike(masks, name)) for name in names}
        if not names:
            return (images, masks), None, ""
    else:
        inner = {name: _kind(folder / name, IMAGES, "images") for name in folders(folder)}
        pairs = {name: (path, _kind(folder / name, MASKS, "masks")) for name, path in inner.items() if path.is_dir()}
        if not pairs:
            raise Refusal(f"data={folder} has no masks that are found: expected {LAYOUTS}")
    for asked, option in ((location.train, "data_train"), (location.validation, "data_validation")):
        if asked is not None and asked not in pairs:
            raise Refusal(f"{option}={asked}: no such split of images in {folder}; there is {', '.join(pairs)}")
    division = divide(list(pairs), location.train, location.validation, str(folder))
    tests = division.tests[::-1]  # validation first: test masks are seldom published
    held = judge(replace(division, tests=tests), pairs.__getitem__, lambda pair: pair[1].is_dir(), str(folder))
    judged = next((name for name, pair in pairs.items() if pair == held), "")
    return pairs[division.train], held, f"{division.train} is trained on, {judged} is judged on"


def _kind(folder: Path, names: Collection[str], usual: str) -> Path:
    """The sub-folder of images, or of masks, by its name."""
    candidates = [name for name in folders(folder) if name.lower() in names]
    return folder / (usual if usual in candidates or len(candidates) != 1 else candidates[0])


def _alike(folder: Path, name: str) -> Path:
    """The sub-folder `name`, in any case."""
    names = folders(folder) if folder.is_dir() else []
    return folder / next((entry for entry in [name, *names] if entry in names and entry.lower() == name.lower()), name)


def _named(folder: Path, *pairs: tuple[Path, Path]) -> list[str] | None:
    """Names of the classes, a line each: of the folder, or of its splits, which have to agree. Raises Refusal."""
    if (folder / CLASSES).is_file():
        return _lines(folder / CLASSES)
    files = [place / CLASSES for pair in pairs for place in (pair[1], pair[1].parent) if (place / CLASSES).is_file()]
    lists = list(dict.fromkeys(tuple(_lines(file)) for file in files))
    if len(lists) > 1:
        raise Refusal(
            f"classes differ between the splits of {folder}: {files[0]} has {', '.join(lists[0])}; {files[-1]} has "
            f"{', '.join(lists[-1])}; expected the same ones"
        )
    return list(lists[0]) if lists else None


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig", errors="backslashreplace")  # some editors begin with a byte order mark
    return [line.strip() for line in text.splitlines() if line.strip()]


def _with_classes(train: Scenes, test: Scenes, spec: str, names: Sequence[str] | None) -> tuple[Scenes, Scenes]:
    """Give both splits the same classes; without names, those whose labels occur. Raises Refusal."""
    if names is None:
        labels = [[(split.classes or ())[k] for k in np.flatnonzero(split.pixels.sum(0))] for split in (train, test)]
        if not set(labels[1]) <= set(labels[0]):
            raise Refusal(
                f"classes differ between the splits of {spec}: training masks have labels {_listed(labels[0])}, test "
                f"masks {_listed(labels[1])}; expected none that training lacks, or all of them named in {CLASSES}"
            )
        test.classes, lacking = train.classes, len(train.classes or ()) - test.pixels.shape[1]
        test.pixels = np.pad(test.pixels, ((0, 0), (0, max(0, lacking))))[:, : len(train.classes or ())]
    for what, split in (("training", train), ("test", test)):
        if not split.pixels.sum():
            raise Refusal(f"data={spec}: all {what} masks say to ignore every pixel (255); expected class indices")
    if len(train.classes or ()) < 2:
        raise Refusal(
            f"data={spec} has one class, {_listed(train.classes or ())}: expected two or more; 255 means that a pixel "
            "is ignored, so write masks of black and white as 0 and 1"
        )
    return train, test


def _never_seen(train: Scenes) -> str:
    """A note about classes of which no training pixel is; or nothing."""
    empty = [name for name, count in zip(train.classes or (), train.pixels.sum(0), strict=True) if not count]
    return f"; {len(empty)} classes have no training pixel: {_listed(empty, 5)}" if empty else ""


def _listed(labels: Sequence[Any], most: int = 20) -> str:
    more = f", … ({len(labels)} in all)" if len(labels) > most else ""
    return ", ".join(map(str, labels[:most])) + more


def _open_ade(
    folder: Path, split: tuple[Path, Path], held: tuple[Path, Path], divided: str, reduce_zero: ReduceZero
) -> tuple[Scenes, Scenes, str]:
    """ADE20K's layout. In ADE20K itself label 0, "other", is ignored, and labels 1 to 150 are the classes."""
    names = [str(k + 1) for k in range(ADE_CLASSES)]
    if (folder / CLASSES).is_file():
        names = _lines(folder / CLASSES)
    elif (folder / ADE_NAMES).is_file():
        listed = [line.split("\t")[-1].strip() for line in _lines(folder / ADE_NAMES)][1:]
        names = listed if len(listed) == ADE_CLASSES else names
    surveys = [_survey(*pair) for pair in (split, held)]
    labels = settle(surveys, names, reduce_zero, ADE_CLASSES)
    splits = [_scenes(survey, labels, names) for survey in surveys]
    train, validation = _with_classes(splits[0], splits[1], str(folder), names)
    how = "" if reduce_zero != "auto" else f" ({len(names)} classes; --reduce-zero-label no, or yes, says otherwise)"
    return train, validation, f"as split in {folder}: {divided}; {labels}{how}{_never_seen(train)}"


# ----------------------------------------------------------------------------------------------- built-in scenes


class ArrayMasks:
    """Masks in memory: int16 (n, H, W)."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def read(self, i: int) -> np.ndarray:
        """Copy the mask: int16 (H, W)."""
        return self.values[i].copy()

    def identity(self) -> bytes:
        """Digest of the values and their shape."""
        return hashlib.sha256(repr(self.values.shape).encode() + self.values.tobytes()).digest()


def in_memory(images: np.ndarray, masks: np.ndarray, classes: Sequence[str], where: str = "memory") -> Scenes:
    """Scenes of uint8 (n, H, W) or (n, H, W, 3) and masks (n, H, W) with IGNORED where there is no class."""
    pixels = np.stack([np.bincount(mask[mask != IGNORED].ravel(), minlength=len(classes)) for mask in masks])
    held = ArrayMasks(masks.astype(np.int16))
    return Scenes(Arrays(images, where), where, classes, held, pixels.astype(np.int64))


def compose(split: str, count: int | None = None) -> Scenes:
    """Items of the built-in images of `split` on black canvases, with masks: background is class 0.

    Scene i is a function of (split, i): training scenes are made of training images, test scenes of test images.
    """
    items = open_data("builtin", split)
    assert items.labels is not None and items.classes is not None
    count = SCENES[split] if count is None else count
    images = np.zeros((count, CANVAS, CANVAS), np.uint8)
    masks = np.zeros((count, CANVAS, CANVAS), np.int16)
    for i in range(count):
        rng = generator(0, 0, i, "scene")
        for at in rng.integers(len(items), size=rng.integers(ITEMS[0], ITEMS[1] + 1)):
            item = items.read(int(at), 1)[0].numpy()
            solid = item > SOLID
            room = CANVAS - item.shape[0] + 1
            places = [(slice(y, y + item.shape[0]), slice(x, x + item.shape[1])) for y, x in
                      rng.integers(room, size=(PLACES, 2)).tolist()]  # fmt: skip
            place = min(places, key=lambda place: int(((masks[i][place] > 0) & solid).sum()))
            images[i][place][solid] = item[solid]
            masks[i][place][solid] = items.labels[at] + 1
    return in_memory(images, masks, ("background", *items.classes), f"builtin scenes ({split})")
