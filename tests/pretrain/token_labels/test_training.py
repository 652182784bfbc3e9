"""From dense labels to a classifier: trained, resumed, shared by processes, carried on to larger images and others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from runs.children import Run, Train
from safetensors.torch import load_file

from common.checkpoints import public
from common.errors import Refusal

LABELLED = ("tensorboard=false", "batch=24", "log_every=1", "views.global.mix_token=1", "monitor.images=24")
STRONG = ("views.global.flip=0.5", "views.global.auto_augment=rand-m9-mstd0.5-inc1", "views.global.erasing=0.25")
LV = (
    "model={name: lvvit_s, kwargs: {patch_size: 16, embed_dim: 24, depth: 2, num_heads: 2, stem_width: 8}}",
    "views.global.size=32",
)


def objective(labels: Path | None, **options: object) -> str:
    given = {"smoothing": 0.1} | ({} if labels is None else {"labels": f'"{labels}"'}) | options
    said = ", ".join(f"{name}: {value}" for name, value in given.items())
    return f"objectives={{absolute: {{weight: 0}}, relative: {{weight: 0}}, token_labeling: {{{said}}}}}"


@pytest.mark.parametrize("backbone", [pytest.param((), id="vit", marks=pytest.mark.slow), pytest.param(LV, id="lvvit")])
def test_a_resumed_run_is_an_uninterrupted_one_to_the_bit(
    inside: Callable[..., int], tiny: list[str], labels: Path, tmp_path: Path, backbone: tuple[str, ...]
) -> None:
    """With exchanged patches, moved crops and an average."""
    given = [*tiny, *LABELLED, *STRONG, *backbone, objective(labels), "average=0.75", "monitor.every=6"]
    given += ["checkpoint_every=6", "keep=9", "steps=12"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert inside(*given, f"run={whole}") == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "state/step_00000012")
    assert inside("--resume", cut) == 0
    assert Run(whole).numbers == Run(cut).numbers
    record = Run(whole).metrics[-1]
    assert {"token_labeling/dense_loss", "token_labeling/agreement", "val/token_labeling/dense_loss"} <= record.keys()
    for name in ("head.safetensors", "backbone.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
    head = load_file(whole / "head.safetensors")
    assert head.keys() == {"weight", "bias", "dense.weight", "dense.bias"} and head["dense.weight"].any()


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (1, 3), (2, 3)])
def test_a_run_is_the_same_however_its_steps_are_shared(
    train: Train, tiny: list[str], labels: Path, tmp_path: Path, processes: int, accumulate: int
) -> None:
    """In real processes, without dropout: losses, accuracies and gradients of three steps."""
    given = [*tiny, *LABELLED, *STRONG, objective(labels, ground_truth="sensible"), "steps=3", "monitor.held_out=0"]
    given += ["model.kwargs.drop_path_rate=0", "model.kwargs.proj_drop_rate=0", "average=0.75"]
    runs = []
    for number, (together, parts) in enumerate([(1, 1), (processes, accumulate)]):
        run = tmp_path / str(number)
        ended = train(*given, f"accumulate={parts}", f"run={run}", processes=together)
        assert ended.status == 0, ended.stderr
        assert f"{together} x CPU" in ended.stdout or together == 1
        runs.append(run)
    for one, other in zip(*(Run(run).metrics for run in runs), strict=True):
        for name in ("loss", "class_loss", "dense_loss", "accuracy", "agreement"):
            name = name if name == "loss" else f"token_labeling/{name}"
            assert one[name] == pytest.approx(other[name], rel=2e-5), (name, one["step"])
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=2e-5)
    heads = [load_file(run / "head.safetensors") for run in runs]
    for name, tensor in heads[0].items():
        torch.testing.assert_close(heads[1][name], tensor, atol=1e-5, rtol=1e-4)


def test_a_run_is_carried_on_to_larger_images_and_to_other_classes(
    inside: Callable[..., int], tiny: list[str], labels: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large, other = tmp_path / "small", tmp_path / "large", tmp_path / "other"
    given = [*tiny, *LABELLED, *LV, "monitor.held_out=0"]
    assert inside(*given, objective(labels), "steps=4", f"run={small}") == 0
    assert "all.labels: 2 of 3 classes in 2x2 cells of whole images, by timm:test_resnet\n" in capsys.readouterr().out
    still = ["steps=1", "optimizer={lr: 0, min_lr: 0, weight_decay: 0}", f"model.init={small}"]
    capsys.readouterr()
    assert inside(*given, *still, objective(labels), "views.global.size=48", f"run={large}") == 0
    assert "its classifier, too, as the classes are the same" in capsys.readouterr().out
    before, after = (load_file(run / "head.safetensors") for run in (small, large))
    assert all(torch.equal(before[name], after[name]) for name in before) and before["dense.weight"].any()
    about = json.loads((large / "backbone.json").read_text())
    assert about["size"] == [48, 48] and about["grid"] == [3, 3]
    folder = tmp_path / "two"
    for name in ("left", "right"):
        shutil.copytree(Path(tiny[1].removeprefix("data=")) / name, folder / name)
    transfer = [*given, *still, objective(None, dense_weight=0), f"data={folder}", f"run={other}"]
    assert inside(*transfer) == 0
    assert "its classifier, of 3 classes, is left out" in capsys.readouterr().out
    head = load_file(other / "head.safetensors")
    assert {name: tuple(each.shape) for name, each in head.items()} == {"weight": (2, 24), "bias": (2,)}
    description = json.loads((other / "backbone.json").read_text())
    assert public.load_head(other, description) is not None and description["training"]["label_names"] == [
        "left",
        "right",
    ]


def test_what_trained_with_it_is_judged_and_exported_with_its_patches(
    inside: Callable[..., int], tiny: list[str], labels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`validate` finds what the run found; timm's own forward says what the run's classifier says."""
    from evaluate.export import main as export
    from evaluate.validate import main as validate

    run, folder = tmp_path / "run", tmp_path / "timm"
    given = [*tiny, *LABELLED, *LV, objective(labels), "steps=8", "monitor.every=8", "optimizer.lr=0.02"]
    assert inside(*given, "monitor.images=null", "monitor.held_out=0.3", f"run={run}") == 0
    backbone, plan, description = public.load_backbone(run)
    head = public.load_head(run, description)
    assert head is not None and head["dense.weight"].any()
    assert export(["--ckpt", str(run), "--to", "timm", "--out", str(folder)]) == 0
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = backbone(images, plan)
        logits = features.prefix[:, 0] @ head["weight"].T + head["bias"]
        dense = (features.tokens @ head["dense.weight"].T + head["dense.bias"]).amax(1)
        torch.testing.assert_close(model(images), logits + 0.5 * dense, atol=1e-4, rtol=1e-4)
    words = ["--ckpt", str(run), "--out", str(tmp_path / "report"), "--precision", "fp32", "--threads", "1"]
    assert validate([*words, "--data", tiny[1].removeprefix("data=")]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("other", r"they are labels of other images|they are of other images"),
        ("classes", r"they are of 3 classes .* and the model has 2"),
        ("missing", r"all\.labels: 32 of 96 images .* have none"),
        ("absent", r"nowhere\.labels: no such file or folder; expected one made by generate_labels"),
    ],
)
def test_labels_that_do_not_fit_end_a_run_before_it_begins(
    inside: Callable[..., int],
    tiny: list[str],
    labels: Path,
    tmp_path: Path,
    change: str,
    message: str,
) -> None:
    images, folder, given = Path(tiny[1].removeprefix("data=")), tmp_path / "data", labels
    shutil.copytree(images, folder)
    if change == "other":
        for file in sorted(folder.rglob("*.*g")):
            file.rename(file.with_stem(f"other{file.stem}"))
    elif change == "classes":
        shutil.rmtree(folder / "left")
    elif change == "missing":
        for file in sorted((folder / "left").iterdir()):
            file.rename(file.with_stem(f"new{file.stem}"))
    else:
        given = tmp_path / "nowhere.labels"
    run = tmp_path / "run"
    with pytest.raises(Refusal, match=message) as refusal:
        inside(*tiny, *LABELLED, objective(given), f"data={folder}", f"run={run}")
    assert "\n" not in str(refusal.value) and not run.exists()
