"""What processes tell each other: one process alone, and two real ones."""

import pytest
import torch
from ranks.ibot import told, words
from ranks.job import ranks

from common.processes import collectives


def test_one_process_is_told_what_it_said() -> None:
    x = torch.arange(4.0, requires_grad=True)
    assert (collectives.processes(), collectives.rank()) == (1, 0)
    for said in (collectives.total(x), collectives.largest(x)):
        assert torch.equal(said, x) and not said.requires_grad
    assert collectives.gathered(x) is x
    assert told(0)["gathered"] == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]


def test_two_processes() -> None:
    first, second = ranks(words)
    assert (first["processes"], first["rank"], second["processes"], second["rank"]) == (2, 0, 2, 1)
    rows = [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    for found in (first, second):
        assert found["total"] == [[2 * value + 10 for value in row] for row in rows]
        assert found["count"] == 2 + 3
        assert found["largest"] == [[-value for value in row] for row in rows]
        assert found["flags"] == found["any"] == [True, True, False]
        assert found["gathered"] == rows + [[value + 10 for value in row] for row in rows]
        assert found["untouched"]
        assert found["statistics"] == [pytest.approx([0.05, 0.05]), 1]  # the first one's: 0.1 of a mean of 0.5


def test_gathered_rows_hear_the_losses_of_all() -> None:
    """Process r weighs the 12 gathered numbers by (r + 1) * 0 ... 11; a row's gradient is the sum over processes."""
    for rank, found in enumerate(ranks(words)):
        own = torch.arange(12.0).view(4, 3)[2 * rank : 2 * rank + 2]
        assert found["gradient"] == ((1 + 2) * own).tolist()


def test_alone_nobody_is_waited_for() -> None:
    first, second = ranks(words)
    assert second["alone"] == [True, True, 2, 1, 0]
    assert first["afterwards"] == second["afterwards"] == 2


def test_alone_ends_with_an_error_too() -> None:
    with pytest.raises(KeyError), collectives.single_process():
        raise KeyError
    assert collectives._single == 0
