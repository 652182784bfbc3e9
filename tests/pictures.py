"""Pictures for tests: a smooth one, and folders of noisy colours that any feature can tell apart."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


def write_images(folder, per_class, seed=0, names=COLOURS):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = np.clip(np.array(COLOURS.get(name, (0, 0, 0))) + rng.normal(0, 25, (8, 8, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{seed}-{i}.png")


def photo(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth uint8 (height, width, 3), so that JPEG hardly changes it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo() if pixels is None else pixels).save(path, **options)
    return path
