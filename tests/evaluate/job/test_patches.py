"""The baseline of whitened patches: its features by hand, its draws, its size."""

import numpy as np
import torch

from common.data import Images
from common.data.images import Arrays
from common.features.extraction import Eye, extract_parts, whole
from evaluate.job.patches import CONTRAST, FILTERS, THRESHOLD, learned, patch_key, patches

EYE = Eye((9, 9), 1.0)


def noise(count, side=9, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, side, side, channels) if channels == 3 else (count, side, side)
    return Images(Arrays(rng.integers(0, 256, shape, dtype=np.uint8), "noise"), "noise")


def test_answers_are_those_of_every_patch_by_hand():
    """Contrast-normalised patch, less the mean patch, whitened, times a filter; soft threshold; means over quarters."""
    images = noise(30)
    filters = learned(images, EYE, seed=0)
    assert filters.weights.shape == (FILTERS, 3, 6, 6)
    pixels = images.read(4, 3)
    (found,) = filters.answers(pixels[None])
    weights, x = filters.weights.flatten(1).double(), pixels.double()
    every = torch.zeros(4, 4, FILTERS, dtype=torch.float64)
    for top in range(4):
        for left in range(4):
            patch = x[:, top : top + 6, left : left + 6].flatten()
            patch = (patch - patch.mean()) / (patch.var() + CONTRAST).sqrt()
            every[top, left] = weights @ patch - filters.offsets
    halves = (every - THRESHOLD).clamp_min(0), (-every - THRESHOLD).clamp_min(0)
    quarters = [(slice(0, 2), slice(0, 2)), (slice(0, 2), slice(2, 4)), (slice(2, 4), slice(0, 2)), (slice(2, 4),) * 2]
    expected = torch.cat([half[at].mean((0, 1)) for half in halves for at in quarters])
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    assert found.shape == (2 * FILTERS * 4,) and (found > 0).any() and (found[: 4 * FILTERS] > 0).any()


def test_filters_are_whitened_patches_of_unit_length():
    """Of white noise every direction varies alike, so that whitening is a scale; no filter answers to brightness."""
    filters = learned(noise(200, side=12), Eye((12, 12), 1.0), seed=0)
    lengths = filters.weights.flatten(1).norm(dim=1)
    assert lengths.std() / lengths.mean() < 0.1
    grey = torch.stack([torch.full((3, 12, 12), level, dtype=torch.uint8) for level in (0, 90, 255)])
    dark, middle, bright = filters.answers(grey)
    assert torch.equal(dark, middle) and torch.equal(middle, bright)


def test_one_seed_one_set_of_filters_whatever_the_parts_and_the_images_judged():
    train, test = noise(40), noise(7, seed=1)
    ranges = [range(0, 3), range(3, 7)]
    parts = list(extract_parts(test, EYE, patches(train, EYE, 2), ranges))
    once = whole(test, EYE, patches(train, EYE, 2))
    joined = torch.cat([part.features["patches"] for part in parts])
    torch.testing.assert_close(joined, once["patches"])
    other = whole(test, EYE, patches(train, EYE, 3))
    assert not torch.allclose(other["patches"], joined)
    keys = [patch_key(one, test, EYE, seed) for one, seed in ((train, 2), (train, 3), (test, 2))]
    assert keys[0] != keys[1] and keys[0] != keys[2] != keys[1]


def test_grey_small_and_large_images():
    for side, channels in ((4, 1), (7, 1), (64, 3)):
        images = noise(6, side, channels)
        eye = Eye((side, side), 1.0, channels)
        features = whole(images, eye, patches(images, eye, 0))["patches"]
        assert features.shape == (6, 8 * FILTERS) and torch.isfinite(features).all()
    assert learned(images, eye, seed=0).size == (32, 32)
