"""Tar archives as data: train.tar beside val.tar, ImageNet's archive of archives, WebDataset's shards.

An archive is read as the folder that it unpacks to: first folders are classes, or splits. Shards are read as one. A
picture's label is in NAME.cls, or in a field of NAME.json, beside it, where there is such a member.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..decoding.decode import endings, formats
from ..errors import Refusal
from ..kept import UNKEPT
from ..paths import expanded
from ..printable import printable
from .folder import classes_of, first_folders
from .images import UNLABELLED, Images
from .layout import folders, holds_images
from .listing import LeftOut, is_hidden
from .location import ARCHIVE, Location, braced
from .splits import TEST, TRAIN, VALIDATION, Division, divide, judge, role_of, roles_of
from .tar import Members
from .tar_index import OFTEN, Index, Wanted, index_of, packed

MOST_CLASSES = 100_000  # labels that are whole numbers above that are names
SHOWN = 3  # archives that a message names
NO_LABEL = "expected folders of classes in it (two or more, and no images beside them), or .cls or .json members"
# What is compressed as a whole: said, not read.
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
SHARD = re.compile(r"(.*?)([-_.]?)(\d+)(?:-of-\d+)?")  # (base, separator, number)


# ------------------------------------------------------------------------------------------- which archives there are


@dataclass
class Place:
    """Archives of a folder by the name of their split; shards of one name are one. `given`: that which was named."""

    folder: Path
    groups: dict[str, list[str]]
    given: str | None = None

    def named(self, name: str) -> str | None:
        """Return the group that an option names, taking in archives that lie elsewhere; None if there is none."""
        for known in (name, name[: -len(ARCHIVE)] if name.lower().endswith(ARCHIVE) else name):
            if known in self.groups:
                return known
        paths = braced(str(self.folder / expanded(name)))
        if name.lower().endswith(ARCHIVE) and os.path.isfile(paths[0]):
            self.groups[name] = _all_there(paths, name)
            return name
        return None


def are_archives(where: Location) -> bool:
    """Return whether a location is tar archives, or a folder of them and of no images. Raises Refusal where archives
    are compressed, or where images and archives could both be meant."""
    if where.is_named or where.is_hub or not where.spec:
        return False
    path = where.path
    if not path.is_dir():
        if path.name.lower().endswith(COMPRESSED) and path.is_file():
            raise Refusal(
                f"data={printable(str(path))} is compressed, and what is in it cannot be reached picture by picture: "
                "decompress it once (gunzip --keep, unxz --keep, …) and name the .tar that comes of it"
            )
        return where.is_archive
    groups = _groups_of(path)
    if not groups or not holds_images(path, endings()):
        return bool(groups)
    splits, unpacked = roles_of(list(groups)), roles_of(folders(path))
    ready = [name for name, role in unpacked.items() if role == TRAIN and holds_images(path / name, endings())]
    if TRAIN in splits.values() and not ready and where.train is None:
        archive = printable(next(groups[name][0] for name, role in splits.items() if role == TRAIN))
        raise Refusal(
            f"{printable(str(path))} has images, and archives that are splits by their names: name one, such as "
            f"data={archive}, or say data_train=. for the images"
        )
    return False


def _place_of(where: Location) -> Place:
    path = where.path
    if path.is_dir():
        return Place(path, _groups_of(path))
    paths = _all_there([str(path)] if path.exists() else braced(str(path)), where.spec)
    folder = Path(paths[0]).parent
    groups = _grouped(_archives_in(folder))
    inside = {os.path.basename(each) for each in paths if Path(each).parent == folder}
    same = [name for name, each in groups.items() if inside & set(map(os.path.basename, each))]
    name = same[0] if len(same) == 1 else Path(paths[0]).stem
    for each in same:
        del groups[each]
    return Place(folder, {name: paths, **groups}, name)


def _all_there(paths: list[str], spec: str) -> list[str]:
    """Return the paths. Raises Refusal if there is no file at some of them."""
    absent = [path for path in paths if not os.path.isfile(path)]
    if absent:
        some = ", ".join(map(printable, absent[:SHOWN])) + (", …" if len(absent) > SHOWN else "")
        of = f"{len(absent):,} of {len(paths):,} archives are not there: " if len(paths) > 1 else "no such file: "
        hint = "" if len(paths) > 1 else ", perhaps with the numbers of shards in braces, 'NAME-{000..099}.tar'"
        raise Refusal(f"data={printable(spec)}: {of}{some}; expected the path of tar archives{hint}")
    return paths


def _groups_of(folder: Path) -> dict[str, list[str]]:
    """Return the archives in a folder by their group; where there are none, those in its splits by the sub-folder."""
    groups = _grouped(_archives_in(folder))
    if not groups:
        inner = {name: _archives_in(folder / name) for name in roles_of(folders(folder))}
        groups = {name: paths for name, paths in inner.items() if paths}
    return groups


def _archives_in(folder: Path) -> list[str]:
    """Return the paths of the archives in a folder. Raises Refusal if it cannot be listed."""
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith(ARCHIVE) and not is_hidden(name)]
    except OSError as error:
        raise Refusal(f"cannot list {printable(str(folder))}: {error.strerror}; expected a readable folder") from error
    return [str(folder / name) for name in sorted(names, key=os.fsencode) if (folder / name).is_file()]


def _grouped(paths: Sequence[str]) -> dict[str, list[str]]:
    """Return archives by name, without .tar; shards, alike but for a number at the end, by what is alike.

    train2014.tar and train2017.tar are not shards: a number that nothing separates counts from 0 or 1.
    """
    alike: dict[tuple[str, str], list[str]] = {}
    numbers: dict[tuple[str, str], list[int]] = {}
    groups: dict[str, list[str]] = {}
    for path in paths:
        stem = os.path.basename(path)[: -len(ARCHIVE)]
        if found := SHARD.fullmatch(stem):
            alike.setdefault((found[1], found[2]), []).append(path)
            numbers.setdefault((found[1], found[2]), []).append(int(found[3]))
        else:
            groups[stem] = [path]
    for (base, separator), shards in alike.items():
        if len(shards) > 1 and (separator or min(numbers[base, separator]) <= 1):
            groups[base or "shards"] = shards
        else:
            groups |= {os.path.basename(path)[: -len(ARCHIVE)]: [path] for path in shards}
    return groups


# -------------------------------------------------------------------------------------------------- what is in them


@dataclass
class Pile:
    """Pictures of one archive, or of shards, sorted by name, with what labels them."""

    where: str
    files: Members
    texts: list[bytes] | None  # of each picture; None: no member says labels
    left: LeftOut
    notes: list[str]
    no_label: str

    def inside(self, folder: bytes) -> Pile:
        """Return the pictures of a first folder, by their names in it."""
        starts = first_folders(self.files) or {}
        start = starts[folder]
        stop = min((other for other in starts.values() if other > start), default=len(self.files))
        texts = None if self.texts is None else self.texts[start:stop]
        where = f"{self.where}/{printable(folder)}"
        return Pile(where, self.files.inside(folder, start, stop), texts, self.left, self.notes, self.no_label)

    def images(self, known: frozenset[str] = frozenset()) -> Images:
        """Return them as images, labelled by their members or by first folders, also by one alone if `known`."""
        labels, classes = classes_of(self.files, known) if self.texts is None else labels_of(self.texts)
        images = Images(self.files, self.where, labels, classes)
        images.left_out = "; ".join(filter(None, (self.left.note([], False), *self.notes)))
        images.no_label = "" if labels is not None else self.no_label
        unlabelled = 0 if labels is None else int((labels < 0).sum())
        images.note = f"{unlabelled:,} of {len(images):,} have no label" if unlabelled else ""
        return images


def labels_of(texts: list[bytes]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels and class names of texts: whole numbers are classes 0 to the largest; other texts, and larger
    numbers, are classes in the order of their bytes. An empty text and a number below 0 are no label."""
    distinct = set(texts) - {b""}
    if all(re.fullmatch(rb"-?\d{1,18}", text) for text in distinct):
        numbers = {text: max(int(text), UNLABELLED) for text in distinct}
        count = 1 + max(numbers.values(), default=UNLABELLED)
        if count <= MOST_CLASSES:
            return _numbered(texts, numbers), tuple(map(str, range(count)))
    names = sorted(distinct)
    return _numbered(texts, {name: number for number, name in enumerate(names)}), tuple(map(printable, names))


def _numbered(texts: list[bytes], numbers: dict[bytes, int]) -> np.ndarray:
    return np.fromiter((numbers.get(text, UNLABELLED) for text in texts), np.int64, len(texts))


def read(paths: list[str], where: Location, judged: bool = False) -> Pile:
    """Read the indexes of archives, as one. Raises Refusal where there is no picture, or labels cannot be chosen;
    archives that may be `judged` need not have the field of labels that was asked for."""
    wanted = Wanted(endings(), where.image and where.image.lower().lstrip("."), where.label)
    indexes, shown = _indexes(paths, wanted), _shown(paths)
    left = LeftOut()
    for index in indexes:
        left.others.update(index.facts["others"])
        left.special.update(index.facts["special"])
    if not any(len(index.ends) for index in indexes):
        kinds = left.kinds()
        what = f"only other members ({kinds})" if kinds else "there is nothing in it"
        raise Refusal(f"no images in {shown}: {what}; expected images ({', '.join(formats())})")
    files, order = _merged(paths, indexes)
    labelled = _labels(indexes, shown, None if judged else where.label)
    texts = [text for index in indexes for text in index.labels()] if labelled else None
    if texts is not None and order is not None:
        texts = [texts[i] for i in order]
    return Pile(shown, files, texts, left, _notes(indexes), _why_unlabelled(files, indexes))


def _indexes(paths: list[str], wanted: Wanted) -> list[Index]:
    """Return the indexes of archives; says how far it is with many that are read for the first time."""
    indexes, said = list[Index](), time.monotonic()
    for path in paths:
        indexes.append(index_of(path, wanted))
        if len(paths) > 1 and time.monotonic() - said >= OFTEN:
            said = time.monotonic()
            print(f"indexing {len(paths):,} archives: {len(indexes):,} so far", file=sys.stderr, flush=True)
    return indexes


def _shown(paths: list[str]) -> str:
    if len(paths) == 1:
        return printable(paths[0])
    return f"{printable(paths[0])} … {printable(os.path.basename(paths[-1]))}"


def _merged(paths: list[str], indexes: list[Index]) -> tuple[Members, np.ndarray | None]:
    """Return the pictures of all archives, sorted by name, and their order if that is another than one after the other.
    Where archives share names, a file's name begins with that of its archive."""
    which = np.repeat(np.arange(len(paths), dtype=np.int32), [len(index.ends) for index in indexes])
    offsets = np.concatenate([index.offsets for index in indexes])
    sizes = np.concatenate([index.sizes for index in indexes])
    if len(paths) == 1:
        return Members(paths, (indexes[0].ends, indexes[0].buffer), which, offsets, sizes), None
    names = [name for index in indexes for name in index.names()]
    if len(set(names)) < len(names):
        of = [os.fsencode(os.path.basename(path)) + b":" for path in paths]  # no slash: it is no class
        parts = (name.rpartition(b"/") for name in names)
        names = [b"".join((*part[:2], of[k], part[2])) for k, part in zip(which.tolist(), parts, strict=True)]
    order = np.array(sorted(range(len(names)), key=names.__getitem__))
    ordered = packed([names[i] for i in order])
    return Members(paths, ordered, which[order], offsets[order], sizes[order]), order


def _labels(indexes: list[Index], shown: str, asked: str | None) -> bool:
    """Return whether members of the archives say labels. Raises Refusal where they differ in what says them, or do not
    have the field that was `asked` for."""
    fields = {index.facts["field"] for index in indexes} - {None}
    if asked is not None and not fields:
        there = ", ".join(dict.fromkeys(name for index in indexes for name in index.facts["fields"])) or "no .json"
        kind = next((index.facts["why"] for index in indexes if index.facts["why"]), None)
        what = f"is of type {kind}, and is no label" if kind else f"is no field of .json in {shown}"
        raise Refusal(f"data_label={asked} {what}; there is {there}")
    if len(fields) > 1:
        words = ", ".join(sorted(map(str, fields)))
        raise Refusal(f"labels of {shown} are in {words}: choose one field with data_label=NAME (--data-label NAME)")
    return bool(fields)


def _notes(indexes: list[Index]) -> list[str]:
    """Say what else a user should know of the archives."""
    replaced = sum(index.facts["replaced"] for index in indexes)
    alone = sum(index.facts.get("alone", 0) for index in indexes)
    unkept = next((index.facts[UNKEPT] for index in indexes if UNKEPT in index.facts), None)
    return [
        *([f"{replaced:,} images that later ones of the same name replace"] if replaced else []),
        *([f"{alone:,} samples that have a label and no image"] if alone else []),
        *([f"nor could the index be kept for the next time: {unkept}"] if unkept else []),
    ]


def _why_unlabelled(files: Members, indexes: list[Index]) -> str:
    """Say why there are no labels, where nothing else says them."""
    why = next((index.facts["why"] for index in indexes if index.facts["why"]), "")
    lone = list(first_folders(files) or ())
    if not why and len(lone) == 1 and first_folders_below(files, lone[0]):
        folder = printable(lone[0])
        why = f"all images are in its folder {folder}, the folders in which are classes with data_train={folder}"
    return why or NO_LABEL


def first_folders_below(files: Members, folder: bytes) -> dict[bytes, int]:
    """Return `first_folders` of the files in the only first folder."""
    return first_folders(files.inside(folder, 0, len(files))) or {}


# ------------------------------------------------------------------------------------------------- what serves as what


def open_archives(where: Location, split: str) -> Images | None:
    """Open the `split` of tar archives, or None when there is no test split. Raises Refusal."""
    place = _place_of(where)
    outer, whole, notes = _division_of(place, where), None, list[str]()
    division = outer if isinstance(outer, Division) else None
    if isinstance(outer, str):  # all there is, perhaps with splits in it
        if where.train is not None and place.named(where.train) == outer:
            where = replace(where, train=None)
        whole, notes = _unwrapped(read(place.groups[outer], where))
        division = _inner_division(whole, where)

    def opened(name: str, known: frozenset[str] = frozenset()) -> Images:
        if whole is None:
            assert division is not None
            pile = _unwrapped(read(place.groups[name], where, name != division.train))[0]
        else:
            pile = whole if name == "." else whole.inside(os.fsencode(name))
        images = pile.images(known)
        images.part = "" if name == "." else printable(name)
        return images

    if split != "train" and division is None:
        return None
    train = opened("." if division is None else division.train)
    if split == "train":
        said = [*notes, *([division.note()] if division is not None else []), train.note]
        train.note = "; ".join(filter(None, said))
        return train
    assert division is not None
    known = frozenset(train.classes or ())
    return judge(
        division, lambda name: opened(name, known), lambda images: images.has_labels, printable(str(where.path))
    )


def _division_of(place: Place, where: Location) -> Division | str:
    """Decide which archives serve as what, or return the name of those that are all there is. Raises Refusal."""
    roles = roles_of(list(place.groups))
    judging = [name for name, role in roles.items() if role in (VALIDATION, TEST)]
    names = list(place.groups)
    if place.given is not None and roles.get(place.given) != TRAIN:  # named by itself, whatever lies beside it
        names, judging = [place.given], []
    validation = None if where.validation is None else place.named(where.validation)
    train = place.given or (None if where.train is None else place.named(where.train))
    if train is None and len(names) == 1 and names[0] not in judging:
        train = names[0]
    shown = printable(str(place.folder))
    if train is None and where.train is not None:
        there = ", ".join(map(printable, names))
        raise Refusal(f"data_train={where.train}: no such archive in {shown}; there is {there}")
    others = [name for name in judging if name != train]
    if train is not None and validation is None and (where.validation is not None or not others):
        return train
    if place.given is not None and where.train not in (None, "."):
        raise Refusal(
            f"data_train={where.train} is a folder in {place.given}{ARCHIVE}, and another archive is judged on: "
            "unpack them, or leave it out"
        )
    if validation is not None and validation not in names:
        names.append(validation)
    return divide(names, train, validation, shown)


def _unwrapped(pile: Pile) -> tuple[Pile, list[str]]:
    """Return the pictures without a folder that is around all of them, and has the name of the archive or of a split,
    or has splits in it; and a note."""
    lone = list(first_folders(pile.files) or ())
    if len(lone) != 1:
        return pile, []
    name = os.fsdecode(lone[0])
    inner = {os.fsdecode(folder) for folder in first_folders_below(pile.files, lone[0])}
    roles = set(roles_of(sorted(inner)).values())
    named = name == Path(pile.files.archives[0]).stem or role_of(name) is not None
    if not (named or (TRAIN in roles and len(roles) > 1)):
        return pile, []
    return pile.inside(lone[0]), [f"images are those in {printable(name)}"]


def _inner_division(pile: Pile, where: Location) -> Division | None:
    """Decide which first folders of an archive serve as what; None where they are classes. Raises Refusal."""
    names = [os.fsdecode(folder) for folder in first_folders(pile.files) or ()]
    for asked, option in ((where.train, "data_train"), (where.validation, "data_validation")):
        if asked is not None and asked not in (*names, "."):
            there = ", ".join(map(printable, names[:SHOWN])) + (", …" if len(names) > SHOWN else "") or "none"
            raise Refusal(
                f"{option}={asked}: no such archive, nor a folder in {pile.where}; its first folders: {there}"
            )
    roles = roles_of(names)
    if where.train == ".":
        return Division(".", ((where.validation,),) if where.validation is not None else (), ())
    if (
        where.train is None
        and where.validation is None
        and not (TRAIN in roles.values() and len(set(roles.values())) > 1)
    ):
        return None
    return divide(names, where.train, where.validation, pile.where)
