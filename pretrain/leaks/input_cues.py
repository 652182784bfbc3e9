"""What raw pixels tell about position: borders, the phase of JPEG's blocks, chromatic aberration, or where skies are.

It informs and never decides: a probe cannot tell a camera's trace from what the picture shows, and the latter is what
one wants to be learned. Letters: B images, N patches.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.batches.sampling import HELD_OUT_EPOCH, Samples
from common.data import Images, open_data
from common.data.location import changed
from common.errors import Refusal
from pretrain.config import PretrainConfig
from pretrain.task import Pretraining

IMAGES = 512  # half to train on, half to judge on
SIDE = 16  # pixels of a patch's side that are looked at
STEPS = 300
DEVIATIONS = 3.29  # standard errors of a 99.9 % interval


def open_images(config: PretrainConfig, data: str | None) -> Images:
    """The images to look at: those of `data`, or of the recipe. Raises Refusal if they are too few."""
    images = open_data(changed(vars(config), {"data": data}))
    if len(images) < 4:
        raise Refusal(f"--input needs at least 4 images, found {len(images)} in {data or config.data}")
    return images


def measure(config: PretrainConfig, task: Pretraining, images: Images) -> dict[str, Any]:
    """How well linear probes find places of patches of real images, cropped as the recipe says, from what they get to
    see: {"chance": ..., "images": ..., "pixels": [accuracy, half-width of its 99.9 % interval], ...}."""
    count = min(IMAGES, len(images)) // 2
    view = next(objective.passes["tokens"].view for objective in task.positional.values())
    samples = Samples(images, {view: config.views[view]}, config.seed, task.backbone.channels)
    chosen = torch.linspace(0, len(images) - 1, 2 * count).long()[torch.randperm(2 * count)].tolist()
    crops = samples.__getitems__([(HELD_OUT_EPOCH, index) for index in chosen]).views[view]
    pixels = crops[: 2 * count].float() / 255  # the first crop of each image
    grid = task.backbone.grid
    found: dict[str, Any] = {"chance": 1 / math.prod(grid), "images": count}
    for name, cue in cues(pixels).items():
        found[name] = probe(patches(cue, grid))
    return found


def cues(pixels: Tensor) -> dict[str, Tensor]:
    """What probes get to see of images (B, C, H, W), each of that size."""
    smooth = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="reflect"), 3, 1)
    shown = {"pixels": pixels, "high-pass residue": (pixels - smooth).abs()}
    if pixels.shape[1] == 3:
        shown["colour differences"] = pixels[:, :2] - pixels[:, 1:]
    return shown


def patches(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Every patch as a row, (B, N, E), of at most 16x16 pixels."""
    h, w = grid
    size = h * min(SIDE, images.shape[2] // h), w * min(SIDE, images.shape[3] // w)
    cells = F.adaptive_avg_pool2d(images, size).unflatten(3, (w, -1)).unflatten(2, (h, -1))  # (B, C, h, y, w, x)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def probe(rows: Tensor) -> list[float]:
    """[accuracy, half-width of its interval] on the second half of the images, of a linear probe trained on the
    first."""
    B, N, E = rows.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seen, fresh = rows[: B // 2], rows[B // 2 :]
        mean, deviation = seen.mean((0, 1)), seen.std((0, 1)).clamp(min=1e-6)
        seen, fresh = (seen - mean) / deviation, (fresh - mean) / deviation
        head = torch.nn.Linear(E, N)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(STEPS):
            chosen = torch.randint(len(seen), (16,))
            loss = F.cross_entropy(head(seen[chosen]).flatten(0, 1), torch.arange(N).repeat(16))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = (head(fresh).argmax(-1) == torch.arange(N)).double().mean(1)
    return [float(right.mean()), DEVIATIONS * float(right.std()) / math.sqrt(len(right))]


def told(found: dict[str, Any]) -> str:
    """The figures in words."""
    lines = [
        f"input: a linear probe on {name} of real patches finds {found[name][0]:.2%} of the places "
        f"(+-{found[name][1]:.2%}), chance is {found['chance']:.2%}"
        for name in found
        if name not in ("chance", "images")
    ]
    return "\n".join([*lines, "input: this informs about the images and never decides"])
