"""Images in which there is nothing to see, or nothing where it belongs: what a model says of them shows what it reads.

Letters: B images, N = h*w patches.
"""

import torch
from torch import Tensor


def noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform noise of the shape of uint8 images (B, C, H, W), in which nothing shows where a patch is."""
    return torch.randint(0, 256, like.shape, dtype=torch.uint8, generator=generator).to(like.device)


def limit(chance: float) -> float:
    """Accuracy on noise above which we say that position leaks: twice chance or, with 2 or 3 patches, half-way to 1."""
    return min(2 * chance, (1 + chance) / 2)


def orders(count: int, num_patches: int, generator: torch.Generator) -> Tensor:
    """A random order of the patches for each of `count` images, (B, N)."""
    return torch.rand(count, num_patches, generator=generator).argsort(1)


def cells(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches of images (B, C, H, W), cells of `grid` (h, w) in raster order: (B, N, C, H/h, W/w)."""
    h, w = grid
    return images.unflatten(3, (w, -1)).unflatten(2, (h, -1)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)


def rearrange(images: Tensor, order: Tensor, grid: tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) whose patches, cells of `grid`, were moved: at place n lies the one of place order[b, n]."""
    moved = cells(images, grid)[torch.arange(len(images), device=order.device)[:, None], order]
    return moved.unflatten(1, grid).permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
