"""What was found, in words, as numbers for other programs, and as a sheet of pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..checkpoints.storage import write_atomically
from ..data import Images, Unreadable
from ..data.images import evenly
from ..printable import printable
from . import repeats
from .survey import Survey

SIDES = (32, 64, 128, 256, 512, 1024)  # of the shorter side: bounds between rows of the histogram
NAMED = 3  # files that a line names
SHOWN, TILE = 64, 96  # pictures on the sheet, and pixels of each
LISTED = 1000  # repeats in the report


@dataclass
class Split:
    """One split: its images, and what was found in their pixels."""

    name: str  # train or test
    images: Images
    survey: Survey


@dataclass
class Repeats:
    """Pictures that repeat, by (split, index in it)."""

    exact: list[list[tuple[str, int]]] = field(default_factory=list)
    near: list[list[tuple[str, int]]] = field(default_factory=list)

    def across(self, groups: Sequence[Sequence[tuple[str, int]]]) -> list[Sequence[tuple[str, int]]]:
        """Groups that lie in more than one split."""
        return [group for group in groups if len({split for split, _ in group}) > 1]


def find_repeats(splits: Sequence[Split]) -> Repeats:
    """Pictures that repeat in or between the splits."""
    where = [(split.name, at) for split in splits for at in split.survey.index]
    digests = [digest for split in splits for digest in split.survey.digests]
    thumbnails = [thumbnail for split in splits for thumbnail in split.survey.thumbnails]
    if not digests:
        return Repeats()
    exact = [[where[at] for at in group] for group in repeats.exact(digests)]
    near = [[where[a], where[b]] for a, b in repeats.near(np.stack(thumbnails), digests)]
    return Repeats(exact, near)


# ---------------------------------------------------------------------------------------------------------- in words


def lines(splits: Sequence[Split], found: Repeats, pace: float | None) -> list[str]:
    """The report, in lines."""
    said = [line for split in splits for line in _of_split(split)]
    surveys = [split.survey for split in splits]
    sizes = [size for survey in surveys for size in survey.sizes]
    if not sizes:
        return [*said, "no image could be read"]
    said += _of_sizes(np.array(sizes))
    first = surveys[0] if surveys[0].means else surveys[-1]
    grey = sum(sum(survey.grey) for survey in surveys)
    channels = 1 if grey == len(sizes) else 3
    mean, std = (", ".join(f"{value:.3f}" for value in values[:channels]) for values in (first.mean, first.std))
    said += [f"grey       {grey:,} of {len(sizes):,}: without colour"] if grey else []
    said += [f"colours    model.mean=[{mean}] model.std=[{std}]"]
    said += _of_repeats(splits, found)
    if pace is not None:
        said.append(f"decoding   {pace:,.0f} images/s in one thread")
    return said


def _of_split(split: Split) -> list[str]:
    images, survey = split.images, split.survey
    counted = f"{len(images):,} images"
    counted += f", of which {survey.looked:,} were looked at" if survey.looked < len(images) else ""
    said = [f"{split.name:<10} {images.where}{f' ({images.part})' if images.part else ''}: {counted}"]
    kinds = Counter(suffix_of(images.name(at)) for at in range(len(images)))
    if kinds.keys() - {""}:
        counts = (f"{count:,} {kind or 'without a suffix'}" for kind, count in kinds.most_common())
        said.append(f"kinds      {', '.join(counts)}")
    said += [f"not read   {images.left_out}"] if images.left_out else []
    if images.has_labels:
        assert images.labels is not None and images.classes is not None
        each = np.bincount(images.labels[images.labels >= 0], minlength=len(images.classes))
        few, many = (f"{each[k]:,} ({printable(images.classes[k])})" for k in (each.argmin(), each.argmax()))
        none = int((images.labels < 0).sum())
        without = f"; {none:,} images have none" if none else ""
        spread = f"{each[0]:,} images each" if each.min() == each.max() else f"{few} to {many} images"
        said.append(f"classes    {len(each):,}, of {spread}{without}")
    else:
        said.append(f"classes    none: {images.why_unlabelled}")
    if survey.bad:
        said.append(f"unreadable {len(survey.bad):,} of {survey.looked:,}:")
        said += [f"  {message}" for message in survey.bad[:NAMED]]
        said += [f"  … and {len(survey.bad) - NAMED:,} more"] if len(survey.bad) > NAMED else []
    return said


def suffix_of(name: str) -> str:
    """`.jpg` of a path; nothing of what is no file."""
    return "" if name.endswith("]") else Path(name).suffix.lower()


def _of_sizes(sizes: np.ndarray) -> list[str]:
    short, ratio = sizes.min(1), sizes[:, 1] / sizes[:, 0]
    rows, low = [], 0
    for high in (*SIDES, 10**9):
        if count := int(((short >= low) & (short < high)).sum()):
            until = f"{low}-{high - 1}" if high < 10**9 else f"{low} and more"
            rows.append(f"{count:,} of {until}")
        low = high
    height, width = np.median(sizes, 0).astype(int)
    different = len({tuple(size) for size in sizes.tolist()})
    return [
        f"sizes      {different:,} different, in pixels; median {height} high, {width} wide; width:height "
        f"{ratio.min():.2f} to {ratio.max():.2f}",
        "shorter    " + ", ".join(rows) + " pixels",
    ]


def _of_repeats(splits: Sequence[Split], found: Repeats) -> list[str]:
    by_name = {split.name: split.images for split in splits}
    said = []
    for word, groups, what, none in (
        ("same", found.exact, "pictures are repeated pixel by pixel", "no picture is repeated pixel by pixel"),
        ("near", found.near, "pairs are nearly the same picture", "no two pictures are nearly the same"),
    ):
        across = found.across(groups)
        if not groups:
            said.append(f"{word:<10} {none}")
            continue
        said.append(f"{word:<10} {len(groups):,} {what}" + (f"; {len(across):,} in both splits" if across else ""))
        sign = " = " if word == "same" else " ~ "
        for group in (across or groups)[:NAMED]:
            said.append("  " + sign.join(f"{split}: {by_name[split].name(at)}" for split, at in group[:4]))
    if torn := _torn(by_name, found.exact):
        said.append(f"labels     {len(torn):,} of the repeated pictures have more than one class, such as:")
        said += ["  " + " = ".join(by_name[split].name(at) for split, at in group[:4]) for group in torn[:NAMED]]
    return said


def _torn(by_name: Mapping[str, Images], groups: Sequence[list[tuple[str, int]]]) -> list[list[tuple[str, int]]]:
    """Groups of the same pixels that have several classes."""

    def classes(group: Sequence[tuple[str, int]]) -> set[str]:
        found = set()
        for split, at in group:
            images = by_name[split]
            if images.labels is not None and images.classes is not None and images.labels[at] >= 0:
                found.add(images.classes[images.labels[at]])
        return found

    return [group for group in groups if len(classes(group)) > 1]


# --------------------------------------------------------------------------------------------------------- as numbers


def numbers(splits: Sequence[Split], found: Repeats, pace: float | None) -> dict[str, Any]:
    """The report, for other programs: names of files as they are, of repeats the first LISTED."""
    by_name = {split.name: split.images for split in splits}
    report: dict[str, Any] = {"format": 1, "decoded_per_second": pace, "splits": {}}
    for split in splits:
        images, survey = split.images, split.survey
        counts = {}
        if images.has_labels:
            assert images.labels is not None and images.classes is not None
            counted = np.bincount(images.labels[images.labels >= 0], minlength=len(images.classes)).tolist()
            counts = dict(zip(images.classes, counted, strict=True))
        report["splits"][split.name] = {
            "where": images.where,
            "images": len(images),
            "looked": survey.looked,
            "not_read": images.left_out,
            "classes": counts,
            "unreadable": survey.bad,
            "sizes": {f"{h}x{w}": count for (h, w), count in Counter(survey.sizes).most_common()},
            "mean": survey.mean.tolist() if survey.means else None,
            "std": survey.std.tolist() if survey.means else None,
        }
    for word, groups in (("exact", found.exact), ("near", found.near)):
        across = found.across(groups)
        first = [*across, *(group for group in groups if group not in across)][:LISTED]
        listed = [[f"{split}: {by_name[split].name(at)}" for split, at in group] for group in first]
        report[word] = {"groups": len(groups), "in_both_splits": len(across), "first": listed}
    return report


# -------------------------------------------------------------------------------------------------------- as pictures


def sheet(images: Images, survey: Survey, file: Path) -> None:
    """Write a PNG of an even sample of the readable images, each as it is shown at TILE pixels, its sides kept."""
    chosen = [survey.index[at] for at in evenly(len(survey.index), SHOWN)]
    across = max(1, round(len(chosen) ** 0.5))
    down = -(-len(chosen) // across)
    canvas = torch.full((3, down * (TILE + 2) - 2, across * (TILE + 2) - 2), 255, dtype=torch.uint8)
    for number, at in enumerate(chosen):
        try:
            image = images.read(at, 3)
        except Unreadable:
            continue
        zoom = TILE / max(image.shape[1:])
        size = [max(1, round(side * zoom)) for side in image.shape[1:]]
        how: dict[str, Any] = {"mode": "bilinear", "antialias": True} if zoom < 1 else {"mode": "nearest"}
        tile = F.interpolate(image[None].float(), size, **how)[0].round_().clamp_(0, 255).to(torch.uint8)
        top, left = (number // across) * (TILE + 2), (number % across) * (TILE + 2)
        top, left = top + (TILE - size[0]) // 2, left + (TILE - size[1]) // 2
        canvas[:, top : top + size[0], left : left + size[1]] = tile
    picture = Image.fromarray(canvas.permute(1, 2, 0).numpy())
    write_atomically(file, lambda aside: picture.save(aside, "PNG"))
