"""What a bootstrap is of: the metric of all images, and the difference of two, paired."""

import numpy as np

from evaluate.job.bootstrap import distribution, mean, miou, quantiles


def estimate(outcomes):
    """The metric of all images, averaged over seeds: of (S, K) right or wrong, (S, K, C, 3) counts, or without S."""
    outcomes = np.asarray(outcomes)
    by_seed = outcomes[None] if outcomes.ndim % 2 else outcomes
    metric = mean if outcomes.ndim <= 2 else miou
    return float(metric(by_seed.sum(1, dtype=np.float64), by_seed.shape[1]).mean())


def difference(a, b, draws=1000):
    """(a minus b, low, high): both are of the same images in the same order."""
    of_a, of_b = distribution([a, b], draws)
    return estimate(a) - estimate(b), *quantiles(of_a - of_b)
