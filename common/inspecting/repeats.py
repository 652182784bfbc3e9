"""Pictures that repeat: pixel by pixel, or nearly, as they do when one is saved again, smaller or compressed more.

Near ones are looked for by differences between neighbours in a thumbnail ("dHash"), of which some run of 16 bits must
agree, and are then compared as thumbnails. Letters: n images, S side of a thumbnail.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np

SIDE = 32  # S
HASHED = 8  # rows and columns of differences: 64 bits, in 4 runs of 16
NEAR = 3.0  # mean difference of the pixels of two thumbnails, in levels of 255, up to which they are one picture
FLAT = 4.0  # standard deviation, in levels, below which a thumbnail shows too little to be compared
MOST = 200  # pictures that share a run of bits beyond which it is one that says nothing


def exact(digests: Sequence[bytes]) -> list[list[int]]:
    """Groups of two or more positions whose pixels are the same, each rising, in the order of their first."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for at, digest in enumerate(digests):
        groups[digest].append(at)
    return [group for group in groups.values() if len(group) > 1]


def near(thumbnails: np.ndarray, digests: Sequence[bytes]) -> list[tuple[int, int]]:
    """Pairs of positions whose thumbnails, uint8 (n, S, S), are nearly the same and whose pixels are not; rising.

    Of pictures with the same pixels the first stands for all.
    """
    firsts = np.array(sorted({digest: at for at, digest in reversed(list(enumerate(digests)))}.values()), int)
    if len(firsts) < 2:
        return []
    values = thumbnails[firsts].astype(np.float32)
    kept = values.std((1, 2)) >= FLAT
    firsts, values = firsts[kept], values[kept]
    pairs = {pair for pair in _candidates(_hashed(values)) if np.abs(values[pair[0]] - values[pair[1]]).mean() <= NEAR}
    return sorted((int(firsts[a]), int(firsts[b])) for a, b in pairs)


def _hashed(values: np.ndarray) -> np.ndarray:
    """Whether each of 8x8 fields is brighter than its right neighbour, as four numbers of 16 bits, (n, 4)."""
    n, S, _ = values.shape
    rows = values.reshape(n, HASHED, S // HASHED, S).mean(2)
    edges = np.linspace(0, S, HASHED + 2).round().astype(int)
    fields = np.stack([rows[:, :, a:b].mean(2) for a, b in pairwise(edges)], 2)
    bits = (fields[:, :, 1:] > fields[:, :, :-1]).reshape(n, 4, 16)
    return (bits * (1 << np.arange(16))).sum(2)


def _candidates(hashes: np.ndarray) -> Iterator[tuple[int, int]]:
    for run in range(hashes.shape[1]):
        shared: dict[int, list[int]] = defaultdict(list)
        for at, value in enumerate(hashes[:, run].tolist()):
            shared[value].append(at)
        for group in shared.values():
            if 1 < len(group) <= MOST:
                yield from combinations(group, 2)
