"""Positional labels against hand-written grids and the paper's numbers."""

import math

import numpy as np
import pytest
import torch

from common import positions


def test_absolute_is_raster_order() -> None:
    assert positions.absolute((2, 3)).view(2, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert positions.absolute((14, 14)).view(14, 14)[3, 5] == 14 * 3 + 5


def test_relative_2x3_by_hand() -> None:
    # offset (dr, dc) in [-1, 1] x [-2, 2]; class = (dr + 1) * 5 + dc + 2
    labels = positions.relative((2, 3))
    assert labels[0].tolist() == [7, 6, 5, 2, 1, 0]  # query top-left: every key lies right or below
    assert labels[4].tolist() == [13, 12, 11, 8, 7, 6]  # query bottom-middle


def test_relative_3x3_centre_is_the_papers_figure() -> None:
    assert positions.relative((3, 3))[4].tolist() == [18, 17, 16, 13, 12, 11, 8, 7, 6]


@pytest.mark.parametrize(("grid", "classes"), [((7, 7), 169), ((14, 14), 729), ((2, 3), 15), ((1, 4), 7)])
def test_relative_properties(grid: tuple[int, int], classes: int) -> None:
    labels = positions.relative(grid)
    assert positions.num_offsets(grid) == classes == labels.unique().numel()
    assert (labels + labels.T == classes - 1).all()
    assert (labels.diagonal() == (classes - 1) // 2).all()
    # invertible to the offset it came from
    places = positions.coordinates(grid)
    assert (positions.offsets(grid)[labels] == places[:, None] - places[None]).all()


def test_relative_7x7_and_14x14_corners() -> None:
    seven, fourteen = positions.relative((7, 7)), positions.relative((14, 14))
    assert [seven[0, 48], seven[48, 0], seven[0, 1], seven[1, 0]] == [0, 168, 83, 85]
    assert [fourteen[0, 1], fourteen[1, 0]] == [363, 365]


@pytest.mark.parametrize(("grid", "entropy"), [((3, 3), 3.046), ((7, 7), 4.858), ((14, 14), 6.269)])
def test_prior(grid: tuple[int, int], entropy: float) -> None:
    counted = torch.bincount(positions.relative(grid).flatten(), minlength=positions.num_offsets(grid)).double()
    prior = positions.offset_prior(grid)
    torch.testing.assert_close(prior, counted / counted.sum())
    assert positions.prior_entropy(grid) == pytest.approx(entropy, abs=5e-4)
    assert prior.max() == pytest.approx(positions.chance(grid)) == pytest.approx(1 / math.prod(grid))


def test_distances_2x2() -> None:
    root = math.sqrt(2)
    expected = [[0, 1, 1, root], [1, 0, root, 1], [1, root, 0, 1], [root, 1, 1, 0]]
    torch.testing.assert_close(positions.distances((2, 2)), torch.tensor(expected))


def test_sampled_pairs_are_distinct_and_cover_all_alike() -> None:
    rng = np.random.default_rng(0)
    counts = np.zeros(36)
    for _ in range(3000):
        pairs = positions.sample_pairs(rng, 6, 12)
        assert len(set(pairs.tolist())) == 12
        counts[pairs] += 1
    assert np.abs(counts / 3000 - 12 / 36).max() < 0.05  # 5.8 standard deviations
    assert sorted(positions.sample_pairs(rng, 6, 36).tolist()) == list(range(36))
