"""What a cache of decoded images gains and changes, on one thread: `python benchmarks/caching.py`.

Images/s of uint8 batches, as a loader's worker makes them, without a cache and from caches of whole images and of a
shorter side of 256, in the system's page cache; the methods take turns in every round, times are CPU time of the
process, the table has medians over the rounds and the range of the ratio. Then by how many grey levels the crops from
the scaled cache differ from those of whole images, which have the same draws; and, to compare, crops that were resized
bilinearly in place of bicubically.

`--photographs PATH` takes JPEGs of one's own, as `data=` does; else they are made as those of `benchmarks/loader.py`.
"""

import argparse
import copy
import dataclasses
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.loader import write_photographs
from benchmarks.loading.measuring import measure
from benchmarks.loading.ours import VIEWS, by_samples, unchanged
from benchmarks.loading.peers import MULTI, ONE
from common.batches.samples import Samples
from common.batches.unreadable import Limit
from common.batches.views import View
from common.caching.building import Builders, read_cached
from common.caching.pixels import Cache
from common.data import Images, open_data
from common.processes import group

SIDE, BATCH = 256, 8
PLAIN, FULL, SCALED = "no cache", "cache=full", f"cache={SIDE}"


def cached(images: Images, option: object, root: Path) -> Images:
    """The images, read from a cache that is made; its size is printed."""
    same = copy.copy(images)
    builders = Builders(group.join(cpu=True), 0, lambda line: None)
    print(read_cached([same], Cache.of(images, option, 3, str(root)), builders, Limit(), "--cache "))
    return same


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photographs", metavar="PATH", help="JPEGs, as data= takes them")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = options.photographs or f"{place}/photographs"
        if not options.photographs:
            write_photographs(Path(folder), options.images)
        images = open_data(folder)
        count = min(options.images, len(images))
        ways = {PLAIN: images, FULL: cached(images, "full", Path(place)), SCALED: cached(images, SIDE, Path(place))}
        for work in (ONE, MULTI):
            methods = {name: by_samples(each, work, BATCH, unchanged) for name, each in ways.items()}
            measure(work, count, options.rounds, methods, turn=BATCH)
            views = VIEWS[work]
            bilinear = {name: dataclasses.replace(view, interpolation="bilinear") for name, view in views.items()}
            for what, other, instead in ((FULL, ways[FULL], views), (SCALED, ways[SCALED], views),
                                         ("bilinear", images, bilinear)):  # fmt: skip
                print(f"  {what}: grey levels from {PLAIN}: {differences(images, other, views, instead, count)}")


if __name__ == "__main__":
    main()
