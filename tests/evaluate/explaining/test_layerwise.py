"""evaluate/explaining/layerwise.py: tokens drawn from layers, and the probe that tells where they are from."""

import numpy as np
import pytest
import torch

from common.data import Images
from common.data.images import Arrays
from common.features.extraction import Eye
from common.models import Features
from evaluate.explaining import layerwise
from evaluate.explaining.layerwise import (
    Layer,
    drawn,
    groups,
    independent,
    patches,
    read_position,
    sample,
    whiten,
)


def test_patches_are_raw_pixels_in_row_major_order():
    image = torch.arange(6, dtype=torch.uint8).view(1, 1, 2, 3).repeat_interleave(2, 2).repeat_interleave(2, 3) * 51
    features = patches(image, (2, 3))  # six patches of 2x2 pixels, each of one grey
    assert features.grid == (2, 3) and features.prefix.shape == (1, 0, 4)
    assert torch.allclose(features.tokens[0], torch.arange(6).view(6, 1) * 0.2 * torch.ones(4))
    steps = torch.tensor([10, 20], dtype=torch.uint8).repeat(16).expand(1, 1, 32, 32)  # one patch, columns 10 20 10 20
    assert torch.allclose(patches(steps, (1, 1)).tokens, torch.full((1, 1, 256), 15 / 255))  # 32 are averaged to 16


def test_sample_keeps_what_each_token_is_and_where_from(monkeypatch):
    class Numbered(Arrays):
        def read(self, i, channels):
            if i == 1:
                raise ValueError("torn")
            return super().read(i, channels)

    pixels = np.arange(200, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    images = Images(Numbered(pixels, "grey"), "grey")

    def see(
        batch,
    ):  # a token says its place and its image; the second layer says ten times as much, the third is coarser
        image = batch[:, 0, 0, 0].float()[:, None].expand(-1, 6)
        tokens = torch.stack([torch.arange(6.0).expand(len(batch), 6), image], 2)
        return [Features(values, values[:, :0], grid) for values, grid in (
            (tokens, (2, 3)), (10 * tokens, (2, 3)), (tokens[:, :2], (1, 2)),
        )]  # fmt: skip

    monkeypatch.setattr(layerwise, "TRAIN_TOKENS", 700)
    lines = []
    fine, tenfold, coarse = sample(see, images, Eye((4, 4), 1.0, 1), test=False, warn=lines.append)
    assert fine.index.tolist() == [0, *range(2, 200)] and "1 of 200 images" in lines[0]
    assert fine.tokens.shape == (199, 4, 2) and fine.grid == (2, 3)  # 700 / 200, rounded up
    assert (fine.tokens[..., 0] == fine.places).all() and (fine.tokens[..., 1] == fine.index[:, None]).all()
    assert all(len(set(places)) == 4 for places in fine.places.tolist())
    assert set(fine.places.flatten().tolist()) == set(range(6))
    assert (tenfold.places == fine.places).all() and (tenfold.tokens == 10 * fine.tokens).all()
    assert (fine.mean[:, 0] == 2.5).all() and (fine.mean[:, 1] == fine.index).all()  # of all six, drawn or not
    assert coarse.tokens.shape == (199, 2, 2) and coarse.grid == (1, 2)
    again = sample(see, images, Eye((4, 4), 1.0, 1), test=False, warn=lines.append)[0]
    assert (again.places == fine.places).all()


def test_fewer_answers_are_kept_on_large_grids():
    assert drawn(2000, 16, test=True) == 16 and drawn(10_000, 196, test=False) == 7
    assert drawn(2000, 3136, test=True) == 6 and drawn(10**6, 196, test=False) == 1


def test_whitening_is_by_the_training_tokens_and_drops_what_is_constant():
    train = torch.tensor([[1.0, 8.0, 5.0], [1.0, -8.0, 5.0], [-1.0, 8.0, 5.0], [-1.0, -8.0, 5.0]])
    white, unseen = whiten(train, torch.tensor([[2.0, 0.0, 7.0], [0.0, 24.0, 7.0]]))
    assert white.shape == (4, 2) and torch.allclose(white.T @ white / 4, torch.eye(2), atol=1e-6)
    assert torch.allclose(unseen.abs(), torch.tensor([[2.0, 0.0], [0.0, 3.0]]), atol=1e-5)  # variances rise: 1, 64


def layer(shows, places, grid, noise=0.01, seed=0):
    """Tokens that look like the place `shows` and are from `places`."""
    tokens = torch.eye(grid[0] * grid[1])[shows]
    tokens = tokens + noise * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(seed))
    return Layer(tokens, places, tokens.mean(1), torch.arange(len(places)), grid)


def test_probe_reads_places_and_measures_how_far_it_is_off():
    places = torch.arange(3).expand(40, 3)
    train = layer(places, places, (1, 3))
    found = read_position(train, layer(places[:5], places[:5], (1, 3), seed=1))
    assert found.right.tolist() == [1.0] * 5 and found.distance == 0.0 and found.accuracy == 1.0
    misleading = places[:5].clone()
    misleading[:, 2] = 0  # what is from the right end looks like the left one
    found = read_position(train, layer(misleading, places[:5], (1, 3), seed=1))
    assert found.right.tolist() == pytest.approx([2 / 3] * 5) and found.distance == pytest.approx(2 / 3)


def test_probe_of_noise_is_at_chance():
    places = torch.arange(6).expand(300, 6)
    rng = torch.Generator().manual_seed(3)
    train, test = (
        Layer(torch.randn(300, 6, 8, generator=rng), places, torch.zeros(300, 8), torch.arange(300), (2, 3))
        for _ in range(2)
    )
    found = read_position(train, test)
    assert abs(found.accuracy - 1 / 6) < 4 * (1 / 6 * 5 / 6 / 1800) ** 0.5
    assert read_position(train, test).right.equal(found.right)  # the same seed, the same probe


def test_tokens_count_by_how_much_images_differ():
    assert independent(torch.tensor([1.0, 0.0, 1.0, 0.0]), 4) == 4  # all or nothing: an image is one token
    assert independent(torch.tensor([0.75, 0.25, 0.75, 0.25]), 4) == 16  # as coins would have it
    assert independent(torch.tensor([0.6, 0.4, 0.5, 0.5]), 4) == 16  # never more than there are
    assert independent(torch.tensor([1.0, 1.0]), 4) == 2  # nothing to judge by


def test_layers_are_grouped_by_memory():
    assert list(groups([3, 3, 3, 9, 1], 6)) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5)]
    assert list(groups([1, 1], 6)) == [range(0, 2)]
