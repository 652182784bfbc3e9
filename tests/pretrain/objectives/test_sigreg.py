"""`sigreg`: the statistic against a fine integral and a closed form, the prediction by hand, and two processes."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from ranks.job import ranks
from ranks.sigreg import VIEWS, B, D, G, L, features, made_sigreg, shared, tokens
from small import backbone
from torch import Tensor

from common.batches.views import View
from common.errors import Refusal
from pretrain.objectives import Pass
from pretrain.objectives.sigreg import Projector, WholeBatchNorm, epps_pulley
from pretrain.task import build, resolve


def integral(sample: np.ndarray, knots: int = 20_001) -> float:
    """The statistic of one sample by a complex characteristic function on a fine grid."""
    t = np.linspace(-5, 5, knots)
    away = np.abs(np.exp(1j * np.outer(t, sample)).mean(1) - np.exp(-(t**2) / 2)) ** 2
    values = away * np.exp(-(t**2) / 2)
    return float(len(sample) * ((values[1:] + values[:-1]) / 2).sum() * (t[1] - t[0]))


def closed(sample: np.ndarray) -> float:
    """The same over all t, where Gaussians integrate to Gaussians."""
    between = np.exp(-((sample[:, None] - sample) ** 2) / 2).mean()
    from_normal = np.exp(-(sample**2) / 4).mean()
    return len(sample) * math.sqrt(2 * math.pi) * (between - math.sqrt(2) * from_normal + 1 / math.sqrt(3))


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_the_statistic_is_the_integral(count: int) -> None:
    samples = np.random.default_rng(count).normal(0.4, 1.3, (2, count, 3)).clip(-2.5, 2.5)
    found = epps_pulley(torch.from_numpy(samples))
    assert found.shape == (2, 3)
    for crop, slice_ in np.ndindex(2, 3):
        sample = samples[crop, :, slice_]
        assert float(found[crop, slice_]) == pytest.approx(integral(sample), rel=1e-4)
        assert float(found[crop, slice_]) == pytest.approx(closed(sample), rel=1e-4)
    # 17 knots are all there is: of values further apart than 5 or so they see waves that are not there
    far = 4 * samples
    assert float(epps_pulley(torch.from_numpy(far))[0, 0]) == pytest.approx(integral(far[0, :, 0], knots=17), abs=1e-12)
    single = epps_pulley(torch.from_numpy(samples).float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, found.float(), atol=1e-4, rtol=1e-4)


def test_gaussian_samples_have_small_values_and_collapsed_ones_large() -> None:
    rng = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 500, 200, dtype=torch.double, generator=rng)
    # the mean over samples of N(0, 1), of any size: the integral of (1 - exp(-t^2)) exp(-t^2/2)
    expected = math.sqrt(2 * math.pi) * (1 - 1 / math.sqrt(3))
    assert float(epps_pulley(normal).mean()) == pytest.approx(expected, rel=0.1)
    at_a_point = 500 * math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))
    assert float(epps_pulley(0 * normal).mean()) == pytest.approx(at_a_point, rel=1e-4) and at_a_point > 200
    for other in (0.5 * normal, 2 * normal, normal + 1, normal.sign(), normal.abs()):
        assert float(epps_pulley(other).mean()) > 10 * expected


def plainly(made: Any, x_VBD: np.ndarray) -> tuple[float, float]:
    """Prediction and SIGReg in numpy: the projector layer by layer, crop by crop, slice by slice."""
    rows = x_VBD.reshape(-1, D)
    for layer in made.projector.mlp:
        if isinstance(layer, torch.nn.Linear):
            rows = rows @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        elif isinstance(layer, WholeBatchNorm):
            rows = (rows - rows.mean(0)) / np.sqrt(rows.var(0) + 1e-5)
            rows = rows * layer.weight.detach().numpy() + layer.bias.detach().numpy()
        else:
            rows = np.maximum(rows, 0)
    projected = rows.reshape(len(x_VBD), B, -1)
    away = []
    for crops in projected.swapaxes(0, 1):  # of an image
        centre = sum(crops[:G]) / G
        away += [(value - middle) ** 2 for crop in crops for value, middle in zip(crop, centre, strict=True)]
    directions = made.directions(torch.zeros(0, dtype=torch.double)).numpy()
    tests = [integral(crop @ direction) for crop in projected for direction in directions.T]
    return float(np.mean(away)), float(np.mean(tests))


@pytest.mark.parametrize("lam", [0.0, 0.05, 1.0])
def test_the_loss_by_hand(lam: float) -> None:
    made, x = made_sigreg(lam=lam), tokens().requires_grad_()
    made.begin_step(0.5, measured=True)
    found = made(features(x), {})
    prediction, sigreg = plainly(made, x.detach().numpy())
    assert float(found["prediction"]) == pytest.approx(prediction, abs=1e-10)
    assert float(found["sigreg"]) == pytest.approx(sigreg, rel=1e-4)
    assert float(found["loss"].detach()) == pytest.approx((1 - lam) * prediction + lam * sigreg, rel=1e-4)
    assert not any(value.requires_grad for name, value in found.items() if name != "loss")
    (gradient,) = torch.autograd.grad(found["loss"], x)
    step = torch.zeros_like(x)
    for place in ((0, 0, 0), (1, 3, 2), (G + L - 1, B - 1, D - 1)):
        step.zero_()[place] = 1e-6
        with torch.no_grad():
            above, below = (float(made(features(moved), {})["loss"]) for moved in (x + step, x - step))
        assert float(gradient[place]) == pytest.approx((above - below) / 2e-6, abs=1e-6)


def test_global_crops_alone_and_a_layer_alone() -> None:
    made = made_sigreg(layers=1)
    made.connect({}, {"global": View(size=24, count=G)})
    made.passes = {"global": made.passes["global"]}
    with torch.no_grad():
        found = made(features(tokens()[:G], ("global",)), {})
        projected = made.projector(tokens()[:G])  # linear: nothing of the batch in it
        away = (projected[0] - projected[1]).square().mean() / 4  # either is half of it from the mean
    assert float(found["prediction"]) == pytest.approx(float(away), abs=1e-12)


def test_directions_are_unit_and_others_at_every_step() -> None:
    made = made_sigreg(out=16, slices=64)
    drawn = []
    for step in (0, 1, 2, 0):
        made.begin_step(step / 3, measured=False)
        drawn.append(made.directions(torch.zeros(0)))
        assert drawn[-1].shape == (16, 64) and drawn[-1].dtype == torch.float32
        torch.testing.assert_close(drawn[-1].norm(dim=0), torch.ones(64))
    assert torch.equal(drawn[0], drawn[3])
    assert max(float((a * b).sum(0).abs().mean()) for a, b in ((drawn[0], drawn[1]), (drawn[1], drawn[2]))) < 0.4


def test_statistics_only_where_measured_and_what_they_say() -> None:
    made, x = made_sigreg(layers=1, out=D), tokens()
    with torch.no_grad():
        made.projector.mlp[0].weight.copy_(torch.eye(D))
        made.projector.mlp[0].bias.fill_(3.0)
    made.begin_step(0.5, measured=True)
    found = made(features(x), {})
    assert set(found) == {"loss", "prediction", "sigreg", "projection_std", "rankme"}
    assert float(found["projection_std"]) == pytest.approx(float(x.std(1, correction=0).mean()))
    assert 1 <= float(found["rankme"]) <= D
    made.begin_step(0.5, measured=False)
    assert set(made(features(x), {})) == {"loss"}


@pytest.mark.parametrize(
    ("progress", "spread", "name"),
    [(0.5, 0.72, "healthy"), (0.5, 0.02, "collapse"), (0.01, 0.02, None), (0.5, math.nan, None)],
)
def test_a_collapse_is_named(progress: float, spread: float, name: str | None) -> None:
    made = made_sigreg()
    made.begin_step(progress, measured=True)
    found = made.verdict({"loss": 1.0, "projection_std": spread})
    assert (found and found.name) == name and bool(found and found.advice) == (name == "collapse")


def test_half_precision_meets_the_statistic_in_single() -> None:
    made, x = made_sigreg().float(), tokens().float()
    exact = made(features(x), {})["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = made(features(x.bfloat16()), {})["loss"]
    assert loss.dtype == torch.float32 and float(loss.detach()) == pytest.approx(float(exact.detach()), rel=0.05)


def test_a_batch_norm_of_one_process_is_pytorch_s() -> None:
    ours, theirs, rows = WholeBatchNorm(D).double(), torch.nn.BatchNorm1d(D).double(), tokens().flatten(0, 1)
    torch.testing.assert_close(ours(rows), theirs(rows))
    assert torch.equal(ours.eval()(rows), ours.train()(rows))
    assert [layer.__class__.__name__ for layer in Projector([4, 6, 6, 2]).mlp] == [
        "Linear", "WholeBatchNorm", "ReLU", "Linear", "WholeBatchNorm", "ReLU", "Linear",
    ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_are_one_on_the_whole_batch() -> None:
    alone, found = shared(0, 1), ranks(shared)
    assert found[0] == found[1]
    assert found[0]["directions"] == alone["directions"]
    for name, value in alone["numbers"].items():
        np.testing.assert_allclose(found[0]["numbers"][name], value, atol=1e-12, err_msg=name)


def gradients(made: Any, x: Tensor) -> float:
    made(features(x), {})["loss"].backward()
    return max(float(parameter.grad.abs().max()) for parameter in made.parameters())


def test_collapsed_images_are_pushed_apart() -> None:
    """A single point has nothing to tell its images apart by; nearly one is spread, and nothing is infinite."""
    made = made_sigreg()
    with torch.no_grad():
        made.projector.mlp[-1].weight.mul_(1e-3)
        made.projector.mlp[-1].bias.zero_()
    before = float(made(features(tokens()), {})["projection_std"])
    optimizer = torch.optim.Adam(made.parameters(), 0.04)
    for step in range(30):
        made.begin_step(step / 30, measured=True)
        optimizer.zero_grad()
        found = made(features(tokens()), {})
        found["loss"].backward()
        optimizer.step()
    assert before < 0.01 and float(found["projection_std"]) > 0.3
    same = tokens()[:1, :1].expand(G + L, B, D).clone()
    assert math.isfinite(gradients(made_sigreg(), same))


def test_in_a_recipe() -> None:
    views = {"global": VIEWS["global"], "far": View(size=24, count=2)}
    task = build(backbone(), resolve({"sigreg": {"local": "far"}}), views)
    assert task.pooling == "class" and task.position == "full" and task.teacher is None
    assert task.objectives["sigreg"].passes == {"global": Pass("global", crops=None), "local": Pass("far", crops=None)}


@pytest.mark.parametrize(
    ("options", "views", "words"),
    [
        ({}, {"global": View(size=24)}, "compares crops of an image, and views.global.count=1: use 2 or more"),
        ({"local": "global"}, VIEWS, "objectives.sigreg.local=global is its view as well"),
        ({"view": "globl"}, VIEWS, "view 'globl'"),
        ({"lam": 1.5}, VIEWS, "objectives.sigreg.lam=1.5: expected a number from 0 to 1"),
        ({"slices": 0}, VIEWS, "objectives.sigreg.slices=0"),
        ({"widht": 4}, VIEWS, "did you mean 'width'"),
    ],
)
def test_what_is_not_understood_is_refused(options: dict[str, Any], views: dict[str, View], words: str) -> None:
    with pytest.raises(Refusal) as refused:
        build(backbone(), resolve({"sigreg": options}), views)
    assert words in str(refused.value) and "\n" not in str(refused.value)
