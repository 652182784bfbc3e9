"""Reading labels: from both layouts, in batches beside their crops, and not from what is damaged or of others."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import write_tar
from PIL import Image

from common.batches.sampler import StepSampler
from common.batches.samples import Batch, Samples, loader
from common.batches.unreadable import Limit
from common.batches.views import View
from common.data import Images, Unreadable, open_data
from common.errors import Refusal
from pretrain.token_labels import maps
from pretrain.token_labels.packed import Packed
from pretrain.token_labels.reader import Labels, open_labels

from .conftest import CLASSES, GRID, IMAGES

NONE, SOME = Limit(0), Limit(4)
VIEWS = {"global": View(size=8, scale=[0.3, 0.9], flip=0.5, count=2)}


@pytest.fixture
def images(pictures: Path) -> Images:
    return open_data(str(pictures))


def write_files(labelled: Path, folder: Path, images: Images, name: Callable[[Path], str]) -> Path:
    """The same labels in the published layout, (2, k, H, W) float16 a file, `name` from an image's path."""
    packed = Packed(labelled)
    for i in range(len(images)):
        scores, ids = packed.record(i)
        file = folder / name(Path(images.name(i)))
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(torch.from_numpy(np.stack([scores.view(np.float16), ids.astype(np.float16)])), file)
    return folder


def same(one: Labels, other: Labels, i: int) -> bool:
    first, second = one.read(i), other.read(i)
    return all(np.array_equal(first[what], second[what]) and first[what].dtype == second[what].dtype for what in first)


# ---------------------------------------------------------------------------- both layouts


def test_labels_of_a_folder_are_those_of_an_archive_of_it(labelled: Path, pictures: Path, tmp_path: Path) -> None:
    files = [(str(path.relative_to(pictures)), path.read_bytes()) for path in pictures.rglob("*.png")]
    folder, archive = open_data(str(pictures)), open_data(str(write_tar(tmp_path / "pictures.tar", files)))
    of_folder, of_archive = (open_labels(labelled, images, CLASSES, NONE) for images in (folder, archive))
    assert all(same(of_folder, of_archive, i) for i in range(IMAGES))
    stored = write_files(labelled, tmp_path / "pt", folder, lambda path: f"{path.parent.name}/{path.stem}.pt")
    assert same(open_labels(stored, archive, CLASSES, NONE), of_folder, 3)


def test_a_packed_file_and_one_file_an_image_say_the_same(labelled: Path, images: Images, tmp_path: Path) -> None:
    packed = open_labels(labelled, images, CLASSES, NONE)
    folder = write_files(labelled, tmp_path, images, lambda path: f"{path.parent.name}/{path.stem}.pt")
    files = open_labels(folder, images, CLASSES, NONE)
    assert all(same(packed, files, i) for i in range(IMAGES))
    assert packed.read(3)["record"].shape == packed.blank()["record"].shape == (2, 5, GRID, GRID)
    assert (packed.top, packed.grid, packed.crop, files.grid) == (5, (GRID, GRID), None, (GRID, GRID))


def test_a_published_name_ends_at_its_first_dot(labelled: Path, images: Images, tmp_path: Path) -> None:
    """Where that is one image's alone: deep.cat.png and deep.dog.png would share a/deep.pt."""
    (tmp_path / "data/a").mkdir(parents=True)
    for name in ("deep.cat.png", "dog.png"):
        shutil.copy(images.name(0), tmp_path / "data/a" / name)
    data = open_data(str(tmp_path / "data"))
    write_files(labelled, tmp_path / "labels", data, lambda path: f"a/{path.name.partition('.')[0]}.pt")
    assert sorted(file.name for file in (tmp_path / "labels/a").iterdir()) == ["deep.pt", "dog.pt"]
    assert same(open_labels(tmp_path / "labels", data, CLASSES, NONE), open_labels(labelled, images, CLASSES, NONE), 0)
    shutil.copy(images.name(0), tmp_path / "data/a/deep.dog.png")
    with pytest.raises(Refusal, match=r"2 of 3 images .* have none \(.*deep\.cat\.png, .*deep\.dog\.png\)"):
        open_labels(tmp_path / "labels", open_data(str(tmp_path / "data")), CLASSES, NONE)


def test_labels_are_found_by_name_wherever_the_images_are(labelled: Path, images: Images, tmp_path: Path) -> None:
    """Some of the images, in another place, in another order."""
    whole = open_labels(labelled, images, CLASSES, NONE)
    moved = tmp_path / "elsewhere"
    shutil.copytree(str(Path(images.name(0)).parents[1]), moved)
    for i in (0, 4):
        (moved / "a" / f"picture.{i:02d}.png").unlink()
    some = open_data(str(moved))
    fewer = open_labels(labelled, some.subset([5, 2, 19]), CLASSES, NONE)
    for i in (5, 2, 19):
        name = "/".join(Path(some.name(i)).parts[-2:])
        there = next(j for j in range(IMAGES) if images.name(j).endswith(name))
        assert np.array_equal(fewer.read(i)["record"], whole.read(there)["record"])
    with pytest.raises(Unreadable, match="it has no labels"):
        fewer.read(0)


def test_labels_of_images_without_names_are_found_by_number(tmp_path: Path, weights: Path) -> None:
    from pretrain.generate_labels import main

    from .conftest import words

    out = tmp_path / "builtin.labels"
    given = words(tmp_path, weights, out)
    given[given.index("--data") + 1] = "builtin"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.generate_labels.open_data", lambda _: open_data("builtin").subset(range(30)))
        assert main(given) == 0
    builtin = open_data("builtin").subset(range(30))
    with pytest.raises(
        Refusal, match=r"30 images known by their number, and .* has 10,000 of the latter: .* other images"
    ):
        open_labels(out, builtin, CLASSES, NONE)


def test_a_process_that_gets_a_copy_opens_the_file_by_itself(labelled: Path, images: Images) -> None:
    labels = open_labels(labelled, images, CLASSES, NONE)
    copy = pickle.loads(pickle.dumps(labels))
    assert copy.packed._map is None and same(labels, copy, 7) and copy.packed._map is not None
    kept = copy.packed._map
    copy.read(8)
    assert copy.packed._map is kept
    assert len(pickle.dumps(labels)) < 20_000  # no record is in it


# ---------------------------------------------------------------------------- in batches


def batch(images: Images, labels: Labels | None, keys: list[tuple[int, int]]) -> Batch:
    beside = None if labels is None else {"dense": labels}
    return Samples(images, VIEWS, 0, 3, beside=beside).__getitems__(keys)


def test_a_batch_has_labels_and_places_and_the_crops_it_had_without_them(labelled: Path, images: Images) -> None:
    labels, keys = open_labels(labelled, images, CLASSES, NONE), [(2, 5), (2, 0), (3, 5), (0, 21)]
    plain, made = batch(images, None, keys), batch(images, labels, keys)
    assert torch.equal(plain.views["global"], made.views["global"]) and not plain.draws
    assert {name: (tuple(draw.shape), draw.dtype) for name, draw in made.draws.items()} == {
        "dense/record": ((4, 2, 5, GRID, GRID), torch.int16),
        "dense/box": ((4, 4), torch.float32),
        "dense/flip": ((4,), torch.bool),
        "dense/size": ((4, 2), torch.int64),
    }
    for row, (_, index) in enumerate(keys):
        assert np.array_equal(made.draws["dense/record"][row].numpy(), labels.read(index)["record"])
        assert made.draws["dense/size"][row].tolist() == [12, 20 + index_in_folder(index) % 3]
    assert len(set(map(tuple, made.draws["dense/box"].tolist()))) == 4 and made.draws["dense/flip"].any()


def test_a_part_of_the_images_has_its_own_labels(labelled: Path, images: Images) -> None:
    """Such as those that are trained on, and those held out."""
    labels = open_labels(labelled, images, CLASSES, NONE)
    made = batch(images.subset([5, 20, 2]), labels, [(0, 0), (0, 1), (0, 2)])
    for row, index in enumerate((5, 20, 2)):
        assert np.array_equal(made.draws["dense/record"][row].numpy(), labels.read(index)["record"])


def index_in_folder(index: int) -> int:
    """Number of a picture by that of its place in the list: those of folder a come first."""
    return 2 * index if index < IMAGES // 2 else 2 * (index - IMAGES // 2) + 1


def test_what_a_policy_moves_a_crop_by_is_in_the_batch(labelled: Path, images: Images) -> None:
    """And changes no pixel of it; without a policy nothing of it is said."""
    view = {"global": View(size=16, auto_augment="rand-m9-n2-mstd0.5")}
    labels, keys = open_labels(labelled, images, CLASSES, NONE), [(i, i % 20) for i in range(120)]
    made = Samples(images, view, 0, 3, beside={"dense": labels}).__getitems__(keys)
    plain = Samples(images, view, 0, 3).__getitems__(keys)
    moves = made.draws["dense/moves"]
    assert torch.equal(made.views["global"], plain.views["global"]) and moves.shape == (120, 2, 2)
    kinds = moves[..., 0]
    assert set(kinds.unique().tolist()) == {0, 1, 2, 3, 4, 5} and not moves[kinds == 0].any()
    with pytest.raises(Refusal, match="auto_augment=augmix-m3-w3: it lays differently moved pictures over each other"):
        Samples(images, {"global": View(size=16, auto_augment="augmix-m3-w3")}, 0, 3, beside={"dense": labels})


def test_the_box_is_that_of_the_first_crop(images: Images, labelled: Path) -> None:
    """Cut and resized by hand, the box and the flip give its pixels."""
    plain = {"global": View(size=8, scale=[0.3, 0.9], flip=0.5, count=2, jitter=0.0, grayscale=0.0)}
    labels = open_labels(labelled, images, CLASSES, NONE)
    keys = [(e, i) for e in range(3) for i in range(6)]
    made = Samples(images, plain, 0, 3, beside={"dense": labels}).__getitems__(keys)
    for row, (_, index) in enumerate(keys):
        image = images.read(index)
        sizes = torch.tensor(image.shape[1:]).repeat(2)
        top, left, height, width = (made.draws["dense/box"][row] * sizes).round().long().tolist()
        cut = image[:, top : top + height, left : left + width].permute(1, 2, 0).numpy()
        expected = Image.fromarray(cut).resize((8, 8), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        pixels = pixels.flip(-1) if made.draws["dense/flip"][row] else pixels
        assert (pixels.int() - made.views["global"][row].int()).abs().max() <= 2


def test_workers_make_the_same_batches(labelled: Path, images: Images) -> None:
    samples = Samples(images, VIEWS, 0, 3, beside={"dense": open_labels(labelled, images, CLASSES, NONE)})
    here, there = (list(loader(samples, StepSampler(IMAGES, 4, 0, 3), workers, False)) for workers in (0, 2))
    for one, other in zip(here, there, strict=True):
        assert all(torch.equal(one.draws[name], other.draws[name]) for name in one.draws)
        assert torch.equal(one.views["global"], other.views["global"])


def test_an_image_without_labels_counts_as_unreadable(labelled: Path, images: Images, tmp_path: Path) -> None:
    """Another takes its place, with that one's labels."""
    folder = write_files(labelled, tmp_path, images, lambda path: f"{path.parent.name}/{path.stem}.pt")
    (folder / "a/picture.06.pt").unlink()
    labels = open_labels(folder, images, CLASSES, SOME)
    assert labels.missing == [images.name(3)]
    made = batch(images, labels, [(0, 3), (0, 4)])
    assert len(made.unreadable) == 1 and "picture.06.png: it has no labels" in made.unreadable[0]
    other = [
        i for i in range(IMAGES) if i != 3 and np.array_equal(labels.read(i)["record"], made.draws["dense/record"][0])
    ]
    assert other
    shutil.rmtree(folder)
    made = batch(images, labels, [(0, 3), (0, 4)])
    assert made.hopeless and made.draws["dense/record"].shape == (2, 2, 5, GRID, GRID)


def test_a_record_unpacks_to_any_class_of_16_bits() -> None:
    scores, ids = np.array([[[1.5, -60000.0]]], np.float16), np.array([[[0, 65535]]], np.uint16)
    record = torch.from_numpy(np.stack([scores.view(np.uint16), ids]).view(np.int16))
    made, classes = maps.unpack(record[None])
    assert made[0].tolist() == scores.tolist() and classes[0].tolist() == ids.tolist()


def test_targets_are_made_of_a_batch(labelled: Path, images: Images) -> None:
    made = batch(images, open_labels(labelled, images, CLASSES, NONE), [(0, i) for i in range(8)])
    draws = {name.removeprefix("dense/"): draw for name, draw in made.draws.items()}
    scores, ids = maps.unpack(draws["record"])
    targets = maps.targets(scores, ids, CLASSES, draws["box"], draws["flip"], (3, 4), 0.1)
    assert targets.image.shape == (8, CLASSES) and targets.tokens.shape == (8, 12, CLASSES)
    torch.testing.assert_close(targets.tokens.sum(-1), torch.full((8, 12), 1 + 0.1 / CLASSES))


# ---------------------------------------------------------------------------- refused


def altered(labelled: Path, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    (folder / "altered.labels").write_bytes(change(labelled.read_bytes()))
    return folder / "altered.labels"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:-1000], r"it is cut off: [\d,]+ bytes, expected [\d,]+; copy it again"),
        (lambda data: data[:300], r"it is cut off in its header; copy it again"),
        (lambda data: data + b"more", r"it is longer than it should be: "),
        (lambda data: data.replace(b"format 1\n", b"format 0\n", 1), "format 0, and this version reads format 1: gen"),
        (
            lambda data: data.replace(b"format 1\n", b"format 2\n", 1),
            "format 2, and .* format 1: update poslabel",
        ),
        (lambda data: b"\x89PNG" + data, r"it is no file of dense labels; expected one made by generate_labels"),
        (lambda data: data.replace(b'"top": 5', b'"top": 0', 1), "its header says impossible things"),
        (lambda data: data.replace(b'"top"', b'"pot"', 1), "its header cannot be read .*generate it again"),
        (lambda data: data.replace(b"picture.03", b"picture.30", 1), "its list of images is damaged; copy it again"),
    ],
    ids=["truncated", "beheaded", "longer", "older", "newer", "another", "impossible", "unknown", "damaged"],
)
def test_a_file_that_is_not_whole_is_refused(
    change: Callable[[bytes], bytes], message: str, labelled: Path, images: Images, tmp_path: Path
) -> None:
    with pytest.raises(Refusal, match=rf"labels .*altered\.labels: .*{message}") as refused:
        open_labels(altered(labelled, tmp_path, change), images, CLASSES, SOME)
    assert "\n" not in str(refused.value)


def test_a_damaged_record_names_no_class_that_is_not_there(labelled: Path, images: Images, tmp_path: Path) -> None:
    path = altered(labelled, tmp_path, lambda data: data[:-2] + b"\xff\x00")  # the last number of the last record
    labels = open_labels(path, images, CLASSES, NONE)
    with pytest.raises(Unreadable, match=r"picture\.21\.png: its labels in .* name class 255: expected 0 to 6"):
        labels.read(IMAGES - 1)


def test_labels_of_others_are_refused(labelled: Path, images: Images, tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(Refusal, match=r"of 7 classes .* and the model has 10: expected labels and a model of the same"):
        open_labels(labelled, images, 10, SOME)
    with pytest.raises(
        Refusal, match=r"they are of 22 files, and .* has 10,000 of the latter: they are labels of other"
    ):
        open_labels(labelled, open_data("builtin"), CLASSES, SOME)
    with pytest.raises(Refusal, match="labels /nowhere: no such file or folder"):
        open_labels("/nowhere", images, CLASSES, SOME)
    for name in ("x", "y"):
        (tmp_path / "other" / name).mkdir(parents=True)
        shutil.copy(images.name(0), tmp_path / "other" / name / "z.png")
    with pytest.raises(Refusal, match=r"of other images: none of the 2 in .*other is among their 22 \(such as a/pict"):
        open_labels(labelled, open_data(str(tmp_path / "other")), CLASSES, SOME)
    shutil.copytree(pictures, tmp_path / "changed")
    for file in (tmp_path / "changed/a").iterdir():
        Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
    with pytest.raises(Refusal, match=r"picture\.\d\d\.png is another image than the one that was labelled under this"):
        open_labels(labelled, open_data(str(tmp_path / "changed")), CLASSES, SOME)


def test_missing_images_are_counted_and_borne_under_a_limit(
    labelled: Path, images: Images, tmp_path: Path, pictures: Path
) -> None:
    shutil.copytree(pictures, tmp_path / "more")
    for i in range(3):
        shutil.copy(images.name(i), tmp_path / f"more/a/added{i}.png")
    more = open_data(str(tmp_path / "more"))
    assert len(open_labels(labelled, more, CLASSES, SOME).missing) == 3
    message = r"3 of 25 images in .*more have none \(.*added0\.png, .*\), more than the 2 that max_bad=2 allows"
    with pytest.raises(Refusal, match=message):
        open_labels(labelled, more, CLASSES, Limit(2))


class Unsafe:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.full((2, 5, GRID, GRID), 9.0), "name class 9: expected 0 to 6, the model's 7 classes"),
        (torch.full((2, 5, GRID, GRID), -1.0), "hold numbers that are no logits and classes"),
        (torch.full((2, 5, GRID, GRID), 0.5), "hold numbers that are no logits and classes"),
        (torch.full((2, 5, GRID, GRID), torch.nan), "hold numbers that are no logits and classes"),
        (torch.zeros(2, 5, GRID, GRID + 1), r"have the shape \(2, 5, 2, 3\): expected \(2, 5, 2, 2\) as in"),
        (torch.zeros(5, GRID, GRID), r"hold \(5, 2, 2\): expected a tensor \(2, k, H, W\) of logits and classes"),
        ({"a": torch.zeros(1)}, "hold dict: expected a tensor"),
        (Unsafe(), r"cannot be read: .*"),
    ],
    ids=["class", "negative", "half", "nan", "shape", "cells", "mapping", "unsafe"],
)
def test_a_file_of_an_image_that_is_wrong_is_refused_and_nothing_in_it_is_run(
    content: Any, message: str, labelled: Path, images: Images, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = write_files(labelled, tmp_path, images, lambda path: f"{path.parent.name}/{path.stem}.pt")
    labels = open_labels(folder, images, CLASSES, NONE)
    torch.save(content, folder / "b/picture.21.pt")
    with pytest.raises(Refusal, match=rf"picture\.21\.pt {message}"):
        open_labels(folder, images, CLASSES, NONE)
    with pytest.raises(Unreadable, match=r"picture\.21"):  # where it is one of too many to look at all of them
        labels.read(IMAGES - 1)
    assert capsys.readouterr().out == ""


def test_a_folder_without_labels_is_refused(images: Images, labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"no \.pt file in it; expected <class>/<stem>\.pt"):
        open_labels(tmp_path, images, CLASSES, SOME)
    write_files(labelled, tmp_path, images, lambda path: f"other/{path.stem}.x.pt")
    with pytest.raises(Refusal, match="of other images: none of the 22"):
        open_labels(tmp_path, images, CLASSES, SOME)
    with pytest.raises(Refusal, match="a file an image goes with images in files"):
        open_labels(tmp_path, open_data("builtin"), CLASSES, SOME)
