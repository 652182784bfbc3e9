"""Images per second of our loader beside others', on one thread: `python benchmarks/loader.py [--photographs FOLDER]`.

All do the same work on the same JPEG files: one random crop, or the ten of DINO (`benchmarks/loading/peers.py`). Theirs
are normalised floats; ours are uint8 batches, normalised on the device, and in a row of its own normalised here.
FOLDER: one with a folder for each class; without it, files are cut from scikit-learn's two sample photographs at random
places, zooms and shapes around 500x375.

The methods take turns, so that a busy machine slows all of them; times are CPU time of the process, the tables have
medians over the rounds and the range of the ratio.

`--decoders [FOLDER]` times the JPEG decoders alone: those that `common.decoding.decode` knows, Pillow, and
PyTurboJPEG where it is installed. FOLDER: JPEGs to time them on beside small ones.

`--scaled` times `loader.decode=scaled` beside whole decoding, also on files of 3000x2000, and says what it changes.

`--cache` times `loader.cache` beside no cache, and says what it changes.

`--device` times the part of `augment=device` that is a loader's process beside all of it, and says what it changes.

`--sources SPEC [SPEC ...]` times places of the same images, as `data=` takes them: a folder, and archives of it.
"""

import argparse
import importlib.metadata
import statistics
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, features
from torchvision.transforms import InterpolationMode, v2

from benchmarks.loading.cached import compare_caches
from benchmarks.loading.decoders import compare_decoders
from benchmarks.loading.measuring import Method, each, in_batches, measure, speeds
from benchmarks.loading.on_device import compare_device
from benchmarks.loading.ours import normalise, ours
from benchmarks.loading.peers import MEAN, MULTI, ONE, STD, peers
from benchmarks.loading.reduced import compare_reduced
from common.batches.crops import augment
from common.batches.views import View
from common.data import Images, open_data
from common.decoding.decode import jpeg_decoder_name

BATCH = 32
TARGETS = {ONE: (1.5, 6.0), MULTI: (3.0, 5.0)}  # ours against the best of the others, without and with a cache
SHAPES = [(500, 375), (375, 500), (500, 333), (480, 360), (400, 400)]  # width, height
LARGE = [(3000, 2000), (2000, 3000)]
NOISE = 4.0  # grey levels, of a camera's sensor: pictures that are enlarged would decode faster than real ones


def write_photographs(folder: Path, count: int, shapes: list[tuple[int, int]] = SHAPES, noise: float = 0.0) -> float:
    """`count` JPEGs of these shapes in two class folders; their mean size in kB."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640x427
    rng = np.random.default_rng(0)
    sizes = []
    for k in range(count):
        width, height = shapes[k % len(shapes)]
        share = rng.uniform(0.7, 1.0) * min(640 / width, 427 / height)
        left, top = rng.uniform(0, 640 - share * width), rng.uniform(0, 427 - share * height)
        box = (left, top, left + share * width, top + share * height)
        image = photographs[k // 2 % 2].resize((width, height), Image.Resampling.BICUBIC, box)
        if noise:
            noisy = np.asarray(image) + rng.normal(0, noise, (height, width, 1))
            image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        path = folder / "ab"[k % 2] / f"{k:04d}.jpg"
        path.parent.mkdir(exist_ok=True, parents=True)
        image.save(path, quality=93)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes) / 1000


def compare_loaders(folder: Path, place: Path, count: int, rounds: int) -> None:
    """Print the tables of both kinds of work, and whether the targets are met. Caches are made in `place`."""
    images = open_data(str(folder))
    whole = min(count, len(images))
    count = whole // BATCH * BATCH or whole
    verdicts = []
    for work, targets in TARGETS.items():
        batch = min(BATCH, count)
        others = peers(folder, work, batch, place / "datasets")
        own = ours(images, work, batch, place / "decoded")
        seconds = measure(work, count, rounds, others | own, turn=batch)
        best = min(others, key=lambda name: statistics.median(seconds[name]))
        verdicts.append(f"\n{work:<46} to {best}")
        for name in own:
            ratio, target = statistics.median(speeds(seconds, name, best)), targets["cache" in name]
            verdict = "holds" if ratio >= target else "MISSED"
            verdicts.append(f"  {name:<44} {ratio:8.2f}x, target {target}x: {verdict}")
    print("\n".join(verdicts))


def decoding_methods(folder: Path) -> dict[str, Method]:
    ours, theirs = open_data(str(folder)), torchvision.datasets.ImageFolder(str(folder))
    return {
        "ImageFolder (PIL image)": each(lambda i: theirs[i]),
        "ImageFolder + v2.ToImage": each(lambda i: v2.functional.to_image(theirs[i][0])),
        "ours": each(lambda i: ours.read(i, contiguous=False)),
        "ours, contiguous read": each(lambda i: ours.read(i)),
    }


def compare_sources(specs: list[str], count: int, rounds: int) -> None:
    """Print how fast `count` images, in a random order, are read from each of the places, and cropped."""
    sources = {spec: open_data(spec) for spec in specs}
    first = sources[specs[0]]
    chosen = np.random.default_rng(0).permutation(len(first))[:count].tolist()
    for spec, images in sources.items():
        same_pixels = sum(images.read(i).equal(first.read(i)) for i in chosen[:100])
        print(f"{spec}: {len(images):,} images, {same_pixels} of {len(chosen[:100])} looked at equal to the first")
    side = 224 if min(first.read(chosen[0]).shape[1:]) >= 100 else 32
    view, rng = View(size=side, scale=[0.08, 1.0], flip=0.5, jitter=0.0, grayscale=0.0), np.random.default_rng(0)

    def reading(images: Images) -> Method:
        return each(lambda k: images.read(chosen[k], contiguous=False))

    def cropping(images: Images) -> Method:
        return each(lambda k: augment(images.read(chosen[k], contiguous=False), view, rng))

    for title, way in (("reading", reading), (f"reading, crop to {side}", cropping)):
        measure(title, len(chosen), rounds, {spec[-44:]: way(images) for spec, images in sources.items()})


def small_methods(count: int) -> dict[str, Method]:
    ours = open_data("builtin")
    pixels = np.stack([ours.read(i, channels=1)[0].numpy() for i in range(count)])
    view = View(size=28, scale=[0.08, 1.0], flip=0.5, jitter=0.0, grayscale=0.0)
    coloured = View(size=28, scale=[0.08, 1.0], flip=0.5)
    rng = np.random.default_rng(0)
    mean, std = MEAN[:1], STD[:1]
    transform = v2.Compose([
        v2.ToImage(), v2.RandomResizedCrop(28, interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std),
    ])  # fmt: skip
    return {
        "MNIST's PIL image + v2 on tensors": in_batches(256, lambda i: transform(Image.fromarray(pixels[i])), id),
        "ours + normalise": in_batches(256, lambda i: augment(ours.read(i, 1), view, rng), normalise),
        "ours + normalise, default colour": in_batches(
            256, lambda i: augment(ours.read(i, 1), coloured, rng), normalise
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photographs", metavar="FOLDER", help="JPEGs to use in place of generated ones")
    parser.add_argument("--decoders", nargs="?", const="", metavar="FOLDER", help="time the JPEG decoders instead")
    parser.add_argument("--scaled", action="store_true", help="time loader.decode=scaled instead")
    parser.add_argument("--cache", action="store_true", help="time loader.cache instead")
    parser.add_argument("--device", action="store_true", help="time augment=device instead")
    parser.add_argument("--sources", nargs="+", metavar="SPEC", help="time places of the same images instead")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        simd = importlib.metadata.version("pillow-simd")
    except importlib.metadata.PackageNotFoundError:
        simd = "no"
    print(f"torch {torch.__version__}, torchvision {torchvision.__version__}, PIL {PIL.__version__}, simd: {simd}")
    print(f"libjpeg-turbo in PIL: {features.check('libjpeg_turbo')}; ours decodes by {jpeg_decoder_name()}; one thread")
    count, rounds = options.images, options.rounds
    if options.sources:
        compare_sources(options.sources, count, rounds)
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "photographs"
        given = options.decoders or options.photographs
        if not given:
            size = write_photographs(folder, count)
            print(f"{count} JPEGs of about 500x375 and {size:.0f} kB, medians of {rounds} rounds")
        folder = Path(given).expanduser() if given else folder
        if options.decoders is not None:
            compare_decoders(folder, count, rounds)
        elif options.scaled:
            large = Path(place) / "large"
            size = write_photographs(large, max(8, count // 8), LARGE, NOISE)
            print(f"large: {max(8, count // 8)} JPEGs of 3000x2000 and {size:,.0f} kB")
            compare_reduced({"small": folder, "large": large}, count, rounds)
        elif options.cache:
            compare_caches(folder, Path(place) / "decoded", count, rounds)
        elif options.device:
            compare_device(folder, count, rounds)
        else:
            compare_loaders(folder, Path(place), count, rounds)
            measure("decoding alone", count, rounds, decoding_methods(folder), turn=8)
            measure("28x28 arrays: crop, flip, normalise", 2000, rounds, small_methods(2000))


if __name__ == "__main__":
    main()
