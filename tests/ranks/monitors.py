"""Every rank asks the monitor of frozen features."""

from typing import Any

import numpy as np
import torch
from small import backbone, options_for

from common.batches.views import View
from common.data import Images
from common.data.images import Unreadable
from pretrain.config import MonitorConfig
from pretrain.monitoring.monitors import _extracted, frozen
from pretrain.task import Pretraining, build

DINO = {"prototypes": 8, "hidden": 16, "bottleneck": 8, "teacher_temperature": 0.04, "freeze_last_layer": 0.0}
BROKEN = (3, 30)  # one of each rank's share


class Blots:
    """Grey noise, darker or brighter by class; two of the pictures cannot be read."""

    def __len__(self) -> int:
        return 47

    def read(self, i: int, channels: int) -> torch.Tensor:
        if i in BROKEN:
            raise Unreadable(f"{i}")
        rng = torch.Generator().manual_seed(i)
        return (torch.randint(0, 150, (3, 24, 24), generator=rng) + 50 * (i % 3)).to(torch.uint8)

    def name(self, i: int) -> str:
        return f"blot {i}"

    def identity(self) -> bytes:
        return b"blots"


def made() -> tuple[Pretraining, Images, Images]:
    """A student and a teacher that differ, 36 images to learn from and 11 to be judged on."""
    student = backbone()
    task = build(student, options_for({"absolute": {}, "dino": DINO}, student), {"global": View(size=24, count=2)})
    assert task.teacher is not None and task.pooling == "class"
    rng = torch.Generator().manual_seed(5)
    for parameter in task.teacher.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    labels = np.arange(47) % 3
    labels[[5, 40]] = -1  # of one nothing is known
    images = Images(Blots(), "blots", labels, ("dark", "grey", "bright"))
    return task, images.subset(np.arange(36)), images.subset(np.arange(36, 47))


def measured(rank: int = 0, ranks: int = 1) -> dict[str, Any]:
    """What one rank is told, and which images the extraction of 35 of them returned."""
    task, train, held_out = made()
    told = frozen(task, train, held_out, MonitorConfig(bank=33, shots=3), torch.device("cpu"), print, 7)
    found = _extracted(task, train, np.arange(35)[::-1].copy(), torch.device("cpu"))
    sums = {who: features.double().sum(1).tolist() for who, (features, _) in found.items()}
    return {"told": told, "index": found["teacher"][1].tolist(), "sums": sums}
