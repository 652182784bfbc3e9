"""Block masks: how many patches, of which shape, how often, and from which randomness."""

import math

import numpy as np
import pytest

from common.batches.sampler import generator
from pretrain.distillation.masks import ASPECT, SMALLEST, blocks, draw_masks

GRIDS = [(14, 14), (7, 7), (3, 3), (2, 5), (1, 6), (5, 1), (1, 1)]


def rng(index: int = 0) -> np.random.Generator:
    return generator(0, 0, index, "ibot")


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_exactly_so_many_are_masked(grid: tuple[int, int]) -> None:
    N = grid[0] * grid[1]
    for num_masked in range(N + 1):
        for index in range(5):
            mask = blocks(rng(index), grid, num_masked)
            assert mask.shape == (N,) and mask.dtype == bool
            assert mask.sum() == num_masked
    for wrong in (-1, N + 1):
        with pytest.raises(ValueError, match="patches to mask"):
            blocks(rng(), grid, wrong)


def test_rectangles() -> None:
    """A first rectangle that happens to cover all that is wanted is seen whole: its sides are those of some area up to
    `num_masked` and some ratio in `ASPECT`."""
    seen = set()
    for index in range(3000):
        mask = blocks(rng(index), (14, 14), 24).reshape(14, 14)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
        if height * width == 24:
            seen.add((int(height), int(width)))
    reachable = {
        (round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio)))
        for area in np.linspace(SMALLEST, 24, 400)
        for ratio in np.exp(np.linspace(math.log(ASPECT[0]), math.log(ASPECT[1]), 400))
    }
    # 2x12 would be narrower than 0.3; 3x8 and 8x3 are just reached by areas up to 24
    assert {(4, 6), (6, 4), (3, 8), (8, 3)} == seen <= reachable


def test_blocks_hang_together() -> None:
    """Of the right-hand neighbours of masked patches far more are masked than among single random ones."""
    together, chance = [], []
    for index in range(300):
        for found, mask in ((together, blocks(rng(index), (14, 14), 60)), (chance, rng(index).permutation(196) < 60)):
            mask = mask.reshape(14, 14)
            found.append((mask[:, :-1] & mask[:, 1:]).sum() / mask[:, :-1].sum())
    assert np.mean(chance) == pytest.approx(59 / 195, abs=0.02)
    assert np.mean(together) > 0.7


def test_no_side_is_preferred() -> None:
    """How often a patch is masked is symmetric under flips and the transpose, within four standard deviations."""
    count = 6000
    often = sum(blocks(rng(index), (6, 6), 12).reshape(6, 6).astype(float) for index in range(count)) / count
    deviation = 4 * math.sqrt(2 * 0.25 / count)
    for other in (often[::-1], often[:, ::-1], often.T):
        assert abs(often - other).max() < deviation
    assert often.mean() == pytest.approx(1 / 3)


def test_how_often_and_how_much() -> None:
    drawn = np.stack([draw_masks(rng(index), (14, 14), 2)["masked"] for index in range(1500)])
    assert drawn.shape == (1500, 2, 196)
    counts = drawn.sum(2)
    some = counts > 0
    for crop in (0, 1):
        assert some[:, crop].mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(1500))
    assert (some[:, 0] & some[:, 1]).mean() == pytest.approx(0.25, abs=0.05)  # crops of one image by themselves
    shares = counts[some] / 196
    assert shares.min() >= int(0.1 * 196) / 196 and shares.max() < 0.5
    found, _ = np.histogram(shares, bins=4, range=(0.1 - 1 / 196, 0.5))
    assert abs(found / some.sum() - 0.25).max() < 4 * math.sqrt(0.25 * 0.75 / some.sum())  # uniform


def test_small_grids_and_other_wishes() -> None:
    always = draw_masks(rng(), (3, 3), 50, probability=1.0, ratio=(0.05, 0.1))["masked"]
    assert (always.sum(1) == 1).all()  # a masked crop has at least one
    whole = draw_masks(rng(), (2, 5), 3, probability=1.0, ratio=(1.0, 1.0))["masked"]
    assert whole.all()


def test_a_mask_is_a_function_of_seed_epoch_and_index() -> None:
    def drawn(seed: int, epoch: int, index: int) -> bytes:
        return draw_masks(generator(seed, epoch, index, "ibot"), (7, 7), 2, probability=1.0)["masked"].tobytes()

    first = drawn(3, 4, 5)
    assert first == drawn(3, 4, 5)
    assert len({first, drawn(2, 4, 5), drawn(3, 5, 5), drawn(3, 4, 6)}) == 4
