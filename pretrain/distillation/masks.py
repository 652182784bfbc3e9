"""Block masks: which patches of a crop the student does not see (BEiT, arXiv 2106.08254; iBOT, arXiv 2111.07832).

Everything is drawn from the sample's own generator: a mask is a pure function of (seed, epoch, index). DINOv2 instead
masks exactly half of the crops of a batch, with ratios from equal bins; each crop by itself is drawn from the same
distribution here, and only how many of a batch are masked varies. Letters: h*w = N patches, row-major.
"""

import math

import numpy as np

ASPECT = (0.3, 1 / 0.3)  # height:width of a block, as in BEiT and DINOv2
SMALLEST = 4  # patches of a block, where so many are left to mask
TRIES = 10  # to place a block


def blocks(rng: np.random.Generator, grid: tuple[int, int], num_masked: int) -> np.ndarray:
    """Draw a mask of exactly `num_masked` patches of an (h, w) grid, bool (N,), made of rectangles that may overlap.

    Each rectangle has an area that is uniform from SMALLEST to what is left to mask, a log-uniform height:width within
    ASPECT, and any place; none is as high or as wide as a grid of several rows or columns. Once none was found to fit
    in TRIES, single patches complete the number, as in DINOv3: BEiT stops short of it. Raises ValueError if
    the grid has fewer patches.
    """
    h, w = grid
    if not 0 <= num_masked <= h * w:
        raise ValueError(f"{num_masked} patches to mask on a grid of {h}x{w}")
    mask = np.zeros((h, w), bool)
    left = num_masked
    while left > 0:
        covered = _rectangle(rng, mask, left)
        if covered == 0:
            break
        left -= covered
    flat = mask.reshape(-1)
    if left > 0:
        flat[rng.permutation(np.flatnonzero(~flat))[:left]] = True
    return flat


def _rectangle(rng: np.random.Generator, mask: np.ndarray, most: int) -> int:
    """Add a rectangle of at most `most` new patches to `mask`; returns how many are new, 0 if none was found."""
    h, w = mask.shape
    smallest, (low, high) = min(SMALLEST, most), map(math.log, ASPECT)
    for _ in range(TRIES):
        of_area, of_aspect, of_top, of_left = rng.random(4).tolist()
        area = smallest + (most - smallest) * of_area
        ratio = math.exp(low + (high - low) * of_aspect)
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (0 < height <= max(1, h - 1) and 0 < width <= max(1, w - 1)):
            continue
        top, left = int(of_top * (h - height + 1)), int(of_left * (w - width + 1))
        block = mask[top : top + height, left : left + width]
        new = block.size - int(np.count_nonzero(block))
        if 0 < new <= most:
            block[:] = True
            return new
    return 0


def draw_masks(
    rng: np.random.Generator,
    grid: tuple[int, int],
    crops: int,
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> dict[str, np.ndarray]:
    """Draw one sample's masks: {"masked": bool (crops, N)}. Each crop is masked with `probability`, and then a share of
    its patches that is uniform within `ratio`, rounded down but 1 at least."""
    num_patches = grid[0] * grid[1]
    masked = np.zeros((crops, num_patches), bool)
    for crop in masked:
        if rng.random() < probability:
            share = ratio[0] + (ratio[1] - ratio[0]) * rng.random()
            crop[:] = blocks(rng, grid, max(1, int(num_patches * share)))
    return {"masked": masked}
