"""The same files in whatever they are kept: identical batches, whoever decodes them and how many share a step."""

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from pictures import photo, save, write_tar

from common.batches.sampler import StepSampler
from common.batches.samples import Batch, Faster, Samples, loader
from common.batches.unreadable import Limit
from common.batches.views import View
from common.caching.building import Builders, read_cached
from common.caching.pixels import Cache
from common.data import Images, Location, open_data

COUNT = 24
VIEWS = {
    "global": View(size=16, count=2, flip=0.5, blur=[1.0, 0.1], solarise=[0.0, 0.2]),
    "local": View(size=8, count=3, scale=[0.05, 0.4]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEGs and PNGs of several shapes in two classes."""
    place = tmp_path_factory.mktemp("files")
    for i in range(COUNT):
        ending, options = (".jpg", {"quality": 90}) if i % 3 else (".png", {})
        save(place / ("cat", "dog")[i % 2] / f"{i:03d}{ending}", photo(20 + i % 5, 30 - i % 7, i), **options)
    return place


def files_in(folder: Path) -> list[tuple[str, bytes]]:
    """Their names and contents, in the order in which a folder is read."""
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in sorted(folder.rglob("*.*"))]


def as_folder(folder: Path, place: Path) -> Images:
    return open_data(str(folder))


def as_tar(folder: Path, place: Path) -> Images:
    return open_data(str(write_tar(place / "x.tar", files_in(folder))))


def as_tar_of_tars(folder: Path, place: Path) -> Images:
    inner = []
    for name in ("cat", "dog"):
        members = [(file.split("/")[1], data) for file, data in files_in(folder) if file.startswith(name)]
        inner.append((f"{name}.tar", write_tar(place / f"{name}.tar", members).read_bytes()))
    return open_data(str(write_tar(place / "x" / "all.tar", inner)))


def as_shards(folder: Path, place: Path) -> Images:
    files = files_in(folder)
    for shard in range(3):
        members = []
        for name, data in files[shard * COUNT // 3 : (shard + 1) * COUNT // 3]:
            members += [(name, data), (f"{name.partition('.')[0]}.cls", name.partition("/")[0].encode())]
        write_tar(place / f"shard-{shard}.tar", members)
    return open_data(f"{place}/shard-{{0..2}}.tar")


def _table(folder: Path, image: datasets.Image | datasets.Value, label: Callable[[str], object]) -> datasets.Dataset:
    pixels = isinstance(image, datasets.Image)
    files = files_in(folder)
    rows = {
        "picture": [{"bytes": data, "path": None} if pixels else data for _, data in files],
        "kind": [label(name) for name, _ in files],
    }
    value = label("cat/")
    dtype = {bool: "bool", int: "int64", str: "string"}[type(value)]
    features = datasets.Features({"picture": image, "kind": datasets.Value(dtype)})
    return datasets.Dataset.from_dict(rows, features=features)


def _opened(spec: str) -> Images:
    return open_data(Location(f"hf:{spec}", image="picture", label="kind"))


def as_parquet(folder: Path, place: Path) -> Images:
    """A column of images, whole numbers as classes."""
    _table(folder, datasets.Image(), lambda name: int(name.startswith("dog"))).to_parquet(place / "x.parquet")
    return _opened(f"{place}/x.parquet")


def as_raw_parquet(folder: Path, place: Path) -> Images:
    """A column of bytes that nobody says are images, texts as classes."""
    table = _table(folder, datasets.Value("binary"), lambda name: name.partition("/")[0])
    table.to_parquet(place / "x.parquet")
    return _opened(f"{place}/x.parquet")


def as_saved(folder: Path, place: Path) -> Images:
    """What `save_to_disk` wrote, true and false as classes."""
    _table(folder, datasets.Image(), lambda name: name.startswith("dog")).save_to_disk(place / "saved")
    return _opened(f"{place}/saved")


def as_cache(folder: Path, place: Path) -> Images:
    images = open_data(str(folder))
    builders = Builders(PartialState(cpu=True), 0, lambda line: None)
    read_cached([images], Cache.of(images, "full", 3, str(place / "cache")), builders, Limit(), "loader.cache=")
    return images


WAYS = {
    way.__name__.removeprefix("as_"): way
    for way in (as_tar, as_tar_of_tars, as_shards, as_parquet, as_raw_parquet, as_saved, as_cache)
}


def batches(images: Images, workers: int, rank: int = 0, ranks: int = 1, on_device: bool = False) -> list[Batch]:
    samples = Samples(images, VIEWS, 5, 3, labelled=["it"], faster=Faster(on_device=on_device))
    sampler = StepSampler(COUNT, 8, 5, 4, 0, rank, ranks)  # over the end of an epoch
    return [batch.to(torch.device("cpu")) for batch in loader(samples, sampler, workers, pin=False)]


def is_same(one: Batch, *parts: Batch) -> bool:
    """Whether a batch is made of these parts, to the bit."""
    rows = torch.cat([part.index for part in parts]).equal(one.index)
    labels = torch.cat([part.draws["it/label"] for part in parts]).equal(one.draws["it/label"])
    shares = [len(part.index) for part in parts]
    views = all(
        torch.cat([part.views[name].unflatten(0, (view.count, n)) for part, n in zip(parts, shares, strict=True)], 1)
        .flatten(0, 1)
        .equal(one.views[name])
        for name, view in VIEWS.items()
    )
    return rows and labels and views


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four processes on two cores
@pytest.mark.parametrize("way", WAYS)
def test_batches_are_those_of_the_folder(way: str, folder: Path, tmp_path: Path) -> None:
    images, expected = WAYS[way](folder, tmp_path), batches(as_folder(folder, tmp_path), 0)
    assert len(expected) == 4 and len({tuple(batch.index.tolist()) for batch in expected}) == 4
    assert images.labels is not None and np.array_equal(images.labels, as_folder(folder, tmp_path).labels)
    assert all(map(is_same, expected, batches(images, 0)))
    assert all(map(is_same, expected, batches(images, 1)))
    assert all(map(is_same, expected, batches(images, 0, 0, 2), batches(images, 0, 1, 2)))
    assert all(
        map(is_same, batches(as_folder(folder, tmp_path), 0, on_device=True), batches(images, 0, on_device=True))
    )
    assert not any(map(is_same, expected, batches(images, 0)[1:]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("way", WAYS)
def test_batches_of_four_loader_processes_are_those_of_the_folder(way: str, folder: Path, tmp_path: Path) -> None:
    images, expected = WAYS[way](folder, tmp_path), batches(as_folder(folder, tmp_path), 0)
    assert all(map(is_same, expected, batches(images, 4)))
    assert all(map(is_same, expected, batches(images, 4, 0, 2), batches(images, 4, 1, 2)))


@pytest.mark.parametrize(("way", "classes"), [("parquet", ("0", "1")), ("raw_parquet", ("cat", "dog")),
                                              ("saved", ("False", "True"))])  # fmt: skip
def test_classes_are_whole_numbers_texts_or_truths(
    way: str, classes: tuple[str, ...], folder: Path, tmp_path: Path
) -> None:
    assert WAYS[way](folder, tmp_path).classes == classes
