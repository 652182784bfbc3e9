"""`dino`: crops of an image agree on prototypes, with a teacher that is the student's moving average.

DINO (Caron et al., arXiv 2104.14294), and the image-level part of DINOv2 (2304.07193). Letters: B images, G global
crops, V crops in all, D width, K prototypes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.batches.views import View
from common.features.metrics import rankme_of_some
from common.models import Backbone, Features
from common.numerics import wide
from common.processes import collectives
from pretrain.distillation.objective import Distillation, DistillationOptions
from pretrain.distillation.prototypes import crops_cross_entropy, entropy, marginal_entropy
from pretrain.objectives import Objective, Pass, crops_compared


@dataclass
class DinoOptions(DistillationOptions):
    """Options of `dino`; at least two crops an image."""

    local: str | None = None
    """The view whose crops only the student sees; null: the one named `local`, where the recipe has it."""


class Dino(Distillation):
    """Cross-entropy between the teacher's prototypes of one crop and the student's of every other crop of the image."""

    Options = DinoOptions
    pools = "class"

    used: Tensor

    def __init__(self, options: DinoOptions, backbone: Backbone) -> None:
        super().__init__(options)
        self.make_head(backbone)
        self.crops = 2  # of the view, an image; `connect` says how many
        # Winners since statistics were last logged. The same on every process, so that one process's copy resumes all.
        self.register_buffer("used", torch.zeros(self.prototypes, dtype=torch.bool))
        self.winners: list[Tensor] = []  # of the step that is under way

    @classmethod
    def views_of(cls, options: DinoOptions) -> set[str]:
        return {options.view, options.local or "local"}

    def connect(self, others: Mapping[str, Objective], views: Mapping[str, View]) -> None:
        """Add the local crops, and share iBOT's masked pass. Raises Refusal where there is nothing to compare."""
        view = self.options.view
        self.crops, local = crops_compared("dino", self.options, views)
        # DINOv2: the class token of the masked crop is trained, and one pass serves both
        mask_of = "ibot" if "ibot" in others and others["ibot"].options.view == view else None
        self.passes = {"student": Pass(view, crops=None, mask_of=mask_of), "teacher": self.passes["teacher"]}
        if local is not None:
            self.passes["local"] = Pass(local, crops=None)

    def begin_step(self, progress: float, measured: bool) -> None:
        super().begin_step(progress, measured)
        self.winners.clear()

    def after_step(self, momentum: float) -> None:
        super().after_step(momentum)
        self.used = torch.zeros_like(self.used) if self.measured else self.used.clone()
        if self.winners:
            self.used[collectives.gathered(torch.cat(self.winners))] = True  # of any process
        self.winners.clear()

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss (nats, mean over images and pairs of crops), and on measured steps the health of the training, in each
        part of a step by itself:

        teacher_entropy, student_entropy (global crops), kl (of teacher and student), marginal_entropy (of all images
        together), uniform (ln K), in nats; prototypes_used (that won a crop from the last measured step on, this one
        not yet), centre_norm, teacher_temperature;
        feature_std (of class tokens of length 1, per channel, times sqrt(D): 1 when spread evenly), rankme (dimensions
        that they fill), student_teacher_cosine.
        """
        student, teacher = (features[name].pooled() for name in ("student", "teacher"))
        B = len(student) // self.crops
        self.images = B * collectives.processes()
        rows = torch.cat([student, features["local"].pooled()]) if "local" in features else student
        logits = self.head(rows)
        with torch.no_grad():
            targets = self.targets(self.teacher_head(teacher))
            self.winners.append(targets.argmax(1))
        loss = crops_cross_entropy(logits, targets, B, self.options.student_temperature)
        if not self.measured:
            return {"loss": loss}
        flat = entropy((logits.detach()[: len(student)] / self.options.student_temperature).softmax(1)).mean()
        return {"loss": loss, "student_entropy": flat} | self._statistics(loss, targets, student, teacher)

    @torch.no_grad()
    def _statistics(self, loss: Tensor, targets: Tensor, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        teacher_entropy = entropy(targets).mean()
        unit = collectives.gathered(F.normalize(wide(student.detach()), dim=1))
        statistics = {
            "teacher_entropy": teacher_entropy,
            "kl": loss - teacher_entropy,  # every teacher crop is in equally many pairs
            "marginal_entropy": marginal_entropy(targets),
            "uniform": loss.new_full((), math.log(self.prototypes)),
            "prototypes_used": self.used.sum().to(loss.dtype),
            "teacher_temperature": loss.new_full((), self.temperature.at(self.progress)),
            "feature_std": unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5,
            "rankme": loss.new_tensor(rankme_of_some(unit)),
            "student_teacher_cosine": F.cosine_similarity(wide(student), wide(teacher), dim=1).mean(),
        }
        if self.centre is not None:
            statistics["centre_norm"] = self.centre.centre.norm()
        return statistics
