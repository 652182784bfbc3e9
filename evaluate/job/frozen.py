"""Frozen features of every row of a table: of what is judged, and of the baselines that stand beside it.

Each row is a list of sources, one for each seed; a baseline without a network (`features.RAW`) is one more way to make
numbers of images, under the same evaluation transform, and is treated by every probe as the others are.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.data import Images
from common.features.extraction import PIXELS, Part, cache_key, extract_parts, pixel_key, pixel_parts, pooled
from common.features.extraction import pixels as raw_pixels
from common.features.finite import is_constant
from common.processes import collectives
from evaluate.job.arguments import LABELS
from evaluate.job.evaluation import Evaluation, first_process
from evaluate.job.feature_cache import cached
from evaluate.job.patches import patch_key, patch_parts
from evaluate.job.subjects import Subject

BLOCKS = 4  # the most that a protocol asks for
IN_MEMORY = 1 << 30  # bytes of raw pixels, at most; more of them are kept in the cache and mapped
Features = list[dict[str, Tensor]]  # of the training and of the test images, with "index"


@dataclass
class Split:
    """Features of one row of the table: {kind: (K, D)} and labels (K,), for training and test images.

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

    `blocks=4`: those of the last four blocks too, "class4" and "mean4", as `extract` says. After `join_processes`,
    all processes have to call this to the end, and only the first one is given anything. What was extracted with
    `blocks=4` answers for one block too.
    """
    sources: list[tuple[str, int | None, Callable[[bool], Features]]] = []
    if job.subject.state is not None:
        sources.append(("subject", None, lambda alone: _of_network(job, "subject", job.subject, None, blocks)))
    untrained = job.subject.untrained()
    for row in job.baselines:
        if row == "pixels":
            sources.append((row, None, functools.partial(_of_pixels, job)))
            continue
        for seed in job.seeds:
            of_patches = functools.partial(_of_patches, job, seed)
            of_random = functools.partial(_of_random, job, untrained, seed, blocks)
            sources.append((row, seed, of_patches if row == "patches" else of_random))
    if collectives.processes() == 1:
        yield from (_split(job, row, seed, make(True)) for row, seed, make in sources)
        return
    for _, _, make in sources:  # all at once, so that nobody waits for the first one's answers
        make(False)
    if first_process():
        with collectives.single_process():
            yield from (_split(job, row, seed, make(True)) for row, seed, make in sources)


def pixels(job: Evaluation) -> Split:
    """Raw pixels of both splits under the subject's own evaluation transform."""
    how: dict[str, Any] = {"channels": _channels(job), "workers": job.arguments.workers, "warn": job.say}
    sides = [raw_pixels(images, job.size, job.crop, limit=job.limit, **how) for images in (job.train, job.test)]
    return _split(job, "pixels", None, sides)


def _channels(job: Evaluation) -> int:
    return len(job.subject.description["mean"])


def _of_random(job: Evaluation, untrained: Subject, seed: int | None, blocks: int, alone: bool) -> Features:
    return _of_network(job, "random", untrained, seed, blocks)


def _of_network(job: Evaluation, row: str, subject: Subject, seed: int | None, blocks: int) -> Features:
    """Features of a network, from the cache."""
    backbone = subject.backbone(seed or 0).to(job.device)
    name = subject.name if row == "subject" else f"{LABELS[row]} (seed {seed})"
    features = []
    for images in (job.train, job.test):
        key = cache_key(backbone, subject.plan, images, job.precision, job.device, blocks)
        extract = functools.partial(
            extract_parts,
            backbone,
            subject.plan,
            images,
            blocks=blocks,
            device=job.device,
            workers=job.arguments.workers,
            precision=job.precision,
            limit=job.limit,
        )
        larger = [key | {"blocks": BLOCKS}] if blocks == 1 else []
        kinds = _cached(job, key, images, name, extract, larger)
        kinds = {kind: kinds[kind] for kind in kinds if blocks > 1 or not kind[-1].isdigit()}
        job.refuse_not_finite(kinds, images, name, backbone, subject.plan, cached=True)
        features.append(kinds)
    _refuse_lost(job, features)
    flat = [kind for kind in features[0] if kind != "index" and is_constant(features[0][kind])]
    if flat:
        job.warn(f"{name}: features ({', '.join(flat)}) are the same for every image: nothing can be told by them")
    return features


def _of_pixels(job: Evaluation, alone: bool = True) -> Features:
    """Take raw pixels from the cache if they are many, else from the images; if not `alone`, the cache only."""
    channels, size, workers = _channels(job), job.size, job.arguments.workers
    features = []
    for images in (job.train, job.test):
        if 4 * channels * min(size[0], PIXELS) * min(size[1], PIXELS) * len(images) > IN_MEMORY:
            extract = functools.partial(
                pixel_parts, images, size, job.crop, channels=channels, workers=workers, limit=job.limit
            )
            features.append(
                _cached(job, pixel_key(images, size, job.crop, channels), images, LABELS["pixels"], extract)
            )
        elif alone:
            how: dict[str, Any] = {"workers": workers, "warn": job.say, "limit": job.limit}
            features.append(raw_pixels(images, size, job.crop, channels=channels, **how))
    return features


def _of_patches(job: Evaluation, seed: int, alone: bool) -> Features:
    """Features of patches, from the cache."""
    channels, features = _channels(job), []
    for images in (job.train, job.test):
        extract = functools.partial(
            patch_parts,
            job.train,
            images,
            job.size,
            job.crop,
            device=job.device,
            workers=job.arguments.workers,
            limit=job.limit,
            channels=channels,
            seed=seed,
        )
        key = patch_key(job.train, images, job.size, job.crop, channels, seed)
        features.append(_cached(job, key, images, f"{LABELS['patches']} (seed {seed})", extract))
    _refuse_lost(job, features)
    return features


def _refuse_lost(job: Evaluation, features: Features) -> None:
    """Raises Refusal if too many images of both splits together are not among what was found."""
    total = len(job.train) + len(job.test)
    lost = total - sum(len(split["index"]) for split in features)
    if lost > job.limit.allowed(total):
        job.limit.refuse(lost, total, total, job.spec, ["they were named above"])


def _cached(
    job: Evaluation,
    key: dict[str, Any],
    images: Images,
    what: str,
    extract: Callable[..., Iterator[Part]],
    larger: Any = (),
) -> dict[str, Tensor]:
    def parts_of(ranges: Sequence[range], seen: Callable[[int], None]) -> Iterator[Part]:
        job.say(f"features of {len(images):,} images from {what}")
        return extract(parts=ranges, seen=seen)

    return cached(job.out.parent / "cache", key, images, parts_of, job.say, larger=larger, limit=job.limit)


def _split(job: Evaluation, row: str, seed: int | None, features: Features) -> Split:
    sides: list[Any] = []
    for images, part in zip((job.train, job.test), features, strict=True):
        assert images.labels is not None
        deep = {name: value for name, value in part.items() if name[-1].isdigit()}  # of several blocks
        kinds = {kind: value.to(job.device) for kind, value in (pooled(part) | deep).items()}
        sides += [kinds, torch.from_numpy(images.labels)[part["index"]].to(job.device), part["index"]]
    return Split(row, seed, *sides)
