"""What `loader.cache` gains, in the system's page cache, and by how much its crops differ."""

import dataclasses
from pathlib import Path

import torch

from benchmarks.loading.measuring import measure
from benchmarks.loading.ours import VIEWS, by_samples, cached, unchanged
from benchmarks.loading.peers import MULTI, ONE
from common.batches.samples import Samples
from common.batches.views import View
from common.data import Images, open_data

SIDE, BATCH = 256, 8
PLAIN, FULL, SCALED = "no cache", "cache=full", f"cache={SIDE}"


def differences(images: Images, other: Images, views: dict[str, View], instead: dict[str, View], count: int) -> str:
    """By how much crops of the `other` images, in the views `instead`, differ from crops of `images`."""
    samples = Samples(images, views, 0, 3), Samples(other, instead, 0, 3)
    levels: dict[str, list[float]] = {name: [] for name in views}
    for i in range(count):
        one, two = (each.__getitems__([(0, i)]).views for each in samples)
        for name in views:
            levels[name].append((one[name].float() - two[name].float()).abs().mean().item())
    shown = (f"{name} {torch.tensor(each).mean():.2f} (90 % below {torch.tensor(each).quantile(0.9):.2f})"
             for name, each in levels.items())  # fmt: skip
    return ", ".join(shown)


def compare_caches(folder: Path, place: Path, count: int, rounds: int) -> None:
    """Print images/s of uint8 batches without a cache, and from two; then how crops differ which have the same draws,
    and, to compare, crops that were resized bilinearly."""
    images = open_data(str(folder))
    count = min(count, len(images))
    ways = {PLAIN: images, FULL: cached(images, "full", place), SCALED: cached(images, SIDE, place)}
    for work in (ONE, MULTI):
        methods = {name: by_samples(each, work, BATCH, unchanged) for name, each in ways.items()}
        measure(work, count, rounds, methods, turn=BATCH)
        views = VIEWS[work]
        bilinear = {name: dataclasses.replace(view, interpolation="bilinear") for name, view in views.items()}
        others = {FULL: (ways[FULL], views), SCALED: (ways[SCALED], views), "bilinear": (images, bilinear)}
        for what, (other, instead) in others.items():
            print(f"  {what}: grey levels from {PLAIN}: {differences(images, other, views, instead, count)}")
