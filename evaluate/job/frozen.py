"""Frozen features of every row of a table: of what is judged, and of the baselines that stand beside it.

Each row is a list of sources, one for each seed; a baseline without a network (`features.RAW`) is one more way to make
numbers of images, under the same evaluation transform, and is treated by every probe as the others are.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.data import Images
from common.features.extraction import (
    PIXELS,
    Eye,
    FeaturesOf,
    Part,
    cache_key,
    extract_parts,
    network,
    pixel_key,
    pooled,
    raw_pixels,
    whole,
)
from common.features.finite import is_constant
from common.models import Backbone
from common.processes import collectives
from evaluate.job.arguments import LABELS
from evaluate.job.evaluation import Evaluation, first_process
from evaluate.job.feature_cache import cached
from evaluate.job.patches import patch_key, patches
from evaluate.probing.quarters import VERSION, quarters

BLOCKS = 4  # the most that a protocol asks for
IN_MEMORY = 1 << 30  # bytes of raw pixels, at most; more of them are kept in the cache and mapped
Features = list[dict[str, Tensor]]  # of the training and of the test images, with "index"


@dataclass
class Split:
    """Features of one row of the table: {kind: (K, D)} and labels (K,), for training and test images. Kinds are class,
    mean and both, mean4 and class4 of four blocks, or quarters1 ... of each block; or one of RAW.

    On a CPU they are maps of the cache's files (but for "both"), of which only what is used is read.
    """

    row: str  # subject, random, pixels or patches
    seed: int | None  # of the untrained backbone, and of the patches
    train: dict[str, Tensor]
    train_labels: Tensor
    train_index: Tensor  # (K,) which training images: those that could be read
    test: dict[str, Tensor]
    test_labels: Tensor
    test_index: Tensor


def splits(job: Evaluation, blocks: int = 1) -> Iterator[Split]:
    """Frozen features of every row: the subject's, and those of the baselines asked for, of each seed that they have.

    `blocks=4`: those of the last four blocks too, "class4" and "mean4", as `network` says. With --readout quarters a
    network's are the quarters of all blocks, whatever `blocks` says. After `join_processes`, all processes have to call
    this to the end, and only the first one is given anything. What was extracted with `blocks=4` answers for one block
    too.
    """
    rows: list[tuple[str, int | None]] = [("subject", None)] if job.subject.state is not None else []
    for row in job.baselines:
        rows += [(row, None)] if row == "pixels" else [(row, seed) for seed in job.seeds]
    if collectives.processes() == 1:
        yield from (_split(job, row, seed, _features(job, row, seed, blocks)) for row, seed in rows)
        return
    for row, seed in rows:  # all at once, so that nobody waits for the first one's answers
        _features(job, row, seed, blocks, alone=False)
    if first_process():
        with collectives.single_process():
            yield from (_split(job, row, seed, _features(job, row, seed, blocks)) for row, seed in rows)


def pixels(job: Evaluation) -> Split:
    """Raw pixels of both splits under the subject's own evaluation transform."""
    sides = [whole(images, job.eye, raw_pixels, job.say) for images in (job.train, job.test)]
    return _split(job, "pixels", None, sides)


def eye_of(job: Evaluation, backbone: Backbone) -> Eye:
    """How a backbone looks at the images of an evaluation."""
    return Eye.of(backbone, workers=job.arguments.workers, limit=job.limit)


def _features(job: Evaluation, row: str, seed: int | None, blocks: int, alone: bool = True) -> Features:
    """Features of a row; where this process is not `alone`, only what goes through the cache."""
    if row == "pixels":
        return _of_pixels(job, alone)
    return _of_patches(job, seed or 0) if row == "patches" else _of_network(job, row, seed, blocks)


def _of_network(job: Evaluation, row: str, seed: int | None, blocks: int) -> Features:
    """Features of a network, from the cache."""
    subject = job.subject if row == "subject" else job.subject.untrained()
    backbone = subject.backbone(seed or 0).to(job.device)
    name = subject.name if row == "subject" else f"{LABELS[row]} (seed {seed})"
    eye = eye_of(job, backbone)
    by_quarters = getattr(job.arguments, "readout", None) == "quarters"
    by_network = network(
        backbone, subject.plan, blocks=blocks, device=job.device, precision=job.precision,
        readout=quarters if by_quarters else None,
    )  # fmt: skip
    features = []
    for images in (job.train, job.test):
        key = cache_key(backbone, subject.plan, images, job.precision, job.device, blocks)
        larger = [key | {"blocks": BLOCKS}] if blocks == 1 else []
        if by_quarters:
            key, larger = key | {"blocks": "all", "quarters": VERSION}, []
        kinds = from_cache(job, key, images, eye, by_network, f"images from {name}", larger)
        kinds = {kind: kinds[kind] for kind in kinds if blocks > 1 or by_quarters or not kind[-1].isdigit()}
        job.refuse_not_finite(kinds, images, name, (backbone, subject.plan), cached=True)
        features.append(kinds)
    _refuse_lost(job, features)
    flat = [kind for kind in features[0] if kind != "index" and is_constant(features[0][kind])]
    if flat:
        job.warn(f"{name}: features ({', '.join(flat)}) are the same for every image: nothing can be told by them")
    return features


def _of_pixels(job: Evaluation, alone: bool) -> Features:
    """Raw pixels, from the cache if they are many, else from the images; if not `alone`, the cache only."""
    (height, width), features = job.size, []
    for images in (job.train, job.test):
        if 4 * job.eye.channels * min(height, PIXELS) * min(width, PIXELS) * len(images) > IN_MEMORY:
            key, what = pixel_key(images, job.eye), f"images from {LABELS['pixels']}"
            features.append(from_cache(job, key, images, job.eye, raw_pixels, what))
        elif alone:
            features.append(whole(images, job.eye, raw_pixels, job.say))
    return features


def _of_patches(job: Evaluation, seed: int) -> Features:
    """Features of patches, from the cache."""
    by_filters, what = patches(job.train, job.eye, seed, job.device), f"images from {LABELS['patches']} (seed {seed})"
    features = [
        from_cache(job, patch_key(job.train, images, job.eye, seed), images, job.eye, by_filters, what)
        for images in (job.train, job.test)
    ]
    _refuse_lost(job, features)
    return features


def _refuse_lost(job: Evaluation, features: Features) -> None:
    """Raises Refusal if too many images of both splits together are not among what was found."""
    total = len(job.train) + len(job.test)
    lost = total - sum(len(split["index"]) for split in features)
    if lost > job.limit.allowed(total):
        job.limit.refuse(lost, total, total, job.spec, ["they were named above"])


def from_cache(
    job: Evaluation,
    key: dict[str, Any],
    images: Images,
    eye: Eye,
    features_of: FeaturesOf,
    what: str,
    larger: Sequence[dict[str, Any]] = (),
) -> dict[str, Tensor]:
    """Features of `images` from the cache beside the report, extracted first if need be, which says of `what`."""

    def parts_of(parts: Sequence[range], seen: Callable[[int], None]) -> Iterator[Part]:
        job.say(f"features of {len(images):,} {what}")
        return extract_parts(images, eye, features_of, parts, seen)

    return cached(job.out.parent / "cache", key, images, parts_of, job.say, larger=larger, limit=job.limit)


def _split(job: Evaluation, row: str, seed: int | None, features: Features) -> Split:
    sides: list[Any] = []
    for images, part in zip((job.train, job.test), features, strict=True):
        assert images.labels is not None
        deep = {name: value for name, value in part.items() if name[-1].isdigit()}  # of several blocks
        kinds = {kind: value.to(job.device) for kind, value in (pooled(part) | deep).items()}
        sides += [kinds, torch.from_numpy(images.labels)[part["index"]].to(job.device), part["index"]]
    return Split(row, seed, *sides)
