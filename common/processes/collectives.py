"""Exchange among the processes of a job: sums, maxima and rows of all of them.

Every process has to call these the same number of times and in the same order, or all wait forever. Without a process
group, and inside `single_process()`, each is the identity of a job of one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_single = 0  # how many `single_process()` are open


@contextmanager
def single_process() -> Iterator[None]:
    """Let this process speak for itself inside: for monitors and timings that only one process runs."""
    global _single
    _single += 1
    try:
        yield
    finally:
        _single -= 1


def processes() -> int:
    """Count the processes that speak together."""
    together = not _single and dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if together else 1


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def total(x: Tensor) -> Tensor:
    """Return the sum of `x` over processes, in its shape and type, without gradient; `x` itself in one process."""
    return _reduced(x, dist.ReduceOp.SUM) if processes() > 1 else x.detach()


def largest(x: Tensor) -> Tensor:
    """Return the maximum of `x` over processes, in its shape and type, without gradient; `x` itself in one process."""
    return _reduced(x, dist.ReduceOp.MAX) if processes() > 1 else x.detach()


@torch.no_grad()
def take_buffers(module: torch.nn.Module) -> None:
    """Give every process the first one's buffers: a BatchNorm's statistics are of what a process has seen, and a model
    that several processes judge has to be the same in all."""
    if processes() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gathered(x: Tensor) -> Tensor:
    """Return the rows of all R processes in the order of their ranks, (n, ...) -> (R*n, ...), with gradient; every
    process has n of them. `x` itself where there is one process.

    Backward sums over processes what each one's loss says about a row. If the joint loss is the mean of theirs, then
    the mean that DistributedDataParallel takes of their gradients is its gradient.
    """
    return _Gathered.apply(x) if processes() > 1 else x  # type: ignore[return-value]


def _reduced(x: Tensor, how: Any) -> Tensor:
    # gloo knows no bool; a sum or maximum of bytes of 0 and 1 is the same, as a bool
    copy = x.detach().to(torch.uint8 if x.dtype == torch.bool else x.dtype, copy=True)
    if x.dtype == torch.bool:
        how = dist.ReduceOp.MAX
    copy = copy.contiguous()
    dist.all_reduce(copy, how)
    return copy.to(x.dtype)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, x.contiguous())
        return torch.cat(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)  # small: a reduce-scatter would save little, and gloo has none in older versions
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]
