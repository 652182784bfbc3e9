"""What reading dense labels costs a loader, one core: `python benchmarks/labels.py`.

Batches of 64 crops at 224 from JPEGs of about 500x375, as a training's loader makes them: without labels, with those of
one packed file, and with the same in one .pt file an image, 5 classes in 18x18 cells. The methods take turns in every
round; times are CPU time of the process, the table has medians over the rounds and the range of the ratio. All files
are in the system's cache.
"""

import argparse
import statistics
import sys
import tempfile
from contextlib import closing
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from benchmarks.loader import write_photographs
from benchmarks.loading.measuring import Method, measure, speeds
from common.batches.samples import Samples
from common.batches.unreadable import Limit
from common.batches.views import View
from common.data import Images, open_data
from pretrain.token_labels import packed
from pretrain.token_labels.reader import digest, names_of, open_labels

CLASSES, TOP, CELLS = 1000, 5, 18
BATCH = 64
BOUND = 0.95
WITHOUT, PACKED, FILES = "without labels", "one packed file", "one .pt file an image"


def write_labels(images: Images, file: Path, folder: Path) -> None:
    """Random labels in both layouts."""
    ends, names, named = names_of(images)
    header = packed.Header(
        images=len(images), names_bytes=len(names), names_crc=packed.index_crc(ends, names), named=named, channels=3,
        classes=CLASSES, class_names=None, top=TOP, grid=[CELLS, CELLS], size=[576, 576], crop=None, annotator="random",
        weights_sha256="", precision="fp32", batch=1,
    )  # fmt: skip
    packed.begin(file, header, ends, names)
    rng = np.random.default_rng(0)
    with closing(packed.Writer(file, header)) as writer:
        for i in range(len(images)):
            scores = np.sort(rng.normal(5, 3, (TOP, CELLS, CELLS)), 0)[::-1].astype(np.float16)
            ids = rng.integers(0, CLASSES, scores.shape).astype(np.uint16)
            record = np.stack([scores.view(np.uint16), ids])[None]
            writer.write([i], record, np.array([digest(images.read(i))]), np.array([packed.LABELLED]))
            path = Path(images.name(i))
            place = folder / path.parent.name / f"{path.stem}.pt"
            place.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.from_numpy(np.stack([scores, ids.astype(np.float16)])), place)
        writer.commit()
    packed.finish(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    view = {"global": View(size=224, scale=[0.08, 1.0], flip=0.5, jitter=0.0, grayscale=0.0)}
    with tempfile.TemporaryDirectory() as place:
        folder, file, files = (Path(place) / name for name in ("photographs", "packed.labels", "files"))
        folder.mkdir()
        size = write_photographs(folder, options.images)
        images = open_data(str(folder))
        write_labels(images, file, files)
        print(f"{options.images} JPEGs of {size:.0f} kB, medians of {options.rounds} rounds, one thread")

        def crops(labels: Path | None) -> Method:
            beside = None if labels is None else {"labels": open_labels(labels, images, CLASSES, Limit(0))}
            samples = Samples(images, view, 0, 3, beside=beside)

            def run(numbers: range) -> None:
                for start in range(0, len(numbers), BATCH):
                    samples.__getitems__([(0, i) for i in numbers[start : start + BATCH]])

            return run

        methods = {WITHOUT: crops(None), PACKED: crops(file), FILES: crops(files)}
        seconds = measure(f"crops to 224, batches of {BATCH}", len(images), options.rounds, methods, BATCH)
    ratio = statistics.median(speeds(seconds, PACKED, WITHOUT))
    verdict = "holds" if ratio >= BOUND else "MISSED"
    print(f"\nbound: {BOUND} of the images/s without labels, packed: {ratio:.3f}  {verdict}")


if __name__ == "__main__":
    main()
