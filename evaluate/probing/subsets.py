"""Seeded, stratified draws of few training images: pure functions of labels and seed.

Each class is put in an order of its own, which its label and the seed decide, and a draw takes the first of each: so a
larger draw contains the smaller ones of the same seed, and a class' images do not depend on which others there are.
"""

from collections.abc import Sequence

import numpy as np

from common.errors import Refusal


def ordered(labels: np.ndarray, seed: int, draw: int = 0) -> dict[int, np.ndarray]:
    """{class: indices of its images, in the order in which draw number `draw` of `seed` takes them}."""
    return {
        int(label): np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, draw, int(label)])).permutation(
            np.flatnonzero(labels == label)
        )
        for label in np.unique(labels)
    }


def shots(
    labels: np.ndarray, k: int, seed: int, draw: int = 0, *, classes: Sequence[str] = (), where: str = "the data"
) -> np.ndarray:
    """Sorted indices of `k` images of each class. Raises Refusal that names a class with fewer, by `classes`."""
    members = ordered(labels, seed, draw)
    for label, name in enumerate(classes) if classes else ((label, str(label)) for label in members):
        if len(members.get(label, ())) < k:
            raise Refusal(
                f"--shots {k}: class {name} of {where} has {len(members.get(label, ()))} training images that can be "
                f"read; expected at least {k}"
            )
    return np.sort(np.concatenate([each[:k] for each in members.values()]))


def share(labels: np.ndarray, part: float, seed: int, draw: int = 0) -> np.ndarray:
    """Sorted indices of the share `part` in (0, 1] of the images of each class, rounded, and at least one of each."""
    chosen = [each[: max(1, round(part * len(each)))] for each in ordered(labels, seed, draw).values()]
    return np.sort(np.concatenate(chosen))
