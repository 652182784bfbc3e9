"""Patches that are cut apart and changed one by one, on pictures whose pixels say where they come from."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import photo, save
from torch import Tensor

from common.batches.colour import recolour
from common.batches.crops import crop_draws, cut, reduction
from common.batches.sampler import StepSampler, generator
from common.batches.samples import Samples, loader
from common.batches.strong import patchwork
from common.batches.views import View
from common.data import open_data
from common.data.images import Arrays, Images
from common.errors import Refusal

PLAIN = {"jitter": 0.0, "grayscale": 0.0}
GREY = [0.5, 0.5, 0.5]


def coordinates(height: int, width: int) -> Tensor:
    """A picture of three channels: row, column, 0."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)]).to(torch.uint8)


def apart(image: Tensor, patch: tuple[int, int]) -> Tensor:
    """Patches of a picture, (gh, gw, C, ph, pw)."""
    return image.unflatten(2, (-1, patch[1])).unflatten(1, (-1, patch[0])).permute(1, 3, 0, 2, 4)


def test_each_patch_is_cut_out_of_its_own_cell_anywhere_in_it() -> None:
    """2x3 patches of 2x4 pixels in cells of 5x7; over many crops every place is as frequent as another."""
    view = View([4, 12], patch=[2, 4], gap=3, **PLAIN)
    assert view.cut_size == (10, 21)
    picture, inside = coordinates(10, 21), coordinates(2, 4)
    counts = torch.zeros(2, 3, 4, 4)
    for index in range(600):
        made = patchwork(picture.clone(), view, generator(0, 0, index), GREY)
        assert made.shape == (3, 4, 12) and made.dtype == torch.uint8 and made.is_contiguous()
        patches = apart(made, (2, 4))
        for i in range(2):
            for j in range(3):
                top, left = (patches[i, j, :2, 0, 0] - torch.tensor([5 * i, 7 * j])).tolist()
                expected = inside + torch.tensor([5 * i + top, 7 * j + left, 0])[:, None, None]
                assert 0 <= top <= 3 and 0 <= left <= 3 and torch.equal(patches[i, j], expected.to(torch.uint8))
                counts[i, j, top, left] += 1
    assert (counts - 600 / 16).abs().max() < 5 * math.sqrt(600 / 16)
    assert (counts.sum((0, 1)) - 6 * 600 / 16).abs().max() < 5 * math.sqrt(6 * 600 / 16)


@pytest.mark.parametrize(("gap", "offset"), [(2, 1), (3, 2), (6, 3)])
def test_in_the_centre_all_of_the_gap_is_left_out(gap: int, offset: int) -> None:
    view = View(8, patch=4, gap=gap, patch_at="centre", **PLAIN)
    made = patchwork(coordinates(*view.cut_size), view, generator(0, 0, 0), GREY)
    at = [*range(offset, offset + 4), *range(4 + gap + offset, 8 + gap + offset)]
    assert made[0, :, 0].tolist() == made[1, 0].tolist() == at


def test_of_one_patch_and_without_a_gap() -> None:
    whole = View(6, patch=6, gap=2, **PLAIN)
    made = patchwork(coordinates(8, 8), whole, generator(0, 0, 3), GREY)
    assert made.is_contiguous() and torch.equal(made - made[:, :1, :1], coordinates(6, 6))
    still = View(6, patch=3, patch_jitter=0.5, **PLAIN)
    assert still.cut_size == (6, 6)
    black = patchwork(torch.zeros(1, 6, 6, dtype=torch.uint8), still, generator(0, 0, 3), [0.5])
    assert black.shape == (1, 6, 6) and not black.any()


@pytest.mark.parametrize("channels", [3, 1])
def test_each_patch_has_a_light_of_its_own(channels: int) -> None:
    """To the bit as `recolour` changes a picture that is nothing but the patch."""
    view = View(24, patch=8, patch_jitter=0.6, **PLAIN)
    picture = torch.from_numpy(photo(24, 24, 1)).permute(2, 0, 1)[:channels]
    made = apart(patchwork(picture, view, generator(1, 2, 3), GREY), (8, 8))
    draws = generator(1, 2, 3).random((3, 3, 6))
    for i in range(3):
        for j in range(3):
            brightness, contrast = 1 + 0.6 * (2 * draws[i, j, 2:4] - 1)
            patch = apart(picture, (8, 8))[i, j]
            changed = recolour(patch.contiguous(), [("brightness", brightness), ("contrast", contrast)])
            assert torch.equal(made[i, j], changed) and not torch.equal(changed, patch)


def test_two_of_three_channels_become_noise_about_the_mean() -> None:
    view = View(16, patch=8, patch_drop_colour=0.3, **PLAIN)
    wide = torch.from_numpy(np.random.default_rng(0).choice(np.array([0, 255], np.uint8), (3, 16, 16)))
    mean = [0.2, 0.4, 0.8]
    kept = {0: 0, 1: 0, 2: 0, 3: 0}  # which channel; 3: all
    noise = []
    for index in range(500):
        made = apart(patchwork(wide.clone(), view, generator(0, 0, index), mean), (8, 8))
        for patch, before in zip(made.flatten(0, 1), apart(wide, (8, 8)).flatten(0, 1), strict=True):
            same = [torch.equal(patch[channel], before[channel]) for channel in range(3)]
            assert sum(same) in (1, 3)
            kept[3 if all(same) else same.index(True)] += 1
            for channel in range(3):
                if not same[channel]:
                    noise.append(patch[channel].float() - 255 * mean[channel])
    assert abs(kept[3] - 1400) < 5 * math.sqrt(2000 * 0.3 * 0.7)
    assert all(abs(kept[channel] - 200) < 5 * math.sqrt(200) for channel in range(3))
    values = torch.stack(noise)
    assert abs(float(values.mean())) < 0.02
    expected = math.sqrt(1.275**2 + 1 / 12)  # black and white deviate by 127.5; a hundredth of it, rounded
    assert float(values.std()) == pytest.approx(expected, rel=0.02)


def test_no_option_changes_what_another_draws() -> None:
    picture = coordinates(20, 20)
    first = patchwork(picture.clone(), View(16, patch=8, gap=2, **PLAIN), generator(0, 0, 0), GREY)
    both = View(16, patch=8, gap=2, patch_drop_colour=0.5, **PLAIN)
    dropped = apart(patchwork(picture.clone(), both, generator(0, 0, 0), GREY), (8, 8))
    places = apart(first, (8, 8))
    same = (dropped == places).flatten(3).all(-1)
    assert bool(same.any(-1).all()) and not bool(same.all())
    lit = View(16, patch=8, gap=2, patch_jitter=1e-9, **PLAIN)
    assert torch.equal(patchwork(picture.clone(), lit, generator(0, 0, 0), GREY), first)


# ---------------------------------------------------------------------------------------------------- in batches

ALL = {"gap": 3, "patch": 8, "patch_jitter": 0.4, "patch_drop_colour": 0.3}


@pytest.fixture(scope="module")
def images() -> Images:
    return Images(Arrays(np.stack([photo(40, 44, k) for k in range(24)]), "photos"), "photos")


def test_samples_are_the_crops_they_were_cut_up_by_draws_of_their_own(images: Images) -> None:
    """A crop is the one that it was without the options, at its larger size: box, flip, colours, blur, policy."""
    strong = {"flip": 0.5, "blur": 0.5, "solarise": 0.3, "auto_augment": "rand-m9-mstd0.5-inc1"}
    larger = {"global": View([22, 33], **strong), "local": View(22, count=2, **strong)}
    views = {"global": View([16, 24], **strong, **ALL), "local": View(16, count=2, **strong, **ALL)}
    keys = [(epoch, index) for epoch in (0, 5) for index in range(6)]
    before = Samples(images, larger, 7, 3).__getitems__(keys).views
    made = Samples(images, views, 7, 3).__getitems__(keys).views
    for row, key in enumerate(keys):
        for name, crop, purpose in (("global", 0, ""), ("local", 0, " local 0"), ("local", 1, " local 1")):
            at = crop * len(keys) + row
            rng = generator(7, *key, f"patches{purpose}")
            assert torch.equal(made[name][at], patchwork(before[name][at], views[name], rng, GREY)), (name, key)


def test_a_sample_looks_the_same_in_any_company_and_worker(images: Images) -> None:
    views = {"global": View(16, erasing=0.3, **ALL), "local": View(8, count=2, **ALL)}
    samples = Samples(images, views, 3, 3)
    made = {}
    for workers in (0, 2):
        made[workers] = list(loader(samples, StepSampler(24, 12, 3, 3), workers, pin=False))
    for one, other in zip(made[0], made[2], strict=True):
        assert all(one.views[name].equal(other.views[name]) for name in views)
    late = list(loader(samples, StepSampler(24, 12, 3, 3, start=2), 0, pin=False))
    assert late[0].views["local"].equal(made[0][2].views["local"])
    halves = [next(iter(loader(samples, StepSampler(24, 12, 3, 1, 0, rank, 2), 0, False))) for rank in range(2)]
    assert torch.cat([half.views["global"] for half in halves]).equal(made[0][0].views["global"])
    keys = [(0, 4), (1, 4), (0, 9)]
    alone = [samples.__getitems__([key]).views["local"] for key in keys]
    assert samples.__getitems__(keys).views["local"].equal(torch.stack(alone, 1).flatten(0, 1))
    assert not alone[0].equal(alone[1])


def test_they_are_mixed_as_other_images(images: Images) -> None:
    """CutMix pastes the neighbour's pixels as they are, so each pixel is of one of the two."""
    views = {"global": View(16, cutmix=1.0, **ALL)}
    (batch,) = loader(Samples(images, views, 3, 3), StepSampler(24, 12, 3, 1), 0, pin=False)
    mixed, own = batch.mixed().views["global"], batch.views["global"]
    partners = own.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    assert bool(((mixed == own) | (mixed == partners)).all()) and not mixed.equal(own)


def test_a_reduced_image_keeps_the_pixels_of_the_gaps_too() -> None:
    draws = crop_draws(whole := View(32, scale=[1, 1], ratio=[1, 1], patch=8), np.random.default_rng(0))[0]
    assert reduction(128, 128, [(whole, draws)]) == 4
    assert reduction(128, 128, [(View(32, scale=[1, 1], ratio=[1, 1], patch=8, gap=1), draws)]) == 2  # of 36
    assert cut(coordinates(128, 128), View(32, patch=8, gap=1), draws)[0].shape == (3, 36, 36)


def test_files_are_cut_as_arrays_are(tmp_path: Path) -> None:
    for k in range(2):
        save(tmp_path / f"{k}.png", photo(40, 44, k))
    made = Samples(open_data(str(tmp_path)), {"global": View(16, **ALL)}, 0, 3).__getitems__([(0, 0), (0, 1)])
    arrays = Images(Arrays(np.stack([photo(40, 44, k) for k in range(2)]), "photos"), "photos")
    same = Samples(arrays, {"global": View(16, **ALL)}, 0, 3).__getitems__([(0, 0), (0, 1)])
    assert made.views["global"].equal(same.views["global"])


# ------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gap": -1}, r"view: gap=-1: expected a whole number from 0 to 256"),
        ({"gap": 1.5}, r"view: gap=1\.5: expected a whole number"),
        ({"patch_jitter": 1.1}, r"view: patch_jitter=1\.1: expected a number from 0 to 1"),
        ({"patch_drop_colour": -0.1}, r"view: patch_drop_colour=-0\.1: expected a number from 0 to 1"),
        ({"patch_at": "center"}, r"view: patch_at='center'.*did you mean 'centre'"),
        ({"patch": 0}, r"view: patch=0: expected a positive whole number of pixels, or \[height, width\] \(or null\)"),
        ({"patch": "auto"}, r"view: patch=auto: expected a positive whole number"),
        ({"patch": 7}, r"view: size=16 is no multiple of patch=7: expected whole patches; .* patch=null"),
        ({"patch": [8, 3]}, r"view: size=16 is no multiple of patch=\[8, 3\]"),
    ],
)
def test_options_that_cannot_be(options: dict, words: str) -> None:
    with pytest.raises(Refusal, match=words):
        View(16, **options)


def test_one_channel_has_no_colour_to_drop(images: Images) -> None:
    view = View(16, patch=8, patch_drop_colour=0.5)
    with pytest.raises(Refusal, match=r"views\.global\.patch_drop_colour=0\.5: expected a model of 3 channels, and it"):
        Samples(images, {"global": view}, 0, 1)
