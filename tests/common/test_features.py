"""Extraction keeps the order, pools as it says, and a cache never answers for something else."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import open_data
from common.errors import Refusal
from common.features import cache_key, cached, extract, pixels, pooled
from common.models import ModelConfig, create
from common.plan import TokenPlan

QUIET = {"warn": lambda line: None}


def tiny(**kwargs):
    torch.manual_seed(0)
    config = ModelConfig(
        "vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": 2} | kwargs, crop=1.0
    )
    return create(config, 8)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(5):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def test_rows_are_in_image_order_whatever_the_batch(folder):
    images, backbone = open_data(str(folder)), tiny().eval()
    found = extract(backbone, TokenPlan("none"), images, batch_size=3)
    assert found["index"].tolist() == list(range(10))
    for i in (0, 4, 9):
        features = backbone(images.read(i)[None], TokenPlan("none"))
        torch.testing.assert_close(found["mean"][i], features.tokens[0].mean(0))
        torch.testing.assert_close(found["class"][i], features.prefix[0, 0])


def test_position_matters_and_modes_are_left_alone(folder):
    images, backbone = open_data(str(folder)), tiny()
    torch.nn.init.normal_(backbone.model.pos_embed)
    backbone.train()
    before = torch.get_rng_state()
    full, none = (extract(backbone, TokenPlan(position), images)["mean"] for position in ("full", "none"))
    assert not torch.allclose(full, none)
    assert backbone.training and backbone.model.blocks[0].training
    assert torch.equal(before, torch.get_rng_state())  # a monitor must not move a run's dropout


def test_no_class_token_no_class_features(folder):
    found = extract(tiny(class_token=False, global_pool="avg"), None, open_data(str(folder)))
    assert found.keys() == {"mean", "index"}
    assert pooled(found).keys() == {"mean"}
    with_class = {"class": torch.zeros(2, 3), "mean": torch.ones(2, 3), "index": torch.arange(2)}
    assert pooled(with_class)["both"].tolist() == [[0, 0, 0, 1, 1, 1]] * 2


def test_pixels(folder):
    images = open_data(str(folder))
    found = pixels(images, (8, 8), 1.0)["pixels"]
    torch.testing.assert_close(found[3], images.read(3).flatten() / 255)
    assert pixels(images, (64, 64), 1.0)["pixels"].shape == (10, 3 * 32 * 32)


def test_unreadable_images_are_left_out_and_named_or_refused(folder):
    (folder / "cats" / "2.png").write_bytes(b"not an image")
    images = open_data(str(folder))
    with pytest.raises(Refusal, match=r"1 of the first \d+ images .* more than 1%.*2\.png"):
        extract(tiny(), None, images)
    many = images.subset(np.r_[np.tile(np.r_[0, 1, 3:10], 12), 2])  # one of 109
    said = []
    found = extract(tiny(), None, many, warn=said.append)
    assert found["index"].tolist() == list(range(108)) and len(found["mean"]) == 108
    assert len(said) == 1 and "1 of 109 images" in said[0] and "2.png" in said[0]


def test_cache_answers_once_and_only_for_its_key(tmp_path, folder):
    images, backbone = open_data(str(folder)), tiny()
    key = cache_key(backbone, TokenPlan("none"), images, "fp32", "cpu")
    calls, said = [], []

    def compute():
        calls.append(1)
        return extract(backbone, TokenPlan("none"), images)

    first = cached(tmp_path / "cache", key, compute, said.append)
    again = cached(tmp_path / "cache", key, compute, said.append)
    assert len(calls) == 1 and all(torch.equal(first[name], again[name]) for name in first)

    others = [cache_key(backbone, TokenPlan("full"), images, "fp32", "cpu")]
    others += [cache_key(backbone, TokenPlan("none"), images.subset(range(9)), "fp32", "cpu")]
    others += [cache_key(backbone, TokenPlan("none"), images, "bf16", "cpu")]
    with torch.no_grad():
        backbone.model.cls_token += 1
    others += [cache_key(backbone, TokenPlan("none"), images, "fp32", "cpu")]
    assert all(other != key for other in others)

    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    stale = whole.replace(b"fp32", b"fp16", 1)
    for number, damaged in enumerate((whole[:-100], b"", bytes(flipped), stale), start=1):
        file.write_bytes(damaged)
        renewed = cached(tmp_path / "cache", key, lambda: first, said.append)
        assert len(said) == number and "extracting them again" in said[-1]
        assert torch.equal(renewed["mean"], first["mean"])
        assert cached(tmp_path / "cache", key, compute, said.append)["mean"].shape == (10, 32) and len(calls) == 1
