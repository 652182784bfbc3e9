"""Every training and audit that README.md and docs/ show is done, shortened by words that are appended."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from documented.commands import call, module_of, part, small, split
from runs.children import Run, training_here

from common.errors import Refusal


@pytest.fixture
def pretrain(home: Path) -> Iterator[Callable[..., int]]:
    """pretrain.run.main in this process, in the home folder."""
    with training_here() as main:
        yield main


TRAININGS = part("pretrain/run.py")
HELP = "python pretrain/run.py --help"
OTHERS = [command for command in TRAININGS if "flight" in command or "--resume" in command or command == HELP]


def test_help_names_every_kind_of_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert HELP in TRAININGS
    with training_here() as main, pytest.raises(SystemExit, match="0"):
        main(*split(HELP)[1])
    lines = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {"--resume", "batch=256", "objectives.absolute.keep=1.0"} <= lines


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in TRAININGS if command not in OTHERS])
def test_a_training_runs(
    command: str, home: Path, pretrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    _, words = split(command)
    shutil.rmtree(home / "runs")  # a run of that name is there, and would be refused
    assert pretrain(*small(words, home)) == 0
    out = capsys.readouterr().out
    if "--dry-run" in words:
        assert {"parameters", "memory", "speed", "whole"} <= {line.partition(" ")[0] for line in out.splitlines()}
        assert not (home / "runs").exists()
        return
    (run,) = (home / "runs").iterdir()
    assert f"done: 2 steps. The backbone is in {run}" in out and (run / "backbone.safetensors").is_file()
    assert Run(run).steps == [1, 2]
    assert f"run={run.relative_to(home)}" in words or not [word for word in words if word.startswith("run=")]


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in OTHERS if command != HELP and "flight" not in command])
def test_a_run_goes_on(command: str, home: Path, pretrain: Callable[..., int]) -> None:
    _, words = split(command)
    assert pretrain(*small(words, home)) == 0
    assert Run(home / words[words.index("--resume") + 1]).steps == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in OTHERS if "flight" in command])
def test_a_step_is_taken_again(
    command: str, home: Path, pretrain: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """The step that went wrong, the second, as the first had thrown the weights out of all bounds."""
    words = small(["vit_small", "data=~/photos", "run=runs/photos"], home)
    with pytest.raises(Refusal, match="not finite in 2 steps in a row up to step 3"):
        pretrain(*words, "steps=3", "optimizer.lr=1e38", "--overwrite")
    _, words = split(command.replace("00000122", "00000001").replace("steps=123", "steps=2"))
    capsys.readouterr()
    assert pretrain(*words) == 1
    assert "first output that is not finite: backbone.model.patch_embed.proj (Conv2d)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", part("pretrain/audit.py"))
def test_an_audit_runs(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script, words = split(command)
    leaks = "objectives.absolute.position=full" in words
    more = [] if "--ckpt" in words else small(["apl"], home)[1:]
    more += ["--data", "~/photos"] if "--input" in words else []
    with training_here():
        assert call(module_of(script), [*words, *more], monkeypatch) == (1 if leaks else 0)
    out = capsys.readouterr().out
    assert f"absolute: {'leak' if leaks else 'clean'}: " in out
    assert ("position embedding" in out) == leaks and ("high-pass residue" in out) == ("--input" in words)


@pytest.mark.slow
@pytest.mark.parametrize("command", part("pretrain/generate_labels.py"))
def test_labels_are_generated(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a small annotator in place of the one that is named, of the photos here."""
    script, words = split(command)
    (home / "labelled.labels").unlink()  # others are trained with it
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), home / "annotator.pth")
    small_one = ["--annotator", "timm:test_resnet", "--weights", "annotator.pth", "--size", "64", "--data", "~/photos"]
    assert call(module_of(script), [*words, *small_one], monkeypatch) == 0
    out = words[words.index("--out") + 1]
    assert f"done: the labels are in {out}" in capsys.readouterr().out and (home / out).is_file()
    assert (home / f"{out}.png").is_file() == ("--preview" in words)
