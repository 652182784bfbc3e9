"""Where images come from: `open_data("builtin" | "fashion-mnist" | … | "hf:NAME" | PATH)`.

images = open_data("~/photos")     # recursive; sub-folders are classes
images.read(0)                     # uint8 (3, H, W)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import Refusal, nearest
from . import arrays, folder, huggingface
from .images import UNLABELLED, Images, Unreadable

__all__ = ["KNOWN", "SPLITS", "UNLABELLED", "Images", "Unreadable", "labelled_splits", "open_data"]

SPLITS = ("train", "test")

# name -> (split, root, download) -> Images
KNOWN: dict[str, Callable[[str, str | None, bool], Images]] = {
    "builtin": lambda split, root, download: arrays.open_builtin(split),
    "fashion-mnist": arrays.open_fashion,
    "cifar10": lambda *request: arrays.open_cifar("cifar10", *request),
    "cifar100": lambda *request: arrays.open_cifar("cifar100", *request),
    "stl10": arrays.open_stl,
}

HELD_OUT = 0.2  # share of each class that `labelled_splits` judges on when the data brings no test split


def open_data(spec: str, split: str = "train", root: str | None = None, download: bool = True) -> Images:
    """The "train" or "test" split of a data set.

    spec      a name in `KNOWN`, `hf:NAME_OR_PATH`, or the path of a folder: of images, with first-level sub-folders as
              classes, or of the same in train/ and test/ (or val/, validation/), or of MNIST's IDX files
    root      folder to look in first for fashion-mnist, cifar10, cifar100 and stl10
    download  whether those may be fetched through torchvision when they are nowhere on this machine

    Refusal when there is no such data, no such split, or no image in it.
    """
    if split not in SPLITS:
        raise Refusal(f"split={split!r}: expected 'train' or 'test'")
    images = find(spec, split, root, download)
    if images is None:
        raise Refusal(
            f"data={spec} has no test split; expected a split or sub-folder named test, val or validation beside train"
        )
    return images


def find(spec: str, split: str, root: str | None, download: bool) -> Images | None:
    """As `open_data`, but None when only the test split is missing."""
    if spec in KNOWN:
        return KNOWN[spec](split, root, download)
    if spec.startswith("hf:"):
        return huggingface.open_hub(spec.removeprefix("hf:"), split)
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        if any(arrays.find_idx(path, name) for name in SPLITS):
            images = arrays.open_idx(path, split, str(path))
            if images is None and split == "train":
                raise Refusal(f"{path} has test but no training IDX files; expected {arrays.IDX_FILES['train']}")
            return images
        return folder.open_folder(path, split)
    if path.is_file():
        tables = {".parquet", ".arrow"}
        hint = f"write data=hf:{spec}" if path.suffix.lower() in tables else f"its folder is {path.absolute().parent}"
        raise Refusal(f"data={spec} is a file; expected a folder of images or one of {', '.join(KNOWN)}; {hint}")
    raise Refusal(
        f"data={spec}: no such folder, nor one of {', '.join(KNOWN)} or hf:NAME{nearest(spec.lower(), KNOWN)}"
    )


def labelled_splits(spec: str, root: str | None = None, download: bool = True) -> tuple[Images, Images, str]:
    """(train, test, note) for an evaluation: every image labelled, the same classes in both.

    The test split that comes with the data or, without one, a fixed fifth of each class; the note says which. Refusal
    without labels, and when the two splits differ in their classes.
    """
    train, test = find(spec, "train", root, download), find(spec, "test", root, download)
    assert train is not None
    train = only_labelled(train)
    if test is None:
        train, test = hold_out(train)
        return train, test, (
            f"no test split in {spec}: judged on a fixed {HELD_OUT:.0%} of each class ({len(test)} images), which a"
            " pretraining on the same data has seen, without labels"
        )  # fmt: skip
    test = only_labelled(test)
    if train.classes != test.classes:
        raise Refusal(
            f"classes differ between the splits of {spec}: train has {some(train.classes)}, test has"
            f" {some(test.classes)}; expected the same ones"
        )
    return train, test, f"as split in {spec}"


def only_labelled(images: Images) -> Images:
    if images.labels is None or images.classes is None or not (images.labels >= 0).any():
        raise Refusal(
            f"no labels in {images.where}: expected one sub-folder per class (two or more, and no images beside them),"
            " or a label column"
        )
    known = images.labels >= 0
    return images if known.all() else images.subset(known)


def hold_out(images: Images) -> tuple[Images, Images]:
    """(train, test), stratified: of each class a fixed random fifth, but never its only image, is for the test."""
    labels = images.labels
    assert labels is not None
    rng = np.random.default_rng(0)
    held = np.zeros(len(labels), bool)
    for label in range(len(images.classes or ())):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: max(1, round(HELD_OUT * len(members))) if len(members) > 1 else 0]] = True
    if not held.any():
        raise Refusal(f"one image per class in {images.where}: expected two or more, to train on one and judge another")
    return images.subset(~held), images.subset(held)


def some(names: tuple[str, ...] | None, limit: int = 12) -> str:
    names = names or ()
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
