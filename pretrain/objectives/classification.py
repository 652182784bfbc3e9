"""`classification`: what is in the picture, from its label.

Plain supervised training, alone or with another objective beside it: Positional Label (arXiv 2206.04981) adds half of a
positional loss to it. The one objective that reads labels; a recipe that names it is no self-supervised one.

Mixup, CutMix, RandAugment and erasing are options of the view that is classified; of mixed images the labels are mixed.

Letters: B images, K classes, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.batches.mixing import mix_targets
from common.errors import Refusal
from common.limits import AutoCount, BelowOne, NotNegative
from common.models import Backbone, Features
from common.models.plan import PlanSpec
from common.numerics import wide
from pretrain.heads import LinearHead
from pretrain.objectives import Objective, Pass

EPSILON = 1e-8  # in place of the known share of labels where it is 0


@dataclass
class ClassificationOptions:
    """Options of `classification`."""

    weight: NotNegative = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    smoothing: BelowOne = 0.0
    """Label smoothing: this much of each label is spread evenly over all classes (DeiT, Swin and NesT: 0.1)."""
    loss: Literal["ce", "bce"] = "ce"
    """Cross-entropy of all classes together (ce), or binary for each, the mean over classes (bce; DeiT III)."""
    pool: Literal["auto", "class", "mean"] = "auto"
    """What is classified: class (the class token), mean (of the patch tokens), or auto: the class token where there is
    one. Distillation and register tokens never are."""
    position: Literal["full", "none"] = "full"
    """Position encoding in the pass: full or none. Swin and NesT have one for all their passes: give it the
    `position` of the objectives beside it."""
    classes: AutoCount = "auto"
    """How many there are; auto: those of the data."""
    view: str = "global"
    """The view that is classified, its first crop."""


class Classification(Objective):
    """Cross-entropy of one linear layer on the final-norm class token or mean patch token.

    An image without a label (-1) takes no part: the loss is the mean over those of the whole step that have one, in
    whatever part and process they are, and 0 where none has.
    """

    Options = ClassificationOptions
    labelled = True
    pools = "class"
    crops_seen = "first"

    def __init__(self, options: ClassificationOptions, backbone: Backbone) -> None:
        super().__init__()
        if options.pool == "class" and not backbone.has_class_token:
            raise Refusal(
                f"objectives.classification.pool=class: {backbone.config.name} has no class token here; use pool=mean"
            )
        self.options = options
        self.pools = options.pool
        self.passes = {"image": Pass(options.view, PlanSpec(position=options.position))}
        self.head = LinearHead(backbone.width, options.classes)

    def classifier(self) -> nn.Linear:
        """The layer that scores classes."""
        return self.head.classifier

    def scores(self, features: Mapping[str, Features]) -> Tensor:
        """Scores of the classes, (B, K), float32."""
        return wide(self.head(features["image"].pooled(self.pools)))

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss (nats, smoothing included), accuracy, and chance: that of a guess among classes of equal size.

        draws: "label" (B,) int64, -1 for an image without one, and "known" (): images with a label in the whole step,
        divided by its parts, over which what is returned is averaged. A part that has more than its share returns more:
        else an image would count the more, the fewer labels those beside it have. Where images are mixed, "shares"
        (B, 2): of its own label and of its partner's; right is the larger one, and of two without label neither counts.
        """
        logits_BK, labels_B, K = self.scores(features), draws["label"], self.options.classes
        count = torch.where(draws["known"] > 0, draws["known"], 1.0)
        if "shares" not in draws and self.options.loss == "ce":
            weight_B = labels_B >= 0
            smoothing = self.options.smoothing
            each_B = F.cross_entropy(logits_BK, labels_B.clamp(min=0), reduction="none", label_smoothing=smoothing)
        else:
            targets_BK = F.one_hot(labels_B.clamp(min=0), K).float() * (labels_B >= 0)[:, None]
            if "shares" in draws:
                targets_BK = mix_targets(targets_BK, draws["shares"])
            weight_B = targets_BK.sum(1)  # how much of its labels is known: 1, or a share
            each_B = self._soft_loss(logits_BK, targets_BK / weight_B.clamp(min=EPSILON)[:, None])
            labels_B = targets_BK.argmax(1)
        right_B = (logits_BK.detach().argmax(-1) == labels_B) * weight_B
        return {
            "loss": (each_B * weight_B).sum() / count,
            "accuracy": right_B.sum() / count,
            "chance": logits_BK.new_full((), 1 / K),
        }

    def _soft_loss(self, logits_BK: Tensor, targets_BK: Tensor) -> Tensor:
        """Loss of each row, (B,), against soft labels that sum to one."""
        smoothing = self.options.smoothing
        if self.options.loss == "ce":
            return F.cross_entropy(logits_BK, targets_BK, reduction="none", label_smoothing=smoothing)
        smoothed_BK = targets_BK * (1 - smoothing) + smoothing / self.options.classes
        return F.binary_cross_entropy_with_logits(logits_BK, smoothed_BK, reduction="none").mean(1)
