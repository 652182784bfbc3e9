"""A cache of decoded images: equal pixels, whole or not there, built together, never of other images."""

import copy
import os
import pickle
import shutil
import signal
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from pictures import save
from ranks.job import ranks

from common.batches.samples import Faster, Samples
from common.batches.unreadable import Limit
from common.batches.views import View
from common.caching import building, parts, pixels
from common.caching.building import Builders, build, read_cached
from common.caching.parts import Damaged, Part
from common.caching.pixels import Cache, check_option, scaled, shrink
from common.data import Images, Unreadable, open_data
from common.data.images import Arrays
from common.decoding.depth import parse_range
from common.errors import Refusal
from common.processes import group
from common.processes.stopping import Stopped


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of eight images: twelve of the 96."""
    monkeypatch.setattr(pixels, "LEAST", 8)


class Said(list):
    """What was said."""

    __call__ = list.append


def alone(workers: int = 0, say=lambda line: None, stopped=lambda: None) -> Builders:
    return Builders(group.join(cpu=True), workers, say, stopped)


def made(cache: Cache, **how) -> pixels.Pixels:
    return build(cache, alone(**how), Limit(), "loader.cache=")


def reading(images: Images, decoded: pixels.Pixels) -> Images:
    same = copy.copy(images)
    same.read_from(decoded)
    return same


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_whole_images_are_equal_to_the_bit(images, tmp_path, channels, workers):
    data = open_data(str(images))
    cached = reading(data, made(Cache.of(data, "full", channels, str(tmp_path)), workers=workers))
    views = {
        "global": View(size=24, flip=0.5, blur=0.5, solarise=0.2),
        "local": View(size=16, count=3, scale=[0.05, 0.4]),
    }
    keys = [(epoch, i) for epoch in (0, 1) for i in range(len(data))]
    for faster in (Faster(), Faster(on_device=True)):
        samples = (Samples(each, views, 0, channels, faster=faster) for each in (data, cached))
        before, after = (each.__getitems__(keys).to(torch.device("cpu")) for each in samples)
        for name in views:
            assert before.views[name].equal(after.views[name])
    assert (cached.fingerprint(), cached.name(5), len(cached)) == (data.fingerprint(), data.name(5), 96)
    assert cached.labels.tolist() == data.labels.tolist()


def test_an_epoch_decodes_nothing(images, tmp_path, monkeypatch):
    data = open_data(str(images))
    cached = reading(data, made(Cache.of(data, 24, 3, str(tmp_path))))
    monkeypatch.setattr(type(data.source), "read", None)
    shorter = [min(cached.read(i).shape[1:]) for i in range(96)]
    assert max(shorter) == 24
    sent = pickle.loads(pickle.dumps(cached))  # to a spawned worker
    assert all(sent.read(i).equal(cached.read(i)) for i in range(0, 96, 7))
    assert len(pickle.dumps(cached.subset([0])._decoded)) < 4000
    picture = cached.read(3)
    picture.zero_()  # what a caller changes is its own
    assert cached.read(3).any() and cached.read(3, channels=1).shape[0] == 1


def test_images_are_scaled_by_their_shorter_side(images, tmp_path):
    assert scaled(480, 640, 256) == (256, 341) and scaled(640, 480, 256) == (341, 256)
    assert scaled(200, 640, 256) == (200, 640) == scaled(200, 640, None)
    assert scaled(1000, 3, 2) == (667, 2)
    data = open_data(str(images))
    cached = reading(data, made(Cache.of(data, 40, 3, str(tmp_path))))
    for i in range(96):
        whole = data.read(i)
        assert cached.read(i).equal(shrink(whole, 40))
        if min(whole.shape[1:]) <= 40:
            assert cached.read(i).equal(whole)


def test_archives_tables_and_ranges_have_caches_of_their_own(images, tmp_path):
    datasets = pytest.importorskip("datasets")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(images, ".")
    files = [str(path) for path in sorted(images.rglob("*.*"))]
    table = datasets.Dataset.from_dict({"image": files}).cast_column("image", datasets.Image())
    table.save_to_disk(str(tmp_path / "table"))
    folders = set()
    for spec in (images, tmp_path / "images.tar", f"hf:{tmp_path / 'table'}"):
        data = open_data(str(spec))
        cache = Cache.of(data, "full", 3, str(tmp_path / "root"))
        cached = reading(data, made(cache))
        assert all(cached.read(i).equal(data.read(i)) for i in range(96)) and cache.num_bytes < 1_000_000
        folders.add(cache.folder)
    data = open_data(str(images))
    data.set_range(parse_range("0:100"))
    folders.add(Cache.of(data, "full", 3, str(tmp_path / "root")).folder)
    assert len(folders) == 4


@pytest.mark.parametrize("value", ["many", "ful", 0, -3, 2.5, True, ""])
def test_what_is_no_cache(value):
    with pytest.raises(Refusal, match=r"loader.cache=.*: expected full, the pixels that a shorter side has at most"):
        check_option(value, "loader.cache=")


def test_images_in_memory_are_not_cached(tmp_path):
    data = Images(Arrays(np.zeros((9, 4, 4), np.uint8), "memory"), "memory")
    line = read_cached([data], Cache.of(data, 2, 1, str(tmp_path / "root")), alone(), Limit(), "loader.cache=")
    assert line == "none: memory is in memory, decoded"
    assert not (tmp_path / "root").exists() and data.read(0, 1).shape == (1, 4, 4)


# ------------------------------------------------------------------------------------------- size and room


def test_the_size_is_told_before_and_true(images, tmp_path):
    data, said = open_data(str(images)), Said()
    for option in ("full", 24):
        cache = Cache.of(data, option, 3, str(tmp_path))
        expected = cache.num_bytes
        assert expected == made(cache, say=said).num_bytes  # of few images all are looked at
    assert said[0].startswith("cache      96 images as they are: about 0.") and "GB free); made once" in said[0]
    assert said[-1].startswith("cache      96 images at 24 px: about 0.")
    assert "other caches of these images, 0." in said[-1] and "other caches" not in said[0]
    again = Said()
    made(cache, say=again)
    assert not again


def test_a_cache_larger_than_the_disk_is_refused_and_nothing_written(images, tmp_path, monkeypatch):
    monkeypatch.setattr(Cache, "free", property(lambda cache: 1000))
    data = open_data(str(images))
    for dry_run in (False, True):
        cache = Cache.of(data, 24, 3, str(tmp_path / "root"))
        with pytest.raises(Refusal, match=r"loader.cache=24: 96 images at 24 px take about .* MB are free: make room"):
            read_cached([data], cache, alone(), Limit(), "loader.cache=", dry_run)
    assert not (tmp_path / "root").exists()


def test_a_dry_run_makes_nothing(images, tmp_path):
    data, cache = open_data(str(images)), None
    cache = Cache.of(data, 24, 3, str(tmp_path / "root"))
    line = read_cached([data], cache, alone(), Limit(), "loader.cache=", dry_run=True)
    assert "96 images at 24 px: about" in line and "made when the training begins" in line
    assert not (tmp_path / "root").exists() and min(data.read(0).shape[1:]) > 24
    made(cache)
    line = read_cached([data], cache, alone(), Limit(), "loader.cache=", dry_run=True)
    assert line.endswith(f" in {cache.folder}") and min(data.read(0).shape[1:]) == 24


# ------------------------------------------------------------------------------------------- stopped, damaged, stale


def test_what_was_stopped_is_gone_on_with(images, tmp_path, monkeypatch):
    data = open_data(str(images))
    cache = Cache.of(data, "full", 3, str(tmp_path / "stopped"))
    read, count = type(data.source).read, iter(range(1000))

    def killed(source, i, channels):
        if next(count) == 30:
            raise KeyboardInterrupt
        return read(source, i, channels)

    monkeypatch.setattr(type(data.source), "read", killed)
    with pytest.raises(KeyboardInterrupt):
        made(cache)
    whole = sorted(path.name for path in cache.folder.glob("*.pixels"))
    assert whole == [f"{number:03d}-of-012.pixels" for number in range(3)]
    (cache.folder / ".003-of-012.pixels.123").write_bytes(b"of a process that was killed")
    times = [cache.path(number).stat().st_mtime_ns for number in range(3)]
    said = Said()
    made(cache, say=said)
    assert "3 of 12 parts are there" in said[0]
    assert [cache.path(number).stat().st_mtime_ns for number in range(3)] == times
    assert sorted(path.name for path in cache.folder.iterdir() if path.name != ".lock") == sorted(
        cache.path(number).name for number in range(12)
    )
    other = Cache.of(data, "full", 3, str(tmp_path / "at once"))
    made(other)
    for number in range(12):
        assert cache.path(number).read_bytes() == other.path(number).read_bytes()


def test_a_signal_stops_it(images, tmp_path):
    data, said = open_data(str(images)), Said()
    cache = Cache.of(data, "full", 3, str(tmp_path))
    with pytest.raises(Stopped):
        made(cache, say=said, stopped=lambda: signal.SIGTERM if len(list(cache.folder.glob("*.pixels"))) > 1 else None)
    assert said[-1] == "cache      stopped; the parts that are whole are kept, the same command goes on"
    assert cache.missing() == list(range(2, 12))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "empty":
        content = bytearray()
    elif how == "cut":
        del content[-1:]
    elif how == "longer":
        content += b"\0"
    elif how == "head":
        content[3] ^= 1
    elif how == "json":
        content[len(parts.MAGIC) + 1] ^= 0xFF
    elif how == "index":
        content[-30] ^= 1
    elif how == "pixels":
        content[parts.PAGE + 5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("how", ["empty", "cut", "longer", "head", "json", "index", "pixels"])
def test_a_damaged_part_is_told_and_made_again(images, tmp_path, how):
    data, said = open_data(str(images)), Said()
    cache = Cache.of(data, 24, 3, str(tmp_path))
    made(cache)
    before = cache.path(5).read_bytes()
    damage(cache.path(5), how)
    if how != "pixels":  # those are looked at by the process that builds
        with pytest.raises(Refusal, match="is not whole where this process runs"):
            pixels.Pixels(cache)
    made(cache, say=said)
    assert said[0].startswith(f"warning: {cache.path(5)} is damaged and made again: ")
    assert cache.path(5).read_bytes() == before and len(said) == 2


def test_files_that_changed_are_cached_anew(images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    data = open_data(str(folder))
    first = Cache.of(data, 24, 3, str(tmp_path / "root"))
    made(first)
    changed = sorted(folder.rglob("*.png"))[0]
    time = changed.stat().st_mtime_ns
    save(changed, np.full((30, 30, 3), 7, np.uint8))
    os.utime(changed, ns=(time, time))
    second = Cache.of(open_data(str(folder)), 24, 3, str(tmp_path / "root"))
    assert second.folder != first.folder and len(second.missing()) == 12
    shutil.copytree(first.folder, second.folder)  # whatever it is called, it says whose images are in it
    said = Said()
    decoded = made(second, say=said)
    assert "it is of other images" in said[0]
    assert any((decoded.read(i, 3) == 7).all() for i in range(96))
    others = [Cache.of(data, 25, 3, str(tmp_path)), Cache.of(data, 24, 1, str(tmp_path))]
    assert len({first.folder.name, *(each.folder.name for each in others)}) == 3


def test_an_image_that_cannot_be_read_says_why_as_without(images, tmp_path):
    folder = tmp_path / "images"
    shutil.copytree(images, folder)
    broken = sorted(folder.rglob("*.png"))[:2]
    broken[0].write_bytes(broken[0].read_bytes()[:60])
    broken[1].write_bytes(b"")
    data = open_data(str(folder))
    cached = reading(data, made(Cache.of(data, 24, 3, str(tmp_path / "root"))))
    messages = []
    for i in range(96):
        errors = []
        for each in (data, cached):
            try:
                each.read(i)
            except Unreadable as error:
                errors.append(str(error))
        assert len(errors) in (0, 2) and len(set(errors)) < 2
        messages += errors[:1]
    assert sorted(message.partition(": ")[0] for message in messages) == sorted(map(str, broken))
    for _ in range(2):  # while it is made, and when it is there
        with pytest.raises(Refusal, match=r"2 of 96 images .* more than the 1 that max_bad=1 allows"):
            build(Cache.of(data, 25, 3, str(tmp_path / "root")), alone(), Limit(1), "loader.cache=")
        made(Cache.of(data, 25, 3, str(tmp_path / "root")))


# ------------------------------------------------------------------------------------------- together


def build_together(rank: int, processes: int) -> list:
    """Run in each process of a job: build, and find what is read."""
    pixels.LEAST = 8
    data = open_data(os.environ["CACHED_IMAGES"])
    own = []
    write = parts.write
    building.parts.write = lambda path, *rest: (own.append(path.name), write(path, *rest))[1]
    decoded = build(Cache.of(data, 24, 3, os.environ["CACHE"]), Builders(PartialState(), 1, print), Limit(), "")
    total = sum(int(decoded.read(i, 3).to(torch.int64).sum()) for i in range(len(data)))
    return [own, total]


def test_two_processes_build_together(images, tmp_path, monkeypatch):
    monkeypatch.setenv("CACHED_IMAGES", str(images))
    monkeypatch.setenv("CACHE", str(tmp_path / "two"))
    (first, total), (second, same) = ranks(build_together)
    assert len(first) == len(second) == 6 and not set(first) & set(second) and total == same
    cache, other = (Cache.of(open_data(str(images)), 24, 3, str(tmp_path / name)) for name in ("one", "two"))
    made(cache)
    assert [cache.path(k).read_bytes() for k in range(12)] == [other.path(k).read_bytes() for k in range(12)]


def test_two_jobs_make_it_once(images, tmp_path, monkeypatch):
    data, said, written = open_data(str(images)), Said(), []
    write = parts.write
    monkeypatch.setattr(parts, "write", lambda path, *rest: (written.append(path.name), write(path, *rest))[1])
    jobs = [threading.Thread(target=lambda: made(Cache.of(data, 24, 3, str(tmp_path)), say=said)) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert sorted(written) == [f"{number:03d}-of-012.pixels" for number in range(12)]
    assert len(reading(data, made(Cache.of(data, 24, 3, str(tmp_path))))) == 96


def test_a_part_of_another_kind_is_no_part(tmp_path):
    path = tmp_path / "part"
    parts.write(path, "mine", [torch.arange(12, dtype=torch.uint8).view(3, 2, 2), "cut"])
    part = Part(path, "mine", 3)
    assert part.read(0).equal(torch.arange(12, dtype=torch.uint8).view(3, 2, 2))
    with pytest.raises(ValueError, match="cut"):
        part.read(1)
    with pytest.raises(Damaged, match="other images"):
        Part(path, "theirs", 3)
