"""What a step changes before it is taken: torch's generators, and the buffers of modules."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def random_state() -> dict[str, Any]:
    """The states of torch's generators in this process."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Put a `random_state()` back."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def undo_later(task: nn.Module) -> Callable[[], None]:
    """A function that puts back what forward passes from now on change: the random state, running statistics, sums of
    logits."""
    random = random_state()
    buffers = [(buffer, buffer.clone()) for buffer in task.buffers()]

    @torch.no_grad()
    def undo() -> None:
        set_random_state(random)
        for buffer, before in buffers:
            buffer.copy_(before)

    return undo
