"""`classification` by hand; who is told labels, and who is not; what it trains, exports and resumes."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from runs.children import Run, Train
from small import Noise, backbone, options_for, task

from common.batches.mixing import Mixture
from common.batches.sampler import StepSampler
from common.batches.samples import Batch, Samples
from common.batches.views import View
from common.data import Images, Unreadable
from common.errors import Refusal
from pretrain import automatic, objectives
from pretrain.assemble import _labels_for
from pretrain.config import PretrainConfig
from pretrain.leaks.verdict import cached_audit
from pretrain.monitoring import monitors
from pretrain.objectives import Objective
from pretrain.task import Pretraining, resolve

THREE: dict[str, Any] = {"classes": 3}
MIXED = ["views.global.mixup=0.8", "views.global.cutmix=1.0"]
STRONG = [*MIXED, "views.global.auto_augment=rand-m9-mstd0.5-inc1", "views.global.erasing=0.25", "repeats=3"]


def told(made: Pretraining, labels: list[int] | None, count: int = 4) -> Batch:
    """The images of `small.batch`, with these labels, for those who ask."""
    torch.manual_seed(1)
    images = Images(Noise(), "noise", None if labels is None else np.resize(labels, 8), ["cat", "dog", "owl"])
    views = {"global": View(size=list(made.backbone.size))}
    samples = Samples(images, views, 0, 3, made.draws, made.collates, made.labelled)
    return samples.__getitems__([(0, i) for i in range(count)])


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("name", "pool", "pooled"),
    [
        ("vit 3x3", "auto", "class"),
        ("vit 3x3", "mean", "mean"),
        ("distilled", "auto", "class"),  # and not the distillation token, which comes second
        ("distilled", "mean", "mean"),
        ("registers", "auto", "class"),
        ("swin", "auto", "mean"),
        ("nest", "mean", "mean"),
    ],
)
def test_smoothed_cross_entropy_by_hand(name: str, pool: str, pooled: str) -> None:
    made = task({"classification": {**THREE, "pool": pool, "smoothing": 0.1}}, name).eval()
    given = told(made, [2, 0, 1, 2])
    features = made.backbone(given.views["global"])
    rows = features.prefix[:, 0] if pooled == "class" else features.tokens.mean(1)
    layer: Any = made.objectives["classification"].head.classifier  # type: ignore[union-attr]
    logits = (rows @ layer.weight.T + layer.bias).detach().double().numpy()
    logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = np.full((4, 3), 0.1 / 3)
    target[np.arange(4), [2, 0, 1, 2]] += 0.9
    report = made(given)
    assert report["loss"].item() == pytest.approx(-(target * logs).sum() / 4, rel=1e-5)
    assert report["classification/accuracy"] == np.mean(logits.argmax(1) == [2, 0, 1, 2])
    assert report["classification/chance"] == pytest.approx(1 / 3)
    assert made.pooling == pooled and made.position == "full" and not made.positional


@pytest.mark.parametrize("loss", ["ce", "bce"])
def test_mixed_labels_by_hand(loss: str) -> None:
    """Two pairs: 0.7 of one label and 0.3 of the other, or of what is not known."""
    made = task({"classification": {**THREE, "smoothing": 0.1, "loss": loss}}).eval()
    given = told(made, [2, 0, 1, -1])
    given.mixtures["global"] = [Mixture(0.7)]
    images = given.mixed().views["global"]
    assert images[0].float().sub(0.7 * given.views["global"][0] + 0.3 * given.views["global"][1]).abs().max() <= 0.5
    layer: Any = made.objectives["classification"].head.classifier  # type: ignore[union-attr]
    logits = layer(made.backbone(images).prefix[:, 0]).detach().double().numpy()
    labels = np.array([[0.3, 0, 0.7], [0.7, 0, 0.3], [0, 1, 0], [0, 1, 0]])
    weights = np.array([1, 1, 0.7, 0.3])  # of the last pair one label is known
    smoothed = 0.9 * labels + 0.1 / 3
    if loss == "ce":
        each = -(smoothed * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)
    else:
        sure = 1 / (1 + np.exp(-logits))
        each = -(smoothed * np.log(sure) + (1 - smoothed) * np.log(1 - sure)).mean(1)
    report = made(given)
    assert report["loss"].item() == pytest.approx((each * weights).sum() / 3, rel=1e-5)
    right = (logits.argmax(1) == labels.argmax(1)) * weights
    assert report["classification/accuracy"].item() == pytest.approx(right.sum() / 3)


def test_unmixed_and_barely_mixed_are_the_same() -> None:
    """What soft labels cost at the end where they are hard."""
    made = task({"classification": {**THREE, "smoothing": 0.1}}).eval()
    plain, soft = told(made, [2, 0, 1, -1]), told(made, [2, 0, 1, -1])
    soft.mixtures["global"] = [Mixture(1.0)]
    for name, value in made(plain).items():
        torch.testing.assert_close(made(soft)[name], value)


def test_images_without_a_label_take_no_part() -> None:
    made = task({"classification": THREE}).eval()
    some, known = told(made, [1, -1, -1, 0]), told(made, [1, 2, 2, 0])
    each = [made(told(made, [-1] * i + [label] + [-1] * (3 - i)))["loss"].item() for i, label in ((0, 1), (3, 0))]
    assert made(some)["loss"].item() == pytest.approx(np.mean(each), rel=1e-6)
    assert made(known)["loss"].item() != pytest.approx(np.mean(each), rel=1e-6)
    nobody = made(told(made, [-1]))
    assert nobody["loss"] == 0 and nobody["classification/accuracy"] == 0
    nobody["loss"].backward()  # no gradient is missing: other processes wait for it
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in made.parameters())


QUARTER = [0, -1, -1, 2, -1, 1, -1, -1, -1, -1, -1, -1, -1, 2, -1, -1]  # labels of 16 images
BROKEN = (1, 5)  # of which these cannot be read: one without a label, one with


class Damaged(Noise):
    """16 images, two of which cannot be read."""

    def __len__(self) -> int:
        return 16

    def read(self, i: int, channels: int) -> torch.Tensor:
        if i in BROKEN:
            raise Unreadable(f"noise[{i}]", "cut short")
        return super().read(i, channels)


def one_step(processes: int, accumulate: int) -> dict[str, Any]:
    """The first step of a run of 16 images: what DistributedDataParallel and the loop average over parts and processes:
    the loss, its gradient and the accuracy that is logged; and by the definition, from all images that are shown."""
    made = task({"classification": THREE, "absolute": {"weight": 0.5}}).eval()
    images = Images(Damaged(), "noise", QUARTER, ["cat", "dog", "owl"])
    samples = Samples(
        images, {"global": View(size=list(made.backbone.size))}, 0, 3, made.draws, made.collates, made.labelled
    )
    reports, logits, labels = [], [], []
    for rank in range(processes):
        for part in StepSampler(16, 16, 0, 1, rank=rank, processes=processes, accumulate=accumulate):
            batch = samples.__getitems__(pickle.loads(pickle.dumps(part)))  # on its way to a worker
            reports.append(made(batch))
            (reports[-1]["loss"] / (processes * accumulate)).backward()
            objective: Any = made.objectives["classification"]
            logits.append(objective.scores(made.inputs("classification", batch, made.features(batch))[0]).detach())
            labels.append(batch.draws["classification/label"])
    found = {name: float(np.mean([report[name].item() for report in reports])) for name in reports[0]}
    told, known = torch.cat(labels), torch.cat(labels) >= 0
    wanted = torch.nn.functional.cross_entropy(torch.cat(logits)[known].double(), told[known]).item()
    return found | {
        "gradient": torch.cat([each.grad.flatten() for each in made.parameters() if each.grad is not None]),
        "known": int(known.sum()),
        "wanted": wanted,
        "unevenly": len({int((some >= 0).sum()) for some in labels}) > 1,
    }


@pytest.mark.parametrize(("processes", "accumulate"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 4)])
def test_an_image_counts_alike_whatever_part_and_process_it_is_in(processes: int, accumulate: int) -> None:
    whole, parts = one_step(1, 1), one_step(processes, accumulate)
    assert whole["known"] == parts["known"] == 4  # an image that cannot be read gives way to one that counts alike
    assert parts["classification/loss"] == pytest.approx(whole["wanted"], rel=1e-5)
    assert parts["unevenly"] == (processes * accumulate > 1)
    for name in ("loss", "classification/accuracy", "absolute/loss", "absolute/accuracy"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-6), name
    torch.testing.assert_close(parts["gradient"], whole["gradient"], atol=1e-6, rtol=1e-4)


def test_held_out_images_count_alike_in_every_batch() -> None:
    """Monitors show them in batches, of which some have no label at all."""
    made = task({"classification": THREE}).eval()
    made.objectives["classification"].head.classifier.bias.data[2] = 9.0  # type: ignore[union-attr, index]
    images = Images(Noise(), "noise", [-1, -1, 1, 0, 2, -1, -1, -1], ["cat", "dog", "owl"])
    samples = Samples(
        images, {"global": View(size=list(made.backbone.size))}, 0, 3, made.draws, made.collates, made.labelled
    )
    found = [
        monitors.validation(made, samples, batch, torch.device("cpu"), None, 1)  # type: ignore[arg-type]
        for batch in (8, 4, 2)
    ]
    assert [each["val/classification/accuracy"] for each in found] == pytest.approx([1 / 3] * 3)
    losses = [each["val/classification/loss"] for each in found]
    assert losses == pytest.approx(losses[:1] * 3) and losses[0] > 4


def few_labels(images: Path, folder: Path) -> str:
    """A table of these images of which a quarter has a label."""
    files = sorted(images.rglob("*.*g"))[:24]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    labels = [(i // 4) % 2 if i % 4 == 0 else -1 for i in range(len(files))]
    table = datasets.Dataset.from_dict({"image": list(map(str, files)), "label": labels}, features=features)
    table.to_parquet(str(folder / "train.parquet"))
    return f"hf:{folder / 'train.parquet'}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "accumulate", "mixing"),
    [(1, 4, []), (2, 2, []), (2, 2, MIXED), (1, 4, [*MIXED, "views.global.mix_by=pair", "repeats=2"])],
)
def test_a_run_with_few_labels_is_the_same_however_its_steps_are_shared(
    train: Train, tiny: list[str], images: Path, tmp_path: Path, processes: int, accumulate: int, mixing: list[str]
) -> None:
    """In real processes: the loss, the gradient's norm and the accuracy of three steps; no dropout."""
    words = [
        *tiny,
        *mixing,
        "objectives={classification: {smoothing: 0.1}, absolute: {weight: 0.5}}",
        "steps=3",
        "batch=8",
    ]
    words += ["model.kwargs.drop_path_rate=0", "model.kwargs.proj_drop_rate=0", "tensorboard=false", "log_every=1"]
    words += ["monitor.held_out=0", f"data={few_labels(images, tmp_path)}"]
    runs = []
    for number, (together, parts) in enumerate([(1, 1), (processes, accumulate)]):
        run = tmp_path / str(number)
        ended = train(*words, f"accumulate={parts}", f"run={run}", processes=together)
        assert ended.status == 0, ended.stderr
        assert f"{together} x CPU" in ended.stdout or together == 1
        runs.append(Run(run).metrics)
    for one, other in zip(*runs, strict=True):
        for name in ("loss", "classification/loss", "classification/accuracy", "gradient_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-5), (name, one["step"])


# ------------------------------------------------------------------------------------------------ who is told labels


class Broken(Noise):
    """Image 1 cannot be read."""

    def read(self, i: int, channels: int) -> torch.Tensor:
        if i == 1:
            raise Unreadable("noise[1]", "cut short")
        return super().read(i, channels)


def test_labels_travel_with_the_image_that_is_shown() -> None:
    images = Images(Broken(), "noise", [0, 1, 2, 3, 4, 5, 6, -1], [str(k) for k in range(7)])
    samples = Samples(images, {"global": View(size=8)}, 0, 3, labelled=["classification"])
    given = samples.__getitems__([(0, 0), (0, 1), (3, 7), (5, 2)])
    label = given.draws["classification/label"]
    assert label.dtype == torch.int64 and label[[0, 2, 3]].tolist() == [0, -1, 2]
    (instead,) = (i for i in range(8) if i != 1 and torch.equal(given.views["global"][1], crop(images, i)))
    assert label[1] == instead  # not 1, of the image that was asked for
    subset = Samples(images.subset([4, 6]), {"global": View(size=8)}, 0, 3, labelled=["classification"])
    assert subset.__getitems__([(0, 1), (0, 0)]).draws["classification/label"].tolist() == [6, 4]


def crop(images: Images, i: int) -> torch.Tensor:
    """Image i as it would be cropped in place of image 1."""
    whole = Images(images._source, "noise", indices=np.array([i, i]))
    return Samples(whole, {"global": View(size=8)}, 0, 3).__getitems__([(0, 1)]).views["global"][0]


def test_nobody_else_is_told_and_nothing_else_changes() -> None:
    alone = task({"absolute": {}, "relative": {}})
    random, none = (told(alone, labels) for labels in ([2, 0, 1, 1], None))
    assert not alone.labelled and not [name for name in random.draws if "label" in name]
    assert torch.equal(random.views["global"], none.views["global"])
    torch.manual_seed(0)
    first = alone(random)
    torch.manual_seed(0)
    assert {name: value.item() for name, value in alone(none).items()} == {n: v.item() for n, v in first.items()}
    beside = task({"classification": THREE, "absolute": {}, "relative": {}})
    given = told(beside, [2, 0, 1, 1])
    assert beside.labelled == ["classification"]
    assert given.draws.keys() - random.draws.keys() == {"classification/label", "classification/known"}
    assert all(torch.equal(given.draws[name], drawn) for name, drawn in random.draws.items())
    assert not Objective.labelled


def test_the_audit_and_positional_tools_pass_it_by(tmp_path: Path) -> None:
    made = task({"classification": THREE, "absolute": {}})
    config = PretrainConfig(steps=1, objectives={"classification": {"classes": 3}, "absolute": {}})
    assert list(cached_audit(config, made, folder=tmp_path).objectives) == ["absolute"]
    assert list(made.positional) == ["absolute"]


def test_the_label_and_the_place_share_a_pass_where_they_can() -> None:
    for position, runs in (("full", 2), ("none", 1)):
        made = task({"classification": {**THREE, "position": position}, "absolute": {}})
        assert len(made.passes) == runs and made.position == position


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        (
            {"pool": "clas"},
            "vit 3x3",
            "pool='clas' in objectives.classification: expected one of auto, class, mean",
        ),
        ({"pool": "class"}, "swin", "pool=class: swin_tiny_patch4_window7_224 has no class token here; use pool=mean"),
        (
            {"position": "partial"},
            "vit 3x3",
            "position='partial' in objectives.classification: expected one of full",
        ),
        ({"smoothing": 1.0}, "vit 3x3", "smoothing=1.0: expected a number of at least 0, below 1"),
        ({"classes": 1}, "vit 3x3", "classes=1: expected auto or a whole number of at least 2"),
        ({"classes": "many"}, "vit 3x3", "classes='many': expected auto or a whole number of at least 2"),
        ({"view": "local"}, "vit 3x3", "view 'local'"),
        ({"mixup": 0.8}, "vit 3x3", "unknown option"),
    ],
)
def test_what_is_not_understood_is_refused(options: dict[str, Any], name: str, words: str) -> None:
    with pytest.raises(Refusal) as refusal:
        task({"classification": {**THREE, **options}}, name)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def test_distillation_and_register_tokens_alone_are_no_class_token() -> None:
    made = backbone("registers")
    made.model.cls_token = None
    with pytest.raises(Refusal, match="has no class token here"):
        objective_of(made, pool="class")
    assert objective_of(made).pools == "mean"


def objective_of(made: Any, **options: Any) -> Any:
    return objectives.build(
        "classification", options_for({"classification": {**THREE, **options}}, made)["classification"], made
    )


def test_data_without_labels_are_refused_in_a_line(inside: Callable[..., int], images: Path, tmp_path: Path) -> None:
    (flat := tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted(images.rglob("*.png"))[:8]):
        (flat / f"{i}.png").write_bytes(path.read_bytes())
    words = ["objectives={classification: {}}", "steps=1", "batch=2", f"run={tmp_path / 'run'}"]
    with pytest.raises(Refusal, match=r"objectives\.classification reads labels, and .*flat has none: expected one"):
        inside(*words, f"data={flat}")
    with pytest.raises(Refusal, match=r"classification\.classes=2, and .*images.* has 3: use classes=auto"):
        inside("objectives={classification: {classes: 2}}", *words[1:], f"data={images}")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize("how", [pytest.param([], marks=pytest.mark.slow), STRONG], ids=["plain", "mixed"])
def test_a_run_learns_exports_and_resumes(
    inside: Callable[..., int], tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], how: list[str]
) -> None:
    words = [*tiny, "objectives.relative.weight=0", "objectives.classification.smoothing=0.1", "optimizer.lr=0.02"]
    words += ["tensorboard=false", "monitor.every=8", "batch=24", "checkpoint_every=null", "milestone_every=8", *how]
    whole = tmp_path / "whole"
    assert inside(*words, "steps=24", f"run={whole}") == 0
    said = capsys.readouterr().out
    assert "objective  1 x classification" in said and "classification.classes = 3: the classes of" in said
    metrics = Run(whole).metrics
    losses = [record["classification/loss"] for record in metrics]
    assert how or np.mean(losses[-4:]) < np.mean(losses[:4])  # of mixed labels 24 steps tell little
    assert 0 <= metrics[7]["val/classification/accuracy"] <= 1
    assert metrics[-1]["classification/chance"] == pytest.approx(1 / 3)
    about = json.loads((whole / "backbone.json").read_text())
    assert about["pooling"] == "class" and about["position"] == "full"
    assert about["training"]["objectives"]["classification"]["classes"] == 3
    for later in ("step_00000024", "step_00000016"):  # as if it had been killed after step 8
        for path in sorted((whole / "state" / later).glob("*")):
            path.unlink()
        if (whole / "state" / later).is_dir():
            (whole / "state" / later).rmdir()
    peaceful = [(record["step"], record["loss"]) for record in metrics]
    assert inside("--resume", whole) == 0
    assert [(record["step"], record["loss"]) for record in Run(whole).metrics] == peaceful


def test_mixing_needs_partners_and_policies_a_name(inside: Callable[..., int], tiny: list[str]) -> None:
    with pytest.raises(Refusal, match=r"views.global mixes images in pairs .*batch=6 shared by 1 processes x 2 .*of 4"):
        inside(*tiny, *MIXED, "batch=6", "accumulate=2", "objectives={classification: {}}", "steps=1", "run=none")
    with pytest.raises(Refusal, match=r"views.global.auto_augment=rnd-m9: timm cannot read it"):
        inside(*tiny, "views.global.auto_augment=rnd-m9", "steps=1", "run=none")
    assert not Path("none").exists()


def test_unlabelled_images_are_counted_and_still_say_where_they_are() -> None:
    labels = np.array([0, 1, -1, -1, 1, 0, -1, 1])
    given = {"classification": {}, "absolute": {}}
    known = _labels_for(resolve(given), Images(Noise(), "here", labels, ["a", "b"]))
    config = PretrainConfig(batch=2, steps=1, objectives=given)
    settled = automatic.resolve(config, automatic.Facts(8, (3, 3), True, known))
    assert settled.notes == ["objectives.classification: 3 of 8 images have no label and take no part in it"]
    assert settled.options.objectives["classification"]["classes"] == 2
    assert settled.reasons["objectives.classification.classes"] == "the classes of here"
    assert _labels_for(resolve({"absolute": {}}), Images(Noise(), "here")) is None
    assert _labels_for(resolve({"classification": {"weight": 0}, "absolute": {}}), Images(Noise(), "here")) is None
    made = task({"classification": THREE, "absolute": {}})
    report = made(told(made, [-1]))
    assert report["loss"] == report["absolute/loss"] > 0 == report["classification/loss"]
