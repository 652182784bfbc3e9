"""`diagnose=true`: what in a step is not finite, by the names of modules and weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

NAMED = 5  # names that a line lists


class Witness:
    """Looks at what every module of a task returns, and at every gradient before it is clipped: several times as slow
    as a training that nobody watches."""

    def __init__(self, task: nn.Module) -> None:
        self.first: str | None = None  # module of this step that first returned a number that is not finite
        self.gradients: list[str] = []  # weights whose gradient, summed over all processes, is not
        for name, module in task.named_modules():
            if name:
                module.register_forward_hook(self._looking(name))

    def _looking(self, name: str) -> Any:
        def look(module: nn.Module, _: Any, result: Any) -> None:
            if self.first is None and not all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(result)):
                self.first = f"{name} ({type(module).__name__})"

        return look

    def begin_step(self) -> None:
        """Forget the step before."""
        self.first, self.gradients = None, []

    def before_update(self, task: nn.Module) -> None:
        """Look at the gradients."""
        grads = {name: weight.grad for name, weight in task.named_parameters() if weight.grad is not None}
        self.gradients = [name for name, grad in grads.items() if not bool(torch.isfinite(grad).all())]

    def seen(self) -> str:
        """Return what of this step was not finite, in a line."""
        more = f" and {len(self.gradients) - NAMED} more" if len(self.gradients) > NAMED else ""
        gradients = ", ".join(self.gradients[:NAMED]) + more
        if not gradients:
            gradients = "none; together they are too large for the type of their norm"
        return f"first output that is not finite: {self.first or 'none'}; gradients that are not: {gradients}"


def _tensors(result: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module returned: a tensor, Features, or a container of them."""
    if isinstance(result, Tensor):
        if result.is_floating_point():
            yield result
    elif isinstance(result, (list, tuple)):
        for item in result:
            yield from _tensors(item)
    elif isinstance(result, dict) or hasattr(result, "__dataclass_fields__"):
        yield from _tensors(list(result.values() if isinstance(result, dict) else vars(result).values()))
