"""`koleo` against the formula in numpy, with duplicates, and in two processes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from ranks.ibot import KOLEO, VIEWS, B, D, V, everything, made_ibot, made_koleo, spread, tokens
from ranks.job import ranks
from small import NONE, backbone

from common.batches.views import View
from common.errors import Refusal
from common.models import Features
from pretrain.objectives import Pass
from pretrain.task import build, resolve


def by_hand(x_VBD: np.ndarray) -> float:
    """-mean_i log(|x_i - x_j| + 1e-8), j the nearest other image of the same crop, all of length 1."""
    total, count = 0.0, 0
    for crop in x_VBD:
        unit = [row / max(math.sqrt(sum(value * value for value in row)), 1e-8) for row in crop]
        for i, one in enumerate(unit):
            nearest = min(math.sqrt(((one - other) ** 2).sum()) for j, other in enumerate(unit) if j != i)
            total -= math.log(nearest + 1e-8)
            count += 1
    return total / count


def run(class_tokens: torch.Tensor, made: Any = None) -> dict[str, torch.Tensor]:
    """`koleo` on class tokens (V, B, D)."""
    rows = class_tokens.flatten(0, 1)[:, None]
    return (made or made_koleo())({"student": Features(rows.expand(-1, 9, -1), rows, (3, 3), NONE)}, {})


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_by_hand(dtype: torch.dtype, close: float) -> None:
    x = tokens(8)[:, :, 0].to(dtype).requires_grad_()
    found = run(x)
    assert found["loss"].dtype == dtype
    assert found["loss"].item() == pytest.approx(by_hand(x.detach().double().numpy()), abs=close)
    found["loss"].backward()
    gradient = np.zeros((V, B, D))
    for place in np.ndindex(V, B, 3):  # three of the channels
        step = np.zeros((V, B, D))
        step[place] = 1e-6
        at = x.detach().double().numpy()
        gradient[place] = (by_hand(at + step) - by_hand(at - step)) / 2e-6
    assert x.grad is not None
    assert np.abs(x.grad.numpy()[..., :3] - gradient[..., :3]).max() < 10 * close


def test_crops_are_no_neighbours_of_each_other() -> None:
    """Two equal crops: taken together every distance would be 0, -log(1e-8) = 18.4."""
    one = tokens(8)[:1, :, 0]
    assert run(torch.cat([one, one]))["loss"].item() == pytest.approx(by_hand(one.numpy()), abs=1e-12)


def test_equal_images_push_nobody_to_infinity() -> None:
    x = tokens(8)[:, :, 0].float()
    x[:, 1] = x[:, 0]
    x.requires_grad_()
    run(x)["loss"].backward()
    assert x.grad is not None and 0 < x.grad.abs().max() < 1  # from a distance of 1e-8 it would be millions
    same = x[:1, :1].detach().repeat(1, B, 1).requires_grad_()
    loss = run(same, made_koleo(local=True))["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(-math.log(1e-8), abs=1e-5)
    assert same.grad is not None and not same.grad.any()


def test_a_class_token_of_zeros() -> None:
    x = tokens(8)[:, :, 0].float()
    x[:, 2] = 0.0  # nothing to bring to length 1
    x.requires_grad_()
    loss = run(x)["loss"]
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()


def test_statistics_only_where_measured() -> None:
    made = made_koleo()
    assert set(run(tokens(8)[:, :, 0], made)) == {"loss", "distance"}
    made.begin_step(0.5, False)
    assert set(run(tokens(8)[:, :, 0], made)) == {"loss"}


def test_without_a_class_token_the_mean_patch_stands_for_the_image() -> None:
    rows = tokens(9).flatten(0, 1)
    found = made_koleo()({"student": Features(rows, rows[:, :0], (3, 3), NONE)}, {})
    assert found["loss"].item() == pytest.approx(by_hand(tokens(9).mean(2).numpy()), abs=1e-6)


def test_one_image_has_no_neighbour() -> None:
    with pytest.raises(Refusal, match="koleo needs at least two images") as refused:
        run(tokens(8)[:, :1, 0])
    assert "\n" not in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", KOLEO)
def test_two_processes(name: str) -> None:
    """Neighbours among all images give one process's loss and gradient of the joint batch; `local` gives the mean of
    two losses that each know half of it."""
    found = [process["koleo"][name] for process in ranks(everything)]
    assert found[0] == found[1]
    if name == "all":
        expected = spread({}, 0, 1)
    else:
        halves = [spread({}, rank, 2) for rank in (0, 1)]
        expected = {
            "loss": np.mean([half["loss"] for half in halves]),
            "tokens": np.mean([half["tokens"] for half in halves], 0),
        }
        assert expected["loss"] < spread({}, 0, 1)["loss"]
    assert found[0]["loss"] == pytest.approx(expected["loss"], abs=1e-12)
    assert np.abs(np.subtract(found[0]["tokens"], expected["tokens"])).max() < 1e-12


def test_the_pass_of_ibot_serves_both() -> None:
    made = made_koleo()
    assert made.passes == {"student": Pass("global", crops=None)}
    made.connect({"koleo": made, "ibot": made_ibot()}, VIEWS)
    assert made.passes == {"student": Pass("global", crops=None, mask_of="ibot")}
    made = made_koleo(view="other")
    made.connect({"ibot": made_ibot()}, {**VIEWS, "other": View(size=24)})
    assert made.passes == {"student": Pass("other", crops=None)}


def test_in_a_recipe_of_its_own() -> None:
    made = build(backbone(), resolve({"koleo": {}}), VIEWS)
    assert made.weights == {"koleo": 0.1}
    assert made.pooling == "class"
