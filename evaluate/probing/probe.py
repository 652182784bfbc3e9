"""The linear probe: many linear layers on frozen features, all trained at once on the same batches.

A head is a set of features and a learning rate. Heads on the same features are one product of matrices; heads on other
features share the batch, and so the pass of the backbone that makes it.

Letters: N images, D feature width, C classes, L learning rates, B images per step.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

# Thirteen rates in steps like DINOv2's (eval/linear.py), which end at 0.1: higher, as features are standardised here
# and runs are shorter. On the quickstart's features the best is about 0.5, on raw pixels 0.005.
RATES = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
MOMENTUM = 0.9
TRUST = 0.001  # of LARS (arXiv 1708.03888), as in MAE
BETAS, ADAM_EPS = (0.9, 0.999), 1e-8  # AdamW's, without decay
HELD_OUT = 0.1  # of the training images choose the learning rate
EPOCHS, MOST_STEPS = 50, 12_500  # DINO and MAE train 100 and 90 epochs, which moved nothing; DINOv2 12,500 steps
EPS = 1e-6  # of MAE's BatchNorm without affine
RUNNING = 0.1  # weight of a batch in that BatchNorm's running statistics
CHUNK = 4096  # images judged at a time

Parts = Mapping[str, Tensor]  # features by name, (N, D) each


@dataclass(frozen=True)
class HeadTraining:
    """How heads are trained."""

    rates: tuple[float, ...] = RATES  # for 256 images per step
    optimizer: str = "sgd"  # "sgd", "lars" or "adamw"
    batch: int = 256
    epochs: float = EPOCHS
    steps: int | None = None  # in place of epochs
    most_steps: int | None = MOST_STEPS
    warmup: float = 0.0  # epochs
    by_epoch: bool = False  # the rate falls once an epoch, not at every step
    every_epoch: bool = False  # the heads as they are after each epoch are candidates too
    normalise: str = "standard"  # by the training images' "standard" deviation, by each "batch"'s, or "none"


@dataclass(frozen=True)
class Labelled:
    """Features of N images by name, (N, D) each, and their labels (N,)."""

    parts: Parts
    labels: Tensor

    def only(self, names: Collection[str]) -> "Labelled":
        """The features of these names."""
        return Labelled({name: part for name, part in self.parts.items() if name in names}, self.labels)

    def rows(self, chosen: Tensor) -> "Labelled":
        """The images of these numbers (n,)."""
        parts = {name: part[chosen.to(part.device)] for name, part in self.parts.items()}
        return Labelled(parts, self.labels[chosen])


@dataclass
class Probe:
    """What the heads came to. Accuracies are shares in [0, 1] of the images they are named after."""

    accuracy: float  # test accuracy of the head that was chosen on held-out training images
    rate: float  # its learning rate, for 256 images per step
    held_out: float | None  # its accuracy on the images that chose it; None: there was nothing to choose
    best_on_test: float  # the field's habit: the head that happens to be best on the test images. Optimistic.
    best_rate: float
    predictions: Tensor  # (test images,) of the chosen head
    held_out_loss: float = math.nan  # breaks ties: held-out images are few
    features: str = ""  # which set of features it sees
    best_features: str = ""
    epoch: int | None = None  # after which it was taken, if it might have been any
    best_epoch: int | None = None
    diverged: tuple[float, ...] = ()  # learning rates at which the weights overflowed: such heads are not chosen
    without_held_out: float | None = None  # test accuracy before it was fitted to all training images, if it was

    @property
    def difference(self) -> float:
        """How much the number grows where the test images choose, from the very same heads."""
        return self.best_on_test - (self.accuracy if self.without_held_out is None else self.without_held_out)


# ----------------------------------------------------------------------------------------------------------- the heads


class Heads:
    """L linear layers on one set of features, one for each rate, that share their start N(0, 0.01) and their batches
    and nothing else: each equals the head trained alone, and the L products are one.

    weights (C, L, D), biases (C, L). The gradient of the softmax cross-entropy is written out: with p the
    probabilities, (p - onehot) x / B. Classes come first because a softmax over a long inner dimension is 40 times
    faster on a CPU than one over ten neighbours.
    """

    def __init__(
        self,
        parts: Sequence[str],
        width: int,
        num_classes: int,
        training: HeadTraining,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        self.parts, self.optimizer, self.steps = tuple(parts), training.optimizer, 0
        self.given, self.batch_norm = training.rates, training.normalise == "batch"
        start = 0.01 * torch.randn(num_classes, 1, width, generator=generator)
        self.weights = start.to(device).repeat(1, len(self.given), 1)
        self.biases = self.weights.new_zeros(num_classes, len(self.given))
        self.rates = self.weights.new_tensor(self.given)  # (L,)
        self.speeds = [torch.zeros_like(self.weights), torch.zeros_like(self.biases)]  # AdamW: first moments
        self.squares = [torch.zeros_like(each) for each in self.speeds] if self.optimizer == "adamw" else []
        self.mean, self.variance = self.weights.new_zeros(width), self.weights.new_ones(width)

    def columns(self, parts: Parts) -> Tensor:
        """(B, D): the parts these heads see, side by side."""
        return torch.cat([parts[name] for name in self.parts], 1) if len(self.parts) > 1 else parts[self.parts[0]]

    def logits(self, parts: Parts) -> Tensor:
        """(C, L, B), with the BatchNorm's running statistics."""
        x_BD = self.columns(parts)
        if self.batch_norm:
            x_BD = (x_BD - self.mean) * (self.variance + EPS).rsqrt()
        return logits(self.weights, self.biases, x_BD)

    @torch.no_grad()
    def step(self, parts: Parts, labels: Tensor, share: float) -> None:
        """One step on labels (B,), at `share` of the peak rates; rates are for 256 images."""
        x_BD = self.columns(parts)
        B, D = x_BD.shape
        C, L = self.biases.shape
        if self.batch_norm:
            x_BD = self._normalised(x_BD)
        error_CLB = logits(self.weights, self.biases, x_BD).softmax(0)
        error_CLB[labels, :, torch.arange(B, device=labels.device)] -= 1
        error_CLB /= B
        gradients = [(error_CLB.view(C * L, B) @ x_BD).view(C, L, D), error_CLB.sum(2)]
        # written out over all heads at once: torch.optim takes 1.4 to 2.9 times as long on ten classes (LOG.md)
        rate = self.rates * (B / 256) * share
        self.steps += 1
        if self.optimizer == "adamw":
            return self._adam(gradients, rate)
        if self.optimizer == "lars":
            weight, slope = self.weights.norm(dim=(0, 2)), gradients[0].norm(dim=(0, 2))  # (L,)
            gradients[0] *= torch.where((weight > 0) & (slope > 0), TRUST * weight / slope, 1)[:, None]
        for speed, gradient in zip(self.speeds, gradients, strict=True):
            speed.mul_(MOMENTUM).add_(gradient)
        self.weights -= rate[:, None] * self.speeds[0]
        self.biases -= rate * self.speeds[1]

    def _adam(self, gradients: Sequence[Tensor], rate: Tensor) -> None:
        first, second = BETAS
        corrected = math.sqrt(1 - second**self.steps)
        for at, (weights, gradient) in enumerate(zip((self.weights, self.biases), gradients, strict=True)):
            self.speeds[at].lerp_(gradient, 1 - first)
            self.squares[at].mul_(second).addcmul_(gradient, gradient, value=1 - second)
            size = rate / (1 - first**self.steps)
            size = size[:, None] if weights.ndim == 3 else size
            weights -= size * self.speeds[at] / (self.squares[at].sqrt() / corrected + ADAM_EPS)

    def _normalised(self, x_BD: Tensor) -> Tensor:
        mean, variance = x_BD.mean(0), x_BD.var(0, correction=0)
        self.mean.lerp_(mean, RUNNING)
        self.variance.lerp_(variance * (len(x_BD) / max(1, len(x_BD) - 1)), RUNNING)
        return (x_BD - mean) * (variance + EPS).rsqrt()


def logits(weights: Tensor, biases: Tensor, features: Tensor) -> Tensor:
    """(C, L, D), (C, L) and (N, D) -> (C, L, N)."""
    C, L, D = weights.shape
    return (weights.view(C * L, D) @ features.T).view(C, L, len(features)) + biases[..., None]


# -------------------------------------------------------------------------------------------------------- the training


def share_of_peak(training: HeadTraining, step: int, steps: int, per_epoch: int) -> float:
    """What a step's rate is of the peak: linear from 0 over the warm-up, then a cosine to 0."""
    at = step // per_epoch * per_epoch if training.by_epoch else step
    warmup = min(round(training.warmup * per_epoch), steps - 1)
    if at < warmup:
        return at / warmup
    return 0.5 * (1 + math.cos(math.pi * (at - warmup) / (steps - warmup)))


def drawn(parts: Parts, labels: Tensor, batch: int, generator: torch.Generator) -> Iterator[tuple[Parts, Tensor]]:
    """Batches of features that are there already, without end: whole ones only, each epoch in an order of its own."""
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order.split(batch)[: len(labels) // batch]:
            rows = chosen.to(labels.device)
            yield {name: part[rows.to(part.device)].to(labels.device) for name, part in parts.items()}, labels[rows]


def train_heads(
    heads: Sequence[Heads],
    batches: Iterator[tuple[Parts, Tensor]],
    training: HeadTraining,
    steps: int,
    per_epoch: int,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train all heads on the same batches of (features by name, labels (B,)); `after(step)` after each, from 1."""
    for step in range(steps):
        parts, labels = next(batches)
        share = share_of_peak(training, step, steps, per_epoch)
        for each in heads:
            each.step(parts, labels, share)
        after(step + 1)


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
    training = HeadTraining(tuple(rates), batch=batch, epochs=epochs)
    sides = Labelled({"all": train}, train_labels), Labelled({"all": test}, test_labels)
    generator = torch.Generator().manual_seed(seed)
    return probes(*sides, num_classes, {"all": ("all",)}, training, seed=seed, generator=generator)["all"]


@torch.no_grad()
def probes(
    train: Labelled,
    test: Labelled,
    num_classes: int,
    sets: Mapping[str, Sequence[str]],
    training: HeadTraining,
    *,
    seed: int = 0,
    batches: Callable[[Tensor, int, int], Iterator[tuple[Parts, Tensor]]] | None = None,
    generator: torch.Generator | None = None,
    after: Callable[[int, int], None] = lambda step, steps: None,
) -> dict[str, Probe]:
    """{set: its best head}: heads on every set of features, all trained in one pass on 90 % of the training images,
    chosen on the other 10 %, judged on the test images.

    `sets`: name -> which parts it puts side by side. `batches(fit (n,), B, steps)`: batches of other features of the
    training images numbered `fit`, such as those of augmented views; without it those given are drawn from. Every set
    starts from `seed` and so do the batches; a `generator` serves both in turn. `after(step, steps)`: after each step.
    """
    fit, held = hold_out(train.labels, HELD_OUT, seed)
    B = min(training.batch, len(fit))
    per_epoch, steps = len(fit) // B, steps_of(training, len(fit))
    needed = {name for parts in sets.values() for name in parts}
    train, test = train.only(needed), test.only(needed)
    fitted = train.rows(fit)
    scaled = _scaling(fitted.parts) if training.normalise == "standard" else dict
    heads = {
        name: Heads(
            parts, sum(fitted.parts[part].shape[1] for part in parts), num_classes, training,
            generator or torch.Generator().manual_seed(seed), train.labels.device,
        )
        for name, parts in sets.items()
    }  # fmt: skip
    if batches is None:
        order = generator or torch.Generator().manual_seed(seed)
        stream = drawn(scaled(fitted.parts), fitted.labels, B, order)
    else:
        stream = ((scaled(parts), labels) for parts, labels in batches(fit, B, steps))
    chosen_by, judged_by = (Labelled(scaled(side.parts), side.labels) for side in (train.rows(held), test))
    best: dict[str, Probe] = {}

    def judged(step: int) -> None:
        after(step, steps)
        if step == steps or (training.every_epoch and step % per_epoch == 0):
            epoch = math.ceil(step / per_epoch) if training.every_epoch else None
            for name, each in heads.items():
                now = judge(each, chosen_by, judged_by)
                now = replace(now, features=name, best_features=name, epoch=epoch, best_epoch=epoch)
                best[name] = better(best[name], now) if name in best else now

    products = B * num_classes * sum(each.weights[0].numel() for each in heads.values())
    with _threads_for(products):
        train_heads(list(heads.values()), stream, training, steps, per_epoch, judged)
    return best


def _scaling(reference: Parts) -> Callable[[Parts], Parts]:
    """Function that subtracts the mean of the `reference` features and divides by their standard deviation."""
    moments = {name: (part.mean(0), (part.var(0, correction=0) + EPS).rsqrt()) for name, part in reference.items()}
    return lambda parts: {name: (parts[name] - mean) * scale for name, (mean, scale) in moments.items()}


def judge(heads: Heads, held: Labelled, test: Labelled) -> Probe:
    """The head that is best on the held-out images, and the one that is best on the test images."""
    L = len(heads.rates)
    held_logits = torch.cat([heads.logits(some) for some in _chunks(held.parts)], 2)
    predictions = torch.cat([heads.logits(some).argmax(0) for some in _chunks(test.parts)], 1)  # (L, test images)
    on_held = (held_logits.argmax(0) == held.labels).double().mean(1).tolist()
    on_test = (predictions == test.labels).double().mean(1).tolist()
    finite = torch.isfinite(held_logits).all(2).all(0).tolist()
    losses = [
        F.cross_entropy(held_logits[:, at].T, held.labels).nan_to_num(math.inf, math.inf).item() for at in range(L)
    ]
    # few held-out images: ties are common
    chosen = max(range(L), key=lambda at: (finite[at], on_held[at], -losses[at]))
    best = max(range(L), key=lambda at: (finite[at], on_test[at]))
    return Probe(
        on_test[chosen], heads.given[chosen], on_held[chosen], on_test[best], heads.given[best],
        predictions[chosen].cpu(), losses[chosen],
        diverged=tuple(rate for rate, well in zip(heads.given, finite, strict=True) if not well),
    )  # fmt: skip


def _chunks(parts: Parts) -> Iterator[Parts]:
    names, count = list(parts), len(next(iter(parts.values())))
    for start in range(0, count, CHUNK):
        yield {name: parts[name][start : start + CHUNK] for name in names}


def better(one: Probe, other: Probe) -> Probe:
    """Choose of two the head better on the held-out images and, apart from it, the one better on the test images.

    The first one stays where there is nothing to choose.
    """
    first = (one.held_out or 0.0, -one.held_out_loss) >= (other.held_out or 0.0, -other.held_out_loss)
    chosen, best = one if first else other, one if one.best_on_test >= other.best_on_test else other
    return replace(
        chosen, best_on_test=best.best_on_test, best_rate=best.best_rate, best_features=best.best_features,
        best_epoch=best.best_epoch,
    )  # fmt: skip


@contextlib.contextmanager
def _threads_for(products: int) -> Iterator[None]:
    """One CPU thread for short steps: two gain a third on an idle machine, and lose fiftyfold on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(threads if products > 1 << 28 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def steps_of(training: HeadTraining, images: int) -> int:
    """Steps of a training on `images` images: whole batches only, and `most_steps` at most."""
    steps = training.steps or max(1, round(training.epochs * (images // min(training.batch, images))))
    return steps if training.steps or training.most_steps is None else min(training.most_steps, steps)


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
