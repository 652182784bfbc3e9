"""Hugging Face data sets: a hub name, or a local parquet/arrow file, image folder or `save_to_disk` folder.

The encoded bytes are read from the Arrow table and decoded by us, like any file: no PIL image is made on the way.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..decoding.decode import decode
from ..decoding.depth import Range
from ..errors import Refusal
from ..printable import printable
from .images import UNLABELLED, Images
from .listing import is_hidden, stamps
from .location import Location
from .splits import TEST, TRAIN, VALIDATION, Division, divide, judge, role_of, roles_of

LABEL_NAMES = ("label", "labels", "target", "targets", "class", "classes", "category", "cls", "fine_label",
               "coarse_label")  # fmt: skip
CANONICAL = {("coarse_label", "fine_label"): "fine_label"}  # CIFAR-100's own choice

STREAMED = 64  # shards into which a table on this disk is divided where it is a stream
IDENTITY_SAMPLES = 256  # images whose bytes enter the fingerprint


class Rows:
    """Source: an image column of a Hugging Face data set, as stored."""

    def __init__(self, table: Any, column: str, label: str):
        self.table, self.column, self.label = table, column, label
        self._cells: Any = None
        self.span: Range | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cells": None}  # a table pickles as a path, a column as bytes

    def __len__(self) -> int:
        return len(self.table)

    def encoded(self, i: int) -> np.ndarray:
        """Return the bytes of image `i` as they are stored, uint8 (bytes,)."""
        if self._cells is None:
            self._cells = self.table.data.column(self.column)
        cell = self._cells[i]
        if not cell.is_valid:
            raise ValueError("the cell is empty")
        if cell["bytes"].is_valid:
            return np.array(np.frombuffer(cell["bytes"].as_buffer(), np.uint8))  # a copy: Arrow's memory is read-only
        if cell["path"].is_valid:
            return np.fromfile(cell["path"].as_py(), np.uint8)
        raise ValueError("neither bytes nor a path is stored")

    def read(self, i: int, channels: int) -> Tensor:
        return decode(self.encoded(i), channels, self.span)

    def name(self, i: int) -> str:
        return f"{self.label}[{i}]"

    def identity(self) -> bytes:
        """Hash the number of bytes of every image, and all bytes of up to 256, evenly spaced."""
        sizes = [np.empty(0, np.int64)]
        for chunk in self.table.data.column(self.column).chunks:
            inner = chunk.field("bytes")
            kind = "<i8" if str(inner.type).startswith("large") else "<i4"
            if len(inner):  # Arrow keeps where each one begins
                starts = np.frombuffer(inner.buffers()[1], kind)[inner.offset : inner.offset + len(inner) + 1]
                sizes.append(np.where(_valid(inner), np.diff(starts), -1))
        return hashlib.sha256(self.first_identity() + np.concatenate(sizes).astype("<i8").tobytes()).digest()

    def stamp(self) -> bytes:
        """Hash what the disk says of the table's files, and of images that are files themselves."""
        paths = [str(file["filename"]) for file in self.table.cache_files]
        for chunk in self.table.data.column(self.column).chunks:
            outside = np.flatnonzero(~_valid(chunk.field("bytes")))
            if len(outside):
                paths += [path for path in chunk.field("path").take(outside).to_pylist() if path is not None]
        return hashlib.sha256(self.identity() + stamps(paths).tobytes()).digest()

    def first_identity(self) -> bytes:
        """Hash what the first kind of fingerprints was made of: the number of images, and all bytes of up to 256."""
        digest = hashlib.sha256(str(len(self)).encode())
        for i in np.unique(np.linspace(0, len(self) - 1, min(len(self), IDENTITY_SAMPLES)).astype(int)):
            try:
                digest.update(self.encoded(int(i)).tobytes())
            except (OSError, ValueError):
                digest.update(b"missing!")
        return digest.digest()


def _valid(column: Any) -> np.ndarray:
    """Return a mask, bool (n,), of the cells of an Arrow column that have a value."""
    return np.asarray(column.is_valid())


def open_hub(where: Location, split: str) -> Images | None:
    """Open the `split` of a Hugging Face data set, if it has one to judge on. Raises Refusal if it is unusable."""
    shown = where.spec
    splits = load_splits(where)
    division = division_of(splits, where)
    if split == "train":
        images = open_table(splits, division.train, where)
        images.note = "; ".join(filter(None, (division.note() if len(splits) > 1 else "", images.note)))
        return images
    if len(splits) == 1:
        return None
    judged = judge(division, lambda name: (name, splits[name]), lambda part: is_labelled(part[1], where), shown)
    return None if judged is None else open_table(splits, judged[0], where)


def open_table(splits: dict[str, Any], name: str, where: Location) -> Images:
    """Open the split `name`."""
    table, shown = splits[name], where.spec
    if len(table) == 0:
        raise Refusal(f"{shown}: the split {name} is empty; expected at least one image")
    table, column = image_column(table, where)
    if table._indices is not None:  # rows chosen or shuffled before saving: put the table itself in that order
        table = table.flatten_indices()
    label, why = label_name(table, where)
    labels, classes = (None, None) if label is None else labels_of(table, label, splits)
    images = Images(Rows(table, column, shown), shown, labels, classes)
    images.part, images.no_label = name if len(splits) > 1 else "", why
    if label == "fine_label" and "coarse_label" in table.features and where.label is None:
        images.note = "labels are those of fine_label, not coarse_label"
    elif why:
        images.note = f"no labels: {why}"
    return images


def load_splits(where: Location, streaming: bool = False) -> dict[str, Any]:
    """Load {name of a split: datasets.Dataset, or IterableDataset if `streaming`}."""
    name, path = where.spec.removeprefix("hf:"), where.path
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise Refusal(f"data=hf:{name} needs the package `datasets`: pip install datasets") from error
    if not path.exists() and (name[:1] in "/.~" or name.count("/") > 1):
        raise Refusal(f"data=hf:{name}: no such file or folder; expected parquet, arrow, an image folder or a hub name")
    try:
        if path.is_file():
            kind = {".parquet": "parquet", ".arrow": "arrow"}.get(path.suffix.lower())
            if kind is None:
                raise Refusal(f"data=hf:{name}: expected a .parquet or .arrow file, a folder, or a name on the hub")
            loaded = datasets.load_dataset(kind, data_files=str(path), streaming=streaming)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            if streaming:
                parts = loaded.values() if isinstance(loaded, dict) else [loaded]
                shards = min(STREAMED, *map(len, parts)) or 1
                parts = [part.to_iterable_dataset(num_shards=shards) for part in parts]
                loaded = dict(zip(loaded, parts, strict=True)) if isinstance(loaded, dict) else parts[0]
        elif path.is_dir():
            loaded = datasets.load_dataset(str(path), streaming=streaming)
            files = files_of_splits(path)
            if len(loaded) < len(files):  # `datasets` knows fewer names than `splits`, and none with a capital
                loaded = datasets.load_dataset(str(path), data_files=files, streaming=streaming)
        else:
            with quiet_hub():
                loaded = datasets.load_dataset(name, streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        expected = "a folder or file that `datasets` reads"
        if not path.exists():
            expected = (
                "a local path, or a name on the hub: without a network only what was fetched before is found, where "
                f"there is one, by python -c \"import datasets; datasets.load_dataset('{name}')\" (kept in HF_HOME, "
                "which can be copied)"
            )
        raise Refusal(f"cannot open data=hf:{name}: {reason}; expected {expected}") from error
    return {str(key): table for key, table in loaded.items()} if isinstance(loaded, dict) else {"train": loaded}


@contextlib.contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep the hub's client from telling of each of its tries, which take half a minute where there is no network."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def files_of_splits(folder: Path) -> dict[str, str]:
    """Return {split: pattern of its files} of the sub-folders and files in `folder` that have names of splits; none
    where they do not include a training split and another one."""
    patterns: dict[str, str] = {}
    for name in sorted(os.listdir(folder)):
        inner = (folder / name).is_dir()
        stem = name if inner else name.partition(".")[0].partition("-00")[0]  # train-00000-of-00002.parquet
        if not is_hidden(name):
            patterns[stem] = f"{stem}/**" if inner else f"{stem}[.-]*"
    roles = roles_of(list(patterns))
    patterns = {stem: pattern for stem, pattern in patterns.items() if stem in roles}
    usable = all(stem.isidentifier() for stem in patterns)  # what `datasets` takes for the name of a split
    return patterns if TRAIN in roles.values() and len(set(roles.values())) > 1 and usable else {}


def division_of(splits: dict[str, Any], where: Location) -> Division:
    """Decide which splits serve as what. Raises Refusal where their names leave that open."""
    names, shown = list(splits), where.spec
    for asked, option in ((where.train, "data_train"), (where.validation, "data_validation")):
        if asked is not None and asked not in splits:
            raise Refusal(f"{option}={asked}: no such split in {shown}; there is {', '.join(map(repr, names))}")
    if where.train is None and len(names) == 1 and role_of(names[0]) not in (VALIDATION, TEST):
        return Division(names[0], (), ())
    return divide(names, where.train, where.validation, shown)


def is_labelled(table: Any, where: Location) -> bool:
    """Return whether any of the first images has a label: hidden test labels are published as -1."""
    if where.label is not None and where.label not in table.features:
        return False
    name, _ = label_name(table, where)
    if name is None:
        return False
    values = table.with_format(None)[name][:1000]
    return any(value is not None and (isinstance(value, str) or value >= 0) for value in values)


def image_column(table: Any, where: Location) -> tuple[Any, str]:
    """Return (the table, the name of its image column). Raises Refusal where there is none, or no choice."""
    from datasets import Image

    columns = [name for name, feature in table.features.items() if isinstance(feature, Image)]
    listed = ", ".join(f"{name} ({type_name(feature)})" for name, feature in table.features.items())
    if where.image is not None:
        if where.image not in table.features:
            raise Refusal(f"data_image={where.image}: no such column in {where.spec}; there are {listed}")
        try:  # files or paths that were stored without saying that they are images
            return table if where.image in columns else table.cast_column(where.image, Image()), where.image
        except (TypeError, ValueError, NotImplementedError):  # pyarrow's errors are these, too
            raise Refusal(
                f"data_image={where.image}: that column of {where.spec} holds no images; there are {listed}"
            ) from None
    if not columns:
        raise Refusal(
            f"{where.spec} has no image column, only {listed}; expected one of the feature type Image, or one of "
            "files or paths that is named with data_image=NAME (--data-image NAME)"
        )
    if len(columns) > 1:
        raise Refusal(
            f"{where.spec} has several columns of images, {', '.join(columns)}: choose one with data_image=NAME "
            "(--data-image NAME)"
        )
    return table, columns[0]


def type_name(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__


def can_label(feature: Any) -> bool:
    """Return whether values of this type are classes: ClassLabel, whole numbers, texts, and true and false."""
    dtype = getattr(feature, "dtype", "")
    return isinstance(dtype, str) and dtype.startswith(("int", "uint", "string", "large_string", "bool"))


def label_name(table: Any, where: Location) -> tuple[str | None, str]:
    """Return (the name of the label column, why there is none). Raises Refusal for a chosen column without labels."""
    from datasets import ClassLabel

    features = table.features
    what = "expected whole numbers, texts, true and false, or a ClassLabel"
    if where.label is not None:
        if where.label not in features:
            raise Refusal(f"data_label={where.label}: no such column in {where.spec}; there is {', '.join(features)}")
        if not can_label(features[where.label]):
            raise Refusal(
                f"data_label={where.label}: that column of {where.spec} is of type {type_name(features[where.label])}: "
                f"{what}"
            )
        return where.label, ""
    named = [name for name in features if name.lower() in LABEL_NAMES]
    candidates = [name for name in features if isinstance(features[name], ClassLabel)]
    candidates += [name for name in named if name not in candidates and can_label(features[name])]
    if len(candidates) == 1:
        return candidates[0], ""
    if candidates:
        chosen = CANONICAL.get(tuple(sorted(candidates)))
        return chosen, "" if chosen else (
            f"several columns may be labels, {', '.join(candidates)}: choose one with data_label=NAME "
            "(--data-label NAME)"
        )  # fmt: skip
    wrong = [f"{name} is of type {type_name(features[name])}" for name in named]
    if wrong:
        return None, f"{', '.join(wrong)}, and is no label: {what}"
    others = [name for name in features if can_label(features[name])]
    choose = (
        f"no column is called {LABEL_NAMES[0]} or the like; there is {', '.join(others)}: choose with data_label=NAME"
    )
    return None, f"{choose} (--data-label NAME)" if others else ""


def labels_of(table: Any, name: str, splits: dict[str, Any]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return labels and class names of a column: plain whole numbers are classes 0 to the largest of any split; texts,
    true and false are classes in the order of their names."""

    def values(of: Any) -> list[Any]:
        return list(of.with_format(None)[name][:])

    feature = table.features[name]
    if getattr(feature, "names", None) is None and not feature.dtype.startswith(("int", "uint")):
        texts = [None if value is None else str(value) for value in values(table)]
        classes = sorted({text for text in texts if text is not None})
        numbers = {text: number for number, text in enumerate(classes)}
        labels = [UNLABELLED if text is None else numbers[text] for text in texts]
        return np.array(labels, np.int64), tuple(map(printable, classes))

    def whole(of: Any) -> np.ndarray:
        return np.array([UNLABELLED if value is None or value < 0 else value for value in values(of)], np.int64)

    names = getattr(feature, "names", None)
    if names is None:
        largest = max(int(whole(of).max(initial=-1)) for of in splits.values() if name in of.features)
        names = [str(k) for k in range(largest + 1)]
    return whole(table), tuple(names)
