"""evaluate/validate.py: against finetuning's own figures, hand counts and the authors' models; what is refused."""

import argparse
import csv
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from pictures import write_images
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch.nn import functional as F

from common.batches.crops import evaluation
from common.checkpoints import public, storage
from common.checkpoints.storage import HEAD
from common.data import open_data
from common.errors import Refusal
from common.features.metrics import wilson
from common.models import irpe, lv_vit, sp_vit
from common.models.names import described, register

CALM = ["--threads", "1", "--device", "cpu"]
SEVEN = ("ant", "bee", "cow", "dog", "elk", "fox", "gnu")
QUICK = ["--steps", "6", "--batch", "12", "--lr", "0.02", "--warmup", "0", "--no-baselines", *CALM]


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """Five images of noise of each of seven classes to judge, in a folder without a split; names that interleave."""
    folder, rng = tmp_path_factory.mktemp("animals"), np.random.default_rng(3)
    for i in range(35):
        place = folder / SEVEN[i % 7]
        place.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).save(place / f"val_{i}.png")
    return folder


@pytest.fixture
def classified(make_run):
    """classified(names) -> a run whose backbone has a drawn classifier of these classes; pooling: class, mean, both."""

    def make(names=SEVEN, pooling="class", position="full", **training):
        run = make_run(position)
        about = json.loads((run / "backbone.json").read_text())
        generator = torch.Generator().manual_seed(5)
        width = 64 if pooling == "both" else 32
        head = {"weight": torch.randn(len(names), width, generator=generator), "bias": torch.zeros(len(names))}
        save_file(head, run / HEAD)
        facts = {"label_names": list(names), "head_sha256": storage.sha256(run / HEAD), "data": "elsewhere"}
        backbone, _, _ = public.load_backbone(run)
        public.export(run, backbone, public.describe(backbone, position, pooling, about["training"] | facts | training))
        return run

    return make


def logits_of(run, images):
    """What a run says of `images`, all at once and with nothing but its backbone and its head: (n, K)."""
    backbone, plan, about = public.load_backbone(run)
    head, crop = load_file(run / HEAD), about["crop"]
    batch = torch.stack([evaluation(images.read(i), about["size"], crop) for i in range(len(images))])
    with torch.no_grad():
        return F.linear(backbone(batch, plan).pooled(about["pooling"]), head["weight"], head["bias"])


def entry_of(report):
    return report["values"]["subject"]["logits"]


# ------------------------------------------------------------------------------------------------ right numbers


@pytest.mark.parametrize("ema", [None, 0.5])
def test_what_finetuning_judged_is_found_again(ema, make_run, script, report_of, capsys):
    run = make_run("none")
    words = [*QUICK, *(["--ema", str(ema)] if ema else [])]
    assert script("finetune").main(["--ckpt", str(run), *words]) == 0
    own = report_of(run, "finetune")["values"]["subject"]["mean"]
    folder = run / "evaluate" / "finetune" / "trained-seed0"
    capsys.readouterr()
    assert script("validate").main(["--ckpt", str(folder), *CALM]) == 0
    out, report = capsys.readouterr().out, report_of(folder, "validate")
    entry = entry_of(report)
    assert entry["accuracy"] == (own["ema"] if ema else own)["accuracy"] and entry["accuracy"] > 0.2
    assert entry["interval"] == pytest.approx((own["ema"] if ema else own)["interval"])
    assert ("average of the weights (EMA)" if ema else "weights of the last step") in out
    assert report["data"]["test"] == report_of(run, "finetune")["data"]["test"]
    if not ema:
        first = np.load(run / "evaluate" / "finetune.outcomes.npz")
        again = np.load(folder / "evaluate" / "validate.outcomes.npz")
        assert (first["subject/mean"] == again["subject/logits"]).all() and (first["index"] == again["index"]).all()
    assert "top5" not in entry and "top-5" not in out  # of three classes


def test_what_a_pretraining_with_labels_judged_is_found_again(inside, tiny, data, script, report_of, tmp_path, capsys):
    """Weights and their average, on the data's own test images."""
    run = tmp_path / "run"
    words = ["objectives={classification: {}}", "average=0.5", "monitor.validation=val", "monitor.held_out=0"]
    words += ["monitor.every=6", "steps=6", "batch=12", "optimizer.lr=0.02", "tensorboard=false"]
    assert inside(*tiny, f"data={data}", *words, f"run={run}") == 0
    own = [json.loads(line) for line in (run / "metrics.jsonl").open()][-1]["top1/average"]
    capsys.readouterr()
    assert script("validate").main(["--ckpt", str(run), *CALM]) == 0
    report = report_of(run, "validate")
    assert report["data"]["test"]["judged"] == 21 and entry_of(report)["accuracy"] == pytest.approx(own, abs=1e-9)
    assert "average of the weights (EMA)" in capsys.readouterr().out
    both = ["--ckpt", str(run), str(run / "best.safetensors"), "--out", str(tmp_path / "both"), *CALM]
    assert script("validate").main(both) == 0
    with (tmp_path / "both" / "validate.csv").open() as file:
        rows = list(csv.DictReader(file))
    best = json.loads((run / "best.json").read_text())["training"]["right"]
    assert [float(row["top1"]) for row in rows] == pytest.approx([own, best], abs=1e-9)
    assert len({row["checkpoint"] for row in rows}) == 2


@pytest.mark.parametrize("pooling, position", [("class", "full"), ("mean", "none"), ("both", "full")])
def test_top_five_and_real_are_those_of_a_hand_count(
    pooling, position, classified, animals, script, report_of, tmp_path, capsys
):
    run, images = classified(pooling=pooling, position=position), open_data(str(animals))
    rng = np.random.default_rng(1)
    by_name = {f"val_{i}.png": rng.choice(7, int(rng.integers(0, 4)), replace=False).tolist() for i in range(35)}
    real = tmp_path / "real.json"
    real.write_text(json.dumps(list(by_name.values())))  # val_2 comes before val_10
    words = ["--data", str(animals), "--real", str(real), *CALM]
    assert script("validate").main(["--ckpt", str(run), *words]) == 0
    report, scores = report_of(run, "validate"), logits_of(run, images)
    top1 = top5 = real1 = real5 = judged = 0
    table = np.zeros((7, 7), int)
    for i, row in enumerate(scores.tolist()):
        ranked = sorted(range(7), key=lambda k: -row[k])
        label, right = int(images.labels[i]), by_name[Path(images.name(i)).name]
        table[label, ranked[0]] += 1
        top1, top5 = top1 + (ranked[0] == label), top5 + (label in ranked[:5])
        if right:
            judged += 1
            real1, real5 = real1 + (ranked[0] in right), real5 + any(k in right for k in ranked[:5])
    entry = entry_of(report)
    assert entry["accuracy"] == top1 / 35 and entry["interval"] == list(wilson(top1 / 35, 35))
    assert entry["top5"] == {"accuracy": top5 / 35, "interval": list(wilson(top5 / 35, 35)), "images": 35}
    assert 0 < judged < 35 and entry["real"]["images"] == judged and 0 < real1 < judged
    assert entry["real"]["accuracy"] == real1 / judged and entry["real"]["top5"]["accuracy"] == real5 / judged
    assert entry["real"]["interval"] == list(wilson(real1 / judged, judged))
    for k, row in enumerate(entry["classes"]):
        assert (row["class"], row["images"], row["right"]) == (SEVEN[k], 5, table[k, k])
        assert row["predicted"] == table[:, k].sum()
        wrong = table[k].copy()
        wrong[k] = 0
        assert row.get("mistaken", 0) == wrong.max() and row["top1"] == table[k, k] / 5
    assert sum(row["top5"] * 5 for row in entry["classes"]) == pytest.approx(top5)
    with (run / "evaluate" / "validate" / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list(SEVEN) and float(rows[2]["top1"]) == table[2, 2] / 5
    picture = np.asarray(Image.open(run / "evaluate" / "validate" / "confusion.png").convert("L"))
    assert picture.shape[0] > 300 and picture.std() > 10
    out = capsys.readouterr().out
    for words in ("ReaL top-5", f"{100 * top1 / 35:.1f}", f"{100 * real1 / judged:.1f}", "all of it is judged"):
        assert words in out


def test_classes_are_matched_by_name(classified, animals, script, report_of, tmp_path, capsys):
    """The same classifier whose classes stand in another order, among more than the data have."""
    run = classified()
    words = ["--data", str(animals), *CALM]
    assert script("validate").main(["--ckpt", str(run), *words]) == 0
    first = entry_of(report_of(run, "validate"))
    order = [4, 2, 6, 0, 1, 5, 3]
    head, about = load_file(run / HEAD), json.loads((run / "backbone.json").read_text())
    more = {"weight": torch.zeros(1, 32), "bias": torch.tensor([-1e4])}
    save_file({name: torch.cat([head[name][order], more[name]]) for name in head}, run / HEAD)
    names = [*(SEVEN[k] for k in order), "yak"]
    about["training"] |= {"label_names": names, "head_sha256": storage.sha256(run / HEAD)}
    (run / "backbone.json").write_text(json.dumps(about))
    capsys.readouterr()
    assert script("validate").main(["--ckpt", str(run), *words]) == 0
    assert entry_of(report_of(run, "validate")) == first
    assert "it knows 1 classes that the data lack" in capsys.readouterr().out


def with_irpe(**kwargs):
    return irpe.add_irpe(VisionTransformer(**kwargs), on="k")


MICRO = {
    "lvvit_micro": (lv_vit.LvVit, lv_vit.checkpoint_filter_fn, lv_vit.described_as(0.9)),
    "spvit_micro": (sp_vit.SpVit, sp_vit.checkpoint_filter_fn, lv_vit.described_as(0.9)),
    "irpe_micro": (with_irpe, irpe.checkpoint_filter_fn, described(0.9, "patch_embed.proj", "head")),
}


def micro(name):
    """Register a small model under `name`, with the parameter names of its authors: its arguments."""
    small = {"img_size": 32, "embed_dim": 12, "depth": 2, "num_heads": 2, "num_classes": 7}
    make, convert, about = MICRO[name]
    if not timm.is_model(name):
        sys.modules[__name__].default_cfgs = generate_default_cfgs({name: about})
        register(__name__, name, "Small.", make, small, convert)
    return small


AUTHORS = {  # how they save
    "lvvit_micro": lambda state: {"state_dict": state, "epoch": 3, "args": argparse.Namespace(lr=1)},
    "spvit_micro": lambda state: {"state_dict": {k: v + 1 for k, v in state.items()}, "state_dict_ema": state},
    "irpe_micro": lambda state: {"model": state, "epoch": 3},
}


@pytest.mark.parametrize("name", AUTHORS)
def test_authors_files_answer_as_their_models_do(name, animals, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = micro(name)
    torch.manual_seed(2)
    theirs = timm.create_model(name, **small).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    torch.save(AUTHORS[name](theirs.state_dict()), "authors.pth")
    words = ["--model", name, "--weights", "authors.pth", "--size", "32", "--data", str(animals), *CALM]
    assert script("validate").main(words) == 0
    place = Path("runs", f"timm-{name}", "evaluate")
    entry = entry_of(json.loads((place / "validate.json").read_text()))
    images = open_data(str(animals))
    batch = torch.stack([evaluation(images.read(i), [32, 32], 0.9) for i in range(35)])
    mean, std = (torch.tensor(theirs.pretrained_cfg[each]).view(-1, 1, 1) for each in ("mean", "std"))
    with torch.no_grad():
        scores = theirs((batch / 255 - mean) / std)
        if name != "irpe_micro":  # x_cls + 0.5 max of the patches'
            tokens = theirs.forward_features((batch / 255 - mean) / std)
            by_hand = theirs.head(tokens[:, 0]) + 0.5 * theirs.aux_head(tokens[:, 1:]).amax(1)
            torch.testing.assert_close(scores, by_hand)
            assert (scores.argmax(1) != theirs.head(tokens[:, 0]).argmax(1)).any()  # it matters
    labels = torch.from_numpy(images.labels)
    assert len(set(scores.argmax(1).tolist())) > 1
    right = np.load(place / "validate.outcomes.npz")["subject/logits"][0]
    assert (torch.from_numpy(right) == (scores.argmax(1) == labels)).all()
    assert entry["top5"]["accuracy"] == pytest.approx((scores.topk(5).indices == labels[:, None]).any(1).float().mean())


def test_several_stand_in_one_table(classified, animals, script, report_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = classified()
    other = tmp_path / "other" / "run"  # of the same name
    shutil.copytree(run, other)
    words = ["--ckpt", str(run), str(other), "--data", str(animals), *CALM]
    assert script("validate").main([*words, "--out", "table"]) == 0
    with Path("table/validate.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == [str(run), str(other)] and rows[0]["top1"] == rows[1]["top1"]
    assert float(rows[0]["top5"]) == entry_of(report_of(other, "validate"))["top5"]["accuracy"]
    assert entry_of(report_of(run, "validate")) == entry_of(report_of(other, "validate"))
    assert script("compare").main([str(run), str(other), "--no-run"]) == 0
    assert f"{100 * float(rows[0]['top1']):.1f}" in Path("compare/compare.md").read_text()
    assert "classifier" in capsys.readouterr().out


def test_other_sizes_and_crops(classified, animals, script, report_of, capsys):
    run = classified()
    assert script("validate").main(
        ["--ckpt", str(run), "--data", str(animals), "--size", "12", "16", "--crop", "0.5", *CALM]
    ) == 0  # fmt: skip
    report = report_of(run, "validate")
    assert report["protocol"]["transform"] == {
        "name": "evaluation", "size": [12, 16], "crop": 0.5, "interpolation": "bicubic"
    }  # fmt: skip
    assert "position embedding resized from 2x2 to 3x4" in report["subject"]["loaded"][0]
    assert "12x16 px" in capsys.readouterr().out


def test_unreadable_images_are_left_out(classified, animals, script, report_of, tmp_path):
    run = classified()
    shutil.copytree(animals, tmp_path / "data")
    (tmp_path / "data" / "cow" / "val_2.png").write_bytes(b"no image")
    assert script("validate").main(["--ckpt", str(run), "--data", str(tmp_path / "data"), *CALM]) == 0
    report = report_of(run, "validate")
    assert report["data"]["test"]["judged"] == 34 and report["data"]["looked_at"]["unreadable"] == 1
    assert [row["images"] for row in entry_of(report)["classes"]] == [5, 5, 4, 5, 5, 5, 5]


def test_of_what_was_trained_on_the_held_out_fifth_is_judged(make_run, script, report_of, tmp_path, capsys):
    write_images(tmp_path / "colours", 10)
    run = make_run("full")
    assert script("finetune").main(["--ckpt", str(run), "--data", str(tmp_path / "colours"), *QUICK]) == 0
    folder = run / "evaluate" / "finetune" / "trained-seed0"
    own = report_of(run, "finetune")["values"]["subject"]["mean"]["accuracy"]
    shutil.copytree(tmp_path / "colours", tmp_path / "copy")  # the same images elsewhere
    for words in ([], ["--data", str(tmp_path / "colours")], ["--data", str(tmp_path / "copy")]):
        assert script("validate").main(["--ckpt", str(folder), *words, *CALM]) == 0
        report = report_of(folder, "validate")
        assert report["data"]["test"]["judged"] == 6 and entry_of(report)["accuracy"] == own
    write_images(tmp_path / "more", 5, seed=4)
    assert script("validate").main(["--ckpt", str(folder), "--data", str(tmp_path / "more"), *CALM]) == 0
    assert report_of(folder, "validate")["data"]["test"]["judged"] == 15
    assert "no test split in" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_count_as_one(classified, animals, run_script, report_of, tmp_path):
    run = classified()
    (tmp_path / "real.json").write_text(json.dumps([[i % 7, (i + 2) % 7][: i % 3] for i in range(35)]))
    words = ["--ckpt", run, "--data", animals, "--real", tmp_path / "real.json", "--threads", "1"]
    values, outcomes = [], []
    for processes in (2, 1):
        done = run_script("validate", *words, processes=processes)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("top-1 and top-5 (%)") == 1
        report = report_of(run, "validate")
        assert report["data"]["test"]["judged"] == 35  # 18 and 17
        values.append(report["values"])
        outcomes.append(dict(np.load(run / "evaluate" / "validate.outcomes.npz")))
    assert values[0] == values[1]
    assert all((outcomes[0][name] == outcomes[1][name]).all() for name in outcomes[1])


# ------------------------------------------------------------------------------------------------ refused


def refused(script, match, *words):
    with pytest.raises(Refusal, match=match) as refusal:
        script("validate").main([*map(str, words), *CALM])
    assert "\n" not in str(refusal.value)


def test_what_has_no_classifier(make_run, script, tmp_path, animals):
    run = make_run("full")
    refused(script, "is a backbone without a classifier: finetune it first .*finetune.* or judge its features .*linear",
            "--ckpt", run)  # fmt: skip
    assert script("finetune").main(["--ckpt", str(run), *QUICK]) == 0
    refused(script, r"one that was finetuned from it is --ckpt .*trained-seed0$", "--ckpt", run)
    refused(script, "nothing was trained, so there is no classifier", "--ckpt", "random")
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "bare.pth")
    refused(script, r"--weights .*bare\.pth holds no classifier \(head\)", "--model", "test_vit", "--weights",
            tmp_path / "bare.pth", "--data", animals)  # fmt: skip
    assert not (run / "evaluate" / "validate.json").exists()


def test_words_that_do_not_go_together(script, tmp_path):
    (tmp_path / "a.pth").write_bytes(b"")
    refused(script, "nothing to judge: give --ckpt RUN")
    refused(script, "of which architecture. Give --model NAME --weights", "--ckpt", tmp_path / "a.pth")
    refused(script, "of which architecture. Give --model NAME, such as", "--weights", tmp_path / "a.pth")
    refused(script, "--size 1 2 3: expected", "--ckpt", "x", "--size", 1, 2, 3)
    refused(script, "did you mean 'lvvit_t' or 'lvvit_s'", "--model", "lvvit_x", "--weights", tmp_path / "a.pth")
    refused(script, "--like y goes with --ckpt random", "--ckpt", "x", "--like", "y")
    refused(script, "such as 96x96", "--model", "lvvit_t", "--weights", tmp_path / "a.pth", "--size", 100)


def test_data_that_do_not_fit(classified, animals, script, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = classified()
    refused(script, r"classes differ: run has 7 \(ant, bee, cow, dog, elk, … \(7 in all\)\), data=.* has 3 \(blue, "
            r"green, red\); give the data it was trained for", "--ckpt", run, "--data", data)  # fmt: skip
    torch.save(timm.create_model("test_vit", num_classes=5).state_dict(), "five.pth")
    refused(script, r"timm:test_vit tells 5 classes apart, and data=.* has 7 \(ant, .*expected as many", "--model",
            "test_vit", "--weights", "five.pth", "--data", animals)  # fmt: skip
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(animals / "ant" / "val_0.png", flat)
    refused(script, "no labels in", "--ckpt", run, "--data", flat)
    other = tmp_path / "second"
    shutil.copytree(run, other)
    about = json.loads((other / "backbone.json").read_text())
    about["training"]["data"] = str(animals)
    (other / "backbone.json").write_text(json.dumps(about))
    about["training"]["data"] = str(data)
    refused(script, "say on which images both are judged with --data", "--ckpt", other, classified(("blue", "green",
            "red"), data=str(data)))  # fmt: skip
    assert not (run / "evaluate").exists() and not Path("runs").exists() and not Path("validate").exists()


@pytest.mark.parametrize(
    "content, told",
    [
        ([[1]] * 34, "has labels of 34 images, and .* has 35: expected as many, in the order of the file names"),
        ([[1]] * 34 + [[7]], "7 is no class: expected 0 to 6"),
        ([[1]] * 34 + [["cow"]], "'cow' is no class"),
        ([1] * 35, "expected a list of lists"),
        ([[]] * 35, "has no label at all"),
        (None, "cannot be read: .*; expected real.json"),
    ],
)
def test_real_labels_of_other_images(content, told, classified, animals, script, tmp_path):
    run, file = classified(), tmp_path / "real.json"
    if content is not None:
        file.write_text(json.dumps(content))
    refused(script, told, "--ckpt", run, "--data", animals, "--real", file)
    assert not (run / "evaluate").exists()


def test_real_labels_of_images_of_one_name(classified, animals, script, tmp_path):
    run, file = classified(), tmp_path / "real.json"
    shutil.copytree(animals, tmp_path / "data")
    shutil.copy(animals / "ant" / "val_0.png", tmp_path / "data" / "bee")
    file.write_text(json.dumps([[1]] * 36))
    refused(script, "which list belongs to which image is not known, as .*ant/val_0.png and .*bee/val_0.png",
            "--ckpt", run, "--data", tmp_path / "data", "--real", file)  # fmt: skip
