"""`dino`: crops of an image agree on prototypes, with a teacher that is the student's moving average.

DINO (Caron et al., arXiv 2104.14294), and the image-level part of DINOv2 (2304.07193). Letters: B images, G global
crops, V crops in all, D width, K prototypes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.batches.views import View
from common.errors import Refusal
from common.features.metrics import rankme
from common.limits import AutoCount, Count, NotNegative, Positive, Probability
from common.models import Backbone, Features
from common.processes import collectives
from common.training import ema
from common.training.schedules import parse
from pretrain.distillation import collapse
from pretrain.distillation.prototypes import Centre, crops_cross_entropy, entropy, marginal_entropy, sinkhorn
from pretrain.heads import LastLayer, ProjectionHead, wide
from pretrain.objectives import Objective, Pass, Verdict

Centering = Literal["centre", "sinkhorn"]
RANKED = 512  # rows that RankMe looks at: its singular values cost the cube of them


@dataclass
class DinoOptions:
    """Options of `dino`."""

    weight: NotNegative = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    view: str = "global"
    """The view whose crops the teacher sees, and the student too; at least two an image."""
    local: str | None = None
    """The view whose crops only the student sees; null: the one named `local`, where the recipe has it."""
    prototypes: AutoCount = "auto"
    """Outputs K of the head; auto: about a sixteenth of the images (DINO: 65,536 for ImageNet's 1.3 million)."""
    hidden: Count = 2048
    """Channels of the head's hidden layers."""
    bottleneck: Count = 256
    """Channels that the head compares with the prototypes."""
    layers: Count = 3
    """Linear layers of the head before the prototypes."""
    last_layer: LastLayer = "normed"
    """Prototypes: normed (length 1, DINO's norm_last_layer), weight_norm (trainable length: sometimes better, less
    stable) or linear (as they are, DINOv3)."""
    student_temperature: Positive = 0.1
    """What the student's logits are divided by."""
    teacher_temperature: Any = "auto"
    """What the teacher's logits are divided by: a number, or {schedule: linear, start: 0.04, end: 0.07, over: 0.3}.
    Lower is sharper. It moves with every step (the source: with every epoch). auto: by the number of images."""
    centering: Centering = "centre"
    """What keeps the teacher from choosing one prototype for all: centre (the logits' moving mean is subtracted, DINO)
    or sinkhorn (prototypes are used equally in every batch, DINOv2; with accumulate, in every part of one)."""
    centre_momentum: Probability = 0.9
    """Share of the old centre that a step keeps."""
    freeze_last_layer: Any = "auto"
    """How long the prototypes stay as they were drawn, from the start: a share of the training, `1 epochs` or `100
    steps`. auto: one epoch, at most a tenth of the training. They get no gradient, as in DINO; DINOv2 sets their rate
    to 0, and AdamW's moments go on."""


class Dino(Objective):
    """Cross-entropy between the teacher's prototypes of one crop and the student's of every other crop of the image."""

    Options = DinoOptions
    pools = "class"
    taught = compares = True

    used: Tensor

    def __init__(self, options: DinoOptions, backbone: Backbone) -> None:
        super().__init__()
        self.options = options
        self.temperature = parse(options.teacher_temperature, "objectives.dino.teacher_temperature")
        self.prototypes: int = options.prototypes
        self.passes = {
            "student": Pass(options.view, crops=None),
            "teacher": Pass(options.view, crops=None, network="teacher", grad=False),
        }
        self.head = ProjectionHead(
            backbone.width, self.prototypes, options.hidden, options.bottleneck, options.layers, options.last_layer
        )
        self.teacher_head = ema.copy_of(self.head)
        self.centre = Centre(self.prototypes, options.centre_momentum) if options.centering == "centre" else None
        self.crops = 2  # of the view, an image; `connect` says how many
        self.images = 0  # of the last step, of all processes
        # Winners since statistics were last logged. The same on every process, so that one process's copy resumes all.
        self.register_buffer("used", torch.zeros(self.prototypes, dtype=torch.bool))
        self.winners: list[Tensor] = []  # of the step that is under way

    @classmethod
    def views_of(cls, options: DinoOptions) -> set[str]:
        """See Objective."""
        return {options.view, options.local or "local"}

    def connect(self, others: Mapping[str, Objective], views: Mapping[str, View]) -> None:
        """Add the local crops, and share iBOT's masked pass. Raises Refusal where there is nothing to compare."""
        view = self.options.view
        local = self.options.local or ("local" if "local" in views and view != "local" else None)
        if local == view:
            raise Refusal(f"objectives.dino.local={local} is its view as well: local crops are a view of their own")
        if view in views:
            self.crops = views[view].count
            if self.crops < 2:
                raise Refusal(
                    f"objectives.dino compares crops of an image, and views.{view}.count={self.crops}: use 2 or more, "
                    f"or views.{view}.preset=dino"
                )
        # DINOv2: the class token of the masked crop is trained, and one pass serves both
        mask_of = "ibot" if "ibot" in others and others["ibot"].options.view == view else None
        self.passes = {"student": Pass(view, crops=None, mask_of=mask_of), "teacher": self.passes["teacher"]}
        if local is not None:
            self.passes["local"] = Pass(local, crops=None)

    def begin_step(self, progress: float, measured: bool) -> None:
        """See Objective."""
        super().begin_step(progress, measured)
        self.winners.clear()
        if self.centre is not None:
            self.centre.forget()

    def before_update(self) -> None:
        """Withhold the prototypes' gradient while they are frozen: without one, AdamW does not decay them either."""
        if self.progress < self.options.freeze_last_layer:
            for parameter in self.head.last.parameters():
                parameter.grad = None

    def after_step(self, momentum: float) -> None:
        """See Objective."""
        if self.centre is not None:
            self.centre.commit()
        before = torch.zeros_like(self.used) if self.measured else self.used
        self.used = self._marked(before)
        self.winners.clear()

    def teachers(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """See Objective."""
        return ((self.teacher_head, self.head),)

    def verdict(self, numbers: Mapping[str, float]) -> Verdict | None:
        """See Objective; `numbers` without the objective's name before them. None where nothing was measured."""
        return collapse.judge(numbers, self.images, self.progress)

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

    def targets(self, logits: Tensor) -> Tensor:
        """The teacher's probabilities (G*B, K) from its logits, which the centre takes note of."""
        temperature = self.temperature.at(self.progress)
        if self.centre is None:
            return sinkhorn(logits, temperature)
        self.centre.note(logits)
        return ((logits - self.centre.centre) / temperature).softmax(1)

    @torch.no_grad()
    def _statistics(self, loss: Tensor, targets: Tensor, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
        teacher_entropy = entropy(targets).mean()
        unit = collectives.gathered(F.normalize(wide(student.detach()), dim=1))
        found = {
            "teacher_entropy": teacher_entropy,
            "kl": loss - teacher_entropy,  # every teacher crop is in equally many pairs
            "marginal_entropy": marginal_entropy(targets),
            "uniform": loss.new_full((), math.log(self.prototypes)),
            "prototypes_used": self.used.sum().to(loss.dtype),
            "teacher_temperature": loss.new_full((), self.temperature.at(self.progress)),
            "feature_std": unit.std(0, correction=0).mean() * unit.shape[1] ** 0.5,
            "rankme": loss.new_tensor(rankme(unit[:: math.ceil(len(unit) / RANKED)])),
            "student_teacher_cosine": F.cosine_similarity(wide(student), wide(teacher), dim=1).mean(),
        }
        if self.centre is not None:
            found["centre_norm"] = self.centre.centre.norm()
        return found

    def _marked(self, used: Tensor) -> Tensor:
        """`used` (K,) with the winners of this step, on any process."""
        marked = used.clone()
        if self.winners:
            marked[collectives.gathered(torch.cat(self.winners))] = True
        return marked
