"""Mixup, CutMix, MixToken: labels are mixed as images are, by published draws, for a batch, a pair or an image."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.batches import mixing
from common.batches.sampler import StepPart, generator
from common.batches.samples import Samples
from common.batches.views import View
from common.data.images import Arrays, Images
from common.errors import Refusal


def test_mixed_labels_say_what_was_mixed():
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    images[1::2] = 200  # each pair has a dark one, of class 0, and a bright one, of class 1
    targets = torch.eye(2)[[0, 1, 0, 1]]
    hows = set()
    for alphas in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        for step in range(12):
            mixture = mixing.draw(generator(0, 0, step, "mixing"), 8, 8, *alphas)
            mixed = mixing.mix(images, [mixture])
            shares = mixing.mix_targets(targets, mixing.shares([mixture], 4))
            hows.add((alphas, mixture.box is None))
            assert mixed.dtype == torch.uint8
            torch.testing.assert_close(shares.sum(1), torch.ones(4))
            brightness = mixed.float().mean((1, 2, 3)) / 200  # class 1 is bright: its share is seen in the image
            torch.testing.assert_close(brightness, shares[:, 1], atol=0.005, rtol=0)
    assert hows == {((1.0, 0.0), True), ((0.0, 1.0), False), ((1.0, 1.0), True), ((1.0, 1.0), False)}
    assert mixing.mix(images, [None]) is images
    assert mixing.draw(generator(0, 0, 0), 8, 8, 0.0, 0.0) is None
    assert mixing.draw(generator(0, 0, 0), 8, 8, 1.0, 1.0, probability=0.0) is None
    with pytest.raises(ValueError, match="3 rows"):
        mixing.partners(images[:3])


def test_mixing_draws_what_timm_draws():
    """Shares and box sizes have timm's distribution: means over many draws, five standard errors apart at most."""
    from timm.data.mixup import rand_bbox

    draws = [mixing.draw(generator(3, 0, step), 32, 24, 0.8, 1.0) for step in range(4000)]
    boxed = [draw for draw in draws if draw.box is not None]
    assert abs(len(boxed) - 2000) < 5 * 32
    np.random.seed(0)
    theirs = []
    for share in np.random.beta(1.0, 1.0, 4000):
        top, bottom, left, right = rand_bbox((32, 24), share)
        theirs.append(1 - (bottom - top) * (right - left) / (32 * 24))
    mine = [draw.share for draw in boxed]
    assert abs(np.mean(mine) - np.mean(theirs)) < 5 * np.std(theirs) / len(boxed) ** 0.5 * 1.25
    assert abs(np.std(mine) - np.std(theirs)) < 0.03
    blended = np.array([draw.share for draw in draws if draw.box is None])
    assert abs(blended.mean() - 0.5) < 0.04 and abs(blended.var() - 1 / (4 * 2.6)) < 0.01  # of Beta(0.8, 0.8)


@pytest.mark.parametrize("by, draws", [("batch", 1), ("pair", 4), ("element", 8)])
def test_whom_a_draw_is_for(by, draws):
    """Labels follow pixels in each way; partners share a draw, or do not."""
    images = torch.zeros(8, 1, 8, 8, dtype=torch.uint8)
    images[1::2] = 200
    view = View(8, mixup=1.0, cutmix=1.0, mix_by=by)
    keys = [(0, index) for index in range(8)]
    mixtures = mixing.drawn(view, 3, 5, keys)
    assert len(set(mixtures)) == draws
    shares = mixing.shares(mixtures, 8)
    mixed = mixing.mix(images, mixtures)
    labels = mixing.mix_targets(torch.eye(2)[[0, 1] * 4], shares)
    torch.testing.assert_close(mixed.float().mean((1, 2, 3)) / 200, labels[:, 1], atol=0.005, rtol=0)
    if by != "batch":  # a function of the sample, whatever the step and whoever stands beside it
        assert mixing.drawn(view, 3, 6, keys[4:]) == mixtures[4:]
    else:
        assert mixing.drawn(view, 3, 6, keys) != mixtures == mixing.drawn(view, 3, 5, keys[:2])


def test_pairs_mixed_alike_are_a_batch_mixed_alike():
    images = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for mixture in (mixing.Mixture(0.3), mixing.Mixture(0.75, (2, 6, 0, 4))):
        torch.testing.assert_close(mixing.mix(images, [mixture] * 6), mixing.mix(images, [mixture]), atol=1, rtol=0)


def test_only_steps_of_a_training_are_mixed():
    images = Images(Arrays(np.arange(64, dtype=np.uint8).reshape(4, 4, 4), "grey"), "grey")
    samples = Samples(images, {"global": View(4, scale=[1, 1], jitter=0.0, grayscale=0.0, mixup=1.0)}, 0, 1)
    keys = [(0, index) for index in range(4)]
    trained = samples.__getitems__(StepPart(keys, np.arange(4), 7))
    assert trained.mixtures == {"global": mixing.drawn(samples.views["global"], 0, 7, keys)}
    assert not trained.mixed().views["global"].equal(trained.views["global"])
    for others in (keys, StepPart(keys, np.arange(4))):
        assert samples.__getitems__(others).mixtures == {}


def test_several_crops_of_an_image_are_not_mixed():
    with pytest.raises(Refusal, match=r"mixup=0.8 and cutmix=0.0 need count=1, and count=2"):
        View(8, count=2, mixup=0.8)


# ---------------------------------------------------------------------------- MixToken

PUBLISHED = json.loads((Path(__file__).parents[2] / "fixtures/sp_vit.json").read_text())


@pytest.mark.parametrize("case", PUBLISHED["boxes"])
def test_boxes_are_the_published_ones(case):
    grid, lam, centre, box, share = case
    assert mixing.mix_box(tuple(grid), lam, tuple(centre)) == tuple(box)
    assert mixing.kept(tuple(grid), tuple(box)) == pytest.approx(share)
    within = tuple((at + 0.5) / side for at, side in zip(centre, grid, strict=True))
    mixture = mixing.Mixture(lam, centre=within)
    assert mixture.tokens(tuple(grid)) == tuple(box) and mixture.own(tuple(grid)) == pytest.approx(share)
    assert mixing.shares([mixture], 2, tuple(grid))[1].tolist() == pytest.approx([share, 1 - share])


def test_drawn_boxes_keep_as_much_as_the_authors_do():
    view = View(8, mix_token=1.0)
    drawn = [mixing.drawn(view, 0, step, [(0, 0), (0, 1)]) for step in range(8000)]
    assert all(len(one) == 1 for one in drawn)  # one box for a whole step
    shares = np.array([mixture.own((14, 14)) for (mixture,) in drawn])
    assert shares.mean() == pytest.approx(0.730, abs=0.01)
    assert (shares == 1).mean() == pytest.approx(0.021, abs=0.006)
    seldom = View(8, mix_token=1.0, mix=0.25)
    none = [mixing.drawn(seldom, 0, step, [])[0] is None for step in range(2000)]
    assert np.mean(none) == pytest.approx(0.75, abs=0.05)


def test_a_box_takes_its_tokens_from_the_neighbour():
    tokens = torch.tensor([[0, 1, 2, 3, 4, 5], [10, 11, 12, 13, 14, 15]]).float()[..., None]  # 2 x 3
    mixed = mixing.swap_box(tokens, (2, 3), (0, 1, 2, 2))
    assert mixed[..., 0].tolist() == [[0, 11, 2, 3, 14, 5], [10, 1, 12, 13, 4, 15]]
    assert torch.equal(mixing.swap_box(mixed, (2, 3), (0, 1, 2, 2)), tokens)
    assert mixing.swap_box(tokens, (2, 3), (1, 1, 1, 3)) is tokens
    three = torch.cat([tokens, tokens[:1] + 20])
    assert torch.equal(mixing.swap_box(three, (2, 3), (0, 1, 2, 2)), torch.cat([mixed, three[2:]]))
    four = torch.cat([tokens, tokens + 50])  # processes share a batch, and pairs stay together
    assert torch.equal(mixing.swap_box(four, (2, 3), (0, 1, 2, 2)), torch.cat([mixed, mixed + 50]))
    with pytest.raises(ValueError, match="leaves the grid of 2x3"):
        mixing.swap_box(tokens, (2, 3), (0, 1, 3, 2))


def test_mixed_tokens_leave_pixels_alone():
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    assert mixing.mix(images, [mixing.Mixture(0.5, centre=(0.5, 0.5))]) is images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"cutmix": 1.0},
            "mix_token=1.0 stands in place of mixup and CutMix.*: expected mixup=0, cutmix=0.*cutmix=1.0",
        ),
        ({"mix_by": "pair"}, "mix_token=1.0 .* mix_by=pair"),
        ({"count": 2}, "mix_token=1.0 need count=1, and count=2"),
    ],
)
def test_what_mix_token_cannot_be_with_is_refused(options, message):
    with pytest.raises(Refusal, match=message):
        View(8, mix_token=1.0, **options)
