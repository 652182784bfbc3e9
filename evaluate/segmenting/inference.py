"""From a model of windows to the classes of whole images: sliding windows, whole images, several scales and mirrored.

What mmsegmentation does, so that numbers compare: an image is scaled by its short side, windows at a stride cover it,
logits are averaged where windows overlap and resized, bilinear, to the image as it was; several scales and mirror
images are averaged as probabilities. Letters: K classes, C channels, H x W pixels of an image, h x w at its test scale.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from common.batches.loading import Loader
from common.batches.unreadable import USUAL, Limit
from common.data import Unreadable
from common.errors import Refusal
from common.features.extraction import refuse_unreadable, tell_unreadable
from common.features.finite import IN_FP32
from evaluate.segmenting.data import Scenes
from evaluate.segmenting.options import SegmentationConfig, stride_of
from evaluate.segmenting.scores import counts
from evaluate.segmenting.transforms import fill_of, padded_image, rescaled, scaled_size

SINGLE, MULTI = "single", "multi"  # how an image was tested
WINDOWS = 8  # run at once
CLASSES = 32  # resized at once


@dataclass(frozen=True)
class View:
    """Way in which a test image is shown to a model. `votes`: the model answers with probabilities, not logits."""

    window: tuple[int, int]
    stride: tuple[int, int]
    whole: bool
    short: int | None
    long: int | None
    ratios: tuple[float, ...]  # of the multi-scale test; empty: none
    fill: tuple[int, ...]
    step: tuple[int, int]  # pixels of a patch, of which a whole image is a multiple
    votes: bool = False


def view_of(config: SegmentationConfig, backbone: Any) -> View:
    """View in which `config` tests, with the mean and the patches of `backbone`."""
    window, whole, votes = tuple(backbone.size), config.mode == "whole", config.head == "knn"
    ratios, fill = tuple(config.ratios) if config.multi_scale else (), tuple(fill_of(backbone.config.mean))
    step = (window[0] // backbone.grid[0], window[1] // backbone.grid[1])
    return View(window, stride_of(config, window), whole, config.short, config.long, ratios, fill, step, votes)


def starts(length: int, window: int, stride: int) -> list[int]:
    """Starts of the windows along a side: every `stride` pixels, the last one at the very end."""
    if length <= window:
        return [0]
    return [min(at, length - window) for at in range(0, length - window + stride, stride)]


def slide(model: Callable[[Tensor], Mapping[str, Tensor]], image: Tensor, view: View) -> Tensor:
    """Logits (K, h, w) of an image uint8 (C, h, w), averaged over the windows that see a pixel.

    A side shorter than the window is continued in the mean colour, and what was added is cut off again.
    """
    h, w = image.shape[-2:]
    image = padded_image(image, view.window, view.fill)
    (wh, ww), (H, W) = view.window, image.shape[-2:]
    places = [(y, x) for y in starts(H, wh, view.stride[0]) for x in starts(W, ww, view.stride[1])]
    total, windows_on_pixel = torch.empty(0), torch.zeros(H, W, device=image.device)
    for first in range(0, len(places), WINDOWS):
        part = places[first : first + WINDOWS]
        logits = model(torch.stack([image[:, y : y + wh, x : x + ww] for y, x in part]))["logits"]
        logits = F.interpolate(logits.float(), view.window, mode="bilinear", align_corners=False)
        if not total.numel():
            total = logits.new_zeros(logits.shape[1], H, W)
        for (y, x), window_logits in zip(part, logits, strict=True):
            total[:, y : y + wh, x : x + ww] += window_logits
            windows_on_pixel[y : y + wh, x : x + ww] += 1
    return (total / windows_on_pixel)[:, :h, :w]


def whole(model: Callable[[Tensor], Mapping[str, Tensor]], image: Tensor, view: View) -> Tensor:
    """Logits (K, h, w) of an image uint8 (C, h, w) in one pass, padded to whole patches in the mean colour."""
    h, w = image.shape[-2:]
    size = tuple(-(-side // step) * step for side, step in zip((h, w), view.step, strict=True))
    image = padded_image(image, (size[0], size[1]), view.fill)
    logits = F.interpolate(model(image[None])["logits"].float(), size, mode="bilinear", align_corners=False)
    return logits[0, :, :h, :w]


class NotFinite(ArithmeticError):
    """Scores of an image that are not all finite: the largest of them would be a matter of chance."""


def _scores(model: Any, image: Tensor, view: View, ratio: float) -> Tensor:
    H, W = image.shape[-2:]
    image, _ = rescaled(image, scaled_size(H, W, view.short, view.long, ratio))
    scores = (whole if view.whole else slide)(model, image, view)
    if not torch.isfinite(scores).all():
        raise NotFinite
    return scores


def likeliest(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Class of each pixel, int64 (H, W), of scores (K, h, w) resized to `size`, some classes at a time for memory."""
    best = torch.full(size, -torch.inf, device=scores.device)
    classes = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for first in range(0, len(scores), CLASSES):
        part = F.interpolate(scores[None, first : first + CLASSES], size, mode="bilinear", align_corners=False)[0]
        value, at = part.max(0)
        better = value > best
        best, classes = torch.where(better, value, best), torch.where(better, at + first, classes)
    return classes


@torch.no_grad()
def segment(model: Any, image: Tensor, view: View) -> dict[str, Tensor]:
    """Segment an image uint8 (C, H, W): {"single": classes (H, W), and "multi" where the view has ratios}, int64.

    `model`: images (B, C, h, w) -> {"logits": (B, K, ...)} at any resolution, in eval mode, on the image's device.
    Raises NotFinite.
    """
    size = (int(image.shape[-2]), int(image.shape[-1]))
    results = {SINGLE: likeliest(_scores(model, image, view, 1.0), size)}
    total: Tensor | None = None
    for ratio in view.ratios:
        for mirrored in (False, True):
            scores = _scores(model, image.flip(-1) if mirrored else image, view, ratio)
            scores = F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]
            scores = (scores if view.votes else scores.softmax(0)).flip(-1 if mirrored else ())
            total = scores if total is None else total.add_(scores)
    return results if total is None else results | {MULTI: total.argmax(0)}


class _Pairs(Dataset):
    """Images of `scenes` at `rows`, with their masks; one that cannot be read is its error message."""

    def __init__(self, scenes: Scenes, rows: Sequence[int], channels: int) -> None:
        self.scenes, self.rows, self.channels = scenes, list(rows), channels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> tuple[int, Tensor | str, Tensor | None]:
        i = self.rows[at]
        try:
            return i, self.scenes.read(i, self.channels), self.scenes.mask(i)
        except Unreadable as error:
            return i, str(error), None


def pairs(scenes: Scenes, rows: Sequence[int], channels: int, workers: int = 0) -> Iterator[tuple[int, Any, Any]]:
    """Yield (index, image uint8 (C, H, W) or a message why it cannot be read, mask int16 (H, W) or None) of `rows`."""
    yield from Loader(_Pairs(scenes, rows, channels), None, workers)


@torch.no_grad()
def judge(
    model: nn.Module,
    scenes: Scenes,
    view: View,
    channels: int,
    accelerator: Accelerator,
    workers: int = 0,
    say: Callable[[str], None] = print,
    limit: Limit = USUAL,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Judge on all of `scenes`: ({"single": counts int64 (n, C, 3), "multi": ...}, which could be read, (n,) bool).

    Each process judges every R-th image, and everybody gets all counts: no image is counted twice. An image that
    cannot be read counts nothing. Raises Refusal if more than `limit` allows cannot be, or if scores are not finite.
    """
    C, n, device = len(scenes.classes or ()), len(scenes), accelerator.device
    names = (SINGLE, MULTI) if view.ratios else (SINGLE,)
    table = torch.zeros(n, len(names), C, 3, dtype=torch.int64)
    read, bad = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)
    unreadable: list[str] = []
    model.eval()
    mine = range(accelerator.process_index, n, accelerator.num_processes)
    for i, image, mask in pairs(scenes, mine, channels, workers):
        if mask is None:
            unreadable.append(image)
            refuse_unreadable(unreadable, len(unreadable) + int(read.sum()), scenes, limit)
            continue
        read[i] = 1
        try:
            with accelerator.autocast():
                predicted = segment(model, image.to(device), view)
        except NotFinite:
            bad[i] = 1
            continue
        for at, name in enumerate(names):
            table[i, at] = counts(predicted[name].cpu(), mask, C)
    tell_unreadable(unreadable, scenes, say)
    if accelerator.num_processes > 1:  # each row was filled by one of them
        table, read, bad = (accelerator.reduce(tensor.to(device), "sum").cpu() for tensor in (table, read, bad))  # type: ignore[union-attr]
    if bad.any():
        raise Refusal(
            f"the scores of {int(bad.sum()):,} of {int(read.sum()):,} images in {scenes.where} are not finite: numbers "
            f"overflow; {IN_FP32}"
        )
    return {name: table[:, at].numpy() for at, name in enumerate(names)}, read.numpy().astype(bool)
