"""`relative`: pairs of patches say where one is as seen from the other (Positional Label's RPL, arXiv 2206.04981)."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common import positions
from common.errors import Refusal
from common.heads import PairHead
from common.models import Backbone, Features
from common.plan import PlanSpec
from pretrain.objectives import Objective, Pass


@dataclass
class RelativeOptions:
    """Options of `relative`."""

    weight: float = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    pairs: Any = "auto"
    """Ordered pairs per image, drawn without replacement from all N*N: a number, auto (4N, at most N*N), or all."""
    position: str = "none"
    """Position embedding in the pass: none (leak-free) or full (the answer follows from it by subtraction)."""
    view: str = "global"
    """The view whose patches are asked."""


def draw_pairs(rng: np.random.Generator, num_patches: int, num_pairs: int) -> dict[str, np.ndarray]:
    """One sample's pairs, {"pairs": (P,) flat query*N + key}; drawn in the loader's workers."""
    return {"pairs": positions.sample_pairs(rng, num_patches, num_pairs)}


class Relative(Objective):
    """Cross-entropy of each sampled ordered pair against the class of its offset, query minus key."""

    Options = RelativeOptions

    labels: Tensor
    offsets: Tensor

    def __init__(self, options: RelativeOptions, backbone: Backbone) -> None:
        super().__init__()
        h, w = self.grid = backbone.grid
        self.num_patches = h * w
        self.num_pairs = num_pairs(options.pairs, self.num_patches)
        self.passes = {"tokens": Pass(options.view, PlanSpec(options.position))}
        if self.num_pairs < self.num_patches**2:
            self.draw = functools.partial(draw_pairs, num_patches=self.num_patches, num_pairs=self.num_pairs)
        self.register_buffer("labels", positions.relative(self.grid).flatten(), persistent=False)
        self.register_buffer("offsets", positions.offsets(self.grid).float(), persistent=False)
        self.head = PairHead(backbone.width, positions.num_offsets(self.grid))
        self.chance = positions.chance(self.grid)
        self.prior_entropy = positions.prior_entropy(self.grid)

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss (nats, mean over pairs), accuracy, distance (mean, in patches), gain (nats below the best answer
        that ignores the image), chance (accuracy of that answer)."""
        tokens = features["tokens"].tokens
        pairs = draws.get("pairs")  # (B, P)
        if pairs is None:
            pairs = torch.arange(self.num_patches**2, device=tokens.device).expand(len(tokens), -1)
        queries, keys = pairs // self.num_patches, pairs % self.num_patches
        logits_BPC = self.head(tokens, queries, keys).float()
        labels_BP = self.labels[pairs]
        loss = F.cross_entropy(logits_BPC.flatten(0, 1), labels_BP.flatten())
        with torch.no_grad():
            guesses_BP = logits_BPC.argmax(-1)
            distance = (self.offsets[guesses_BP] - self.offsets[labels_BP]).norm(dim=-1).mean()
            accuracy = (guesses_BP == labels_BP).float().mean()
            gain = self.prior_entropy - loss
        chance = loss.new_tensor(self.chance)
        return {"loss": loss, "accuracy": accuracy, "distance": distance, "gain": gain, "chance": chance}


def num_pairs(wished: Any, num_patches: int) -> int:
    """Pairs per image for the option `pairs`. Raises Refusal."""
    if wished == "auto":
        return positions.default_pairs(num_patches)
    if wished == "all":
        return num_patches**2
    if not isinstance(wished, int) or isinstance(wished, bool) or not 1 <= wished <= num_patches**2:
        raise Refusal(
            f"objectives.relative.pairs={wished!r}: expected auto, all, or a number from 1 to {num_patches**2} "
            f"({num_patches} patches have that many ordered pairs)"
        )
    return wished
