"""Make fashion_mnist_extract.xz, the built-in images: `python common/data/make_extract.py FOLDER`.

FOLDER holds Fashion-MNIST's four IDX files. The extract is lossless: the first 1,000 training and 200 test images of
each class, class after class, as one uint8 array (12000, 28, 28) in xz. Predicting each pixel from its neighbours first
(left, up, average, Paeth, median edge detector) made the file larger every time.
"""

import lzma
import sys
from pathlib import Path

import numpy as np

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from common.data import open_data
from common.data.arrays import EXTRACT, EXTRACT_SPLITS
from common.data.images import Images

LZMA2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "lp": 0, "pb": 0, "dict_size": 1 << 24}


def extract(images: Images, each: int) -> np.ndarray:
    """Return uint8 (10 * each, 28, 28): the first `each` images of every class, class after class."""
    assert images.labels is not None
    chosen = np.concatenate([np.flatnonzero(images.labels == label)[:each] for label in range(10)])
    return np.stack([images.read(int(i), channels=1)[0].numpy() for i in chosen])


if __name__ == "__main__":
    pieces = [extract(open_data(sys.argv[1], split), each) for split, each in EXTRACT_SPLITS.items()]
    EXTRACT.write_bytes(lzma.compress(np.concatenate(pieces).tobytes(), filters=[LZMA2]))
    print(f"{EXTRACT}: {EXTRACT.stat().st_size:,} bytes")
