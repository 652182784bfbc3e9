"""Means over the steps between two lines of a log, by hand; cut by a checkpoint they are the same."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from common.training.averages import Averages

CPU = torch.device("cpu")


def step(loss: float, right: float, known: float, **more: float) -> dict[str, Tensor]:
    """What one part returns: a scalar, a sum with its count, and statistics that some steps alone have."""
    return {"loss": torch.tensor(loss), "accuracy": torch.tensor([right, known])} | {
        name: torch.tensor(value) for name, value in more.items()
    }


def test_means_are_over_steps_and_parts_and_a_count_weighs_its_sum() -> None:
    averages, accelerator = Averages(), Accelerator(cpu=True)
    averages.add([step(1.0, 1, 1), step(2.0, 0, 3)], 1.0, taken=True)
    averages.add([step(math.nan, 4, 4), step(1.0, 0, 0)], math.nan, taken=False)  # left out
    averages.add([step(4.0, 0, 0, entropy=7.0), step(5.0, 2, 4, entropy=9.0)], 4.0, taken=True)
    assert averages.means(accelerator) == {
        "loss": 3.0, "accuracy": pytest.approx(3 / 8), "entropy": 8.0, "gradient_norm": 2.5
    }  # fmt: skip
    averages.add([step(6.0, 0, 0)], 3.0, taken=True)  # nothing is left of before; of nothing known: 0
    assert averages.means(accelerator) == {"loss": 6.0, "accuracy": 0.0, "gradient_norm": 3.0}
    averages.add([step(1 / 3, 1, 2)], 1.0, taken=True)
    averages.add([step(math.nan, 1, 2, entropy=1.0)], math.inf, taken=False)  # only the skipped one has entropy
    assert averages.means(accelerator)["entropy"] == 1.0
    averages.add([step(math.inf, 1, 2)], math.inf, taken=False)  # none was taken: what there is
    assert averages.means(accelerator)["loss"] == math.inf


def test_a_single_step_keeps_its_bits() -> None:
    value = torch.rand(()) / 3
    averages = Averages()
    averages.add([{"loss": value}], 0.1, taken=True)
    assert averages.means(Accelerator(cpu=True)) == {"loss": value.item(), "gradient_norm": 0.1}


@pytest.mark.parametrize("processes", [1, 3])
def test_a_checkpoint_between_two_lines_changes_nothing(processes: int) -> None:
    """Also where others go on: 3 processes take equal shares of what two had."""
    rng = torch.Generator().manual_seed(0)
    parts = [[step(*torch.rand(3, generator=rng).tolist())] for _ in range(6)]
    whole = Averages()
    for part in parts:
        whole.add(part, 2.0, taken=True)
    both = [Averages(), Averages()] if processes > 1 else [Averages()]
    for number, part in enumerate(parts[:4]):
        both[number % len(both)].add(part, 2.0, taken=True)
    states = [torch_saved(averages.state()) for averages in both]
    resumed = [Averages() for _ in range(processes)]
    for process, averages in enumerate(resumed):
        averages.load(states, process, processes, CPU)
    for part in parts[4:]:
        resumed[0].add(part, 2.0, taken=True)
    found = resumed[0]
    for other in resumed[1:]:  # what a sum over processes does
        for names, table in other.sums[True].items():
            found.sums[True][names] = found.sums[True][names] + table
    expected = whole.means(Accelerator(cpu=True))
    assert found.means(Accelerator(cpu=True)) == (pytest.approx(expected) if processes > 1 else expected)
    Averages().load([], 0, 1, CPU)  # of a checkpoint from before they were kept


def torch_saved(state: dict) -> dict:
    """As a checkpoint gives it back."""
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
