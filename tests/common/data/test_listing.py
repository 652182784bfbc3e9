"""Which files of a folder are its images, what they are called, and by what they are known again."""

import os
import shutil
import socket
from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import save

from common.data import Images, Unreadable, labelled_splits, open_data
from common.data.listing import sample_of
from common.errors import Refusal
from common.printable import printable
from pretrain.checkpoints import touched


def names(images: Images) -> list[str]:
    return [os.path.relpath(images.name(i), images.where) for i in range(len(images))]


def labels(images: Images) -> list[int]:
    assert images.labels is not None
    return images.labels.tolist()


def test_one_file_is_one_image_however_many_links_lead_to_it(tmp_path):
    """Under its own name if it has one in there, else under the first link in the order of bytes."""
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("b/1.png", "b/2.png"):
        save(data / name)
    for name in ("deep/3.png", "4.png", "5.png"):
        save(out / name)
    (out / "blob").write_bytes((out / "5.png").read_bytes())
    links = {"a/same.png": "../b/1.png", "a/twice.png": "same.png", "again": "b", "up": ".", "z/out": "../../out/deep",
             "a/three.png": "../../out/deep/3.png", "a/four.png": "../../out/4.png", "c/four.png": "../../out/4.png",
             "c/named.png": "../../out/blob", "c/nowhere.png": "gone.png", "c/circle": "circle"}  # fmt: skip
    for name, target in links.items():
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).symlink_to(target)
    os.link(out / "5.png", data / "c/hard.png")
    os.link(out / "5.png", data / "c/link.png")
    images = open_data(str(data))
    expected = ["a/four.png", "b/1.png", "b/2.png", "c/hard.png", "c/link.png", "c/named.png", "c/nowhere.png"]
    assert names(images) == [*expected, "z/out/3.png"]
    assert images.classes == ("a", "b", "c", "z")
    for pair in (
        "a/same.png is b/1.png",
        "a/twice.png is b/1.png",
        "again/ is b/",
        "up/ is ./",
        "c/four.png is a/four",
    ):
        assert pair in images.left_out, images.left_out
    assert "14 names of images that are read under another name" in images.left_out  # 4 links, 2 in again, 8 in up
    assert "5 of these links stand in another class" in images.left_out and "links in all" not in images.left_out


def test_what_is_not_read_is_counted_and_said(tmp_path):
    for name in ("a/1.png", "b/1.png", "b/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/2.png", "lost+found/3.png"):
        save(tmp_path / name)
    for name in ("a/1.txt", "a/2.HEIC", "b/3.heic", "b/Thumbs.db", "b/noending", ".hidden.png", "a/desktop.ini"):
        (tmp_path / name).write_text("x")
    os.mkfifo(tmp_path / "a/pipe.png")
    (tmp_path / "a/to_pipe.png").symlink_to("pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tmp_path / "b/door.jpg"))
        images = open_data(str(tmp_path))
    assert names(images) == ["a/1.png", "b/1.png"] and images.classes == ("a", "b")
    for word in ("2 .heic", "1 .txt", "1 without an ending", "2 FIFO", "1 socket", "convert pictures to .png or .jpg"):
        assert word in images.left_out, images.left_out
    assert ".db" not in images.left_out and ".ini" not in images.left_out and "eaDir" not in images.left_out
    assert images.subset([1]).left_out == images.left_out
    os.remove(tmp_path / "a/1.png")
    os.remove(tmp_path / "b/1.png")
    with pytest.raises(Refusal, match=r"only other files \(2 \.heic, .*2 FIFO"):
        open_data(str(tmp_path))


def test_names_of_any_bytes(tmp_path):
    """Read under their own bytes; shown, and as classes, in text that can be printed and written anywhere."""
    encoded = save(tmp_path / "x.png").read_bytes()
    for name in (b"br\xf6ken/1.png", "ünï/2.png".encode(), b"z/\x1b[31mred\n\t.png", b"z/bad\xff.png"):
        path = os.path.join(os.fsencode(tmp_path / "data"), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"cut" if b"bad" in name else encoded)
    images = open_data(str(tmp_path / "data"))
    assert images.classes == ("br\\xf6ken", "z", "ünï") and labels(images) == [0, 1, 1, 2]
    shown = ["br\\xf6ken/1.png", "z/\\x1b[31mred\\n\\t.png", "z/bad\\xff.png", "ünï/2.png"]
    assert [images.name(i).removeprefix(f"{tmp_path}/data/") for i in range(4)] == shown
    assert images.read(0).shape == images.read(1).shape == images.read(3).shape
    with pytest.raises(Unreadable) as error:
        images.read(2)
    assert "bad\\xff.png: " in str(error.value) and str(error.value).encode() and len(images.fingerprint()) > 15


def test_printable():
    assert printable("ein Bär.png") == "ein Bär.png" and printable(printable(b"\xf6")) == "\\xf6"
    assert printable("b\udcc3\udca4r") == "bär"  # as Python has it where the locale is C
    assert printable("a\u202egpj\u2028\x00\x9b.png") == "a\\u202egpj\\u2028\\x00\\x9b.png"
    assert printable("\ud800") == "\\ud800"


def exchange(a: Path, b: Path) -> None:
    """Exchange two files as a user does who sorts them anew: their times go with them."""
    aside = a.with_name("aside")
    a.rename(aside)
    b.rename(a)
    aside.rename(b)


def of_classes(root: Path, count: int) -> Path:
    for k in range(2 * count):
        save(root / "ab"[k % 2] / f"{k // 2}.png", np.full((4, 4), 100 + k % 2, np.uint8))
    assert len({path.stat().st_size for path in root.rglob("*.png")}) == 1
    for path in root.rglob("*.png"):
        os.utime(path, ns=(10**18, 10**18))  # as an archive unpacks them: all of one time
    return root


def test_images_exchanged_between_classes_are_other_data(tmp_path):
    """Of equal size and age, and under the same names."""
    data = of_classes(tmp_path / "data", 3)
    before = open_data(str(data))
    fingerprint, first = before.fingerprint(), before._digest(first=True)
    assert before.has_fingerprint(fingerprint) and before.has_fingerprint(first) and len(first) == 16
    exchange(data / "a/0.png", data / "b/0.png")
    after = open_data(str(data))
    assert not after.has_fingerprint(fingerprint) and after.has_fingerprint(first)  # which covered less
    exchange(data / "a/0.png", data / "b/0.png")
    shutil.copytree(data, tmp_path / "copy", copy_function=shutil.copyfile)
    copy = open_data(str(tmp_path / "copy"))
    assert copy.has_fingerprint(fingerprint) and open_data(str(data)).has_fingerprint(fingerprint)
    assert copy.subset([0]).fingerprint() != fingerprint


@pytest.mark.parametrize("how", ["exchanged", "written", "kept its time"])
def test_one_image_among_many_changes_the_stamp(tmp_path, monkeypatch, how):
    """The content of none of them enters the fingerprint: only their stamp tells."""
    monkeypatch.setattr("common.data.images.MAX_CONTENTS", 1)
    data = of_classes(tmp_path / "data", 6)
    images = open_data(str(data))
    fingerprint, stamp, ages = images.fingerprint(), images.stamp(), images.ages()
    assert open_data(str(data)).stamp() == stamp
    if how == "exchanged":
        exchange(data / "a/3.png", data / "b/4.png")
    else:
        (data / "a/3.png").write_bytes((data / "b/3.png").read_bytes())
        if how == "kept its time":
            os.utime(data / "a/3.png", ns=(10**18, 10**18))
    after = open_data(str(data))
    assert after.fingerprint() == fingerprint and after.stamp() != stamp
    said = "written or exchanged" if how == "written" else "copied, renamed or exchanged"
    assert said in touched(ages, after.ages()) and touched(ages, ages) == touched("", ages) == ""
    assert touched(ages[:16], after.ages()) == (touched(ages, after.ages()) if how == "written" else "")  # stored once


def test_the_fingerprint_of_a_large_file_covers_its_middle_and_end(tmp_path):
    content, seen = bytearray(200_000), set()
    for place in (0, 100_001, 199_999):
        content[place] ^= 1
        (tmp_path / "x.png").write_bytes(content)
        seen.add(sample_of(str(tmp_path / "x.png")))
    assert len(seen) == 3
    os.mkfifo(tmp_path / "pipe")
    assert sample_of(str(tmp_path / "gone")) == b"missing!" and sample_of(str(tmp_path / "pipe"))  # and no waiting


@pytest.mark.parametrize("how", ["link", "folder", "both outside", "copy"])
def test_a_picture_that_is_trained_on_and_judged_is_said(tmp_path, how):
    data = tmp_path / "data"
    place = tmp_path / "out" if how == "both outside" else data / "train"
    for name in ("a/0.png", "a/1.png", "b/2.png"):
        save(place / name)
        if how == "both outside":
            (data / "train" / name).parent.mkdir(parents=True, exist_ok=True)
            (data / "train" / name).symlink_to(place / name)
    save(data / "val/b/other.png")
    if how == "folder":
        (data / "val/a").symlink_to("../train/a")
    else:
        (data / "val/a").mkdir()
        put = shutil.copyfile if how == "copy" else os.symlink
        put(place / "a/0.png", data / "val/a/x.png")
    note = labelled_splits(str(data))[2]
    count, first = {"link": ("1 of 2", "x"), "folder": ("2 of 3", "0"), "both outside": ("1 of 2", "x")}.get(
        how, ("", "")
    )
    assert ("WARNING" in note) == (how != "copy")
    if count:
        said = (
            f"{count} test images are training images too, by links ({data}/val/a/{first}.png is {data}/train/a/0.png"
        )
        assert said in note, note


def test_images_exchanged_in_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries again for 20 seconds
    data = of_classes(tmp_path / "data", 2)
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(data.rglob("*.png"))]

    def saved(name, cells):
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
        made = datasets.Dataset.from_dict({"image": cells, "label": [0, 0, 1, 1]}, features=features)
        made.save_to_disk(str(tmp_path / name))
        return open_data(f"hf:{tmp_path / name}")

    images = saved("first", cells)
    assert images.has_fingerprint(images.fingerprint()) and images.has_fingerprint(images._digest(first=True))
    assert open_data(f"hf:{tmp_path / 'first'}").stamp() == images.stamp()
    other = saved("second", [cells[2], cells[1], cells[0], cells[3]])
    assert other.fingerprint() != images.fingerprint() and other.stamp() != images.stamp()
    longer = saved("third", [cells[0], {"bytes": cells[1]["bytes"] + b"x", "path": None}, *cells[2:]])
    assert longer.fingerprint() != images.fingerprint()
    texts = Images(images.source, images.where, [0, 1, 0, 1], ("a", "b"))  # which were no labels once
    bare = Images(images.source, images.where)._digest(first=True)
    assert texts.has_fingerprint(bare) and not texts.has_fingerprint(images._digest(first=True))
    files = open_data(f"hf:{data}")  # a table of paths
    fingerprint, stamp = files.fingerprint(), files.stamp()
    exchange(data / "a/0.png", data / "b/0.png")
    assert files.fingerprint() != fingerprint and files.stamp() != stamp


# ------------------------------------------------------------------------------------------- kept for the next time


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A folder that counts as large, and as calm although it was just written; the cache folder is one of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("common.data.folder.LARGE", 3)
    monkeypatch.setattr("common.data.folder.CALM", -(10**12))
    for name in ("a/1.png", "b/deep/2.png", "b/\udcff.png", "notes.txt"):
        save(tmp_path / "data" / name) if name.endswith("png") else (tmp_path / "data" / name).write_text("no")
    return tmp_path / "data"


def kept_of(folder: Path) -> list[Path]:
    return list((folder.parent / "cache" / "poslabel" / "folders").glob("*.safetensors"))


def test_a_large_folder_is_listed_once(large, monkeypatch):
    before = open_data(str(large))
    assert len(kept_of(large)) == 1
    with monkeypatch.context() as patch:
        patch.setattr("common.data.folder.scan", lambda root: pytest.fail("listed again"))
        again = open_data(str(large))
        assert names(again) == names(before) == ["a/1.png", "b/deep/2.png", "b/\\xff.png"]
        assert labels(again) == labels(before) and again.classes == before.classes
        assert again.left_out == before.left_out == "1 .txt"
        assert again.fingerprint() == before.fingerprint() and again.stamp() == before.stamp()
        assert again.read(1).equal(before.read(1))


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "a folder", "damaged", "another folder"])
def test_a_folder_that_has_changed_is_listed_again(large, change):
    open_data(str(large))
    if change == "added":
        save(large / "b" / "deep" / "3.png")
    elif change == "removed":
        (large / "b" / "deep" / "2.png").unlink()
    elif change == "renamed":
        (large / "a" / "1.png").rename(large / "a" / "0.png")
    elif change == "a folder":
        save(large / "c" / "4.png")
    elif change == "damaged":
        (kept,) = kept_of(large)
        kept.write_bytes(kept.read_bytes()[:-7])
    else:
        shutil.move(large, large.with_name("old"))
        save(large / "other.png")
    expected = sorted(os.fsencode(path.relative_to(large)) for path in large.rglob("*.png"))
    images = open_data(str(large))
    assert [os.fsencode(images.source.relative(i)) for i in range(len(images))] == expected


def test_a_listing_that_may_be_out_of_date_is_not_kept(large, monkeypatch):
    with monkeypatch.context() as patch:  # written a moment ago: another change would not show in its times
        patch.setattr("common.data.folder.CALM", 2 * 10**9)
        open_data(str(large))
    assert not kept_of(large)
    (large / "link.png").symlink_to("a/1.png")  # what it leads to may change and no folder with it
    open_data(str(large))
    assert not kept_of(large)
    (large / "link.png").unlink()
    (large.parent / "cache" / "poslabel").mkdir(parents=True, exist_ok=True)
    (large.parent / "cache" / "poslabel" / "folders").write_text("no folder: nothing can be kept")
    assert len(open_data(str(large))) == 3
