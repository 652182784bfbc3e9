"""Images per second of our loader beside torchvision's, on one thread: `python benchmarks/loader.py`.

Both do the same work, a RandomResizedCrop(224) with torchvision's default scale, bicubic and antialiased, and a flip,
on the same JPEG files. Theirs normalises each image; ours hands over uint8 batches, normalised on the device. What that
costs when the device is this same core is in the rows "+ normalise": above some ten megabytes it is mostly the price of
fresh memory, so it grows with the batch and with every temporary copy. Hence several batch sizes, for both sides.

The methods take turns in every round, so that a busy machine slows all of them; times are CPU time of the process, the
table has medians over the rounds and the range of the ratio.

The files are cut from scikit-learn's two sample photographs at random places, zooms and shapes around 500x375.

`--decoders [FOLDER]` times the JPEG decoders alone: those that `common.decoding.decode` knows, Pillow, and
simplejpeg and PyTurboJPEG where they are installed. FOLDER: JPEGs to time them on beside small ones.

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
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from benchmarks.loading.decoders import compare_decoders
from benchmarks.loading.measuring import Method, each, in_batches, measure
from common.batches.crops import augment
from common.batches.views import View
from common.data import Images, open_data
from common.decoding.decode import jpeg_decoder_name

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCHES = (16, 64, 256)
BOUND = 1.5  # ours against torchvision's standard pipeline
OURS, NORMALISED = "ours, uint8 batch", "ours + normalise"


def write_photographs(folder: Path, count: int) -> float:
    """`count` JPEGs of mixed shapes in two class folders; their mean size in kB."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640x427
    rng = np.random.default_rng(0)
    sizes = []
    for k in range(count):
        width, height = [(500, 375), (375, 500), (500, 333), (480, 360), (400, 400)][k % 5]
        share = rng.uniform(0.7, 1.0) * min(640 / width, 427 / height)
        left, top = rng.uniform(0, 640 - share * width), rng.uniform(0, 427 - share * height)
        box = (left, top, left + share * width, top + share * height)
        path = folder / "ab"[k % 2] / f"{k:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        photographs[k // 2 % 2].resize((width, height), Image.Resampling.BICUBIC, box).save(path, quality=93)
        sizes.append(path.stat().st_size)
    return statistics.mean(sizes) / 1000


def normalise(batch: Tensor) -> Tensor:
    """uint8 (B, C, h, w) -> float32, with one new array: a second temporary doubles the time at large batches."""
    mean, std = (torch.tensor(values[: batch.shape[1]])[:, None, None] for values in (MEAN, STD))
    return batch.float().mul_(1 / (255 * std)).add_(-mean / std)


def same(batch: Tensor) -> Tensor:
    return batch


def photograph_methods(folder: Path, batch: int) -> dict[str, Method]:
    ours = open_data(str(folder))
    view = View(size=224, scale=[0.08, 1.0], flip=0.5, jitter=0.0, grayscale=0.0)
    coloured = View(size=224, scale=[0.08, 1.0], flip=0.5)
    rng = np.random.default_rng(0)
    crop = v2.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC, antialias=True)
    rest = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    on_tensors = v2.Compose([v2.ToImage(), crop, v2.RandomHorizontalFlip(), *rest])
    on_pil = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.ToImage(), *rest])
    theirs = {
        name: torchvision.datasets.ImageFolder(str(folder), transform)
        for name, transform in (("tensors", on_tensors), ("pil", on_pil))
    }

    def fast(i: int) -> Tensor:
        return augment(ours.read(i, contiguous=False), view, rng)

    return {
        "ImageFolder + v2 on tensors (the standard)": in_batches(batch, lambda i: theirs["tensors"][i][0], same),
        "ImageFolder + v2, cropping in PIL": in_batches(batch, lambda i: theirs["pil"][i][0], same),
        OURS: in_batches(batch, fast, same),
        NORMALISED: in_batches(batch, fast, normalise),
        "ours + normalise, contiguous read": in_batches(batch, lambda i: augment(ours.read(i), view, rng), normalise),
        "ours + normalise, default colour": in_batches(
            batch, lambda i: augment(ours.read(i, contiguous=False), coloured, rng), normalise
        ),
    }


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
        "MNIST's PIL image + v2 on tensors": in_batches(256, lambda i: transform(Image.fromarray(pixels[i])), same),
        NORMALISED: in_batches(256, lambda i: augment(ours.read(i, 1), view, rng), normalise),
        "ours + normalise, default colour": in_batches(
            256, lambda i: augment(ours.read(i, 1), coloured, rng), normalise
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--decoders", nargs="?", const="", metavar="FOLDER", help="time the JPEG decoders instead")
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
        folder = Path(place)
        if options.decoders:
            compare_decoders(Path(options.decoders), count, rounds)
            return
        size = write_photographs(folder, count)
        print(f"{count} JPEGs of about 500x375 and {size:.0f} kB, medians of {rounds} rounds")
        if options.decoders is not None:
            compare_decoders(folder, count, rounds)
            return
        ratios = {
            batch: measure(f"crop to 224, batches of {batch}", count, rounds, photograph_methods(folder, batch))
            for batch in BATCHES
        }
        measure("decoding alone", count, rounds, decoding_methods(folder))
    measure("28x28 arrays: crop, flip, normalise", 2000, rounds, small_methods(2000))
    print(f"\nbound: {BOUND}x the standard pipeline")
    for name in (OURS, NORMALISED):
        for batch, ratio in ratios.items():
            verdict = "holds" if ratio[name] >= BOUND else "MISSED"
            print(f"  {name:<20} batches of {batch:<4} {ratio[name]:.2f}x  {verdict}")


if __name__ == "__main__":
    main()
