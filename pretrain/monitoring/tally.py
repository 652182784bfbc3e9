"""Answers about positions, counted while batches go by: which places are hard, which are guessed, how far off.

Letters: B images, Q questions an image, h*w the grid, C classes, L distances in whole patches.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from common import positions


@dataclass
class Tally:
    """Answers to one positional question, counted by the class that would have been right.

    The C classes are the places of `grid`, row-major, or with `relative` the offsets between two of them, in the order
    of `positions.offsets`. Counts only, so that its size does not grow with the answers; on the CPU.
    """

    grid: tuple[int, int]
    relative: bool = False
    asked: Tensor = field(init=False)  # (C,) questions with this answer
    right: Tensor = field(init=False)  # (C,) of them answered so
    guessed: Tensor = field(init=False)  # (C,) times it was answered at all
    far: Tensor = field(init=False)  # (C,) summed distance of the answers, in patches
    spread: Tensor = field(init=False)  # (L,) right answers, and those 1, 2, ... patches off, rounded

    def __post_init__(self) -> None:
        C = math.prod(self.cells)
        self.asked, self.right, self.guessed = torch.zeros(3, C, dtype=torch.int64)
        self.far = torch.zeros(C, dtype=torch.float64)
        self.spread = torch.zeros(_num_distances(self.grid, self.relative), dtype=torch.int64)

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of the classes: (h, w), or (2h-1, 2w-1) offsets."""
        h, w = self.grid
        return (2 * h - 1, 2 * w - 1) if self.relative else (h, w)

    def add(self, guesses: Tensor, labels: Tensor, distances: Tensor, asked: Tensor | None = None) -> None:
        """Count one batch: classes guessed and right, and the distance between them in patches, all (B, Q).

        `asked` (B, Q) bool: the answers that count; None: all.
        """
        chosen = ... if asked is None else asked
        guesses, labels = guesses[chosen].flatten().cpu(), labels[chosen].flatten().cpu()
        distances, right = distances[chosen].flatten().cpu().double(), guesses == labels
        C, L = len(self.asked), len(self.spread)
        self.asked += torch.bincount(labels, minlength=C)
        self.right += torch.bincount(labels[right], minlength=C)
        self.guessed += torch.bincount(guesses, minlength=C)
        self.far += torch.bincount(labels, weights=distances, minlength=C)
        self.spread += torch.bincount(_whole(distances).clamp(max=L - 1).masked_fill(right, 0), minlength=L)

    @property
    def distance(self) -> float:
        """Mean distance between answer and truth in patches; nan before the first."""
        return float(self.far.sum() / self.asked.sum())


def blind_places(grid: tuple[int, int], chance: float | None = None) -> Tensor:
    """Share of answers at each whole distance when places are guessed evenly, (L,), float64, sums to 1.

    chance: the share that is right, 1/N unless given: more where some patches were told their place, so that theirs are
    not guessed. The others fall on the wrong places as they do without it: which were told is random.
    """
    distances = positions.distances(grid).flatten()
    shares = torch.bincount(_whole(distances), minlength=_num_distances(grid)).double()
    shares[0] = 0
    chance = positions.chance(grid) if chance is None else chance
    shares *= (1 - chance) / shares.sum()
    shares[0] = chance
    return shares


def blind_offsets(grid: tuple[int, int], prior: Tensor) -> Tensor:
    """Share of answers at each whole distance when the answer is always the likeliest offset, (L,), float64, sums to 1.

    That is 0 where pairs of a patch with itself are asked, else one step. `prior`: probability of each offset, (C,), as
    in `positions.offset_prior`.
    """
    offsets = positions.offsets(grid).double()
    distances = (offsets - offsets[prior.argmax()]).norm(dim=-1)
    return torch.bincount(_whole(distances), weights=prior, minlength=_num_distances(grid, relative=True))


def _whole(distances: Tensor) -> Tensor:
    """Distances rounded to whole patches, int64; between two places it is 0 only for the same."""
    return (distances + 0.5).long()


def _num_distances(grid: tuple[int, int], relative: bool = False) -> int:
    """Number L of whole distances from 0 to the largest between two places of the grid, or between two offsets."""
    h, w = grid
    return int(math.hypot(h - 1, w - 1) * (2 if relative else 1) + 0.5) + 1
