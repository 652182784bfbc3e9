"""Folders of every shape, the built-in extract, and what is said when nothing can be read."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pictures import photo, save, write_idx

from common.data import Images, Location, Unreadable, labelled_splits, open_data
from common.data.arrays import EXTRACT, EXTRACT_SPLITS
from common.errors import Refusal

ROOT = Path(__file__).resolve().parents[3]

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
SOURCE = os.environ.get("POSLABEL_FASHION_MNIST")  # a folder with the whole set, to compare the extract with


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path_factory):
    """No network, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))

    def refused(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.socket.connect", refused)
    monkeypatch.setattr("socket.getaddrinfo", refused)


# ---------------------------------------------------------------------------- folders


def labels(images: Images) -> list[int]:
    assert images.labels is not None
    return images.labels.tolist()


def names(images: Images) -> list[str]:
    return [os.path.relpath(images.name(i), images.where) for i in range(len(images))]


def test_flat_folder(tmp_path):
    for name in ("b.PNG", "a.png", ".hidden.png", "notes.txt"):
        save(tmp_path / name) if name.lower().endswith("png") else (tmp_path / name).write_text("x")
    images = open_data(str(tmp_path))
    assert names(images) == ["a.png", "b.PNG"] and images.labels is None and images.classes is None
    with pytest.raises(Refusal, match="no test split"):
        open_data(str(tmp_path), "test")


def test_first_level_folders_are_classes(tmp_path):
    for name in ("dog/1.png", "cat/deep/er/2.png", "cat/1.png", "ünï/1.png", ".git/1.png"):
        save(tmp_path / name)
    images = open_data(str(tmp_path))
    assert names(images) == ["cat/1.png", "cat/deep/er/2.png", "dog/1.png", "ünï/1.png"]
    assert images.classes == ("cat", "dog", "ünï")
    assert labels(images) == [0, 0, 1, 2]


def test_classes_are_in_the_order_of_their_own_names(tmp_path):
    for name in ("a/1.png", "a-b/1.png", "a-b/2.png", "a0/1.png"):  # a-b/1.png comes before a/1.png
        save(tmp_path / name)
    images = open_data(str(tmp_path))
    assert names(images) == ["a-b/1.png", "a-b/2.png", "a/1.png", "a0/1.png"]
    assert images.classes == ("a", "a-b", "a0") and labels(images) == [1, 1, 0, 2]


@pytest.mark.parametrize("extra", ["1.png", None])
def test_no_classes_beside_loose_images_or_in_one_folder(tmp_path, extra):
    save(tmp_path / "cat/1.png")
    if extra:
        save(tmp_path / "dog/1.png")
        save(tmp_path / extra)
    assert open_data(str(tmp_path)).labels is None


def test_linked_folders_are_followed_without_end(tmp_path):
    save(tmp_path / "data/a/1.png")
    save(tmp_path / "elsewhere/2.png")
    (tmp_path / "data/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/a/dangling").symlink_to(tmp_path / "nothing")
    images = open_data(str(tmp_path / "data"))
    assert names(images) == ["a/1.png", "b/2.png"]


def test_given_splits(tmp_path):
    for name in ("train/cat/1.png", "train/dog/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/3.png"):
        save(tmp_path / name)
    train, test, note = labelled_splits(str(tmp_path))
    assert names(train) == ["cat/1.png", "dog/1.png", "dog/2.png"] and names(test) == ["cat/3.png", "dog/3.png"]
    assert "as split" in note
    save(tmp_path / "test/4.png")  # unlabelled: cannot judge
    assert names(open_data(str(tmp_path), "test")) == ["cat/3.png", "dog/3.png"]
    save(tmp_path / "val/fox/1.png")
    with pytest.raises(Refusal, match=r"train has cat, dog, test has cat, dog, fox"):
        labelled_splits(str(tmp_path))


def test_train_may_be_a_class(tmp_path):
    for name in ("train/1.png", "bus/1.png"):
        save(tmp_path / name)
    assert open_data(str(tmp_path)).classes == ("bus", "train")


def test_one_folder_is_divided_by_class(tmp_path):
    for label, count in (("a", 10), ("b", 5), ("c", 1)):
        for k in range(count):
            save(tmp_path / label / f"{k}.png", np.zeros((2, 2), np.uint8))
    train, test, note = labelled_splits(str(tmp_path))
    assert labels(test) == [0, 0, 1] and "20%" in note
    assert sorted(names(train) + names(test)) == names(open_data(str(tmp_path)))
    assert names(labelled_splits(str(tmp_path))[1]) == names(test)


def test_subset_and_pickle(tmp_path):
    for k in range(4):
        save(tmp_path / f"{'ab'[k % 2]}/{k}.png", np.full((2, 2), k, np.uint8))
    images = open_data(str(tmp_path))  # a/0 a/2 b/1 b/3
    twice = images.subset([3, 1, 0]).subset(np.array([True, False, True]))
    for copy in (twice, pickle.loads(pickle.dumps(twice))):
        assert names(copy) == ["b/3.png", "a/0.png"] and labels(copy) == [1, 0] and len(copy) == 2
        assert copy.read(0)[0, 0, 0] == 3
    for wrong in (-1, 2):
        with pytest.raises(IndexError):
            twice.read(wrong)
    with pytest.raises(IndexError):
        images.subset([4])


def test_fingerprint_follows_the_content_not_the_place(tmp_path):
    for place in ("x", "y"):
        save(tmp_path / place / "a/1.png")
        save(tmp_path / place / "b/1.png")
    x, y = open_data(str(tmp_path / "x")), open_data(str(tmp_path / "y"))
    assert x.fingerprint() == y.fingerprint() and x.subset([0]).fingerprint() != x.fingerprint()
    save(tmp_path / "y/b/1.png", photo(50, 60))
    assert open_data(str(tmp_path / "y")).fingerprint() != x.fingerprint()
    (tmp_path / "x/b").rename(tmp_path / "x/c")
    assert open_data(str(tmp_path / "x")).fingerprint() != y.fingerprint()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "the folder is empty"),
        (lambda p: (p / "a.txt").write_text("x"), r"only other files \(1 \.txt\)"),
        (lambda p: (p / "a.parquet").write_text("x"), "data=hf:PATH"),
    ],
)
def test_folder_without_images(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(Refusal, match=message):
        open_data(str(tmp_path))


def test_wrong_names(tmp_path):
    with pytest.raises(Refusal, match="did you mean 'fashion-mnist'"):
        open_data("fashionmnist")
    with pytest.raises(Refusal, match="no such folder"):
        open_data(str(tmp_path / "absent"))
    with pytest.raises(Refusal, match=r"is a file; expected a folder"):
        open_data(str(save(tmp_path / "a.png")))
    with pytest.raises(Refusal, match="split='val'"):
        open_data("builtin", "val")
    with pytest.raises(Refusal, match=r"no labels in .*name labelled images: --data LABELLED"):
        labelled_splits(str(tmp_path))


# ---------------------------------------------------------------------------- built-in and arrays


def test_extract_is_balanced_and_small():
    assert EXTRACT.stat().st_size < 4.9 * 2**20
    assert "Zalando" in EXTRACT.with_suffix(".LICENSE").read_text(encoding="utf-8")
    for split, each in EXTRACT_SPLITS.items():
        images = open_data("builtin", split)
        assert len(images) == 10 * each and images.classes is not None and images.labels is not None
        assert np.bincount(images.labels[:30]).tolist() == [3] * 10  # every piece is balanced
        assert np.bincount(images.labels).tolist() == [each] * 10
        assert images.read(0).shape == (3, 28, 28) and images.read(0, 1).float().std() > 10
    assert open_data("builtin").fingerprint() == open_data("builtin").fingerprint()
    assert open_data("builtin").name(7) == "builtin[7]"


def write_mnist(folder: Path, gz: str = ".gz", count: int = 6) -> None:
    for k, stem in enumerate(("train", "t10k")):
        pixels = np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4) + k
        write_idx(folder / f"{stem}-images-idx3-ubyte{gz}", pixels)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{gz}", np.arange(count, dtype=np.uint8) % 2)


@pytest.mark.parametrize(("inner", "gz"), [("", ".gz"), ("", ""), ("raw", ""), ("FashionMNIST/raw", ".gz")])
def test_idx_files_by_path_and_by_root(tmp_path, inner, gz):
    write_mnist(tmp_path / inner, gz)
    for images in (open_data(str(tmp_path), "test"), open_data(Location("fashion-mnist", str(tmp_path)), "test")):
        assert len(images) == 6 and labels(images) == [0, 1] * 3
        assert images.read(1, channels=1)[0, 0].tolist() == [17, 18, 19, 20]
    assert open_data(str(tmp_path)).classes == ("0", "1")
    assert "Ankle boot" in (open_data(Location("fashion-mnist", str(tmp_path))).classes or ())


def test_fashion_mnist_in_the_cache_and_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr("common.data.arrays.DEBIAN", tmp_path / "debian")
    with pytest.raises(Refusal, match=r"fashion-mnist is not here: looked in .*debian.*poslabel"):
        open_data("fashion-mnist", download=False)
    with pytest.raises(Refusal, match="fetching it failed"):
        open_data("fashion-mnist")
    write_mnist(Path(os.environ["XDG_CACHE_HOME"]) / "poslabel" / "FashionMNIST" / "raw")
    assert len(open_data("fashion-mnist", download=False)) == 6
    with pytest.raises(Refusal, match="no such folder"):
        open_data(Location("fashion-mnist", str(tmp_path / "typo")))


def test_idx_files_that_are_none(tmp_path):
    write_mnist(tmp_path, "")
    whole = (tmp_path / "train-images-idx3-ubyte").read_bytes()
    (tmp_path / "train-images-idx3-ubyte").write_bytes(whole[:-1])
    with pytest.raises(Refusal, match="not a whole IDX file"):
        open_data(str(tmp_path))
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((5, 4, 4), np.uint8))
    with pytest.raises(Refusal, match="5 images"):
        open_data(str(tmp_path))


def test_cifar_through_torchvision(tmp_path, monkeypatch):
    class Fake:
        base_folder = "cifar-10-batches-py"
        classes = ("cat", "dog")

        def __init__(self, root, train=True, download=False):
            if not (Path(root) / self.base_folder).is_dir():
                raise RuntimeError("Dataset not found or corrupted.")
            self.data = np.full((2, 32, 32, 3), (1, 2, 3), np.uint8)
            self.targets = [1, 0] if train else [0, 0]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Fake)
    with pytest.raises(Refusal, match="cifar10 is not here: looked in"):
        open_data(Location("cifar10", str(tmp_path)))
    (tmp_path / Fake.base_folder).mkdir()
    images = open_data(Location("cifar10", str(tmp_path)))
    assert labels(images) == [1, 0]
    assert images.read(0).shape == (3, 32, 32) and images.read(0)[:, 5, 5].tolist() == [1, 2, 3]


def test_stl_has_unlabelled_images_after_the_labelled(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    upright = np.zeros((3, 3, 96, 96), np.uint8)
    upright[2, :, 0, 95] = 9  # top right corner of the third image
    stored = upright.swapaxes(2, 3)  # the files hold columns first
    stored[:2].tofile(folder / "train_X.bin")
    stored[2:].tofile(folder / "unlabeled_X.bin")
    stored.tofile(folder / "test_X.bin")
    np.array([1, 2], np.uint8).tofile(folder / "train_y.bin")
    np.array([1, 2, 1], np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    images = open_data(Location("stl10", str(tmp_path)))
    assert labels(images) == [0, 1, -1]
    for copy in (images, pickle.loads(pickle.dumps(images))):
        assert copy.read(2)[:, 0, 95].tolist() == [9, 9, 9] and copy.read(2).sum() == 27
    train, test, _ = labelled_splits(Location("stl10", str(tmp_path)))
    assert len(train) == 2 and len(test) == 3


# ---------------------------------------------------------------------------- Hugging Face


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries again for 20 seconds
    datasets.disable_progress_bars()


def table(tmp_path: Path, colours: list, labels: list) -> datasets.Dataset:
    paths = [save(tmp_path / "source" / f"{k}.png", np.array([[c]], np.uint8)) for k, c in enumerate(colours)]
    rows = {"id": list(range(len(paths))), "picture": [{"bytes": p.read_bytes(), "path": None} for p in paths]}
    features = datasets.Features(
        {"id": datasets.Value("int64"), "picture": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    return datasets.Dataset.from_dict({**rows, "label": labels}, features=features)


def test_local_parquet(tmp_path, hub_cache):
    (tmp_path / "set").mkdir()
    table(tmp_path, [RED, BLUE, GREEN], [0, 1, -1]).to_parquet(tmp_path / "set" / "train.parquet")
    for spec in (f"hf:{tmp_path}/set", f"hf:{tmp_path}/set/train.parquet"):
        images = open_data(spec)
        assert images.classes == ("cat", "dog") and labels(images) == [0, 1, -1]
        assert images.read(1)[:, 0, 0].tolist() == list(BLUE) and images.name(1) == f"{spec}[1]"
        assert pickle.loads(pickle.dumps(images)).read(0)[:, 0, 0].tolist() == list(RED)
        with pytest.raises(Refusal, match="no test split"):
            open_data(spec, "test")
    with pytest.raises(Refusal, match=r"one image per class"):
        labelled_splits(spec)


def test_saved_splits_and_shuffled_rows(tmp_path, hub_cache):
    rows = table(tmp_path, [RED, GREEN, BLUE], [0, 1, 1])
    datasets.DatasetDict({"train": rows, "validation": rows.select([2, 0])}).save_to_disk(str(tmp_path / "saved"))
    train, test, _ = labelled_splits(f"hf:{tmp_path}/saved")
    assert [image.read(0)[:, 0, 0].tolist() for image in (train, test)] == [list(RED), list(BLUE)]
    assert labels(test) == [1, 0]
    assert train.fingerprint() != test.fingerprint()


def test_image_folder_through_datasets(tmp_path, hub_cache):
    for name in ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "test/dog/1.png"):
        save(tmp_path / "set" / name)
    train, test, _ = labelled_splits(f"hf:{tmp_path}/set")
    assert train.classes == ("cat", "dog") and len(train) == len(test) == 2
    assert torch.equal(train.read(0), torch.from_numpy(photo()).permute(2, 0, 1))


def test_plain_integers_are_labels_and_broken_cells_are_named(tmp_path, hub_cache):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int32")})
    rows = {"image": [{"bytes": b"junk", "path": None}, None], "label": [3, 0]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    images = open_data(f"hf:{tmp_path}/a.parquet")
    assert images.classes == ("0", "1", "2", "3") and labels(images) == [3, 0]
    for i in range(2):
        with pytest.raises(Unreadable, match=rf"a\.parquet\[{i}\]"):
            images.read(i)


def test_hugging_face_refusals(tmp_path, hub_cache):
    datasets.Dataset.from_dict({"text": ["x"], "n": [1]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(Refusal, match=r"no image column, only text \(string\), n \(int64\)"):
        open_data(f"hf:{tmp_path}/a.parquet")
    with pytest.raises(Refusal, match="no such file or folder"):
        open_data(f"hf:{tmp_path}/absent")
    with pytest.raises(Refusal, match="a name on the hub"):
        open_data("hf:nobody/nothing")
    with pytest.raises(Refusal, match=r"\.parquet or \.arrow"):
        open_data(f"hf:{save(tmp_path / 'x.png')}")


if SOURCE:  # only where the whole set lies: what the extract says of itself

    def test_extract_is_the_first_of_each_class():
        for split, each in EXTRACT_SPLITS.items():
            whole, ours = open_data("fashion-mnist", split, SOURCE), open_data("builtin", split)
            assert whole.labels is not None
            for label in range(10):
                chosen = np.flatnonzero(whole.labels == label)[:each]
                for k in (0, 1, each // 2, each - 1):
                    assert torch.equal(ours.read(10 * k + label), whole.read(int(chosen[k])))


@pytest.mark.timeout(120)
@pytest.mark.slow  # the hub's client tries again for half a minute
def test_a_hub_that_cannot_be_reached_is_one_line_that_says_how_to_fetch(tmp_path):
    words = [sys.executable, str(ROOT / "pretrain/run.py"), "data=hf:someone/something", f"run={tmp_path / 'run'}"]
    nowhere = {"HF_ENDPOINT": "http:" + "//127.0.0.1:9", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    ended = subprocess.run(words, env=os.environ | nowhere, capture_output=True, text=True)
    assert ended.returncode == 2 and not (tmp_path / "run").exists()
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: cannot open data=hf:someone/something: ")
    assert "datasets.load_dataset('someone/something')\" (kept in HF_HOME" in line
