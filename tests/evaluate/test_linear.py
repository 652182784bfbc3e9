"""The head is chosen without the test images; the script reports it."""

import pytest
import torch

from common.errors import Refusal
from evaluate.probing.probe import HeadTraining, hold_out, probe, steps_of


def blobs(count, seed, classes=3, width=6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return torch.randn(count, width, generator=generator) + 2 * torch.eye(classes, width)[labels], labels


def test_the_head_is_chosen_without_the_test_images():
    train, train_labels = blobs(200, 0)
    test, test_labels = blobs(100, 1)
    found = probe(train, train_labels, test, test_labels, 3, rates=(1e-6, 0.1, 1.0), epochs=10)
    wrong = probe(train, train_labels, test, (test_labels + 1) % 3, 3, rates=(1e-6, 0.1, 1.0), epochs=10)
    assert (
        wrong.rate == found.rate
        and wrong.held_out == found.held_out
        and torch.equal(wrong.predictions, found.predictions)
    )
    assert found.accuracy > 0.8 and found.rate != 1e-6
    assert found.best_on_test >= found.accuracy and wrong.best_on_test >= wrong.accuracy
    assert found.accuracy == (found.predictions == test_labels).double().mean().item()


def test_scale_and_offset_of_features_do_not_matter():
    train, train_labels = blobs(200, 0)
    test, test_labels = blobs(100, 1)
    plain = probe(train, train_labels, test, test_labels, 3, epochs=5)
    moved = probe(100 * train + 7, train_labels, 100 * test + 7, test_labels, 3, epochs=5)
    assert abs(plain.accuracy - moved.accuracy) <= 0.01


def test_hold_out_is_stratified_and_leaves_every_class_something():
    labels = torch.tensor([0] * 20 + [1] * 2 + [2])
    fit, held = hold_out(labels, 0.1, seed=0)
    assert labels[held].tolist() == [0, 0, 1] and sorted([*fit.tolist(), *held.tolist()]) == list(range(23))
    with pytest.raises(ValueError):
        hold_out(torch.arange(3), 0.1, seed=0)


def test_steps_are_capped_and_never_zero():
    assert steps_of(HeadTraining(epochs=10), 1000) == 30
    assert steps_of(HeadTraining(epochs=2), 10) == 2
    assert steps_of(HeadTraining(), 1_281_167) == 12_500


@pytest.mark.slow
def test_script_in_two_processes(make_run, run_script, report_of):
    run = make_run()
    done = run_script("linear", "--ckpt", run, "--epochs", "30", "--batch", "16", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear probe accuracy (%)") == 1
    assert "2 processes extract features" in done.stdout
    report = report_of(run, "linear")
    for row, kinds in (
        ("subject", {"class", "mean", "both"}),
        ("random", {"class", "mean", "both"}),
        ("pixels", {"pixels"}),
    ):
        assert report["values"][row].keys() == kinds
    found = report["values"]["subject"]["mean"]
    assert found["rate"][0] in report["protocol"]["rates"]
    assert found["best_on_test"]["accuracy"] >= found["accuracy"] > 0.5
    assert report["values"]["pixels"]["pixels"]["accuracy"] > 0.9
    assert "best on test*" in done.stdout and "raw pixels" in done.stdout and "random init" in done.stdout


def test_bad_numbers_are_refused(make_run, script):
    run, linear = make_run(), script("linear")
    for words in (
        ["--epochs", "0"],
        ["--batch", "0"],
        ["--rates", "0.1", "-1"],
        ["--epochs", "nan"],
        ["--rates", "0.1", "nan"],
    ):
        with pytest.raises(Refusal, match=words[0]):
            linear.main(["--ckpt", str(run), *words])
    assert not (run / "evaluate").exists()


QUICK = ["--threads", "1", "--device", "cpu"]


@pytest.mark.parametrize(
    ("protocol", "words", "identity", "sets"),
    [
        ("dino", ["--epochs", "3"], "linear/dino-modified", {"last 4"}),
        (
            "dinov2", ["--epochs", "3", "--batch", "16"], "linear/dinov2-modified",
            {"last", "last 4", "last + mean", "last 4 + mean"},
        ),
        ("dinov3", ["--optimizer", "adamw", "--epochs", "2"], "linear/dinov3-modified", {"last + mean"}),
        ("ibot", ["--rates", "0.1", "1", "--epochs", "2"], "linear/ibot-modified", {"last 4"}),
    ],
)  # fmt: skip
def test_protocols_in_which_features_compete(make_run, script, report_of, capsys, protocol, words, identity, sets):
    run = make_run("full", depth=5)
    assert script("linear").main(["--ckpt", str(run), *QUICK, "--protocol", protocol, *words]) == 0
    report, out = report_of(run, "linear"), capsys.readouterr().out
    assert report["protocol"]["id"] == identity and report["values"].keys() == {"subject", "random", "pixels"}
    assert report["protocol"]["augment"].startswith("off")
    entry = report["values"]["subject"]["chosen"]
    assert set(entry["features"]) | set(entry["best_features"]) <= sets
    assert (
        entry["difference"] == [entry["best_on_test"]["accuracy"] - entry["accuracy"]] and entry["difference"][0] >= 0
    )
    assert f"by {identity}" in out and "not as published: " in out and "difference" in out
    assert (entry["epoch"][0] is not None) == (protocol in ("dino", "ibot"))
    expected = {"dino": "SGD", "dinov2": "SGD", "dinov3": "AdamW", "ibot": "SGD"}[protocol]
    assert report["protocol"]["optimizer"].startswith(expected)


def test_mae_logreg_and_ridge_answer_for_every_kind(make_run, script, report_of, capsys):
    run, linear = make_run(), script("linear")
    for words in (["mae"], ["logreg", "--rates", "0.1", "10"], ["ridge"]):
        assert linear.main(["--ckpt", str(run), *QUICK, "--protocol", *words]) == 0
        report = report_of(run, "linear")
        assert report["values"]["subject"].keys() == {"class", "mean", "both"}
        name = words[0] + ("" if words[0] == "ridge" else "-modified")
        assert report["protocol"]["id"] == f"linear/{name}"
        if words[0] == "mae":
            assert report["protocol"]["modified"] == ["batch 33: all images there are"]
            assert report["protocol"]["steps"] == 90 and "BatchNorm without affine" in report["protocol"]["features"]
        if words[0] == "ridge":
            assert report["protocol"]["l2"] == [1024.0] and report["protocol"]["selection"] == "none"
            assert report["values"]["subject"]["mean"]["held_out"] == [None]
    assert report["values"]["pixels"]["pixels"]["accuracy"] > 0.6 and "l2" in capsys.readouterr().out


def test_a_model_without_class_token_is_probed_by_its_mean_patch(make_run, script, report_of, capsys):
    run = make_run(class_token=False, global_pool="avg")
    words = ["--ckpt", str(run), *QUICK, "--protocol", "dinov2", "--epochs", "1"]
    assert script("linear").main(words) == 0
    report = report_of(run, "linear")
    assert "the mean patch token takes its place" in report["protocol"]["notes"][1]
    assert "takes its place" in capsys.readouterr().out
    assert report["values"]["subject"]["chosen"]["by_features"].keys() == {"last", "last 4"}


def test_augmented_views_train_the_same_heads(make_run, script, report_of, capsys):
    run = make_run()
    for protocol in ("dinov2", "sweep"):
        words = ["--ckpt", str(run), *QUICK, "--augment", "--protocol", protocol, "--epochs", "10", "--batch", "8"]
        assert script("linear").main(words) == 0
        report, out = report_of(run, "linear"), capsys.readouterr().out
        assert report["protocol"]["id"] == f"linear/{protocol}+augment-modified"
        assert "random crops of scale 0.08 to 1 and flips, bicubic" in report["protocol"]["augment"]
        assert "40 passes of the backbone over 8 crops each" in out
    assert report["values"]["subject"]["mean"]["accuracy"] > 0.5


def test_wrong_protocols_are_refused(make_run, script, tmp_path):
    run, linear = make_run(), script("linear")
    for match, *words in (
        ("--protocol dinov4: expected one of .*; did you mean 'dinov3'", "--protocol", "dinov4"),
        ("--augment: logreg is solved once", "--protocol", "logreg", "--augment"),
        ("--augment: ridge is solved once", "--protocol", "ridge", "--augment"),
        ("--batch 5: ridge is solved, not trained", "--protocol", "ridge", "--batch", "5"),
        ("--optimizer sgd: logreg is solved", "--protocol", "logreg", "--optimizer", "sgd"),
    ):
        with pytest.raises(Refusal, match=match):
            linear.main(["--ckpt", str(run), *QUICK, *words])
    assert not (run / "evaluate").exists()


def test_published_numbers():
    from evaluate.probing.protocols import PROTOCOLS, altered, sets

    sweeps = PROTOCOLS["dinov2"], PROTOCOLS["dinov3"]
    assert all(len(each.training.rates) == 13 and each.training.steps == 12_500 for each in sweeps)
    assert len(PROTOCOLS["ibot"].training.rates) == 45 and PROTOCOLS["ibot"].training.rates[-1] == 9.0
    assert len(PROTOCOLS["logreg"].strengths) == 45 and PROTOCOLS["logreg"].strengths[-1] == pytest.approx(1e5)
    assert altered(PROTOCOLS["mae"], {}, 24)[0].training.epochs == 50  # ViT-L and ViT-H
    protocol, words = altered(PROTOCOLS["mae"], {"batch": 4096, "epochs": 90.0, "rates": None}, 12)
    assert words == ["batch 4096"] and protocol.training.batch == 4096 and protocol.training.epochs == 90
    deep = {"class", "mean", "class4", "mean4"}
    assert 13 * len(sets(PROTOCOLS["dinov2"], deep, 384)[0]) == 52
    assert sets(PROTOCOLS["dino"], deep, 384)[0] == {"last 4": ("class4",)}
    assert sets(PROTOCOLS["dino"], deep, 768)[0] == {"last + mean": ("class", "mean")}
    found, note = sets(PROTOCOLS["dinov2"], {"class", "mean", "mean4"}, 384)  # SP-ViT before its class token joins
    assert found["last 4"] == ("mean4",) and found["last"] == ("class",) and "not four class tokens" in note


def test_quarters_of_all_blocks_compete(make_run, script, report_of, capsys):
    run = make_run()
    arguments = ["--ckpt", str(run), "--threads", "1", "--device", "cpu", "--readout", "quarters"]
    assert script("linear").main(arguments) == 0
    report = report_of(run, "linear_quarters")
    assert report["protocol"]["id"] == "linear/sweep-quarters"
    by_block = report["values"]["subject"]["chosen"]["by_features"]
    assert by_block and all(name.startswith("quarters") for name in by_block)
    assert "quarters" in capsys.readouterr().out
    for words, reason in (
        (["--protocol", "dino"], "--readout quarters goes with --protocol sweep"),
        (["--augment"], "--augment: the quarters of random crops are not made"),
    ):
        with pytest.raises(Refusal, match=reason):
            script("linear").main([*arguments, *words])
