"""How good a segmentation is: counts of pixels for each image and class, and what follows from their sums.

Letters: K images, C classes. A count is (C, 3): pixels that are of a class and were called so, pixels that were called
so, pixels that are of it; all of them among the labelled ones.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluate.job import bootstrap
from evaluate.segmenting.data import IGNORED

INTERSECTION, PREDICTED, LABELLED = range(3)


def counts(prediction: Tensor, mask: Tensor, num_classes: int) -> Tensor:
    """Count pixels of one image, int64 (C, 3), from predicted and true classes (H, W), IGNORED where there is none."""
    known = mask != IGNORED
    predicted, labelled = prediction[known].long(), mask[known].long()
    columns = (predicted[predicted == labelled], predicted, labelled)
    return torch.stack([torch.bincount(column, minlength=num_classes) for column in columns], 1)


def constant(pixels: np.ndarray, chosen: int) -> np.ndarray:
    """Counts, int64 (K, C, 3), of answering `chosen` everywhere, for images with `pixels` (K, C) of each class."""
    counts = np.zeros((*pixels.shape, 3), np.int64)
    counts[:, chosen, INTERSECTION] = pixels[:, chosen]
    counts[:, chosen, PREDICTED] = pixels.sum(1)
    counts[..., LABELLED] = pixels
    return counts


def per_class(total: np.ndarray) -> np.ndarray:
    """IoU of each class, (..., C), of summed counts (..., C, 3); NaN for one that neither is there nor was called."""
    total = np.asarray(total, np.float64)
    union = total[..., PREDICTED] + total[..., LABELLED] - total[..., INTERSECTION]
    return np.divide(total[..., INTERSECTION], union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_iou(total: np.ndarray) -> float:
    """Mean over the classes that are there or were called, of summed counts (C, 3); 0 if there is none."""
    iou = per_class(total)
    return float(np.nanmean(iou)) if np.isfinite(iou).any() else 0.0


def pixel_accuracy(total: np.ndarray) -> float:
    """Share of the labelled pixels that were called what they are, of summed counts (C, 3)."""
    pixels = int(np.asarray(total)[..., LABELLED].sum())
    return float(np.asarray(total)[..., INTERSECTION].sum() / pixels) if pixels else 0.0


def summary(several: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    """Entry of a report for the counts (S, K, C, 3) of S seeds; "accuracy", as every report calls its number, is the
    mIoU. Classes that neither are there nor were called have no IoU (None)."""
    totals = several.sum(1)
    shares = [mean_iou(total) for total in totals]
    iou = np.ma.masked_invalid(per_class(totals)).mean(0).filled(np.nan).tolist()
    return {
        "accuracy": float(np.mean(shares)),
        "by_seed": shares,
        "std": float(np.std(shares, ddof=1)) if len(shares) > 1 else None,
        "interval": list(bootstrap.interval(several)),
        "pixel_accuracy": float(np.mean([pixel_accuracy(total) for total in totals])),
        "per_class": {name: None if np.isnan(value) else value for name, value in zip(classes, iou, strict=True)},
    }
