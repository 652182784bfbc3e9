"""What a prediction is worth: accuracy, and how far chance alone could have moved it. What features are worth without
labels: how many dimensions they use."""

import math

import torch
from torch import Tensor

RANKED = 512  # rows that `rankme_of_some` looks at: singular values cost the cube of them


def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Share of equal entries in [0, 1]; predictions (Q,) and labels (Q,) are classes."""
    return (predictions == labels).double().mean().item()


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion `share` seen in `count` independent trials (Wilson 1927): honest near 0 and 1 too.

    It says how far another draw of test images could move the number; nothing about seeds or training.
    """
    center = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, center - half), min(1.0, center + half)


@torch.no_grad()
def rankme(features: Tensor) -> float:
    """Effective rank of features (M, D): RankMe (arXiv 2210.02885), from 1 (one direction) to min(M, D).

    exp of the entropy of the singular values, which are brought to sum 1 and not centred. 0 if all features are zero,
    NaN if one is not finite.
    """
    if not torch.isfinite(features).all():
        return math.nan
    values = torch.linalg.svdvals(features.double())
    if values[0] == 0:
        return 0.0
    return math.exp(torch.special.entr(values / values.sum() + 1e-7).sum().item())  # 1e-7: the paper's


def rankme_of_some(features: Tensor) -> float:
    """RankMe of about RANKED of the rows of features (M, D), evenly taken."""
    return rankme(features[:: math.ceil(len(features) / RANKED)])
