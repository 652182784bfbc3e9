"""Bootstrap over test images: against exact distributions, cases by hand, and coverage."""

import itertools
import math
import time

import numpy as np
import pytest
from by_hand.intervals import difference, estimate

from evaluate.job import bootstrap
from evaluate.job.bootstrap import distribution, interval, miou


def test_accuracy_is_the_binomial_that_theory_says():
    """A resampled count of right answers is Binomial(K, share): its exact quantiles, within Monte-Carlo error."""
    K, right = 400, 280
    share = right / K
    low, high = interval(np.arange(K) < right, draws=4000)
    total, cumulative = 0.0, []
    for k in range(K + 1):
        log = math.lgamma(K + 1) - math.lgamma(k + 1) - math.lgamma(K - k + 1)
        total += math.exp(log + k * math.log(share) + (K - k) * math.log(1 - share))
        cumulative.append(total)
    exact = [next(k for k, below in enumerate(cumulative) if below >= level) / K for level in (0.025, 0.975)]
    # standard error of a quantile: sqrt(p (1 - p) / draws) / density, here about 0.0009; K makes steps of 0.0025
    assert abs(low - exact[0]) <= 0.005 and abs(high - exact[1]) <= 0.005


def test_three_images_by_hand():
    """Of 1, 0, 0 all 27 equally likely draws give 0, 1/3, 2/3 or 1: shares 8, 12, 6 and 1 of 27."""
    outcomes = np.array([True, False, False])
    shares = [sum(draw) / 3 for draw in itertools.product(outcomes, repeat=3)]
    found = distribution([outcomes], draws=20_000)[0]
    for value in (0, 1 / 3, 2 / 3, 1):
        assert np.isclose(found, value).mean() == pytest.approx(np.isclose(shares, value).mean(), abs=0.012)


def test_iou_by_hand():
    """Two images, two classes; one class is in neither of them: it does not count."""
    first = [[3, 4, 5], [0, 1, 0], [0, 0, 0]]  # IoU 3/6, 0/1
    second = [[1, 1, 1], [2, 2, 4], [0, 0, 0]]
    counts = np.array([first, second])
    assert estimate(counts) == pytest.approx((4 / 7 + 2 / 5) / 2)
    found = distribution([counts], draws=4000)[0]
    twice_first, twice_second = (3 / 6 + 0) / 2, (1 + 2 / 4) / 2
    for value, share in ((twice_first, 0.25), ((4 / 7 + 2 / 5) / 2, 0.5), (twice_second, 0.25)):
        assert np.isclose(found, value).mean() == pytest.approx(share, abs=0.03)
    assert interval(counts) == pytest.approx((twice_first, twice_second))
    assert np.isnan(miou(np.zeros((2, 3)), 1))


def test_pairing_takes_away_what_two_have_in_common():
    """b is a, but for 10 images more: theory says a standard error of sqrt(p (1 - p) / K) of the difference."""
    rng = np.random.default_rng(1)
    a = rng.random(1000) < 0.5
    b = a.copy()
    b[np.flatnonzero(~a)[:10]] = True
    found, low, high = difference(b, a, draws=4000)
    assert found == pytest.approx(0.01)
    assert (high - low) / (2 * 1.96) == pytest.approx(math.sqrt(0.01 * 0.99 / 1000), rel=0.1)
    assert low > 0 and interval(b)[0] < a.mean()  # paired it is clear, unpaired it is not
    assert difference(a, a)[1:] == (0.0, 0.0)


def test_seeds_are_averaged_and_images_resampled():
    rng = np.random.default_rng(2)
    outcomes = rng.random((3, 200)) < 0.7
    assert estimate(outcomes) == pytest.approx(outcomes.mean())
    assert interval(outcomes) == pytest.approx(interval(outcomes.mean(0)))  # a mean of means, image by image
    counts = rng.integers(1, 9, (2, 50, 4, 3))
    counts[..., 1:] += counts[..., :1]
    each = distribution([counts[0], counts[1]])
    assert np.allclose(distribution([counts])[0], each.mean(0))
    assert estimate(counts) == pytest.approx((estimate(counts[0]) + estimate(counts[1])) / 2)
    assert difference(outcomes, outcomes[0])[0] == pytest.approx(outcomes.mean() - outcomes[0].mean())


def test_draws_depend_on_the_seed_alone(monkeypatch):
    rng = np.random.default_rng(3)
    a, b = rng.random(300) < 0.3, rng.random(300) < 0.6
    alone = distribution([a], draws=50)
    assert (distribution([b, a], draws=50)[1] == alone[0]).all()
    monkeypatch.setattr(bootstrap, "AT_ONCE", 700)  # two draws at a time
    assert (distribution([a], draws=50) == alone).all()
    assert (distribution([a], draws=50, seed=1) != alone).any()


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(4)
    covered = [
        low <= 0.8 <= high for low, high in (interval(rng.random(150) < 0.8, draws=400, seed=i) for i in range(200))
    ]
    assert 0.89 <= np.mean(covered) <= 0.985  # 95 %, 200 times, and a little less for 150 images


def test_errors_are_the_rest_and_what_cannot_be():
    outcomes = np.array([True] * 30 + [False] * 10)
    low, high = interval(outcomes)
    assert interval(~outcomes) == pytest.approx((1 - high, 1 - low))
    with pytest.raises(ValueError, match="equally many"):
        difference(outcomes, outcomes[:-1])
    with pytest.raises(ValueError, match="at least one"):
        interval(outcomes[:0])
    with pytest.raises(ValueError, match="expected"):
        interval(np.ones((2, 3, 4)))


@pytest.mark.slow
def test_fifty_thousand_images_take_seconds():
    outcomes = np.random.default_rng(5).random((3, 50_000)) < 0.75
    before = time.perf_counter()
    low, high = interval(outcomes)
    assert time.perf_counter() - before < 60
    assert low < outcomes.mean() < high and high - low < 0.01
