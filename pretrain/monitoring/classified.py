"""How often a classifier is right while it trains, under the evaluation transform: the weights, and their average."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from common.batches.unreadable import NO_LIMIT
from common.data import Images
from common.features.extraction import Eye, shown
from common.processes import collectives
from pretrain.task import Pretraining

TOP = 5
Numbers = dict[str, float | str]  # for a line of the log


@torch.no_grad()
def classified(
    task: Pretraining,
    images: Images,
    device: torch.device,
    keep_best: Callable[[int, float], bool],
    say: Callable[[str], None],
    step: int,
) -> Numbers:
    """`top1/WHO`, `top5/WHO` (where there are more than five classes) and `nll/WHO` of the labelled `images`: WHO is
    `weights` and, where one is kept, `average`, which is then what `keep_best` is told.

    Every process has to call it: each asks about a share of the images, none twice, and the first returns what all say.
    """
    name = task.classifying
    assert name is not None and images.labels is not None
    tasks = {"weights": task} | ({} if task.average is None else {"average": task.average})
    known: np.ndarray = np.flatnonzero(images.labels >= 0)
    share = np.array_split(known, collectives.processes())[collectives.rank()]
    labels = torch.from_numpy(images.labels[share]).to(device)
    sums = torch.zeros(len(tasks), 4, dtype=torch.float64)  # images, right, right among the first five, loss
    task.eval()
    # Unreadable images are named by `watch`, which judges them by the whole of the data.
    eye = Eye.of(task.backbone, limit=NO_LIMIT)
    for crops, at in shown(images.subset(share), eye, warn=lambda line: None):
        crops, right = crops.to(device), labels[at.to(device)]
        for row, each in enumerate(tasks.values()):
            objective = each.objectives[name]
            passes = objective.passes.items()
            scores = objective.scores({key: each.backbone(crops, want.plan.plan()) for key, want in passes})
            ranks = scores.argsort(1, descending=True)[:, :TOP] == right[:, None]
            loss = F.cross_entropy(scores, right, reduction="sum")
            counts = [len(right), ranks[:, 0].sum().item(), ranks.any(1).sum().item(), loss.item()]
            sums[row] += torch.tensor(counts, dtype=torch.float64)
    sums = collectives.total(sums.to(device, torch.float32 if device.type == "mps" else torch.float64)).cpu()
    if collectives.rank() or not sums[0, 0]:
        return {}
    numbers: Numbers = {}
    for who, (count, first, among, loss) in zip(tasks, sums.tolist(), strict=True):
        numbers |= {f"top1/{who}": first / count, f"nll/{who}": loss / count if math.isfinite(loss) else math.nan}
        if len(images.classes or ()) > TOP:
            numbers[f"top5/{who}"] = among / count
    share_right = numbers["top1/average" if task.average is not None else "top1/weights"]
    if keep_best(step, float(share_right)):
        say(f"step {step}: the best classifier so far, kept as best.safetensors: {share_right:.1%} right")
    return numbers
