"""Two steps of `dino` on each rank's share of the images."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from common.batches.views import View
from common.models import Features
from common.processes import collectives
from pretrain.distillation.prototypes import sinkhorn
from pretrain.objectives.dino import Dino, DinoOptions

IMAGES, WIDTH, CROPS = 6, 8, {"student": 2, "teacher": 2, "local": 3}
SMALL = {"prototypes": 20, "hidden": 12, "bottleneck": 6, "teacher_temperature": 0.04, "freeze_last_layer": 0.0}
MEANS = ("loss", "kl", "teacher_entropy", "student_entropy", "student_teacher_cosine")  # over processes


def dino(**changed: Any) -> Dino:
    """A small one in float64, whose teacher's head differs from the student's."""
    torch.manual_seed(0)
    made = Dino(DinoOptions(**(SMALL | changed)), SimpleNamespace(width=WIDTH, num_prefix_tokens=1))  # type: ignore[arg-type]
    made.connect({}, {"global": View(count=2), "local": View(count=3)})
    made = made.double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.5)
    return made


def features(first: int = 0, last: int = IMAGES, step: int = 0) -> dict[str, Features]:
    """Of images `first` to `last`: random class tokens, crop-major."""
    torch.manual_seed(step)
    found = {}
    for name, crops in CROPS.items():
        rows = torch.randn(crops, IMAGES, 2, WIDTH, dtype=torch.double)[:, first:last].flatten(0, 1)
        found[name] = Features(rows, rows.flip(1), (1, 2))
    return found


def steps(centering: str, first: int, last: int) -> dict[str, list[float]]:
    """What two steps on those images leave behind; gradients are averaged over processes, as DDP does."""
    made = dino(centering=centering)
    found: dict[str, list[float]] = {}

    def keep(name: str, tensor: Tensor, mean: bool = False) -> None:
        tensor = tensor.detach().double()
        found[name] = (collectives.total(tensor) / collectives.processes() if mean else tensor).flatten().tolist()

    for step in range(2):
        made.begin_step(step / 2, measured=step == 1)
        made.zero_grad()
        half = features(first, last, step)
        out = made(half, {})
        out["loss"].backward()
        made.after_step(0.9)
        keep(f"{step}/gradient", torch.cat([p.grad.flatten() for p in made.head.parameters()]), mean=True)
        for name, value in out.items():
            keep(f"{step}/{name}", value, name in MEANS)
        if made.centre is not None:
            keep(f"{step}/centre", made.centre.centre)
        keep(f"{step}/used", made.used)
    for groups in (None, torch.arange(IMAGES)[first:last] % 2):
        with torch.no_grad():
            rows = made.teacher_head(features(first, last)["teacher"].prefix[: last - first, 0])
            balanced = sinkhorn(rows, 0.05, groups=groups, num_groups=2)
        keep(f"sinkhorn {groups is None}", collectives.gathered(balanced))
    return found


def together(rank: int, ranks: int) -> dict[str, dict[str, list[float]]]:
    """`steps` of one rank, in float64 through JSON, with either centering."""
    share = IMAGES // ranks
    return {centering: steps(centering, rank * share, (rank + 1) * share) for centering in ("centre", "sinkhorn")}
