"""What `loader.decode=scaled` gains, how often it can, and what it changes."""

from collections import Counter
from pathlib import Path

import torch

from benchmarks.loading.measuring import measure
from benchmarks.loading.ours import VIEWS, by_samples, unchanged
from benchmarks.loading.peers import MULTI, ONE
from common.batches.crops import crop_draws, divisor_of
from common.batches.sampler import generator
from common.batches.samples import Faster, Samples
from common.data import Images, open_data


def differences(images: Images, work: str, count: int) -> str:
    """How often images are reduced, and by how many grey levels their crops then differ from those of whole ones."""
    full, scaled = (Samples(images, VIEWS[work], 0, 3, faster=Faster(scaled=each)) for each in (False, True))
    divisors: Counter[int] = Counter()
    levels: list[float] = []
    for i in range(count):
        rows = {name: crop_draws(view, generator(0, 0, i, name)) for name, view in VIEWS[work].items()}
        image, whole = scaled._pixels(i, rows)
        divisors[divisor_of((image.shape[1], image.shape[2]), whole)] += 1
        one, other = (samples.__getitems__([(0, i)]).views for samples in (full, scaled))
        levels += [(one[name].float() - other[name].float()).abs().mean().item() for name in one]
    shares = ", ".join(f"1/{divisor}: {divisors[divisor] / count:.0%}" for divisor in sorted(divisors))
    changed = [level for level in levels if level]
    mean = f"{torch.tensor(changed).mean():.2f} grey levels" if changed else "nothing"
    return f"  decoded to {shares}; crops of reduced images differ by {mean} on average"


def compare_reduced(folders: dict[str, Path], count: int, rounds: int) -> None:
    for title, folder in folders.items():
        images = open_data(str(folder))
        number = min(count, len(images))
        for work in (ONE, MULTI):
            methods = {
                "decode=full": by_samples(images, work, 8, unchanged),
                "decode=scaled": by_samples(images, work, 8, unchanged, scaled=True),
            }
            measure(f"{title}: {work}", number, rounds, methods, turn=8)
            print(differences(images, work, number))
