"""What raw pixels tell about position: borders, the phase of JPEG's blocks, chromatic aberration, or where skies are.

It informs and never decides: a probe cannot tell a camera's trace from what the picture shows, and the latter is what
one wants to be learned. Letters: B images, N patches.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.batches.sampler import HELD_OUT_EPOCH
from common.batches.samples import Samples
from common.data import Images, open_data
from common.data.location import changed_location
from common.errors import Refusal
from pretrain.config import PretrainConfig
from pretrain.leaks.controls import cells
from pretrain.task import Pretraining

IMAGES = 512  # half to train on, half to judge on
SIDE = 16  # pixels of a patch's side that are looked at
STEPS = 300
DEVIATIONS = 3.29  # standard errors of a 99.9 % interval


def open_images(config: PretrainConfig, data: str | None) -> Images:
    """Open the images of `data`, or of the recipe. Raises Refusal if they are too few."""
    images = open_data(changed_location(vars(config), {"data": data}))
    if len(images) < 4:
        raise Refusal(f"--input needs at least 4 images, found {len(images)} in {data or config.data}")
    return images


def measure(config: PretrainConfig, task: Pretraining, images: Images) -> dict[str, Any]:
    """Train linear probes to find the places of patches of real images, cropped as the recipe says.

    Returns {"chance": ..., "images": ..., cue: [accuracy, half-width of its 99.9 % interval], ...}, and where patches
    have others beside them "borders": [accuracy, half-width, chance] of `neighbours`."""
    count = min(IMAGES, len(images)) // 2
    view = next(objective.passes["tokens"].view for objective in task.positional.values())
    colours = config.model.mean, config.model.std
    samples = Samples(images, {view: config.views[view]}, config.seed, task.backbone.channels, colours=colours)
    chosen = torch.linspace(0, len(images) - 1, 2 * count).long()[torch.randperm(2 * count)].tolist()
    crops = samples.__getitems__([(HELD_OUT_EPOCH, index) for index in chosen]).views[view]
    grid = task.backbone.grid
    patches = patches_of(crops[: 2 * count].float() / 255, grid)  # of the first crop of each image
    accuracies: dict[str, Any] = {"chance": 1 / math.prod(grid), "images": count}
    for name, cue in cues(patches).items():
        accuracies[name] = probe(rows(cue))
    if grid[1] > 1 and math.prod(grid) > 2:
        accuracies["borders"] = [*neighbours(patches, grid), 1 / (math.prod(grid) - 1)]
    return accuracies


def patches_of(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the patches of images (B, C, H, W): (B, N, C, y, x). Where the grid does not divide the images, they are
    averaged to a size that it divides."""
    h, w = grid
    whole = images.shape[2] // h * h, images.shape[3] // w * w
    return cells(F.adaptive_avg_pool2d(images, whole), grid)


def cues(patches: Tensor) -> dict[str, Tensor]:
    """Cues in patches (B, N, C, y, x), by name: the pixels, and two things made of them. None has anything of the
    patches beside it: whether there is a seam would tell which patches lie at the edge of the picture."""
    alone = patches.flatten(0, 1)
    smooth = F.avg_pool2d(F.pad(alone, (1, 1, 1, 1), mode="replicate"), 3, 1)
    by_name = {"pixels": patches, "high-pass residue": (alone - smooth).abs().view_as(patches)}
    if patches.shape[2] == 3:
        by_name["colour differences"] = patches[:, :, :2] - patches[:, :, 1:]
    return by_name


def rows(patches: Tensor) -> Tensor:
    """Every patch of (B, N, C, y, x) as a row, (B, N, E), of at most 16x16 pixels."""
    size = min(SIDE, patches.shape[3]), min(SIDE, patches.shape[4])
    return F.adaptive_avg_pool2d(patches.flatten(0, 1), size).unflatten(0, patches.shape[:2]).flatten(2)


def neighbours(patches: Tensor, grid: tuple[int, int]) -> list[float]:
    """Look for the right neighbour of each patch of (B, N, C, y, x): the one whose leftmost pixels are nearest to the
    patch's rightmost. Nothing is learned. Returns [share that is found, half-width of its interval]."""
    right, left = patches[..., -1].flatten(2), patches[..., 0].flatten(2)
    away = torch.cdist(right, left, compute_mode="donot_use_mm_for_euclid_dist")  # (B, N, N)
    nearest = away.diagonal_scatter(torch.full(away.shape[:2], math.inf), dim1=1, dim2=2).argmin(2)
    N = math.prod(grid)
    has_one = torch.arange(N) % grid[1] < grid[1] - 1
    return _with_interval((nearest == torch.arange(N) + 1)[:, has_one].double().mean(1))


def probe(rows: Tensor) -> list[float]:
    """Train a linear probe on the first half of the images, judge it on the second: [accuracy, half-width of its
    interval]."""
    B, N, E = rows.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        train, test = rows[: B // 2], rows[B // 2 :]
        mean, deviation = train.mean((0, 1)), train.std((0, 1)).clamp(min=1e-6)
        train, test = (train - mean) / deviation, (test - mean) / deviation
        head = torch.nn.Linear(E, N)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(STEPS):
            chosen = torch.randint(len(train), (16,))
            loss = F.cross_entropy(head(train[chosen]).flatten(0, 1), torch.arange(N).repeat(16))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            right = (head(test).argmax(-1) == torch.arange(N)).double().mean(1)
    return _with_interval(right)


def _with_interval(of_images: Tensor) -> list[float]:
    """Return the mean of a share of each image (B,), and the half-width of its interval."""
    return [float(of_images.mean()), DEVIATIONS * float(of_images.std()) / math.sqrt(len(of_images))]


def in_words(accuracies: dict[str, Any]) -> str:
    """Say the figures of `measure` in lines of text."""
    lines = [
        f"input: a linear probe on {name} of real patches finds {accuracies[name][0]:.2%} of the places "
        f"(+-{accuracies[name][1]:.2%}), chance is {accuracies['chance']:.2%}"
        for name in accuracies
        if name not in ("chance", "images", "borders")
    ]
    if "borders" in accuracies:
        found, error, chance = accuracies["borders"]
        lines.append(
            f"input: by the pixels along borders {found:.2%} of the patches find their right neighbour (+-{error:.2%}),"
            f" chance is {chance:.2%}"
        )
    return "\n".join([*lines, "input: this informs about the images and never decides"])
