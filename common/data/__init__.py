"""Data sets of images: `open_data("builtin" | "fashion-mnist" | … | "hf:NAME" | PATH)`.

images = open_data("~/photos")     # recursive; sub-folders are classes
images.read(0)                     # uint8 (3, H, W)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decoding.depth import parse_range
from ..errors import Refusal, nearest
from . import archives, arrays, folder, huggingface
from .images import UNLABELLED, Images, Unreadable
from .location import NAMED, Location

__all__ = [
    "KNOWN",
    "SPLITS",
    "UNLABELLED",
    "Images",
    "Location",
    "Unreadable",
    "labelled_splits",
    "open_data",
    "with_classes_of",
]

SPLITS = ("train", "test")

# name -> (split, root, download) -> Images
KNOWN: dict[str, Callable[[str, str | None, bool], Images]] = {
    "builtin": lambda split, root, download: arrays.open_builtin(split),
    "fashion-mnist": arrays.open_fashion,
    "cifar10": lambda *request: arrays.open_cifar("cifar10", *request),
    "cifar100": lambda *request: arrays.open_cifar("cifar100", *request),
    "stl10": arrays.open_stl,
}
assert tuple(KNOWN) == NAMED

HELD_OUT = 0.2  # share of each class that `labelled_splits` judges on when the data brings no test split


def open_data(where: Location | str, split: str = "train", download: bool = True) -> Images:
    """Open the "train" or "test" split of a data set.

    where     a name in `KNOWN`, `hf:NAME_OR_PATH`, or the path of a folder: of images, with first-level sub-folders as
              classes, or of the same in splits, whose names are those of `splits`, or of MNIST's IDX files; or of tar
              archives: one, several in braces (shards-{000..099}.tar), or a folder of them; a `Location` says more
    download  whether what is known by name may be fetched through torchvision when it is nowhere on this machine

    Refusal when there is no such data, no such split, or no image in it.
    """
    if split not in SPLITS:
        raise Refusal(f"split={split!r}: expected 'train' or 'test'")
    where = Location(where) if isinstance(where, str) else where
    images = open_split(where, split, download)
    if images is None:
        raise Refusal(
            f"data={where.spec} has no test split; expected a split, sub-folder or archive named test, val or "
            "validation beside train, or data_validation=NAME"
        )
    return images


def open_split(where: Location, split: str, download: bool = True) -> Images | None:
    """Open a split as `open_data` does, but return None when only the test split is missing."""
    if where.is_remote:
        raise Refusal(
            f"data={where.spec} is behind a URL, and can be read from beginning to end alone: pretraining does, with "
            "data_stream=true; evaluations need images on this machine (--data PATH)"
        )
    is_archive = archives.are_archives(where)
    where.refuse_unused(where.is_named, is_archive)
    images = archives.open_archives(where, split) if is_archive else _opened(where, split, download)
    if images is not None and where.span is not None:
        images.set_range(parse_range(where.span))
    if images is not None and (note := where.named_as_folder()):
        images.note = "; ".join(filter(None, (note, images.note)))
    return images


def _opened(where: Location, split: str, download: bool) -> Images | None:
    spec, path = where.spec, where.path
    if where.is_named:
        return KNOWN[spec](split, where.root, download)
    if where.is_hub:
        return huggingface.open_hub(where, split)
    if spec and path.is_dir():
        if any(arrays.find_idx(path, name) for name in SPLITS):
            where.refuse_unused(in_one=True)
            images = arrays.open_idx(path, split, str(path))
            if images is None and split == "train":
                raise Refusal(f"{path} has test but no training IDX files; expected {arrays.IDX_FILES['train']}")
            return images
        return folder.open_folder(where, split)
    if path.is_file():
        tables = {".parquet", ".arrow"}
        hint = f"write data=hf:{spec}" if path.suffix.lower() in tables else f"its folder is {path.absolute().parent}"
        raise Refusal(
            f"data={spec} is a file; expected a folder of images, a .tar archive, or one of {', '.join(KNOWN)}; {hint}"
        )
    raise Refusal(
        f"data={spec}: no such folder, nor one of {', '.join(KNOWN)} or hf:NAME{nearest(spec.lower(), KNOWN)}"
    )


def labelled_splits(where: Location | str, download: bool = True) -> tuple[Images, Images, str]:
    """Return (train, test, note) for an evaluation: every image labelled, the same classes in both.

    The test split that comes with the data or, without one, a fixed fifth of each class; the note says which, and which
    classes have no test image. Refusal without labels, and when the test images have a class that training lacks.
    """
    where = Location(where) if isinstance(where, str) else where
    train, test = open_split(where, "train", download), open_split(where, "test", download)
    assert train is not None
    train = only_labelled(train)
    if test is None:
        train, test = hold_out(train)
        note = (
            f"no test split in {where.spec}: judged on a fixed {HELD_OUT:.0%} of each class ({len(test)} images), which"
            " a pretraining on the same data has seen, without labels"
        )
        return train, test, note + (f"; {train.note}" if train.note else "")
    test = with_classes_of(train, only_labelled(test), where.spec)
    note = f"as split in {where.spec}"
    if test.part:
        note += f": {train.part or 'all of it'} is trained on, {test.part} is judged on"
    note += f"; {line}" if (line := where.named_as_folder()) else ""
    note += f"; {line}" if (line := folder.shared_images(train, test)) else ""
    return train, test, note + _never_judged(test)


def with_classes_of(train: Images, test: Images, spec: str) -> Images:
    """Number the labels of `test` as those of `train`. Raises Refusal if it has a class that `train` lacks."""
    assert train.classes is not None and test.classes is not None and test.labels is not None
    if train.classes == test.classes:
        return test
    used = {test.classes[label] for label in np.unique(test.labels)}
    if not used <= set(train.classes):
        raise Refusal(
            f"classes differ between the splits of {spec}: train has {listed(train.classes)}, test has"
            f" {listed(test.classes)}; expected none that train lacks"
        )
    return test.with_classes(train.classes)


def _never_judged(test: Images) -> str:
    """Return a note about classes without a test image; or nothing."""
    classes = test.classes or ()
    assert test.labels is not None
    counts = np.bincount(test.labels, minlength=len(classes))
    empty = tuple(name for name, count in zip(classes, counts, strict=False) if not count)
    return f"; {len(empty)} of {len(classes)} classes have no test image: {listed(empty, 5)}" if empty else ""


def only_labelled(images: Images) -> Images:
    """Take those with a label. Raises Refusal if there are none."""
    if not images.has_labels:
        raise Refusal(f"no labels in {images.where}: {images.why_unlabelled}; name labelled images: --data LABELLED")
    assert images.labels is not None
    known = images.labels >= 0
    return images if known.all() else images.subset(known)


def hold_out(images: Images) -> tuple[Images, Images]:
    """Split into (train, test): a fixed random fifth of each class, but never its only image, is for the test."""
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


def listed(names: tuple[str, ...] | None, limit: int = 12) -> str:
    """Write out at most `limit` of the names."""
    names = names or ()
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")
