"""Names of splits and columns: which part of a data set is trained on, which is judged on, and what is left open."""

import datasets
import numpy as np
import pytest
from pictures import save

from common.data import Location, labelled_splits, open_data
from common.data.location import changed_location, place
from common.data.splits import TEST, TRAIN, UNLABELLED, VALIDATION, role_of
from common.errors import Refusal
from evaluate.segmenting.data import open_scenes

TWO = "a/1 a/2 b/1 b/2"


def fill(root, *splits, classes=TWO):
    """Images `classes` in each of the `splits`; a name that ends with / is an empty folder."""
    for split in splits:
        if split.endswith("/"):
            (root / split).mkdir(parents=True)
        else:
            for name in classes.split():
                save(root / split / f"{name}.png", np.zeros((2, 2), np.uint8))
    return root


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (
            TRAIN,
            "train Train TRAINING train2017 train_images trainset train-00 trainval ILSVRC2012_img_train trainA "
            "imagesTrain",
        ),
        (VALIDATION, "val Valid validation VAL2017 dev eval evaluation val_256x256 held-out validation_set"),
        (TEST, "test Testing test2017 test-dev2017 testset test.v2 test-a"),
        (UNLABELLED, "unlabeled2017 unlabelled"),
        (None, "cat trains training_shoes freight_train testtube validated evening device images data 2017 trying"),
    ],
)
def test_roles_by_name(role, names):
    assert {name: role_of(name) for name in names.split()} == dict.fromkeys(names.split(), role)


@pytest.mark.parametrize(
    ("splits", "train", "judged"),
    [
        ("Train Test", "Train", "Test"),
        ("training testing", "training", "testing"),
        ("train2017 val2017", "train2017", "val2017"),
        ("TRAIN Dev extra", "TRAIN", "Dev"),
        ("train valid", "train", "valid"),
        ("images/train images/val", "images/train", "images/val"),
        ("set/Training set/Eval", "set/Training", "set/Eval"),
        ("cars_train cars_test", "cars_train", "cars_test"),
        ("seg_pred seg_train seg_test", "seg_train", "seg_test"),
        ("public_test train_aug private_val", "train_aug", "public_test"),
        ("train/train test/test", "train/train", "test/test"),
        ("set/x-Train set/x-Val cars_test/", "set/x-Train", "set/x-Val"),
    ],
)
def test_splits_by_other_names(tmp_path, splits, train, judged):
    fill(tmp_path, *splits.split())
    images = open_data(str(tmp_path))
    assert (images.where, images.classes, len(images)) == (str(tmp_path / train), ("a", "b"), 4)
    name = train.rpartition("/")[2]
    assert f"{name} is trained on" in images.note
    first, second, note = labelled_splits(str(tmp_path))
    assert (first.where, second.where) == (str(tmp_path / train), str(tmp_path / judged))
    assert f"{name} is trained on, {judged.rpartition('/')[2]} is judged on" in note


@pytest.mark.parametrize(
    ("splits", "says"),
    [
        ("val test", r"has test/, val/, and no training split: .* data_train=NAME, or data_train=\. for all of it"),
        ("Test", r"has Test/, and no training split"),
        ("cat dog test", r"has test/ beside cat/, dog/, and no training split"),
        ("train training", r"train, training are all training splits by their names"),
        ("train trainval val", r"train, trainval are all training splits"),
        ("trainA trainB testA", r"trainA, trainB are all training splits"),
        ("train/ val", r"no images in .*train, the training split"),
        ("cat/train cat/test dog/train dog/test", r"splits inside of its sub-folders, cat/train and cat/test"),
    ],
)
def test_names_that_leave_open_what_is_trained_on_are_refused(tmp_path, splits, says):
    fill(tmp_path, *splits.split())
    with pytest.raises(Refusal, match=says) as refusal:
        open_data(str(tmp_path))
    assert "data_train=" in str(refusal.value) and "\n" not in str(refusal.value)
    assert len(open_data(Location(str(tmp_path), train="."))) == 4 * len([s for s in splits.split() if s[-1] != "/"])


def test_parts_are_chosen_by_name(tmp_path):
    fill(tmp_path, "train", "training", "test", "testing", "judge")
    images = open_data(Location(str(tmp_path), train="training"))
    assert images.part == "training" and "train is not used" not in images.note.partition(";")[0]
    with pytest.raises(Refusal, match=r"test, testing have the same role .* data_validation=NAME"):
        labelled_splits(Location(str(tmp_path), train="training"))
    chosen = Location(str(tmp_path), train="training", validation="judge")
    assert labelled_splits(chosen)[1].part == "judge"
    with pytest.raises(Refusal, match=r"data_train=trian: no such folder .*; its sub-folders: judge, test, "):
        open_data(Location(str(tmp_path), train="trian"))
    pixels = b"\0\0\x08\x03" + (1).to_bytes(4, "big") * 3 + b"\0"
    (tmp_path / "train-images-idx3-ubyte").write_bytes(pixels)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (1).to_bytes(4, "big") + b"\0")
    with pytest.raises(Refusal, match=r"data_train=train goes with a folder of images, tar archives, or hf:NAME"):
        open_data(Location(str(tmp_path), train="train"))
    with pytest.raises(Refusal, match=r"data_label=x goes with hf:NAME or tar archives, and data=builtin is none"):
        open_data(Location("builtin", label="x"))


def test_a_class_may_be_called_like_a_split(tmp_path):
    fill(tmp_path / "bus", "train", "bus", "car", classes="1 2")
    images = open_data(str(tmp_path / "bus"))
    assert images.classes == ("bus", "car", "train") and "train is taken for a class" in images.note
    for number, names in enumerate((["invalid", "valid"], ["bullet_train", "car", "test_tube"], ["crash_test", "dog"])):
        fill(tmp_path / f"{number}", *names, classes="1 2")
        assert open_data(str(tmp_path / f"{number}")).classes == tuple(names)


def test_masks_are_no_class(tmp_path):
    fill(tmp_path / "1", "images/training", "images/validation", "annotations/training", classes="1 2")
    images = open_data(str(tmp_path / "1"))
    assert images.where.endswith("images/training") and images.classes is None and "not annotations" in images.note
    fill(tmp_path / "2", "train/images", "train/masks", "val/images", classes="1 2")
    assert open_data(str(tmp_path / "2")).where.endswith("train/images")


def test_a_class_that_one_split_lacks(tmp_path):
    fill(tmp_path, "train", classes="a/1 b/1 c/1")
    fill(tmp_path, "val", classes="c/1 c/2")
    _, test, note = labelled_splits(str(tmp_path))
    assert test.labels is not None and test.labels.tolist() == [2, 2] and test.classes == ("a", "b", "c")
    assert "2 of 3 classes have no test image: a, b" in note
    fill(tmp_path, "val", classes="z/1")
    with pytest.raises(Refusal, match="train has a, b, c, test has c, z; expected none that train lacks"):
        labelled_splits(str(tmp_path))


@pytest.mark.parametrize("layout", ["Images/{}/1 Masks/{}/1", "{}/images/1 {}/masks/1", "images/{}/1 annotations/{}/1"])
def test_splits_of_images_with_masks(tmp_path, layout):
    for split in ("Train", "val2017", "Testing"):
        for name in layout.format(split, split).split():
            if split != "Testing" or "ask" not in name:  # no masks are published of it
                save(tmp_path / f"{name}.png", np.array([[0, 1]], np.uint8))
    train, test, note = open_scenes(str(tmp_path))
    assert "Train" in train.where and "val2017" in test.where
    assert "Train is trained on, val2017 is judged on" in note
    if "annotations" not in layout:
        judged = open_scenes(Location(str(tmp_path), train="val2017", validation="Train"))[1]
        assert "Train" in judged.where
    with pytest.raises(Refusal, match=r"data_label=x goes with hf:NAME or tar archives"):
        open_scenes(Location(str(tmp_path), label="x"))
    with pytest.raises(Refusal, match=r"data_validation=dev: no such split of images .*Testing, Train, val2017"):
        open_scenes(Location(str(tmp_path), validation="dev"))


# ---------------------------------------------------------------------------- names and paths


def test_a_name_goes_before_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, "builtin")
    assert place("builtin") == "builtin" and place("./builtin") == str(tmp_path / "builtin")
    images = open_data("builtin")
    assert len(images) == 10_000 and "data=./builtin" in images.note
    assert "data=./builtin" in labelled_splits("builtin")[2]
    assert len(open_data("./builtin")) == 4
    (tmp_path / "mnist").mkdir()
    assert place("hf:mnist") == f"hf:{tmp_path / 'mnist'}" and place("hf:nobody/nothing") == "hf:nobody/nothing"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("~/builtin") == str(tmp_path / "builtin") and place("hf:~/mnist") == f"hf:{tmp_path / 'mnist'}"
    assert place("absent") == "absent" and len(open_data("~/builtin")) == 4


def test_other_data_share_no_settings():
    stored = {"data": "cifar10", "data_root": "/r", "data_label": "y", "images_seen": 3}
    assert changed_location(stored, {"data": None, "data_label": "z"}) == Location("cifar10", "/r", label="z")
    assert changed_location(stored, {"data": "stl10"}) == Location("stl10")
    assert changed_location({}, {}) == Location()


# ---------------------------------------------------------------------------- Hugging Face

IMAGE, TEXT, WHOLE, REAL = (
    datasets.Image(),
    datasets.Value("string"),
    datasets.Value("int64"),
    datasets.Value("float32"),
)


@pytest.fixture
def saved(tmp_path):
    """saved(train={column: values}, …) -> hf: of tables with images 0, 1, … beside these columns."""
    datasets.disable_progress_bars()

    def save_(features, **splits):
        tables = {}
        for split, columns in splits.items():
            files = [save(tmp_path / f"{k}.png", np.full((1, 1), k, np.uint8)).read_bytes() for k in range(4)]
            cells = [{"bytes": file, "path": None} for file in files]
            images = {name: cells for name, feature in features.items() if feature is IMAGE}
            tables[split] = datasets.Dataset.from_dict(images | columns, features=datasets.Features(features))
        datasets.DatasetDict(tables).save_to_disk(str(tmp_path / "saved"))
        return f"hf:{tmp_path / 'saved'}"

    return save_


def test_texts_are_labels_and_splits_have_other_names(saved):
    columns = {"Training": ["b", "a", None, "c"], "VAL": ["c", "c", "a", "a"], "test": [None] * 4}
    spec = saved({"image": IMAGE, "target": TEXT}, **{name: {"target": each} for name, each in columns.items()})
    train, test, note = labelled_splits(spec)
    assert train.classes == test.classes == ("a", "b", "c")
    assert [images.labels.tolist() for images in (train, test) if images.labels is not None] == [
        [1, 0, 2],
        [2, 2, 0, 0],
    ]
    assert "Training is trained on, VAL is judged on; 1 of 3 classes have no test image: b" in note
    assert labelled_splits(Location(spec, train="VAL", validation="VAL"))[0].part == "VAL"
    with pytest.raises(Refusal, match=r"data_train=trian: no such split in .*; there is 'Training', 'VAL', 'test'"):
        open_data(Location(spec, train="trian"))


def test_files_in_a_column_of_bytes_are_images_if_it_is_chosen(saved, tmp_path):
    file = save(tmp_path / "x.png", np.full((1, 1), 9, np.uint8)).read_bytes()
    spec = saved({"raw": datasets.Value("binary"), "class": WHOLE}, train={"raw": [file] * 2, "class": [0, 1]})
    with pytest.raises(Refusal, match="has no image column"):
        open_data(spec)
    assert int(open_data(Location(spec, image="raw")).read(1)[0, 0, 0]) == 9


def test_true_and_false_are_labels(saved):
    spec = saved({"image": IMAGE, "class": datasets.Value("bool")}, train={"class": [True, False, None, True]})
    images = open_data(spec)
    assert images.classes == ("False", "True") and images.labels is not None and images.labels.tolist() == [1, 0, -1, 1]


def test_several_columns_are_refused_until_one_is_chosen(saved):
    features = {"mask": IMAGE, "picture": IMAGE, "label": WHOLE, "category": WHOLE}
    spec = saved(features, train={"label": [0, 1, 0, 1], "category": [0, 0, 1, 1]})
    with pytest.raises(Refusal, match=r"several columns of images, mask, picture: choose one with data_image=NAME"):
        open_data(spec)
    images = open_data(Location(spec, image="picture"))
    assert images.labels is None and "several columns may be labels, label, category" in images.note
    with pytest.raises(Refusal, match=r"no labels .* several columns .* data_label=NAME \(--data-label NAME\)"):
        labelled_splits(Location(spec, image="picture"))
    images = open_data(Location(spec, image="picture", label="category"))
    assert images.labels is not None and images.labels.tolist() == [0, 0, 1, 1]
    for wrong, says in (({"image": "label"}, "holds no images"), ({"image": "x"}, "no such column")):
        with pytest.raises(Refusal, match=says):
            open_data(Location(spec, **wrong))


def test_the_finer_labels_are_those_of_cifar100_and_real_numbers_are_none(saved, tmp_path):
    classes = datasets.ClassLabel(names=["p", "q"])
    spec = saved(
        {"img": IMAGE, "fine_label": classes, "coarse_label": classes},
        train={"fine_label": [0, 1, 1, 1], "coarse_label": [0, 0, 0, 1]},
    )
    images = open_data(spec)
    assert images.labels is not None and images.labels.tolist() == [0, 1, 1, 1] and "not coarse_label" in images.note
    spec = saved({"image": IMAGE, "label": REAL}, train={"label": [0.5, 1, 1, 0]})
    with pytest.raises(Refusal, match="label is of type float32, and is no label"):
        labelled_splits(spec)
    with pytest.raises(Refusal, match=r"data_label=label: that column of .* is of type float32"):
        open_data(Location(spec, label="label"))


def test_capital_names_of_folders_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    fill(tmp_path / "set", "Train", "Test")
    train, test, note = labelled_splits(f"hf:{tmp_path / 'set'}")
    assert len(train) == len(test) == 4 and "Train is trained on, Test is judged on" in note
