"""What is measured on held-out images: the live control, the pictures, the worth of frozen features."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ranks.job import ranks
from ranks.monitors import BROKEN, DINO, made, measured
from runs.children import Run, Train
from small import Noise

from common.batches.samples import Samples
from common.batches.unreadable import NO_LIMIT
from common.batches.views import View
from common.data import Images
from common.features.extraction import extract
from common.features.metrics import rankme
from common.features.neighbors import FIELD, knn
from common.features.ridge import ridge
from common.models.plan import TokenPlan
from common.training.tracking import Tracker
from pretrain.config import MonitorConfig
from pretrain.monitoring import monitors
from pretrain.objectives import Verdict

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")

STILL = ["model.kwargs.drop_path_rate=0", "model.kwargs.proj_drop_rate=0", "optimizer.lr=0.05", "tensorboard=false"]


def records(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if name in line]


@pytest.mark.slow
def test_control_without_position(inside: Callable[..., int], tiny: list[str], tmp_path: Path) -> None:
    """Noise is chance, and shuffled patches are sent where they came from: exactly as often as in the real images."""
    run = tmp_path / "run"
    assert inside(*tiny, *STILL, f"run={run}", "steps=40", "monitor.control_every=20", "monitor.every=40") == 0
    controls = records(run, "control/absolute/noise")
    assert [line["step"] for line in controls] == [20, 40]
    last = controls[-1]
    assert last["control/absolute/shuffled_origin"] == pytest.approx(last["control/absolute/real"], abs=1e-6)
    assert last["control/absolute/real"] > last["control/absolute/shuffled_place"]
    assert last["control/absolute/noise"] == pytest.approx(1 / 6, abs=0.12)  # 9 images of 6 patches
    assert last["control/relative/noise"] == pytest.approx(last["control/relative/chance"], abs=0.12)
    assert last["control/relative/chance"] == pytest.approx(4 / 30)  # one column apart, of 30 ordered pairs of 2x3


def test_control_with_position(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """With embeddings the answer is where a patch lies now, in noise as well; the run says so."""
    run = tmp_path / "run"
    leaky = ["objectives.absolute.position=full", "objectives.relative.weight=0", "allow_leak=true"]
    assert inside(*tiny, *STILL, *leaky, f"run={run}", "steps=150", "monitor.every=150") == 0
    (last,) = records(run, "control/absolute/noise")
    assert last["control/absolute/noise"] > 2 / 6
    assert last["control/absolute/shuffled_place"] > 2 * last["control/absolute/shuffled_origin"]
    assert "absolute is right on" in capsys.readouterr().out
    about = json.loads((run / "backbone.json").read_text())["training"]
    assert about["audit"] == "leak" and "position embedding" in about["audit_reasons"]["absolute"]


def test_a_leaky_recipe_is_refused_before_anything_is_written(train: Train, tiny: list[str], tmp_path: Path) -> None:
    ended = train(*tiny, f"run={tmp_path / 'run'}", "objectives.absolute.position=full")
    assert ended.status == 1
    message = ended.stderr
    assert message.startswith("error: leak: objectives.absolute: ") and message.count("\n") == 1
    assert "position=none" in message and "allow_leak=true" in message and "pos_embed" in message
    assert not (tmp_path / "run").exists()


def test_pictures(inside: Callable[..., int], tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    plan = [
        f"objectives.{word}" for word in ("absolute.keep=0.7", "absolute.position=partial", "relative.head=regression")
    ]
    assert inside(*tiny, *plan, f"run={run}", "steps=2", "monitor.every=2") == 0
    names = sorted(path.name for path in (run / "pictures").iterdir())
    kinds = ["absolute_distances", "absolute_places", "board", "relative_distances", "relative_places"]
    assert names == [f"{kind}-00000002.png" for kind in kinds]
    for name in names:
        assert min(Image.open(run / "pictures" / name).size) > 100


# ---------------------------------------------------------------------------- with objectives that use other crops


@pytest.mark.slow
def test_crops_of_other_objectives_leave_controls_and_boards_alone(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path
) -> None:
    """DINO beside them, two global crops and local ones of another size: positional objectives are asked the same."""
    words = [*tiny, "steps=1", "monitor.every=1", "optimizer.lr=0", "optimizer.min_lr=0", "tensorboard=false"]
    words += ["model.kwargs.dynamic_img_size=true"]
    dino = [f"objectives.dino.{name}={value}" for name, value in DINO.items()]
    views = ["views.global.count=2", "views.local.count=3", "views.local.size=[8,16]"]
    assert inside(*words, "run=alone") == 0
    assert inside(*words, *dino, *views, "run=beside") == 0
    (alone,), (beside,) = Run(Path("alone")).metrics, Run(Path("beside")).metrics
    asked = [name for name in alone if name.startswith(("control/", "val/absolute", "val/relative"))]
    assert len(asked) > 12
    for name in asked:
        assert beside[name] == pytest.approx(alone[name], abs=1e-6), name
    boards = [np.asarray(Image.open(Path(run, "pictures", "board-00000001.png"))) for run in ("alone", "beside")]
    assert np.array_equal(*boards)
    assert {"val/dino/loss", "val/dino/kl", "rankme/teacher", "knn/teacher", "ridge/teacher"} <= beside.keys()
    assert (
        not {"val/dino/uniform", "val/absolute/chance", "rankme/teacher"} & alone.keys()
        | {"val/dino/uniform"} & beside.keys()
    )
    # before any step the teacher is the student: what is told of both is the same
    assert beside["rankme/teacher"] == pytest.approx(beside["rankme/student"])


def test_validation_weighs_images_and_leaves_no_trace(tmp_path: Path) -> None:
    """Batches of unequal size: numbers are means over images. What DINO counts meanwhile is forgotten."""
    task, *_ = made()
    views = {"global": View(size=24, count=2)}
    samples = Samples(Images(Noise(7), "noise"), views, 0, 3, task.draws, task.collates)
    assert [len(keys) for keys in monitors._batches(samples, 3)] == [3, 2, 2]  # none of one image
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    tracker = Tracker(tmp_path, 0, False)
    task.begin_step(0.5, False)
    found = monitors.validation(task, samples, 3, CPU, tracker, 1)
    whole = monitors.validation(task, samples, 7, CPU, tracker, 2)
    tracker.close()
    for name in ("val/absolute/loss", "val/absolute/accuracy", "val/dino/loss", "val/dino/teacher_entropy"):
        assert found[name] == pytest.approx(whole[name], abs=1e-5), name
    dino: Any = task.objectives["dino"]
    assert not dino.centre.pending.any() and not dino.winners and dino.progress == 0.5 and not dino.measured
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.state_dict().items())


# ---------------------------------------------------------------------------- frozen features


def test_frozen_features_by_hand() -> None:
    """Class tokens of student and teacher: 33 labelled images vote, three of each class teach the ridge."""
    task, train, held_out = made()
    told = monitors.frozen(task, train, held_out, MonitorConfig(bank=33, shots=3), CPU, print, 1)
    assert told.keys() == {f"{what}/{who}" for what in ("rankme", "knn", "ridge") for who in ("student", "teacher")}
    voters, shots = monitors.labelled(train, MonitorConfig(bank=33, shots=3))
    labels = torch.from_numpy(train.labels)
    assert len(voters) == 33 and 5 not in voters and labels[shots].bincount().tolist() == [3, 3, 3]
    assert set(shots.tolist()) <= set(voters.tolist())
    quiet: Any = {"warn": lambda line: None, "limit": NO_LIMIT}
    for who, backbone in (("student", task.backbone), ("teacher", task.teacher)):
        known, new = (extract(backbone, TokenPlan("full"), images, **quiet) for images in (train, held_out))
        assert known["index"].tolist() == [i for i in range(36) if i not in BROKEN]
        bank = torch.isin(known["index"], torch.from_numpy(voters))
        few = torch.isin(known["index"], shots)
        there = torch.from_numpy(held_out.labels)[new["index"]]
        asked, right = new["class"][there >= 0], there[there >= 0]
        assert told[f"rankme/{who}"] == pytest.approx(rankme(new["class"]), rel=1e-4)
        guesses = knn(known["class"][bank], labels[known["index"][bank]], asked, treatment=FIELD)
        assert told[f"knn/{who}"] == pytest.approx((guesses == right).float().mean().item())
        guesses = ridge(known["class"][few], labels[known["index"][few]], asked)
        assert told[f"ridge/{who}"] == pytest.approx((guesses == right).float().mean().item())
    assert told["rankme/student"] != told["rankme/teacher"]


@pytest.mark.slow
def test_two_processes_share_the_work_and_find_the_same() -> None:
    """35 and 11 images do not divide by two, and each share has one that cannot be read."""
    one, (first, second) = measured(), ranks(measured)
    assert second["told"] == {}  # the first speaks for both
    assert first["told"].keys() == one["told"].keys() and len(one["told"]) == 6
    for name, value in one["told"].items():
        assert first["told"][name] == pytest.approx(value, rel=1e-5), name
    for found in (one, first, second):
        assert found["index"] == [i for i in range(34, -1, -1) if i not in BROKEN]  # in the order they were asked for
        for who, sums in found["sums"].items():
            assert sums == pytest.approx(one["sums"][who], abs=1e-4)


@pytest.mark.parametrize("labels", [None, [-1] * 11])
def test_without_labels_there_is_the_rank(labels: list[int] | None) -> None:
    task, train, held_out = made()
    train.labels = None if labels is None else train.labels
    held_out.labels = None if labels is None else np.array(labels)
    told = monitors.frozen(task, train, held_out, MonitorConfig(), CPU, print, 1)
    assert told.keys() == {"rankme/student", "rankme/teacher"} and told["rankme/student"] > 1


# ---------------------------------------------------------------------------- the collapse light


def test_a_verdict_joins_the_record_and_its_advice_is_said_once() -> None:
    task, *_ = made()
    heard: list[str] = []
    verdicts = iter(["healthy", "one prototype", "one prototype", "healthy"])
    seen: list[Any] = []

    def verdict(numbers: Any) -> Verdict:
        seen.append(dict(numbers))
        name = next(verdicts)
        return Verdict(name, "" if name == "healthy" else "try sinkhorn")

    task.objectives["dino"].verdict = verdict  # type: ignore[assignment]
    read = monitors.collapse_warnings(task, heard.append)
    found = [read(step, {"loss": 2.0, "dino/kl": 0.5, "absolute/loss": 1.0}) for step in (10, 20, 30, 40)]
    told = ["healthy", "one prototype", "one prototype", "healthy"]
    assert [line["dino/verdict"] for line in found] == told and all(len(line) == 1 for line in found)
    assert seen[0] == {"kl": 0.5}
    (warning,) = heard
    assert "step 20" in warning and "dino: one prototype" in warning and "try sinkhorn" in warning


def test_features_that_are_not_finite_are_not_judged_and_are_told() -> None:
    """Of a student whose final norm has a NaN, and a teacher that is well."""
    task, train, held_out = made()
    with torch.no_grad():
        task.backbone.model.norm.weight[0] = torch.nan
    said: list[str] = []
    told = monitors.frozen(task, train, held_out, MonitorConfig(bank=33, shots=3), CPU, said.append, 3)
    assert all(math.isnan(told[f"{what}/student"]) for what in ("rankme", "knn", "ridge"))
    assert all(math.isfinite(told[f"{what}/teacher"]) for what in ("rankme", "knn", "ridge"))
    (line,) = said
    assert (
        line.startswith("warning: at step 3, the student's features of ") and "training images are not finite" in line
    )
