"""evaluate/finetune.py: layer decay, fresh positions, mixed labels, and the script in one process and in two."""

from pathlib import Path

import pytest
import torch

from common.errors import Refusal
from common.optim import parameter_groups
from common.subjects import find

QUICK = ["--steps", "6", "--batch", "12", "--lr", "0.02", "--warmup", "0", "--threads", "1", "--device", "cpu"]


def test_layer_decay_scales(make_run, script):
    backbone, _ = find(str(make_run("full", depth=3))).for_finetuning()
    classifier = script("finetune").Classifier(backbone, "mean", 3)
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
    subject = find(str(make_run("none")))
    assert subject.state is not None
    subject.state["pos_embed"] = torch.full_like(subject.state["pos_embed"], 9.0)  # never trained: must not survive
    backbone, note = subject.for_finetuning(seed=1, drop_path_rate=0.1)
    embedding = backbone.model.pos_embed
    assert "fresh one (pos_embed)" in note and embedding.requires_grad and 0 < embedding.std() < 0.05
    assert torch.equal(backbone.model.blocks[0].attn.qkv.weight, subject.state["blocks.0.attn.qkv.weight"])
    full, note = find(str(make_run("full"))).for_finetuning()
    assert note == "" and full.model.pos_embed.requires_grad


def test_tables_inside_the_blocks_become_trainable_again():
    from common.checkpoint import build, describe
    from common.models import ModelConfig, create
    from common.subjects import Subject

    shape = {"patch_size": 2, "embed_dim": 16, "depths": [1], "num_heads": [2], "window_size": 2}
    model = create(ModelConfig("swin_tiny_patch4_window7_224", shape), 8)
    description = describe(model, "none", "mean", {})
    subject = Subject("swin", description, build(description).model.state_dict(), Path())
    backbone, note = subject.for_finetuning()
    tables = [value for name, value in backbone.model.named_parameters() if "bias_table" in name]
    assert tables and all(table.requires_grad and table.std() > 0 for table in tables)
    assert "relative_position_bias_table" in note and not backbone.without_position


def test_mixed_labels_say_what_was_mixed(script):
    mix = script("finetune").mix
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    images[2:] = 200
    targets = torch.eye(2)[[0, 0, 1, 1]]
    torch.manual_seed(0)
    for alphas in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        for _ in range(5):
            mixed, shares = mix(images, targets, *alphas)
            assert mixed.dtype == torch.uint8
            brightness = mixed.float().mean((1, 2, 3)) / 200  # class 1 is bright: its share is seen in the image
            torch.testing.assert_close(brightness, shares[:, 1], atol=0.005, rtol=0)
    assert mix(images, targets, 0.0, 0.0)[0] is images


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


def test_two_processes_count_every_test_image_once(make_run, run_script, report_of):
    run = make_run()
    done = run_script("finetune", "--ckpt", run, *QUICK, "--steps", "25", "--no-baselines", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finetuning accuracy (%)") == 1
    report = report_of(run, "finetune")
    assert report["data"]["test"]["judged"] == 21  # 11 and 10
    share = report["values"]["subject"]["mean"]["accuracy"]
    assert share > 0.8 and abs(share * 21 - round(share * 21)) < 1e-9


def test_bad_numbers_are_refused(make_run, script):
    run, finetune = make_run(class_token=False, global_pool="avg"), script("finetune")
    for words in (["--lr", "0"], ["--layer-decay", "1.5"], ["--batch", "0"], ["--scale", "nan"], ["--steps", "0"]):
        with pytest.raises(Refusal, match=words[0]):
            finetune.main(["--ckpt", str(run), *words])
    with pytest.raises(Refusal, match="no class token"):
        finetune.main(["--ckpt", str(run), *QUICK, "--pool", "class"])
    assert not (run / "evaluate").exists()
