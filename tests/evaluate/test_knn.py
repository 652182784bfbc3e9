"""evaluate/knn.py: numbers, report, table, and one line for each mistake."""

import json
import shutil

import pytest
import timm
import torch
from pictures import COLOURS, write_images
from torch.nn import functional as F

from common.checkpoints import storage
from common.data import open_data
from common.errors import Refusal
from common.features.extraction import Eye, extract, network, raw_pixels, whole
from common.features.neighbors import treated
from evaluate.job.subjects import subject_of
from evaluate.probing.quarters import quarters


def test_report_and_table_as_a_user_runs_it(make_run, run_script, report_of, data):
    run = make_run()
    done = run_script("knn", "--ckpt", run, "--k", "5", "20")
    assert done.returncode == 0, done.stderr
    report = report_of(run, "knn")
    assert report["values"].keys() == {"subject", "random", "pixels"}
    assert report["values"]["subject"].keys() == {"class", "mean", "both"}
    assert report["values"]["pixels"]["pixels"]["accuracy"] == 1.0  # three colours: pixels know
    found = report["values"]["subject"]["mean"]
    assert found["accuracy"] == found["k"]["20"]["accuracy"] and found["k"].keys() == {"5", "20"}
    assert found["interval"][0] < found["accuracy"] <= found["interval"][1]
    assert report["weights_sha256"] == storage.sha256(run / "backbone.safetensors")
    assert report["step"] == 12 and report["seeds"] == [0] and report["data"]["spec"] == str(data)
    assert report["data"]["train"]["images"] == 36 and report["data"]["test"]["judged"] == 21
    protocol = report["protocol"]
    assert protocol["id"] == "knn/centred" and protocol["features"].startswith("centred: less the mean")
    assert protocol["beside"]["id"] == "knn/dino" and protocol["transform"]["size"] == [8, 8]
    assert report["command"].startswith("knn.py --ckpt") and report["versions"]["PIL"].startswith("pillow")
    for words in ("trained", "random init", "raw pixels", "class token", "mean patch", "class + mean", "k=20, DINO's*"):
        assert words in done.stdout


def test_both_treatments_of_every_row_are_those_of_its_features(make_run, script, report_of, data):
    """By hand from the features: centred is the headline, the field's is beside it, for all rows alike."""
    run = make_run()
    assert script("knn").main(["--ckpt", str(run), "--k", "3", "--threads", "1", "--device", "cpu"]) == 0
    values, subject = report_of(run, "knn")["values"], subject_of(str(run))
    train, test = (open_data(str(data), split) for split in ("train", "test"))
    raw = [whole(images, Eye((8, 8), 1.0), raw_pixels)["pixels"] for images in (train, test)]
    rows = {("pixels", "pixels"): raw}
    for row, backbone in (("subject", subject.backbone()), ("random", subject.untrained().backbone())):
        rows[row, "mean"] = [extract(backbone, subject.plan, images)["mean"] for images in (train, test)]
    for (row, kind), (bank, queries) in rows.items():
        for entry, centre in ((values[row][kind], bank.mean(0)), (values[row][kind]["field"], 0)):
            a, b = (F.normalize(each - centre, dim=1) for each in (bank, queries))
            similarity, near = (b @ a.T).topk(3)
            votes = F.one_hot(torch.from_numpy(train.labels)[near], 3) * (similarity / 0.07).exp()[..., None]
            share = (votes.sum(1).argmax(1) == torch.from_numpy(test.labels)).double().mean().item()
            assert entry["k"]["3"]["accuracy"] == entry["accuracy"] == pytest.approx(share), (row, kind)


def test_quarters_of_the_block_that_held_out_images_choose(make_run, script, report_of, data, capsys):
    run = make_run()
    arguments = ["--ckpt", str(run), "--k", "3", "--threads", "1", "--device", "cpu", "--readout", "quarters"]
    assert script("knn").main(arguments) == 0
    report, subject = report_of(run, "knn_quarters"), subject_of(str(run))
    assert not (run / "evaluate" / "knn.json").exists() and report["protocol"]["id"] == "knn/quarters"
    entry = report["values"]["subject"]["chosen"]
    (block,) = entry["blocks"]
    train, test = (open_data(str(data), split) for split in ("train", "test"))
    eye = Eye.of(subject.backbone())
    read = network(subject.backbone(), subject.plan, readout=quarters)
    bank, queries = (whole(images, eye, read)[f"quarters{block}"] for images in (train, test))
    bank, queries = treated(bank, queries, "whitened")
    near = (queries @ bank.T).topk(3)
    votes = F.one_hot(torch.from_numpy(train.labels)[near.indices], 3) * (near.values / 0.07).exp()[..., None]
    share = (votes.sum(1).argmax(1) == torch.from_numpy(test.labels)).double().mean().item()
    assert entry["accuracy"] == pytest.approx(share)
    said = capsys.readouterr().out
    assert f"quarters of block {block}" in said and "partly whitened" in said and "k=3, centred*" in said
    assert {"random", "pixels"} < report["values"].keys()


def test_cache_is_used_and_two_seeds_are_two_baselines(make_run, script, report_of, capsys):
    run, knn = make_run(), script("knn")
    arguments = ["--ckpt", str(run), "--threads", "1", "--device", "cpu"]
    assert knn.main(arguments) == 0
    first = report_of(run, "knn")
    assert "features of 36 images" in capsys.readouterr().out
    assert knn.main([*arguments, "--seeds", "0", "1"]) == 0
    assert "features of 36 images from run" not in capsys.readouterr().out
    second = report_of(run, "knn")
    assert second["values"]["subject"] == first["values"]["subject"]
    by_seed = second["values"]["random"]["mean"]["by_seed"]
    assert len(by_seed) == 2 and by_seed[0] == first["values"]["random"]["mean"]["accuracy"]
    assert second["protocol"]["k"] == [10, 20]  # 100 and 200 are more than 36 images


def test_another_crop_of_the_test_images_is_another_transform(make_run, script, report_of):
    run, knn = make_run(), script("knn")
    arguments = ["--ckpt", str(run), "--threads", "1", "--device", "cpu"]
    for crop in ("0.5", "1.0"):
        assert knn.main([*arguments, "--crop", crop, "--out", str(run / "evaluate" / f"{crop}.json")]) == 0
    narrow, whole = report_of(run, "0.5"), report_of(run, "1.0")
    assert narrow["protocol"]["transform"]["crop"] == 0.5 and whole["protocol"]["transform"]["crop"] == 1.0
    keys = [json.loads(file.read_text()) for file in (run / "evaluate" / "cache").glob("*/complete.json")]
    assert len(keys) == 8  # subject and untrained, two splits, two crops


def test_raw_pixels_alone(make_run, script, report_of, tmp_path, data, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = make_run()
    arguments = ["--threads", "1", "--device", "cpu", "--k", "5"]
    assert script("knn").main(["--ckpt", str(run), *arguments]) == 0
    like = ["--ckpt", "pixels", "--like", str(run), "--data", str(data)]
    assert script("knn").main([*like, *arguments]) == 0
    assert "k-NN accuracy (%) of raw pixels (8x8 px) on" in capsys.readouterr().out
    alone = json.loads((tmp_path / "runs/pixels-8x8/evaluate/knn.json").read_text())
    assert alone["values"] == {"pixels": report_of(run, "knn")["values"]["pixels"]}
    assert alone["weights_sha256"] is alone["subject"]["model"] is None
    for other in ("layers", "finetune", "explain"):
        with pytest.raises(Refusal, match="raw pixels have no backbone, which is needed"):
            script(other).main([*like])
    with pytest.raises(Refusal, match="raw pixels have no backbone"):
        script("export").main(["--ckpt", "pixels"])


@pytest.mark.slow
def test_two_processes_extract_together_and_report_what_one_does(make_run, run_script, report_of):
    run = make_run()
    done = run_script("knn", "--ckpt", run, "--seeds", "0", "1", processes=2)
    assert done.returncode == 0, done.stderr
    assert "k-NN: 2 processes extract features, the first one answers from them" in done.stdout
    assert done.stdout.count("features of 36 images from run") == 1 == done.stdout.count("k-NN accuracy (%)")
    together = report_of(run, "knn")
    shutil.rmtree(run / "evaluate")
    assert run_script("knn", "--ckpt", run, "--seeds", "0", "1").returncode == 0
    assert together["values"] == report_of(run, "knn")["values"]


def test_random_of_a_recipe_and_of_a_run(make_run, script, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    knn, common = script("knn"), ["--threads", "1", "--device", "cpu", "--data", str(data)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: builtin\nmodel: {name: vit_tiny_patch16_224, kwargs: {patch_size: 4, embed_dim: 32, depth: 1, "
        "num_heads: 2}, crop: 1.0}\nviews: {global: {size: 8}}\nobjectives: {absolute: {position: full}}\n"
    )
    assert knn.main(["--ckpt", "random", "--like", str(recipe), *common]) == 0
    report = json.loads((tmp_path / "runs/random-vit_tiny_patch16_224/evaluate/knn.json").read_text())
    assert report["values"].keys() == {"random", "pixels"} and report["weights_sha256"] is None
    assert report["subject"]["position"] == "full"
    run = make_run()
    assert knn.main(["--ckpt", "random", "--like", str(run), "--out", str(tmp_path / "other"), *common]) == 0
    assert json.loads((tmp_path / "other" / "knn.json").read_text())["subject"]["position"] == "none"


def test_a_file_means_the_same_as_its_run(make_run):
    run = make_run()
    by_file, by_run = subject_of(str(run / "backbone.safetensors")), subject_of(str(run))
    assert (by_file.name, by_file.folder, by_file.weights_sha256) == (by_run.name, by_run.folder, by_run.weights_sha256)


def test_local_weights_for_a_timm_name(tmp_path):
    from safetensors.torch import save_file

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    subject = subject_of("timm:vit_tiny_patch16_224", weights=str(tmp_path / "weights.safetensors"))
    assert subject.weights_sha256 == storage.sha256(tmp_path / "weights.safetensors")
    assert (subject.backbone().model.cls_token == model.cls_token).all()
    assert subject.description["pooling"] == "class" and subject.plan.position == "full"
    (tmp_path / "other.safetensors").write_bytes(b"nothing")
    for weights, reason in (("other.safetensors", "is no weights file"), ("none.safetensors", "no such file")):
        with pytest.raises(Refusal, match=reason):
            subject_of("timm:vit_tiny_patch16_224", weights=str(tmp_path / weights))
    with pytest.raises(Refusal, match="did you mean 'vit_tiny_patch16_224'"):
        subject_of("timm:vit_tiny_patch16_225")


def test_each_mistake_is_one_refusal_and_nothing_is_written(make_run, script, tmp_path, data):
    run, knn = make_run(), script("knn")

    def refused(match, *arguments, ckpt=run):
        with pytest.raises(Refusal, match=match):
            knn.main(["--ckpt", str(ckpt), "--threads", "1", *map(str, arguments)])
        assert not (run / "evaluate").exists()

    refused("36 training images are fewer than k=50", "--k", 50)
    refused("--k 0: expected at least 1", "--k", 0)
    refused("did you mean '--seed' or '--seeds'", "--seedz", 1)
    refused("--like .* leave it out", "--like", run)
    refused("--weights .* goes with --ckpt timm", "--weights", "file")
    refused("no checkpoint at", ckpt=tmp_path / "nowhere")
    refused("no such folder", "--data", tmp_path / "nowhere")
    refused("--device quantum", "--device", "quantum")
    refused("--workers and --seeds", "--seeds", -1)
    refused("--crop 1.5: expected a share", "--crop", 1.5)

    flat = tmp_path / "flat"
    write_images(flat, 3)
    (flat / "red").rename(tmp_path / "unlabelled")
    refused("no labels", "--data", tmp_path / "unlabelled")
    few = tmp_path / "few"
    write_images(few / "train", 2)
    write_images(few / "test", 2)
    refused("6 training images are fewer than k=10", "--data", few)
    write_images(few / "test", 1, names=["grey"])
    refused("classes differ", "--data", few)
    shutil.rmtree(few / "test" / "grey")

    (tmp_path / "file").write_text("")
    refused("read-only or no folder", "--out", tmp_path / "file" / "report.json")
    description = json.loads((run / "backbone.json").read_text())
    (run / "backbone.json").write_text(json.dumps(description | {"format": 99}))
    refused("checkpoint format 99")
    (run / "backbone.json").write_text(json.dumps(description))
    with (run / "backbone.safetensors").open("r+b") as file:
        file.truncate(200)
    refused("does not match")


def test_a_class_without_training_images_is_refused(data):
    from common.data import open_data
    from evaluate.job.evaluation import refuse_gaps

    train, test = open_data(str(data), "train"), open_data(str(data), "test")
    refuse_gaps(train, test, "colours")
    some = train.subset(train.labels != list(COLOURS).index("green"))
    with pytest.raises(Refusal, match=r"1 of 3 classes have no training image \(green\), among 24"):
        refuse_gaps(some, test, "colours")
    with pytest.raises(Refusal, match="no labelled test image"):
        refuse_gaps(train, test.subset([]), "colours")


def test_refusal_is_one_line_and_status_2(run_script, tmp_path):
    done = run_script("knn", "--ckpt", tmp_path / "nowhere")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: no checkpoint at")


def test_patches_are_a_row_where_they_are_asked_for_and_a_subject(
    make_run, script, report_of, data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run, calm = make_run(), ["--threads", "1", "--device", "cpu"]
    few = ["--shots", "1", "--shares", "--draws", "1"]
    for name, words in (("knn", ["--k", "5"]), ("linear", ["--epochs", "1"]), ("fewshot", few)):
        rows = ["random", "pixels", "patches"]
        assert script(name).main(["--ckpt", str(run), "--baselines", *rows, *words, *calm]) == 0
        report = report_of(run, name)
        assert report["values"].keys() == {"subject", *rows} and report["values"]["patches"].keys() == {"patches"}
        assert report["patches"].startswith("400 random 6x6 patches of the training images")
    like = ["--ckpt", "patches", "--like", str(run), "--data", str(data), "--k", "5"]
    assert script("knn").main([*like, *calm]) == 0
    alone = json.loads((tmp_path / "runs/patches-8x8/evaluate/knn.json").read_text())
    assert alone["values"] == {"patches": report_of(run, "knn")["values"]["patches"]}
    assert script("knn").main(["--ckpt", str(run), "--baselines", "--k", "5", *calm]) == 0
    assert report_of(run, "knn")["values"].keys() == {"subject"}
    with pytest.raises(Refusal, match="--ckpt patches: patches have no backbone, which is needed"):
        script("layers").main(["--ckpt", "patches", "--data", str(data)])
