"""Means of what training steps return, over the steps between two lines of a log."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

Table = Tensor  # (names, 2): what each number adds up to, and how many were added


class Averages:
    """Sums over the steps since the last line; nothing waits for the device before `means` is asked.

    A step that was not taken is left out, as its numbers are not finite, but where no other has them. What some steps
    alone return, as statistics that only logged steps compute, is averaged over those. A checkpoint between two lines
    keeps the sums, so that a resumed run logs what an uninterrupted one does.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[bool, dict[tuple[str, ...], Table]] = {True: {}, False: {}}  # taken or not -> names -> table
        self.norms: dict[bool, list[float]] = {True: [0.0, 0.0], False: [0.0, 0.0]}  # sum, count

    def add(self, results: Sequence[Mapping[str, Tensor]], norm: float, taken: bool) -> None:
        """Count a step: what each of its parts returned, and the norm of its gradient.

        A scalar has equal weight in every part and process; a pair (2,) is a sum and what it is a sum of.
        """
        names = tuple(results[0])
        table = torch.stack([torch.stack([_pair(value) for value in result.values()]) for result in results]).sum(0)
        table = table if table.device.type == "mps" else table.double()  # MPS has no float64
        before = self.sums[taken].get(names)
        self.sums[taken][names] = table if before is None else before + table
        self.norms[taken] = [self.norms[taken][0] + norm, self.norms[taken][1] + 1]

    def means(self, accelerator: Accelerator) -> dict[str, Any]:
        """Each number's mean over steps, parts and processes, and "gradient_norm"; what was counted is forgotten."""
        taken, other = _by_name(self.sums[True]), _by_name(self.sums[False])
        totals = taken | {name: row for name, row in other.items() if name not in taken}
        table: Any = accelerator.reduce(torch.stack(list(totals.values())), "sum")
        norm, steps = self.norms[bool(taken)]
        self._clear()
        values = (table[:, 0] / torch.where(table[:, 1] > 0, table[:, 1], 1)).float().tolist()
        return dict(zip(totals, values, strict=True)) | {"gradient_norm": norm / steps}

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this process."""
        return {
            "sums": [
                [taken, list(names), table.cpu()] for taken, of in self.sums.items() for names, table in of.items()
            ],
            "norms": [self.norms[True], self.norms[False]],
        }

    def load(self, states: Sequence[Mapping[str, Any]], process: int, processes: int, device: torch.device) -> None:
        """Go on from `state()` of every process; where their number has changed each takes an equal share."""
        self._clear()
        if not states:  # of a run from before they were kept
            return
        same = len(states) == processes
        for state in [states[process]] if same else states:
            for taken, names, table in state["sums"]:
                table = table.to(device) / (1 if same else processes)
                before = self.sums[taken].get(tuple(names))
                self.sums[taken][tuple(names)] = table if before is None else before + table
        self.norms = {True: list(states[0]["norms"][0]), False: list(states[0]["norms"][1])}


def _by_name(sums: Mapping[tuple[str, ...], Table]) -> dict[str, Tensor]:
    """The rows (2,) of all tables by their names, added up; those of the last table first."""
    totals: dict[str, Tensor] = {}
    for names, table in reversed(list(sums.items())):
        for name, row in zip(names, table, strict=True):
            totals[name] = totals[name] + row if name in totals else row
    return totals


def _pair(value: Tensor) -> Tensor:
    """(2,): a sum and what it is a sum of; of a scalar, itself and 1."""
    return value.float() if value.ndim else torch.stack([value.float(), torch.ones_like(value, dtype=torch.float32)])
