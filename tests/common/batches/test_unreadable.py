"""How many images may be unreadable, and the look at them before anything begins."""

import time

import numpy as np
import pytest
import torch
from pictures import save

from common.batches import unreadable
from common.batches.unreadable import Limit, Look, look_at, read_list, write_list
from common.data import Images, open_data
from common.data.images import Arrays
from common.errors import Refusal


@pytest.mark.parametrize(
    ("max_bad", "images", "allowed"),
    [
        ("auto", 1, 0), ("auto", 9, 0), ("auto", 10, 1), ("auto", 49, 4), ("auto", 51, 5), ("auto", 599, 5),
        ("auto", 600, 6), ("auto", 1_281_167, 12_811), (0.01, 199, 1), (0.01, 200, 2), ("0.29", 100, 29),
        ("1 %", 300, 3), ("0.5%", 200, 1), (1, 1000, 1), ("3", 4, 3), (0, 1000, 0), ("1e-2", 100, 1),
    ],
)  # fmt: skip
def test_a_limit_is_exact(max_bad, images, allowed):
    limit = Limit(max_bad).check()
    assert limit.allowed(images) == allowed and Limit(max_bad, images).allowed(7) == allowed
    limit.refuse(allowed, images, images, "here")
    with pytest.raises(
        Refusal, match=rf"{allowed + 1:,} of {images:,} images in here cannot .* the {allowed:,} that max"
    ):
        limit.refuse(allowed + 1, images, images, "here", ["a.png: cut"])


@pytest.mark.parametrize("max_bad", ["many", -1, 1.5, "100%", "nan", "inf", None, True, "", "1/0"])
def test_what_is_no_limit(max_bad):
    with pytest.raises(Refusal, match=r"--max-bad .*: expected a share below 1"):
        Limit(max_bad, option="--max-bad ").check()


def test_a_sample_stands_for_all():
    """Of 1,000 among 100,000 images 12 bad ones may be chance, 30 are not: 1.6 % at least."""
    Limit(0.01).refuse(12, 1000, 100_000, "here")
    with pytest.raises(
        Refusal, match=r"30 of 1,000 looked at among 100,000 .* \(of all it would be 1,\d\d\d or more\)"
    ):
        Limit(0.01).refuse(30, 1000, 100_000, "here")


def folder_of(path, count, *broken):
    for k in range(count):
        save(path / f"{k:02d}.png", np.zeros((2, 2), np.uint8))
        if k in broken:
            (path / f"{k:02d}.png").write_bytes(b"cut")
    return open_data(str(path))


def test_a_look_at_all_splits_together(tmp_path, monkeypatch):
    train, test = folder_of(tmp_path / "a", 30, 4, 7), folder_of(tmp_path / "b", 5, 0)
    builtin = Images(Arrays(np.zeros((9, 2, 2), np.uint8), "memory"), "memory")
    look = look_at([train.subset(np.arange(3, 30)), test, builtin], 3)
    assert look.is_whole and look.images == 41
    assert [message.partition(":")[0] for message in look.bad] == [train.name(4), train.name(7), test.name(0)]
    lines = look.lines("they are left out", most=2)
    assert lines[0] == "warning: 3 of 41 images cannot be read; they are left out:" and "… and 1 more" in lines[-1]
    assert Look(5, 5).lines("") == [] and look_at([builtin], 3) == Look(9, 9)
    monkeypatch.setattr(unreadable, "LOOKED", 10)
    part = look_at([train, test], 3)
    assert (part.images, part.looked) == (35, 10) and part == look_at([train, test], 3)
    assert look_at([train], 3, stopped=lambda: True).looked <= 10


def test_a_look_ends_in_time_and_tells_how_far_it_has_come(monkeypatch):
    class Slow:
        def __len__(self):
            return 100

        def read(self, i, channels):
            time.sleep(0.02 if i % 50 else 30)  # two never come, as from a disk that has gone away
            return torch.zeros(3, 1, 1, dtype=torch.uint8)

        def name(self, i):
            return str(i)

    monkeypatch.setattr(unreadable, "usable_cores", lambda: 4)
    monkeypatch.setattr(unreadable, "SECONDS", 0.3)
    monkeypatch.setattr(unreadable, "OFTEN", 0.1)
    said, began = [], time.monotonic()
    look = look_at([Images(Slow(), "slow")], 3, said.append)
    assert 4 < look.looked < 98 and not look.is_whole and time.monotonic() - began < 4
    assert said and said[0].startswith("looking at the images: ") and "of 100 so far" in said[0]
    assert look.lines("")[0] == f"looked at {look.looked} of 100 images: all can be read"


def test_a_list_names_each_file_once(tmp_path):
    for names in (["ü.png: cut", "b: cut"], ["b: cut", "c: \ud800"]):
        write_list(tmp_path / "list.txt", names)
    assert (tmp_path / "list.txt").read_bytes() == "ü.png: cut\nb: cut\nc: \\ud800\n".encode()
    assert len(read_list(tmp_path / "list.txt")) == 3 and read_list(tmp_path / "none.txt") == set()
