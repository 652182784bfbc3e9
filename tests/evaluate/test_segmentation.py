"""evaluate/segmentation.py: every head from its arguments to its report, what is refused, resume, two processes."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.checkpoints import public
from common.errors import Refusal
from common.models import ModelConfig, create
from evaluate.job import report
from evaluate.segmenting.scores import mean_iou, pixel_accuracy

CALM = ["--threads", "1", "--device", "cpu"]
QUICK = ["--steps", "6", "--batch", "4", "--scale", "[1.0,1.0]", "--lr", "0.02"]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Nine training and five test images of 12x16 pixels: left of some column red is class 0, right of it blue, 1."""
    root, rng = tmp_path_factory.mktemp("scenes"), np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 5)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            edge = int(rng.integers(4, 13))
            mask = np.zeros((12, 16), np.uint8)
            mask[:, edge:] = 1
            image = np.where(mask[..., None], (40, 60, 200), (210, 50, 40)) + rng.normal(0, 20, (12, 16, 3))
            mask[0] = 255
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{i}.jpg")
            Image.fromarray(mask).save(root / "masks" / split / f"{i}.png")
    (root / "classes.txt").write_text("red\nblue\n")
    return root


@pytest.fixture
def run(make_run, scenes, script, capsys):
    """run(head, *words, **shape) -> (the run's folder, the report, what each test image was, what was printed)."""

    def start(*words, position="full", **shape):
        folder = make_run(position, **shape)
        quick = [*CALM, *([] if "knn" in words else QUICK)]
        assert script("segmentation").main(["--ckpt", str(folder), "--data", str(scenes), *quick, *words]) == 0
        words = " ".join(words)
        head = next((head for head in ("knn", "upernet") if head in words), "")
        path = folder / "evaluate" / f"segmentation{'_' if head else ''}{head}.json"
        return folder, *report.read(path), capsys.readouterr().out

    return start


def agree(content, outcomes, kind):
    """The report's numbers are those of its outcomes."""
    for row, kinds in content["values"].items():
        if row == "majority":
            continue
        counts = outcomes[f"{row}/{kind}"]
        assert counts.shape == (1, 5, 2, 3) and counts.dtype == np.int64
        assert counts[..., 2].sum() == 5 * 11 * 16  # all pixels but the ignored row
        total = counts[0].sum(0)
        assert kinds[kind]["accuracy"] == pytest.approx(mean_iou(total))
        assert kinds[kind]["pixel_accuracy"] == pytest.approx(pixel_accuracy(total))
        low, high = kinds[kind]["interval"]
        assert low <= kinds[kind]["accuracy"] <= high


@pytest.mark.slow
def test_linear(run):
    folder, content, outcomes, printed = run(position="none")
    assert list(content["values"]) == ["subject", "random", "pixels", "majority"]
    assert content["evaluation"] == "segmentation" and content["protocol"]["metric"] == "mIoU"
    agree(content, outcomes, "linear")
    values = content["values"]
    majority = values["majority"]["majority"]["accuracy"]
    assert values["pixels"]["linear"]["accuracy"] > 0.6 > majority  # colours are seen at once
    assert set(values["subject"]["linear"]["per_class"]) == {"red", "blue"}
    assert outcomes["index"].tolist() == [0, 1, 2, 3, 4]
    place = folder / "evaluate" / "segmentation"
    with Image.open(place / "predictions.png") as picture:
        assert picture.width > 300 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    assert {path.name for path in (place / "trained-seed0").iterdir()} >= {
        "decoder.safetensors", "metrics.jsonl", "result.json", "counts.npz", "tb"
    }  # fmt: skip
    assert not (place / "trained-seed0" / "state").exists()
    assert re.search(r"^trained +linear +\d+\.\d +[\d.-]+ +\d+\.\d$", printed, re.M), printed


def test_knn_sees_two_colours(run):
    _, content, outcomes, _ = run("--head", "knn", "--k", "5", "--bank", "60")
    agree(content, outcomes, "knn")
    values = content["values"]
    assert values["pixels"]["knn"]["accuracy"] > 0.75 and content["protocol"]["frozen"] is True
    with pytest.raises(Refusal, match="--k 500: the training images have"):
        run("--head", "knn", "--k", "500", "--bank", "60", "--overwrite")


def test_upernet_trains_the_backbone(run):
    pytest.importorskip("segmentation_models_pytorch")
    words = ["--head", "upernet", "--channels", "8", "--steps", "2", "--multi-scale", "--ratios", "[0.5,1.0]"]
    folder, content, outcomes, printed = run(*words, "--no-baselines", depth=4)
    agree(content, outcomes, "upernet")
    assert list(content["values"]) == ["subject", "majority"] and content["protocol"]["frozen"] is False
    assert 0 < content["values"]["subject"]["upernet"]["multi_scale"]["accuracy"] < 1 and "multi-scale" in printed
    place = folder / "evaluate" / "segmentation_upernet" / "trained-seed0"
    before, after = ((path / "backbone.safetensors").read_bytes() for path in (folder, place))
    assert before != after and json.loads((place / "backbone.json").read_text())["training"]["step"] == 2


@pytest.mark.slow  # sixteen blocks, and a map of 2048 channels
def test_the_recipe_of_spvit_s_end_to_end_at_several_scales(make_run, scenes, script, capsys):
    """SP-ViT-S but for its width: three of the recipe's blocks come before the class token, and all of them learn."""
    pytest.importorskip("segmentation_models_pytorch")
    folder = make_run("full")
    kwargs = {"embed_dim": 24, "num_heads": 2, "stem_width": 8}
    torch.manual_seed(7)
    backbone = create(ModelConfig("spvit_s", kwargs, crop=1.0), 32)
    training = json.loads((folder / "backbone.json").read_text())["training"]
    public.export(folder, backbone, public.describe(backbone, "full", "class", training))
    words = ["segmentation_spvit_s", "--ckpt", str(folder), "--data", str(scenes), *CALM, *QUICK, "--no-baselines"]
    words += ["--channels", "16", "--size", "32", "--short", "32", "--long", "128", "--stride", "21", "--warmup", "0"]
    words += ["--steps", "30", "--batch", "9", "--lr", "0.003", "--log-every", "1", "--multi-scale"]
    assert script("segmentation").main(words) == 0
    content, outcomes = report.read(folder / "evaluate" / "segmentation_upernet.json")
    agree(content, outcomes, "upernet")
    found = content["values"]["subject"]["upernet"]
    majority = content["values"]["majority"]["majority"]["accuracy"]
    assert found["accuracy"] > majority + 0.1 and found["multi_scale"]["accuracy"] > majority + 0.1
    assert "multi-scale" in capsys.readouterr().out and content["protocol"]["frozen"] is False
    place = folder / "evaluate" / "segmentation_upernet" / "trained-seed0"
    losses = [json.loads(line).get("loss") for line in (place / "metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    before, after = (load_file(path / "backbone.safetensors") for path in (folder, place))
    assert before.keys() == after.keys()
    for name in ("blocks.0.attn.w2", "blocks.13.attn.w2", "blocks.15.attn.qkv.weight", "cls_token"):
        assert not torch.equal(before[name], after[name]), name


def test_upernet_on_a_frozen_backbone_has_no_row_of_pixels(run):
    pytest.importorskip("segmentation_models_pytorch")
    words = ["--head", "upernet", "--channels", "8", "--steps", "1", "--frozen"]
    _, content, outcomes, printed = run(*words, position="none", depth=4)
    agree(content, outcomes, "upernet")
    assert list(content["values"]) == ["subject", "random", "majority"] and "without position embedding" in printed
    transform = content["protocol"]["transform"]
    assert transform["name"] == "segmentation, slide" and transform["size"] == [8, 8]


def test_whole_images(run):
    words = ["--mode", "whole", "--no-baselines", "--steps", "1"]
    _, content, outcomes, _ = run(*words)
    agree(content, outcomes, "linear")


def test_an_interrupted_training_goes_on(run, make_run, scenes, script, monkeypatch):
    words = ["--checkpoint-every", "2", "--no-baselines", "--dropout", "0.5"]
    _, whole, outcomes, _ = run(*words)
    folder = make_run("full")
    command = ["--ckpt", str(folder), "--data", str(scenes), *CALM, *QUICK, *words, "--overwrite"]
    out = folder / "evaluate" / "segmentation"
    losses = (out / "trained-seed0" / "metrics.jsonl").read_text()

    class Killed(Exception):
        """As if the power failed."""

    def due(self, step):
        if step == 5:
            raise Killed
        return step % 2 == 0

    with monkeypatch.context() as patch:
        patch.setattr("evaluate.segmenting.training.SegmentationTraining.due", due)
        with pytest.raises(Killed):
            script("segmentation").main(command)
    with pytest.raises(Refusal, match="was interrupted: go on with --resume"):
        script("segmentation").main(command[:-1])
    with pytest.raises(Refusal, match=r"--resume: batch=3, and .* was begun with batch=4"):
        script("segmentation").main([*command[:-1], "--resume", "batch=3"])
    assert script("segmentation").main([*command[:-1], "--resume"]) == 0  # from step 4
    content, again = report.read(out.with_suffix(".json"))
    assert np.array_equal(again["subject/linear"], outcomes["subject/linear"])
    assert content["values"]["subject"] == whole["values"]["subject"]

    def numbers(text):
        lines = [json.loads(line) for line in text.splitlines()]
        return [(line["step"], line["loss"]) for line in lines]

    assert numbers((out / "trained-seed0" / "metrics.jsonl").read_text()) == numbers(losses)
    drawn = (out / "predictions.png").read_bytes()
    (out / "predictions.png").unlink()
    assert script("segmentation").main([*command[:-1], "--resume"]) == 0  # done before: only reported again
    assert (out / "predictions.png").read_bytes() == drawn
    assert report.read(out.with_suffix(".json"))[0]["values"]["subject"] == whole["values"]["subject"]
    out.with_suffix(".json").unlink()  # as if killed in a later training
    with pytest.raises(Refusal, match="was interrupted: go on with --resume"):
        script("segmentation").main(command[:-1])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--head", "unet"], "head='unet' in .*: expected one of linear, knn, upernet"),
        (["--head", "knn", "--end-to-end"], "--head knn trains nothing"),
        (["--scale", "[2.0,0.5]"], "--scale .*the smaller one first"),
        (["--steps", "0"], "--steps 0: expected a whole number of at least 1"),
        (["--schedule", "polly"], "schedule='polly' in .*did you mean 'poly'"),
        (["--resume"], "nothing was begun"),
        (["--data", "cifar10"], "segmentation needs masks"),
        (["--blocks", "[1,2,3,4]"], "goes with --head upernet"),
        (["--stride", "9"], "--stride 9 leaves pixels out between windows of 8x8"),
        (["stepz=3"], "unknown option 'stepz'"),
        (
            ["--head", "knn", "--steps", "5"],
            "--steps goes with a head that is trained, linear or upernet, and --head knn",
        ),
        (["--k", "5"], "--k goes with --head knn, and --head linear is not"),
        (["--channels", "8"], "--channels 8 goes with --head upernet"),
        (["--head", "upernet", "--batch", "1"], "1 image per step and accumulated part was given"),
        (["--size", "6"], "--size 6x6: .* not divisible by its patch of 4x4; choose another --size"),
        (["--stride", "0"], "--stride 0: expected a number of pixels above 0"),
        (["--batch", "3", "--accumulate", "2"], "--batch 3 cannot be shared"),
    ],
)
def test_refusals(make_run, scenes, script, words, says):
    folder = make_run("full")
    with pytest.raises(Refusal, match=says) as refusal:
        script("segmentation").main(["--ckpt", str(folder), "--data", str(scenes), *CALM, *words])
    assert "\n" not in str(refusal.value)
    assert not (folder / "evaluate").exists()  # nothing was written, and what there was is not lost


@pytest.mark.slow  # launches of two processes
@pytest.mark.parametrize("head", ["linear", "knn"])
def test_two_processes_are_one(run, make_run, scenes, run_script, head):
    """Nine training and five test images: neither divides evenly."""
    words = ["--head", head, "--no-baselines", *(["--k", "5"] if head == "knn" else ["--dropout", "0"])]
    _, one, alone, _ = run(*words)
    folder = make_run("full")
    done = run_script(
        *("segmentation", "--ckpt", folder, "--data", scenes, *CALM, *([] if head == "knn" else QUICK), *words),
        *("--out", "two.json"),
        processes=2,
    )
    assert done.returncode == 0, done.stderr
    two, together = report.read(folder.parent / "two.json")
    counts = alone[f"subject/{head}"], together[f"subject/{head}"]
    assert np.array_equal(counts[0][..., 2], counts[1][..., 2])  # every image once
    moved = np.abs(counts[0][..., 1] - counts[1][..., 1]).sum() / counts[0][..., 1].sum()
    assert moved < 0.01  # sums of floating-point numbers in another order
    scores = [content["values"]["subject"][head]["accuracy"] for content in (one, two)]
    assert scores[0] == pytest.approx(scores[1], abs=0.01)
