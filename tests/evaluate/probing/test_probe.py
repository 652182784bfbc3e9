"""Heads trained in one pass equal heads trained alone, by torch's own optimizers; schedules; the choice of a head."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.features.extraction import pooled_blocks
from evaluate.probing.probe import (
    EPS,
    Heads,
    HeadTraining,
    Labelled,
    Probe,
    better,
    drawn,
    probes,
    share_of_peak,
    steps_of,
    train_heads,
)
from evaluate.probing.views import batches, view

CLASSES = 3
SETS = {"last": ("class",), "last 4": ("class4",), "last 4 + mean": ("class4", "mean")}


def features(count: int = 96, seed: int = 0) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=rng)
    parts = {
        name: torch.randn(count, width, generator=rng) + torch.eye(CLASSES, width)[labels]
        for name, width in (("class", 6), ("mean", 6), ("class4", 24))
    }
    return parts, labels


def trained(sets, training: HeadTraining, seed: int = 3) -> dict[str, Heads]:
    parts, labels = features()
    heads = {
        name: Heads(
            each, sum(parts[part].shape[1] for part in each), CLASSES, training, torch.Generator().manual_seed(seed)
        )
        for name, each in sets.items()
    }  # fmt: skip
    stream = drawn(parts, labels, training.batch, torch.Generator().manual_seed(seed))
    train_heads(list(heads.values()), stream, training, steps_of(training, len(labels)), len(labels) // training.batch)
    return heads


@pytest.mark.parametrize(("optimizer", "normalise"), [("sgd", "none"), ("lars", "batch"), ("adamw", "none")])
def test_one_pass_equals_every_head_alone(optimizer: str, normalise: str) -> None:
    rates = (0.01, 0.1, 1.0)
    training = HeadTraining(rates, optimizer, 16, 5, normalise=normalise, warmup=1)
    together = trained(SETS, training)
    for name, each in SETS.items():
        for at, rate in enumerate(rates):
            alone = trained({name: each}, HeadTraining((rate,), optimizer, 16, 5, normalise=normalise, warmup=1))[name]
            torch.testing.assert_close(alone.weights[:, 0], together[name].weights[:, at], atol=1e-5, rtol=0)
            torch.testing.assert_close(alone.biases[:, 0], together[name].biases[:, at], atol=1e-5, rtol=0)


class Lars(torch.optim.Optimizer):
    """MAE's, in plain words: only matrices are adapted, momentum holds the adapted gradient."""

    def __init__(self, parameters, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                update = parameter.grad.clone()
                if parameter.ndim > 1:
                    update *= 0.001 * parameter.norm() / update.norm()
                speed = self.state[parameter].setdefault("speed", torch.zeros_like(parameter))
                speed.mul_(0.9).add_(update)
                parameter.add_(speed, alpha=-group["lr"])


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw"])
def test_a_head_is_what_torch_trains(optimizer: str) -> None:
    batch, epochs, seed, rate = 16, 4, 3, 0.5
    norm = optimizer == "lars"
    training = HeadTraining((rate,), optimizer, batch, epochs, normalise="batch" if norm else "none", warmup=norm)
    ours = trained({"two": ("class", "mean")}, training, seed)["two"]

    parts, labels = features()
    inputs = torch.cat([parts["class"], parts["mean"]], 1)
    linear = nn.Linear(12, CLASSES)
    with torch.no_grad():
        start = torch.randn(CLASSES, 1, 12, generator=torch.Generator().manual_seed(seed))
        linear.weight.copy_(0.01 * start[:, 0])
        linear.bias.zero_()
    bn = nn.BatchNorm1d(12, affine=False, eps=EPS) if norm else nn.Identity()
    make = {
        "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
        "lars": Lars,
        "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0),
    }[optimizer]
    solver = make(linear.parameters(), rate * batch / 256)
    rng, per_epoch = torch.Generator().manual_seed(seed), len(labels) // batch
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=rng)
        for at, chosen in enumerate(order.split(batch)[:per_epoch]):
            now = epoch + at / per_epoch
            share = now if norm and now < 1 else 0.5 * (1 + math.cos(math.pi * (now - norm) / (epochs - norm)))
            solver.param_groups[0]["lr"] = rate * batch / 256 * share
            solver.zero_grad()
            F.cross_entropy(linear(bn(inputs[chosen])), labels[chosen]).backward()
            solver.step()
    torch.testing.assert_close(linear.weight.detach(), ours.weights[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear.bias.detach(), ours.biases[:, 0], atol=1e-5, rtol=1e-5)
    bn.eval()
    torch.testing.assert_close(linear(bn(inputs)).T.detach(), ours.logits(parts)[:, 0], atol=1e-5, rtol=1e-5)


def test_schedules() -> None:
    by_step, by_epoch = HeadTraining(warmup=2), HeadTraining(by_epoch=True)
    assert [share_of_peak(by_step, step, 60, 10) for step in (0, 10, 20, 40)] == pytest.approx([0, 0.5, 1, 0.5])
    shares = [share_of_peak(by_epoch, step, 40, 10) for step in range(40)]
    assert len(set(shares)) == 4 and shares[0] == shares[9] == 1 and shares[20] == pytest.approx(0.5)
    assert share_of_peak(by_step, 0, 1, 1) == 1  # one step of all: no warm-up before it
    assert steps_of(HeadTraining(steps=12_500), 100) == 12_500
    assert steps_of(HeadTraining(batch=16_384, epochs=90, most_steps=None), 9000) == 90
    assert steps_of(HeadTraining(batch=1024, epochs=100, most_steps=None), 1_281_167) == 125_100


def test_the_better_of_two_and_the_best_on_test_are_two_choices() -> None:
    some = torch.zeros(1)
    one = Probe(0.5, 0.1, 0.8, 0.7, 1.0, some, 0.3, "a", "a", 1, 1)
    other = Probe(0.6, 0.2, 0.8, 0.9, 2.0, some, 0.2, "b", "b", 2, 2)
    found = better(one, other)  # equal on held-out images: the smaller loss
    assert (found.accuracy, found.rate, found.features, found.epoch) == (0.6, 0.2, "b", 2)
    assert (found.best_on_test, found.best_features) == (0.9, "b") and found.difference == pytest.approx(0.3)
    other.held_out_loss, other.held_out = math.nan, 0.7
    found = better(one, other)
    assert (found.features, found.best_features, found.best_rate, found.best_epoch) == ("a", "b", 2.0, 2)


def test_every_epoch_is_a_candidate_and_the_test_images_choose_nothing() -> None:
    parts, labels = features(120)
    unseen, truth = features(60, seed=1)
    training = HeadTraining((0.1, 1.0), batch=16, epochs=6, every_epoch=True, normalise="none", most_steps=None)
    found = probes(Labelled(parts, labels), Labelled(unseen, truth), CLASSES, SETS, training)
    wrong = probes(Labelled(parts, labels), Labelled(unseen, (truth + 1) % CLASSES), CLASSES, SETS, training)
    assert found.keys() == SETS.keys()
    for name, each in found.items():
        assert 1 <= each.epoch <= 6 and each.best_on_test >= each.accuracy and each.features == name
        assert (wrong[name].rate, wrong[name].epoch, wrong[name].held_out) == (each.rate, each.epoch, each.held_out)
        assert torch.equal(wrong[name].predictions, each.predictions)


def test_batches_of_views_are_the_backbones_features_of_random_crops(images) -> None:
    from common.data import open_data
    from common.models import ModelConfig, create

    shape = {"patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    backbone = create(ModelConfig("vit_tiny_patch16_224", shape), 8).eval()
    data = open_data(str(images))
    crop = view((8, 8), "bilinear")
    assert (crop.scale, crop.flip, crop.jitter, crop.grayscale, crop.blur) == ([0.08, 1.0], 0.5, 0.0, 0.0, 0.0)
    made = [
        list(
            batches(
                backbone, None, data, batch=32, steps=4, seed=0, blocks=4, crop=crop
            )
        )
        for _ in range(2)
    ]  # fmt: skip
    (first, _), again = made[0][0], made[1][0][0]
    assert len(made[0]) == 4 and first["class4"].shape == first["mean4"].shape == (32, 3 * 16)  # of three blocks
    assert all(torch.equal(first[name], again[name]) for name in first)
    torch.testing.assert_close(first["class4"][:, 32:], first["class"])  # the deepest comes last
    assert not torch.equal(first["mean"], made[0][3][0]["mean"])
    seen = torch.cat([labels for _, labels in made[0][:3]])
    assert seen.bincount().tolist() == torch.from_numpy(data.labels).bincount().tolist()  # an epoch
    assert pooled_blocks(backbone, None, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 1).keys() == {"class", "mean"}
