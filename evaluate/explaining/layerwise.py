"""What single tokens know, layer by layer: tokens drawn from every layer, and a linear probe that reads their position.

Letters: K images, B of them at a time, N = h*w patches, T of them drawn per image, M = K*T tokens, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from common.data import Images
from common.features.extraction import Eye, shown
from common.models import Features
from common.positions import distances
from evaluate.probing.probe import probe

TRAIN_TOKENS = 2**16  # of a layer that train its probe: with fewer, the probe of a 14x14 grid learns them by heart
TEST_TOKENS = 2**15
ANSWERS = 2**25  # test tokens times places: the probe's answers are in memory for every learning rate
RATES = (0.05, 0.15, 0.5, 1.5)
STEPS, BATCH = 1000, 256
PATCH = 16  # larger patches of raw pixels are averaged down to this side
FLOOR = 1e-6  # of the mean variance: below it a direction is rounding, such as the mean that a LayerNorm removes


@dataclass
class Layer:
    """Tokens of K images after one layer."""

    tokens: Tensor  # (K, T, D), each from a random place
    places: Tensor  # (K, T) in [0, N)
    mean: Tensor  # (K, D) over all N tokens
    index: Tensor  # (K,) which images: those that could be read
    grid: tuple[int, int]


@dataclass
class Reading:
    """Result of a linear probe that reads position from single tokens of K images that it was not trained on."""

    right: Tensor  # (K,) share of an image's tokens whose place was read
    distance: float  # from the place that was read to the true one, mean over tokens, in patches
    rate: float  # learning rate, chosen on a tenth of the training tokens

    @property
    def accuracy(self) -> float:
        """Share of the tokens whose place was read."""
        return self.right.mean().item()


def drawn(images: int, num_patches: int, test: bool) -> int:
    """Number T of tokens to draw from each of so many images, at least one and at most all."""
    tokens = min(TEST_TOKENS, ANSWERS // num_patches) if test else TRAIN_TOKENS
    return min(num_patches, math.ceil(tokens / images))


def patches(images: Tensor, grid: tuple[int, int]) -> Features:
    """Raw pixels in [0, 1] of every patch, uint8 (B, C, H, W) -> tokens (B, N, D): what the content alone gives away.

    A side longer than 16 is averaged down to 16.
    """
    h, w = grid
    patch = (min(images.shape[2] // h, PATCH), min(images.shape[3] // w, PATCH))
    small = F.adaptive_avg_pool2d(images.float() / 255, (h * patch[0], w * patch[1]))
    tokens = F.unfold(small, patch, stride=patch).transpose(1, 2)
    return Features(tokens, tokens[:, :0], grid)


@torch.no_grad()
def sample(
    see: Callable[[Tensor], Sequence[Features]],
    images: Images,
    eye: Eye,
    *,
    test: bool,
    warn: Callable[[str], None] = print,
) -> list[Layer]:
    """Sample tokens of all of `images` from the layers that `see` returns: uint8 (B, C, H, W) -> `Features` of each.

    The places do not depend on the layer, as long as the grid is the same. Tokens stay on the device they are on.
    """
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    grids: list[tuple[int, int]] = []
    indices = []
    for batch, index in shown(images, eye, warn):
        layers_of_batch = see(batch)
        parts, grids = parts or [[] for _ in layers_of_batch], [features.grid for features in layers_of_batch]
        for part, tokens in zip(parts, (features.tokens.float() for features in layers_of_batch), strict=True):
            B, N, D = tokens.shape
            order = torch.rand(B, N, generator=torch.Generator().manual_seed(int(index[0]))).argsort(1)
            places = order[:, : drawn(len(images), N, test)].to(tokens.device)
            part.append((tokens.gather(1, places[..., None].expand(-1, -1, D)), places, tokens.mean(1)))
        indices.append(index)
    index = torch.cat(indices)
    layers = []
    for part, grid in zip(parts, grids, strict=True):
        tokens, places, mean = (torch.cat(pieces) for pieces in zip(*part, strict=True))
        layers.append(Layer(tokens, places, mean, index, grid))
        part.clear()  # else all tokens would be in memory twice
    return layers


def groups(sizes: Sequence[int], most: int) -> Iterator[range]:
    """Consecutive layers that fit into `most` bytes together; one that does not fit is alone."""
    first, total = 0, 0
    for at, size in enumerate(sizes):
        if at > first and total + size > most:
            yield range(first, at)
            first, total = at, 0
        total += size
    yield range(first, len(sizes))


def whiten(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Whiten both (M, D) -> (M, d <= D) in the directions in which `train` varies, each with unit variance.

    What a linear classifier can tell is the same before and after. What gradient descent finds in a fixed number of
    steps is not: dimensions of early layers are so correlated that without this they seem to know less than they do.
    """
    mean = train.mean(0)
    pieces = ((piece - mean).double() for piece in train.split(8192))  # float32 would round above FLOOR
    variances, directions = torch.linalg.eigh(sum(piece.T @ piece for piece in pieces) / len(train))
    kept = variances > FLOOR * variances.mean()
    turn = (directions[:, kept] / variances[kept].sqrt()).to(train)
    return (train - mean) @ turn, (test - mean) @ turn


def read_position(train: Layer, test: Layer, seed: int = 0) -> Reading:
    """Train a softmax on single tokens of `train` to tell which of the N places they are from; judge it on `test`."""
    h, w = train.grid
    tokens, unseen = whiten(train.tokens.flatten(0, 1), test.tokens.flatten(0, 1))
    labels, places = train.places.flatten(), test.places.flatten()
    per_epoch = max(1, int(0.9 * len(tokens)) // BATCH)
    result = probe(tokens, labels, unseen, places, h * w, seed=seed, rates=RATES, batch=BATCH, epochs=STEPS / per_epoch)
    places = places.cpu()
    right = (result.predictions == places).double().view(test.places.shape).mean(1)
    return Reading(right, distances(train.grid)[result.predictions, places].mean().item(), result.rate)


def independent(right: Tensor, tokens: int) -> int:
    """Number of independent tokens that say as much as K images' shares `right` (K,) of `tokens` tokens each.

    Tokens of one image succeed and fail together: between K and K * tokens, by the variance between images.
    """
    share, images = right.mean().item(), len(right)
    variance = right.var(correction=0).item() / images
    return images if variance == 0 else round(min(share * (1 - share) / variance, images * tokens))
