"""The images that a classifier is judged on, and how its classes are those of the data.

Letters: n images, K classes of the classifier, C of the data.
"""

import contextlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import data
from common.checkpoints.storage import sha256
from common.data import Images, Location, labelled_splits, listed, only_labelled
from common.errors import Refusal

OTHER = -1  # a class of the classifier that is none of the data


def judged_images(where: Location, trainings: Sequence[Mapping[str, Any]]) -> tuple[Images, Images, str]:
    """Open (no training images, images to judge on, note): the test split of `where`, all of it labelled.

    Of data without one all images are judged, unless they are those that a checkpoint was trained on, by what
    `trainings` say of each: then the fixed fifth of each class on which evaluations judge. Raises Refusal for data
    without labels.
    """
    test = data.open_split(where, "test")
    if test is not None:
        test, note = only_labelled(test), f"as split in {where.spec}{f': {test.part}' if test.part else ''}"
    else:
        test, note = only_labelled(data.open_data(where)), f"no test split in {where.spec}: all of it is judged"
        with contextlib.suppress(Refusal):  # one image a class: nothing can have been trained on it
            train, held, held_note = labelled_splits(where)
            if _trained_on(where, train, trainings):
                test, note = held, held_note
                if any("finetuned" not in training for training in trainings):
                    note += "; WARNING: a training that read their labels may have seen them"
    nothing = test.subset([])
    nothing.labels = None
    return nothing, test, note


def _trained_on(where: Location, train: Images, trainings: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of these trainings was on this data: by its name, or by the images that a finetuning took."""
    for training in trainings:
        finetuned = training.get("finetuned")
        images = finetuned.get("training images") if isinstance(finetuned, dict) else None
        if training.get("data") == where.spec or (isinstance(images, str) and train.has_fingerprint(images)):
            return True
    return False


def numbered(classes: Sequence[str], named: Sequence[str] | None, count: int, name: str, spec: str) -> np.ndarray:
    """Return (K,) int64: which class of the data each of the `count` classes of a classifier is, or OTHER.

    By name where the classifier's are known (`named`), which have to include those of the data; else by number. Raises
    Refusal, with both, where they differ.
    """
    if named is None:
        if len(classes) != count:
            raise Refusal(
                f"{name} tells {count} classes apart, and data={spec} has {len(classes)} ({listed(tuple(classes), 5)}):"
                " expected as many; give the data it was trained for, or finetune it (evaluate/finetune.py)"
            )
        return np.arange(count)
    if not set(classes) <= set(named):
        raise Refusal(
            f"classes differ: {name} has {len(named)} ({listed(tuple(named), 5)}), data={spec} has {len(classes)} "
            f"({listed(tuple(classes), 5)}); give the data it was trained for, or finetune it (evaluate/finetune.py)"
        )
    numbers = {each: number for number, each in enumerate(classes)}
    return np.array([numbers.get(each, OTHER) for each in named])


def real_labels(file: str, images: Images, num_classes: int) -> tuple[list[frozenset[int]], dict[str, Any]]:
    """Read ImageNet-ReaL's labels (arXiv 2006.07159): (the classes of each of n images, in the order of `images`; what
    a report says of the file).

    The file is a JSON list of a list of class numbers for each image, in the order of the images' file names; an empty
    one means that the image counts for nothing. Raises Refusal for another length, and for what is no such list.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"--real {file} cannot be read: {' '.join(str(error).split())}; expected real.json") from None
    if not isinstance(content, list) or not all(isinstance(each, list) for each in content):
        raise Refusal(f"--real {file}: expected a list of lists of class numbers, one for each image")
    if len(content) != len(images):
        raise Refusal(
            f"--real {file} has labels of {len(content):,} images, and {images.where} has {len(images):,}: expected as "
            "many, in the order of the file names"
        )
    for number in (number for each in content for number in each):
        if type(number) is not int or not 0 <= number < num_classes:
            raise Refusal(f"--real {file}: {number!r:.40} is no class: expected 0 to {num_classes - 1}")
    if not any(content):
        raise Refusal(f"--real {file} has no label at all; expected some in most of its lists")
    names = [_in_order(images.name(i)) for i in range(len(images))]
    order = sorted(range(len(images)), key=names.__getitem__)
    for one, other in itertools.pairwise(order):
        if names[one] == names[other]:
            raise Refusal(
                f"--real {file}: which list belongs to which image is not known, as {images.name(one)} and "
                f"{images.name(other)} have the same name; expected file names that differ"
            )
    labels = [frozenset[int]()] * len(images)
    for place, i in enumerate(order):
        labels[i] = frozenset(content[place])
    return labels, {"file": Path(file).name, "sha256": sha256(Path(file)), "images": sum(map(bool, content))}


def _in_order(name: str) -> tuple[tuple[bool, int, str], ...]:
    """Return what file names are ordered by: the last part of a path, numbers in it by their size."""
    parts = re.split(r"(\d+)", re.split(r"[\\/]", name)[-1])
    return tuple((bool(at % 2), int(part) if at % 2 else 0, part) for at, part in enumerate(parts))
