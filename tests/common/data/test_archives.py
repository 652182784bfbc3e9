"""Tar archives, archives of archives and shards: the same images, in the same order, as the folder they came from."""

import gzip
import io
import os
import pickle
import signal
import tarfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import Member, save
from pictures import write_tar as write

from common.batches.sampler import StepSampler
from common.batches.samples import Batch, Samples, loader
from common.batches.views import View
from common.data import Images, Location, Unreadable, labelled_splits, open_data
from common.data.tar_index import Index, Wanted, build
from common.errors import Refusal


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "poslabel" / "archives"


# ---------------------------------------------------------------------------- archives, written


def picture(value: int = 0, ending: str = ".png") -> bytes:
    file = Path(os.environ["XDG_CACHE_HOME"]) / f"x{ending}"
    return save(file, np.full((2, 2), value, np.uint8)).read_bytes()


def files_in(folder: Path) -> list[Member]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in paths]


def as_tar(folder: Path, place: Path) -> str:
    return str(write(place / "images.tar", files_in(folder)))


def as_tar_of_tars(folder: Path, place: Path) -> str:
    inner = [write(place / f"{one.name}.tar", files_in(one)) for one in sorted(folder.iterdir())]
    return str(write(place / "outer" / "images.tar", [(path.name, path.read_bytes()) for path in inner]))


def as_shards(folder: Path, place: Path) -> str:
    """Five shards, picture after picture, with the class in .cls."""
    shards: list[list[Member]] = [[] for _ in range(5)]
    for k, (name, content) in enumerate(files_in(folder)):
        label = name.partition("/")[0].encode()
        shards[k % 5] += [(name, content), (f"{name.partition('.')[0]}.cls", label)]
    for k, members in enumerate(shards):
        write(place / f"shard-{k:02d}.tar", members)
    return str(place / "shard-{00..04}.tar")


CAT = [("cat/1.png", b"x" * 700), ("dog/2.png", b"y" * 700)]
WAYS: dict[str, Callable[[Path, Path], str]] = {"tar": as_tar, "tar of tars": as_tar_of_tars, "shards": as_shards}


def names(images: Images) -> list[str]:
    return [images.source.relative(i) for i in images.source_indices()]  # type: ignore[attr-defined]


def labels(images: Images) -> list[int] | None:
    return None if images.labels is None else images.labels.tolist()


# ---------------------------------------------------------------------------- the same as a folder


@pytest.mark.parametrize("way", WAYS)
def test_the_same_images_as_in_the_folder(images: Path, tmp_path: Path, way: str) -> None:
    folder, archive = open_data(str(images)), open_data(WAYS[way](images, tmp_path))
    assert names(archive) == names(folder) and labels(archive) == labels(folder)
    assert archive.classes == folder.classes == ("left", "middle", "right")
    for i in range(0, len(folder), 5):
        assert archive.read(i).equal(folder.read(i)) and archive.read(i, 1).equal(folder.read(i, 1))
    assert archive.fingerprint() == folder.fingerprint() and archive.stamp() != folder.stamp()
    twice = pickle.loads(pickle.dumps(archive.subset([3, 1])))
    assert names(twice) == [names(folder)[3], names(folder)[1]] and twice.read(0).equal(folder.read(3))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # four processes on two cores
@pytest.mark.parametrize("way", WAYS)
def test_batches_are_those_of_the_folder(images: Path, tmp_path: Path, way: str) -> None:
    """By any number of workers and of processes."""
    views = {"global": View(size=16, count=1, flip=0.5)}

    def batches(where: str, workers: int, rank: int = 0, ranks: int = 1) -> list[Batch]:
        sampler = StepSampler(96, 8, 0, 5, 0, rank, ranks)
        return list(loader(Samples(open_data(where), views, 0, 3, labelled=["it"]), sampler, workers, pin=False))

    def same(one: Batch, *parts: Batch) -> bool:
        crops = torch.cat([part.views["global"] for part in parts])
        labels = torch.cat([part.draws["it/label"] for part in parts])
        return one.views["global"].equal(crops) and one.draws["it/label"].equal(labels)

    expected, where = batches(str(images), 0), WAYS[way](images, tmp_path)
    for workers in (0, 1, 4):
        assert all(map(same, expected, batches(where, workers)))
    assert all(map(same, expected, batches(where, 0, 0, 2), batches(where, 0, 1, 2)))
    assert not all(map(same, expected, expected[1:]))


def test_archives_of_an_archive_may_have_folders(tmp_path: Path) -> None:
    inner = write(tmp_path / "i.tar", [("./deep/1.png", picture(1)), ("2.png", picture(2))]).read_bytes()
    members = [("./all/cat.tar", inner), ("all/dog.tar", inner), ("all/notes.tar.gz", b"x")]
    images = open_data(str(write(tmp_path / "o.tar", members)))
    assert names(images) == ["all/cat/2.png", "all/cat/deep/1.png", "all/dog/2.png", "all/dog/deep/1.png"]
    assert images.left_out == "1 .gz" and int(images.read(1)[0, 0, 0]) == 1
    assert labels(images) is None and "data_train=all" in images.why_unlabelled
    assert labels(open_data(Location(str(tmp_path / "o.tar"), train="all"))) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("train", "judged"),
    [
        ("train.tar", "val.tar"),
        ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
        ("cars_train.tar", "cars_test.tar"),
        ("in-train-0{k}.tar", "in-validation-{k}.tar"),
        ("train/0000{k}.tar", "val/0000{k}.tar"),
    ],
)
def test_splits_are_archives_beside_each_other(tmp_path: Path, train: str, judged: str) -> None:
    for k in range(2):
        members = [(f"{name}/{k}.png", picture(k)) for name in ("cat", "dog")]
        write(tmp_path / train.format(k=k), members)
        write(tmp_path / judged.format(k=k), members[:1])
    ways = [str(tmp_path)] if "/" in train else [str(tmp_path), str(tmp_path / train.replace("{k}", "{0,1}"))]
    for where in ways:
        first, second, note = labelled_splits(where)
        count = 2 if "{k}" in train else 1
        assert (len(first), len(second)) == (2 * count, count) and note.startswith("as split in")
        assert second.classes == ("cat", "dog") and labels(second) == [0] * count
    assert len(open_data(Location(str(tmp_path), train=Path(judged.format(k=0)).parts[0].split("-0.tar")[0]))) == count


def test_an_archive_that_is_named_is_trained_on(tmp_path: Path) -> None:
    members = [(f"{name}/1.png", picture()) for name in ("cat", "dog")]
    for name in ("photos", "val", "more"):
        write(tmp_path / f"{name}.tar", members)
    alone = Location(str(tmp_path / "photos.tar"))
    with pytest.raises(Refusal, match="no test split"):
        open_data(alone, "test")  # val.tar beside it may be of anything
    for name in ("val", "val.tar", str(tmp_path / "val.tar")):
        assert len(open_data(Location(alone.spec, validation=name), "test")) == 2
    assert len(open_data(str(tmp_path / "val.tar"))) == 2
    with pytest.raises(Refusal, match=r"more, photos, val, and no training|no training split, among more, photos, val"):
        open_data(str(tmp_path))
    with pytest.raises(Refusal, match=r"data_train=x: no such archive in .*; there is more, photos, val"):
        open_data(Location(str(tmp_path), train="x"))
    with pytest.raises(Refusal, match=r"data_validation=x: no such archive, nor a folder in .*; .*: cat, dog"):
        open_data(Location(alone.spec, validation="x"), "test")


def test_splits_and_a_folder_around_all_in_one_archive(tmp_path: Path) -> None:
    parts = ("train/cat", "train/dog", "val/cat", "val/dog", "val/dog/more")
    where = write(tmp_path / "set.tar", [(f"set-160/{part}/1.png", picture()) for part in parts])
    train, test, note = labelled_splits(str(where))
    assert names(train) == ["cat/1.png", "dog/1.png"] and names(test) == ["cat/1.png", "dog/1.png", "dog/more/1.png"]
    assert train.name(1) == f"{where}/set-160/train/dog/1.png" and labels(test) == [0, 1, 1]
    assert note == f"as split in {where}: train is trained on, val is judged on"
    images = open_data(Location(str(where), train="."))
    assert images.classes == ("train", "val") and len(images) == 5  # as it is said
    swapped = Location(str(where), train="val", validation="train")
    assert len(open_data(swapped)) == 3 and len(open_data(swapped, "test")) == 2


def test_a_lone_class_of_a_test_archive_is_one_that_training_has(tmp_path: Path) -> None:
    write(tmp_path / "train.tar", [(f"{name}/1.png", picture()) for name in ("cat", "dog")])
    write(tmp_path / "val.tar", [("dog/2.png", picture())])
    assert labels(labelled_splits(str(tmp_path))[1]) == [1]
    write(tmp_path / "val.tar", [("fox/2.png", picture()), ("dog/2.png", picture())])
    with pytest.raises(Refusal, match="train has cat, dog, test has dog, fox"):
        labelled_splits(str(tmp_path))


def test_images_unpacked_beside_their_archive_are_read(tmp_path: Path) -> None:
    write(tmp_path / "img_train.tar", CAT)
    save(tmp_path / "train" / "a" / "2.png")
    assert open_data(str(tmp_path)).where == f"{tmp_path}/train"
    write(tmp_path / "backup" / "old.tar", CAT)
    save(tmp_path / "backup" / "2.png")
    assert open_data(str(tmp_path / "backup")).left_out == "1 .tar"


@pytest.mark.parametrize("archive", ["train.tar", "train/s-0.tar"])
def test_images_and_archives_that_could_both_be_meant(tmp_path: Path, archive: str) -> None:
    write(tmp_path / archive, CAT)
    save(tmp_path / "example.png")
    with pytest.raises(Refusal, match=rf"has images, and archives .* such as data=.*{archive}, or say data_train=\."):
        open_data(str(tmp_path))
    assert len(open_data(Location(str(tmp_path), train="."))) == 1


# ---------------------------------------------------------------------------- odd members


def test_odd_members_are_counted_or_left_out(tmp_path: Path) -> None:
    where = tmp_path / "odd.tar"
    long = "/".join(["d" * 60] * 4) + "/" + "ü" * 60 + ".png"
    with tarfile.open(where, "w", format=tarfile.GNU_FORMAT) as archive:

        def add(name: str, content: bytes = b"", **fields: object) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in fields.items():
                setattr(member, key, value)
            archive.addfile(member, io.BytesIO(content))

        add("cat", type=tarfile.DIRTYPE)
        add("./cat//1.png", picture(1))
        add("cat/1.png", picture(2))  # written once more: tar -r
        add("dog/2.png", type=tarfile.LNKTYPE, linkname="cat/1.png")
        add("dog/3.png", type=tarfile.LNKTYPE, linkname="nowhere.png")
        add("dog/4.png", type=tarfile.SYMTYPE, linkname="../cat/1.png")
        add("dog/5", type=tarfile.FIFOTYPE)
        add(long, picture(5))
        for hidden in ("._1.png", ".git/2.png", "__MACOSX/cat/1.png", "Thumbs.db", "cat/../x.png"):
            add(hidden, picture(9))
        add("notes.txt", b"x")
        add("photo.HEIC", b"x")
    images = open_data(str(where))
    assert names(images) == ["cat/1.png", long, "dog/2.png"]
    assert [int(images.read(i)[0, 0, 0]) for i in range(3)] == [2, 5, 2]
    assert images.name(0) == f"{where}/cat/1.png"
    for words in ("1 .txt", "1 .heic", "1 symbolic link(s)", "1 link(s) to no picture in it", "1 FIFO",
                  "1 images that later ones of the same name replace"):  # fmt: skip
        assert words in images.left_out, words


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_format(tmp_path: Path, format_: int) -> None:
    name = f"{'a' * 90}/{'b' * 90}.png"
    images = open_data(str(write(tmp_path / "x.tar", [(name, picture(7))], format_)))
    assert names(images) == [name] and int(images.read(0)[0, 0, 0]) == 7


def test_plain_headers_are_read_as_tarfile_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [picture(k, ending) for k, ending in enumerate((".png", ".jpg"))]
    for format_ in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        named = [(f"{'a' * length}/{'b' * 60}.png", made[length % 2]) for length in range(1, 154, 9)]
        where = str(write(tmp_path / f"{format_}.tar", [*named, ("ü/1.png", made[0]), ("empty.jpg", b"")], format_))
        ours = build(where, Wanted(frozenset({".png", ".jpg"})))
        assert len(ours.ends) == len(named) + 2
        with monkeypatch.context() as patch:
            patch.setattr("common.data.tar_index.plain_run", lambda handle, place, end: ([], place))
            theirs = build(where, Wanted(frozenset({".png", ".jpg"})))
        assert ours.names() == theirs.names() and ours.facts == theirs.facts
        assert (ours.offsets == theirs.offsets).all() and (ours.sizes == theirs.sizes).all()


def test_names_that_are_no_text(tmp_path: Path) -> None:
    where = write(tmp_path / "x.tar", [("cat/\udcff.png", picture(7)), ("dog/1.png", b"")], tarfile.GNU_FORMAT)
    images = open_data(str(where))
    assert images.name(0) == f"{where}/cat/\\xff.png" and int(images.read(0)[0, 0, 0]) == 7
    with pytest.raises(Unreadable, match=r"x\.tar/dog/1\.png: the file is empty"):
        images.read(1)


# ---------------------------------------------------------------------------- what is refused, in one line


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.tar", CAT).read_bytes()
    assert len(open_data(str(tmp_path / "whole.tar"))) == 2
    for end in (0, 100, 512, 1000, 1212, 1400, 1536, 1600, 2048, 3072):  # in a header, a content, between members
        where = tmp_path / f"{end}.tar"
        where.write_bytes(whole[:end])
        with pytest.raises(Refusal, match=rf"{end}\.tar (is cut short|is no tar archive|is damaged)") as refusal:
            open_data(str(where))
        assert "\n" not in str(refusal.value)
    (tmp_path / "bare.tar").write_bytes(whole[:3584])  # one block of the end mark is enough
    assert len(open_data(str(tmp_path / "bare.tar"))) == 2


def test_an_archive_in_an_archive_cut_short_is_refused(tmp_path: Path) -> None:
    inner = write(tmp_path / "i.tar", CAT).read_bytes()
    for end in (3072, 2600):
        where = write(tmp_path / "o.tar", [("a.tar", inner[:end]), ("b.tar", inner)])
        with pytest.raises(Refusal, match=r"o\.tar/a\.tar is cut short"):
            open_data(str(where))


def test_what_is_no_plain_archive_is_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.tar", CAT).read_bytes()
    damaged = bytearray(whole)
    damaged[1536 + 3] ^= 1  # of the second header
    cases = {
        "damaged.tar": (bytes(damaged), "is damaged at byte 1,536"),
        "twice.tar": (whole + whole, r"goes on after its end mark at byte .*tar --concatenate"),
        "packed.tar": (gzip.compress(whole), r"compressed \(gzip\).*gunzip --keep"),
        "x.tar.gz": (gzip.compress(whole), "is compressed.*gunzip"),
        "text.tar": (b"hello " * 200, "is no tar archive"),
        "none.tar": (bytes(10240), "no images in .*there is nothing in it; expected images"),
    }
    (tmp_path / "in").mkdir()
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refusal, match=message) as refusal:
            open_data(str(tmp_path / name))
        assert "\n" not in str(refusal.value)
    with pytest.raises(Refusal, match=r"only other files \(1 \.gz\).*undo the compression of a \.tar and name that"):
        open_data(str((tmp_path / "x.tar.gz").rename(tmp_path / "in" / "x.tar.gz").parent))
    write(tmp_path / "other.tar", [("a.txt", b"x"), ("b.heic", b"y")])
    with pytest.raises(Refusal, match=r"only other members \(1 \.txt, 1 \.heic\)"):
        open_data(str(tmp_path / "other.tar"))
    for spec, message in {"absent.tar": "no such file: .*in braces", "w{ho,hy,hom}le.tar": "2 of 3 archives"}.items():
        with pytest.raises(Refusal, match=message):
            open_data(str(tmp_path / spec))
    with pytest.raises(Refusal, match="means 1,000,000,000 archives"):
        open_data(str(tmp_path / "{1..1000000000}.tar"))


@pytest.mark.slow
@pytest.mark.parametrize("format_", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_bytes_that_changed_are_refused_or_read(tmp_path: Path, format_: int) -> None:
    inner = write(tmp_path / "i.tar", CAT).read_bytes()
    members = [*CAT, ("d" * 120 + "/ü.png", b"z"), ("a.png", b"z"), ("a.json", b'{"label": 3}'), ("i.tar", inner)]
    whole = write(tmp_path / "whole.tar", members, format_).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(5000):
        content = np.frombuffer(whole, np.uint8).copy()
        content[rng.integers(0, len(whole.rstrip(b"\0")) + 512, 3)] ^= (1 << rng.integers(0, 8, 3)).astype(np.uint8)
        (tmp_path / "x.tar").write_bytes(content[: rng.integers(1, 2 * len(content))].tobytes())
        try:
            build(str(tmp_path / "x.tar"), Wanted(frozenset({".png"})))
        except Refusal as refusal:
            refused += 1
            assert "\n" not in str(refusal)
    assert 2000 < refused < 5000


def test_what_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x.tar", CAT)

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name, message in (("os.listdir", "cannot list .*Permission"), ("builtins.open", r"cannot read .*x\.tar: Perm")):
        with monkeypatch.context() as patch, pytest.raises(Refusal, match=message):
            patch.setattr(name, forbidden)
            open_data(str(tmp_path))


# ---------------------------------------------------------------------------- the index


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    where = write(tmp_path / "x.tar", [("a/1.png", picture(1)), ("b/1.png", picture(2))])
    before = open_data(str(where))
    (kept,) = cache.glob("*.safetensors")
    before_change = kept.read_bytes()
    assert not list(tmp_path.glob("*.safetensors"))

    def unread(*_: object) -> None:
        raise AssertionError("read again")

    with monkeypatch.context() as patch:
        patch.setattr("common.data.tar_index.members", unread)
        again = open_data(str(where))
        assert again.fingerprint() == before.fingerprint() and labels(again) == [0, 1]
    write(where, [("a/1.png", picture(3)), ("b/1.png", picture(4)), ("b/2.png", picture(5))])
    assert names(open_data(str(where))) == ["a/1.png", "b/1.png", "b/2.png"]
    (new,) = cache.glob("*.safetensors")  # in place of the old one
    assert new == kept and new.read_bytes() != before_change
    with pytest.raises(Unreadable, match="has changed since it was indexed: start again"):
        again.read(0)
    new.write_bytes(new.read_bytes()[:-9])  # damaged: made again
    assert len(open_data(str(where))) == 3


def test_an_index_that_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = write(tmp_path / "x.tar", [("a/1.png", picture(1))])
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    images = open_data(str(where))
    assert len(images) == 1 and "nor could the index be kept for the next time: " in images.left_out


def test_several_processes_build_one_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    where, built = str(write(tmp_path / "x.tar", CAT)), tmp_path / "built"

    def slowly(*given: Any) -> Index:
        with built.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return build(*given)

    monkeypatch.setattr("common.data.tar_index.build", slowly)
    processes = [get_context("fork").Process(target=open_data, args=(where,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0] and built.read_text() == "x"


def test_a_process_killed_while_it_writes_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    where = str(write(tmp_path / "x.tar", CAT))
    with monkeypatch.context() as patch:  # written aside, not yet renamed
        patch.setattr("common.checkpoints.storage.sync", lambda path: os.kill(os.getpid(), signal.SIGKILL))
        process = get_context("fork").Process(target=open_data, args=(where,))
        process.start()
        process.join()
    assert process.exitcode == -signal.SIGKILL and not list(cache.glob("*.safetensors"))
    assert len(open_data(where)) == 2  # though the other one had the lock
    assert [path.suffix for path in cache.iterdir() if path.suffix != ".lock"] == [".safetensors"]
