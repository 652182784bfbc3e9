"""`dino`: the published loss, what a step commits, and that two processes do what one does."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks.dino import IMAGES, SMALL, dino, features, steps, together
from ranks.job import ranks
from torch import Tensor

from common.batches.views import View
from common.errors import Refusal
from common.models import Features
from pretrain import objectives
from pretrain.objectives import Pass
from pretrain.objectives.dino import Dino, DinoOptions

ROOT = Path(__file__).resolve().parents[3]


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - z.max() - math.log(np.exp(z - z.max()).sum())


def published(made: Dino, given: dict[str, Features], centre: np.ndarray) -> tuple[float, np.ndarray]:
    """DINO's loss, pair after pair, and the mean of the teacher's logits."""
    with torch.no_grad():
        student = [made.head(given[name].prefix[:, 0]).double().numpy() for name in ("student", "local")]
        teacher = made.teacher_head(given["teacher"].prefix[:, 0]).double().numpy()
    crops = [*student[0].reshape(2, IMAGES, -1), *student[1].reshape(3, IMAGES, -1)]
    total, pairs = 0.0, 0
    for g, of_teacher in enumerate(teacher.reshape(2, IMAGES, -1)):
        for v, of_student in enumerate(crops):
            if v == g:
                continue
            pairs += 1
            for z_t, z_s in zip(of_teacher, of_student, strict=True):
                total -= np.exp(log_softmax((z_t - centre) / 0.04)) @ log_softmax(z_s / 0.1) / IMAGES
    assert pairs == 8
    return total / pairs, teacher.mean(0)


@pytest.mark.parametrize(("dtype", "within"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_loss_and_centre_over_three_steps(dtype: torch.dtype, within: float) -> None:
    made, centre = dino().to(dtype), np.zeros(20)
    for step in range(3):
        given = {
            name: Features(part.tokens.to(dtype), part.prefix.to(dtype), part.grid)
            for name, part in features(step=step).items()
        }
        made.begin_step(step / 3, measured=step != 1)
        found = made(given, {})
        loss, mean = published(made, given, centre)
        assert found["loss"].item() == pytest.approx(loss, abs=within, rel=within)
        assert set(found) == {"loss"} or found["kl"].item() == pytest.approx(
            loss - found["teacher_entropy"].item(), abs=2 * within
        )
        made.after_step(0.9)
        centre = 0.9 * centre + 0.1 * mean
        np.testing.assert_allclose(made.centre.centre.double().numpy(), centre, atol=within)


def test_gradient_is_that_of_the_published_loss() -> None:
    made, given = dino(), features()
    parameter = made.head.last.weight
    (gradient,) = torch.autograd.grad(made(given, {})["loss"], parameter)
    for at in ((0, 0), (7, 3), (19, 5)):
        ends = []
        for nudge in (1e-5, -1e-5):
            moved = copy.deepcopy(made)
            with torch.no_grad():
                moved.head.last.weight[at] += nudge
            ends.append(published(moved, given, np.zeros(20))[0])
        assert gradient[at].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-7)


@pytest.mark.slow
def test_two_processes_do_what_one_does() -> None:
    both, other = ranks(together)
    assert both == other
    # Sinkhorn's targets of a share are those of the whole batch; so are centre, gradient and statistics
    for centering, joint in both.items():
        alone = steps(centering, 0, IMAGES)
        assert set(alone) == set(joint) and "1/rankme" in alone
        assert ("1/centre" in alone) == (centering == "centre")
        for name, values in alone.items():
            np.testing.assert_allclose(joint[name], values, atol=1e-10, err_msg=f"{centering} {name}")


def test_head_without_local_crops_and_without_a_class_token() -> None:
    made = Dino(DinoOptions(**SMALL), SimpleNamespace(width=8, num_prefix_tokens=0))
    made.connect({}, {"global": View(count=2)})
    assert set(made.passes) == {"student", "teacher"}
    tokens = torch.randn(4, 3, 8)
    given = dict.fromkeys(("student", "teacher"), Features(tokens, tokens[:, :0], (1, 3)))
    assert made(given, {})["student_teacher_cosine"].item() == pytest.approx(1)


def test_passes() -> None:
    made = dino()
    assert made.passes["student"] == Pass("global", crops=None)
    assert made.passes["teacher"] == Pass("global", crops=None, network="teacher", grad=False)
    assert made.passes["local"] == Pass("local", crops=None)
    ibot = SimpleNamespace(options=SimpleNamespace(view="global"))
    made.connect({"dino": made, "ibot": ibot}, {"global": View(count=2)})
    assert made.passes["student"] == Pass("global", crops=None, mask_of="ibot")
    ibot.options.view = "other"
    made.connect({"dino": made, "ibot": ibot}, {"global": View(count=2)})
    assert made.passes["student"].mask_of is None


def test_teacher_is_a_copy_that_is_not_trained() -> None:
    made = Dino(DinoOptions(**SMALL), SimpleNamespace(width=8, num_prefix_tokens=1))
    ((teacher, student),) = made.teachers()
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def step(made: Dino, progress: float, measured: bool, taken: bool = True, number: int = 0) -> dict[str, Tensor]:
    made.begin_step(progress, measured)
    made.zero_grad()
    found = made(features(step=number), {})
    found["loss"].backward()
    made.before_update()
    if taken:
        made.after_step(0.9)
    return found


def test_prototypes_are_frozen_for_their_share_of_the_training() -> None:
    made = dino(freeze_last_layer=0.25, last_layer="weight_norm")
    for progress, frozen in ((0.0, True), (0.24, True), (0.25, False), (0.9, False)):
        step(made, progress, measured=False)
        assert [parameter.grad is None for parameter in made.head.last.parameters()] == [frozen] * 2
        assert all(parameter.grad is not None for parameter in made.head.mlp.parameters())


def test_a_step_that_was_not_taken_leaves_nothing() -> None:
    made, twin = dino(), dino()
    step(made, 0.0, measured=False, taken=False)
    step(made, 0.1, measured=False, number=1)
    step(twin, 0.1, measured=False, number=1)
    for (name, mine), theirs in zip(made.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_used_prototypes_are_counted_between_measured_steps_and_survive_a_resume() -> None:
    winners: set[int] = set()
    made = dino()
    for number in range(3):
        made.begin_step(0, measured=False)
        with torch.no_grad():
            teacher = made.teacher_head(features(step=number)["teacher"].prefix[:, 0])
        winners |= set((teacher - made.centre.centre).argmax(1).tolist())
        if number == 1:
            resumed = dino()
            resumed.load_state_dict(made.state_dict())
            made = resumed
        step(made, 0, measured=False, number=number)
    found = step(made, 0, measured=True, number=8)  # tells what was used before it
    assert found["prototypes_used"].item() == len(winners) > 3
    again = step(made, 0, measured=True, number=9)
    assert again["prototypes_used"].item() < len(winners)


def test_parts_of_a_step_count_as_one() -> None:
    """Gradient accumulation: the centre of the step is that of its start, and moves once."""
    made, whole = dino(), features()
    made.begin_step(0, measured=True)
    for first, last in ((0, 3), (3, IMAGES)):
        found = made(features(first, last), {})
    made.after_step(0.9)
    twin = dino()
    twin.begin_step(0, measured=True)
    expected = twin(whole, {})
    twin.after_step(0.9)
    torch.testing.assert_close(made.centre.centre, twin.centre.centre)
    assert found["prototypes_used"] == expected["prototypes_used"]


def test_temperature_follows_its_schedule() -> None:
    made = dino(teacher_temperature={"schedule": "linear", "start": 0.04, "end": 0.08, "over": 0.5})
    seen = [step(made, progress, measured=True)["teacher_temperature"].item() for progress in (0, 0.25, 0.5, 0.9)]
    assert seen == pytest.approx([0.04, 0.06, 0.08, 0.08])


def test_statistics_without_finite_features_do_not_stop_the_step() -> None:
    """A step that is to be skipped must get as far as its loss."""
    made, given = dino(), features()
    given["student"].prefix[0, 0, 0] = float("nan")
    made.begin_step(0, measured=True)
    found = made(given, {})
    assert found["loss"].isnan() and found["rankme"].isnan()


def test_bf16_features_give_a_float32_loss() -> None:
    made = dino().float()
    given = {
        name: Features(part.tokens.bfloat16(), part.prefix.bfloat16(), part.grid) for name, part in features().items()
    }
    exact = made({name: Features(f.tokens.float(), f.prefix.float(), f.grid) for name, f in given.items()}, {})
    with torch.autocast("cpu", torch.bfloat16):
        found = made(given, {})
    assert {value.dtype for value in found.values()} == {torch.float32}
    assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"teacher_temperature": "auto"}, "teacher_temperature='auto'"),
        ({"teacher_temperature": {"schedule": "lnear", "start": 1, "end": 2}}, "linear"),
        ({"centering": "center"}, "did you mean 'centre'"),
        ({"student_temperature": 0.0}, "student_temperature=0.0"),
        ({"centre_momentum": 2.0}, "centre_momentum=2.0"),
        ({"last_layer": "normd"}, "did you mean 'normed'"),
        ({"layers": 0}, "layers=0: expected a"),
        ({"bottleneck": 0}, "bottleneck=0: expected a"),
    ],
)
def test_bad_options_are_refused_in_one_line(options: dict, said: str) -> None:
    with pytest.raises(Refusal) as refused:
        Dino(objectives.options("dino", SMALL | options), SimpleNamespace(width=8, num_prefix_tokens=1))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_views_that_leave_nothing_to_compare_are_refused() -> None:
    with pytest.raises(Refusal, match=r"views.global.count=1: use 2 or more"):
        dino().connect({}, {"global": View()})
    with pytest.raises(Refusal, match="local=global"):
        dino(local="global")
