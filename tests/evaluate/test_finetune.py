"""evaluate/finetune.py: layer decay, fresh positions, mixed labels, and the script in one process and in two."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pictures import write_images
from PIL import Image

from common.checkpoints import public, storage
from common.errors import Refusal
from common.features.extraction import digest
from common.training import tracking
from common.training.optim import parameter_groups
from evaluate.finetuning.options import FinetuneConfig
from evaluate.finetuning.training import HEAD, Classifier, Finetuning
from evaluate.job.subjects import at_size, subject_of

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "configs" / "evaluate").glob("finetune_*.yaml"))
QUICK = ["--steps", "6", "--batch", "12", "--lr", "0.02", "--warmup", "0", "--threads", "1", "--device", "cpu"]


def test_layer_decay_scales(make_run, script):
    backbone, _ = subject_of(str(make_run("full", depth=3))).for_finetuning()
    classifier = Classifier(backbone, "mean", 3)
    scale = {}
    for group in parameter_groups(classifier, 0.05, layer_decay=0.5):
        for parameter in group["params"]:
            name = next(name for name, other in classifier.named_parameters() if other is parameter)
            scale[name] = group["lr_scale"], group["weight_decay"]
    #  head and final norm: 1; block i of 3: 0.5 ** (3 - i); stem, tokens, positions: 0.5 ** 4
    assert scale["head.weight"] == (1.0, 0.05) and scale["head.bias"] == (1.0, 0.0)
    assert scale["backbone.model.norm.weight"] == (1.0, 0.0)
    assert [scale[f"backbone.model.blocks.{i}.attn.qkv.weight"] for i in range(3)] == [
        (0.125, 0.05),
        (0.25, 0.05),
        (0.5, 0.05),
    ]
    for name in ("pos_embed", "cls_token"):
        assert scale[f"backbone.model.{name}"] == (0.0625, 0.0)
    assert scale["backbone.model.patch_embed.proj.weight"] == (0.0625, 0.05)


def test_a_backbone_trained_without_positions_gets_fresh_ones(make_run):
    subject = subject_of(str(make_run("none")))
    assert subject.state is not None
    subject.state["pos_embed"] = torch.full_like(subject.state["pos_embed"], 9.0)  # never trained: must not survive
    backbone, note = subject.for_finetuning(seed=1, drop_path_rate=0.1)
    embedding = backbone.model.pos_embed
    assert "fresh one (pos_embed)" in note and embedding.requires_grad and 0 < embedding.std() < 0.05
    assert torch.equal(backbone.model.blocks[0].attn.qkv.weight, subject.state["blocks.0.attn.qkv.weight"])
    full, note = subject_of(str(make_run("full"))).for_finetuning()
    assert note == "" and full.model.pos_embed.requires_grad


def test_tables_inside_the_blocks_become_trainable_again():
    from common.checkpoints.public import build, describe
    from common.models import ModelConfig, create
    from evaluate.job.subjects import Subject

    shape = {"patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 2}
    model = create(ModelConfig("swin_tiny_patch4_window7_224", shape), 8)
    description = describe(model, "none", "mean", {})
    subject = Subject("swin", description, build(description).model.state_dict(), Path())
    backbone, note = subject.for_finetuning()
    tables = [value for name, value in backbone.model.named_parameters() if "bias_table" in name]
    assert tables and all(table.requires_grad and table.std() > 0 for table in tables)
    assert "relative_position_bias_table" in note and not backbone.without_position


def test_the_average_is_a_hand_written_one(make_run):
    backbone, _ = subject_of(str(make_run(depth=1))).for_finetuning()
    task = Finetuning(Classifier(backbone, "mean", 3), FinetuneConfig(ema=0.75))
    weights = task.classifier.head.weight
    expected = weights.detach().clone()
    for step in range(4):
        with torch.no_grad():
            weights += torch.randn(weights.shape, generator=torch.Generator().manual_seed(step))
        task.after_step(taken=step != 2)
        if step != 2:  # a step that was not taken moves nothing
            expected = 0.75 * expected + 0.25 * weights.detach()
    torch.testing.assert_close(task.average.head.weight, expected)
    task.train()
    assert not task.average.training and task.classifier.training
    assert not any(parameter.requires_grad for parameter in task.average.parameters())


# -------------------------------------------------------------------------------------------------------- the script


def test_script_and_its_report(make_run, script, report_of, capsys):
    run = make_run()
    assert script("finetune").main(["--ckpt", str(run), *QUICK, "--mixup", "0.2", "--pool", "both"]) == 0
    report, out = report_of(run, "finetune"), capsys.readouterr().out
    assert report["values"].keys() == {"subject", "random", "pixels"} and report["values"]["subject"].keys() == {"both"}
    assert report["protocol"]["steps"] == 6 and report["protocol"]["layer_decay"] == 0.75
    assert "fresh one" in report["protocol"]["notes"][0]
    for words in ("trained", "from scratch", "raw pixels, linear", "fresh one", "class + mean"):
        assert words in out
    assert "random init, seed 0" in out


def test_it_learns_and_repeats_itself(make_run, script, report_of):
    run, finetune = make_run(), script("finetune")
    arguments = ["--ckpt", str(run), *QUICK, "--no-baselines", "--steps", "25"]
    values = []
    for _ in range(2):
        assert finetune.main(arguments) == 0
        values.append(report_of(run, "finetune")["values"])
    assert values[0] == values[1] and values[0].keys() == {"subject"}
    assert values[0]["subject"]["mean"]["accuracy"] > 0.8  # three colours


def test_from_a_cache_of_whole_images_it_is_the_same(make_run, script, report_of, tmp_path, capsys):
    run, finetune = make_run(), script("finetune")
    arguments = ["--ckpt", str(run), *QUICK, "--no-baselines", "--log-every", "1"]
    losses, root = [], ["--cache-root", str(tmp_path / "cache")]
    for words in ([], ["--cache", "full", *root], ["--cache", "4", *root]):
        assert finetune.main([*arguments, *words]) == 0
        assert str(report_of(run, "finetune")["protocol"]["cache"]) == (words[1] if words else "None")
        lines = (run / "evaluate" / "finetune" / "trained-seed0" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if '"loss"' in line])
    assert losses[0] == losses[1] != losses[2] and len(losses[0]) == 6
    assert "cache      36 images at 4 px, " in capsys.readouterr().out


def test_bad_numbers_are_refused(make_run, script):
    run, finetune = make_run(class_token=False, global_pool="avg"), script("finetune")
    for words in (["--lr", "0"], ["--layer-decay", "1.5"], ["--batch", "0"], ["--scale", "nan"], ["--steps", "0"]):
        with pytest.raises(Refusal, match=words[0]):
            finetune.main(["--ckpt", str(run), *words])
    with pytest.raises(Refusal, match="no class token"):
        finetune.main(["--ckpt", str(run), *QUICK, "--pool", "class"])
    assert not (run / "evaluate").exists()
    finetune = finetune.main
    for words, message in (
        (["--epochs", "0"], "--epochs 0"),
        (["epochs=0"], "--epochs 0"),
        (["lr=nan"], "--lr nan"),
        (["--ema", "1"], "--ema 1.0: expected a number of at least 0, below 1"),
        (["learning_rate=1"], "unknown option 'learning_rate'"),
        (["layerdecay=0.5"], "did you mean 'layer_decay'"),
        (["--layerdecay", "0.5"], "did you mean '--layer-decay'"),
        (["lr=high"], "wrong value for 'lr'"),
        (["finetune_smal"], "did you mean 'finetune_small'"),
        (["finetune_small", "finetune_mae_vit_base"], "expected one recipe"),
        (["--warmup", "3 apples"], "--warmup='3 apples'"),
        (["--pool", "clas"], "did you mean 'class'"),
        (["--rand-augment", "strong-m9"], "--rand-augment strong-m9: timm cannot read it"),
        (["--size", "30"], "30x30"),
        (["--batch", "5", "--mixup", "1"], "choose a multiple of 2"),
        (["--resume"], "nothing was begun"),
        (["--cache", "ful"], "--cache ful: expected full, the pixels"),
    ):
        with pytest.raises(Refusal, match=re.escape(message)):
            finetune(["--ckpt", str(run), "--device", "cpu", "--threads", "1", *words])
    assert not (run / "evaluate").exists()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_trains(path, make_run, script, report_of):
    """Two steps of a tiny ViT with a class token, and the protocol says which recipe it was and what was changed."""
    run = make_run(depth=2)
    words = ["steps=2", "batch=12", "log_every=1", "tensorboard=false"]
    words += ["ema=0.9"] if "deit" in path.stem else []
    assert script("finetune").main([path.stem, "--ckpt", str(run), *words, "--no-baselines", "--threads", "1"]) == 0
    report = report_of(run, "finetune")
    kind = path.stem.removeprefix("finetune_")
    assert report["protocol"]["id"].startswith(f"finetune/{kind}, changed: batch,")
    assert "tensorboard" not in report["protocol"]["id"]
    assert report["protocol"]["recipe"] == path.stem and {"batch", "steps"} <= set(report["protocol"]["changed"])
    (entry,) = report["values"]["subject"].values()
    assert ("ema" in entry) == (kind in ("deit_scratch", "small"))
    assert entry["best_on_test"]["accuracy"] >= entry["accuracy"] == entry["history"][0][-1]["raw"]
    metrics = [json.loads(line) for line in (run / "evaluate/finetune/trained-seed0/metrics.jsonl").open()]
    assert [record["step"] for record in metrics] == [1, 2] and metrics[-1]["test/accuracy"] == entry["accuracy"]


def test_recipes_hold_the_published_numbers():
    from common.config import load

    recipe = {path.stem.removeprefix("finetune_"): load(FinetuneConfig, path, []) for path in RECIPES}
    at = lambda name: recipe[name].batch / 256  # noqa: E731
    names = ("mae_vit_base", "droppos_vit_base", "ibot_vit_small", "deit_scratch")
    mae, droppos, ibot, deit = (recipe[name] for name in names)
    assert (mae.lr, droppos.lr) == (5e-4, 1e-3) and ibot.lr * at("ibot_vit_small") == 4e-3
    assert deit.lr * at("deit_scratch") == 5e-4 * 1024 / 512
    assert [each.layer_decay for each in (mae, droppos, ibot)] == [0.65, 0.75, 0.75]
    assert [each.epochs for each in (mae, droppos, ibot, deit)] == [100, 100, 200, 300]
    assert [each.warmup for each in (mae, droppos, ibot, deit)] == ["5 epochs", "5 epochs", "20 epochs", "5 epochs"]
    for each in (mae, droppos, ibot, deit):
        assert each.min_lr * each.batch / 256 == pytest.approx(1e-5 if each is deit else 1e-6)
        assert (each.batch, each.weight_decay, each.drop_path, each.smoothing) == (1024, 0.05, 0.1, 0.1)
        assert (each.mixup, each.cutmix, each.erasing, each.clip) == (0.8, 1.0, 0.25, 0.0)
        assert each.rand_augment == "rand-m9-mstd0.5-inc1" and each.scale == 0.08
    assert (deit.repeats, deit.ema, deit.like) == (3, 0.99996, "supervised/deit_small")


@pytest.mark.slow
def test_another_size_resizes_the_position_embedding_and_timm_judges_the_same(make_run, script, report_of, data):
    run = make_run("full", depth=1)
    assert script("finetune").main(["--ckpt", str(run), *QUICK, "--size", "16", "--crop", "1.0", "--no-baselines"]) == 0
    report = report_of(run, "finetune")
    assert report["protocol"]["transform"]["size"] == [16, 16] and report["protocol"]["transform"]["crop"] == 1.0
    assert "8x8 px before, 16x16 now: position embedding resized from 2x2 to 4x4 patches" in report["protocol"]["notes"]
    assert report["weights_digest"] == digest(subject_of(str(run)).state)  # the checkpoint, not what was made of it
    (folder,) = (run / "evaluate" / "finetune").glob("*-seed0")
    backbone, _, description = public.load_backbone(folder)
    assert backbone.model.pos_embed.shape == (1, 17, 32) and description["size"] == [16, 16]
    # exported, timm alone names the same classes: head, names, normalisation, size and crop are in its two files
    assert script("export").main(["--ckpt", str(folder), "--to", "timm", "--out", str(run / "timm")]) == 0
    model = timm.create_model(f"local-dir:{run / 'timm'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    files = sorted((data / "test").rglob("*.png"))
    with torch.no_grad():
        guesses = model(torch.stack([transform(Image.open(file).convert("RGB")) for file in files])).argmax(1)
    names = [model.pretrained_cfg["label_names"][guess] for guess in guesses]
    right = [name == file.parent.name for name, file in zip(names, files, strict=True)]
    (entry,) = report["values"]["subject"].values()
    assert len(right) == 21 and sum(right) / 21 == pytest.approx(entry["accuracy"])
    # trained without position embedding: the fresh one has the right size too
    run = make_run("none", depth=1)
    assert script("finetune").main(["--ckpt", str(run), *QUICK, "--size", "[16,8]", "--no-baselines"]) == 0
    notes = report_of(run, "finetune")["protocol"]["notes"]
    assert any("fresh one" in note for note in notes) and not any("resized from" in note for note in notes)


def test_resized_positions_are_interpolated_ones(make_run):
    subject = subject_of(str(make_run("full", depth=1)))
    sized, _ = at_size(subject, 16, None)
    old, new = subject.state["pos_embed"], sized.state["pos_embed"]
    grid = old[:, 1:].reshape(1, 2, 2, 32).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", align_corners=False)
    torch.testing.assert_close(new[:, 1:], expected.flatten(2).transpose(1, 2))
    assert new[:, :1].equal(old[:, :1]) and subject.state["pos_embed"] is old
    same, note = at_size(subject, None, None)
    assert note == "" and same.state is subject.state


def losses(folder):
    return [(record["step"], record["loss"].hex(), record.get("test/accuracy_ema"))
            for record in map(json.loads, (folder / "metrics.jsonl").open())]  # fmt: skip


STRONG = ["--steps", "10", "--batch", "12", "--lr", "0.02", "--warmup", "0", "--threads", "1", "--device", "cpu"]
STRONG += ["--mixup", "0.8", "--cutmix", "1", "--rand-augment", "rand-m9-mstd0.5-inc1", "--erasing", "0.25"]
STRONG += ["--drop-path", "0.3", "--ema", "0.8", "--repeats", "2", "--log-every", "1", "--checkpoint-every", "4"]


def test_interrupted_it_goes_on_to_the_last_bit(make_run, script, report_of, monkeypatch, tmp_path):
    run, main = make_run(depth=3), script("finetune").main
    ask = ["--ckpt", str(run), *STRONG]
    assert main([*ask, "--out", str(tmp_path / "peaceful")]) == 0
    write = tracking.Tracker.write

    def crash(self, step, record):
        write(self, step, record)
        if step == 6 and "random" in str(self.run):
            raise RuntimeError("power cut, say")

    monkeypatch.setattr(tracking.Tracker, "write", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        main(ask)
    monkeypatch.setattr(tracking.Tracker, "write", write)
    folder = run / "evaluate" / "finetune"
    assert (folder / "trained-seed0" / "result.json").exists() and not (folder / "trained-seed0" / "state").exists()
    assert [step for step, *_ in losses(folder / "random-seed0")] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(Refusal, match="was interrupted: go on with --resume"):
        main(ask)
    with pytest.raises(Refusal, match=r"lr=0.01, and .* was begun with lr=0.02"):
        main(["--ckpt", str(run), "--resume", "lr=0.01"])
    with pytest.raises(Refusal, match="pool=mean, and"):
        main(["finetune_mae_vit_base", "--ckpt", str(run), "--resume", *STRONG])
    assert main(["--ckpt", str(run), "--resume", "--threads", "1", "--device", "cpu"]) == 0  # the options are known
    for name in ("trained-seed0", "random-seed0"):
        mine, theirs = losses(folder / name), losses(tmp_path / "peaceful" / "finetune" / name)
        assert mine == theirs and [step for step, *_ in mine] == list(range(1, 11))
        for file in (storage.WEIGHTS, HEAD):
            assert (folder / name / file).read_bytes() == (tmp_path / "peaceful/finetune" / name / file).read_bytes()
    theirs = json.loads((tmp_path / "peaceful" / "finetune.json").read_text())
    assert report_of(run, "finetune")["values"] == theirs["values"]


def test_more_classes_than_it_was_begun_with(make_run, script, tmp_path, monkeypatch):
    run, main = make_run(), script("finetune").main
    write = tracking.Tracker.write

    def crash(self, step, record):
        write(self, step, record)
        if step == 6:
            raise RuntimeError("power cut, say")

    monkeypatch.setattr(tracking.Tracker, "write", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        main(["--ckpt", str(run), *QUICK, "--log-every", "1", "--checkpoint-every", "2", "--no-baselines"])
    monkeypatch.setattr(tracking.Tracker, "write", write)
    for part in ("train", "test"):
        write_images(tmp_path / "hundred" / part, 1, names=[f"class{i:03d}" for i in range(100)])
    with pytest.raises(Refusal, match="was begun with classes 3, and now it is 100"):
        main(["--ckpt", str(run), "--resume", "--no-baselines", "--device", "cpu", "--threads", "1",
              "--data", str(tmp_path / "hundred")])  # fmt: skip


def test_grey_images_and_a_grey_model(make_run, script, report_of, tmp_path):
    for part, seed in (("train", 0), ("test", 1)):
        rng = np.random.default_rng(seed)
        for name, value in (("dark", 60), ("light", 190)):
            (tmp_path / "grey" / part / name).mkdir(parents=True)
            for i in range(8):
                pixels = rng.normal(value, 20, (8, 8)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "grey" / part / name / f"{i}.png")
    run = make_run("full")
    arguments = ["--data", str(tmp_path / "grey"), *QUICK, "--rand-augment", "rand-m9-n1", "--no-baselines"]
    assert script("finetune").main(["--ckpt", str(run), *arguments]) == 0
    assert report_of(run, "finetune")["data"]["classes"] == ["dark", "light"]
    recipe = tmp_path / "grey.yaml"
    recipe.write_text(
        "model: {name: vit_tiny_patch16_224, mean: [0.5], std: [0.25], kwargs: {patch_size: 4, embed_dim: 32, "
        "depth: 1, num_heads: 2}}\nviews: {global: {size: 8}}\nobjectives: {absolute: {}}\n"
    )
    out = ["--like", str(recipe), "--out", str(tmp_path / "out"), "--erasing", "0.5"]
    assert script("finetune").main(["--ckpt", "random", *arguments, *out]) == 0
    report = json.loads((tmp_path / "out" / "finetune.json").read_text())
    assert report["values"].keys() == {"random"} and report["subject"]["model"]["mean"] == [0.5]


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one_and_judge_no_image_twice(
    make_run, run_script, script, report_of, tmp_path
):
    run = make_run("full", depth=2)
    words = [*STRONG, "--drop-path", "0", "--no-baselines", "--steps", "12", "--ckpt", str(run)]
    assert script("finetune").main([*words, "--out", str(tmp_path)]) == 0
    done = run_script("finetune", *words, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finetuning accuracy (%)") == 1
    places = (tmp_path / "finetune", run / "evaluate" / "finetune")
    one, two = ([json.loads(line) for line in (place / "trained-seed0/metrics.jsonl").open()] for place in places)
    assert len(one) == len(two) == 12
    for mine, theirs in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    report = report_of(run, "finetune")
    assert report["data"]["test"]["judged"] == 21  # 11 and 10
    share = report["values"]["subject"]["mean"]["accuracy"]
    assert share > 0.8 and abs(share * 21 - round(share * 21)) < 1e-9 and share == one[-1]["test/accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_it_goes_on_to_the_last_bit(make_run, run_script, tmp_path, processes):
    run = make_run(depth=3)
    words = ["--ckpt", str(run), *STRONG, "--steps", "120", "--no-baselines"]
    done = run_script("finetune", *words, "--out", tmp_path / "peaceful", processes=processes)
    assert done.returncode == 0, done.stderr
    folder = run / "evaluate" / "finetune" / "trained-seed0"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [sys.executable] if processes == 1 else torchrun
    for kill in range(2):
        child = subprocess.Popen(
            [*start, str(ROOT / "evaluate" / "finetune.py"), *words, *(["--resume"] if kill else [])],
            env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline, enough = time.monotonic() + 100, 30 * (kill + 1)
        while time.monotonic() < deadline and child.poll() is None:
            if (folder / "metrics.jsonl").exists() and len(
                (folder / "metrics.jsonl").read_text().splitlines()
            ) > enough:
                break
            time.sleep(0.005)
        assert child.poll() is None
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        assert not (folder / "result.json").exists() and list((folder / "state").glob("step_*"))
    done = run_script("finetune", *words, "--resume", processes=processes)
    assert done.returncode == 0 and "resumed after step" in done.stdout, done.stderr
    assert losses(folder) == losses(tmp_path / "peaceful" / "finetune" / "trained-seed0")


def test_a_classifier_of_the_same_classes_goes_on(make_run, script, report_of, capsys, data, tmp_path):
    """A step too small to change an answer is judged as what it began from; other classes get a fresh layer."""
    run = make_run("none")
    words = ["--batch", "12", "--warmup", "0", "--no-baselines", "--threads", "1", "--device", "cpu"]
    assert script("finetune").main(["--ckpt", str(run), "--steps", "8", "--lr", "0.02", *words]) == 0
    first = report_of(run, "finetune")["values"]["subject"]["mean"]["accuracy"]
    again = ["--ckpt", str(run / "evaluate" / "finetune" / "trained-seed0"), "--steps", "1", "--lr", "1e-12", *words]
    capsys.readouterr()
    assert script("finetune").main([*again, "--out", str(tmp_path / "same.json")]) == 0
    assert "begins with the checkpoint's own classifier" in capsys.readouterr().out
    assert json.loads((tmp_path / "same.json").read_text())["values"]["subject"]["mean"]["accuracy"] == first
    others = tmp_path / "others"
    shutil.copytree(data, others)
    for split in ("train", "test"):
        for number, folder in enumerate(sorted((others / split).iterdir())):
            folder.rename(folder.with_name(f"other{number}"))
    assert script("finetune").main([*again, "--data", str(others), "--out", str(tmp_path / "other.json")]) == 0
    assert "begins with the checkpoint's own classifier" not in capsys.readouterr().out
