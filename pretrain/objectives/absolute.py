"""`absolute`: every patch says where it is (Positional Label's APL, arXiv 2206.04981; with position=none MP3,
2207.07611)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common import positions
from common.errors import Refusal, nearest
from common.heads import HalfHead, LinearHead
from common.models import Backbone, Features
from common.plan import PlanSpec
from pretrain.objectives import Objective, Pass

HEADS = {"linear": LinearHead, "half": HalfHead}


@dataclass
class AbsoluteOptions:
    """Options of `absolute`."""

    weight: float = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    head: str = "linear"
    """linear: one layer on all channels. half: the paper's MLP on the first half of the channels."""
    position: str = "none"
    """Position embedding in the pass: none (leak-free) or full (as the paper's released ViT: the answer is in the
    token)."""
    view: str = "global"
    """The view whose patches are asked."""


class Absolute(Objective):
    """Cross-entropy of each patch token against its row-major index in the backbone's own grid."""

    Options = AbsoluteOptions

    labels: Tensor
    distances: Tensor

    def __init__(self, options: AbsoluteOptions, backbone: Backbone) -> None:
        super().__init__()
        if options.head not in HEADS:
            raise Refusal(
                f"objectives.absolute.head={options.head!r}: expected one of "
                f"{', '.join(HEADS)}{nearest(options.head, HEADS)}"
            )
        self.passes = {"tokens": Pass(options.view, PlanSpec(options.position))}
        self.register_buffer("labels", positions.absolute(backbone.grid), persistent=False)
        self.register_buffer("distances", positions.distances(backbone.grid), persistent=False)
        self.head = HEADS[options.head](backbone.width, len(self.labels))
        self.chance = positions.chance(backbone.grid)

    def logits(self, features: Mapping[str, Features]) -> Tensor:
        """Where each patch believes it is, (B, N, N), float32."""
        return self.head(features["tokens"].tokens).float()

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss (nats, mean over patches), accuracy, distance (mean, in patches), chance."""
        logits_BNK = self.logits(features)
        B, N, K = logits_BNK.shape
        labels_BN = self.labels.expand(B, N)
        loss = F.cross_entropy(logits_BNK.reshape(B * N, K), labels_BN.reshape(B * N))
        with torch.no_grad():
            guesses_BN = logits_BNK.argmax(-1)
            distance = self.distances[guesses_BN, labels_BN].mean()
            accuracy = (guesses_BN == labels_BN).float().mean()
        return {"loss": loss, "accuracy": accuracy, "distance": distance, "chance": loss.new_tensor(self.chance)}
