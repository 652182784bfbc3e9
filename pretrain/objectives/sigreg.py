"""`sigreg`: crops of an image agree, and images are spread as a Gaussian: no teacher, no prototypes, no negatives.

LeJEPA (Balestriero & LeCun, arXiv 2511.08544). Letters: B images, R processes, G global crops, V crops in all, D width,
K channels of a projection, S slices, T knots.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.batches.views import View
from common.features.metrics import rankme_of_some
from common.limits import Count, NotNegative, Probability, Range
from common.models import Backbone, Features
from common.numerics import wide
from common.processes import collectives
from pretrain.objectives import Objective, Pass, Verdict, crops_compared

KNOTS, END = 17, 5.0  # of the trapezoid rule, from -END to END: the authors'
COLLAPSED = 0.1  # projection_std; a small ViT had 0.6 from the start and 0.72 later, with lam=0 0.04 after 20 steps
BEFORE = 0.02  # share of the training before which nothing is judged
HEALTHY = Verdict("healthy")
COLLAPSE = Verdict(
    "collapse", "all images have nearly one projection: raise lam, lower the learning rate, or use a larger batch"
)
EPSILON = 1e-5  # added to a variance, as in PyTorch's BatchNorm


@dataclass
class SigregOptions:
    """Options of `sigreg`; at least two crops an image."""

    weight: NotNegative = 1.0
    """Share of this objective in the summed loss; 0 leaves it out."""
    lam: Probability = 0.05
    """Share of SIGReg in the loss; the rest is that of the prediction."""
    slices: Count = 256
    """Random directions that a step looks along; others at every step."""
    layers: Count = 3
    """Linear layers of the projector, which is thrown away after the training."""
    width: Annotated[int, Range(at_least=2)] = 2048
    """Width of the projector's hidden layers."""
    out: Annotated[int, Range(at_least=2)] = 128
    """Channels K of a projection: what is to be Gaussian."""
    view: str = "global"
    """The view whose crops the others are to agree with."""
    local: str | None = None
    """The view of further crops; null: the one named `local`, where the recipe has it."""


class Sigreg(Objective):
    """(1 - lam) * prediction + lam * SIGReg of the projected class tokens; of the mean patch token where the backbone
    has no class token.

    Prediction: squared distance of every crop to the mean of the image's global crops, per channel. SIGReg: how far
    each crop's images of all processes are from N(0, I), see `epps_pulley`. With accumulate, each part of a step is
    compared within itself: fewer images, and another loss.
    """

    Options = SigregOptions
    pools = "class"
    least_images = 2
    compares = True

    def __init__(self, options: SigregOptions, backbone: Backbone) -> None:
        super().__init__()
        self.options = options
        self.projector = Projector([backbone.width, *[options.width] * (options.layers - 1), options.out])
        self.passes = {"global": Pass(options.view, crops=None)}
        self.crops = 2  # of the view, an image; `connect` says how many

    @classmethod
    def views_of(cls, options: SigregOptions) -> set[str]:
        return {options.view, options.local or "local"}

    def connect(self, others: Mapping[str, Objective], views: Mapping[str, View]) -> None:
        """Add the local crops. Raises Refusal where there is nothing to compare."""
        self.crops, local = crops_compared("sigreg", self.options, views)
        if local is not None:
            self.passes = {**self.passes, "local": Pass(local, crops=None)}

    def forward(self, features: Mapping[str, Features], draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """loss and, on measured steps: prediction and sigreg, of which it is made; projection_std (over images, per
        channel: 1 when all is well) and rankme (dimensions that the global crops' features fill)."""
        rows = torch.cat([seen.pooled() for seen in features.values()])  # crop-major, the global ones first
        B = len(features["global"].tokens) // self.crops
        projected = wide(self.projector(rows))
        with torch.autocast(rows.device.type, enabled=False):
            projected_VBK = projected.unflatten(0, (-1, B))
            centre_BK = projected_VBK[: self.crops].mean(0)
            prediction = (projected_VBK - centre_BK).square().mean()
            sigreg = epps_pulley(projected_VBK @ self.directions(projected)).mean()
            loss = (1 - self.options.lam) * prediction + self.options.lam * sigreg
        if not self.measured:
            return {"loss": loss}
        return {
            "loss": loss,
            "prediction": prediction.detach(),
            "sigreg": sigreg.detach(),
            **self._statistics(rows.detach()[: self.crops * B], projected_VBK.detach()),
        }

    def verdict(self, numbers: Mapping[str, float]) -> Verdict | None:
        spread = numbers.get("projection_std", math.nan)
        if self.progress < BEFORE or not math.isfinite(spread):
            return None
        return COLLAPSE if spread < COLLAPSED else HEALTHY

    def directions(self, like: Tensor) -> Tensor:
        """Unit vectors (K, S), drawn evenly from all: a function of the progress, hence the same in every process and
        every part of a step, and in a resumed run."""
        rng = np.random.default_rng(int(np.float64(self.progress).view(np.uint64)))
        drawn = torch.from_numpy(rng.standard_normal((self.options.out, self.options.slices)))
        return F.normalize(drawn, dim=0).to(like.dtype).to(like.device)  # not every device has float64

    @torch.no_grad()
    def _statistics(self, rows: Tensor, projected_VBK: Tensor) -> dict[str, Tensor]:
        everybody = collectives.gathered(projected_VBK.transpose(0, 1).contiguous())
        unit = collectives.gathered(F.normalize(wide(rows), dim=1))
        return {
            "projection_std": everybody.std(0, correction=0).mean(),
            "rankme": everybody.new_tensor(rankme_of_some(unit)),
        }


def epps_pulley(samples: Tensor) -> Tensor:
    """How far each sample is from N(0, 1), samples (V, B, S) of this process -> (V, S): the integral over t of
    |phi(t) - exp(-t^2/2)|^2 exp(-t^2/2) times the sample's size, with gradient (Epps & Pulley 1983).

    phi(t), the mean of exp(itx), is that of all R processes' B images. The integrand is even in t: half of the knots.
    """
    t = torch.linspace(0, END, (KNOTS + 1) // 2, dtype=samples.dtype, device=samples.device)
    normal = (-t.square() / 2).exp()
    share = torch.full_like(t, 2 * float(END / (len(t) - 1)))  # both signs; the trapezoid halves the ends,
    share[0], share[-1] = share[0] / 2, share[-1] / 2  # and 0 has but one sign
    angles = samples[..., None] * t  # (V, B, S, T)
    parts = torch.stack([angles.cos().mean(1), angles.sin().mean(1)])  # (2, V, S, T)
    real, imaginary = collectives.gathered(parts[None]).mean(0)
    away = (real - normal).square() + imaginary.square()
    return away @ (share * normal) * (samples.shape[1] * collectives.processes())


class Projector(nn.Module):
    """An MLP with BatchNorm and ReLU after all but the last layer: widths[0] -> ... -> widths[-1]."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        made: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            made += [nn.Linear(inputs, outputs), WholeBatchNorm(outputs), nn.ReLU()]
        self.mlp = nn.Sequential(*made[:-2])

    def forward(self, rows: Tensor) -> Tensor:
        """(N, widths[0]) -> (N, widths[-1])."""
        return self.mlp(rows)


class WholeBatchNorm(nn.Module):
    """BatchNorm over the rows of all processes, which have equally many. It keeps no running statistics: the projector
    is never asked about a single image, and held-out images come in batches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, rows: Tensor) -> Tensor:
        """(N, C) -> (N, C), float32 or wider."""
        with torch.autocast(rows.device.type, enabled=False):
            rows = wide(rows)
            rows = rows - _mean(rows)
            return rows * (self.weight * (_mean(rows.square()) + EPSILON).rsqrt()) + self.bias


def _mean(rows: Tensor) -> Tensor:
    """Mean row of all processes, (C,), with gradient."""
    return collectives.gathered(rows.mean(0, keepdim=True)).mean(0)
