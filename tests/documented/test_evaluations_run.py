"""Every evaluation that README.md and docs/ show is made of runs of two steps, shortened by further words."""

import json
import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from documented.commands import ROOT, call, module_of, part, split
from runs.children import training_here

from evaluate.segmenting import data as scenes

LESS = {
    "fewshot": ["--shots", "1", "2", "--draws", "2"],
    "finetune": ["--steps", "2", "--log-every", "1"],
    "linear": ["--epochs", "1"],
    "segmentation": ["--steps", "2"],
    "layers": ["--images", "32"],
    "explain": ["--images", "2", "--judged", "4"],
    "compare": ["--make", "knn"],
    "export": ["--images", "2"],
}  # words that shorten an evaluation
ROW = {
    "explain": r"attention +(?:hurts more|hurts less|no difference) +\d\.\d+ +[+-]\d\.\d+ ",
    "layers": r"layer 2 +\dx\d +\d+\.\d +\d+\.\d ",
}  # how a row begins, where it is not "trained", the kind of features, and a percentage
SELFTEST, CHECKED = part("evaluate/selftest.py")
APART = [command for command in part("evaluate/") if re.search(r"compare|selftest|export|validate|--resume", command)]
TABLES = [command for command in part("evaluate/") if command not in APART]
SCENES = "accelerate launch evaluate/segmentation.py --ckpt runs/quickstart-001 --data builtin"
PAGE = (ROOT / "docs" / "evaluation.md").read_text()
TABLES += [f"{SCENES} {words}" for words in re.findall(r"^\| `(--head [^`]+)`", PAGE, re.MULTILINE)]


def judge(command: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    """Call the script of a command with its words, and those that shorten it; its exit status."""
    script, words = split(command)
    with training_here():
        return call(module_of(script), [*words, *LESS.get(Path(script).stem, []), *more], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("command", TABLES)
def test_a_table_is_printed_and_a_report_written(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = Path(split(command)[0]).stem
    monkeypatch.setattr(scenes, "SCENES", {"train": 24, "test": 8})
    if "--head knn" in command:
        monkeypatch.setitem(LESS, name, [])  # nothing is trained
    assert judge(command, monkeypatch) == 0
    out = capsys.readouterr().out
    assert re.search(ROW.get(name, r"trained +\S.* \d+\.\d "), out)
    report = Path(out.partition("\nreport: ")[2].splitlines()[0])
    assert report.parent == Path("runs") / command.partition("runs/")[2].split()[0] / "evaluate"
    assert report.stem.startswith(name) and json.loads(report.read_text())["values"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in APART if "--resume" in command])
def test_an_evaluation_goes_on(
    command: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_step: Callable[[int, Callable[[], object]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What a signal stopped after its first step does the second one and the rest."""
    signals = [signal.SIGTERM]
    at_step(1, lambda: signals and signal.raise_signal(signals.pop()))
    report = home / "runs/quickstart-001/evaluate/finetune.json"
    assert judge(command.replace(" --resume", ""), monkeypatch) == 0
    assert not report.exists() and "stopped: no report is written" in capsys.readouterr().out
    assert judge(command, monkeypatch) == 0 and json.loads(report.read_text())["values"]
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines() if re.match("step .* loss", line)]
    assert steps == ["2/2", "1/2", "2/2"], "the second training is the one from scratch"


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in APART if "compare" in command])
def test_runs_are_compared(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(command, monkeypatch) == 0
    rows = (home / "compare/compare.md").read_text().splitlines()
    for name in ("quickstart-001", "photos", r"random init \(as photos\)", r"raw pixels \(as photos\)"):
        assert any(re.match(rf"\| {name} +\| +\d+\.\d ", row) for row in rows), name
    assert "</html>" in (home / "compare/compare.html").read_text() and (home / "compare/compare.csv").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in APART if "export" in command])
def test_a_backbone_is_exported(command: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert judge(command, monkeypatch) == 0
    folder = home / "runs/quickstart-001/export"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.isfinite(model(torch.rand(1, 3, 32, 32))).all() and (folder / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in APART if "validate" in command])
def test_a_classifier_is_validated(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once the run was finetuned; in place of the authors' file one that is drawn, of labels as many as images."""
    if "trained-seed0" in command:
        assert judge("accelerate launch evaluate/finetune.py --ckpt runs/quickstart-001", monkeypatch) == 0
    shutil.copytree(home / "token_runs/tokens_lvvit", home / "runs/tokens_lvvit")
    torch.save({"state_dict": timm.create_model("lvvit_s", num_classes=3).state_dict()}, home / "lvvit.pth")
    (home / "real.json").write_text(json.dumps([[0]] * 24))
    for word, place in (("FILE", home / "lvvit.pth"), ("IMAGENET", home / "labelled")):
        command = command.replace(f" {word} ", f" {place} ")
    capsys.readouterr()
    assert judge(command, monkeypatch) == 0
    rows = {
        "trained": r"trained-seed0 +vit_\S+, \d+x\d+ px, last",
        "tokens": r"tokens_lvvit +lvvit_s, 64x64 px, student",
    }
    row = next((row for what, row in rows.items() if what in command), "timm:lvvit_s +lvvit_s, 224x224 px")
    out = capsys.readouterr().out
    assert re.search(rf"^{row} +\d+\.\d +\d+\.\d-\d+\.\d", out, re.MULTILINE)
    assert json.loads(Path(out.partition("\nreport: ")[2].splitlines()[0]).read_text())["values"]


def test_the_selftest_says_what_it_would_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge(SELFTEST, monkeypatch) == 0
    assert "74.5 ± 0.3 % expected" in capsys.readouterr().out


@pytest.mark.slow
def test_the_selftest_tells_other_weights(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of weights that are drawn, and of few images, its figures are not the published ones, and the status is 1."""
    script, words = split(CHECKED)
    weights, images = str(home / "weights.safetensors"), str(home / "labelled")
    words = [{"FILE": weights, "IMAGENET": images}.get(word, word) for word in words]
    module = module_of(script)
    for name, count in (("CLASSES", 3), ("TRAIN", 72), ("TEST", 24)):
        monkeypatch.setattr(module, name, count)
    with training_here():
        assert call(module, [*words, "--only", "knn"], monkeypatch) == 1
    assert re.search(r"^knn +\d+\.\d+ %, published 74.5 ± 0.3: NOT as published", capsys.readouterr().out, re.M)
    assert (home / "runs/selftest/knn.json").is_file(), shlex.join(words)


@pytest.mark.slow
@pytest.mark.parametrize("command", part("common/"))
def test_data_is_inspected(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge(command, monkeypatch) == 0
    out = capsys.readouterr().out
    assert "train      " in out and "colours    model.mean=[" in out
    assert Path(out.partition("\nreport: ")[2].partition(";")[0]).is_file()
