"""The linear probe: one linear layer per learning rate on frozen features, all trained at once.

Letters: N images, D feature width, C classes, L learning rates, B images per step.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

# Thirteen rates in steps like DINOv2's (eval/linear.py), which end at 0.1: higher, as features are standardised here
# and runs are shorter. On the quickstart's features the best is about 0.5, on raw pixels 0.005.
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
MOMENTUM = 0.9
HELD_OUT = 0.1  # of the training images choose the learning rate
EPOCHS, MOST_STEPS = 50, 12_500  # DINO and MAE train 100 and 90 epochs, which moved nothing; DINOv2 12,500 steps
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
    with _threads_for(batch * num_classes * len(rates) * train.shape[1]):
        weights, biases = sweep(
            (train[fit] - mean) * scale, train_labels[fit], num_classes, rates, seed=seed, batch=batch, epochs=epochs
        )
    held_logits = logits(weights, biases, (train[held] - mean) * scale)
    predictions = logits(weights, biases, (test - mean) * scale).argmax(0)  # (L, test images)
    on_held = (held_logits.argmax(0) == train_labels[held]).double().mean(1).tolist()
    on_test = (predictions == test_labels).double().mean(1).tolist()
    losses = [
        F.cross_entropy(held_logits[:, at].T, train_labels[held]).nan_to_num(math.inf).item()
        for at in range(len(rates))
    ]
    chosen = max(range(len(rates)), key=lambda at: (on_held[at], -losses[at]))  # few held-out images: ties are common
    best = max(range(len(rates)), key=lambda at: on_test[at])
    return Probe(on_test[chosen], rates[chosen], on_held[chosen], on_test[best], rates[best], predictions[chosen].cpu())


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
    """Weights (C, L, D) and biases (C, L) of L linear heads trained side by side on (N, D) features, one per rate.

    SGD with momentum, cosine to zero per step, rate * B / 256, softmax cross-entropy. The heads share their start
    N(0, 0.01) and their batches and nothing else, so that each equals the head trained alone; sharing the batch makes
    the L products one. The gradient is written out: with p the probabilities, (p - onehot) x / B. Classes come first
    because a softmax over a long inner dimension is 40 times faster on a CPU than one over ten neighbours.
    """
    N, D = features.shape
    C, L, B = num_classes, len(rates), min(batch, len(features))
    per_epoch, steps = N // B, num_steps(N, batch, epochs)
    generator = torch.Generator().manual_seed(seed)
    weights = (0.01 * torch.randn(C, 1, D, generator=generator)).to(features.device).repeat(1, L, 1)
    biases = weights.new_zeros(C, L)
    weight_speed, bias_speed = torch.zeros_like(weights), torch.zeros_like(biases)
    peak = weights.new_tensor(rates) * (B / 256)  # (L,)
    columns, order = torch.arange(B, device=features.device), torch.empty(0)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(N, generator=generator).to(features.device)
        chosen = order[(step % per_epoch) * B :][:B]
        x_BD, y_B = features[chosen], labels[chosen]
        error_CLB = logits(weights, biases, x_BD).softmax(0)
        error_CLB[y_B, :, columns] -= 1
        error_CLB /= B
        weight_speed.mul_(MOMENTUM).add_((error_CLB.view(C * L, B) @ x_BD).view(C, L, D))
        bias_speed.mul_(MOMENTUM).add_(error_CLB.sum(2))
        rate = peak * (0.5 * (1 + math.cos(math.pi * step / steps)))
        weights -= rate[:, None] * weight_speed
        biases -= rate * bias_speed
    return weights, biases


def logits(weights: Tensor, biases: Tensor, features: Tensor) -> Tensor:
    """(C, L, D), (C, L) and (N, D) -> (C, L, N)."""
    C, L, D = weights.shape
    return (weights.view(C * L, D) @ features.T).view(C, L, len(features)) + biases[..., None]


@contextlib.contextmanager
def _threads_for(products: int) -> Iterator[None]:
    """One CPU thread for short steps: two gain a third on an idle machine, and lose fiftyfold on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if products > 1 << 28 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
