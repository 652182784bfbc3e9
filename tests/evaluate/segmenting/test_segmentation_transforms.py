"""Training crops with masks, sliding windows, scores, and votes of patches."""

import math

import numpy as np
import pytest
import torch
from ranks.job import ranks
from torch import nn
from torch.nn import functional as F

from evaluate.segmenting.data import IGNORED, in_memory
from evaluate.segmenting.inference import MULTI, SINGLE, View, judge, likeliest, segment, slide, starts, whole
from evaluate.segmenting.neighbors import Neighbors, RawPatches, histograms
from evaluate.segmenting.norm import TogetherBatchNorm, together
from evaluate.segmenting.options import SegmentationConfig, rate_of, stride_of
from evaluate.segmenting.scores import (
    constant,
    counts,
    mean_iou,
    per_class,
    pixel_accuracy,
    summary,
)
from evaluate.segmenting.transforms import MASK, Crops, augmented, distorted, random_crop, scaled_size

RNG = np.random.default_rng


def chart(height=20, width=30):
    """An image whose red and green tell the column and the row, and a mask that says the same of its pixels."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    image = torch.stack([columns * 8, rows * 8, torch.zeros_like(rows)]).to(torch.uint8)
    return image, (rows // 5 * 10 + columns // 5).to(torch.int16)


def test_scaled_sizes_are_mmsegmentation_s():
    assert scaled_size(600, 800, 512, 2048) == (512, 683)
    assert scaled_size(300, 3000, 512, 2048) == (205, 2048)  # the long side goes before
    assert scaled_size(600, 800, 512, 2048, 0.5) == (256, 341)
    assert scaled_size(60, 80, None, None, 2.0) == (120, 160)
    assert scaled_size(10, 100, None, None) == (10, 100)
    assert scaled_size(100, 1000, 512, None) == (205, 2048)


def test_image_and_mask_stay_together():
    image, mask = chart()
    config = SegmentationConfig(scale=[1.0, 1.0], photometric=False, flip=0.5)
    flipped = set()
    for index in range(12):
        crop, labels = augmented(image, mask, (10, 16), config, [1, 2, 3], RNG(index))
        assert crop.shape == (3, 10, 16) and labels.shape == (10, 16)
        columns, rows = crop[0].long() // 8, crop[1].long() // 8
        assert torch.equal(labels.long(), rows // 5 * 10 + columns // 5)
        flipped.add(bool(columns[0, 0] > columns[0, 1]))
    assert flipped == {False, True}


def test_what_is_too_small_is_padded_and_not_labelled():
    image, mask = chart()
    config = SegmentationConfig(scale=[0.5, 0.5], photometric=False, flip=0.0)
    crop, labels = augmented(image, mask, (16, 16), config, [1, 2, 3], RNG(0))  # 10x15 before it is padded
    assert (labels[:10, :15] != IGNORED).all() and (labels[10:] == IGNORED).all() and (labels[:, 15:] == IGNORED).all()
    assert crop[:, 12, 3].tolist() == crop[:, 3, 15].tolist() == [1, 2, 3]


def test_crops_in_which_one_class_is_everything_are_avoided():
    mask = torch.zeros(20, 100, dtype=torch.int16)
    mask[:, 90:] = 1
    mixed = dict.fromkeys((0.75, 1.0), 0)
    for limit in mixed:
        for seed in range(40):
            top, left = random_crop(mask, (20, 20), limit, RNG(seed))
            assert top == 0 and 0 <= left <= 80
            mixed[limit] += left >= 75
    assert mixed[1.0] < 10 < 20 < mixed[0.75]


def test_distortion_is_a_function_of_its_generator_and_spares_grey_images_colours():
    image, _ = chart()
    results = [distorted(image, RNG(seed)) for seed in range(8)]
    assert torch.equal(results[3], distorted(image, RNG(3))) and all(each.dtype == torch.uint8 for each in results)
    assert len({each.numpy().tobytes() for each in results}) > 5
    grey = torch.full((1, 2, 2), 100, dtype=torch.uint8)
    values = {int(distorted(grey, RNG(seed))[0, 0, 0]) for seed in range(60)}
    assert len(values) > 20 and min(values) >= (100 - 32) * 0.5 - 1 and max(values) <= (100 + 32) * 1.5


def test_crops_depend_on_seed_epoch_and_index_alone():
    image, mask = chart()
    scenes = in_memory(
        image.permute(1, 2, 0).numpy()[None].repeat(4, 0), mask.numpy()[None].repeat(4, 0) % 7, "abcdefg"
    )
    crops = Crops(scenes, {}, 5, 3).prepare((8, 8), SegmentationConfig(), [0.5] * 3)
    together_, alone = crops.__getitems__([(0, 1), (2, 3)]), crops.__getitems__([(2, 3)])
    assert torch.equal(together_.views["global"][1:], alone.views["global"])
    assert torch.equal(together_.draws[MASK][1:], alone.draws[MASK])
    assert not torch.equal(together_.views["global"][:1], alone.views["global"])


# ---------------------------------------------------------------------------------------------------- windows


def view(**changes):
    base = {"window": (8, 8), "stride": (5, 5), "whole": False, "short": None, "long": None, "ratios": (),
            "fill": (0, 0, 0), "step": (4, 4)}  # fmt: skip
    return View(**(base | changes))


def test_windows_cover_a_side_and_end_at_its_end():
    assert starts(8, 8, 5) == [0] and starts(5, 8, 5) == [0]
    assert starts(20, 8, 5) == [0, 5, 10, 12]
    assert starts(683, 512, 341) == [0, 171] and starts(512, 512, 341) == [0]
    assert stride_of(SegmentationConfig(), (512, 512)) == (341, 341)


def local(images):
    """Logits that say how red and how green a pixel is: a model that sees no further."""
    return {"logits": torch.stack([images[:, 0].float(), 100 - images[:, 1].float()], 1)}


def test_of_a_model_that_sees_one_pixel_windows_change_nothing():
    image, _ = chart()
    expected = local(image[None])["logits"][0]
    assert torch.allclose(slide(local, image, view()), expected)
    assert torch.allclose(whole(local, image, view(whole=True)), expected)
    small = image[:, :6, :7]
    assert torch.allclose(slide(local, small, view()), expected[:, :6, :7])  # padded, and cut off again
    assert torch.allclose(whole(local, small, view(whole=True)), expected[:, :6, :7])


def test_overlapping_windows_are_averaged():
    """Logits that are the place in the window: seen from two windows, a pixel has the mean of both."""

    def place(images):
        return {"logits": torch.arange(8.0).expand(len(images), 1, 8, 8)}

    found = slide(place, torch.zeros(3, 8, 13, dtype=torch.uint8), view())
    assert found[0, 0].tolist() == [0, 1, 2, 3, 4, 2.5, 3.5, 4.5, 3, 4, 5, 6, 7]


def test_scores_are_resized_before_the_likeliest_is_taken():
    scores = torch.randn(70, 5, 6, generator=torch.Generator().manual_seed(0))
    whole_ = F.interpolate(scores[None], (23, 31), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(likeliest(scores, (23, 31)), whole_)


def test_multi_scale_is_the_mean_of_probabilities_at_every_ratio_and_mirrored():
    image = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(2)) / 50

    def model(images):
        x = F.avg_pool2d(images.float(), 4)
        x = x + torch.arange(x.shape[-1])  # not symmetric
        return {"logits": torch.einsum("kc,bchw->bkhw", weights, x)}

    found = segment(model, image, view(ratios=(0.5, 1.0), stride=(8, 8)))
    total = torch.zeros(4, 16, 24)
    for size in ((8, 12), (16, 24)):
        for mirrored in (False, True):
            shown = image.flip(-1) if mirrored else image
            if size != (16, 24):
                shown = F.interpolate(shown[None].float(), size, mode="bilinear", antialias=True)[0].round()
            logits = slide(model, shown.to(torch.uint8), view(stride=(8, 8)))
            shares = F.interpolate(logits[None], (16, 24), mode="bilinear", align_corners=False)[0].softmax(0)
            total += shares.flip(-1) if mirrored else shares
    assert (found[MULTI] == total.argmax(0)).float().mean() > 0.99  # bytes are rounded otherwise here and there
    assert not torch.equal(found[MULTI], found[SINGLE])


# ---------------------------------------------------------------------------------------------------- scores


def test_scores_by_hand():
    mask = torch.tensor([[0, 0, 1, 1], [0, 2, IGNORED, 1]])
    said = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 0]])
    found = counts(said, mask, 4)
    assert found.tolist() == [[2, 4, 3], [2, 3, 3], [0, 0, 1], [0, 0, 0]]
    assert per_class(found.numpy())[:3].tolist() == [2 / 5, 2 / 4, 0.0] and np.isnan(per_class(found.numpy())[3])
    assert mean_iou(found.numpy()) == pytest.approx(0.3) and pixel_accuracy(found.numpy()) == pytest.approx(4 / 7)


@pytest.mark.slow  # torchmetrics takes long to import
def test_scores_are_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(-1, 5, (6, 9, 11), generator=generator)
    guesses = torch.where(torch.rand(masks.shape, generator=generator) < 0.5, masks.clamp_min(0), 3)
    each = torch.stack([counts(guess, mask, 7) for guess, mask in zip(guesses, masks, strict=True)])  # 2 are nowhere
    total = each.sum(0).numpy()
    options = {"num_classes": 7, "ignore_index": IGNORED}
    macro = metrics.MulticlassJaccardIndex(**options, average="macro")(guesses, masks)
    none = metrics.MulticlassJaccardIndex(**options, average="none")(guesses, masks)
    micro = metrics.MulticlassAccuracy(**options, average="micro")(guesses, masks)
    assert mean_iou(total) == pytest.approx(float(macro), abs=1e-6)
    assert per_class(total)[:5] == pytest.approx(none[:5].tolist(), abs=1e-6) and np.isnan(per_class(total)[5:]).all()
    assert pixel_accuracy(total) == pytest.approx(float(micro), abs=1e-6)
    told = summary(each.numpy()[None], "abcdefg")
    assert told["accuracy"] == mean_iou(total) and told["per_class"]["g"] is None and told["std"] is None
    assert told["interval"][0] < told["accuracy"] < told["interval"][1]


def test_the_majority_class_everywhere():
    masks = torch.tensor([[[0, 0, 1], [0, IGNORED, 2]], [[1, 1, 1], [1, 0, 0]]])
    scenes = in_memory(np.zeros((2, 2, 3), np.uint8), masks.numpy(), "abc")
    chosen = int(scenes.pixels.sum(0).argmax())
    by_hand = torch.stack([counts(torch.full_like(mask, chosen), mask, 3) for mask in masks])
    assert chosen == 0 or scenes.pixels.sum(0)[chosen] == scenes.pixels.sum(0).max()
    assert np.array_equal(constant(scenes.pixels, chosen), by_hand.numpy())


def test_rates():
    poly = rate_of(SegmentationConfig(steps=100, lr=1.0, warmup="10 steps"))[0]
    assert poly(0) == pytest.approx(1e-6) and poly(10) == pytest.approx(0.9) and poly(99) == pytest.approx(0.01)
    cosine = rate_of(SegmentationConfig(steps=100, lr=1.0, warmup=0.0, schedule="cosine"))[0]
    assert cosine(0) == 1.0 and cosine(50) == pytest.approx(0.5)
    config = SegmentationConfig(steps=100, lr=0.1, warmup="20 steps", schedule="one-cycle")
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    # torch counts a step less: its warm-up of pct_start * steps - 1 ends where ours begins to fall
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=101, pct_start=21 / 101)
    ours = rate_of(config)[0]
    for step in range(100):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-7)
        optimizer.step()
        theirs.step()


# ---------------------------------------------------------------------------------------------------- neighbours


def test_votes_of_patches_by_hand():
    generator = torch.Generator().manual_seed(0)
    bank, labels = 3 + torch.randn(40, 6, generator=generator), torch.rand(40, 3, generator=generator)
    labels /= labels.sum(1, keepdim=True)
    tokens = 3 + torch.randn(2, 4, 6, generator=generator)

    class Given:
        def layers(self, images, last, plan):
            from common.models.backbone import Features

            return [Features(tokens, tokens[:, :0], (2, 2))]

    found = Neighbors(Given(), None, bank, labels, 5, 0.07)(torch.zeros(2, 3, 8, 8))["logits"]
    centred = (bank - bank.mean(0)).numpy()
    for b in range(2):
        for n in range(4):
            token = (tokens[b, n] - bank.mean(0)).numpy()
            similarity = centred @ token / np.linalg.norm(centred, axis=1) / np.linalg.norm(token)
            order = np.argsort(-similarity)[:5]
            weights = np.exp(similarity[order] / 0.07)
            expected = (weights[:, None] * labels.numpy()[order]).sum(0) / weights.sum()
            assert found[b, :, n // 2, n % 2].numpy() == pytest.approx(expected, abs=1e-5)


def test_histograms_of_patches():
    mask = torch.tensor([[0, 0, 1, IGNORED], [0, 2, 1, IGNORED], [IGNORED] * 2 + [2, 2], [IGNORED] * 2 + [0, 2]])
    expected = [[0.75, 0, 0.25], [0, 1, 0], [0, 0, 0], [0.25, 0, 0.75]]
    assert histograms(mask, (2, 2), 3).tolist() == expected


def test_raw_patches_are_the_pixels_of_the_patch():
    from small import backbone

    raw = RawPatches(backbone("vit 2x3"))
    images = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    tokens = raw.layers(images)[0].tokens
    patch = (images[1, :, 8:, 8:16].float() / 255 - raw.mean) / raw.std
    assert tokens.shape == (2, 6, 192) and torch.allclose(tokens[1, 4], patch.flatten(), atol=1e-6)


# ---------------------------------------------------------------------------------------------------- processes


def normed(rank: int, processes: int) -> dict[str, list[float]]:
    """Output, gradients and running statistics of batch norm, where each process has a part of five images."""
    torch.manual_seed(0)
    x, target = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    part = slice(rank * 4 // processes, (rank + 1) * 4 // processes)
    layer = together(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), gpu=False)
    out = layer(x[part])
    (out - target[part]).square().mean().backward()
    gradients = [parameter.grad for parameter in layer.parameters()]
    if processes > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient /= processes
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    kept = torch.cat([layer[1].running_mean, layer[1].running_var])
    return {"out": out.detach().flatten().tolist(), "gradient": flat.tolist(), "kept": kept.tolist()}


def judged(rank: int, processes: int) -> list:
    """Scores of seven images."""
    from accelerate import Accelerator

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 10, 12, 3)).astype(np.uint8)
    masks = rng.integers(-1, 2, (7, 10, 12))
    scenes = in_memory(images, masks, ("red", "green"))

    class Local(nn.Module):
        def forward(self, images):
            return local(images)

    found, read = judge(Local(), scenes, view(), 3, Accelerator(cpu=True))
    return [found[SINGLE].tolist(), read.tolist()]


def both(rank: int, processes: int) -> list:
    """One launch for what follows."""
    return [normed(rank, processes), judged(rank, processes)]


@pytest.mark.slow  # two processes
def test_batch_norm_of_two_processes_is_that_of_one():
    one, two = normed(0, 1), [found[0] for found in ranks(both)]
    assert isinstance(together(nn.BatchNorm2d(2), gpu=False), nn.BatchNorm2d)
    assert two[0]["out"] + two[1]["out"] == pytest.approx(one["out"], abs=1e-5)
    for each in two:
        assert each["gradient"] == pytest.approx(one["gradient"], abs=1e-5)
        assert each["kept"] == pytest.approx(one["kept"], abs=1e-5)


@pytest.mark.slow  # two processes
def test_two_processes_count_every_image_once():
    one, two = judged(0, 1), [found[1] for found in ranks(both)]
    assert two == [one, one] and all(one[1])
    pixels = np.array(one[0])[..., 2].sum()
    assert 0.6 < pixels / (7 * 120) < 0.75 and math.isclose(np.array(one[0])[..., 1].sum(), pixels)


def test_together_keeps_what_was_there():
    layer = TogetherBatchNorm(3)
    assert torch.equal(layer(torch.ones(2, 3, 1, 1)), nn.BatchNorm2d(3)(torch.ones(2, 3, 1, 1)))
