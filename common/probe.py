"""The linear probe: one linear layer per learning rate on frozen features, all trained at once.

Letters: N images, D feature width, C classes, L learning rates, B images per step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# DINOv2's thirteen (eval/linear.py), an order of magnitude higher: features are standardised and runs are shorter here.
RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0)
MOMENTUM = 0.9
HELD_OUT = 0.1  # of the training images choose the learning rate
EPOCHS, MOST_STEPS = 100, 12_500  # MAE trains 90 epochs, DINO 100; DINOv2 12,500 steps whatever the data
EPS = 1e-6  # of MAE's BatchNorm without affine


@dataclass
class Probe:
    """What a sweep came to. Accuracies are shares in [0, 1] of the images they are named after."""

    accuracy: float  # test accuracy of the head that was chosen on held-out training images
    rate: float  # its learning rate, for 256 images per step
    held_out: float  # its accuracy on the images that chose it
    best_on_test: float  # the field's habit: the head that happens to be best on the test images. Optimistic.
    best_rate: float
    predictions: Tensor  # (test images,) of the chosen head


def probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    num_classes: int,
    *,
    seed: int = 0,
    rates: Sequence[float] = RATES,
    batch: int = 256,
    epochs: float = EPOCHS,
) -> Probe:
    """Train one head per rate on 90 % of `train` (N, D), choose one on the other 10 %, judge it on `test`.

    Features are standardised with the training images' mean and variance, as MAE's BatchNorm(affine=False) does.
    """
    fit, held = hold_out(train_labels, HELD_OUT, seed)
    mean, scale = train[fit].mean(0), (train[fit].var(0, correction=0) + EPS).rsqrt()
    weights, biases = sweep(
        (train[fit] - mean) * scale, train_labels[fit], num_classes, rates, seed=seed, batch=batch, epochs=epochs
    )
    held_logits = logits(weights, biases, (train[held] - mean) * scale)
    test_predictions = logits(weights, biases, (test - mean) * scale).argmax(-1)  # (test images, L)
    on_held = (held_logits.argmax(-1) == train_labels[held, None]).double().mean(0).tolist()
    on_test = (test_predictions == test_labels[:, None]).double().mean(0).tolist()
    losses = [
        F.cross_entropy(held_logits[:, at], train_labels[held]).nan_to_num(math.inf).item() for at in range(len(rates))
    ]
    chosen = max(range(len(rates)), key=lambda at: (on_held[at], -losses[at]))  # few held-out images: ties are common
    best = max(range(len(rates)), key=lambda at: on_test[at])
    return Probe(
        on_test[chosen], rates[chosen], on_held[chosen], on_test[best], rates[best], test_predictions[:, chosen].cpu()
    )


@torch.no_grad()
def sweep(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    rates: Sequence[float],
    *,
    seed: int = 0,
    batch: int = 256,
    epochs: float = EPOCHS,
) -> tuple[Tensor, Tensor]:
    """Weights (D, L, C) and biases (L, C) of L linear heads trained side by side on (N, D) features, one per rate.

    SGD with momentum, cosine to zero per step, rate * B / 256, softmax cross-entropy. The heads share their start
    N(0, 0.01) and their batches and nothing else, so that each equals the head trained alone; sharing the batch makes
    the L products one. The gradient is written out: with p the probabilities, x' (p - onehot) / B.
    """
    N, D = features.shape
    L, C, B = len(rates), num_classes, min(batch, len(features))
    per_epoch = N // B
    steps = num_steps(N, batch, epochs)
    generator = torch.Generator().manual_seed(seed)
    start = 0.01 * torch.randn(D, 1, C, generator=generator)
    weights = start.to(features.device).repeat(1, L, 1)  # (D, L, C)
    biases = weights.new_zeros(L, C)
    weight_speed, bias_speed = torch.zeros_like(weights), torch.zeros_like(biases)
    peak = weights.new_tensor(rates)[:, None] * (B / 256)  # (L, 1)
    rows, order = torch.arange(B, device=features.device), torch.empty(0)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(N, generator=generator).to(features.device)
        chosen = order[(step % per_epoch) * B :][:B]
        x, y = features[chosen], labels[chosen]
        error_BLC = logits(weights, biases, x).softmax(-1)
        error_BLC[rows, :, y] -= 1
        error_BLC /= B
        weight_speed.mul_(MOMENTUM).add_((x.T @ error_BLC.view(B, L * C)).view(D, L, C))
        bias_speed.mul_(MOMENTUM).add_(error_BLC.sum(0))
        rate = peak * (0.5 * (1 + math.cos(math.pi * step / steps)))
        weights -= rate * weight_speed
        biases -= rate * bias_speed
    return weights, biases


def logits(weights: Tensor, biases: Tensor, features: Tensor) -> Tensor:
    """(D, L, C), (L, C) and (N, D) -> (N, L, C)."""
    D, L, C = weights.shape
    return (features @ weights.view(D, L * C)).view(len(features), L, C) + biases


def num_steps(images: int, batch: int, epochs: float) -> int:
    """Steps of a sweep over `images` images: whole batches only, and MOST_STEPS at most."""
    return max(1, min(MOST_STEPS, round(epochs * (images // min(batch, images)))))


def hold_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (to train on, held out), sorted: of each class a random `share`, at least one image if it has two.

    Raises ValueError if no class has two images.
    """
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten().cpu()
        count = 0 if len(members) < 2 else max(1, round(share * len(members)))
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not held.any():
        raise ValueError("one image per class: none can be held out")
    return (~held).nonzero().flatten().to(labels.device), held.nonzero().flatten().to(labels.device)
