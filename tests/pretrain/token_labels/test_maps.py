"""Label maps follow their crops: against the authors' numbers, against PIL, and in a picture one can draw."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from common.batches.crops import crop_draws, cut
from common.batches.strong import MOVES, auto_augment, patchwork, seeded
from common.batches.views import View
from pretrain.token_labels import maps

PUBLISHED = json.loads((Path(__file__).parents[2] / "fixtures/token_labels.json").read_text())
CROP = PUBLISHED["token_label_crop"]
NO, YES = torch.tensor([False]), torch.tensor([True])


def published_order(made: maps.Targets, labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """[truth | class | tokens], (B, C, 2 + N), as the published data loader makes it."""
    truth = maps.one_hot(labels, classes, smoothing)
    return torch.cat([truth[:, None], made.image[:, None], made.tokens], 1).transpose(1, 2)


def cropped(box: Any, flip: Tensor, grid: int, smoothing: float, swap: bool) -> Tensor:
    """Published order of the fixture's map; its box is one of the flipped image, as there flips come first."""
    scores, ids = torch.tensor(CROP["label_map_[2,K,H,W] (scores, class idx)"])[:, None]
    top, left, height, width = box
    left = 1 - left - width if flip else left
    boxes = torch.tensor([[top, left, height, width]])
    made = maps.targets(scores, ids.int(), 4, boxes, flip, (grid, grid), smoothing, legacy_xy_swap=swap)
    return published_order(made, torch.tensor([CROP["gt"]]), 4, smoothing)[0]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("swap", "name"), [(True, "reference_output_[C,2+L*L]"), (False, "axis_corrected_output")])
def test_a_crop_has_the_published_labels(flip: bool, smoothing: float, swap: bool, name: str) -> None:
    box = CROP["coords_stored (top/H,left/W,h/H,w/W)"]
    expected = torch.tensor(CROP[f"flip={flip},label_size=2,smoothing={smoothing}"][name])
    torch.testing.assert_close(cropped(box, YES if flip else NO, 2, smoothing, swap), expected, atol=1e-5, rtol=0)


def test_a_label_for_the_whole_crop_is_the_published_one() -> None:
    box = CROP["coords_stored (top/H,left/W,h/H,w/W)"]
    expected = torch.tensor(CROP["label_size=1,smoothing=0 reference [C,2]"])
    made = cropped(box, NO, 1, 0.0, True)
    torch.testing.assert_close(made[:, :2], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(made[:, 2], made[:, 1])  # of one token: the same


@pytest.mark.parametrize("swap", [False, True])
def test_the_whole_image_has_the_published_labels(swap: bool) -> None:
    expected = torch.tensor(CROP["full image (0,0,1,1) label_size=2 smoothing=0"])
    made = cropped((0.0, 0.0, 1.0, 1.0), NO, 2, 0.0, swap)
    torch.testing.assert_close(made[:, 1:], expected[:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("swap", "name"), [(True, "reference_[C,2+4]"), (False, "axis_corrected")])
def test_the_upper_half_is_labelled_as_the_upper_half_unless_the_published_swap_is_asked_for(
    swap: bool, name: str
) -> None:
    """Class 0 above, class 1 below, score 9."""
    published = PUBLISHED["axis_swap_proof"]
    scores = torch.full((1, 1, 6, 6), 9.0)
    ids = torch.tensor([0, 0, 0, 1, 1, 1]).view(1, 1, 6, 1).expand(1, 1, 6, 6)
    boxes = torch.tensor([[0.0, 0.0, 0.5, 1.0]])
    made = maps.targets(scores, ids, 4, boxes, NO, (2, 2), legacy_xy_swap=swap)
    expected = torch.tensor(published[name])
    torch.testing.assert_close(published_order(made, torch.tensor([2]), 4, 0.0)[0], expected, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------- moved with their pixels

OPERATIONS = {
    "rotate15": ("Rotate", 15.0),
    "rotate-30": ("Rotate", -30.0),
    "shear_x.3": ("ShearX", 0.3),
    "shear_y.3": ("ShearY", 0.3),
    "trx.2": ("TranslateXRel", 0.2),
    "try.2": ("TranslateYRel", 0.2),
}


def moves(*steps: tuple[str, float]) -> Tensor:
    return torch.tensor([[[MOVES.index(kind.removesuffix("Rel")), value] for kind, value in steps]])


def moved_by_timm(pixels: np.ndarray, *steps: tuple[str, float], fill: int = 0) -> np.ndarray:
    image = Image.fromarray(pixels)
    for kind, value in steps:
        image = NAME_TO_OP[kind](image, value, resample=Image.Resampling.NEAREST, fillcolor=fill)
    return np.array(image)


def moved_map(mask: np.ndarray, *steps: tuple[str, float]) -> np.ndarray:
    """Mask (H, W) bool as a map of two classes, moved: where it still is class 1."""
    H, W = mask.shape
    ids = torch.from_numpy(mask.astype(np.int32))[None, None]
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    turned = maps.transforms(moves(*steps), (H, W))
    made = maps.targets(torch.full((1, 1, H, W), 9.0), ids, 2, whole, NO, (H, W), moves=turned)
    return (made.tokens[0, :, 1] > 0.5).view(H, W).numpy()


def centre(mask: np.ndarray) -> tuple[float, float]:
    rows, columns = np.nonzero(mask)
    return float(rows.mean()), float(columns.mean())


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_map_moves_as_pil_moves_its_image_and_closer_than_the_published_one(name: str) -> None:
    """The published maps turn about a point half a cell off the image's centre."""
    published, step = PUBLISHED["label_randaug_vs_pil_18x18"][name], OPERATIONS[name]
    blob = np.zeros((18, 18), bool)
    blob[3:9, 5:12] = True
    image = moved_by_timm(blob.astype(np.uint8), step) > 0
    assert centre(image) == pytest.approx(published["image_centroid_rc"])  # this is the published blob
    label = moved_map(blob, step)
    overlap = (label & image).sum() / (label | image).sum()
    assert overlap >= published["iou"] - 1e-6 and overlap > 0.95
    assert np.abs(np.subtract(centre(label), centre(image))).max() < 0.1


@pytest.mark.parametrize(
    "steps",
    [
        [("Rotate", 25.0)],
        [("ShearX", -0.25)],
        [("ShearY", 0.25)],
        [("Rotate", -20.0), ("TranslateXRel", 0.3)],
        [("TranslateXRel", 0.4), ("Rotate", 30.0), ("ShearX", 0.2)],
    ],
    ids=str,
)
def test_an_oblong_map_moves_as_its_oblong_image(steps: list[tuple[str, float]]) -> None:
    """In degrees and pixels of the image, in that order; what comes from outside belongs to no class."""
    mask = np.zeros((20, 44), bool)
    mask[4:15, 9:30] = True
    image = moved_by_timm(mask.astype(np.uint8), *steps) > 0
    label = moved_map(mask, *steps)
    assert (label & image).sum() / (label | image).sum() > 0.95
    H, W = mask.shape
    scores, ids = torch.full((1, 1, H, W), 9.0), torch.ones(1, 1, H, W, dtype=torch.int32)
    turned = maps.transforms(moves(*steps), (H, W))
    made = maps.targets(scores, ids, 2, torch.tensor([[0.0, 0.0, 1.0, 1.0]]), NO, (H, W), moves=turned)
    outside = moved_by_timm(np.ones((H, W), np.uint8), *steps) == 0  # rounded to whole cells at each of the steps
    assert outside.any() and ((made.tokens[0, :, 1] == 0.5).view(H, W).numpy() == outside).mean() > 0.98


def test_what_is_not_moved_is_cut_as_without_moves_and_so_it_is_by_points() -> None:
    """RoIAlign takes one point a token where a token is no larger than a cell: there the two are the same numbers."""
    torch.manual_seed(0)
    scores, ids = torch.randn(3, 2, 6, 8), torch.randint(0, 5, (3, 2, 6, 8))
    boxes = torch.tensor([[0.1, 0.2, 0.7, 0.6], [0.0, 0.0, 1.0, 1.0], [0.5, 0.1, 0.4, 0.8]])
    flips = torch.tensor([False, True, True])
    still = maps.transforms(torch.zeros(3, 2, 2), (30, 40))
    plain = maps.targets(scores, ids, 5, boxes, flips, (6, 8))
    same = maps.targets(scores, ids, 5, boxes, flips, (6, 8), moves=still)
    assert torch.equal(plain.tokens, same.tokens) and torch.equal(plain.image, same.image)
    logits = maps.scatter(scores, ids, 5)
    torch.testing.assert_close(maps.sampled(logits, boxes, still, (6, 8)), maps.cut(logits, boxes, (6, 8)))
    one_moved = still.clone()
    one_moved[1, 1, 0, 2] = 0.25
    mixed = maps.targets(scores, ids, 5, boxes, flips, (6, 8), moves=one_moved)
    assert torch.equal(mixed.tokens[[0, 2]], plain.tokens[[0, 2]]) and not torch.equal(mixed.tokens[1], plain.tokens[1])


# ---------------------------------------------------------------------------- a picture

GREY, GREEN = 60, 200
WIDE = View(size=[20, 40], scale=[0.3, 0.9], flip=0.5, jitter=0.0, grayscale=0.0)


def quadrant() -> tuple[Tensor, Tensor, Tensor]:
    """An oblong picture (3, 40, 96) whose upper right quadrant is green, and its map of 8x8 cells."""
    picture = torch.full((3, 40, 96), GREY, dtype=torch.uint8)
    picture[1, :20, 48:] = GREEN
    ids = torch.zeros(1, 1, 8, 8, dtype=torch.int32)
    ids[..., :4, 4:] = 1
    return picture, torch.full((1, 1, 8, 8), 9.0), ids


def test_the_labels_of_a_quadrant_follow_it_through_crop_flip_and_rotation() -> None:
    """Tokens are of the quadrant where their pixels are green, but for those that its edges cross."""
    picture, scores, ids = quadrant()
    compared = disagreeing = 0
    seen = set()
    for seed in range(40):
        crop, placed = cut(picture, WIDE, crop_draws(WIDE, np.random.default_rng(seed))[0])
        step = ("Rotate", [0.0, 25.0, -25.0][seed % 3])
        pixels = moved_by_timm(crop.permute(1, 2, 0).numpy(), step, fill=(128,) * 3)  # type: ignore[arg-type]
        boxes, flips = torch.tensor([placed.box]), torch.tensor([placed.flipped])
        turned = maps.transforms(moves(step), (20, 40))
        made = maps.targets(scores, ids, 2, boxes, flips, (5, 10), moves=turned)
        label = made.tokens[0, :, 1].view(5, 10)
        each = torch.from_numpy(pixels.copy())[..., 1].float().view(5, 4, 10, 4)
        low, high = each.amin((1, 3)), each.amax((1, 3))
        green, grey = low > GREEN - 20, high < GREY + 20
        compared += int((green | grey).sum())
        disagreeing += int((green & (label < 0.5)).sum() + (grey & (label > 0.5)).sum())
        share = ((pixels[..., 1] > 130).mean() + (pixels == 128).all(-1).mean() / 2).item()
        assert label.mean().item() == pytest.approx(share, abs=0.08)
        seen.add((placed.flipped, step[1]))
    assert len(seen) == 6 and compared > 1000
    assert disagreeing <= compared / 200  # where an edge of the map, half a cell wide, meets a token


def test_the_labels_of_a_quadrant_are_those_of_patches_that_are_cut_apart() -> None:
    """Each patch is cut out of the cell that its label is of."""
    picture, scores, ids = quadrant()
    apart = View(size=[20, 40], scale=[0.3, 0.9], flip=0.5, jitter=0.0, grayscale=0.0, patch=4, gap=3)
    compared = disagreeing = 0
    for seed in range(40):
        crop, placed = cut(picture, apart, crop_draws(apart, np.random.default_rng(seed))[0])
        assert crop.shape[1:] == (35, 70)
        pixels = patchwork(crop, apart, np.random.default_rng(seed), (0.5,) * 3)
        boxes, flips = torch.tensor([placed.box]), torch.tensor([placed.flipped])
        label = maps.targets(scores, ids, 2, boxes, flips, (5, 10)).tokens[0, :, 1].view(5, 10)
        each = pixels[1].float().view(5, 4, 10, 4)
        green, grey = each.amin((1, 3)) > GREEN - 20, each.amax((1, 3)) < GREY + 20
        compared += int((green | grey).sum())
        disagreeing += int((green & (label < 0.5)).sum() + (grey & (label > 0.5)).sum())
    assert compared > 1700 and disagreeing <= compared / 200


@pytest.mark.parametrize("spec", ["rand-m9-n3-mstd0.5-inc1", "original-mstd0.5"])
def test_labels_follow_what_a_policy_did_to_the_pixels(spec: str) -> None:
    """Of timm's policies only what moves pixels is left in, so that green stays green."""
    picture, scores, ids = quadrant()
    policy: Any = auto_augment(spec, (20, 40), [0.5] * 3)
    if hasattr(policy, "policy"):
        policy.policy = [[step] for steps in policy.policy for step in steps if step.name in (*MOVES, "TranslateXRel")]
    else:
        policy.ops = [step for step in policy.ops if step.name.removesuffix("Rel") in MOVES]
    compared = disagreeing = moved = 0
    for seed in range(30):
        crop, placed = cut(picture, WIDE, crop_draws(WIDE, np.random.default_rng(seed))[0])
        policy.moves.clear()
        with seeded(np.random.default_rng(seed)):
            pixels = np.array(policy(to_pil_image(crop))).astype(int)
        noted = np.zeros((1, 3, 2), np.float32)
        noted[0, : len(policy.moves)] = np.reshape(policy.moves, (-1, 2))
        moved += len(policy.moves) > 0
        boxes, flips = torch.tensor([placed.box]), torch.tensor([placed.flipped])
        turned = maps.transforms(torch.from_numpy(noted), (20, 40))
        label = maps.targets(scores, ids, 2, boxes, flips, (5, 10), moves=turned).tokens[0, :, 1].view(5, 10)
        blocks = torch.from_numpy(pixels).view(5, 4, 10, 4, 3)
        red, green = blocks[..., 0], blocks[..., 1]
        is_green, is_grey = (green - red > 100).amin((1, 3)), (green < GREY + 15).amin((1, 3))
        compared += int((is_green | is_grey).sum())
        disagreeing += int((is_green & (label < 0.5)).sum() + (is_grey & (label > 0.5)).sum())
    assert moved > 15 and compared > 600
    assert disagreeing <= compared / 100


def test_maps_of_the_centre_are_cut_where_the_crop_lies_in_them() -> None:
    """Of 48x96 pixels, resized to 32x64, the middle 24x24 are shown: rows 6 to 42 and columns 30 to 66."""
    boxes = torch.tensor([[6 / 48, 30 / 96, 36 / 48, 36 / 96], [0.0, 0.0, 1.0, 1.0]])
    sizes = torch.tensor([[48, 96], [48, 96]])
    inside = maps.in_map(boxes, sizes, 0.75, (24, 24))
    torch.testing.assert_close(inside[0], torch.tensor([0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(inside[1], torch.tensor([-6 / 36, -30 / 36, 48 / 36, 96 / 36]))
    assert maps.in_map(boxes, sizes, None, (24, 24)) is boxes
