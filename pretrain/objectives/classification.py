"""`classification`: what is in the picture, from its label.

Plain supervised training, alone or with another objective beside it: Positional Label (arXiv 2206.04981) adds half of a
positional loss to it. The one objective that reads labels; a recipe that names it is no self-supervised one.

There is no mixup or CutMix, nor RandAugment or erasing, which the published recipes have: numbers of runs with and
without a positional label compare with each other, not with those of the papers.

Letters: B images, K classes, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import Refusal
from common.limits import AutoCount, BelowOne, NotNegative
from common.models import Backbone, Features
from common.models.plan import PlanSpec
from pretrain.heads import LinearHead, wide
from pretrain.objectives import Objective, Pass


@dataclass
class ClassificationOptions:
    """Options of `classification`."""

    weight: NotNegative = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    smoothing: BelowOne = 0.0
    """Label smoothing: this much of each label is spread evenly over all classes (DeiT, Swin and NesT: 0.1)."""
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

    def logits(self, features: Mapping[str, Features]) -> Tensor:
        """Scores of the classes, (B, K), float32."""
        return wide(self.head(features["image"].pooled(self.pools)))

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss (nats, smoothing included), accuracy, and chance: that of a guess among classes of equal size.

        draws: "label" (B,) int64, -1 for an image without one, and "known" (): images with a label in the whole step,
        divided by its parts, over which what is returned is averaged. A part that has more than its share returns more:
        else an image would count the more, the fewer labels those beside it have.
        """
        logits_BK, labels_B = self.logits(features), draws["label"]
        known_B = labels_B >= 0
        count = torch.where(draws["known"] > 0, draws["known"], 1.0)
        each_B = F.cross_entropy(
            logits_BK, labels_B.clamp(min=0), reduction="none", label_smoothing=self.options.smoothing
        )
        right_B = (logits_BK.detach().argmax(-1) == labels_B) & known_B
        return {
            "loss": (each_B * known_B).sum() / count,
            "accuracy": right_B.sum() / count,
            "chance": logits_BK.new_full((), 1 / self.options.classes),
        }
