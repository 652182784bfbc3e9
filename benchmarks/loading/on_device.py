"""What `augment=device` takes off the loader's processes, and what it changes.

For each kind of work: images/s of a process that decodes and makes the crops (host), that decodes and decides upon them
(device), and of decoding alone, which bounds both. Then how fast this same core is if it makes the crops in the
device's way, which is the GPU's work where there is one, and how far the crops of both ways are from each other.
"""

from pathlib import Path

import torch

from benchmarks.loading.measuring import measure
from benchmarks.loading.ours import VIEWS
from common.batches.samples import Faster, Samples
from common.data import open_data

CPU = torch.device("cpu")
BATCH = 16


def compare_device(folder: Path, count: int, rounds: int) -> None:
    images = open_data(str(folder))
    count = min(count, len(images))
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
                f"  {name} crops, {len(crops)}: {(gap == 0).double().mean():.4%} of the values are equal, "
                f"{(gap <= 1).float().mean():.4%} within 1 of 255; mean {gap.float().mean():.4f}, largest {gap.max()}"
            )
