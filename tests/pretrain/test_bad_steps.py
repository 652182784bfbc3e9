"""Steps that are not finite: what is kept of them, that a run survives or stops, and that they can be taken again."""

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs.children import Run, Train
from torch import Tensor, nn

from common.checkpoints import private, public, storage
from common.errors import Refusal
from common.training.checkpoints import Checkpoints
from common.training.task import Outcome, reason
from pretrain import command
from pretrain.monitoring.witness import Witness
from pretrain.objectives.absolute import Absolute

DINO = [
    "views.global.count=2",
    "objectives.dino.prototypes=32",
    "objectives.dino.hidden=16",
    "objectives.dino.bottleneck=8",
]
SHORT = ["tensorboard=false", "checkpoint_every=1", "keep=9", "monitor.held_out=0"]
BROKEN = ["optimizer.lr=1e38", "optimizer.most_skipped=4"]  # the first step throws the weights out of all bounds


def spoil(monkeypatch: pytest.MonkeyPatch, when: Callable[[float], bool]) -> None:
    """One of the losses is NaN wherever the progress says so."""
    forward = Absolute.forward

    def spoilt(self: Absolute, *given: Any) -> dict[str, Tensor]:
        result = forward(self, *given)
        return result | {"loss": result["loss"] * (math.nan if when(self.progress) else 1.0)}

    monkeypatch.setattr(Absolute, "forward", spoilt)


def content(run: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / storage.STATE, weights_only=True)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every tensor and number of a state by its place."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: each for at, inner in items for key, each in flat(inner, f"{name}/{at}").items()}
    return {name: value}


def differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    a, b = flat(one), flat(other)
    equal = lambda x, y: torch.equal(x, y) if isinstance(x, Tensor) else x == y  # noqa: E731
    return {name for name in {**a, **b} if name not in a or name not in b or not equal(a[name], b[name])}


# ---------------------------------------------------------------------------- whole runs


def test_a_run_that_breaks_stops_with_its_last_good_checkpoint(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Refusal, match="not finite in 4 steps in a row up to step 5"):
        inside(*tiny, *SHORT, *BROKEN, f"run={run}")
    told = [line for line in capsys.readouterr().out.splitlines() if "was not taken" in line]
    assert len(told) == 4
    kept = run / "flight" / "step_00000001"
    assert told[0].startswith("step 2 was not taken: the loss is not finite (absolute/loss nan, relative/loss nan")
    assert told[0].endswith(f"pretrain/run.py --resume {kept} steps=2 diagnose=true")
    assert "is not kept: there are 3 such checkpoints" in told[3]
    assert sorted(path.name for path in (run / "flight").iterdir()) == [f"step_{n:08d}" for n in (1, 2, 3)]

    good = run / "state" / "step_00000001"
    public.load_backbone(good)
    assert all(bool(torch.isfinite(value).all()) for value in state(good)["task"].values())
    assert private.damage_of(kept) is None and {path.name for path in kept.iterdir()} == {
        path.name for path in good.iterdir()
    }, "an ordinary checkpoint"
    # what the step began with is the checkpoint before it, but for the learning rate of the step that is tried
    assert {name.rpartition("/")[2] for name in differences(state(good), state(kept))} <= {"lr", "weight_decay"}
    later = differences(state(kept), state(run / "flight" / "step_00000003"))
    assert {name.split("/")[1] for name in later} <= {"step", "optimizer", "random", "task"}
    assert not [name for name in later if name.startswith("/task") and name != "/task/skipped"]
    assert not [name for name in later if name.startswith("/optimizer") and not name.endswith(("lr", "weight_decay"))]


def test_a_passing_nan_is_survived_and_taken_again(
    inside: Callable[..., int],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    images: Path,
) -> None:
    """DINO beside the positional objectives, in two parts, with dropout; only one loss of one step is NaN."""
    run, kept = tmp_path / "run", tmp_path / "run" / "flight" / "step_00000002"
    words = [*tiny, *SHORT, *DINO, "steps=6", "accumulate=2", "log_every=2", f"run={run}"]
    again = ("--resume", kept, "steps=3", "diagnose=true")
    with monkeypatch.context() as accident:
        spoil(accident, lambda progress: progress == 2 / 6)
        assert inside(*words) == 0
        assert [record["skipped"] for record in Run(run).metrics] == [0, 1, 1]
        assert "step 3 was not taken: the loss is not finite (absolute/loss nan, loss nan)" in capsys.readouterr().out
        assert Run(run).checkpoints == [1, 2, 4, 5, 6], "a skipped step has nothing new to store"
        before, recorded = (state(folder)["task"] for folder in (run / "state" / "step_00000002", kept))
        assert all(torch.equal(before[name], recorded[name]) for name in before), "no EMA, no centre"
        later = state(run / "state" / "step_00000006")["task"]
        assert any(not torch.equal(before[name], later[name]) for name in before if name.startswith("teacher."))

        there = content(run)
        assert inside(*again) == 1
        told = capsys.readouterr().out
        assert f"again      {kept}: step 3 of 6; nothing is written" in told
        assert "step 3 was not taken: the loss is not finite (absolute/loss nan, loss nan)" in told
        assert "first output that is not finite: objectives.absolute (Absolute)" in told
        assert "step 3 part 2  loss nan, absolute/loss nan, relative/loss " in told
        assert content(run) == there, "nothing is written"

        moved = tmp_path / "moved"
        shutil.copytree(images, moved)
        assert inside(*again, f"data={moved}") == 1
        next(moved.rglob("*.png")).unlink()
        with pytest.raises(Refusal, match=r"the images at data=.*are not those it began with"):
            inside(*again, f"data={moved}")
        with pytest.raises(Refusal, match=r"steps=9: .*is of step 2, of a run of 6 steps: expected 3 to 6"):
            inside("--resume", kept, "steps=9", "diagnose=true")
        (kept / "backbone.json").write_text("{}")
        with pytest.raises(Refusal, match=r"is damaged \(backbone.json has 2 bytes"):
            inside(*again)


def test_steps_taken_again_from_a_checkpoint_are_those_of_the_run(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Any checkpoint will do; rates follow from the length of the run, also where it has grown since."""
    run = tmp_path / "run"
    assert inside(*tiny, *SHORT, *DINO, "steps=4", "log_every=1", "accumulate=2", f"run={run}") == 0
    assert inside("--resume", run, "steps=5") == 0
    capsys.readouterr()
    assert inside("--resume", run / "state" / "step_00000001", "steps=3", "diagnose=true") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split("  ")[0] for line in lines] == [f"step {step} part {part}" for step in (2, 3) for part in (1, 2)]
    norms = [float(line.rpartition(" ")[2]) for line in lines]
    assert norms[::2] == norms[1::2] == [record["gradient_norm"] for record in Run(run).metrics[1:3]]
    losses = [float(re.search(r"  loss (\S+),", line)[1]) for line in lines]  # type: ignore[index]
    for step, record in enumerate(Run(run).metrics[1:3]):
        assert sum(losses[2 * step : 2 * step + 2]) / 2 == pytest.approx(record["loss"], rel=1e-6)


def test_a_run_may_be_watched_from_its_first_step(
    inside: Callable[..., int],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(monkeypatch, lambda progress: progress == 1 / 3)
    assert inside(*tiny, *SHORT, "steps=3", "diagnose=true", f"run={tmp_path / 'run'}") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "was not taken" in line)
    assert "first output that is not finite: objectives.absolute (Absolute); gradients that are not: " in line


def test_a_gradient_alone_may_be_the_trouble(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Refusal, match="2 steps in a row up to step 2"):
        inside(*tiny, *SHORT, "objectives.absolute.weight=1e38", "optimizer.most_skipped=2", f"run={run}")
    assert "every loss is finite and the gradient is not (norm inf)" in capsys.readouterr().out
    assert inside("--resume", run / "flight" / "step_00000001", "diagnose=true") == 1
    told = capsys.readouterr().out
    assert "first output that is not finite: none; " in told
    assert "gradients that are not: none; together they are too large for the type of their norm" in told


@pytest.mark.slow
def test_two_processes_keep_together_and_repeat_together(train: Train, tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = train(*tiny, *SHORT, *DINO, *BROKEN, f"run={run}", processes=2)
    assert ended.status != 0
    assert [line for line in ended.stderr.splitlines() if line.startswith("error:")] == [
        "error: the loss or its gradient was not finite in 4 steps in a row up to step 5: lower the learning rate, "
        "clip gradients, or use precision=bf16 or fp32; none of them was taken, and the last checkpoint is intact"
    ]
    public.load_backbone(run / "state" / "step_00000001")
    folder = run / "flight" / "step_00000001"
    assert len(state(folder)["random"]) == 2
    words = rf"--resume {folder} steps=2 diagnose=true"
    assert re.search(rf"torchrun --nproc-per-node 2 \S*pretrain/run\.py {words}", ended.stdout)
    again = train(*words.split(), processes=2)
    assert again.status != 0, "status 1 of both"
    assert "step 2 was not taken: " in again.stdout and "in process 0" in again.stdout
    assert "first output that is not finite: " in again.stdout


def test_a_full_disk_costs_what_is_kept_and_not_the_run(
    inside: Callable[..., int],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save = torch.save

    def full(content: Any, path: Any) -> None:
        if "flight" in str(path):
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", full)
    spoil(monkeypatch, lambda progress: progress == 1 / 3)
    assert inside(*tiny, *SHORT, "steps=3", f"run={tmp_path / 'run'}") == 0
    assert "warning: what it began with could not be written to " in capsys.readouterr().out
    assert not list((tmp_path / "run" / "flight").iterdir())


# ---------------------------------------------------------------------------- its parts


class Fp16:
    """A process alone that scales losses of fp16."""

    num_processes, is_main_process = 1, True

    def __init__(self, scale: float | None) -> None:
        self.scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)

    def unwrap_model(self, module: nn.Module) -> nn.Module:
        return module


@pytest.mark.parametrize(
    "scale, loss, expected", [(1024.0, 1.0, 0), (1024.0, math.nan, 1), (0.5, 1.0, 1), (None, 1.0, 1)]
)
def test_an_overflow_of_fp16_is_no_accident(tmp_path: Path, scale: float | None, loss: float, expected: int) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path, SimpleNamespace(), Fp16(scale))  # type: ignore[arg-type]
    outcome = Outcome([{"loss": torch.tensor(loss)}], math.inf, 0.0, 0.0)
    checkpoints.keep_bad_step(12, nn.Linear(2, 2), None, outcome, {}, said.append)
    assert len(said) == expected


def test_weights_that_are_not_finite_are_not_kept(
    inside: Callable[..., int],
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody could go on from them: a step with an infinite rate."""
    few = ["checkpoint_every=null", "checkpoint_minutes=0", "optimizer.lr=1e45", "optimizer.most_skipped=2"]
    with pytest.raises(Refusal, match="2 steps in a row up to step 3"):
        inside(*tiny, *SHORT, *few, f"run={tmp_path / 'run'}")
    assert "the weights were not finite before it (such as backbone." in capsys.readouterr().out
    assert not (tmp_path / "run" / "flight").exists()


def test_the_reason_names_the_terms_and_the_sum_last() -> None:
    good, bad = {"loss": 1.0, "a/loss": 1.0}, {"loss": math.nan, "a/loss": math.nan, "a/gain": math.nan}
    assert reason([[good, bad]], math.nan) == "the loss is not finite (a/loss nan, loss nan)"
    assert "a/loss nan in process 1" in reason([[good], [bad]], math.nan)
    assert reason([[good]], math.inf) == "every loss is finite and the gradient is not (norm inf)"


def test_a_witness_names_the_first_module_and_forgets_the_step_before() -> None:
    task = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    witness = Witness(task)
    with torch.no_grad():
        task[2].bias.fill_(math.nan)
    task(torch.ones(1, 2)).sum().backward()
    witness.before_update(task)
    assert witness.seen() == (
        "first output that is not finite: 2 (Linear); gradients that are not: none; together they are too large for "
        "the type of their norm"
    )
    task[0].weight.grad.fill_(math.inf)  # type: ignore[union-attr]
    witness.before_update(task)
    assert witness.seen().endswith("gradients that are not: 0.weight")
    witness.begin_step()
    assert witness.first is None and not witness.gradients


# ---------------------------------------------------------------------------- the command line


def test_what_is_no_checkpoint_to_repeat_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "flight" / "step_00000004"
    folder.mkdir(parents=True)
    with pytest.raises(Refusal, match="no run there"):
        command.parse(["--resume", str(folder), "diagnose=true"], "")
    (folder / "record.json").write_text("{}")
    with pytest.raises(Refusal, match=r"is a record of an earlier version: commit [0-9a-f]{7} repeats that step"):
        command.parse(["--resume", str(folder), "diagnose=true"], "")
    (folder / "record.json").unlink()
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(Refusal, match=r"it lies in no run \(expected .*config.yaml"):
        command.parse(["--resume", str(folder), "diagnose=true"], "")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(Refusal, match=r"is one checkpoint of .*: steps=N diagnose=true"):
        command.parse(["--resume", str(folder)], "")
    with pytest.raises(Refusal, match="steps=x: expected the number of the last step"):
        command.parse(["--resume", str(folder), "steps=x", "diagnose=true"], "")
    with pytest.raises(Refusal, match="leave out --overwrite"):
        command.parse(["--resume", str(folder), "diagnose=true", "--overwrite"], "")
    found = command.parse(["--resume", str(folder), "steps=7", "diagnose=true", "data=elsewhere"], "")
    assert (found.resume, found.checkpoint, found.last) == (tmp_path, folder, 7)
    assert found.words == ["diagnose=true", "data=elsewhere"], "the length of the run stays what it is"


def test_help_knows_it() -> None:
    assert "--resume CHECKPOINT steps=N diagnose=true" in command.help_text("")
