"""Under torchrun: every rank draws the plans of its part of two steps; the first prints who drew what, as JSON."""

import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # tests/ is there already

import common.launch  # noqa: F401  (before torch)

# isort: split
import torch
from accelerate.utils import gather_object
from small import Noise, task

from common import processes
from common.data import Images
from common.sampling import Samples, StepSampler
from common.transforms import View

OBJECTIVES = {
    "absolute": {"keep": 0.5, "position": "partial", "position_keep": 0.3, "context": 0.5},
    "relative": {"keep": 0.5, "pairs": 3},
}


def plans(rank: int, ranks: int) -> list[tuple[int, str]]:
    """(image, everything drawn for it) of one rank."""
    made = task(OBJECTIVES)
    torch.manual_seed(1)
    samples = Samples(Images(Noise(8), "noise"), {"global": View(size=24)}, 0, 3, made.draws)
    found = []
    for keys in StepSampler(8, 8, 0, steps=2, rank=rank, processes=ranks):
        batch = samples.__getitems__(keys)
        for at, index in enumerate(batch.index.tolist()):
            found.append((index, str({name: draw[at].tolist() for name, draw in sorted(batch.draws.items())})))
    return found


if __name__ == "__main__":
    process = processes.join()
    everybody = gather_object([(process.process_index, plans(process.process_index, process.num_processes))])
    if process.is_main_process:
        print(json.dumps(everybody))
