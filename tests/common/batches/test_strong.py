"""Policies of timm and random erasing, sample by sample; repeated augmentation."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from common.batches.sampler import StepSampler, generator
from common.batches.samples import Samples
from common.batches.strong import auto_augment, erase, seeded
from common.batches.views import View
from common.data.images import Arrays, Images
from common.errors import Refusal


@pytest.mark.parametrize("channels", [1, 3])
def test_strong_augmentation_is_a_function_of_seed_epoch_and_index(channels):
    grey = np.random.default_rng(0).integers(0, 256, (6, 24, 24), dtype=np.uint8)
    images = Images(Arrays(grey, "grey"), "grey", labels=[0, 1, 0, 1, 0, 1], classes=("a", "b"))
    plain_view = {"grayscale": 0.0, "jitter": 0.0}
    views = {"global": View(16, **plain_view, auto_augment="rand-m9-mstd0.5-inc1", erasing=0.5)}
    colours = [0.5] * channels, [0.2] * channels
    samples = Samples(images, views, 5, channels, labelled=["what"], colours=colours)
    keys = [(epoch, index) for epoch in range(2) for index in range(6)]
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = samples.__getitems__(keys)
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()
    assert torch.get_rng_state().equal(before[2])
    random.seed(99), np.random.seed(99)  # nothing of this matters
    for at in (11, 3, 7):
        assert samples.__getitems__([keys[at]]).views["global"][0].equal(whole.views["global"][at])
    plain = Samples(images, {"global": View(16, **plain_view)}, 5, channels).__getitems__(keys).views["global"]
    changed = [not one.equal(two) for one, two in zip(whole.views["global"], plain, strict=True)]
    assert 6 <= sum(changed) <= 12
    assert whole.draws["what/label"].tolist() == [0, 1, 0, 1, 0, 1] * 2
    assert whole.views["global"].shape == (12, channels, 16, 16)


@pytest.mark.parametrize("colours", [1, 3])
def test_every_strength_of_rand_augment_runs(colours):
    """Also the strongest: posterised to no bits at all, a picture is black (Pillow 13 raises ValueError for it)."""
    pixels = np.random.default_rng(0).integers(1, 256, (12, 12, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels if colours == 3 else pixels[..., 0])
    for spec in ("rand-m10-inc1", "rand-m0-mstd9", "rand-m9-mstd0.5-inc1", "rand-m20-mmax20-inc1"):
        operation = auto_augment(spec, (12, 12), [0.5] * colours)
        black = 0
        for index in range(150):
            with seeded(generator(0, 0, index)):
                made = operation(picture)
            assert made.mode == picture.mode and made.size == picture.size
            black += not np.array(made).any()
        assert spec != "rand-m10-inc1" or black


def test_erased_boxes():
    mean, std = [0.5, 0.4, 0.6], [0.1, 0.1, 0.1]
    shares, values = [], []
    for index in range(300):
        image = erase(torch.full((3, 32, 32), 255, dtype=torch.uint8), generator(0, 0, index), 0.25, mean, std)
        box = (image != 255).any(0)
        if box.any():
            rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
            h, w = int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1
            assert box.sum() == h * w  # one box, filled
            shares.append(h * w / 1024)
            values.append(image[:, box].float().mean(1) / 255)
    assert 50 < len(shares) < 100  # a quarter of 300
    assert min(shares) > 0.015 and max(shares) < 0.36
    torch.testing.assert_close(torch.stack(values).mean(0), torch.tensor(mean), atol=0.01, rtol=0)
    image = torch.full((1, 8, 8), 7, dtype=torch.uint8)
    assert (erase(image, generator(0, 0, 0), 0.0, [0.5], [0.2]) == 7).all()


@pytest.mark.parametrize("spec", ["rand-m9-mstd0.5-inc1", "original", "v0", "augmix-m3-w3", "3a"])
def test_every_policy_is_a_function_of_its_generator(spec):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    operation, picture = auto_augment(spec, (12, 12), [0.5] * 3), Image.fromarray(pixels)
    made = []
    for index in (*range(8), *range(8)):
        with seeded(generator(0, 0, index)):
            made.append(np.asarray(operation(picture)))
    assert all((one == two).all() for one, two in zip(made[:8], made[8:], strict=True))
    assert sum((one != pixels).any() for one in made[:8]) >= 3


def test_a_policy_that_timm_does_not_know():
    with pytest.raises(Refusal, match="auto_augment=rnd-m9: timm cannot read it"):
        auto_augment("rnd-m9", (8, 8), [0.5] * 3)


def test_repeated_augmentation():
    seen = [list(StepSampler(30, 12, 1, 4, 0, rank, 2, 1, repeats=3)) for rank in range(2)]
    steps = [one + two for one, two in zip(*seen, strict=True)]
    assert steps == [step for (step,) in zip(StepSampler(30, 12, 1, 4, repeats=3), strict=True)]
    assert steps[3:] == list(StepSampler(30, 12, 1, 4, 3, repeats=3))  # resumed
    for step, keys in enumerate(steps):
        assert len(keys) == len(set(keys)) == 12
        assert {epoch // 3 for epoch, _ in keys} == {step // 2}
        assert len({index for _, index in keys}) == 4
        assert all(keys[i][1] != keys[i + 1][1] for i in range(0, 12, 2))  # partners in mixing are two images
    parts = list(StepSampler(30, 12, 1, 4, 0, 1, 2, 3, repeats=3))
    whole = list(StepSampler(30, 12, 1, 4, 0, 0, 2, 3, repeats=3))
    assert [*whole[0], *parts[0], *whole[1], *parts[1], *whole[2], *parts[2]] == steps[0]
