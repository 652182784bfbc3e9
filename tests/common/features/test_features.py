"""Extraction keeps the order, pools as it says, and a cache never answers for something else."""

import itertools
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks.job import ranks

from common.batches.unreadable import NO_LIMIT, USUAL, Limit
from common.data import Images, Unreadable, open_data
from common.data.images import Arrays
from common.errors import Refusal
from common.features.extraction import (
    Eye,
    cache_key,
    extract,
    extract_parts,
    network,
    pixel_key,
    pooled,
    raw_pixels,
    whole,
)
from common.models import ModelConfig, create
from common.models.plan import TokenPlan
from evaluate.job import feature_cache
from evaluate.job.feature_cache import cached

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
    found = whole(images, Eye((8, 8), 1.0), raw_pixels)["pixels"]
    torch.testing.assert_close(found[3], images.read(3).flatten() / 255)
    assert whole(images, Eye((64, 64), 1.0), raw_pixels)["pixels"].shape == (10, 3 * 32 * 32)


def test_pixels_from_a_cache(folder, tmp_path):
    images = open_data(str(folder))

    def get(size):
        return cached(
            tmp_path / "cache",
            pixel_key(images, Eye((size, size), 1.0)),
            images,
            lambda ranges, seen: extract_parts(images, Eye((size, size), 1.0), raw_pixels, ranges, seen),
            part=3,
        )

    for size in (8, 64):
        assert same(get(size), whole(images, Eye((size, size), 1.0), raw_pixels))


def test_unreadable_images_are_left_out_and_named_or_refused(folder):
    (folder / "cats" / "2.png").write_bytes(b"not an image")
    images = open_data(str(folder))
    with pytest.raises(Refusal, match=r"1 of 10 images .* more than the 0 that max_bad=0.01 allows: .*2\.png"):
        extract(tiny(), None, images, limit=Limit(0.01))
    many = images.subset(np.r_[np.tile(np.r_[0, 1, 3:10], 12), 2])  # one of 109
    said = []
    found = extract(tiny(), None, many, warn=said.append)
    assert found["index"].tolist() == list(range(108)) and len(found["mean"]) == 108
    assert len(said) == 1 and "1 of 109 images" in said[0] and "2.png" in said[0]


def test_several_blocks_side_by_side(folder):
    images, backbone, plan = open_data(str(folder)), tiny(depth=6).eval(), TokenPlan("full")
    found = extract(backbone, plan, images, blocks=4, batch_size=4)
    with torch.no_grad():
        layers = backbone.layers(torch.stack([images.read(i) for i in range(10)]), 4, plan)
    torch.testing.assert_close(found["mean4"], torch.cat([layer.tokens.mean(1) for layer in layers], 1))
    torch.testing.assert_close(found["class4"], torch.cat([layer.prefix[:, 0] for layer in layers], 1))
    last = extract(backbone, plan, images, batch_size=4)
    assert last.keys() == {"class", "mean", "index"} and all(torch.equal(last[name], found[name]) for name in last)
    assert torch.equal(found["class4"][:, -32:], last["class"])
    fewer = extract(tiny(depth=2), plan, images, blocks=4)
    assert fewer["class4"].shape == fewer["mean4"].shape == (10, 64)


def test_several_blocks_of_others(folder):
    images = open_data(str(folder))
    swin = create(ModelConfig("swin_tiny_patch4_window7_224", {"embed_dim": 8, "depths": [1, 1, 1, 1]}), 32)
    found = extract(swin, None, images, blocks=4)
    assert found.keys() == {"mean", "mean4", "index"} and found["mean4"].shape == (10, 8 + 16 + 32 + 64)
    spvit = create(ModelConfig("spvit_s", {"embed_dim": 64, "depth": 5, "num_heads": 2}), 32)
    found = extract(spvit, None, images, blocks=4)  # its class token joins for the last two
    assert found.keys() == {"class", "mean", "mean4", "index"}
    assert extract(spvit, None, images, blocks=2)["class2"].shape == (10, 128)


# ------------------------------------------------------------------------------------------------------------ the cache


def asked(images, backbone, calls, limit=USUAL, **options):
    """What `cached` is to call; `calls` gets the parts that it was asked for."""

    by_network = network(backbone, TokenPlan("none"), **options)

    def parts_of(ranges, seen):
        for part in extract_parts(images, Eye.of(backbone, limit=limit), by_network, ranges, seen):
            calls.append(part.rows)
            yield part

    return parts_of


def key_of(images, backbone, precision="fp32", position="none", **options):
    return cache_key(backbone, TokenPlan(position), images, precision, "cpu", **options)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def cache(tmp_path, folder):
    """cache() -> features through a cache in parts of 4, 4 and 2 images; .calls and .said of the last time."""
    images, backbone = open_data(str(folder)), tiny(depth=2)
    key = key_of(images, backbone, blocks=4)

    def get():
        get.calls, get.said = [], []
        parts_of = asked(images, backbone, get.calls, blocks=4)
        return cached(tmp_path / "cache", key, images, parts_of, get.said.append, part=4)

    get.images, get.backbone, get.folder = images, backbone, tmp_path / "cache"
    get.uncached = extract(backbone, TokenPlan("none"), images, blocks=4)
    return get


def test_cached_features_are_those_extracted_and_maps_of_files(cache):
    first = cache()
    assert cache.calls == [range(4), range(4, 8), range(8, 10)]
    assert first.keys() == cache.uncached.keys() == {"class", "mean", "class4", "mean4", "index"}
    for name, tensor in cache.uncached.items():
        torch.testing.assert_close(first[name], tensor)
        assert first[name].dtype == tensor.dtype
    (home,) = cache.folder.iterdir()
    assert {file.name for file in home.iterdir()} == {"complete.json", *(f"{name}.npy" for name in first)}
    before = (home / "mean.npy").read_bytes()
    again = cache()
    assert same(again, first) and not cache.calls and not cache.said
    assert str(home / "mean.npy") in Path("/proc/self/maps").read_text()
    again["mean"][torch.tensor([1, 9])] = 0.0  # a probe that works in place
    assert same(cache(), first) and (home / "mean.npy").read_bytes() == before


def test_only_the_same_weights_data_and_settings_have_the_same_key(cache):
    images, backbone = cache.images, cache.backbone
    keys = [key_of(images, backbone), key_of(images, backbone, position="full"), key_of(images, backbone, blocks=4)]
    keys += [key_of(images.subset(range(9)), backbone), key_of(images, backbone, "bf16")]
    with torch.no_grad():
        backbone.model.cls_token += 1
    keys += [key_of(images, backbone)]
    assert all(one != other for i, one in enumerate(keys) for other in keys[:i])


def test_damaged_and_stale_arrays_are_extracted_again(cache):
    first = {name: tensor.clone() for name, tensor in cache().items()}
    (home,) = cache.folder.iterdir()
    whole = (home / "mean.npy").read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    complete = (home / "complete.json").read_text()
    for file, damaged, why in (
        ("mean.npy", whole[:-100], "the checksum of mean.npy is wrong"),
        ("mean.npy", b"", "the checksum"),
        ("mean.npy", bytes(flipped), "the checksum"),
        ("complete.json", complete[:50].encode(), ""),
        ("complete.json", b"[]", ""),
        ("complete.json", complete.replace("fp32", "fp16").encode(), "made from other weights, data or settings"),
    ):
        (home / file).write_bytes(damaged)
        assert same(cache(), first) and len(cache.calls) == 3
        assert len(cache.said) == 1 and "extracting them again" in cache.said[0] and why in cache.said[0]
        assert same(cache(), first) and not cache.calls
    (home / "class.npy").unlink()
    assert same(cache(), first) and len(cache.calls) == 3 and "class.npy" in cache.said[0]


def test_what_four_blocks_are_kept_for_answers_for_one(cache, tmp_path):
    images, backbone, calls = cache.images, cache.backbone, []
    one, four = key_of(images, backbone), key_of(images, backbone, blocks=4)

    def get(folder):
        return cached(folder, one, images, asked(images, backbone, calls), lambda line: None, larger=[four])

    assert get(tmp_path / "other").keys() == {"class", "mean", "index"} and len(calls) == 1
    kept = cache()
    assert same(get(cache.folder), kept) and len(calls) == 1
    (home,) = cache.folder.iterdir()
    (home / "mean4.npy").write_bytes(b"")
    assert get(cache.folder).keys() == {"class", "mean", "index"} and len(calls) == 2


@pytest.fixture
def stopped(cache, monkeypatch):
    """A cache whose extraction was killed in its third part."""
    read = cache.images.read
    with monkeypatch.context() as patch:
        patch.setattr(cache.images, "read", lambda i, *_, **__: 1 / 0 if i == 9 else read(i))
        with pytest.raises(ZeroDivisionError):
            cache()
    (home,) = cache.folder.iterdir()
    assert cache.calls == [range(4), range(4, 8)] and len(list(home.iterdir())) == 2
    return cache


def test_an_interrupted_extraction_goes_on(stopped):
    found = stopped()
    assert stopped.calls == [range(8, 10)] and stopped.said == [
        "2 of 3 parts were extracted before: going on with the others"
    ]
    for name, tensor in stopped.uncached.items():
        torch.testing.assert_close(found[name], tensor)


@pytest.mark.parametrize("damage", ["truncated", "emptied", "altered", "of another key"])
def test_damaged_parts_are_extracted_again(stopped, damage):
    (home,) = stopped.folder.iterdir()
    file = home / "part-000000004-000000008.safetensors"
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[-5] ^= 1
    other = whole.replace(b"fp32", b"fp16", 1)
    file.write_bytes({"truncated": whole[:-9], "emptied": b"", "altered": bytes(altered)}.get(damage, other))
    found = stopped()
    assert stopped.calls == [range(4, 8), range(8, 10)]
    assert len(stopped.said) == 2 and file.name in stopped.said[0]
    assert stopped.said[0].startswith("1 of 3 parts of cached features")
    torch.testing.assert_close(found["mean"], stopped.uncached["mean"])
    assert found["index"].tolist() == list(range(10))


def test_images_exchanged_between_classes_are_extracted_again(tmp_path, folder):
    """Also where a sample of the content, and the fingerprint with it, would not show it."""
    images, backbone, calls = open_data(str(folder)), tiny(), []
    key = key_of(images, backbone)

    def get():
        return cached(tmp_path / "cache", key, images, asked(images, backbone, calls), lambda line: None)["mean"]

    before = get().clone()
    assert torch.equal(get(), before) and len(calls) == 1
    a, b = (folder / "cats/0.png"), (folder / "cats/1.png")
    a.rename(folder / "aside")
    b.rename(a)
    (folder / "aside").rename(b)
    assert torch.equal(get()[[1, 0]], before[:2]) and len(calls) == 2
    a.touch()
    get()
    assert len(calls) == 3


def test_unreadable_images_in_parts(tmp_path, folder):
    for name in ("cats/0.png", "cats/1.png"):
        (folder / name).write_bytes(b"not an image")
    images, backbone, said = open_data(str(folder)), tiny(), []
    key = key_of(images, backbone)

    def get(limit, part):
        calls = asked(images, backbone, [], limit=limit)
        return cached(tmp_path / "cache", key, images, calls, said.append, limit=limit, part=part)

    with pytest.raises(Refusal, match=r"2 of 2 looked at among 10 images .* more than the 1 that max_bad=0.1 .*0\.png"):
        get(Limit(0.1), 2)
    found = get(Limit(0.2), 2)  # none of the first part is left
    assert found["index"].tolist() == list(range(2, 10)) and len(said) == 1
    assert said[0].startswith("2 of 10 images in") and "0.png" in said[0] and "1.png" in said[0]
    torch.testing.assert_close(found["mean"], extract(backbone, TokenPlan("none"), images, limit=NO_LIMIT)["mean"])


def test_parts_are_many_whole_batches_whatever_the_processes():
    assert feature_cache._ranges(35, None) == [range(35)]
    for images in (300, 10_000, 60_000, 1_281_167):
        ranges = feature_cache._ranges(images, None)
        assert [i for rows in ranges for i in (rows.start, rows.stop - 1)][:: 2 * len(ranges) - 1] == [0, images - 1]
        assert all(one.stop == two.start for one, two in itertools.pairwise(ranges))
        assert all(len(rows) % 256 == 0 and len(rows) <= 4096 for rows in ranges[:-1])
    assert len(feature_cache._ranges(60_000, None)) == 16


def test_progress_is_told_now_and_then(monkeypatch):
    now = iter([0.0, 1.0, 6.0, 7.0, 12.0, 30.0])
    monkeypatch.setattr(feature_cache.time, "monotonic", lambda: next(now))
    said = []
    seen = feature_cache._progress(10_000, 1, said.append)
    for _ in range(5):
        seen(2000)
    assert said == [
        "  4,000 of 10,000 images, 667 per second, 0:00:09 left",
        "  8,000 of 10,000 images, 667 per second, 0:00:03 left",
    ]


# --------------------------------------------------------------------------------------------------- several processes


def many(folder):
    """35 images of noise, one of which cannot be read."""
    rng = np.random.default_rng(1)
    pixels = torch.from_numpy(rng.integers(0, 256, (35, 8, 8, 3), dtype=np.uint8))
    images = Images(Arrays(pixels.numpy(), "noise"), "noise")
    read = images.read

    def once(i, *words, **options):
        if i == 17:
            raise Unreadable("noise[17]", "torn")
        if folder is not None:
            with (folder / f"{os.getpid()}.log").open("a") as log:
                log.write(f"{i}\n")
        return read(i, *words, **options)

    images.read = once
    return images


def by_processes(rank, processes):
    """What each process is given for the images, each part of 4, and what everybody says and reads."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(feature_cache._everybody(own)[0])
        images, backbone, calls, said = many(folder), tiny(), [], []
        parts_of = asked(images, backbone, calls, limit=Limit(0.1))
        key = key_of(images, backbone)
        found = cached(folder / "cache", key, images, parts_of, said.append, limit=Limit(0.1), part=4)
        again = cached(folder / "cache", key, images, parts_of, said.append, limit=Limit(0.1), part=4)
        refused = []
        for at, words in ((1, "of one process"), (0, "of the first")):
            try:

                def broken(ranges, seen, at=at, words=words):
                    yield from list(parts_of(ranges, seen))[:1]
                    if rank == at:
                        raise Refusal(words)
                    yield from parts_of(ranges[1:], seen)

                cached(folder / words, key, images, broken, said.append, limit=Limit(0.1), part=4)
            except Refusal as error:
                refused.append(str(error))
        try:
            cached(folder / "cache", key | {"blocks": rank}, images, parts_of, said.append)
        except Refusal as error:
            refused.append(str(error))
        reads = [int(line) for line in (folder / f"{os.getpid()}.log").read_text().split()]
        feature_cache._everybody(None)  # before the folder goes
    return {
        "features": {name: tensor.tolist() for name, tensor in found.items()},
        "same": same(found, again),
        "calls": [[rows.start, rows.stop] for rows in calls[:5]],
        "reads": reads[:20],
        "said": said,
        "refused": refused,
    }


@pytest.mark.slow
def test_two_processes_give_the_rows_of_one():
    first, second = ranks(by_processes)
    backbone = tiny()
    by_network = network(backbone, TokenPlan("none"))
    parts = list(
        extract_parts(many(None), Eye.of(backbone, limit=Limit(0.1)), by_network, feature_cache._ranges(35, 4))
    )
    alone = extract(backbone, TokenPlan("none"), many(None), limit=Limit(0.1), warn=lambda line: None)
    assert alone["index"].tolist() == [i for i in range(35) if i != 17]
    for found in (first, second):
        assert found["features"].keys() == alone.keys() and found["same"]
        for name, values in found["features"].items():
            values = torch.tensor(values)
            assert torch.equal(values, torch.cat([part.features[name] for part in parts]))
            torch.testing.assert_close(values, alone[name])
        assert len(found["refused"]) == 3
        assert found["refused"][:2] == ["of one process", "of the first"] and "different" in found["refused"][2]
    assert first["calls"] == [[at, min(at + 4, 35)] for at in range(0, 35, 8)]
    assert second["calls"][:4] == [[at, at + 4] for at in range(4, 35, 8)]
    assert first["said"][0].startswith("1 of 35 images in noise cannot be read") and not second["said"]
