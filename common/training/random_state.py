"""What a step changes before it is taken: torch's generators, and the buffers of modules."""

from typing import Any

import torch
from torch import nn


def random_state() -> dict[str, Any]:
    """Return the states of torch's generators in this process."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Put a `random_state()` back."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Snapshot:
    """What forward passes change, as it was before them: the random state, running statistics, sums of logits."""

    def __init__(self, task: nn.Module) -> None:
        self.random = random_state()
        self.buffers = [(buffer, buffer.clone()) for buffer in task.buffers()]

    @torch.no_grad()
    def put_back_buffers(self) -> None:
        """Undo what was done to buffers; the random state goes on."""
        for buffer, before in self.buffers:
            buffer.copy_(before)

    def put_back(self) -> None:
        """Undo everything, as if the step had not begun."""
        set_random_state(self.random)
        self.put_back_buffers()
