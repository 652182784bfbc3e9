"""`ibot` against the formula in numpy, its masks in a batch, its head shared and its own, and in two processes."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from ranks.ibot import IBOT, VIEWS, B, K, N, V, everything, features, made_ibot, masks, measured, tokens
from ranks.job import ranks
from small import Noise, backbone
from torch import nn

from common.batches.samples import Batch, Samples
from common.batches.views import View
from common.data import Images
from common.errors import Refusal
from common.models import ModelConfig, create
from pretrain.objectives import Pass
from pretrain.objectives.ibot import Ibot, IbotOptions, masked_patches
from pretrain.task import Pretraining, build, resolve

HEAD = {"prototypes": K, "hidden": 16, "bottleneck": 8}
SETTLED = {"teacher_temperature": 0.05, "freeze_last_layer": 0.0}

# ---------------------------------------------------------------------------- the formula


def softmax(z: np.ndarray) -> np.ndarray:
    exps = [math.exp(value - max(z)) for value in z]
    return np.array([value / sum(exps) for value in exps])


def sinkhorn(z_nK: np.ndarray, temperature: float) -> np.ndarray:
    """Three times: every prototype to 1/K of all, every patch to 1/n; times n."""
    q = np.exp(z_nK / temperature)
    n, k = q.shape
    for _ in range(3):
        for column in range(k):
            q[:, column] /= q[:, column].sum() * k
        for row in range(n):
            q[row] /= q[row].sum() * n
    return q * n


def by_hand(
    student: np.ndarray, teacher: np.ndarray, masked: np.ndarray, centre: np.ndarray | None, per_position: bool
) -> tuple[float, np.ndarray]:
    """Loss of logits (V, B, N, K) and masks (B, V, N), and its gradient with respect to the student's logits."""
    targets = np.zeros_like(teacher)
    places = [(v, b, p) for v in range(V) for b in range(B) for p in range(N) if masked[b, v, p]]
    if centre is not None:
        for place in places:
            targets[place] = softmax((teacher[place] - centre) / 0.05)
    else:
        for group in [[p] for p in range(N)] if per_position else [list(range(N))]:
            rows = [place for place in places if place[2] in group]
            if rows:
                found = sinkhorn(np.array([teacher[place] for place in rows]), 0.05)
                for place, target in zip(rows, found, strict=True):
                    targets[place] = target
    loss, gradient = 0.0, np.zeros_like(student)
    for v in range(V):
        for b in range(B):
            count = masked[b, v].sum()
            for p in np.flatnonzero(masked[b, v]):
                guess = softmax(student[v, b, p] / 0.1)
                loss -= (targets[v, b, p] * np.log(guess)).sum() / count / (V * B)
                gradient[v, b, p] = (guess - targets[v, b, p]) / 0.1 / count / (V * B)
    return loss, gradient


def without_heads(**options: Any) -> Ibot:
    """Tokens are logits."""
    made = made_ibot(**options)
    made.head, made.teacher_head = nn.Identity(), nn.Identity()  # type: ignore[assignment]
    return made


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("options", [{}, {"per_position": True}, {"centering": "centre"}], ids=str)
def test_by_hand(options: dict[str, Any], dtype: torch.dtype, close: float) -> None:
    made = without_heads(**options).to(dtype)
    centre = None
    if made.centre is not None:
        made.centre.centre.copy_(tokens(1)[0, 0, 0, :K])
        centre = made.centre.centre.double().numpy()
    student, teacher = (tokens(seed)[..., :K].to(dtype) for seed in (5, 6))
    student.requires_grad_()
    draws = {"masked": masks("")}
    result = made({"student": features(student), "teacher": features(teacher)}, {**draws, **masked_patches(draws)})
    there = [x.detach().double().numpy() for x in (student, teacher)]
    loss, gradient = by_hand(*there, masks("").numpy(), centre, "per_position" in options)
    assert result["loss"].dtype == dtype
    assert result["loss"].item() == pytest.approx(loss, abs=close)
    result["loss"].backward()
    assert student.grad is not None and np.abs(student.grad.numpy() - gradient).max() < close
    assert not any(value.requires_grad for name, value in result.items() if name != "loss")
    # over the 15 of 16 crops of which something is masked, the cross-entropy is that much larger
    assert (masks("").sum(2) > 0).sum() == 15
    assert (result["teacher_entropy"] + result["kl"]).item() == pytest.approx(loss * 16 / 15, abs=2 * close)


def test_statistics_by_hand() -> None:
    """Two masked patches in one crop, one in another; the teacher is sure of prototype 3, twice, and of 7."""
    made = without_heads(centering="centre")
    masked = torch.zeros(B, V, N, dtype=torch.bool)
    masked[0, 0, [2, 5]] = masked[4, 1, 8] = True
    teacher = torch.zeros(V, B, N, K, dtype=torch.float64)
    teacher[0, 0, [2, 5], 3] = teacher[1, 4, 8, 7] = 5.0
    draws = {"masked": masked}
    seen = {"student": features(torch.zeros_like(teacher)), "teacher": features(teacher)}
    result = made(seen, {**draws, **masked_patches(draws)})
    assert result["loss"].item() == pytest.approx(math.log(K) * 2 / (V * B))
    assert result["kl"].item() == pytest.approx(math.log(K)) == result["uniform"].item()
    assert result["teacher_entropy"].item() == pytest.approx(0.0, abs=1e-12)
    assert result["prototypes_used"].item() == 2
    assert result["masked"].item() == pytest.approx(3 / (V * B * N))
    assert result["marginal_entropy"].item() == pytest.approx(-2 / 3 * math.log(2 / 3) - 1 / 3 * math.log(1 / 3))
    made.begin_step(0.0, False)
    assert set(made(seen, {**draws, **masked_patches(draws)})) == {"loss"}


def test_collated_masks_by_hand() -> None:
    """Two images, two crops of three patches; crops come first."""
    masked = torch.tensor([[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]], dtype=torch.bool)  # (B, V, N)
    found = masked_patches({"masked": masked})
    assert found["where"].tolist() == [0, 2, 3 + 1, 9, 10, 11] and found["where"].dtype == torch.int64
    assert found["share"].tolist() == pytest.approx([0.5, 0.5, 1.0, *[1 / 3] * 3])
    nothing = masked_patches({"masked": torch.zeros(2, 2, 3, dtype=torch.bool)})
    assert nothing["where"].shape == nothing["share"].shape == (0,)


# ---------------------------------------------------------------------------- in a task


def task(wanted: dict[str, Any], views: dict[str, View] | None = None) -> tuple[Pretraining, Batch]:
    """A task of two crops of 3x3 patches and four images for it."""
    views = views or VIEWS
    torch.manual_seed(3)
    made = build(backbone(), resolve(wanted), views)
    samples = Samples(Images(Noise(), "noise"), views, 0, 3, made.draws, made.collates)
    made.begin_step(0.5, True)
    return made, samples.__getitems__([(0, index) for index in range(4)])


def test_in_a_task() -> None:
    made, batch = task({"ibot": HEAD | SETTLED})
    assert batch.draws["ibot/masked"].shape == (4, V, N)
    assert list(made.passes) == [
        Pass("global", crops=None, mask_of="ibot"),
        Pass("global", crops=None, network="teacher", grad=False),
    ]
    assert [student for _, student in made.teachers()] == [made.backbone, made.objectives["ibot"].head]
    pickle.dumps((made.draws, made.collates))  # as loader workers need them
    made(batch)["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in made.objectives["ibot"].head.parameters())
    assert made.objectives["ibot"].mask_token.grad.any()


def test_nothing_masked_is_no_loss_and_no_missing_gradient() -> None:
    """DistributedDataParallel waits for the gradient of every parameter."""
    made, batch = task({"ibot": HEAD | SETTLED})
    batch.draws["ibot/masked"].zero_()
    batch.draws |= {
        f"ibot/{name}": made for name, made in masked_patches({"masked": batch.draws["ibot/masked"]}).items()
    }
    report = made(batch)
    assert report["loss"] == 0 and all(value.isfinite() for value in report.values())
    report["loss"].backward()
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_masks_fit_a_view_of_another_size() -> None:
    given = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2, "dynamic_img_size": True}
    whole = create(ModelConfig("vit_tiny_patch16_224", given), 24)
    views = {"global": View(size=24), "large": View(size=[40, 32], count=2)}
    made = build(whole, resolve({"ibot": {"view": "large"} | HEAD | SETTLED, "koleo": {}}), views)
    samples = Samples(Images(Noise(), "noise"), views, 0, 3, made.draws, made.collates)
    batch = samples.__getitems__([(0, index) for index in range(3)])
    assert batch.draws["ibot/masked"].shape == (3, 2, 5 * 4)
    assert made(batch)["loss"].isfinite()


def test_a_shared_head_is_dinos() -> None:
    shared = {"shared_head": True, "prototypes": K, "centering": "centre"}
    made, batch = task({"dino": HEAD | SETTLED, "ibot": shared | SETTLED})
    dino, ibot = (made.objectives[name] for name in ("dino", "ibot"))
    assert ibot.head is dino.head and ibot.teacher_head is dino.teacher_head
    assert sorted(name for name in made.state_dict() if ".ibot." in name) == [
        "objectives.ibot.centre.centre",
        "objectives.ibot.mask_token",
    ]
    assert len(list(made.teachers())) == 2
    copied = copy.deepcopy(made).objectives
    assert copied["ibot"].head is copied["dino"].head is not dino.head
    report = made(batch)
    before = [gradient.clone() for gradient in torch.autograd.grad(report["loss"], list(dino.head.parameters()))]
    made.weights["ibot"] = 0.0
    after = torch.autograd.grad(made(batch)["loss"], list(dino.head.parameters()))
    assert all((one - other).abs().max() > 0 for one, other in zip(before, after, strict=True))


def test_the_last_layer_is_frozen_at_first() -> None:
    made, batch = task({"ibot": HEAD | SETTLED | {"freeze_last_layer": 0.2, "last_layer": "weight_norm"}})
    for progress, frozen in ((0.1, True), (0.2, False)):
        made.begin_step(progress, True)
        made(batch)["loss"].backward()
        made.before_update()
        head = made.objectives["ibot"].head
        assert all((parameter.grad is None) == frozen for parameter in head.last.parameters())
        assert all(parameter.grad is not None for parameter in head.mlp.parameters())


def test_the_centre_moves_once_per_step_that_was_taken() -> None:
    made = without_heads(centering="centre")
    draws = {"masked": masks("")}
    teacher = tokens(6)[..., :K]

    def part(logits: torch.Tensor) -> None:
        made({"student": features(tokens(5)[..., :K]), "teacher": features(logits)}, {**draws, **masked_patches(draws)})

    made.begin_step(0.0, True)
    part(teacher + 1)  # of a step that was not taken
    made.begin_step(0.0, True)
    part(teacher)
    part(teacher)
    assert made.centre is not None and not made.centre.centre.any()
    made.after_step(0.9)
    mean = teacher[masks("").transpose(0, 1)].mean(0)
    assert torch.allclose(made.centre.centre, 0.1 * mean)


def test_the_teachers_temperature_follows_its_schedule() -> None:
    made = without_heads(teacher_temperature={"schedule": "linear", "start": 0.04, "end": 0.08, "over": 0.5})
    assert [made.temperature.at(progress) for progress in (0.0, 0.25, 0.5, 0.9)] == [0.04, 0.06, 0.08, 0.08]
    draws = {"masked": masks("")}
    seen = {"student": features(tokens(5)[..., :K]), "teacher": features(tokens(6)[..., :K])}
    entropies = []
    for progress in (0.0, 0.25, 0.5):
        made.begin_step(progress, True)
        entropies.append(made(seen, {**draws, **masked_patches(draws)})["teacher_entropy"].item())
    assert entropies == sorted(entropies) and entropies[0] < entropies[-1]


def test_the_collapse_light() -> None:
    """Everybody calls all prototypes equally likely: the loss, of which crops without masks are a part, is below ln K,
    and the verdict is that it is pinned there. Teachers who differ among patches are well."""
    made = without_heads()
    draws = {"masked": masks("")}
    for student, teacher, expected in (
        (torch.zeros(V, B, N, K), torch.zeros(V, B, N, K), "uniform collapse"),
        (tokens(5)[..., :K] / 20, tokens(6)[..., :K] / 20, "healthy"),
    ):
        made.begin_step(0.5, True)
        result = made({"student": features(student), "teacher": features(teacher)}, {**draws, **masked_patches(draws)})
        verdict = made.verdict({name: value.item() for name, value in result.items()})
        assert verdict is not None and verdict.name.startswith(expected)
        assert result["loss"] < math.log(K) or expected == "healthy"
    assert made.verdict({"loss": 1.0}) is None  # nothing was measured


@pytest.mark.slow
@pytest.mark.parametrize("name", IBOT)
def test_two_processes(name: str) -> None:
    """Loss, statistics, centre and gradients are those of one process with the joint batch, where one process has
    nothing masked too."""
    expected = measured(name, IBOT[name], 0, 1)
    first, second = (process["ibot"][name] for process in ranks(everything))
    assert first == second
    for key, value in expected["numbers"].items():
        assert first["numbers"][key] == pytest.approx(value, abs=1e-7), key
    for key in ("tokens", "centre"):
        assert first[key] == pytest.approx(np.asarray(expected[key]), abs=1e-7)
    assert len(first["head"]) == len(expected["head"]) == 7
    for one, other in zip(first["head"], expected["head"], strict=True):
        assert np.abs(np.subtract(one, other)).max() < 1e-7


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"centering": "sinkhron"}, "did you mean 'sinkhorn'"),
        ({"centering": "centre", "per_position": True}, "set centering=sinkhorn"),
        ({"mask_probability": 0.0}, "mask_probability=0.0: expected a number above 0"),
        (
            {"mask_ratio": [0.5, 0.1]},
            "mask_ratio=[0.5, 0.1]: expected two numbers above 0, at most 1, the",
        ),
        ({"mask_ratio": [0.1]}, "mask_ratio=[0.1]: expected two numbers"),
        ({"student_temperature": 0.0}, "student_temperature=0.0"),
        ({"centre_momentum": 1.5}, "centre_momentum=1.5"),
        ({"last_layer": "norm"}, "last_layer='norm'"),
        ({"teacher_temperature": {"schedule": "cosin", "start": 0.1}}, "did you mean 'cosine'"),
        ({"shared_head": True}, "not among the objectives: add dino"),
    ],
    ids=str,
)
def test_refused_in_one_line(wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal) as refused:
        task({"ibot": HEAD | SETTLED | wanted})
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert "ibot" in str(refused.value)


def test_a_shared_head_has_the_sizes_of_dinos() -> None:
    with pytest.raises(Refusal, match=r"ibot.prototypes=12 goes with a head of its own.*where prototypes=10"):
        task({"dino": HEAD | SETTLED, "ibot": {"shared_head": True, "prototypes": 12} | SETTLED})
    task({"dino": HEAD | SETTLED, "ibot": {"shared_head": True, "prototypes": K} | SETTLED})


@pytest.mark.parametrize("name", ["swin", "nest"])
def test_a_backbone_without_a_mask_token(name: str) -> None:
    with pytest.raises(Refusal, match=r"`ibot` needs a backbone that takes a mask token.*use a plain ViT or DeiT"):
        Ibot(IbotOptions(**HEAD, **SETTLED), backbone(name))
