"""The exponential moving average of weights: how a teacher follows its student."""

import copy
import math

import torch
from torch import nn


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, for every parameter and floating-point buffer.

    Both hold the same names. The teacher's weights are float32 or wider: 1 - momentum = 5e-4 is below bfloat16's
    resolution, and the teacher would stand still. Raises ValueError if they are not.
    """
    theirs = dict([*student.named_parameters(), *student.named_buffers()])
    mine, new = [], []
    for name, tensor in [*teacher.named_parameters(), *teacher.named_buffers()]:
        if not tensor.is_floating_point():
            tensor.copy_(theirs[name])
            continue
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the teacher's {name} is {tensor.dtype}: an average needs float32")
        mine.append(tensor)
        new.append(theirs[name].to(tensor.dtype))
    torch._foreach_lerp_(mine, new, 1 - momentum)


def copy_of(student: nn.Module) -> nn.Module:
    """The teacher at the start: an equal module that is never trained, in eval mode."""
    return copy.deepcopy(student).requires_grad_(False).eval()


def half_life(momentum: float, batch: int) -> float:
    """Images after which a weight of the student counts half in the teacher; infinite for a momentum of 1."""
    return math.inf if momentum >= 1 else batch * math.log(0.5) / math.log(momentum) if momentum > 0 else 0.0
