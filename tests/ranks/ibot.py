"""Every rank calls the collectives, and trains `ibot` and `koleo` on its part of a batch; `measured` is the same work
in one process."""

from typing import Any

import torch
from small import backbone

from common.batches.views import View
from common.models import Features
from common.processes import collectives
from pretrain.objectives import ibot, koleo

B, V, N, D, K = 8, 2, 9, 32, 10  # images of all processes, crops, patches, width, prototypes
VIEWS = {"global": View(size=24, count=V)}
IBOT = {
    "sinkhorn": {},
    "per_position": {"per_position": True},
    "centre": {"centering": "centre"},
    "one has nothing masked": {},
}
KOLEO = {"all": {}, "local": {"local": True}}
PARTS = 2  # that a step is accumulated from


def made_ibot(**options: Any) -> ibot.Ibot:
    """`ibot` with a small head, in float64, that has met two crops of 3x3 patches."""
    given = {"prototypes": K, "hidden": 16, "bottleneck": 8, "teacher_temperature": 0.05, "freeze_last_layer": 0.0}
    whole = backbone()
    torch.manual_seed(2)
    made = ibot.Ibot(ibot.IbotOptions(**{**given, **options}), whole).double()
    made.connect({}, VIEWS)
    return made


def made_koleo(**options: Any) -> koleo.Koleo:
    """`koleo` that has met two crops."""
    made = koleo.Koleo(koleo.KoleoOptions(**options), backbone())
    made.connect({}, VIEWS)
    return made


def masks(name: str) -> torch.Tensor:
    """(B, V, N) bool."""
    masked = torch.rand(B, V, N, generator=torch.Generator().manual_seed(4)) < 0.4
    masked[0, 0] = False
    if name == "one has nothing masked":
        masked[B // 2 :] = False
    return masked


def tokens(seed: int) -> torch.Tensor:
    """(V, B, N, D) float64."""
    return torch.randn(V, B, N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def features(some: torch.Tensor) -> Features:
    """Of crops and images (V, b, N, D), crop-major; the first patch stands for the class token as well."""
    rows = some.flatten(0, 1)
    return Features(rows, rows[:, :1], (3, 3))


def measured(name: str, options: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Loss, statistics, centre and gradients of one rank's part of a step (made of two, where a centre is moved)."""
    made = made_ibot(**options)
    made.begin_step(0.0, True)
    student = tokens(5).requires_grad_()
    parts = PARTS if made.centre is not None else 1
    share = B // ranks // parts
    for part in range(parts):
        here = slice(part * (B // parts) + rank * share, part * (B // parts) + (rank + 1) * share)
        draws = {"masked": masks(name)[here]}
        seen = {"student": features(student[:, here]), "teacher": features(tokens(6)[:, here])}
        result = made(seen, {**draws, **ibot.masked_patches(draws)})
        (result["loss"] / parts).backward()
    made.after_step(0.9)
    parameters = [p.grad for p in made.head.parameters() if p.grad is not None]
    found = {key: value.item() for key, value in result.items()}
    return {
        "numbers": {**found, "loss": _mean(result["loss"].detach()).item()},
        "head": [_mean(gradient).tolist() for gradient in parameters],
        "tokens": _mean(student.grad).tolist(),
        "centre": [] if made.centre is None else made.centre.centre.tolist(),
    }


def spread(options: dict[str, Any], rank: int, ranks: int) -> dict[str, Any]:
    """Loss and gradient of `koleo` on one rank's part."""
    made = made_koleo(**options)
    student = tokens(7).requires_grad_()
    share = B // ranks
    loss = made({"student": features(student[:, rank * share : (rank + 1) * share])}, {})["loss"]
    loss.backward()
    return {"loss": _mean(loss.detach()).item(), "tokens": _mean(student.grad).tolist()}


def _mean(value: Any) -> torch.Tensor:
    """Over processes, as DistributedDataParallel does it to gradients."""
    return collectives.total(value) / collectives.processes()


def told(rank: int) -> dict[str, Any]:
    """What the collectives say on this rank."""
    x = torch.arange(6.0).view(3, 2).t() + 10 * rank  # (2, 3), not contiguous
    whole = x.contiguous()
    flags = torch.tensor([rank == 0, rank == 1, False])
    leaf = x.clone().requires_grad_()
    together = collectives.gathered(leaf)
    weights = torch.arange(float(together.numel())).view_as(together) * (rank + 1)
    (together * weights).sum().backward()
    found = {
        "processes": collectives.processes(),
        "rank": collectives.rank(),
        "total": collectives.total(x).tolist(),
        "untouched": collectives.total(whole).equal(collectives.total(x)) and torch.equal(whole, x),
        "count": collectives.total(torch.tensor(rank + 2)).item(),
        "largest": collectives.largest(-x).tolist(),
        "flags": collectives.largest(flags).tolist(),
        "any": collectives.total(flags).tolist(),
        "gathered": together.tolist(),
        "gradient": leaf.grad.tolist(),  # type: ignore[union-attr]
    }
    norm = torch.nn.BatchNorm1d(2)
    norm(10.0 * rank + torch.eye(2))
    collectives.take_buffers(norm)
    found["statistics"] = [norm.running_mean.tolist(), norm.num_batches_tracked.item()]  # type: ignore[union-attr,operator]
    if rank == 1:  # the other one does not have to come along
        with collectives.single_process(), collectives.single_process():
            same = [f(x) is x or torch.equal(f(x), x) for f in (collectives.total, collectives.largest)]
            found["alone"] = [*same, len(collectives.gathered(x)), collectives.processes(), collectives.rank()]
    return {**found, "afterwards": collectives.processes()}


def words(rank: int, ranks: int) -> dict[str, Any]:
    return told(rank)


def everything(rank: int, ranks: int) -> dict[str, Any]:
    return {
        "ibot": {name: measured(name, options, rank, ranks) for name, options in IBOT.items()},
        "koleo": {name: spread(options, rank, ranks) for name, options in KOLEO.items()},
    }
