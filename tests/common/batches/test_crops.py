"""What a view may look like, that nothing but the generator changes it, and where the evaluation transform looks."""

import math
import zlib
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from pictures import photo
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as V

from common.batches.colour import ORDERS, recolour
from common.batches.crops import CROP_TRIES, DRAWS, SIGMA, augment, blur, colour_changes, crop_box, evaluation, gaussian
from common.batches.sampler import generator
from common.batches.views import PRESETS, View, presets
from common.checkpoints import changes
from common.errors import Refusal

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
@pytest.mark.parametrize("view", [View(size=16), View(size=8, **PLAIN), View(size=8, flip=1, jitter=1, grayscale=1),
                                  View(size=8, count=2, blur=[0.0, 1.0], solarise=[0, 1])])  # fmt: skip
def test_draws_do_not_depend_on_image_or_view(image, view):
    used, expected = rng(), rng()
    augment(image, view, used, view.count - 1)
    expected.random(DRAWS)
    assert used.random() == expected.random()


def test_same_generator_same_bits_whatever_the_threads_and_the_layout():
    image = noise(3, 300, 400)
    loose = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # as photographs are decoded
    view = View(size=224, jitter=1.0, flip=0.5, blur=1.0, solarise=0.5)
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


def test_crops_are_pinned():
    """So that a run that was begun with an older version goes on alike. No resizing, whose kernels are not ours."""
    square: dict[str, Any] = {"size": 8, "scale": [0.25, 0.25], "ratio": [1.0, 1.0], "flip": 0.5}
    for view, pinned in (
        (View(**square, **PLAIN), [3477024384, 3193285459, 3414042814, 1721201791]),
        (View(**square), [3477024384, 714271515, 896738287, 1721201791]),  # the second and third change colour
    ):
        sums = [zlib.crc32(augment(noise(3, 16, 16), view, generator(0, 1, i)).numpy().tobytes()) for i in range(4)]
        assert sums == pinned


def test_crops_keep_their_bounds_and_spread():
    view = View(scale=[0.2, 0.6], ratio=[0.5, 2.0])
    areas, ratios = [], []
    for seed in range(2000):
        top, left, height, width = crop_box(200, 300, view, rng(seed).random(DRAWS).tolist())
        assert 0 <= top <= 200 - height and 0 <= left <= 300 - width and height >= 1 and width >= 1
        areas.append(height * width / 60000)
        ratios.append(width / height)
    assert 0.19 < min(areas) < 0.22 and 0.57 < max(areas) < 0.61 and abs(np.mean(areas) - 0.4) < 0.02
    assert min(ratios) > 0.49 and max(ratios) < 2.05


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 12), (333, 500), (21, 20), (7, 101)])
def test_a_crop_that_never_fits_is_torchvisions_the_largest_of_a_legal_ratio_in_the_centre(height, width):
    draws = [0.999] * (2 * CROP_TRIES) + [0.9] * (DRAWS - 2 * CROP_TRIES)  # too wide, ten times
    found = crop_box(height, width, View(scale=[0.9, 1.0]), draws)
    # an image of which every crop of twice its area is too large, so that torchvision gives up as well
    wanted = RandomResizedCrop.get_params(noise(1, height, width), [2.0, 2.0], [3 / 4, 4 / 3])
    assert found == tuple(wanted)


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


ADJUST = {
    "brightness": V.adjust_brightness,
    "contrast": V.adjust_contrast,
    "saturation": V.adjust_saturation,
    "hue": V.adjust_hue,
    "grayscale": lambda image, _: V.rgb_to_grayscale(image, num_output_channels=3),
}
PICTURE = torch.from_numpy(photo(60, 80)).permute(2, 0, 1).contiguous()


@pytest.mark.parametrize("amount", [0.6, 0.9, 1.4])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_change_is_torchvisions(name, amount, channels):
    image = PICTURE[:channels]
    expected = image if channels == 1 and name == "saturation" else ADJUST[name](image, amount)
    assert (recolour(image, [(name, amount)]).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("turn", [-0.5, -0.1, -0.05, 0.02, 0.1, 0.3])
@pytest.mark.parametrize("picture", [PICTURE, noise(3, 60, 80)])
def test_hue_turns_as_torchvisions_in_direction_and_size(picture, turn):
    found = recolour(picture, [("hue", turn)])
    exact = V.adjust_hue(picture.double() / 255, turn) * 255
    assert (found - exact).abs().max() < 0.51  # rounded once
    assert (found.int() - V.adjust_hue(picture, turn).int()).abs().max() <= 1
    if turn != -0.5:  # half a turn is the same either way
        away = (found.int() - V.adjust_hue(picture, -turn).int()).abs().float().mean()
        assert away > 2


def test_hue_of_greys_and_of_the_corners_of_the_cube():
    grey = noise(1, 4, 4).expand(3, -1, -1)
    assert torch.equal(recolour(grey, [("hue", 0.3)]), grey)
    wheel = torch.tensor([[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255]])
    for sixths in range(-6, 7):
        turned = recolour(wheel.T[..., None].contiguous().to(torch.uint8), [("hue", sixths / 6)])
        assert torch.equal(turned[..., 0].T.long(), wheel.roll(-sixths, 0)), sixths


def test_changes_follow_each_other_and_are_clamped_each():
    """In every order, as torchvision's ColorJitter; its own roundings to whole numbers set the tolerance."""
    amounts = {"brightness": 1.4, "contrast": 1.4, "saturation": 0.6, "hue": 0.1}
    results = []
    for order in ORDERS:
        changes = [(name, amounts[name]) for name in order]
        expected = PICTURE.double() / 255
        for name, amount in [*changes, ("grayscale", 1.0)][: 4 + (order[0] == "hue")]:
            expected = ADJUST[name](expected, amount)
        if order[0] == "hue":
            changes.append(("grayscale", 1.0))
        results.append(recolour(PICTURE, changes))
        assert (results[-1] - 255 * expected).abs().max() < 0.6
    assert len({tuple(result.flatten().tolist()) for result in results}) > 12  # the order matters


def test_the_order_is_drawn_evenly_and_beside_nothing_else():
    view = View(jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, grayscale=0.2)
    drawn = [rng(seed).random(DRAWS).tolist() for seed in range(4800)]
    found = [[name for name, _ in colour_changes(view, draws, 3)] for draws in drawn]
    orders = Counter(tuple(names[:4]) for names in found if len(names) >= 4)
    assert set(orders) == set(ORDERS) and min(orders.values()) > 100 and max(orders.values()) < 225  # 160 each
    assert sum(orders.values()) / 4800 == pytest.approx(0.8, abs=0.02)
    assert sum("grayscale" in names for names in found) / 4800 == pytest.approx(0.2, abs=0.02)
    # amounts do not depend on the order, nor on which changes there are
    alone = View(jitter=0.8, brightness=0.4, contrast=0.0, saturation=0.0, hue=0.0, grayscale=0.0)
    for draws in drawn[:50]:
        assert dict(colour_changes(alone, draws, 3)).items() <= dict(colour_changes(view, draws, 3)).items()
        assert [name for name, _ in colour_changes(view, draws, 1) if name not in ("brightness", "contrast")] == []
    hues = [dict(colour_changes(view, draws, 3)).get("hue", 0.0) for draws in drawn]
    assert -0.1 <= min(hues) < -0.099 and 0.099 < max(hues) <= 0.1 and abs(np.mean(hues)) < 0.004


def test_grayscale_is_luma_in_three_channels():
    image = noise(3, 8, 8)
    view = augment(image, View(size=8, **{**WHOLE, "grayscale": 1.0}), rng())
    expected = V.rgb_to_grayscale(image, num_output_channels=3)
    assert torch.equal(view[0], view[1]) and (view.int() - expected.int()).abs().max() <= 1


def test_colours_are_clamped_and_rounded():
    image = torch.tensor([0, 100, 255], dtype=torch.uint8).view(1, 1, 3)
    assert recolour(image, [("brightness", 2.0)]).flatten().tolist() == [0, 200, 255]
    assert recolour(image, [("brightness", 2.0), ("brightness", 0.5)]).flatten().tolist() == [0, 100, 128]
    assert recolour(image, [("brightness", 0.0)]).flatten().tolist() == [0, 0, 0]
    assert torch.equal(recolour(noise(3, 8, 8), []), noise(3, 8, 8))
    assert torch.equal(recolour(noise(3, 8, 8), [(name, 1.0) for name in ORDERS[0]]), noise(3, 8, 8))


# ---------------------------------------------------------------------------- blur and solarise


def convolved(image: torch.Tensor, sigma: float) -> np.ndarray:
    """The same blur from its definition, in float64: every pixel a sum over a window of repeated edges."""
    reach = math.ceil(6 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    window = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(image.numpy().astype(np.float64), [(0, 0), (reach, reach), (reach, reach)], mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, window.shape, axis=(1, 2))
    return np.einsum("chwij,ij->chw", windows, window)


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 40, 19), (3, 16, 33), (3, 1, 1)])
@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.0, 2.0, 5.0])
def test_blur_is_a_gaussian_convolution(shape, sigma):
    image = noise(*shape)
    blurred = blur(image, sigma)
    assert blurred.dtype == torch.uint8 and blurred.is_contiguous()
    assert np.abs(blurred.numpy() - convolved(image, sigma)).max() < 0.6  # half a grey level is the rounding


def test_blur_of_a_point_is_the_square_of_the_kernel():
    image = torch.zeros(1, 21, 37, dtype=torch.uint8)
    image[0, 10, 18] = 255
    kernel = gaussian(1.5)
    assert len(kernel) == 13 and kernel.sum() == 1.0 and np.array_equal(kernel, kernel[::-1])
    expected = np.floor(np.outer(kernel, np.rint(255 * 16 * kernel) / 16) + 0.5)
    blurred = blur(image, 1.5)[0].numpy()
    assert np.array_equal(blurred[4:17, 12:25], expected) and blurred.sum() == expected.sum()


@pytest.mark.parametrize("sigma", [1e-6, 0.01, 0.1, 0.12])
def test_almost_no_blur_changes_nothing(sigma):
    assert torch.equal(blur(noise(3, 20, 20), sigma), noise(3, 20, 20))


@pytest.mark.parametrize("sigma", [0.5, 1.3, 2.0, 9.0, 60.0])
def test_blur_is_exact_whatever_the_order_of_its_sums(sigma):
    """To the last bit what whole numbers give, which round nothing that is not meant to be rounded."""
    image, kernel = noise(3, 70, 50), gaussian(sigma).astype(np.float64)
    units = np.rint(kernel * 4096).astype(np.int64)
    assert np.array_equal(units / 4096, kernel) and units.sum() == 4096 and units.min() >= 0
    reach = len(units) // 2

    def passed(values: np.ndarray, axis: int) -> np.ndarray:
        edges = [(reach, reach) if each == axis else (0, 0) for each in range(3)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, edges, mode="edge"), len(units), axis=axis)
        return windows @ units

    rows = np.rint(passed(image.numpy().astype(np.int64), 2) / 256).astype(np.int64)
    assert np.array_equal(blur(image, sigma).numpy(), (passed(rows, 1) + 2**15) >> 16)
    assert torch.equal(blur(image.flip(1, 2), sigma).flip(1, 2), blur(image, sigma))
    assert torch.equal(blur(torch.full((3, 9, 9), 255, dtype=torch.uint8), sigma), torch.full((3, 9, 9), 255))


def test_sigma_is_uniform_in_its_range():
    image, view = noise(1, 12, 12), View(size=12, **WHOLE, blur=1.0, blur_sigma=[0.5, 3.0])
    for seed in range(5):
        draw = rng(seed).random(DRAWS)[SIGMA]
        assert torch.equal(augment(image, view, rng(seed)), blur(image, 0.5 + 2.5 * draw))


def test_solarise_inverts_the_bright():
    image = torch.tensor([[0, 1, 127], [128, 129, 255]], dtype=torch.uint8)[None]
    view = View(size=[2, 3], solarise=1.0, **WHOLE | {"ratio": [1.5, 1.5]})
    assert augment(image, view, rng()).tolist() == [[[0, 1, 127], [127, 126, 0]]]
    assert image[0, 1, 2] == 255


def test_colour_then_blur_then_solarise():
    image = noise(3, 12, 12)
    words = WHOLE | {"size": 12, "jitter": 1.0}
    blurred = augment(image, View(blur=1.0, **words), rng(3))
    sigma = 0.1 + 1.9 * rng(3).random(DRAWS)[SIGMA]
    assert torch.equal(blurred, blur(augment(image, View(**words), rng(3)), sigma))
    both = augment(image, View(blur=1.0, solarise=1.0, **words), rng(3))
    assert torch.equal(both, torch.where(blurred < 128, blurred, 255 - blurred)) and (both != blurred).any()


def test_each_crop_has_a_probability_of_its_own():
    image, plain = noise(1, 8, 8), View(size=8, **WHOLE)
    view = View(size=8, count=2, blur=[1.0, 0.1], blur_sigma=[1.0, 1.0], **WHOLE)
    assert torch.equal(augment(image, plain, rng(), 1), image)
    changed = [sum(bool((augment(image, view, rng(s), crop) != image).any()) for s in range(500)) for crop in (0, 1)]
    assert changed[0] == 500 and 25 < changed[1] < 75


# ---------------------------------------------------------------------------- presets


def test_presets_are_the_published_ones():
    """DINO's and DINOv2's released settings."""
    for preset, wide, near in (("dino", [0.4, 1.0], [0.05, 0.4]), ("dinov2", [0.32, 1.0], [0.05, 0.32])):
        found = presets({"global": {"preset": preset}, "local": {"preset": preset}, "other": {}})
        assert list(found) == ["global", "local"]
        views = {name: View(preset=preset, **values) for name, values in found.items()}
        for name, count, size, scale in (("global", 2, 224, wide), ("local", 8, 96, near)):
            view = views[name]
            assert (view.count, view.size, view.scale, view.ratio) == (count, size, scale, [3 / 4, 4 / 3])
            assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.4, 0.4, 0.2, 0.1)
            assert (view.jitter, view.grayscale, view.flip, view.interpolation) == (0.8, 0.2, 0.5, "bicubic")
            assert view.blur_sigma == [0.1, 2.0]
        assert (views["global"].blur, views["global"].solarise) == ([1.0, 0.1], [0.0, 0.2])
        assert (views["local"].blur, views["local"].solarise) == (0.5, 0.0)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_preset_fits_the_count(count):
    values = presets({"global": {"preset": "dino", "count": count}})["global"]
    assert values["blur"] == [1.0, 0.1, 0.1][:count] and values["solarise"] == [0.0, 0.2, 0.2][:count]
    View(**values | {"count": count})


@pytest.mark.parametrize(
    ("name", "size", "sigma"),
    [("global", 28, [0.0125, 0.25]), ("global", [56, 224], [0.025, 0.5]), ("local", 12, [0.0125, 0.25])],
)
def test_a_preset_blurs_small_views_alike(name, size, sigma):
    assert presets({name: {"preset": "dino", "size": size}})[name]["blur_sigma"] == sigma
    assert PRESETS["dino"][name]["blur_sigma"] == [0.1, 2.0]


def test_a_preset_is_nobodys_to_change():
    presets({"global": {"preset": "dino"}})["global"]["scale"][0] = 0.0
    assert presets({"global": {"preset": "dino"}})["global"]["scale"] == [0.4, 1.0]


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"locl": {"preset": "dino"}}, "views.locl: preset=dino has no view of that name: expected global or local"),
        ({"global": {"preset": "dino", "size": "big"}}, "view: size=big"),
    ],
)
def test_impossible_presets(views, message):
    with pytest.raises(Refusal) as refusal:
        presets(views)
    assert message in str(refusal.value)


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
        ("contrast", 1.5), ("saturation", -0.2), ("interpolation", "nearest"), ("preset", "dimo"),
        ("count", 0), ("count", -1), ("count", 1.5), ("count", True), ("count", math.inf),
        ("blur", 1.1), ("blur", "often"), ("blur", [0.1, 0.2]), ("blur", [2.0]), ("blur", None), ("solarise", []),
        ("blur_sigma", [0.0, 1.0]), ("blur_sigma", [2.0, 1.0]), ("blur_sigma", [1.0, 1000.0]), ("solarise", -0.1),
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


def test_what_an_earlier_version_did_otherwise_is_told_of_the_views_it_is_true_of() -> None:
    plain = View(jitter=0.0, grayscale=0.0)
    views = {"global": View(), "local": View(jitter=0.0), "grey": plain, "still": View(brightness=0.0, contrast=0.0,
             saturation=0.0, hue=0.0, grayscale=0.0)}  # fmt: skip
    centred = "a crop that fits an image in none of ten tries lies in its centre"
    coloured = "colours of view global, local change as torchvision changes them"
    assert changes.sample_changes(views) == [coloured, centred]
    assert changes.sample_changes({"global": plain}) == [centred]
    assert changes.note(changes.VERSION, 4, [centred]) == "" == changes.note(1, 4, [])
    assert changes.note(changes.version_of({}), 4, [centred]).endswith(f"earlier version; from there on {centred}")
    assert "version 99 of the samples" in changes.note(99, 4, [centred])
