"""`koleo`: images keep away from each other.

The Kozachenko-Leonenko estimate of entropy as a regulariser (Sablayrolles et al., arXiv 1806.03198), as DINOv2 uses it
(arXiv 2304.07193): -mean log of the distance between each class token and its nearest neighbour, on the unit sphere.
Letters: B images, R processes, V crops, D width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.batches.views import View
from common.errors import Refusal
from common.limits import NotNegative
from common.models import Backbone, Features
from common.numerics import wide
from common.processes import collectives
from pretrain.objectives import Objective, Pass

EPSILON = 1e-8  # what is added to a distance, and the smallest length that a token is divided by (DINOv2)


@dataclass
class KoleoOptions:
    """Options of `koleo`."""

    weight: NotNegative = 0.1
    """Share of this objective in the summed loss; 0 leaves it out. DINOv2 adds 0.1 for each of its two crops: 0.2 here,
    where crops are averaged."""
    view: str = "global"
    """The view whose class tokens are spread, each of its crops by itself."""
    local: bool = False
    """Whether neighbours are looked for among this process's images only, as in DINOv2, or among all processes'. With
    accumulate, either way among those of a part of the step: more parts are further neighbours, and another loss."""


class Koleo(Objective):
    """-mean log(distance to the nearest other image), crop by crop, of the student's class tokens brought to length 1;
    of the mean patch token where the backbone has no class token."""

    Options = KoleoOptions
    pools = "class"
    least_images = 2
    compares = True

    def __init__(self, options: KoleoOptions, backbone: Backbone) -> None:
        super().__init__()
        self.options = options
        self.passes = {"student": Pass(options.view, crops=None)}
        self.crops = 1

    def connect(self, others: Mapping[str, Objective], views: Mapping[str, View]) -> None:
        """Share the pass of `ibot` where it masks the same crops, as in DINOv2."""
        if self.options.view in views:  # where it is not, the task says so
            self.crops = views[self.options.view].count
        ibot = others.get("ibot")
        if ibot is not None and ibot.options.view == self.options.view:
            self.passes = {"student": Pass(self.options.view, crops=None, mask_of="ibot")}

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss (nats; below 0 where neighbours are further than 1 apart) and, where measured, distance: the mean
        distance to the nearest neighbour, of at most 2. Raises Refusal for a single image."""
        rows = features["student"].pooled()
        with torch.autocast(rows.device.type, enabled=False):
            rows = F.normalize(wide(rows), dim=-1, eps=EPSILON)
            distances = torch.stack([self._distances(rows_BD) for rows_BD in rows.chunk(self.crops)])
            result = {"loss": -(distances + EPSILON).log().mean()}
        if self.measured:
            result["distance"] = distances.detach().mean()
        return result

    def _distances(self, rows_BD: Tensor) -> Tensor:
        """From each of this process's rows to the nearest other row, (B,)."""
        B = len(rows_BD)
        everybody = rows_BD if self.options.local else collectives.gathered(rows_BD)
        if len(everybody) < 2:
            raise Refusal(
                "objectives.koleo needs at least two images per process and part, or with local=false of all processes "
                f"together, to have a neighbour, and got {len(everybody)}: raise batch, or leave koleo out"
            )
        first = 0 if self.options.local else B * collectives.rank()
        with torch.no_grad():
            similarity = rows_BD @ everybody.t()  # (B, R*B)
            similarity[:, first : first + B].fill_diagonal_(-torch.inf)  # nobody is their own neighbour
            neighbors = similarity.argmax(1)
        # DINOv2 adds EPSILON to the difference too; equal rows then get a gradient of millions. A length of 0 has none.
        return torch.linalg.vector_norm(rows_BD - everybody[neighbors], dim=1)
