"""Every rank draws the plans of its part of two steps."""

import torch
from small import Noise, task

from common.batches.sampler import StepSampler
from common.batches.samples import Samples
from common.batches.views import View
from common.data import Images

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
