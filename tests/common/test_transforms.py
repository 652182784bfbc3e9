"""What a view may look like, that nothing but the generator changes it, and where the evaluation transform looks."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

from common.errors import Refusal
from common.transforms import CROP_TRIES, DRAWS, View, augment, crop_size, evaluation, recolour, turn_hue

PLAIN: dict[str, Any] = {"jitter": 0.0, "grayscale": 0.0}  # crop and resize only
WHOLE: dict[str, Any] = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0], **PLAIN}


def noise(channels: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    pixels = np.random.default_rng(seed).integers(0, 256, (channels, height, width), dtype=np.uint8)
    return torch.from_numpy(pixels)


def ramp(height: int, width: int) -> torch.Tensor:
    """Red grows to the right, green downwards: a pixel says where it is."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---------------------------------------------------------------------------- views


@pytest.mark.parametrize("size", [24, [16, 40], (40, 16)])
@pytest.mark.parametrize("shape", [(3, 100, 60), (1, 28, 28), (3, 5, 90), (3, 1, 1)])
def test_a_view_has_its_size_and_its_own_memory(size, shape):
    image = noise(*shape)
    before = image.clone()
    for seed in range(20):
        view = augment(image, View(size=size, flip=0.5, grayscale=0.5), rng(seed))
        height, width = (size, size) if isinstance(size, int) else size
        assert view.shape == (shape[0], height, width) and view.dtype == torch.uint8 and view.is_contiguous()
        view.zero_()
    assert torch.equal(image, before)


def test_the_whole_image_is_copied_not_resized():
    image = noise(3, 8, 8)
    view = augment(image, View(size=8, **WHOLE), rng())
    assert torch.equal(view, image)
    view.zero_()
    assert image.any()


def test_a_flip_swaps_left_and_right():
    image = noise(3, 8, 8)
    assert torch.equal(augment(image, View(size=8, flip=1.0, **WHOLE), rng()), image.flip(-1))
    assert View().flip == 0  # left and right are part of the label
    flipped = sum(bool((augment(image, View(size=8, flip=0.25, **WHOLE), rng(s)) != image).any()) for s in range(400))
    assert 70 < flipped < 130


@pytest.mark.parametrize("image", [noise(1, 9, 9), noise(3, 300, 20), torch.zeros(3, 50, 50, dtype=torch.uint8)])
@pytest.mark.parametrize("view", [View(size=16), View(size=8, **PLAIN), View(size=8, flip=1, jitter=1, grayscale=1)])
def test_draws_do_not_depend_on_image_or_view(image, view):
    used, expected = rng(), rng()
    augment(image, view, used)
    expected.random(DRAWS)
    assert used.random() == expected.random()


def test_same_generator_same_bits_whatever_the_threads_and_the_layout():
    image = noise(3, 300, 400)
    loose = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as photographs are decoded
    view = View(size=224, jitter=1.0, flip=0.5)
    threads = torch.get_num_threads()
    try:
        for seed in range(5):
            results = []
            for count in (1, 2):
                torch.set_num_threads(count)
                results += [augment(image, view, rng(seed)), augment(loose, view, rng(seed))]
            assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(augment(image, view, rng(0)), augment(image, view, rng(1)))


def test_crops_keep_their_bounds_and_spread():
    view = View(scale=[0.2, 0.6], ratio=[0.5, 2.0])
    areas, ratios = [], []
    for seed in range(2000):
        height, width = crop_size(200, 300, view, rng(seed).random(DRAWS).tolist())
        assert 1 <= height <= 200 and 1 <= width <= 300
        areas.append(height * width / 60000)
        ratios.append(width / height)
    assert 0.19 < min(areas) < 0.22 and 0.57 < max(areas) < 0.61 and abs(np.mean(areas) - 0.4) < 0.02
    assert min(ratios) > 0.49 and max(ratios) < 2.05


def test_a_crop_that_never_fits_is_the_largest_of_a_legal_ratio():
    draws = [0.999] * (2 * CROP_TRIES) + [0.5] * (DRAWS - 2 * CROP_TRIES)
    assert crop_size(10, 1000, View(ratio=[0.75, 4 / 3]), draws) == (10, 13)
    assert crop_size(1000, 12, View(ratio=[0.75, 4 / 3]), draws) == (16, 12)


def test_crops_reach_every_corner():
    view = View(size=8, scale=[0.25, 0.25], ratio=[1.0, 1.0], **PLAIN)
    corners = {tuple(augment(ramp(16, 16), view, rng(seed))[:2, 0, 0].tolist()) for seed in range(1500)}
    assert corners == {(x, y) for x in range(9) for y in range(9)}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_resizing_is_torchvisions(interpolation):
    image = noise(3, 50, 50)
    view = View(size=24, interpolation=interpolation, **WHOLE)
    expected = V.resize(image, [24, 24], interpolation=v2.InterpolationMode(interpolation), antialias=True)
    difference = augment(image, view, rng()).int() - expected.int()
    assert difference.abs().max() <= 1  # torch 2.8's bilinear rounds some pixels the other way


# ---------------------------------------------------------------------------- colour


def coloured(image: torch.Tensor, **strengths: float) -> torch.Tensor:
    """The image under a jitter with these strengths alone, all drawn at their upper end."""

    class Upper:
        def random(self, count: int) -> np.ndarray:
            draws = np.zeros(count)
            draws[2 * CROP_TRIES + 4 :] = 1.0
            return draws

    zero: dict[str, Any] = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    view = View(size=list(image.shape[1:]), **{**WHOLE, "jitter": 1.0, **zero, **strengths})
    return augment(image, view, Upper())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strength", "reference"),
    [("brightness", V.adjust_brightness), ("contrast", V.adjust_contrast), ("saturation", V.adjust_saturation)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_one_matrix_is_torchvisions_adjustment(strength, reference, channels):
    image = noise(channels, 16, 16) // 2 + 50
    expected = reference(image, 1.3) if channels == 3 or strength != "saturation" else image
    assert (coloured(image, **{strength: 0.3}).int() - expected.int()).abs().max() <= 1


def test_hue_turns_and_keeps_grey():
    grey = noise(1, 4, 4).expand(3, -1, -1)
    assert (coloured(grey, hue=0.3).int() - grey.int()).abs().max() <= 1
    assert np.allclose(turn_hue(2 * math.pi), np.eye(3), atol=1e-9)
    red = torch.tensor([150, 50, 50], dtype=torch.uint8)[:, None, None]
    third = coloured(red, hue=1 / 3).flatten().tolist()
    assert sorted(third)[2] in (third[1], third[2]) and third[0] < 60  # no longer red


def test_grayscale_is_luma_in_three_channels():
    image = noise(3, 8, 8)
    view = augment(image, View(size=8, **{**WHOLE, "grayscale": 1.0}), rng())
    expected = V.rgb_to_grayscale(image, num_output_channels=3)
    assert torch.equal(view[0], view[1]) and (view.int() - expected.int()).abs().max() <= 1


def test_colours_are_clamped_and_exact():
    image = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 1, 3)
    assert recolour(image, np.array([[2.0]]), np.zeros(1)).flatten().tolist() == [0, 200, 255]
    assert recolour(image, np.array([[-1.0]]), np.zeros(1)).flatten().tolist() == [0, 0, 0]
    assert torch.equal(recolour(noise(3, 8, 8), np.eye(3), np.zeros(3)), noise(3, 8, 8))


# ---------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (224, 224), (300, 1000), (28, 28), (257, 256)])
@pytest.mark.parametrize(("size", "crop"), [(224, 0.875), (224, 1.0), (96, 0.9), (28, 1.0)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(height, width, size, crop):
    image = noise(3, height, width)
    reference = v2.Compose([
        v2.Resize(int(size / crop), interpolation=v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size),
    ])  # fmt: skip
    assert torch.equal(evaluation(image, size, crop), reference(image))


@pytest.mark.parametrize("size", [[32, 64], [64, 32], [32, 96]])
@pytest.mark.parametrize("crop", [1.0, 0.8])
def test_evaluation_of_any_shape_looks_at_the_centre_undistorted(size, crop):
    image = ramp(120, 200)
    view = evaluation(image, size, crop).float()
    assert view.shape == (3, *size)
    across, down = view[0].mean(0), view[1].mean(1)
    assert abs(across.mean() - 99.5) < 2 and abs(down.mean() - 59.5) < 2
    step_across, step_down = (across[-4] - across[3]) / (size[1] - 7), (down[-4] - down[3]) / (size[0] - 7)
    assert abs(step_across / step_down - 1) < 0.06
    # along the tighter side the view shows `crop` of the image
    assert abs(max(step_across * size[1] / 200, step_down * size[0] / 120) - crop) < 0.05


def test_evaluation_of_the_same_size_is_a_copy():
    image = noise(1, 28, 28)
    view = evaluation(image, 28, crop=1.0)
    assert torch.equal(view, image) and view.data_ptr() != image.data_ptr()


# ---------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", 0), ("size", [224]), ("size", 2.5), ("size", "large"), ("size", [8, -8]), ("size", True),
        ("scale", [0.0, 1.0]), ("scale", [0.5, 0.4]), ("scale", [0.5, 1.1]), ("scale", [0.5]),
        ("ratio", [0.0, 1.0]), ("ratio", [2.0, 1.0]), ("ratio", [1.0, math.inf]),
        ("flip", 1.5), ("flip", -0.1), ("jitter", math.nan), ("grayscale", 2), ("hue", 0.6), ("brightness", -1),
        ("contrast", 1.5), ("saturation", -0.2), ("interpolation", "nearest"),
    ],
)  # fmt: skip
def test_impossible_views_are_refused_by_field(name, value):
    with pytest.raises(Refusal, match=f"view: {name}="):
        View(**{name: value})


def test_a_recipe_can_hold_a_view():
    schema = OmegaConf.structured(View)
    view = OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create({"size": [16, 32], "scale": [0.3, 1]})))
    assert isinstance(view, View) and view.size == [16, 32] and view.scale == [0.3, 1.0]
    assert augment(noise(3, 40, 40), view, rng()).shape == (3, 16, 32)
    with pytest.raises(Refusal, match="view: flip=2"):
        OmegaConf.to_object(OmegaConf.merge(schema, OmegaConf.create({"flip": 2})))


@pytest.mark.parametrize("crop", [0.0, 1.2, -1])
def test_impossible_evaluation_crops(crop):
    with pytest.raises(Refusal, match="crop="):
        evaluation(noise(3, 8, 8), 8, crop)
