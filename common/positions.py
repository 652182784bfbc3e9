"""Positional labels: where a patch is, and where it is as seen from another.

Letters: B images, N = h*w patches in row-major order, K <= N of them kept, Q pairs. Every label is built from the grid
that a backbone really ends with, never from a constant. Source: Positional Label (arXiv 2206.04981), Fig. 1 and 2.
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


def offset_codes(grid: tuple[int, int]) -> Tensor:
    """One number per patch, (N,), of which the class of `relative` is a difference: code[query] - code[key] plus the
    class of offset 0, which is half of all classes. So no (N, N) table is needed to label a pair."""
    rows, columns = coordinates(grid).unbind(-1)
    return rows * (2 * grid[1] - 1) + columns


def pair_ends(pairs: Tensor, count: int, diagonal: bool = True) -> tuple[Tensor, Tensor]:
    """Ends (query, key) of numbered ordered pairs of `count` patches. With `diagonal` pair number query*count + key;
    without it, pairs of a patch with itself have no number, and query*(count-1) is the first of a query's."""
    if diagonal:
        return pairs // count, pairs % count
    queries, keys = pairs // (count - 1), pairs % (count - 1)
    return queries, keys + (keys >= queries)


def num_pairs(count: int, diagonal: bool = True) -> int:
    """Ordered pairs of `count` patches, those of a patch with itself among them or not."""
    return count**2 if diagonal else count * (count - 1)


def default_pairs(count: int, diagonal: bool = True) -> int:
    """Pairs asked per image unless a recipe says otherwise: four for each patch that is there, or all if they are
    fewer."""
    return min(num_pairs(count, diagonal), 4 * count)


def sample_pairs(rng: Any, count: int, some: int, diagonal: bool = True) -> Any:
    """Draw `some` distinct ordered pairs of `count` patches by number (see `pair_ends`), int64 (Q,).

    Uniform without replacement, so a mean over them is an unbiased estimate of the mean over all pairs. `rng`: a numpy
    Generator.
    """
    return rng.choice(num_pairs(count, diagonal), size=some, replace=False, shuffle=False)


def offset_prior(grid: tuple[int, int], same: float | None = None) -> Tensor:
    """Probability of each class of `relative` for a random ordered pair of patches, ((2h-1)(2w-1),), float64.

    (h-|dr|)(w-|dc|)/(hw)^2: not uniform, so a model that looks at nothing already scores better than ln C. `same`:
    probability that the pair is a patch with itself, 1/N unless given: 0 where such pairs are left out, and 1/K where K
    patches were kept at random; the other classes share the rest as they do without it.
    """
    h, w = grid
    down, right = offsets(grid).abs().unbind(-1)
    counts = ((h - down) * (w - right)).double()
    if same is None:
        return counts / (h * w) ** 2
    middle = len(counts) // 2  # offset 0
    counts[middle] = 0
    prior = counts * ((1 - same) / counts.sum())
    prior[middle] = same
    return prior


def prior_entropy(grid: tuple[int, int], same: float | None = None) -> float:
    """Cross-entropy in nats of the best answer to `relative` that ignores the images: 4.858 for 7x7, 6.269 for
    14x14. `same` as in `offset_prior`."""
    return float(torch.special.entr(offset_prior(grid, same)).sum())


def axis_entropy(grid: tuple[int, int], same: float | None = None) -> float:
    """Cross-entropy of `prior_entropy` if row and column of the offset are answered apart: the sum of the two."""
    h, w = grid
    prior = offset_prior(grid, same).view(2 * h - 1, 2 * w - 1)
    return float(torch.special.entr(prior.sum(0)).sum() + torch.special.entr(prior.sum(1)).sum())


def constant_loss(grid: tuple[int, int], same: float | None = None) -> float:
    """Smooth L1 (beta 1, mean over row and column) of the best constant answer to the offset in patches.

    That constant is offset 0: the prior is symmetric about it and the loss convex.
    """
    away = offsets(grid).abs().double()
    losses = torch.where(away < 1, 0.5 * away.square(), away - 0.5).mean(-1)
    return float(offset_prior(grid, same) @ losses)


def folded(grid: tuple[int, int], labels: Tensor) -> Tensor:
    """Class of the unsigned offset of every class of `relative`: that of the same distances down and to the right."""
    most = torch.tensor([grid[0] - 1, grid[1] - 1], device=labels.device)
    columns = 2 * grid[1] - 1
    down, right = ((torch.stack([labels // columns, labels % columns], -1) - most).abs() + most).unbind(-1)
    return down * columns + right


def distance_prior(grid: tuple[int, int], same: float | None = None) -> Tensor:
    """Probability of each class of `relative` where offsets have no sign, ((2h-1)(2w-1),): those of one distance are
    added to the one below and to the right. `same` as in `offset_prior`."""
    prior = offset_prior(grid, same)
    return torch.zeros_like(prior).index_add(0, folded(grid, torch.arange(len(prior))), prior)


def constant_distance_loss(grid: tuple[int, int], same: float | None = None) -> float:
    """Mean over row and column of the absolute error of the best constant answer to the unsigned offset in sides of
    the grid: the median's, which is one of the offsets."""
    prior = distance_prior(grid, same).view(2 * grid[0] - 1, 2 * grid[1] - 1)
    losses = []
    for side, shares in zip(grid, (prior.sum(1), prior.sum(0)), strict=True):
        away = torch.arange(side).double() / side
        losses.append(((away[:, None] - away).abs() @ shares[side - 1 :]).min())
    return float(sum(losses)) / 2


def smoothing(grid: tuple[int, int], sigma: float) -> Tensor:
    """Smoothed labels of `absolute`, (N, N): row i is exp(-d(i, j)^2 / sigma^2) over places j, divided by its sum
    (DropPos, arXiv 2309.03576, whose released code divides by the column's). `sigma` in patches; 0: the identity."""
    if sigma == 0:
        return torch.eye(math.prod(grid))
    places = coordinates(grid).double() / sigma
    return (places[:, None] - places[None]).square().sum(-1).neg().softmax(-1).float()


def chance(grid: tuple[int, int]) -> float:
    """Accuracy of a blind guess at `absolute`: 1/N. (At `relative`: the largest of `offset_prior`.)"""
    return 1 / math.prod(grid)
