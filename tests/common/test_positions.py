"""Positional labels against hand-written grids and the paper's numbers."""

import itertools
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


@pytest.mark.parametrize("side", [3, 7, 14])
def test_published_matrices_in_full(side: int) -> None:
    """Swin's index, as the released code computes it: (rows apart + H-1) * (2W-1) + columns apart + W-1."""
    expected = [
        [
            (q // side - k // side + side - 1) * (2 * side - 1) + q % side - k % side + side - 1
            for k in range(side * side)
        ]
        for q in range(side * side)
    ]
    assert positions.relative((side, side)).tolist() == expected


@pytest.mark.parametrize("grid", [(2, 3), (7, 7), (1, 4), (5, 2)])
def test_codes_label_pairs_without_a_table(grid: tuple[int, int]) -> None:
    codes = positions.offset_codes(grid)
    middle = positions.num_offsets(grid) // 2
    assert torch.equal(codes[:, None] - codes[None] + middle, positions.relative(grid))


def test_distances_2x2() -> None:
    root = math.sqrt(2)
    expected = [[0, 1, 1, root], [1, 0, root, 1], [1, root, 0, 1], [root, 1, 1, 0]]
    torch.testing.assert_close(positions.distances((2, 2)), torch.tensor(expected))


@pytest.mark.parametrize(("grid", "kept"), [((2, 3), 6), ((2, 3), 3), ((3, 2), 2), ((1, 4), 3)])
@pytest.mark.parametrize("diagonal", [True, False])
def test_prior_of_kept_patches_counted_over_all_choices(grid: tuple[int, int], kept: int, diagonal: bool) -> None:
    table, classes = positions.relative(grid).tolist(), []
    for chosen in itertools.combinations(range(grid[0] * grid[1]), kept):
        classes += [table[q][k] for q in chosen for k in chosen if diagonal or q != k]
    counted = np.bincount(classes, minlength=positions.num_offsets(grid)) / len(classes)
    same = 1 / kept if diagonal else 0.0
    np.testing.assert_allclose(positions.offset_prior(grid, same).numpy(), counted, atol=1e-12)
    here = counted[counted > 0]
    assert positions.prior_entropy(grid, same) == pytest.approx(-(here * np.log(here)).sum())
    h, w = grid
    both = counted.reshape(2 * h - 1, 2 * w - 1)
    axes = [share for axis in (0, 1) for share in both.sum(axis).tolist() if share]
    assert positions.axis_entropy(grid, same) == pytest.approx(-sum(share * math.log(share) for share in axes))
    apart = [[abs(d) for d in offset] for offset in positions.offsets(grid).tolist()]
    smooth = [sum(d - 0.5 if d else 0 for d in offset) / 2 for offset in apart]  # d is whole
    assert positions.constant_loss(grid, same) == pytest.approx(float(counted @ np.array(smooth)))
    unsigned = np.zeros_like(counted)
    for (down, right), share in zip(apart, counted, strict=True):
        unsigned[(down + grid[0] - 1) * (2 * grid[1] - 1) + right + grid[1] - 1] += share
    np.testing.assert_allclose(positions.distance_prior(grid, same).numpy(), unsigned, atol=1e-12)
    blind = [  # of any constant in steps of a twelfth of a patch
        min(
            sum(share * abs(a[axis] - k / 12) for a, share in zip(apart, counted, strict=True))
            for k in range(12 * side)
        )
        for axis, side in enumerate(grid)
    ]
    expected = sum(loss / side for loss, side in zip(blind, grid, strict=True)) / 2
    assert positions.constant_distance_loss(grid, same) == pytest.approx(expected)


def test_pair_numbers_by_hand() -> None:
    queries, keys = positions.pair_ends(torch.arange(9), 3)
    assert (queries.tolist(), keys.tolist()) == ([0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3)
    queries, keys = positions.pair_ends(torch.arange(6), 3, diagonal=False)
    assert (queries.tolist(), keys.tolist()) == ([0, 0, 1, 1, 2, 2], [1, 2, 0, 2, 0, 1])
    assert (positions.num_pairs(3), positions.num_pairs(3, diagonal=False)) == (9, 6)
    assert [positions.default_pairs(count) for count in (2, 4, 5, 196)] == [4, 16, 20, 784]
    assert [positions.default_pairs(count, diagonal=False) for count in (2, 5, 6)] == [2, 20, 24]


@pytest.mark.parametrize("diagonal", [True, False])
def test_sampled_pairs_are_distinct_and_cover_all_alike(diagonal: bool) -> None:
    rng, every = np.random.default_rng(0), 36 if diagonal else 30
    counts = np.zeros(every)
    for _ in range(3000):
        pairs = positions.sample_pairs(rng, 6, 12, diagonal)
        assert len(set(pairs.tolist())) == 12
        counts[pairs] += 1
    assert np.abs(counts / 3000 - 12 / every).max() < 0.05  # 5.8 standard deviations
    assert sorted(positions.sample_pairs(rng, 6, every, diagonal).tolist()) == list(range(every))


def test_smoothing_2x2_by_hand() -> None:
    near, far = math.exp(-1 / 4), math.exp(-2 / 4)  # sigma 2: distances 1 and sqrt 2
    total = 1 + 2 * near + far
    row = [1 / total, near / total, near / total, far / total]
    expected = [row, [row[1], row[0], row[3], row[2]], [row[1], row[3], row[0], row[2]], row[::-1]]
    torch.testing.assert_close(positions.smoothing((2, 2), 2.0), torch.tensor(expected))


@pytest.mark.parametrize("grid", [(3, 3), (14, 14), (2, 5)])
@pytest.mark.parametrize("sigma", [1.0, 0.3, 5.0])
def test_smoothing_rows_sum_to_one(grid: tuple[int, int], sigma: float) -> None:
    smooth = positions.smoothing(grid, sigma)
    N = grid[0] * grid[1]
    assert smooth.dtype == torch.float32
    torch.testing.assert_close(smooth.sum(1), torch.ones(N))
    weights = torch.exp(-(positions.distances(grid).double() ** 2) / sigma**2)
    torch.testing.assert_close(smooth.double(), weights / weights.sum(1, keepdim=True), atol=1e-6, rtol=1e-5)
    if sigma == 1 and grid == (14, 14):  # the released code's divisor, the column's sum, misses this
        upstream = (weights / weights.sum(0)).sum(1)
        assert (float(upstream.min()), float(upstream.max())) == pytest.approx((0.886, 1.110), abs=6e-4)


@pytest.mark.parametrize("sigma", [0.0, 1e-3, 1e-300])
def test_smoothing_ends_as_the_identity(sigma: float) -> None:
    assert torch.equal(positions.smoothing((3, 2), sigma), torch.eye(6))
