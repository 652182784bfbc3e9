"""What a training trains, and what a step of it brings."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

NAMED = 3  # losses that a line names

Terms = list[dict[str, float]]  # of one process: {"loss": ..., "absolute/loss": ...} of every part of a step


class Task(nn.Module):
    """The one module that is trained: a batch in, {"loss", statistics} out, each a scalar or a pair to be averaged over
    the parts and processes of a step (see `Averages.add`). Its hooks do nothing unless a task has a use for them."""

    def begin_step(self, progress: float, measured: bool) -> None:
        """Prepare for a step, before which the share `progress` of the training is done; `measured`: its statistics
        will be logged."""

    def before_update(self) -> None:
        """Use the gradients: reduced over all processes, and not clipped yet."""

    def after_step(self, taken: bool) -> None:
        """Follow the weights; not `taken`, the gradient was not finite, and nothing has changed."""


@dataclass(frozen=True)
class Outcome:
    """What a step brought. Its numbers are those of this process."""

    results: list[dict[str, Tensor]]  # what the task returned for each part
    norm: float  # of the gradient, reduced over all processes, before it was clipped
    waited: float  # seconds that it waited for batches
    seconds: float  # in all

    @property
    def taken(self) -> bool:
        """Whether the weights were changed: alike in every process, as the norm is."""
        return math.isfinite(self.norm)

    @property
    def terms(self) -> Terms:
        """The results as Python's numbers; of a pair its quotient."""
        return [{name: _number(value) for name, value in result.items()} for result in self.results]


def _number(value: Tensor) -> float:
    return float(value[0] / value[1]) if value.ndim else float(value)


def non_finite_terms(terms: Sequence[Terms]) -> list[str]:
    """The losses that are not finite, each with its value and, of several processes, whose it is; their sum, which
    follows from them, is the last."""
    lines: dict[str, str] = {}
    for process, parts in enumerate(terms):
        where = f" in process {process}" if len(terms) > 1 else ""
        for name, value in (item for part in parts for item in part.items()):
            if not math.isfinite(value) and name.endswith("loss"):
                lines.setdefault(name + where, f"{name} {value}{where}")
    return sorted(lines.values(), key=lambda line: line.startswith("loss "))


def reason(terms: Sequence[Terms], norm: float) -> str:
    """Why a step was not taken, from the terms of every process."""
    wrong = non_finite_terms(terms)
    if not wrong:
        return f"every loss is finite and the gradient is not (norm {norm})"
    more = f" and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
    return f"the loss is not finite ({', '.join(wrong[:NAMED])}{more})"
