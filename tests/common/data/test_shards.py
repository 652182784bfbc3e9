"""WebDataset's shards: the samples in them, and what labels them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from pictures import png, save, write_tar

from common.data import Images, Location, labelled_splits, open_data
from common.data.location import braced, place
from common.errors import Refusal


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def names(images: Images) -> list[str]:
    return [images.source.relative(i) for i in images.source_indices()]  # type: ignore[attr-defined]


def labels(images: Images) -> list[int] | None:
    return None if images.labels is None else images.labels.tolist()


def shard(path: Path, samples: Mapping[str, Mapping[str, object]]) -> Path:
    """Write {key: {ending: content}}; pictures are given by a number."""
    members = []
    for key, sample in samples.items():
        for kind, content in sample.items():
            packed = png(np.full((2, 2), content, np.uint8)) if isinstance(content, int) else str(content).encode()
            members.append((f"{key}.{kind}", packed))
    return write_tar(path, members)


def test_whole_numbers_in_cls_are_classes(tmp_path: Path) -> None:
    samples = {"0001": {"cls": "2\n", "png": 1}, "0000": {"png": 0, "cls": " 0"}, "0002": {"png": 2, "cls": "-1"}}
    images = open_data(str(shard(tmp_path / "x.tar", samples)))
    assert names(images) == ["0000.png", "0001.png", "0002.png"]
    assert images.classes == ("0", "1", "2") and labels(images) == [0, 2, -1]
    assert "1 of 3 have no label" in images.note and images.left_out == ""


def test_whole_numbers_are_the_classes_of_that_name_in_both_splits(tmp_path: Path) -> None:
    for split, numbers in (("train", [0, 2, 1]), ("val", [1, 0])):
        shard(tmp_path / f"{split}.tar", {f"{k}": {"png": 0, "cls": str(n)} for k, n in enumerate(numbers)})
    train, test, _ = labelled_splits(str(tmp_path))
    assert train.classes == test.classes == ("0", "1", "2") and labels(test) == [1, 0]
    large = {"a": {"png": 0, "cls": "10000000000"}, "b": {"png": 0, "cls": "7"}}  # no numbers of classes
    assert open_data(str(shard(tmp_path / "x.tar", large))).classes == ("10000000000", "7")


def test_names_in_cls_and_samples_with_missing_members(tmp_path: Path) -> None:
    samples: dict[str, dict[str, object]] = {"a": {"png": 1, "cls": "dog"}, "b": {"cls": "cat"}, "d": {"png": 3}}
    samples["c"] = {"PNG": 2, "cls": "cat"}
    images = open_data(str(shard(tmp_path / "x.tar", samples)))
    assert images.classes == ("cat", "dog") and labels(images) == [1, 0, -1]
    assert images.left_out == "1 samples that have a label and no image" and "1 of 3" in images.note


def test_a_field_of_json(tmp_path: Path) -> None:
    def described(**fields: object) -> str:
        return json.dumps(fields)

    samples: dict[str, dict[str, object]] = {
        "a": {"png": 1, "json": described(label="dog", kind=1, size=[1])},
        "b": {"png": 2, "json": described(label=None, kind=0, size=[2])},
        "c": {"png": 3, "json": "no json"},
    }
    where = shard(tmp_path / "x.tar", samples)
    images = open_data(str(where))
    assert images.classes == ("dog",) and labels(images) == [0, -1, -1]
    assert labels(open_data(Location(str(where), label="kind"))) == [1, 0, -1]
    with pytest.raises(Refusal, match=r"data_label=x is no field of \.json in .*; there is label, kind, size"):
        open_data(Location(str(where), label="x"))
    with pytest.raises(Refusal, match="data_label=size is of type list, and is no label"):
        open_data(Location(str(where), label="size"))
    two = shard(tmp_path / "y.tar", {"a": {"png": 1, "json": described(label=1, target=2)}})
    images = open_data(str(two))
    assert labels(images) is None and "choose one with data_label=NAME" in images.why_unlabelled
    assert images.left_out == "1 .json"
    none = shard(tmp_path / "z.tar", {"a": {"png": 1, "json": described(url="x")}})
    assert "no field of .json is called label or the like; there is url" in open_data(str(none)).why_unlabelled


def test_what_may_be_judged_need_not_have_labels(tmp_path: Path) -> None:
    for split, fields in (("train", ["x", "y"]), ("val", ["y"]), ("test", [])):
        samples = {f"{k}": {"png": k, "json": json.dumps({"kind": field})} for k, field in enumerate(fields)}
        shard(tmp_path / f"{split}.tar", samples or {"0": {"png": 9}})
    train, test, note = labelled_splits(Location(str(tmp_path), label="kind"))
    assert train.classes == test.classes == ("x", "y") and labels(test) == [1] and "val is judged on" in note


def test_the_picture_of_a_sample_is_chosen(tmp_path: Path) -> None:
    where = shard(tmp_path / "x.tar", {"a.b/1": {"png": 1, "seg.png": 2, "cls": "1"}, "a.b/2": {"png": 3, "cls": "0"}})
    images = open_data(str(where))
    assert names(images) == ["a.b/1.png", "a.b/2.png"] and images.left_out == "1 .seg.png"
    masks = open_data(Location(str(where), image="seg.png"))
    assert names(masks) == ["a.b/1.seg.png"] and labels(masks) == [1]
    both = str(shard(tmp_path / "y.tar", {"a": {"left.png": 1, "right.png": 2, "cls": "1"}}))
    with pytest.raises(Refusal, match=r"several pictures, \.left\.png, \.right\.png: choose .* data_image=ENDING"):
        open_data(both)
    assert int(open_data(Location(both, image=".Left.png")).read(0)[0, 0, 0]) == 1
    with pytest.raises(Refusal, match=r"data_image=jpg: no picture in .* ends so; there is \.left\.png, \.right\.png"):
        open_data(Location(both, image="jpg"))


def test_shards_whose_samples_have_the_same_keys(tmp_path: Path) -> None:
    for k in range(3):
        shard(tmp_path / f"{k:05d}.tar", {"0000": {"png": k, "cls": str(2 - k)}})
    images = open_data(str(tmp_path))
    assert names(images) == ["00000.tar:0000.png", "00001.tar:0000.png", "00002.tar:0000.png"]
    assert labels(images) == [2, 1, 0] and [int(images.read(i)[0, 0, 0]) for i in range(3)] == [0, 1, 2]
    shard(tmp_path / "00003.tar", {"0001": {"png": 3, "json": '{"target": 1}'}})
    with pytest.raises(Refusal, match=r"labels of .* are in \.target, cls: choose one field"):
        open_data(str(tmp_path))


def test_of_many_shards_few_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.data.tar.KEPT_OPEN", 2)
    for k in range(5):
        shard(tmp_path / f"s-{k}.tar", {f"{k}": {"png": k}})
    images, before = open_data(str(tmp_path)), len(os.listdir("/proc/self/fd"))
    assert [int(images.read(i % 5)[0, 0, 0]) for i in range(10)] == [0, 1, 2, 3, 4] * 2
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del images
    assert len(os.listdir("/proc/self/fd")) == before


def test_braces() -> None:
    assert braced("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert braced("{a,b}/{1..0}") == ["a/1", "a/0", "b/1", "b/0"] and braced("x{") == ["x{"]


def test_a_run_stores_where_shards_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "s-0.tar", [("cat/1.png", b"x")])
    monkeypatch.chdir(tmp_path)
    assert place("s-{0..1}.tar") == str(tmp_path / "s-{0..1}.tar") and place("t-{0..1}.tar") == "t-{0..1}.tar"


def test_options_of_columns_go_with_archives_and_not_with_folders(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png")
    with pytest.raises(Refusal, match="data_label=x goes with hf:NAME or tar archives"):
        open_data(Location(str(tmp_path), label="x"))
