"""The collapse light: collapses made on purpose, and numbers that training has shown."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from common.batches.views import View
from common.models import Features
from pretrain.distillation.collapse import DIMENSIONAL, HEALTHY, ONE_PROTOTYPE, UNIFORM, judge
from pretrain.objectives import Verdict
from pretrain.objectives.dino import Dino, DinoOptions

IMAGES, WIDTH = 64, 16


def dino(centering: str = "centre") -> Dino:
    """With logits as far apart as training makes them."""
    torch.manual_seed(0)
    options = DinoOptions(
        prototypes=50, hidden=32, bottleneck=8, teacher_temperature=0.1, freeze_last_layer=0.0, centering=centering
    )
    made = Dino(options, SimpleNamespace(width=WIDTH, num_prefix_tokens=1))
    made.connect({}, {"global": View(count=2)})
    with torch.no_grad():
        for parameter in made.head.parameters():
            parameter.normal_(std=0.4)
    return made


def varied() -> Tensor:
    """Class tokens of two crops of 64 different images, crop-major."""
    torch.manual_seed(1)
    images = torch.randn(IMAGES, WIDTH)
    return torch.cat([images + 0.3 * torch.randn(IMAGES, WIDTH) for _ in range(2)])


def verdict(made: Dino, rows: Tensor, progress: float = 0.5) -> Verdict | None:
    made.teacher_head.load_state_dict(made.head.state_dict())
    given = dict.fromkeys(("student", "teacher"), Features(rows[:, None], rows[:, None], (1, 1)))
    made.begin_step(progress, measured=True)
    found = made(given, {})
    made.after_step(1.0)
    return made.verdict({name: value.item() for name, value in found.items()})


@pytest.mark.parametrize("centering", ["centre", "sinkhorn"])
def test_features_that_differ_are_healthy(centering: str) -> None:
    assert verdict(dino(centering), varied()) == HEALTHY


@pytest.mark.parametrize("centering", ["centre", "sinkhorn"])
def test_a_teacher_with_equal_logits_is_uniform(centering: str) -> None:
    made = dino(centering)
    with torch.no_grad():
        made.head.last.weight.copy_(made.head.last.weight[:1].expand(50, -1))
    found = verdict(made, varied())
    assert found == UNIFORM and found.advice and "ln K" in found.name


def test_a_teacher_with_one_large_logit_for_everyone() -> None:
    made = dino()
    with torch.no_grad():
        made.head.mlp[-1].bias.copy_(100 * torch.eye(8)[0])  # the bottleneck looks one way, whatever comes in
        made.head.last.weight[:, 0] = -1
        made.head.last.weight[7] = torch.eye(8)[0]
    assert verdict(made, varied()) == ONE_PROTOTYPE


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_features_on_a_line_are_dimensional(offset: float) -> None:
    torch.manual_seed(2)
    direction, beside = torch.randn(2, WIDTH)
    rows = 2 * torch.randn(2 * IMAGES, 1) * direction + offset * beside
    assert verdict(dino(), rows) == DIMENSIONAL
    assert verdict(dino(), rows, progress=0.05) == HEALTHY  # too early to judge features by


def test_features_at_a_point_are_dimensional_even_where_noise_fills_the_dimensions() -> None:
    rows = torch.randn(WIDTH) + 0.005 * varied()
    found = verdict(dino(), rows)
    assert found == DIMENSIONAL


def test_an_untrained_head_is_not_collapsed() -> None:
    """Its teacher is sharp already, about 1.2 nats below ln K at temperature 0.04 and 256 channels."""
    torch.manual_seed(0)
    options = DinoOptions(prototypes=1024, hidden=64, teacher_temperature=0.04, freeze_last_layer=0.0)
    made = Dino(options, SimpleNamespace(width=WIDTH, num_prefix_tokens=1))
    made.connect({}, {"global": View(count=2)})
    rows = varied() + 3 * torch.randn(WIDTH)  # images look much alike
    assert verdict(made, rows, progress=0.0) is None
    assert verdict(made, rows, progress=0.03) == HEALTHY


# Logged while a ViT of width 96 and depth 4 trained on Fashion-MNIST at 28 px, K = 1,024 (512 where the temperature is
# 0.02: no matter here):
# images, progress, loss, teacher entropy, marginal entropy, feature_std, rankme.
SEEN = [
    (HEALTHY, 64, 0.07, 6.632, 6.390, 6.708, 0.453, 3.55),
    (HEALTHY, 64, 0.99, 6.610, 6.426, 6.789, 0.661, 7.06),
    (HEALTHY, 8, 0.13, 6.778, 6.505, 6.724, 0.424, 2.60),
    (HEALTHY, 8, 0.87, 6.696, 6.419, 6.559, 0.344, 2.53),
    (HEALTHY, 64, 0.20, 6.9315, 6.700, 6.800, 0.453, 3.55),  # passing by ln K
    (ONE_PROTOTYPE, 64, 0.66, 0.616, 0.302, 1.040, 0.554, 4.42),  # centre_momentum 1: no centring
    (ONE_PROTOTYPE, 64, 0.20, 0.596, 0.212, 0.764, 0.622, 5.07),  # teacher_temperature 0.02, twice the learning rate
    (HEALTHY, 64, 0.42, 1.194, 0.627, 1.568, 0.518, 4.97),  # 0.02 and a third of it: recovered later
    (UNIFORM, 64, 0.33, 6.9317, 6.9313, 6.9313, 0.059, 1.86),  # teacher_temperature 1: no sharpening
    (DIMENSIONAL, 64, 0.20, 6.382, 6.205, 6.256, 0.025, 1.36),  # thirty times the learning rate
    (DIMENSIONAL, 64, 0.39, 6.871, 6.857, 6.858, 0.033, 1.46),
]


@pytest.mark.parametrize(("expected", "images", "progress", "loss", "teacher", "marginal", "std", "rank"), SEEN)
def test_numbers_of_real_runs(
    expected: Verdict, images: int, progress: float, loss: float, teacher: float, marginal: float, std: float,
    rank: float,
) -> None:  # fmt: skip
    numbers = {"loss": loss, "uniform": math.log(1024), "teacher_entropy": teacher, "marginal_entropy": marginal}
    assert judge(numbers | {"feature_std": std, "rankme": rank}, images, progress) == expected


def test_dino_246_and_dinov2_407() -> None:
    """Two threads whose losses did not move: 11.0902 with 65,536 prototypes, 8.317765 with 4,096."""
    for loss, prototypes in ((11.0902, 65536), (8.317765, 4096)):
        numbers = {"loss": loss, "uniform": math.log(prototypes)}
        assert judge(numbers | {"teacher_entropy": loss, "marginal_entropy": loss}, 64, 0.5) == UNIFORM


def test_a_tiny_batch_is_not_accused() -> None:
    """Two sharp images have few prototypes and few dimensions between them."""
    numbers = {"loss": 1.0, "uniform": math.log(1024), "teacher_entropy": 0.1, "marginal_entropy": math.log(1.5)}
    assert judge(numbers | {"feature_std": 0.5, "rankme": 1.5}, 2, 0.5) == HEALTHY
    assert judge(numbers | {"feature_std": 0.5, "rankme": 3.5}, 64, 0.5) == ONE_PROTOTYPE


def test_nothing_is_said_without_the_numbers() -> None:
    numbers = {"loss": 1.0, "uniform": 2.0, "teacher_entropy": 1.0, "marginal_entropy": 1.9}
    assert judge(numbers, 64, 0.5) == HEALTHY  # patches have no rankme
    assert judge({"loss": 1.0}, 64, 0.5) is None
    assert judge(numbers | {"loss": math.nan}, 64, 0.5) is None
    assert judge(numbers, 64, 0.01) is None
