"""A classifier that is judged while it trains: weights and average, the best one kept, its head exported."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs.children import Run, Train

from common.batches.sampler import held_out
from common.checkpoints import public
from common.data import open_data
from common.errors import Refusal
from common.features.extraction import Eye, shown

SUPERVISED = ["objectives={classification: {smoothing: 0.1}}", "tensorboard=false", "batch=24", "log_every=4"]
JUDGED = [*SUPERVISED, "average=0.75", "monitor.every=4", "monitor.images=null", "monitor.held_out=0.3"]


def right(weights: Path, images: Any) -> float:
    """Share of images that a stored backbone and its head get right, both read back from their files."""
    backbone, plan, description = public.load_backbone(weights)
    head = public.load_head(weights, description)
    assert head is not None
    hits = []
    for crops, at in shown(images, Eye.of(backbone)):
        with torch.no_grad():
            pooled = backbone(crops, plan).pooled(description["pooling"])
        guesses = (pooled @ head["weight"].T + head["bias"]).argmax(1)
        hits += (guesses == torch.from_numpy(images.labels)[at]).tolist()
    return float(np.mean(hits))


def judged_images(data: Path) -> Any:
    images = open_data(str(data))
    return images.subset(held_out(len(images), 0.3, 1000)[1])


def test_last_and_best_are_what_was_measured(
    inside: Callable[..., int], tiny: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert inside(*tiny, *JUDGED, "steps=16", "optimizer.lr=0.02", f"run={run}") == 0
    records = [record for record in Run(run).metrics if "top1/average" in record]
    assert [record["step"] for record in records] == [4, 8, 12, 16]
    assert all("top1/weights" in record and "top5/weights" not in record for record in records), "three classes"
    asked = judged_images(images)
    assert right(run, asked) == records[-1]["top1/average"]
    about, best = (json.loads((run / name).read_text())["training"] for name in ("backbone.json", "best.json"))
    assert about["exported"] == best["exported"] == "average" and about["label_names"] == list(asked.classes)
    most = max(record["top1/average"] for record in records)
    assert best["right"] == most == right(run / "best.safetensors", asked)
    assert best["step"] == next(record["step"] for record in records if record["top1/average"] == most)
    said = capsys.readouterr().out
    table = [line.split() for line in said.splitlines() if line.startswith(("  last, ", "  best, "))]
    assert [row[:2] for row in table] == [[name, who] for name in ("last,", "best,") for who in ("weights", "average")]
    expected = [f"{records[-1]['top1/average']:.1%}", "-", f"{records[-1]['nll/average']:.4f}"]
    assert table[1][2:] == ["16", *expected]
    assert "auto       export = average" in said


@pytest.mark.slow
def test_a_best_one_that_was_half_written_is_written_again(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert inside(*tiny, *JUDGED, "steps=4", f"run={run}") == 0
    (run / "best_head.safetensors").write_bytes((run / "best.safetensors").read_bytes())
    about = json.loads((run / "best.json").read_text()) | {"weights_sha256": "0"}
    (run / "best.json").write_text(json.dumps(about))
    assert inside("--resume", run, "steps=8") == 0
    public.read_description(run / "best.safetensors")
    assert public.load_head(run / "best.safetensors", json.loads((run / "best.json").read_text())) is not None


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(["log_every=1"], marks=pytest.mark.slow),  # where they part, each step has a line to tell it
        ["views.global.mixup=0.8", "views.global.cutmix=1.0"],
    ],
)
def test_a_resumed_run_judges_as_an_uninterrupted_one(
    inside: Callable[..., int], at_step: Any, tiny: list[str], tmp_path: Path, more: list[str]
) -> None:
    words = [*tiny, *JUDGED, *more, "checkpoint_every=6", "keep=9"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert inside(*words, "steps=12", f"run={whole}") == 0
    assert inside(*words, "steps=12", f"run={cut}") == 0
    for later in (cut / "state").glob("step_00000012"):
        for path in later.iterdir():
            path.unlink()
        later.rmdir()
    for name in ("best.json", "best.safetensors", "best_head.safetensors"):
        (cut / name).unlink()
    assert inside("--resume", cut) == 0
    timed = ("images_per_second", "data_wait")
    one, other = (
        [{k: v for k, v in line.items() if k not in timed} for line in Run(run).metrics] for run in (whole, cut)
    )
    assert not [run for run in (whole, cut) if (run / "bad_files.txt").exists()], "an image could not be read"
    for line, again in zip(one, other, strict=True):
        assert line == again
    assert "top1/average" in one[-1]
    assert (whole / "head.safetensors").read_bytes() == (cut / "head.safetensors").read_bytes()
    assert (whole / "backbone.safetensors").read_bytes() == (cut / "backbone.safetensors").read_bytes()


def test_the_val_split_is_judged_where_the_recipe_says_so(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = ["data=builtin", "monitor.validation=val", "monitor.held_out=0", "model.mean=[0.5]", "model.std=[0.5]"]
    assert inside(*tiny, *SUPERVISED, *words, "steps=4", "monitor.every=4", f"run={run}") == 0
    assert right(run, open_data("builtin", "test")) == Run(run).metrics[-1]["top1/weights"]
    assert 0 <= Run(run).metrics[-1]["top5/weights"] <= 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["average=0.9"], "average is for recipes that train a classifier"),
        (["monitor.validation=val"], "monitor.validation is for recipes that train a classifier"),
        (["objectives.classification.weight=1", "export=average"], "export=average: no average is kept"),
        (["objectives.classification.weight=1", "export=teacher"], "export=teacher: this run has no teacher"),
        (["objectives.classification.weight=1", "average=1"], "average=1"),
    ],
)
def test_what_there_is_not_is_refused(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        inside(*tiny, *words, "steps=2", f"run={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_judge_as_one(train: Train, tiny: list[str], tmp_path: Path) -> None:
    """None counted twice, in shares that differ by one."""
    words = [*tiny, *JUDGED, "steps=4", "model.kwargs.drop_path_rate=0", "model.kwargs.proj_drop_rate=0"]
    lines = []
    for processes in (1, 2):
        run = tmp_path / str(processes)
        ended = train(*words, f"run={run}", processes=processes)
        assert ended.status == 0 and (processes == 1 or "2 x CPU" in ended.stdout), ended.stderr
        lines.append(Run(run).metrics[-1])
    for name in ("top1/weights", "top1/average"):
        assert lines[0][name] == lines[1][name]
    assert lines[0]["nll/average"] == pytest.approx(lines[1]["nll/average"], rel=1e-4)
