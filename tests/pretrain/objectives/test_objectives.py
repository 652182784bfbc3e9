"""`absolute` and `relative` against independent computations, over grids and backbones."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from small import BACKBONES, NONE, VIT, backbone, batch, options_for, task
from torch.nn import functional as F

from common import positions
from common.batches.views import View
from common.errors import Refusal
from common.models import ModelConfig, create
from evaluate.job.subjects import facts_of
from pretrain import objectives
from pretrain.leaks.controls import rearrange
from pretrain.task import build


@pytest.mark.parametrize("name", BACKBONES)
def test_both_objectives_train_every_parameter_on_every_backbone(name: str) -> None:
    made = task({"absolute": {"head": "half"}, "relative": {}}, name)
    report = made(batch(made))
    report["loss"].backward()
    idle = [key for key, parameter in made.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not idle
    N = math.prod(made.backbone.grid)
    assert report["absolute/loss"] == pytest.approx(math.log(N), abs=0.4)
    assert report["relative/loss"] == pytest.approx(math.log(positions.num_offsets(made.backbone.grid)), abs=0.4)
    assert report["absolute/chance"] == report["relative/chance"] == pytest.approx(1 / N)


def test_an_untrained_classifier_of_zeros_starts_at_ln_of_the_classes() -> None:
    made = task({"absolute": {}, "relative": {"pairs": "all"}})
    for objective in made.objectives.values():
        torch.nn.init.zeros_(objective.head.classifier.weight)  # type: ignore[union-attr, arg-type]
    report = made(batch(made))
    assert report["absolute/loss"] == pytest.approx(math.log(9))
    assert report["relative/loss"] == pytest.approx(math.log(25))
    assert report["relative/gain"] == pytest.approx(positions.prior_entropy((3, 3)) - math.log(25))


def test_absolute_is_cross_entropy_with_raster_labels() -> None:
    made = task({"absolute": {}}, "vit 2x3")
    data = batch(made)
    report = made(data)
    tokens = made.backbone(data.views["global"], NONE).tokens
    logits = made.objectives["absolute"].head(tokens)  # type: ignore[operator, union-attr]
    by_hand = np.mean([-F.log_softmax(logits[b, n], -1)[n].item() for b in range(4) for n in range(6)])
    assert report["absolute/loss"].item() == pytest.approx(by_hand, abs=1e-6)
    right = [int(logits[b, n].argmax()) for b in range(4) for n in range(6)]
    assert report["absolute/accuracy"].item() == pytest.approx(np.mean([r == i % 6 for i, r in enumerate(right)]))
    steps = [math.dist(divmod(r, 3), divmod(i % 6, 3)) for i, r in enumerate(right)]
    assert report["absolute/distance"].item() == pytest.approx(np.mean(steps), abs=1e-6)


def test_relative_over_all_pairs_equals_the_mean_over_its_pairs() -> None:
    made = task({"relative": {"pairs": "all"}})
    objective: Any = made.objectives["relative"]
    features = {"tokens": made.backbone(batch(made).views["global"])}
    whole = objective(features, {})["loss"]
    every = torch.arange(81).expand(4, -1)
    single = [objective(features, {"pairs": every[:, p : p + 1]})["loss"].item() for p in range(81)]
    assert whole.item() == pytest.approx(np.mean(single), abs=1e-5)
    # and so a uniform sample of pairs has the whole loss as its expectation
    rng = np.random.default_rng(0)
    drawn = [np.mean([single[p] for p in positions.sample_pairs(rng, 9, 12)]) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(whole.item(), abs=4 * np.std(drawn) / 4000**0.5)


def test_pairs_drawn_beside_the_sample() -> None:
    made = task({"relative": {"pairs": 7}})
    pairs = batch(made).draws["relative/pairs"]
    assert pairs.shape == (4, 7)
    assert torch.equal(pairs, batch(made).draws["relative/pairs"])
    assert not torch.equal(pairs[0], pairs[1])


def test_shuffled_patches_change_nothing_but_the_labels() -> None:
    """No position, no leak: the tokens follow their patches, so the loss with co-permuted labels is the same."""
    made = task({"absolute": {}}).eval()
    objective: Any = made.objectives["absolute"]
    images = batch(made).views["global"]
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    shuffled = rearrange(images, order.expand(4, -1), (3, 3))
    before = objective.logits({"tokens": made.backbone(images, NONE)})
    after = objective.logits({"tokens": made.backbone(shuffled, NONE)})
    torch.testing.assert_close(before[:, order], after, atol=1e-5, rtol=1e-5)


def test_weights_sum_and_zero_leaves_out() -> None:
    made = task({"absolute": {"weight": 2.0}, "relative": {"weight": 0.5}})
    report = made(batch(made))
    expected = 2 * report["absolute/loss"] + 0.5 * report["relative/loss"]
    torch.testing.assert_close(report["loss"].detach(), expected)
    assert set(task({"absolute": {}, "relative": {"weight": 0}}).objectives) == {"absolute"}


def test_options_that_were_not_resolved_build_nothing() -> None:
    for name, option in (("relative", "pairs"), ("absolute", "loss_on"), ("classification", "pool")):
        with pytest.raises(ValueError, match=rf"objectives\.{name}\.{option}=auto: options are resolved first"):
            objectives.build(name, objectives.options(name, {}), backbone())


def test_equal_passes_are_run_once() -> None:
    made = task({"absolute": {}, "relative": {}})
    calls = []
    made.backbone.register_forward_hook(lambda *_: calls.append(1))
    made(batch(made))
    assert len(calls) == 1
    both = task({"absolute": {"position": "full"}, "relative": {}})
    assert both.position == "full" and made.position == "none"
    both.backbone.register_forward_hook(lambda *_: calls.append(1))
    both(batch(both))
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"absolut": {}}, "did you mean 'absolute'"),
        ({"absolute": {"haed": "half"}}, "did you mean 'head'"),
        ({"absolute": {"weight": "much"}}, "weight"),
        ({"absolute": {"head": "halff"}}, "did you mean 'half'"),
        ({"absolute": {"weight": -1}}, "expected a number of at least 0"),
        ({"absolute": {"weight": 0}}, "no objective to train"),
        ({}, "no objective to train"),
        ({"relative": {"pairs": 82}}, "from 1 to 81"),
        ({"relative": {"pairs": "some"}}, "expected auto, all, or a number"),
        ({"absolute": {"view": "local"}}, "view 'local'"),
        ({"absolute": 3}, "expected options"),
    ],
)
def test_what_is_not_understood_is_refused(wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(Refusal) as refusal:
        task(wanted)
    assert words in str(refusal.value)


def test_one_patch_has_no_position() -> None:
    made = create(ModelConfig("vit_tiny_patch16_224", VIT), 8)
    with pytest.raises(Refusal, match="one patch has no position"):
        build(made, options_for({"absolute": {}}, made), {"global": View(size=8)})


def test_a_view_that_nobody_looks_at_is_refused() -> None:
    with pytest.raises(Refusal, match="no objective looks at view 'locl'"):
        build(backbone(), options_for({"absolute": {}}, backbone()), {"global": View(size=24), "locl": View(size=24)})


def test_every_file_is_an_objective() -> None:
    assert objectives.names() == [
        "absolute",
        "classification",
        "dino",
        "ibot",
        "koleo",
        "relative",
        "sigreg",
        "token_labeling",
    ]
    for name in objectives.names():
        assert issubclass(objectives.find(name), objectives.Objective)


@pytest.mark.parametrize("name", objectives.names())
def test_evaluations_know_what_the_class_says(name: str) -> None:
    """Else add what configs/objectives.yaml lacks: `--ckpt random --like RECIPE` and costs read that file."""
    made = objectives.find(name)
    options = made.Options()
    assert facts_of(name) == {
        "position": getattr(options, "position", "full"),
        "pools": made.pools,
        "crops": made.crops_seen,
        "teacher": made.taught,
        "local": made.views_of(options) > {options.view},
    }
