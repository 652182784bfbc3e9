"""What making crops on the device takes off the loader's processes, one core: `python benchmarks/augment.py PATH`.

PATH is a folder of photographs; without one, photographs are made as for benchmarks/loader.py. For one random crop and
for DINO's 2 + 8: images/s of a loader's process that decodes and makes the crops (host), that decodes and decides upon
them (device), and of decoding alone, which bounds both. Beside it, how far the crops of both ways are from each other,
and the time that this same core takes to make the crops in the device's way: on a GPU it is the GPU's. The methods take
turns in every round; times are CPU time of the process, the table has medians over the rounds and the range of the
ratio. All files are in the system's cache.
"""

import argparse
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.loader import write_photographs
from benchmarks.loading.measuring import measure
from benchmarks.loading.ours import VIEWS
from common.batches.samples import Faster, Samples
from common.data import Images, open_data

CPU = torch.device("cpu")
BATCH = 16


def compare(images: Images, count: int, rounds: int) -> None:
    """Print the tables of both kinds of work."""
    for work, views in VIEWS.items():
        host, device = (Samples(images, views, 0, 3, faster=faster) for faster in (Faster(), Faster(on_device=True)))

        def batches(samples: Samples, numbers: range, made: bool = False) -> None:
            for start in range(numbers.start, numbers.stop, BATCH):
                batch = samples.__getitems__([(0, i) for i in range(start, min(start + BATCH, numbers.stop))])
                if made:
                    batch.to(CPU)

        methods = {
            "host: decode, make crops": lambda numbers, samples=host: batches(samples, numbers),
            "device: decode, decide upon crops": lambda numbers, samples=device: batches(samples, numbers),
            "decode alone": lambda numbers: [images.read(i, contiguous=False) for i in numbers],
            "device, and its part on this core": lambda numbers, samples=device: batches(samples, numbers, True),
        }
        measure(work, count, rounds, methods, BATCH)  # type: ignore[arg-type]
        keys = [(0, i) for i in range(min(count, 64))]
        for name, crops in host.__getitems__(keys).views.items():
            gap = (crops.int() - device.__getitems__(keys).to(CPU).views[name].int()).abs()
            print(
                f"  {name} crops, {len(crops)}: {(gap == 0).float().mean():.2%} of the values are equal, "
                f"{(gap <= 1).float().mean():.4%} within 1 of 255; mean {gap.float().mean():.4f}, largest {gap.max()}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="?", help="folder of photographs")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        if options.path is None:
            write_photographs(Path(place), options.images)
        images = open_data(options.path or place)
        compare(images, min(options.images, len(images)), options.rounds)


if __name__ == "__main__":
    main()
