"""Arithmetic on prototype logits: the cross-entropies of self-distillation, the centre, and Sinkhorn.

Letters: N rows, K prototypes, B images, V student crops, G teacher crops. All in the precision of what is given:
float32 in training (`pretrain.heads.wide`), float64 where it is checked.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from common.processes import collectives

ROWS = 64  # that the cross-entropy handles at a time: its temporaries stay small


def cross_entropy(logits_NK: Tensor, targets_NK: Tensor, temperature: float) -> Tensor:
    """Cross-entropy -sum_k targets * log softmax(logits / temperature) of each row, (N,), nats. Each row of targets
    sums to 1; no gradient reaches them."""
    parts = ((targets, 1) for targets in targets_NK.split(ROWS))
    return _Rows.apply(logits_NK, temperature, parts)  # type: ignore[return-value]


def crops_cross_entropy(logits: Tensor, targets: Tensor, images: int, temperature: float) -> Tensor:
    """Mean cross-entropy over B images and over all pairs of a teacher crop and another student crop (DINO, arXiv
    2104.14294, eq. 3), a scalar in nats.

    logits (V*B, K) of the student and probabilities (G*B, K) of the teacher are crop-major; the student's first G crops
    are the teacher's. All pairs of one student crop share its logits, so their targets are summed first: V*G products
    become V. No gradient reaches the targets.
    """
    targets_GBK = targets.unflatten(0, (-1, images))
    V, G = len(logits) // images, len(targets_GBK)
    all_BK = targets_GBK.sum(0)
    parts = ((all_BK - targets_GBK[v], G - 1) if v < G else (all_BK, G) for v in range(V))
    sums: Tensor = _Rows.apply(logits, temperature, parts)  # type: ignore[assignment]
    return sums.sum() / (G * (V - 1) * images)


class _Rows(torch.autograd.Function):
    """Loss mass * logsumexp(z / t) - targets . z / t of every row z, (N, K) -> (N,), where a row's targets sum to
    `mass`. `parts`: (targets (n, K), mass) of the first n rows, the next ones and so on.

    The gradient, mass * softmax - targets, is made while the row is at hand, in the one (N, K) that is kept: three
    quarters of the time of the same formula in torch's operations, and a third of their memory (80 x 65,536 on a CPU).
    """

    @staticmethod
    def forward(ctx: Any, logits_NK: Tensor, temperature: float, parts: Iterable[tuple[Tensor, int]]) -> Tensor:
        gradient_NK = torch.empty_like(logits_NK, memory_format=torch.contiguous_format)
        losses, first = [], 0
        for targets, mass in parts:
            logits = logits_NK[first : first + len(targets)]
            out = gradient_NK[first : first + len(targets)]
            torch.mul(logits, 1 / temperature, out=out)
            whole = out.logsumexp(1, keepdim=True)
            losses.append(mass * whole[:, 0] - (targets * out).sum(1))
            out.sub_(whole).exp_()
            if mass != 1:
                out *= mass
            out.sub_(targets)
            first += len(targets)
        gradient_NK.mul_(1 / temperature)
        ctx.save_for_backward(gradient_NK)
        return torch.cat(losses) if losses else logits_NK.new_zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_NK,) = ctx.saved_tensors
        return gradient_NK.mul_(gradient_N[:, None]), None, None  # in place: autograd refuses a second backward


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy along the last dimension, nats: (..., K) -> (...)."""
    return torch.special.entr(probabilities).sum(-1)


def marginal_entropy(probabilities_NK: Tensor) -> Tensor:
    """Entropy of the mean over the rows of all processes, a scalar in nats; ln K when prototypes are used evenly."""
    count = probabilities_NK.new_tensor([float(len(probabilities_NK))])
    sums = collectives.total(torch.cat([probabilities_NK.sum(0), count]))
    return entropy(sums[:-1] / sums[-1].clamp(min=1))


class Centre(nn.Module):
    """The mean teacher logits, moved by momentum: what DINO subtracts, so that no prototype wins everywhere.

    `note` collects the logits of a step, in however many parts; `commit` moves the centre once, by the mean over all
    parts and processes; `forget` drops what an untaken step had noted.
    """

    centre: Tensor
    pending: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(prototypes))
        self.register_buffer("pending", torch.zeros(prototypes + 1), persistent=False)  # sums, and how many rows

    @torch.no_grad()
    def note(self, logits_NK: Tensor) -> None:
        """Note rows that the next `commit` averages."""
        self.pending[:-1] += logits_NK.sum(0, dtype=self.pending.dtype)
        self.pending[-1] += len(logits_NK)

    @torch.no_grad()
    def commit(self) -> None:
        """Move the centre: c <- momentum * c + (1 - momentum) * mean of the rows noted; not at all without rows."""
        sums = collectives.total(self.pending)
        count = sums[-1]
        moved = torch.lerp(sums[:-1] / count.clamp(min=1), self.centre, self.momentum)
        self.centre.copy_(torch.where(count > 0, moved, self.centre))
        self.forget()

    def forget(self) -> None:
        """Drop the rows noted since the last `commit`."""
        self.pending.zero_()


@torch.no_grad()
def sinkhorn(
    logits_NK: Tensor, temperature: float, iterations: int = 3, groups: Tensor | None = None, num_groups: int = 1
) -> Tensor:
    """Probabilities (N, K) of exp(logits / temperature) after `iterations` times making all prototypes equally likely
    over the rows of all processes, then all rows sum to 1 (SwAV, arXiv 2006.09882; DINOv2).

    `groups` (N,) in [0, num_groups): prototypes are balanced among the rows of each group by itself (CAPI, arXiv
    2502.08769, where a group is a position, so that no prototype can stand for one). Some processes may have no rows.

    In the log domain, where nothing overflows. A shift per row instead would be lost: three iterations do not
    converge, and the first one weighs the rows as they come. The published factors 1/K and 1/N cancel in the last step.
    """
    logs_NK = logits_NK / temperature  # a new tensor: the rest happens in it
    for _ in range(iterations):
        logs_NK -= _columns(logs_NK, groups, num_groups)
        logs_NK -= logs_NK.logsumexp(1, keepdim=True)
    return logs_NK.exp_()


def _columns(values_NK: Tensor, groups: Tensor | None, num_groups: int) -> Tensor:
    """Log-sum-exp over the rows of all processes, (1, K), or of each row's group, (N, K)."""
    K = values_NK.shape[1]
    if groups is None:
        most = values_NK.amax(0, keepdim=True) if len(values_NK) else values_NK.new_full((1, K), -math.inf)
        most = collectives.largest(most)
        return collectives.total((values_NK - most).exp_().sum(0, keepdim=True)).log() + most
    of_group = groups[:, None].expand_as(values_NK)
    most = values_NK.new_full((num_groups, K), -math.inf).scatter_reduce_(0, of_group, values_NK, "amax")
    most = collectives.largest(most)
    sums = values_NK.new_zeros(num_groups, K).index_add_(0, groups, (values_NK - most[groups]).exp_())
    return (collectives.total(sums).log() + most)[groups]
