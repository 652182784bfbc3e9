"""Can a head find the places of patches of noise? There is nothing to see in them, so whoever finds them was told."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.errors import Refusal
from common.models import Backbone, Features
from pretrain.leaks import controls
from pretrain.leaks.symmetry import copies, draw, draws, run
from pretrain.objectives import Answers, Positional
from pretrain.objectives.relative import Relative

STEPS = 300  # of training the head
LEARNING_RATE = 3e-3
QUESTIONS = 1568  # per step: 8 images of 14x14 patches
FEW = 16  # images that show a plain leak: only where they do not, more are looked at
BATCH = 16  # images the backbone sees at a time
HITS = 96  # right answers that chance should give: then its own interval ends at about 1.4 times chance
DEVIATIONS = 3.29  # standard errors of a 99.9 % interval

# How noise is shown: contrast (1: the whole range of pixels) and precision. Frozen random features are a poor reader:
# with every parameter from N(0, 0.1), full-contrast noise drowns the position embedding of a ViT-S (1.6 times chance),
# and RoPE, or BEiT's bias, show at no contrast above 0.01. But a network that is trained may learn to ignore what its
# patches show; nearly constant images are as if it had, and then whatever tells places apart is all there is: RoPE, for
# one, through the attention to a class token. So: the weights as the architecture starts them, a working network rather
# than a chaotic one, in which only what starts constant (biases, norms: a bias makes the border visible to a padded
# convolution) or is neither layer nor norm (encodings, tokens, layer scales) is redrawn; and both contrasts. Tried on
# ViT, RoPE, BEiT, ResNet stems, Twins (PEG) and NesT: on faint noise each is found at 49 of 49 or 196 of 196 times
# chance, while at full contrast some stay at chance. Float64: float32 would drown such faint noise in its rounding.
# What is not found: relative bias or windows without any prefix token (Swin). All tokens of a constant image are then
# the same, and only a trained backbone can use them (within 750 steps on noise, a small one does): they are asymmetric,
# and the control on noise that is logged in training watches them.
SHOWN = ((1e-8, torch.float64), (1.0, torch.float32))
ENCODING = 1.0  # standard deviation of redrawn encodings
CONSTANT = 0.1  # of what is added to parameters that start constant
LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass
class Noise:
    """Accuracy of a head at finding the places of patches of noise, trained on features of other noise."""

    asked: str  # "places" or "offsets"
    weights: str  # "redrawn" or "trained"
    contrast: float
    accuracy: float
    low: float  # 99.9 % interval
    high: float
    chance: float  # accuracy of the best answer that ignores the image
    images: int

    @property
    def leaks(self) -> bool:
        """Whether the accuracy may be above the limit, as far as its interval tells."""
        return not self.high <= controls.limit(self.chance)

    def __str__(self) -> str:
        return (
            f"{self.asked}, {self.weights} weights, contrast {self.contrast:g}: accuracy {self.accuracy:.2%} on "
            f"{self.images} images of noise (99.9 %: {self.low:.2%} to {self.high:.2%}), "
            f"{self.accuracy / self.chance:.1f} times chance"
        )


def accuracy_on_noise(
    backbone: Backbone, objective: Positional, weights: str, contrast: float, dtype: torch.dtype
) -> Noise:
    """Train a fresh head on frozen features of noise, and judge it on other noise.

    weights: "redrawn" or "trained". Pairs of a patch with itself are left out: they leak nothing. Raises Refusal if a
    feature is not finite.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        backbone, objective = copies(backbone, objective, dtype)
        if weights == "redrawn":
            redraw(backbone)
            if (hidden := getattr(objective, "hidden_position", None)) is not None:
                nn.init.normal_(hidden, std=ENCODING)
        if isinstance(objective, Relative):
            objective = objective.apart()
        chance, rng = objective.chance, np.random.default_rng(0)
        asked = _NoiseFeatures(backbone, objective, 1, contrast, rng).answers(objective).counted
        fresh = min(512, max(64, math.ceil(HITS / (chance * max(1, int(asked.sum()))))))
        for train_images, test_images in ((FEW, FEW), (max(64, fresh // 2), fresh)):
            train = _NoiseFeatures(backbone, objective, train_images, contrast, rng)
            test = _NoiseFeatures(backbone, objective, test_images, contrast, rng)
            if not all(torch.isfinite(part.features["tokens"].tokens).all() for part in (train, test)):
                raise Refusal(
                    f"the audit: {backbone.config.name} gives features that are not finite ({weights} weights, "
                    f"contrast {contrast:g})"
                )
            train.standardize(test)
            head = _train_head(copy.deepcopy(objective).float(), train, asked.numel(), rng)
            result = Noise(
                "offsets" if objective.of_pairs else "places",
                weights,
                contrast,
                *_score(head, test),
                chance,
                test_images,
            )
            if result.low > controls.limit(chance):
                break
        return result


def _score(head: Positional, test: "_NoiseFeatures") -> tuple[float, float, float]:
    """Accuracy on fresh noise, with its interval."""
    correct, asked = [], []
    for images in torch.arange(test.count).split(BATCH):
        answers = test.answers(head, images)
        correct.append(((answers.guesses == answers.labels) & answers.counted).sum(1))
        asked.append(answers.counted.sum(1))
    return _interval(torch.cat(correct), torch.cat(asked))


def _interval(correct: Tensor, asked: Tensor) -> tuple[float, float, float]:
    """Accuracy and its 99.9 % interval, with the image as the unit: tokens of one image are not independent."""
    accuracy = float(correct.sum() / asked.sum())
    residues = correct.double() - accuracy * asked.double()
    error = float((residues.square().sum() * len(correct) / (len(correct) - 1)).sqrt() / asked.sum())
    return accuracy, max(0.0, accuracy - DEVIATIONS * error), min(1.0, accuracy + DEVIATIONS * error)


@torch.no_grad()
def redraw(backbone: Backbone) -> None:
    """Draw new values for parameters that an architecture starts at a constant, and for its encodings; see SHOWN."""
    for module in backbone.modules():
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:  # removed on purpose, or fixed
                continue
            if not isinstance(module, LAYERS):
                nn.init.normal_(parameter, std=ENCODING)
            elif bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(CONSTANT * torch.randn_like(parameter))


class _NoiseFeatures:
    """Features (float32) of images of noise under every pass of an objective, and the draws beside them."""

    @torch.no_grad()
    def __init__(
        self, backbone: Backbone, objective: Positional, count: int, contrast: float, rng: np.random.Generator
    ) -> None:
        self.count = count
        parts: list[dict[str, Features]] = []
        for first in range(0, count, BATCH):
            size = min(BATCH, count - first)
            plans = {
                name: draw(asked.plan, math.prod(backbone.grid), rng, size) for name, asked in objective.passes.items()
            }
            pixels = rng.uniform(-2, 2, (size, backbone.channels, *backbone.size))
            images = torch.from_numpy(0.5 + contrast * pixels)  # off zero, or padding would not show at the border
            parts.append(run(backbone, objective, images.to(next(backbone.parameters()).dtype), plans))
        self.features = {name: _combined([part[name] for part in parts], torch.cat) for name in parts[0]}
        self.draws = draws(objective, rng, count)

    def standardize(self, other: "_NoiseFeatures") -> None:
        """Give every channel mean 0 and deviation 1 over these images, and treat the other ones alike."""
        for name, features in self.features.items():
            mean = features.tokens.mean((0, 1))
            deviation = features.tokens.std((0, 1)).clamp(min=1e-300)
            for images in (features, other.features[name]):
                images.tokens = ((images.tokens - mean) / deviation).float()
                images.prefix = images.prefix.float()

    def batch(self, images: Tensor) -> tuple[dict[str, Features], dict[str, Tensor]]:
        """Features and draws of some of the images: the arguments of an objective."""
        features = {
            name: _combined([whole], lambda tensors: tensors[0][images]) for name, whole in self.features.items()
        }
        return features, {name: value[images] for name, value in self.draws.items()}

    @torch.no_grad()
    def answers(self, objective: Positional, images: Tensor | None = None) -> Answers:
        """Answers of the objective, to all images or to some."""
        return objective.answers(*self.batch(torch.arange(self.count) if images is None else images))


def _combined(parts: list[Features], combine: Callable[[list[Tensor]], Tensor]) -> Features:
    """Features whose tensors, those of their plan included, are what `combine` makes of the parts' tensors."""
    plans: list[Any] = [vars(part.plan) for part in parts]
    drawn: Any = {key: combine([plan[key] for plan in plans]) for key in plans[0] if isinstance(plans[0][key], Tensor)}
    tokens, prefix = combine([part.tokens for part in parts]), combine([part.prefix for part in parts])
    return Features(tokens, prefix, parts[0].grid, dataclasses.replace(parts[0].plan, **drawn))


def _train_head(objective: Positional, noise: _NoiseFeatures, questions: int, rng: np.random.Generator) -> Positional:
    """Start the layers of the objective afresh and train them on frozen features; returns it in eval mode."""
    objective.train().progress = 1.0  # no smoothing: as at the end of the training
    for module in objective.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        images = torch.from_numpy(rng.permutation(noise.count)[: max(2, QUESTIONS // questions)])
        loss = objective(*noise.batch(images))["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return objective.eval()
