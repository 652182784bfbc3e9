"""Which backbone a run leaves for evaluation, and that it is never a broken one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks.monitors import DINO
from runs.children import Run
from safetensors.torch import load_file

from common.checkpoints import private
from common.checkpoints.public import load_backbone
from common.errors import Refusal
from evaluate.job import subjects
from pretrain.checkpoints import PretrainCheckpoints

Main = Callable[..., int]
WITH_DINO = ["views.global.count=2", *(f"objectives.dino.{name}={value}" for name, value in DINO.items())]
PAIR = ["backbone.json", "backbone.safetensors"]
BOTH = [*PAIR, "student.json", "student.safetensors"]


def is_of(file: Path, who: str, step: int) -> dict[str, Any]:
    """Checks that `file` is the backbone of `who` in the newest state; its description."""
    run = next(parent for parent in file.parents if (parent / "state").exists())
    state = torch.load(run / "state" / f"step_{step:08d}" / "state.pt", weights_only=True)["task"]
    part = "backbone" if who == "student" else who
    backbone, plan, about = load_backbone(file)
    assert all(torch.equal(tensor, state[f"{part}.model.{key}"]) for key, tensor in backbone.model.state_dict().items())
    assert about["training"]["exported"] == who and about["training"]["step"] == step
    assert plan.position == about["position"]
    return about


def test_the_teacher_where_there_is_one_else_the_student(inside: Main, tiny: list[str]) -> None:
    still = [*tiny, "steps=3", "tensorboard=false", "monitor.held_out=0"]
    assert inside(*still, *WITH_DINO, "run=dino") == inside(*still, "run=positional") == 0
    about = is_of(Path("dino/backbone.safetensors").absolute(), "teacher", 3)
    assert (about["position"], about["pooling"]) == ("full", "class")
    about = is_of(Path("positional/backbone.safetensors").absolute(), "student", 3)
    assert (about["position"], about["pooling"]) == ("none", "mean")
    assert not list(Path().glob("*/student.*"))


@pytest.mark.slow
def test_both_and_then_only_one(inside: Main, tiny: list[str]) -> None:
    """A second pair of files: whole, in the manifest, and gone once it is no longer exported."""
    run = Path("run").absolute()
    assert inside(*tiny, *WITH_DINO, f"run={run}", "steps=2", "export=both") == 0
    newest = run / "state" / "step_00000002"
    for place in (run, newest):
        is_of(place / "backbone.safetensors", "teacher", 2)
        is_of(place / "student.safetensors", "student", 2)
    manifest = json.loads((newest / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted([*BOTH, "state.pt"])
    assert subjects.subject_of(str(run / "student.safetensors")).plan.position == "full"
    assert inside("--resume", run, "steps=3", "export=student") == 0
    is_of(run / "backbone.safetensors", "student", 3)
    assert (
        sorted(path.name for path in run.glob("*.[sj][as][fo]*") if path.is_file() and path.stem != "metrics") == PAIR
    )
    with (newest / "student.safetensors").open("ab") as file:
        file.write(b"x")
    (damage,) = private._damage(newest)
    assert damage.startswith("student.safetensors has ")


def test_a_run_begins_from_another(inside: Main, tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """model.init: the first losses are those of the backbone it begins from, and the checkpoint tells where from."""
    still = [*tiny, "tensorboard=false", "monitor.held_out=0", "optimizer.lr=0", "optimizer.min_lr=0"]
    for name, seed, words in (("first", 0, []), ("same", 0, ["model.init=first"]), ("other", 1, ["model.init=first"])):
        assert inside(*still, *words, f"run={name}", f"seed={seed}", "steps=2") == 0
    first, same, other = (Run(Path(name)) for name in ("first", "same", "other"))
    assert same.losses == first.losses != other.losses
    mine, theirs = (load_file(f"{name}/backbone.safetensors") for name in ("other", "first"))
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == ["pos_embed"]  # never trained
    about = load_backbone("other")[2]["training"]
    assert about["init"] == str(Path("first").absolute()) and about["begun_from"].startswith("weights of ")
    assert f"weights of {Path('first').absolute()}" in capsys.readouterr().out
    with pytest.raises(Refusal, match=r"model.init=.*/first holds the weights of another model: .* model.kwargs="):
        inside(*still, "model.init=first", "model.kwargs.depth=3", "run=deeper", "steps=2")
    assert not Path("deeper").exists()


def test_weights_that_are_not_finite_are_not_written(
    inside: Main, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def poisoned(
        self: PretrainCheckpoints, step: int, task: Any, *rest: Any, save: Any = PretrainCheckpoints.save
    ) -> None:
        if step >= 8:
            task.backbone.model.norm.bias.data[3] = torch.nan
        save(self, step, task, *rest)

    run = Path("run").absolute()
    monkeypatch.setattr(PretrainCheckpoints, "save", poisoned)
    with pytest.raises(Refusal) as refusal:
        inside(*tiny, f"run={run}", "steps=12")
    message = str(refusal.value)
    assert "not finite after step 8 (such as backbone.model.norm.bias)" in message and "\n" not in message
    assert "step_00000004, is intact" in message and f"--resume {run}" in message and "optimizer.lr" in message
    assert Run(run).checkpoints == [4] and load_backbone(run)[2]["training"]["step"] == 4
    with pytest.raises(Refusal, match="there is no earlier checkpoint"):
        inside(*tiny, "run=none", "steps=8", "checkpoint_every=8")
    monkeypatch.undo()
    assert inside("--resume", run) == 0 and Run(run).steps == list(range(1, 13))
