"""Loaders that others wrote, doing the same work on the same files: one random crop, or the ten of DINO.

One crop: RandomResizedCrop(224) with torchvision's defaults, bicubic and antialiased, and a flip. DINO: the multi-crop
of arXiv 2104.14294, two crops of 224 and eight of 96, with our preset's numbers. Each returns normalised float batches,
as it is used. timm has no multi-crop.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from benchmarks.loading.measuring import Method
from common.batches.views import PRESETS

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
ONE, MULTI = "one crop of 224", "DINO's crops, 2 of 224 and 8 of 96"
Transform = Callable[[Any], list[Tensor]]  # a PIL image -> its crops


class Blur(torch.nn.Module):
    """Blurs a PIL image by PIL's own filter, as DINO's code does."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, image: Image.Image) -> Image.Image:
        radius = torch.empty(1).uniform_(self.low, self.high).item()
        return image.filter(ImageFilter.GaussianBlur(radius))


def one_crop(on_tensors: bool) -> Transform:
    crop = v2.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC, antialias=True)
    made = composed([crop, v2.RandomHorizontalFlip()], on_tensors)
    return lambda image: [made(image)]


def composed(steps: list[torch.nn.Module], on_tensors: bool) -> v2.Compose:
    """The steps, on tensors or on PIL images, and what makes them normalised tensors."""
    to_image, rest = [v2.ToImage()], [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    return v2.Compose([*to_image, *steps, *rest] if on_tensors else [*steps, *to_image, *rest])


def multi_crop(on_tensors: bool) -> Transform:
    """DINO's crops, in the values of our preset."""
    crops: list[v2.Compose] = []
    for name in ("global", "local"):
        values = PRESETS["dino"][name]
        jitter = v2.ColorJitter(*(values[each] for each in ("brightness", "contrast", "saturation", "hue")))
        low, high = values["blur_sigma"]
        # Of torchvision's filters the size is fixed: 9 is DINOv2's.
        blur = v2.GaussianBlur(9, (low, high)) if on_tensors else Blur(low, high)
        for number in range(values["count"]):
            blurred, solarised = (
                each[number] if isinstance(each, list) else each for each in (values["blur"], values["solarise"])
            )
            steps = [
                v2.RandomResizedCrop(
                    values["size"], values["scale"], interpolation=InterpolationMode.BICUBIC, antialias=True
                ),
                v2.RandomHorizontalFlip(values["flip"]),
                v2.RandomApply([jitter], values["jitter"]),
                v2.RandomGrayscale(values["grayscale"]),
                v2.RandomApply([blur], blurred),
                *([v2.RandomSolarize(128, solarised)] if solarised else []),
            ]
            crops.append(composed(steps, on_tensors))
    if on_tensors:  # converted once, and not for each crop
        to_image = v2.ToImage()
        return lambda image: [crop(whole) for whole in [to_image(image)] for crop in crops]
    return lambda image: [crop(image) for crop in crops]


def stacked(images: list[list[Tensor]]) -> list[Tensor]:
    """Each crop of all images as a batch."""
    return [torch.stack(crops) for crops in zip(*images, strict=True)]


def by_image_folder(folder: Path, transform: Transform, batch: int) -> Method:
    images = torchvision.datasets.ImageFolder(str(folder), transform)

    def run(numbers: range) -> None:
        for start in range(0, len(numbers), batch):
            stacked([images[i][0] for i in numbers[start : start + batch]])

    return run


def by_timm(folder: Path, batch: int) -> Method:
    """timm's `create_loader`, whose own transforms are the same crop, for PIL images."""
    from timm.data import create_dataset, create_loader

    made: dict[range, Any] = {}

    def loader(numbers: range) -> Any:
        images = create_dataset("", root=str(folder))
        images.reader.samples = images.reader.samples[numbers.start : numbers.stop]
        return create_loader(
            images, (3, 224, 224), batch, is_training=True, num_workers=0, use_prefetcher=False,
            persistent_workers=False, color_jitter=0.0, interpolation="bicubic", mean=tuple(MEAN), std=tuple(STD),
            device=torch.device("cpu"),
        )  # fmt: skip

    def run(numbers: range) -> None:
        if numbers not in made:
            made[numbers] = loader(numbers)
        for _ in made[numbers]:
            pass

    return run


def by_datasets(folder: Path, transform: Transform, batch: int, cache: Path) -> Method:
    """Hugging Face's `datasets`: an image folder, with `set_transform`."""
    import datasets

    datasets.disable_progress_bars()
    everything = {"train": f"{folder}/**"}  # else a folder called "…train" is taken for the split
    rows = datasets.load_dataset("imagefolder", data_files=everything, split="train", cache_dir=str(cache))
    rows.set_transform(lambda chosen: {"crops": [transform(image.convert("RGB")) for image in chosen["image"]]})

    def run(numbers: range) -> None:
        for start in range(0, len(numbers), batch):
            part = numbers[start : start + batch]
            stacked(rows[np.asarray(part)]["crops"])

    return run


def peers(folder: Path, work: str, batch: int, cache: Path) -> dict[str, Method]:
    """By name, every loader that can do the `work`, on the images of `folder`."""
    transform = {ONE: one_crop, MULTI: multi_crop}[work]
    on_tensors, on_pil = transform(True), transform(False)
    methods = {
        "ImageFolder + v2 on PIL images": by_image_folder(folder, on_pil, batch),
        "ImageFolder + v2 on tensors": by_image_folder(folder, on_tensors, batch),
        "datasets + set_transform, v2 on PIL": by_datasets(folder, on_pil, batch, cache),
    }
    return methods | ({"timm's create_loader": by_timm(folder, batch)} if work == ONE else {})
