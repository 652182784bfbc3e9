"""What objectives with a teacher share: a head and its moving average, and the teacher's answers as targets."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from common.limits import AutoCount, Count, NotNegative, Positive, Probability
from common.models import Backbone
from common.training import ema
from common.training.schedules import parse
from pretrain.distillation import collapse
from pretrain.distillation.prototypes import Centre, sinkhorn
from pretrain.heads import LastLayer, ProjectionHead
from pretrain.objectives import Objective, Pass, Verdict

Centering = Literal["centre", "sinkhorn"]
OF_THE_HEAD = ("prototypes", "hidden", "bottleneck", "layers", "last_layer")  # options


@dataclass
class DistillationOptions:
    """Options of an objective that compares prototype probabilities with a teacher's."""

    weight: NotNegative = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    view: str = "global"
    """The view whose crops the teacher sees, and the student too."""
    prototypes: AutoCount = "auto"
    """Outputs K of the head; auto: about a sixteenth of the images (DINO: 65,536 for ImageNet's 1.3 million)."""
    hidden: Count = 2048
    """Channels of the head's hidden layers."""
    bottleneck: Count = 256
    """Channels that the head brings to length 1 and compares with the prototypes."""
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


class Distillation(Objective):
    """Cross-entropy of the student's prototype probabilities against those of a teacher."""

    taught = compares = True
    head: ProjectionHead
    teacher_head: nn.Module

    def __init__(self, options: Any) -> None:
        super().__init__()
        self.options = options
        self.temperature = parse(options.teacher_temperature, "teacher_temperature")
        self.owns_head = not getattr(options, "shared_head", False)
        self.images = 0  # of the last step, of all processes
        self.passes = {
            "student": Pass(options.view, crops=None),
            "teacher": Pass(options.view, crops=None, network="teacher", grad=False),
        }

    def make_head(self, backbone: Backbone) -> None:
        """Make the head, its average and the centre."""
        options = self.options
        self.head = ProjectionHead(backbone.width, *(getattr(options, name) for name in OF_THE_HEAD))
        self.teacher_head = ema.copy_of(self.head)  # type: ignore[assignment]
        self.make_centre(options.prototypes)

    def make_centre(self, num_prototypes: int) -> None:
        """Make the centre of so many prototypes, where there is to be one."""
        self.prototypes = num_prototypes
        centred = self.options.centering == "centre"
        self.centre = Centre(num_prototypes, self.options.centre_momentum) if centred else None

    def begin_step(self, progress: float, measured: bool) -> None:
        super().begin_step(progress, measured)
        if self.centre is not None:
            self.centre.forget()

    def before_update(self) -> None:
        """Withhold the prototypes' gradient while they are frozen: without one, AdamW does not decay them either."""
        if self.owns_head and self.progress < self.options.freeze_last_layer:
            for parameter in self.head.last.parameters():
                parameter.grad = None

    def after_step(self, momentum: float) -> None:
        if self.centre is not None:
            self.centre.commit()

    def teachers(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """Pair the head with its average; a shared head is its owner's to move."""
        return ((self.teacher_head, self.head),) if self.owns_head else ()

    def verdict(self, numbers: Mapping[str, float]) -> Verdict | None:
        return collapse.judge(numbers, self.images, self.progress)

    def targets(self, logits: Tensor, groups: Tensor | None = None, num_groups: int = 1) -> Tensor:
        """The teacher's probabilities (N, K) from its logits, which the centre takes note of. `groups`: see
        `sinkhorn`."""
        temperature = self.temperature.at(self.progress)
        if self.centre is None:
            return sinkhorn(logits, temperature, groups=groups, num_groups=num_groups)
        self.centre.note(logits)
        return ((logits - self.centre.centre) / temperature).softmax(-1)
