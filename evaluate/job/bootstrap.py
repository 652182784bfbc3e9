"""Intervals of a number, and of the difference of two, over other test images: the percentile bootstrap.

Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 13. K test images are drawn K times with
replacement, and the metric is computed of those drawn; the interval lies between quantiles of such draws. What is
compared is drawn together (paired by image), so that images which are hard for both cancel.

Outcomes are what is known of each test image. Of an accuracy: (K,) or, of S seeds, (S, K), True where the answer is
right. Of a segmentation: (K, C, 3) or (S, K, C, 3) pixels of each class in the intersection, the prediction and the
label. A metric turns sums over the images drawn into a number; it is computed of each seed, and averaged over seeds.

It covers neither seeds nor training: another seed may move a number further than other images do. Where all outcomes
are the same the interval has no width: there `metrics.wilson` knows more.
"""

from collections.abc import Sequence

import numpy as np

DRAWS, LEVEL = 1000, 0.95
AT_ONCE = 1 << 22  # counts in memory, 8 bytes each: 83 draws at a time of 50,000 images


def mean(sums: np.ndarray, images: int) -> np.ndarray:
    """Accuracy: sums (...) of right answers over so many `images`."""
    return sums / images


def miou(sums: np.ndarray, images: int) -> np.ndarray:
    """Mean intersection over union of sums (..., C, 3) = intersection, prediction and label area: (...).

    Classes that are neither predicted nor there are left out, in each draw anew, as the field's tools do; NaN if all
    are.
    """
    intersection = sums[..., 0]
    union = sums[..., 1] + sums[..., 2] - intersection
    occurs = union > 0
    shares = np.divide(intersection, union, out=np.zeros(union.shape), where=occurs)
    count = occurs.sum(-1)
    return np.divide(shares.sum(-1), count, out=np.full(count.shape, np.nan), where=count > 0)


def distribution(several: Sequence[np.ndarray], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """The metric of each of `several` outcomes of the same K images, in each of `draws` draws of images:
    (len(several), draws), float64.

    They see the same draws, so that differences between them are paired. The same seed gives the same draws, however
    many outcomes there are. Raises ValueError if the numbers of images differ, or are 0.
    """
    by_seed = [_by_seed(outcomes) for outcomes in several]
    counts = {outcomes.shape[1] for outcomes in by_seed}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"outcomes of {sorted(counts)} images: expected equally many, and at least one")
    images = counts.pop()
    columns = [np.moveaxis(outcomes, 1, 0).reshape(images, -1) for outcomes in by_seed]
    flat = np.concatenate(columns, 1).astype(np.float64)  # (K, all columns): whole numbers below 2^53 are exact
    rng = np.random.default_rng(seed)
    results = np.empty((len(by_seed), draws))
    at_a_time = max(1, AT_ONCE // images)
    for start in range(0, draws, at_a_time):
        part = range(start, min(start + at_a_time, draws))
        # how often each image is drawn: the counts of a multinomial, drawn one by one so that chunks change nothing
        times = np.stack([np.bincount(rng.integers(0, images, images), minlength=images) for _ in part])
        sums, at = times.astype(np.float64) @ flat, 0
        for number, outcomes in enumerate(by_seed):
            S, _, *rest = outcomes.shape
            width, metric = S * int(np.prod(rest)), miou if rest else mean
            of_seeds = sums[:, at : at + width].reshape(len(part), S, *rest)
            results[number, part.start : part.stop] = metric(of_seeds, images).mean(1)
            at += width
    return results


def interval(outcomes: np.ndarray, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Interval (low, high) of the metric of `outcomes`, for other test images of the same kind."""
    return quantiles(distribution([outcomes], draws, seed)[0])


def quantiles(values: np.ndarray) -> tuple[float, float]:
    """Quantiles (low, high) that enclose the middle share LEVEL of the draws; NaN where a draw is."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _by_seed(outcomes: np.ndarray) -> np.ndarray:
    """Add the axis of seeds: (S, K) or (S, K, C, 3)."""
    outcomes = np.asarray(outcomes)
    if outcomes.ndim not in (1, 2, 3, 4) or (outcomes.ndim > 2 and outcomes.shape[-1] != 3):
        raise ValueError(f"outcomes {outcomes.shape}: expected (K,), (S, K), (K, C, 3) or (S, K, C, 3)")
    return outcomes[None] if outcomes.ndim % 2 else outcomes
