"""Positional labels: where a patch is, and where it is as seen from another.

Letters: B images, N = h*w patches in row-major order, P sampled pairs. Every label is built from the grid that a
backbone really ends with, never from a constant. Source: Positional Label (arXiv 2206.04981), Fig. 1 and 2.
"""

import math
from typing import Any

import torch
from torch import Tensor


def absolute(grid: tuple[int, int]) -> Tensor:
    """Class of every patch, (N,): its row-major index, in [0, h*w)."""
    h, w = grid
    return torch.arange(h * w)


def relative(grid: tuple[int, int]) -> Tensor:
    """Class of the offset query minus key for every ordered pair, (N, N), in [0, (2h-1)(2w-1))."""
    h, w = grid
    rows, columns = coordinates(grid).unbind(-1)
    down = rows[:, None] - rows[None, :] + h - 1
    right = columns[:, None] - columns[None, :] + w - 1
    return down * (2 * w - 1) + right


def coordinates(grid: tuple[int, int]) -> Tensor:
    """Row and column of every patch, (N, 2)."""
    h, w = grid
    return torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(h * w, 2)


def distances(grid: tuple[int, int]) -> Tensor:
    """Euclidean distance between patches in units of the patch, (N, N), float."""
    places = coordinates(grid).float()
    return torch.cdist(places, places)


def num_offsets(grid: tuple[int, int]) -> int:
    """Number of classes of `relative`: (2h-1)(2w-1)."""
    h, w = grid
    return (2 * h - 1) * (2 * w - 1)


def offsets(grid: tuple[int, int]) -> Tensor:
    """Row and column offset (query minus key) of every class of `relative`, ((2h-1)(2w-1), 2)."""
    h, w = grid
    return coordinates((2 * h - 1, 2 * w - 1)) - torch.tensor([h - 1, w - 1])


def offset_prior(grid: tuple[int, int]) -> Tensor:
    """Share of the N*N ordered pairs that falls in each class of `relative`, ((2h-1)(2w-1),).

    (h-|dr|)(w-|dc|)/(hw)^2: not uniform, so a model that looks at nothing already scores better than ln C.
    """
    h, w = grid
    down, right = offsets(grid).abs().unbind(-1)
    return ((h - down) * (w - right)).double() / (h * w) ** 2


def prior_entropy(grid: tuple[int, int]) -> float:
    """Cross-entropy in nats of the best answer to `relative` that ignores the images: 4.858 for 7x7, 6.269 for
    14x14."""
    prior = offset_prior(grid)
    return float(-(prior * prior.log()).sum())


def sample_pairs(rng: Any, num_patches: int, num_pairs: int) -> Any:
    """`num_pairs` distinct ordered pairs of patches as flat indices query*N + key, int64 (P,).

    Uniform without replacement from all N*N pairs (query = key included), so a mean over them is an unbiased
    estimate of the mean over all pairs. `rng`: a numpy Generator.
    """
    return rng.choice(num_patches**2, size=num_pairs, replace=False, shuffle=False)


def default_pairs(num_patches: int) -> int:
    """Pairs sampled per image unless a recipe says otherwise: min(N*N, 4N)."""
    return min(num_patches**2, 4 * num_patches)


def chance(grid: tuple[int, int]) -> float:
    """Accuracy of a blind guess: 1/N for `absolute`, and for `relative` too, whose likeliest class (offset 0) has
    N of N*N pairs."""
    return 1 / math.prod(grid)
