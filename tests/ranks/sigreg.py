"""`sigreg` on each rank's share of a step's images."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from common.batches.views import View
from common.models import Features
from common.processes import collectives
from pretrain.objectives.sigreg import Sigreg, SigregOptions

B, D, G, L = 6, 8, 2, 3  # images of all processes, width, global and local crops
VIEWS = {"global": View(size=24, count=G), "local": View(size=16, count=L)}
SMALL = {"width": 12, "out": 4, "slices": 5}


def made_sigreg(**options: Any) -> Sigreg:
    """A small one in float64 that has met its views, whose norms have been trained a little."""
    torch.manual_seed(0)
    made = Sigreg(SigregOptions(**(SMALL | options)), SimpleNamespace(width=D))  # type: ignore[arg-type]
    made.connect({}, VIEWS)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.double()


def tokens(seed: int = 1) -> Tensor:
    """Class tokens (V, B, D), the global crops first."""
    return torch.randn(G + L, B, D, dtype=torch.double, generator=torch.Generator().manual_seed(seed))


def features(x_VBD: Tensor, views: tuple[str, ...] = ("global", "local")) -> dict[str, Features]:
    """Of class tokens beside patches that are something else, crop-major."""
    counts = [G, len(x_VBD) - G][: len(views)]
    rows = [crops.flatten(0, 1)[:, None] for crops in x_VBD.split(counts)]
    return {name: Features(torch.zeros_like(each).expand(-1, 9, -1), each, (3, 3)) for name, each in zip(views, rows)}  # noqa: B905


def shared(rank: int, ranks: int) -> dict[str, Any]:
    """Loss, statistics and gradients (averaged over processes, as DDP does) of one rank's images."""
    made, x = made_sigreg(), tokens().requires_grad_()
    made.begin_step(0.25, measured=True)
    share = B // ranks
    result = made(features(x[:, rank * share : (rank + 1) * share]), {})
    result["loss"].backward()
    gradients = [x.grad, *(parameter.grad for parameter in made.parameters())]
    mean = [collectives.total(each) / collectives.processes() for each in (*result.values(), *gradients)]  # type: ignore[arg-type]
    names = [*result, "tokens", *(name for name, _ in made.named_parameters())]
    return {
        "numbers": {name: value.flatten().tolist() for name, value in zip(names, mean, strict=True)},
        "directions": made.directions(x).tolist(),
    }
