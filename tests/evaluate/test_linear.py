"""The sweep equals heads trained alone; the head is chosen without the test images; the script reports it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.errors import Refusal
from common.probe import MOMENTUM, hold_out, num_steps, probe, sweep


def blobs(count, seed, classes=3, width=6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return torch.randn(count, width, generator=generator) + 2 * torch.eye(classes, width)[labels], labels


def test_sweep_equals_each_head_trained_alone():
    features, labels = blobs(100, 0)
    rates = (0.01, 0.1, 1.0)
    weights, biases = sweep(features, labels, 3, rates, seed=3, batch=16, epochs=5)  # (3, L, 6), (3, L)
    for at, rate in enumerate(rates):
        alone, bias = sweep(features, labels, 3, [rate], seed=3, batch=16, epochs=5)
        torch.testing.assert_close(alone[:, 0], weights[:, at], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bias[:, 0], biases[:, at], atol=1e-5, rtol=1e-5)


def test_sweep_equals_torch_sgd():
    features, labels = blobs(100, 0)
    rate, batch, epochs, seed = 0.5, 16, 5, 3
    weights, biases = sweep(features, labels, 3, [rate], seed=seed, batch=batch, epochs=epochs)

    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(6, 3)
    with torch.no_grad():
        head.weight.copy_(0.01 * torch.randn(3, 1, 6, generator=generator)[:, 0])
        head.bias.zero_()
    optimizer = torch.optim.SGD(head.parameters(), lr=rate * batch / 256, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (100 // batch))
    for _ in range(epochs):
        order = torch.randperm(100, generator=generator)
        for chosen in order.split(batch)[: 100 // batch]:
            optimizer.zero_grad()
            F.cross_entropy(head(features[chosen]), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(head.weight.detach(), weights[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(head.bias.detach(), biases[:, 0], atol=1e-5, rtol=1e-5)


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
    assert num_steps(1000, 256, 10) == 30
    assert num_steps(10, 256, 2) == 2
    assert num_steps(1_281_167, 256, 50) == 12_500


def test_script_in_two_processes_one_of_which_works(make_run, run_script, report_of):
    run = make_run()
    done = run_script("linear", "--ckpt", run, "--epochs", "30", "--batch", "16", processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linear probe accuracy (%)") == 1
    assert "runs in one process; the other 1 " in done.stdout
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
    for words in (["--epochs", "0"], ["--batch", "0"], ["--rates", "0.1", "-1"], ["--epochs", "nan"]):
        with pytest.raises(Refusal, match=words[0]):
            linear.main(["--ckpt", str(run), *words])
    assert not (run / "evaluate").exists()
