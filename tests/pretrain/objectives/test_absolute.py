"""`absolute` under plans: Jigsaw-ViT, MP3 and DropPos, each against an independent computation."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from small import NONE, backbone, batch, options_for, task
from torch.nn import functional as F

from common.batches.views import View
from common.errors import Refusal
from common.models import ModelConfig, create
from pretrain.leaks.controls import noise, orders, rearrange
from pretrain.task import build

DROPPOS = {"keep": 0.5, "position": "partial", "position_keep": 0.34, "smoothing": 1.0, "attentive": "kept"}


def droppos(name: str = "vit 3x3", **options: Any) -> Any:
    """9 patches: 4 kept, 1 of them told its place."""
    return task({"absolute": DROPPOS | options}, name)


def seen(made: Any, data: Any) -> Any:
    """Features of the objective's own pass, in its own words."""
    return made.inputs("absolute", data, made.features(data))


def test_droppos_by_hand() -> None:
    """Loss over the patches whose embedding was hidden, smoothed and weighted, written from the formula in numpy:
    sum_i m_i a_i sum_j -y_ij log p_ij / sum_i m_i a_i (DropPos, arXiv 2309.03576)."""
    made = droppos()
    made.begin_step(0.25)  # sigma 1 -> 0.75
    data = batch(made)
    features, draws = seen(made, data)
    objective = made.objectives["absolute"]
    tokens, prefix, plan = features["tokens"].tokens, features["tokens"].prefix, features["tokens"].plan
    with torch.no_grad():
        log_p = objective.logits(features).log_softmax(-1).double().numpy()
        cos = F.cosine_similarity(prefix[:, :1], tokens, dim=-1).double().numpy()
    total = weight = 0.0
    for b in range(4):
        attentive = np.exp(cos[b] / 0.1) / np.exp(cos[b] / 0.1).sum()
        for i in range(4):
            if plan.visible[b, i]:
                continue
            row, column = divmod(int(plan.kept[b, i]), 3)
            y = np.array(
                [math.exp(-((row - r) ** 2 + (column - c) ** 2) / 0.75**2) for r in range(3) for c in range(3)]
            )
            total += attentive[i] * -(y / y.sum() * log_p[b, i]).sum()
            weight += attentive[i]
    assert plan.visible.sum().item() == 4  # one of four in each image
    assert objective(features, draws)["loss"].item() == pytest.approx(total / weight, abs=1e-5)


def test_patches_that_are_told_their_place_are_not_asked() -> None:
    made = droppos(attentive="none", smoothing=0.0)
    data = batch(made)
    features, draws = seen(made, data)
    tokens = features["tokens"].tokens.detach().requires_grad_()
    features["tokens"].tokens = tokens
    made.objectives["absolute"](features, draws)["loss"].backward()
    visible = features["tokens"].plan.visible
    assert tokens.grad[visible].abs().max() == 0 and tokens.grad[~visible].abs().amax(-1).min() > 0
    answers = made.objectives["absolute"].answers(features, draws)
    right = answers.guesses[~visible] == features["tokens"].plan.kept[~visible]
    assert answers.accuracy().item() == pytest.approx(right.float().mean().item())


def test_labels_are_the_kept_patches() -> None:
    made = task({"absolute": {"keep": 0.5, "head": "mlp"}})
    features, draws = seen(made, batch(made))
    answers = made.objectives["absolute"].answers(features, draws)
    assert torch.equal(answers.labels, features["tokens"].plan.kept) and answers.labels.shape == (4, 4)
    logits = made.objectives["absolute"].logits(features)
    by_hand = np.mean(
        [-F.log_softmax(logits[b, i], -1)[answers.labels[b, i]].item() for b in range(4) for i in range(4)]
    )
    assert made.objectives["absolute"](features, draws)["loss"].item() == pytest.approx(by_hand, abs=1e-6)


def test_smoothing_falls_to_one_hot_labels() -> None:
    made = task({"absolute": {"smoothing": 2.0}})
    features, draws = seen(made, batch(made))
    losses = []
    for progress in (0.0, 0.5, 1.0):
        made.begin_step(progress)
        losses.append(made.objectives["absolute"](features, draws)["loss"].item())
    sharp = task({"absolute": {}})
    sharp.load_state_dict(made.state_dict())
    assert losses[2] == sharp.objectives["absolute"](features, draws)["loss"].item()  # sigma 0: exactly the plain loss
    assert len(set(losses)) == 3


def test_attentive_weights_of_the_whole_image() -> None:
    """The second pass sees everything, without gradient; its weights are those of the kept patches, with sum 1."""
    made = droppos(attentive="image", position_keep=0.0)
    data = batch(made)
    features, _ = seen(made, data)
    assert features["image"].tokens.shape[1] == 9 and not features["image"].tokens.requires_grad
    objective = made.objectives["absolute"]
    weights = objective._weights(features, torch.ones(4, 4, dtype=torch.bool))
    whole = (F.cosine_similarity(features["image"].prefix[:, :1], features["image"].tokens, dim=-1) / 0.1).softmax(-1)
    for b in range(4):
        kept = whole[b, features["tokens"].plan.kept[b]]
        torch.testing.assert_close(weights[b], kept / kept.sum())
    made(data)["loss"].backward()


def test_attentive_weights_carry_no_gradient() -> None:
    """Else the model could shrink its loss by looking away from hard patches."""
    made = droppos()
    features, draws = seen(made, batch(made))
    features["tokens"].prefix = features["tokens"].prefix.detach().requires_grad_()
    made.objectives["absolute"](features, draws)["loss"].backward()
    assert features["tokens"].prefix.grad is None


@pytest.mark.parametrize("name", ["vit 3x3", "vit 2x3", "registers", "distilled"])
@pytest.mark.parametrize(
    "options",
    [
        {"context": 0.5},
        {"keep": 0.5, "head": "mlp"},
        {"keep": 0.7, "context": 0.5, "position": "partial", "position_keep": 0.4, "attentive": "kept"},
        {"keep": 0.7, "position": "partial", "attentive": "image", "decoder": {"blocks": 2, "width": 16, "heads": 2}},
    ],
)  # fmt: skip
def test_every_plan_trains_every_parameter_on_every_plain_backbone(name: str, options: dict) -> None:
    """DDP stops at a parameter without a gradient."""
    made = task({"absolute": options}, name)
    report = made(batch(made))
    report["loss"].backward()
    idle = [key for key, parameter in made.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert not idle
    assert report["absolute/loss"].item() == pytest.approx(math.log(math.prod(made.backbone.grid)), abs=0.4)
    assert all(torch.isfinite(value) for value in report.values())


@pytest.mark.parametrize("name", ["vit 3x3", "vit 2x3"])
def test_chance_by_elimination(name: str) -> None:
    """Whoever is told where some patches are can rule those places out, and no more."""
    made = droppos(name, keep=0.7, position_keep=0.34)
    N = math.prod(made.backbone.grid)
    kept = int(N * 0.7)
    assert made.objectives["absolute"].chance == pytest.approx(1 / (N - int(kept * 0.34)))
    assert task({"absolute": {"keep": 0.5}}).objectives["absolute"].chance == pytest.approx(1 / 9)


def test_the_decoder_knows_no_places() -> None:
    """Tokens in another order are answered in that order, and the class token is heard."""
    made = task({"absolute": {"decoder": {"blocks": 2, "width": 16, "heads": 2}}}).eval()
    features, _ = seen(made, batch(made))
    objective, tokens = made.objectives["absolute"], features["tokens"].tokens
    before = objective.logits(features)
    order = torch.tensor([4, 2, 0, 8, 6, 1, 3, 5, 7])
    features["tokens"].tokens = tokens[:, order]
    torch.testing.assert_close(objective.logits(features), before[:, order], atol=1e-5, rtol=1e-5)
    features["tokens"].tokens, features["tokens"].prefix = tokens, features["tokens"].prefix + 1
    assert not torch.allclose(objective.logits(features), before, atol=1e-3)


def test_plans_are_drawn_beside_the_sample() -> None:
    """By (seed, epoch, index): the same wherever the sample lands, another in another image, and no crop moves."""
    made, plain = task({"absolute": {"keep": 0.5}}), task({"absolute": {}})
    (name,) = made.draws
    eight, two = batch(made, 8), batch(made, 2)
    assert torch.equal(eight.draws[f"{name}/kept"][:2], two.draws[f"{name}/kept"])
    assert len({tuple(row) for row in eight.draws[f"{name}/kept"].tolist()}) > 4
    assert torch.equal(eight.views["global"], batch(plain, 8).views["global"])
    both = task({"absolute": {"keep": 0.5}, "relative": {"keep": 0.5, "pairs": 3}})
    assert torch.equal(batch(both, 8).draws[f"{name}/kept"], eight.draws[f"{name}/kept"])
    assert len(both.passes) == 1  # equal plans are one pass, and one draw


def test_origin_labels_follow_the_patches() -> None:
    """Of shuffled images: where the patch came from, or where it lies now."""
    made = task({"absolute": {}}).eval()
    data = batch(made)
    order = orders(4, 9, torch.Generator().manual_seed(0))
    before = made.objectives["absolute"].answers(*seen(made, data))
    data.views["global"] = rearrange(data.views["global"], order, (3, 3))
    inputs = seen(made, data)
    origin, place = (made.objectives["absolute"].answers(*inputs, which) for which in (order, None))
    # without position embeddings the answers travel with the patches: as right about the origin as before
    assert torch.equal(origin.guesses, before.guesses.gather(1, order)) and torch.equal(origin.labels, order)
    assert origin.accuracy() == before.accuracy()
    assert torch.equal(place.labels, torch.arange(9).expand(4, -1))


def test_rearrange_by_hand() -> None:
    """Two grey patches beside each other change places."""
    image = torch.zeros(1, 1, 2, 4, dtype=torch.uint8)
    image[..., 2:] = 9
    moved = rearrange(image, torch.tensor([[1, 0]]), (1, 2))
    assert moved[..., :2].eq(9).all() and moved[..., 2:].eq(0).all()
    again = noise(image, torch.Generator().manual_seed(0))
    assert again.shape == image.shape and again.dtype == torch.uint8 and len(again.unique()) > 4


@pytest.mark.parametrize(
    "wanted", [{"absolute": {}}, {"absolute": {"keep": 0.5, "head": "mlp"}}, {"absolute": {"context": 0.5}}]
)
def test_a_constant_image_tells_nothing(wanted: dict) -> None:
    """Without position all tokens are equal, so are all logits, and the loss cannot be below ln N."""
    made = task(wanted).eval()
    data = batch(made)
    data.views["global"] = torch.full_like(data.views["global"], 77)
    features, draws = seen(made, data)
    logits = made.objectives["absolute"].logits(features)
    assert (logits - logits[:, :1]).abs().max() < 1e-5
    if "keep" not in wanted["absolute"]:  # all nine are asked
        assert made.objectives["absolute"](features, draws)["loss"].item() >= math.log(9) - 1e-5


def test_noise_cannot_be_learned_without_position_and_is_with_it() -> None:
    """Property 6 of the specification, trained: on noise the loss stays at ln N, or falls where the embedding tells."""
    found = {}
    for position in ("none", "full"):
        made = task({"absolute": {"position": position}})
        optimizer = torch.optim.AdamW(made.parameters(), 3e-3)
        rng = torch.Generator().manual_seed(0)
        data = batch(made, 8)
        losses = []
        for _ in range(120):
            data.views["global"] = noise(data.views["global"], rng)
            loss = made(data)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found[position] = np.mean(losses[-20:])
    assert found["none"] == pytest.approx(math.log(9), rel=0.01)
    assert found["full"] < 0.5


def test_no_weight_no_trace() -> None:
    """An objective of weight 0 changes neither crops nor gradients, and its head is not in the model (property 11)."""
    gradients = []
    for wanted in ({"absolute": {}}, {"absolute": {}, "relative": {"weight": 0}}):
        made = task(wanted)
        torch.manual_seed(3)
        made(batch(made))["loss"].backward()
        gradients.append([parameter.grad for parameter in made.parameters() if parameter.grad is not None])
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_on": "hiden"}, "did you mean 'hidden'"),
        ({"loss_on": "hidden"}, "loss_on=hidden goes with position=partial"),
        ({"attentive": "imge"}, "did you mean 'image'"),
        ({"head": "mpl"}, "did you mean 'mlp'"),
        ({"position": "partail"}, "did you mean 'partial'"),
        ({"smoothing": -1}, "smoothing=-1.0: expected a number of at least 0"),
        ({"smoothing": math.nan}, "smoothing=nan"),
        ({"keep": 0.1}, "keep=0.1 of 9 patches leaves 0: at least 2"),
        ({"position_keep": 0.5}, "position_keep=0.5 goes with position=partial"),
        ({"position": "partial", "keep": 0.5, "position_keep": 0.99}, None),
        ({"context": 0.05}, "leaves no key"),
        ({"decoder": {"blocks": 1, "width": 30, "heads": 4}}, "decoder"),
        ({"decoder": {"blocks": -1}}, "decoder"),
        ({"decoder": {"blok": 1}}, "did you mean 'decoder.blocks'"),
    ],
)
def test_what_is_not_understood_is_refused(options: dict, words: str | None) -> None:
    if words is None:
        task({"absolute": options})
        return
    with pytest.raises(Refusal) as refusal:
        task({"absolute": options})
    assert words in str(refusal.value)


def test_likeness_to_a_class_token_needs_one() -> None:
    made = create(ModelConfig("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2,
                                                       "class_token": False}), 24)  # fmt: skip
    with pytest.raises(Refusal, match="attentive=kept weighs patches by their likeness to the class token"):
        build(made, options_for({"absolute": {"attentive": "kept"}}, made), {"global": View(size=24)})


@pytest.mark.parametrize("options", [{"keep": 0.5}, {"context": 0.5}, {"position": "partial"}])
@pytest.mark.parametrize("name", ["swin", "nest"])
def test_whole_grids_only_elsewhere(name: str, options: dict) -> None:
    made = backbone(name)
    with pytest.raises(Refusal, match="need the whole grid"):
        build(made, options_for({"absolute": options}, made), {"global": View(size=list(made.size))})


def test_half_precision_logits_are_judged_in_full() -> None:
    """Property 12: under autocast the logits reach the cross-entropy as float32."""
    made = task({"absolute": {}})
    data = batch(made)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = {"tokens": made.backbone(data.views["global"], NONE)}
        logits = made.objectives["absolute"].logits(features)
        loss = made.objectives["absolute"](features, {})["loss"]
    assert logits.dtype == loss.dtype == torch.float32
