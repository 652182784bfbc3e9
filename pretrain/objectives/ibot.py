"""`ibot`: a hidden patch is told from what is around it, in the teacher's words.

iBOT (arXiv 2111.07832) as DINOv2 has it (arXiv 2304.07193): blocks of patches of the student's crops are replaced by a
mask token, and the student's prototype probabilities at those places are to be those of the teacher, who saw the whole
crop. Letters: B images, V crops, N patches, n masked patches of the batch, D width, K prototypes.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from common.batches.views import View, height_width
from common.errors import Refusal
from common.limits import AutoCount, BelowOne, Count, NotNegative, Positive, Share, Shares
from common.models import Backbone, Features
from common.processes import collectives
from common.training import ema
from common.training.schedules import parse
from pretrain.distillation import collapse, prototypes
from pretrain.distillation.masks import draw_masks
from pretrain.heads import LastLayer, ProjectionHead
from pretrain.objectives import Objective, Pass, Verdict

OF_THE_HEAD = ("prototypes", "hidden", "bottleneck", "layers", "last_layer")  # options that a shared head has already


@dataclass
class IbotOptions:
    """Options of `ibot`."""

    weight: NotNegative = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    view: str = "global"
    """The view whose crops are masked, all of them."""
    mask_probability: Share = 0.5
    """Share of the crops that are masked at all."""
    mask_ratio: Shares = field(default_factory=lambda: [0.1, 0.5])
    """Smallest and largest share of the patches of a masked crop that are hidden from the student, in blocks."""
    shared_head: bool = False
    """Whether patches use the head of `dino`, as in iBOT, rather than one of their own, as in DINOv2. The options of
    the head are then those of `dino`."""
    prototypes: AutoCount = "auto"
    """Outputs of the head; auto: chosen from the number of images."""
    hidden: Count = 2048
    """Width of the head's hidden layers."""
    bottleneck: Count = 256
    """Width of what is brought to length 1 and compared with the prototypes."""
    layers: Count = 3
    """Layers of the head before the last."""
    last_layer: LastLayer = "normed"
    """Prototypes of length 1 (normed), of trained length (weight_norm), or as they are (linear, DINOv3)."""
    student_temperature: Positive = 0.1
    """What the student's logits are divided by."""
    teacher_temperature: Any = "auto"
    """What the teacher's logits are divided by: a number, a schedule, or auto: chosen from the number of images."""
    centering: Literal["sinkhorn", "centre"] = "sinkhorn"
    """How prototypes are kept in use: sinkhorn (over the masked patches of a step's part, DINOv2), or centre (the mean
    logits of the masked patches of earlier steps are subtracted; iBOT's mean is over all patches, which would cost the
    teacher's head on each of them)."""
    centre_momentum: BelowOne = 0.9
    """With centering=centre: momentum of that mean."""
    per_position: bool = False
    """Sinkhorn balances prototypes among patches of one position (CAPI, arXiv 2502.08769), so that none can stand for a
    place. For large batches: where a position is masked in one crop of a step only, its target is uniform."""
    freeze_last_layer: Any = "auto"
    """How long the prototypes stand still at the start: a share of the training, "1 epochs" or "100 steps"."""


class Ibot(Objective):
    """Cross-entropy of the student's prototype probabilities at masked patches against the teacher's."""

    Options = IbotOptions
    taught = compares = True
    head_of = "dino"

    head: ProjectionHead
    teacher_head: nn.Module

    def __init__(self, options: IbotOptions, backbone: Backbone) -> None:
        super().__init__()
        if options.per_position and options.centering != "sinkhorn":
            raise Refusal(
                "objectives.ibot.per_position=true balances by Sinkhorn: set centering=sinkhorn, or leave it out"
            )
        if not backbone.plain:
            raise Refusal(
                f"`ibot` needs a backbone that takes a mask token in place of a patch, and model "
                f"{backbone.config.name!r} ({type(backbone.model).__name__}) does not: use a plain ViT or DeiT, or "
                "leave ibot out"
            )
        self.options = options
        self.patch = (backbone.size[0] // backbone.grid[0], backbone.size[1] // backbone.grid[1])
        self.temperature = parse(options.teacher_temperature, "objectives.ibot.teacher_temperature")
        self.images = 0  # of the last step, of all processes
        self.passes = {
            "student": Pass(options.view, crops=None, mask_of="ibot"),
            "teacher": Pass(options.view, crops=None, network="teacher", grad=False),
        }
        self.mask_token = nn.Parameter(torch.zeros(backbone.width))  # iBOT and DINOv2 begin with zeros too
        if not options.shared_head:
            sizes = (options.prototypes, options.hidden, options.bottleneck, options.layers, options.last_layer)
            self._own(ProjectionHead(backbone.width, *sizes))

    def _own(self, head: ProjectionHead) -> None:
        self.head, self.teacher_head = head, ema.copy_of(head)
        self._centre(self.options.prototypes)

    def _centre(self, num_prototypes: int) -> None:
        self.prototypes = num_prototypes
        self.centre = None
        if self.options.centering == "centre":
            self.centre = prototypes.Centre(num_prototypes, self.options.centre_momentum)

    def connect(self, others: Mapping[str, Objective], views: Mapping[str, View]) -> None:
        """See Objective. Raises Refusal where a head is to be shared and is not there, or is another one."""
        if self.options.shared_head:
            self._share(others.get("dino"))
        if self.options.view not in views:  # the task says so
            return
        view = views[self.options.view]
        h, w = height_width(view.size)
        grid = (h // self.patch[0], w // self.patch[1])
        low, high = self.options.mask_ratio
        self.draw = functools.partial(
            draw_masks,
            grid=grid,
            crops=view.count,
            probability=self.options.mask_probability,
            ratio=(low, high),
        )
        self.collate = masked_patches

    def _share(self, dino: Any) -> None:
        """Use the heads of `dino`, which registers, saves and moves them."""
        if dino is None:
            raise Refusal(
                "objectives.ibot.shared_head=true uses the head of `dino`, which is not among the objectives: add "
                "dino, or set objectives.ibot.shared_head=false"
            )
        standard = IbotOptions()
        for name in OF_THE_HEAD:
            wanted, there = getattr(self.options, name), getattr(dino.options, name)
            if wanted not in (getattr(standard, name), there):
                raise Refusal(
                    f"objectives.ibot.{name}={wanted} goes with a head of its own, and shared_head=true uses that of "
                    f"`dino`, where {name}={there}: leave objectives.ibot.{name} out, or set shared_head=false"
                )
        # past nn.Module, which would register them a second time
        object.__setattr__(self, "head", dino.head)
        object.__setattr__(self, "teacher_head", dino.teacher_head)
        self._centre(dino.prototypes)

    def begin_step(self, progress: float, measured: bool) -> None:
        """See Objective."""
        super().begin_step(progress, measured)
        if self.centre is not None:
            self.centre.forget()

    def before_update(self) -> None:
        """See Objective. A shared head is `dino`'s to freeze."""
        if not self.options.shared_head and self.progress < self.options.freeze_last_layer:
            for parameter in self.head.last.parameters():
                parameter.grad = None

    def after_step(self, momentum: float) -> None:
        """See Objective."""
        if self.centre is not None:
            self.centre.commit()

    def teachers(self) -> Iterable[tuple[nn.Module, nn.Module]]:
        """See Objective. A shared head is `dino`'s to move."""
        return () if self.options.shared_head else ((self.teacher_head, self.head),)

    def verdict(self, numbers: Mapping[str, float]) -> Verdict | None:
        """See Objective; `numbers` without the objective's name before them. None where nothing was measured."""
        if not numbers.get("masked"):  # not measured, or nothing was masked
            return None
        # The loss counts crops of which nothing is masked; judged is the cross-entropy of the others.
        judged = {**numbers, "loss": numbers["teacher_entropy"] + numbers["kl"]}
        return collapse.judge(judged, self.images, self.progress)

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss (nats): mean over a crop's masked patches, then over all crops, of which a crop without any counts as 0
        (iBOT and DINOv2 divide in this way too). 0 where nothing is masked.

        Where measured, over the masked crops of all processes, in each part of a step by itself: teacher_entropy, kl
        (the two sum to the cross-entropy), marginal_entropy, prototypes_used (by some patch of this step), masked
        (share of all patches), uniform (ln K).
        """
        student, teacher, where = features["student"].tokens, features["teacher"].tokens, draws["where"]
        rows, num_patches, _ = student.shape  # V*B crops
        self.images = len(draws["masked"]) * collectives.processes()
        logits_nK = self.head(student.flatten(0, 1).index_select(0, where))
        with torch.no_grad():
            targets_nK = self._targets(teacher.flatten(0, 1).index_select(0, where), where, num_patches)
        each_n = prototypes.cross_entropy(logits_nK, targets_nK, self.options.student_temperature)
        share_n = draws["share"].to(each_n.dtype)
        result = {"loss": (each_n * share_n).sum() / rows}
        if self.measured:
            result |= self._statistics(each_n.detach(), targets_nK, share_n, rows * num_patches)
        return result

    def _targets(self, tokens_nD: Tensor, where: Tensor, num_patches: int) -> Tensor:
        """What the teacher says of the masked patches, (n, K)."""
        logits_nK = self.teacher_head(tokens_nD)
        temperature = self.temperature.at(self.progress)
        if self.centre is not None:
            targets_nK = ((logits_nK - self.centre.centre) / temperature).softmax(-1)
            self.centre.note(logits_nK)
            return targets_nK
        if self.options.per_position:
            return prototypes.sinkhorn(logits_nK, temperature, groups=where % num_patches, num_groups=num_patches)
        return prototypes.sinkhorn(logits_nK, temperature)

    @torch.no_grad()
    def _statistics(self, each_n: Tensor, targets_nK: Tensor, share_n: Tensor, num_patches: int) -> dict[str, Tensor]:
        """See `forward`. A masked crop's shares sum to 1, so that the sum of all shares is the number of such crops."""
        entropy_n = prototypes.entropy(targets_nK)
        here = [(share_n * entropy_n).sum(), (share_n * (each_n - entropy_n)).sum(), share_n.sum()]
        counts = [share_n.new_tensor(float(len(each_n))), share_n.new_tensor(float(num_patches))]
        entropy, kl, crops, masked, patches = collectives.total(torch.stack([*here, *counts])).unbind()
        used = torch.zeros(self.prototypes, dtype=torch.bool, device=targets_nK.device)
        used[targets_nK.argmax(-1)] = True
        return {
            "teacher_entropy": entropy / crops.clamp(min=1),
            "kl": kl / crops.clamp(min=1),
            "marginal_entropy": prototypes.marginal_entropy(targets_nK),
            "prototypes_used": collectives.largest(used).sum().to(each_n.dtype),
            "masked": masked / patches,
            "uniform": each_n.new_tensor(math.log(self.prototypes)),
        }


def masked_patches(draws: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return, for masks "masked" (B, V, N): "where" (n,) int64, the masked patches' indices into the crop-major V*B*N,
    rising, and "share" (n,) float32, 1 / how many patches of its crop are masked. In the loader: to learn n, one would
    have to wait for a GPU."""
    masked_RN = draws["masked"].transpose(0, 1).flatten(0, 1)  # R = V*B crops
    share_R = 1 / masked_RN.sum(1).clamp(min=1).float()
    return {"where": masked_RN.flatten().nonzero()[:, 0], "share": share_R[:, None].expand(masked_RN.shape)[masked_RN]}
