"""Layout of a folder of images: which sub-folder serves as what; the names of splits are those of `splits`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import Refusal
from ..paths import expanded
from ..printable import printable
from .listing import LeftOut, is_hidden, walk
from .location import Location
from .splits import TRAIN, Division, divide, role_of, roles_of

IMAGES = frozenset({"image", "images", "img", "imgs", "jpegimages"})  # beside the folder of their masks
MASKS = frozenset(
    {"annotation", "annotations", "gt", "ground_truth", "groundtruth", "label", "labels", "mask", "masks",
     "segmentation", "segmentationclass", "segmentations"}
)  # fmt: skip
LOOKED_INTO = 8  # sub-folders
DEPTH = 3  # folders below the given one in which splits are looked for


@dataclass
class Layout:
    """A folder, and which of its sub-folders are splits; `division` is None where the folder itself has the images."""

    root: Path
    division: Division | None
    notes: list[str]

    @property
    def note(self) -> str:
        """Line about it for the user; or nothing."""
        return "; ".join([*self.notes, *([self.division.note()] if self.division is not None else [])])


def layout_of(where: Location, endings: frozenset[str]) -> Layout:
    """Find out how the folder at `where` is laid out. Raises Refusal where names leave open what is trained on."""
    top = where.path
    if where.train is None and where.validation is None and not folders(top):
        return Layout(top, None, [])
    for name, option in ((where.train, "data_train"), (where.validation, "data_validation")):
        if name is not None and not _part(top, name).is_dir():
            available = ", ".join(map(printable, folders(top))) or "none"
            raise Refusal(f"{option}={name}: no such folder in {printable(str(top))}; its sub-folders: {available}")
    if where.train is not None:
        train = _part(top, where.train)
        if os.path.samefile(train, top):
            chosen = ((where.validation,),) if where.validation is not None else ()
            return Layout(top, Division(".", chosen, ()), [])
        root, notes, name = train.parent, list[str](), train.name
    else:
        (root, notes), name = _inner(top, endings), None
    return _divided(root, notes, name, where, endings)


def _part(top: Path, name: str) -> Path:
    return top / expanded(name)


def _divided(root: Path, notes: list[str], train: str | None, where: Location, endings: frozenset[str]) -> Layout:
    names, shown = folders(root), printable(str(root))
    invalid = any(name.lower() == "invalid" for name in names)  # then `valid` is a class
    roles = roles_of(names)
    parts = [name for name in names if name in roles and not (invalid and name.lower() == "valid")]
    outside = where.validation is not None and root not in _part(where.path, where.validation).resolve().parents
    if train is None and where.validation is None and not parts:
        _refuse_splits_in_classes(root, names)
        return Layout(root, None, notes)
    validation = str(_part(where.path, where.validation)) if where.validation is not None else None
    if validation is not None and Path(validation).parent == root:
        validation = Path(validation).name
    full = [name for name in names if holds_images(root / name, endings)]
    notes = notes + [f"{printable(name)} holds no images" for name in parts if name not in full]
    if train is None:
        trains = [name for name in parts if roles[name] == TRAIN]
        others = [name for name in parts if name not in trains]
        siblings = [name for name in full if name not in parts]
        ready = [name for name in trains if name in full]
        if not ready and not any(name in full for name in others):
            chosen = ((validation,),) if validation is not None else ()
            if validation is None or outside:
                return Layout(root, Division(".", chosen, ()) if chosen else None, notes)
        if not ready:
            _refuse_without_training(root, trains, others, siblings)
        # No other split beside it: `train` may be the railway class of bus/ car/ train/.
        if len(ready) == 1 and not others and validation is None and siblings and not folders(root / ready[0]):
            taken = (
                f"{ready[0]} is taken for a class, as {_some(siblings)} are (data_train={ready[0]} trains on it alone)"
            )
            return Layout(root, None, [*notes, taken])
        if len(ready) == 1 and ready[0] != validation:
            train = ready[0]  # by its name beside that of an empty folder
    return Layout(root, divide(full, train, validation, shown), notes)


def _refuse_without_training(root: Path, trains: Sequence[str], others: Sequence[str], siblings: Sequence[str]) -> None:
    shown = printable(str(root))
    if trains:
        raise Refusal(
            f"no images in {printable(str(root / trains[0]))}, the training split of {shown} by its name: add some, or "
            "name another sub-folder with data_train=NAME"
        )
    beside = f" beside {_some(siblings)}" if siblings else ""
    raise Refusal(
        f"{shown} has {_some(others)}{beside}, and no training split: say what is to be trained on with "
        "data_train=NAME, or data_train=. for all of it, whose sub-folders are then classes"
    )


def _refuse_splits_in_classes(root: Path, names: Sequence[str]) -> None:
    """Raises Refusal where the first sub-folders hold a training split and another one each."""
    for name in names[:LOOKED_INTO]:
        roles = {role: part for part, role in roles_of(folders(root / name)).items()}
        if TRAIN in roles and len(roles) > 1:
            split, other = roles.pop(TRAIN), next(iter(roles.values()))
            shown, one = printable(str(root)), printable(name)
            raise Refusal(
                f"{shown} has splits inside of its sub-folders, {one}/{split} and {one}/{other}, not outside: "
                f"{split}/{one}; data_train=. trains on all of it, and data={shown}/{one} on one of them"
            )


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(f"{printable(name)}/" for name in names[:most]) + (", …" if len(names) > most else "")


def folders(root: Path) -> list[str]:
    """List the sorted names of the visible sub-folders, linked ones too. Raises Refusal where they cannot be listed."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if not is_hidden(entry.name) and _is_folder(entry)]
    except OSError as error:
        raise Refusal(f"cannot list {printable(str(root))}: {error.strerror}; expected a readable folder") from error
    return sorted(names, key=os.fsencode)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()  # costs no stat, but of links
    except OSError:  # a link that leads round
        return False


def holds_images(folder: Path, endings: frozenset[str]) -> bool:
    """Return whether there is an image in `folder` or below it."""
    try:
        return folder.is_dir() and any(True for _ in walk(str(folder), endings, LeftOut()))
    except OSError:
        return False


def _inner(root: Path, endings: frozenset[str]) -> tuple[Path, list[str]]:
    """Return (the folder whose sub-folders are splits or classes, notes): below images/ where masks lie beside it, and
    below a lone sub-folder that has splits."""
    notes: list[str] = []
    for _ in range(DEPTH):
        inner, note = without_masks(root, endings)
        if inner == root:
            inner = _lone(root, endings)
            note = f"splits are looked for in {printable(inner.name)}"
        if inner == root:
            break
        root, notes = inner, [*notes, note]
    return root, notes


def without_masks(root: Path, endings: frozenset[str]) -> tuple[Path, str]:
    """Return (images/ of a folder that has nothing but that and masks, a note), else the folder itself."""
    names = folders(root)
    images = [name for name in names if name.lower() in IMAGES]
    masks = [name for name in names if name.lower() in MASKS]
    if len(images) != 1 or not masks or not holds_images(root / images[0], endings):
        return root, ""
    if any(holds_images(root / name, endings) for name in names if name not in (*images, *masks)):
        return root, ""
    return root / images[0], f"images are those in {images[0]}, not {', '.join(map(printable, masks))} beside it"


def inside(split: Path, endings: frozenset[str]) -> tuple[Path, str]:
    """Return (where the images of a split are, a note): in images/ beside masks, or in its only sub-folder, where that
    has its own name, seg_train/seg_train. Else the folder itself."""
    inner = split / split.name
    if folders(split) == [split.name] and holds_images(inner, endings) and not _has_images(split, endings):
        return inner, f"images are those in {printable(split.name)}/{printable(split.name)}"
    return without_masks(split, endings)


def _has_images(root: Path, endings: frozenset[str]) -> bool:
    """Return whether a folder has images itself, not in its sub-folders."""
    with os.scandir(root) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in endings for entry in entries if entry.name[0] != ".")


def _lone(root: Path, endings: frozenset[str]) -> Path:
    """Find the only sub-folder with images, if it has a training split and another one and no image lies beside."""
    filled = []
    for name in folders(root):
        if holds_images(root / name, endings):
            filled.append(name)
        if len(filled) > 1:
            return root
    if not filled or role_of(filled[0]) is not None:
        return root
    if _has_images(root, endings):
        return root
    roles = set(roles_of(folders(root / filled[0])).values())
    return root / filled[0] if TRAIN in roles and len(roles) > 1 else root
