"""Segmentation without training: k-NN of patches, and patches of raw pixels as a backbone.

Letters: B images, h x w patches, N = h*w, D width, M patches in the bank, C classes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn import functional as F

from common.batches.sampler import generator
from common.errors import Refusal
from common.features.finite import IN_FP32
from common.features.neighbors import centre_of, unit_vectors
from common.models import Backbone
from common.models.backbone import Features
from common.models.plan import TokenPlan
from evaluate.segmenting.data import IGNORED, Scenes
from evaluate.segmenting.inference import View, pairs
from evaluate.segmenting.transforms import padded, rescaled, scaled_size

AT_ONCE = 1 << 25  # similarities in memory
WINDOWS = 32  # windows of training images that are run at once


class RawPatches(nn.Module):
    """Baseline for a backbone: patches as they are, their normalised pixels side by side (C * ph * pw)."""

    mean: Tensor
    std: Tensor

    def __init__(self, like: Backbone) -> None:
        super().__init__()
        self.config, self.size, self.grid, self.channels = like.config, like.size, like.grid, like.channels
        self.patch = like.size[0] // like.grid[0], like.size[1] // like.grid[1]
        self.width = like.channels * self.patch[0] * self.patch[1]
        self.register_buffer("mean", torch.tensor(like.config.mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(like.config.std).view(-1, 1, 1), persistent=False)

    def layers(self, images: Tensor, *_: Any, **__: Any) -> list[Features]:
        """Patches of uint8 (B, C, H, W) as one layer, like `Backbone.layers`."""
        pixels = (images.float() / 255 - self.mean) / self.std
        tokens = F.unfold(pixels, self.patch, stride=self.patch).mT  # (B, N, D)
        grid = images.shape[-2] // self.patch[0], images.shape[-1] // self.patch[1]
        return [Features(tokens, tokens[:, :0], grid)]


def histograms(mask: Tensor, grid: tuple[int, int], num_classes: int) -> Tensor:
    """Share of each class among the labelled pixels of each patch, (N, C) float32, of a mask (H, W); 0 without any."""
    H, W = mask.shape
    rows = torch.arange(H).mul(grid[0]).div(H, rounding_mode="floor")
    columns = torch.arange(W).mul(grid[1]).div(W, rounding_mode="floor")
    patch = rows[:, None] * grid[1] + columns
    known = mask != IGNORED
    flat = patch[known] * num_classes + mask[known].long()
    counts = torch.bincount(flat, minlength=grid[0] * grid[1] * num_classes).view(-1, num_classes).float()
    return counts / counts.sum(1, keepdim=True).clamp_min(1)


class Neighbors(nn.Module):
    """Classifier of patches by k-NN: each is what the training patches most like it are, as DINO's k-NN of images
    votes.

    The bank holds final-norm tokens (M, D) and the classes of their pixels (M, C): a neighbour's vote,
    exp(cosine similarity / temperature), is shared as its pixels are. Tokens are centred by the bank's mean.
    """

    bank: Tensor
    centre: Tensor
    labels: Tensor

    def __init__(
        self, backbone: Any, plan: TokenPlan | None, bank: Tensor, labels: Tensor, k: int, temperature: float
    ) -> None:
        super().__init__()
        if not 1 <= k <= len(bank):
            raise Refusal(f"--k {k}: the training images have {len(bank)} labelled patches; choose so many at most")
        self.backbone, self.plan, self.k, self.temperature = backbone, plan, k, temperature
        self.register_buffer("centre", centre_of(bank), persistent=False)
        self.register_buffer("bank", unit_vectors(bank, self.centre), persistent=False)
        self.register_buffer("labels", labels, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Classify uint8 (B, C, H, W): {"logits": (B, K, h, w)}: shares of the votes, which sum to 1."""
        features = self.backbone.layers(images, 1, self.plan)[0]
        tokens = unit_vectors(features.tokens, self.centre)
        shares = []
        for queries in tokens.flatten(0, 1).split(max(1, AT_ONCE // len(self.bank))):
            similarity, neighbor = (queries @ self.bank.T).topk(self.k, dim=1)
            weights = (similarity / self.temperature).softmax(1)  # (q, k)
            shares.append(torch.einsum("qk,qkc->qc", weights, self.labels[neighbor]))
        votes = torch.cat(shares).view(len(images), *features.grid, -1)
        return {"logits": votes.permute(0, 3, 1, 2)}


@torch.no_grad()
def collect(
    backbone: Any,
    plan: TokenPlan | None,
    scenes: Scenes,
    view: View,
    most: int,
    seed: int,
    accelerator: Accelerator,
    workers: int = 0,
    say: Callable[[str], None] = print,
) -> tuple[Tensor, Tensor]:
    """Collect (bank (M, D), labels (M, C)) for `Neighbors`: of every training image (if they are more than `most`, of
    so many) one window, and of it equally many patches, drawn from (seed, image).

    Each process looks at its share of the images, and all get the same bank. Raises Refusal if nothing is labelled.
    """
    backbone.eval()
    device, C = accelerator.device, len(scenes.classes or ())
    chosen = np.unique(np.linspace(0, len(scenes) - 1, min(len(scenes), most)).astype(int))
    share = max(1, most // len(chosen))
    mine = chosen[accelerator.process_index :: accelerator.num_processes].tolist()
    kept: list[tuple[int, Tensor, Tensor]] = []  # (image, tokens, labels)
    windows: list[tuple[int, Tensor, Tensor]] = []

    def run() -> None:
        with accelerator.autocast():
            features = backbone.layers(torch.stack([image for _, image, _ in windows]).to(device), 1, plan)[0]
        for (i, _, mask), tokens in zip(windows, features.tokens.float().cpu(), strict=True):
            labels = histograms(mask, features.grid, C)
            labelled = torch.nonzero(labels.sum(1) > 0)[:, 0]
            order = generator(seed, 1, i, "bank").permutation(len(labelled))[:share]
            rows = labelled[torch.from_numpy(np.sort(order))]
            kept.append((i, tokens[rows], labels[rows]))
        windows.clear()

    for i, image, mask in pairs(scenes, mine, backbone.channels, workers):
        if mask is None:
            say(f"warning: left out of the bank: {image}")
            continue
        windows.append((i, *_window(image, mask, view, generator(seed, 0, i, "bank"))))
        if len(windows) == WINDOWS:
            run()
    if windows:
        run()
    if accelerator.num_processes > 1:
        kept = gather_object(kept)
    kept.sort(key=lambda each: each[0])
    bad = torch.tensor([not bool(torch.isfinite(tokens).all()) for _, tokens, _ in kept])
    if bad.any():
        raise Refusal(
            f"the patches of {int(bad.sum()):,} of {len(kept):,} images in {scenes.where} are not finite: numbers "
            f"overflow; {IN_FP32}"
        )
    if not kept or not sum(len(tokens) for _, tokens, _ in kept):
        raise Refusal(f"no labelled patch in {scenes.where}: every pixel says to be ignored (255)")
    return tuple(torch.cat([each[at] for each in kept]).to(device) for at in (1, 2))  # type: ignore[return-value, misc]


def _window(image: Tensor, mask: Tensor, view: View, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """A random window of an image at its test scale, and of its mask."""
    H, W = image.shape[-2:]
    image, scaled = rescaled(image, scaled_size(H, W, view.short, view.long), mask)
    assert scaled is not None
    image, mask = padded(image, scaled, view.window, view.fill)
    top, left = (int(rng.integers(have - side + 1)) for have, side in zip(mask.shape, view.window, strict=True))
    rows, columns = slice(top, top + view.window[0]), slice(left, left + view.window[1])
    return image[:, rows, columns], mask[rows, columns]
