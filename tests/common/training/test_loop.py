"""What `fit` does with a step that is not finite, how it clips, and whom a schedule of the weight decay reaches."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from ranks.job import ranks
from torch import Tensor, nn

from common.batches import samples
from common.errors import Refusal
from common.training import ema
from common.training.averages import Averages
from common.training.checkpoints import Checkpoints
from common.training.loop import fit
from common.training.optim import Optimization, clip_gradients
from common.training.random_state import Snapshot
from common.training.run import Run
from common.training.task import Outcome, Task
from common.training.tracking import Progress
from evaluate.segmenting.data import IGNORED
from evaluate.segmenting.training import Segmentation
from evaluate.segmenting.transforms import MASK

GOOD, NAN, INF, STEEP = "good", "nan loss", "inf loss, finite gradient", "finite loss, nan gradient"


@dataclass
class Batch:
    x: Tensor
    kind: str = GOOD

    def to(self, device: torch.device) -> "Batch":
        return self


class Toy(Task):
    """Two layers and a teacher that follows them; it keeps what it was told."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        self.norm: nn.Module = (
            nn.BatchNorm1d(3, affine=False) if normed else nn.Identity()
        )  # its running statistics are of a process
        self.teacher = ema.copy_of(self.student)
        self.story: Story | None = None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        loss = self.student(self.norm(batch.x)).square().mean()
        if batch.kind == NAN:
            loss = loss * math.nan
        elif batch.kind == INF:
            loss = loss + math.inf
        elif batch.kind == STEEP:
            loss = loss + (0 * self.student[0].weight).sum().sqrt()
        return {"loss": loss, "size": loss.new_tensor(float(len(batch.x)))}

    def begin_step(self, progress: float, measured: bool) -> None:
        self.story.begin_step(progress, measured)

    def after_step(self, taken: bool) -> None:
        if taken:
            ema.follow(self.teacher, self.student, 0.9)
        self.story.after_step(taken)


@dataclass
class Story:
    """What a run was told, and what it changed."""

    task: Toy
    optimizer: Any
    begun: list[tuple[float, bool]] = field(default_factory=list)
    taken: list[bool] = field(default_factory=list)
    states: list[str] = field(default_factory=list)  # after each step, to the bit
    kept: list[tuple[int, list[dict[str, float]], float, str]] = field(default_factory=list)
    tracked: list[dict[str, Any]] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)
    groups: list[list[tuple[float, float]]] = field(default_factory=list)  # (lr, weight decay) of each group

    def begin_step(self, progress: float, measured: bool) -> None:
        self.begun.append((progress, measured))
        self.groups.append([(group["lr"], group["weight_decay"]) for group in self.optimizer.param_groups])

    def after_step(self, taken: bool) -> None:
        self.taken.append(taken)
        self.states.append(self.state())

    def state(self) -> str:
        """Weights, teacher and the optimizer's moments, to the bit; not the learning rate, which is the step's."""
        moments = [
            value for of_one in self.optimizer.state_dict()["state"].values() for _, value in sorted(of_one.items())
        ]
        return str([value.double().tolist() for value in [*self.task.state_dict().values(), *moments]])


class Kept(Checkpoints):
    """Checkpoints that are counted and not written."""

    story: Story

    def save(self, step: int, *_: Any) -> None:
        self.story.saved.append(step)

    def keep_bad_step(self, step: int, task: Any, optimizer: Any, outcome: Outcome, random: Any, say: Any) -> None:
        self.story.kept.append((step, outcome.terms, outcome.norm, self.story.state()))


def batches(kinds: list[str], rank: int = 0, rows: int = 5) -> Iterator[Batch]:
    """Good batches are the same ones whatever stands between them."""
    generator = torch.Generator().manual_seed(7 + rank)
    for kind in kinds:
        yield Batch(torch.randn(rows, 3, generator=generator) if kind == GOOD else torch.ones(rows, 3), kind)


def told(
    kinds: list[str], accumulate: int = 1, skipped: int = 0, log_every: int = 1, normed: bool = False, **options: Any
) -> Story:
    """Train the toy on batches of these kinds."""
    accelerator = Accelerator(cpu=True)
    toy = Toy(normed)
    groups = [
        {"params": [layer.weight for layer in toy.student], "weight_decay": 0.1, "decays": True, "lr_scale": 1.0},
        {"params": [layer.bias for layer in toy.student], "weight_decay": 0.0, "decays": False, "lr_scale": 0.5},
    ]
    task, optimizer = accelerator.prepare(toy, torch.optim.AdamW(groups, lr=0.0))
    toy.story = story = Story(toy, optimizer)
    settings = SimpleNamespace(batch=5, log_every=log_every, checkpoint_every=None, checkpoint_minutes=0.0, keep=1)
    checkpoints = Kept(Path("unwritten"), settings, accelerator)  # type: ignore[arg-type]
    checkpoints.story = story
    steps = len(kinds) // accumulate
    run = Run(
        accelerator,
        task,
        Optimization(optimizer, lambda step: 0.1, accumulate=accumulate, **{"clip": 1.0} | options),
        checkpoints,
        batches(kinds, accelerator.process_index),  # type: ignore[arg-type]
        SimpleNamespace(write=lambda _, record: story.tracked.append(record), sync=None),  # type: ignore[arg-type]
        Progress(steps, 0, active=False),
        SimpleNamespace(received=None, within=lambda longest: nullcontext()),  # type: ignore[arg-type]
        0,
        steps,
    )
    run.skipped = skipped
    fit(run)
    return story


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kind", [NAN, INF, STEEP])
def test_a_step_that_is_not_finite_changes_nothing(kind: str, normed: bool) -> None:
    """Running statistics, which forward passes change, included."""
    story = told([GOOD, GOOD, kind, GOOD], normed=normed)
    assert story.taken == [True, True, False, True]
    assert story.states[1] == story.states[2] != story.states[3]
    without = told([GOOD, GOOD, GOOD], normed=normed)
    assert story.states[3] == without.states[2], "as if the batch had never been there"
    assert [record["skipped"] for record in story.tracked] == [0, 0, 1, 1]
    assert math.isfinite(story.tracked[2]["loss"]) == (kind == STEEP)
    assert math.isnan(story.tracked[2]["gradient_norm"])


def test_it_is_kept_as_it_was() -> None:
    story = told([GOOD, GOOD, GOOD, NAN], accumulate=2)
    ((step, results, norm, state),) = story.kept
    assert (step, len(results)) == (2, 2), "both parts of the step"
    assert math.isfinite(results[0]["loss"]) and math.isnan(results[1]["loss"])
    assert math.isnan(norm)
    assert state == story.states[0]
    assert not told([GOOD, GOOD]).kept


def test_one_bad_part_is_enough_and_the_next_step_begins_without_its_gradient() -> None:
    story = told([GOOD, GOOD, NAN, GOOD, GOOD, GOOD], accumulate=2)
    assert story.taken == [True, False, True]
    assert story.states[1] == story.states[0] != story.states[2]


def test_running_statistics_are_put_back() -> None:
    """A forward pass changes them before anybody knows that it went wrong: a NaN would stay in every checkpoint."""
    norm = nn.BatchNorm1d(3)
    norm(torch.randn(4, 3))
    before = Snapshot(norm)
    kept = {name: value.clone() for name, value in norm.state_dict().items()}
    norm(torch.full((4, 3), math.nan))
    assert not torch.isfinite(norm.running_mean).any()
    before.put_back_buffers()
    assert not [name for name, value in norm.state_dict().items() if not torch.equal(value, kept[name])]


def test_so_many_in_a_row_stop_the_run() -> None:
    story = told([NAN, NAN, GOOD, NAN, NAN, GOOD], most_skipped=3)
    assert story.taken == [False, False, True, False, False, True], "never three in a row"
    assert story.tracked[-1]["skipped"] == 4
    with pytest.raises(Refusal, match=r"not finite in 3 steps in a row up to step 4.*learning rate.*intact"):
        told([GOOD, NAN, NAN, NAN, GOOD], most_skipped=3)


def test_steps_skipped_before_an_interruption_still_count() -> None:
    assert told([GOOD, NAN], skipped=7).tracked[-1]["skipped"] == 8


def test_the_task_hears_the_progress_and_whether_the_step_is_logged() -> None:
    story = told([GOOD] * 5, log_every=2)
    assert story.begun == [(0.0, False), (0.2, True), (0.4, False), (0.6, True), (0.8, True)]


def test_a_schedule_of_the_weight_decay_reaches_what_decays() -> None:
    story = told([GOOD] * 3, decay=lambda step: 0.25 * (step + 1))
    assert story.groups == [[(0.1, decay), (0.05, 0.0)] for decay in (0.25, 0.5, 0.75)]
    assert [record["weight_decay"] for record in story.tracked] == [0.25, 0.5, 0.75]
    constant = told([GOOD] * 3)
    assert constant.groups == [[(0.1, 0.1), (0.05, 0.0)]] * 3
    assert "weight_decay" not in constant.tracked[0]


@pytest.mark.parametrize("most", [0.0, 0.7, 1e9])
def test_per_tensor_clipping_is_torch_clipping_of_each_tensor_alone(most: float) -> None:
    accelerator = Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(0)
    gradients = [scale * torch.randn(4, 3, generator=generator) for scale in (0.01, 1.0, 30.0)]
    parameters = [nn.Parameter(torch.zeros(4, 3)) for _ in range(4)]  # the last has no gradient
    for parameter, gradient in zip(parameters, gradients, strict=False):
        parameter.grad = gradient.clone()
    norm = clip_gradients(accelerator, parameters, most, "per_tensor")
    assert norm == pytest.approx(torch.cat(gradients).norm().item(), rel=1e-6)
    for parameter, gradient in zip(parameters, gradients, strict=False):
        alone = nn.Parameter(torch.zeros(4, 3))
        alone.grad = gradient.clone()
        if most:
            nn.utils.clip_grad_norm_([alone], most)
        torch.testing.assert_close(parameter.grad, alone.grad, rtol=1e-6, atol=0)
    assert parameters[3].grad is None


def test_the_two_ways_to_clip_differ() -> None:
    per_tensor, together = (told([GOOD] * 2, clip=0.01, clip_by=by) for by in ("per_tensor", "global"))
    assert per_tensor.tracked[0]["gradient_norm"] == pytest.approx(together.tracked[0]["gradient_norm"])
    assert per_tensor.states[-1] != together.states[-1]


@pytest.mark.slow
def test_what_one_process_meets_both_skip() -> None:
    told_by = ranks(one_meets_it)
    for kind in (NAN, INF, STEEP):
        first, second = (who[kind] for who in told_by)
        assert first["taken"] == second["taken"] == [True, False, True]
        assert first["states"] == second["states"], "the same weights in both"
        assert first["states"][0] == first["states"][1] != first["states"][2]
        assert first["kept"] == second["kept"] == [2]
        assert first["skipped"] == second["skipped"] == 1
        assert first["refused"] == second["refused"]
        assert "2 steps in a row" in first["refused"]


def one_meets_it(rank: int, processes: int) -> dict[str, Any]:
    """Process 1 meets what is not finite; both tell what they did."""
    mine = {}
    for kind in (NAN, INF, STEEP):
        here = kind if rank == 1 else GOOD
        story = told([GOOD, here, GOOD])
        try:
            told([GOOD, here, here], most_skipped=2)
            refused = ""
        except Refusal as refusal:
            refused = str(refusal)
        mine[kind] = {
            "taken": story.taken,
            "states": story.states,
            "kept": [step for step, *_ in story.kept],
            "skipped": story.tracked[-1]["skipped"],
            "refused": refused,
        }
    return mine


def step_means(results: list[dict[str, Tensor]]) -> dict[str, float]:
    """What is logged of one step with these parts."""
    averages = Averages()
    averages.add(results, 0.0, taken=True)
    found = averages.means(Accelerator(cpu=True))
    assert found.pop("gradient_norm") == 0
    return found


def test_a_pair_is_averaged_over_what_it_counts() -> None:
    results = [
        {"loss": torch.tensor(1.0), "right": torch.tensor([1, 4])},
        {"loss": torch.tensor(2.0), "right": torch.tensor([5, 6])},
        {"loss": torch.tensor(6.0), "right": torch.tensor([0, 0])},
    ]
    assert step_means(results) == {"loss": 3.0, "right": pytest.approx(0.6)}
    assert step_means(results[2:])["right"] == 0


def test_ignored_pixels_leave_a_segmentation_the_same_in_one_part_and_in_several() -> None:
    """Crops of unequally many labelled pixels: loss, gradient and the accuracy that is logged."""
    torch.manual_seed(0)
    head = nn.Conv2d(3, 4, 1)
    task = Segmentation(lambda images: {"logits": head(images), "auxiliary": head(images) ** 2}, 0.4)  # type: ignore[arg-type]
    images, masks = torch.rand(4, 3, 6, 6), torch.randint(0, 4, (4, 6, 6))
    masks[0, 1:], masks[1, :, 2:], masks[3] = IGNORED, IGNORED, IGNORED
    found = []
    for parts in (1, 2, 4):
        head.zero_grad()
        results = []
        for rows in torch.arange(4).chunk(parts):
            batch = samples.Batch({"global": images[rows]}, rows, {MASK: masks[rows].to(torch.int16)})
            results.append(task(batch))
            (results[-1]["loss"] / parts).backward()
        found.append((step_means(results), head.weight.grad.clone()))
    right = (head(images).argmax(1) == masks)[masks != IGNORED].double().mean().item()
    for numbers, gradient in found:
        assert numbers == pytest.approx(found[0][0], rel=1e-6) and numbers["pixel_accuracy"] == pytest.approx(right)
        torch.testing.assert_close(gradient, found[0][1], atol=1e-7, rtol=1e-5)
