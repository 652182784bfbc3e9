"""`ibot`: a hidden patch is told from what is around it, in the teacher's words.

iBOT (arXiv 2111.07832) as DINOv2 has it (arXiv 2304.07193): blocks of patches of the student's crops are replaced by a
mask token, and the student's prototype probabilities at those places are to be those of the teacher, who saw the whole
crop. Letters: B images, V crops, N patches, n masked patches of the batch, D width, K prototypes.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.batches.views import View, height_width
from common.errors import Refusal
from common.limits import Share, Shares
from common.models import Backbone, Features
from common.processes import collectives
from pretrain.distillation import prototypes
from pretrain.distillation.masks import draw_masks
from pretrain.distillation.objective import OF_THE_HEAD, Centering, Distillation, DistillationOptions
from pretrain.objectives import Objective, Pass, Verdict


@dataclass
class IbotOptions(DistillationOptions):
    """Options of `ibot`."""

    view: str = "global"
    """The view whose crops are masked, all of them."""
    mask_probability: Share = 0.5
    """Share of the crops that are masked at all."""
    mask_ratio: Shares = field(default_factory=lambda: [0.1, 0.5])
    """Smallest and largest share of the patches of a masked crop that are hidden from the student, in blocks."""
    shared_head: bool = False
    """Whether patches use the head of `dino`, as in iBOT, rather than one of their own, as in DINOv2. The options of
    the head are then those of `dino`."""
    centering: Centering = "sinkhorn"
    """How prototypes are kept in use: sinkhorn (over the masked patches of a step's part, DINOv2), or centre (the mean
    logits of the masked patches of earlier steps are subtracted; iBOT's mean is over all patches, which would cost the
    teacher's head on each of them)."""
    per_position: bool = False
    """Sinkhorn balances prototypes among patches of one position (CAPI, arXiv 2502.08769), so that none can stand for a
    place. For large batches: where a position is masked in one crop of a step only, its target is uniform."""


class Ibot(Distillation):
    """Cross-entropy of the student's prototype probabilities at masked patches against the teacher's."""

    Options = IbotOptions
    head_of = "dino"

    def __init__(self, options: IbotOptions, backbone: Backbone) -> None:
        super().__init__(options)
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
        self.patch = (backbone.size[0] // backbone.grid[0], backbone.size[1] // backbone.grid[1])
        self.passes = {**self.passes, "student": Pass(options.view, crops=None, mask_of="ibot")}
        self.mask_token = nn.Parameter(torch.zeros(backbone.width))  # iBOT and DINOv2 begin with zeros too
        if self.owns_head:
            self.make_head(backbone)

    def connect(self, others: Mapping[str, Objective], views: Mapping[str, View]) -> None:
        """Share a head, draw masks. Raises Refusal where a head is to be shared and is not there, or is another one."""
        if not self.owns_head:
            self._share(others.get("dino"))
        if self.options.view not in views:  # the task says so
            return
        view = views[self.options.view]
        h, w = height_width(view.size)
        low, high = self.options.mask_ratio
        self.draw = functools.partial(
            draw_masks,
            grid=(h // self.patch[0], w // self.patch[1]),
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
            wanted, shared = getattr(self.options, name), getattr(dino.options, name)
            if wanted not in (getattr(standard, name), shared):
                raise Refusal(
                    f"objectives.ibot.{name}={wanted} goes with a head of its own, and shared_head=true uses that of "
                    f"`dino`, where {name}={shared}: leave objectives.ibot.{name} out, or set shared_head=false"
                )
        # past nn.Module, which would register them a second time
        object.__setattr__(self, "head", dino.head)
        object.__setattr__(self, "teacher_head", dino.teacher_head)
        self.make_centre(dino.prototypes)

    def verdict(self, numbers: Mapping[str, float]) -> Verdict | None:
        """Judge the cross-entropy of the crops of which something is masked; the loss counts the others too."""
        if not numbers.get("masked"):  # not measured, or nothing was masked
            return None
        return super().verdict({**numbers, "loss": numbers["teacher_entropy"] + numbers["kl"]})

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
            groups = where % num_patches if self.options.per_position else None
            logits = self.teacher_head(teacher.flatten(0, 1).index_select(0, where))
            targets_nK = self.targets(logits, groups, num_patches)
        each_n = prototypes.cross_entropy(logits_nK, targets_nK, self.options.student_temperature)
        share_n = draws["share"].to(each_n.dtype)
        result = {"loss": (each_n * share_n).sum() / rows}
        if self.measured:
            result |= self._statistics(each_n.detach(), targets_nK, share_n, rows * num_patches)
        return result

    @torch.no_grad()
    def _statistics(self, each_n: Tensor, targets_nK: Tensor, share_n: Tensor, num_patches: int) -> dict[str, Tensor]:
        """Statistics that `forward` lists. A masked crop's shares sum to 1, all shares to the number of such crops."""
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
