"""Filters that a stem begins from: those of the baseline `patches`, whoever learns them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.data import Images, open_data
from common.data.images import Arrays
from common.data.location import Location
from common.errors import Refusal
from common.features import whitened
from common.features.extraction import Eye
from common.features.whitened import fill, filters_for
from common.models import Backbone, ModelConfig, create
from evaluate.job.patches import FILTERS, learned

VIT: dict[str, Any] = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def noise(count: int, side: int, channels: int = 3) -> Images:
    rng = np.random.default_rng(0)
    shape = (count, side, side, channels) if channels == 3 else (count, side, side)
    return Images(Arrays(rng.integers(0, 256, shape, dtype=np.uint8), "noise"), "noise")


def stemmed(stem: dict[str, Any], patch: int, size: int, channels: int = 3) -> Backbone:
    config = ModelConfig("vit_tiny_patch16_224", VIT | {"patch_size": patch}, stem=stem, crop=1.0)
    config.mean, config.std = [0.4] * channels, [0.25] * channels
    return create(config, size)


@torch.no_grad()
def test_a_new_stem_answers_as_the_baseline() -> None:
    """A patch of 7 pixels has 2x2 windows of 6, one for each quarter that the baseline tells apart: the contrast
    constant is the same in other units."""
    images = noise(40, 7)
    made, filters = stemmed({"filters": FILTERS}, 7, 7), learned(images, Eye((7, 7), 1.0), seed=3)
    fill(made, filters_for(made, images, 3))
    pixels = torch.stack([images.read(i, 3) for i in range(4)])
    pixels[0] = pixels[0] // 32 + 100  # of little contrast
    expected = filters.answers(pixels).unflatten(1, (2, 4, FILTERS)).mean(2).flatten(1)
    found = made.model.patch_embed.answers(made.normalised(pixels))
    assert (expected > 0).any()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_filters_follow_from_seed_and_images_alone(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from workers, from what else was drawn or from the network; and they leave the generator alone."""
    monkeypatch.setattr(whitened, "DRAWN", 2000)
    folder = open_data(Location(str(images)))
    torch.manual_seed(1)
    made = stemmed({"filters": 20}, 8, 24)
    before = torch.random.get_rng_state()
    first = filters_for(made, folder, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    whitened._filters.cache_clear()
    torch.manual_seed(2)
    other = filters_for(stemmed({"filters": 20}, 8, 24), open_data(Location(str(images))), 5, workers=2)
    assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))
    assert not torch.equal(filters_for(made, folder, 6)[0], first[0])
    assert not torch.equal(filters_for(made, folder.subset(range(50)), 5)[0], first[0])
    assert first[0].shape == (20, 3, 6, 6) and first[1].shape == (20,)


def test_without_images_filters_are_random_and_of_unit_length() -> None:
    stem = stemmed({}, 8, 24).model.patch_embed
    assert stem.filters.shape == (200, 3, 6, 6) and not stem.offsets.any() and (stem.thresholds == 0.25).all()
    torch.testing.assert_close(stem.filters.flatten(1).norm(dim=1), torch.ones(200))


def test_grey_and_more_filters_than_are_drawn_of_a_usual_image(monkeypatch: pytest.MonkeyPatch) -> None:
    one = stemmed({"filters": 8}, 8, 16, channels=1)
    filters, offsets = filters_for(one, noise(3, 16, 1), 0)
    assert filters.shape == (8, 1, 6, 6) and torch.isfinite(filters).all() and torch.isfinite(offsets).all()
    monkeypatch.setattr(whitened, "NUMBERS", 3 * 8 * 8 * 10)
    many, _ = filters_for(stemmed({"filters": 300, "side": 8}, 8, 16), noise(2, 16), 0)
    assert many.shape == (300, 3, 8, 8) and len(many.flatten(1).unique(dim=0)) > 100  # 81 windows an image


def test_images_of_which_none_can_be_read(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(Refusal, match="none of 3 images, of which filters are made, can be read"):
        filters_for(stemmed({}, 8, 16), open_data(Location(str(tmp_path))), 0)
