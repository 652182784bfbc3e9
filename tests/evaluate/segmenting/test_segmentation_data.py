"""Images with masks: folders, what is refused, and the built-in scenes."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from common.data import open_data
from common.errors import Refusal
from evaluate.segmenting.data import IGNORED, Scenes, compose, open_scenes

MASK = np.array([[0, 1, 2, 255], [2, 2, 0, 1]], np.uint8)


def put(folder, name, mask=MASK, image=None, mode=None):
    """An image and its mask: folder is (images, masks)."""
    for place in folder:
        place.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*mask.shape[:2], 3), 90, np.uint8) if image is None else image
    Image.fromarray(pixels).save(folder[0] / f"{name}.png")
    picture = Image.fromarray(mask) if mode is None else Image.fromarray(mask, mode)
    picture.save(folder[1] / f"{name}.png")


def folders(root, split, style="kind first"):
    kinds = ("images", "masks")
    return [root / kind / split if style == "kind first" else root / split / kind for kind in kinds]


def fill(root, style="kind first", train=MASK, test=MASK):
    put(folders(root, "train", style), "a", train)
    put(folders(root, "train", style), "b", train)
    put(folders(root, "val", style), "c", test)
    return root


def pixels_of(scenes: Scenes, i: int) -> list[list[int]]:
    return scenes.mask(i).tolist()


@pytest.mark.parametrize("style", ["kind first", "split first"])
def test_two_layouts_of_folders(tmp_path, style):
    train, test, note = open_scenes(str(fill(tmp_path, style)))
    assert (len(train), len(test)) == (2, 1) and train.classes == test.classes == ("0", "1", "2")
    assert pixels_of(train, 0) == [[0, 1, 2, IGNORED], [2, 2, 0, 1]] and "as split" in note
    assert train.pixels.tolist() == [[2, 2, 3]] * 2 and train.read(0).shape == (3, 2, 4)
    part = train.subset([1])
    assert part.pixels.tolist() == [[2, 2, 3]] and part.name(0).endswith("b.png") and pixels_of(part, 0)[0][1] == 1
    assert part.fingerprint() != train.fingerprint()


def test_one_mask_may_serve_many_images_and_what_is_not_read_is_said(tmp_path):
    (images, masks) = folders(fill(tmp_path), "train")
    (images / "c.png").write_bytes((images / "a.png").read_bytes())
    (images / "again.png").symlink_to("a.png")
    (images / "photo.heic").write_text("x")
    (masks / "c.png").symlink_to("a.png")
    train, _, _ = open_scenes(str(tmp_path))
    assert len(train) == 3 and pixels_of(train, 2) == pixels_of(train, 0)
    assert "1 .heic" in train.left_out and "again.png is a.png" in train.subset([0]).left_out


def test_without_splits_a_fixed_fifth_is_held_out(tmp_path):
    for k in range(10):
        put([tmp_path / "images", tmp_path / "masks"], f"{k}")
    train, test, note = open_scenes(str(tmp_path))
    assert (len(train), len(test)) == (8, 2) and "fixed fifth" in note
    names = {split.name(i) for split in (train, test) for i in range(len(split))}
    assert len(names) == 10
    assert [test.name(i) for i in range(2)] == [open_scenes(str(tmp_path))[1].name(i) for i in range(2)]


@pytest.mark.parametrize("names", ["images annotations training validation", "Images Annotations Training VALIDATION"])
def test_ade20k_leaves_label_0_out(tmp_path, names):
    images, annotations, *splits = names.split()
    for split in splits:
        mask = np.array([[0, 1, 150, 255]], np.uint8)
        put([tmp_path / images / split, tmp_path / annotations / split], "x", mask)
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n" + "".join(f"{k}\tthing {k}\n" for k in range(1, 151)))
    train, test, note = open_scenes(str(tmp_path))
    assert pixels_of(train, 0) == [[IGNORED, 0, 149, IGNORED]] and len(test) == 1 and "label 0 is ignored" in note
    assert train.classes is not None and train.classes[0] == "thing 1" and len(train.classes) == 150


def test_grey_images_have_the_channels_that_are_asked_for(tmp_path):
    for split in ("train", "val"):
        put(folders(tmp_path, split), "a", image=np.full((2, 4), 7, np.uint8))
    train = open_scenes(str(tmp_path))[0]
    assert (
        train.read(0, 3).unique().tolist() == [7] and train.read(0, 3).shape[0] == 3 and train.read(0, 1).shape[0] == 1
    )


def colours(root):
    put(folders(root, "train"), "z", np.zeros((2, 4, 3), np.uint8))


def other_size(root):
    put(folders(root, "train"), "z", MASK, image=np.zeros((3, 4, 3), np.uint8))


def no_mask(root):
    Image.fromarray(np.zeros((2, 4, 3), np.uint8)).save(folders(root, "train")[0] / "lonely.png")


def beyond(root):
    (root / "classes.txt").write_text("sky\nsea\n")


def other_names(root):
    (root / "masks" / "train" / "classes.txt").write_text("sky\nsea\nland\n")
    (root / "masks" / "val" / "classes.txt").write_text("sky\nland\nsea\n")


def new_label(root):
    put(folders(root, "val"), "d", MASK + 5)


def no_test(root):
    (folders(root, "val")[0] / "c.png").unlink()


def jpeg(root):
    image = folders(root, "train")
    Image.fromarray(np.zeros((2, 4, 3), np.uint8)).save(image[0] / "j.png")
    Image.fromarray(MASK).save(image[1] / "j.jpg")


def broken(root):
    (folders(root, "train")[1] / "a.png").write_bytes(b"no picture")


def black_and_white(root):
    for split in ("train", "val"):
        for name in ("a", "b", "c"):
            put(folders(root, split), name, np.where(MASK == 1, 255, 0).astype(np.uint8))


def two_bits(root):
    """Grey, 4 pixels in a byte: 0, 1, 2, 3. PIL cannot write such a PNG, and would read 0, 85, 170, 255."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 4, 2, 2, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0\x1b\0\x1b"))]
    chunks = [struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
              for kind, data in [*parts, (b"IEND", b"")]]  # fmt: skip
    (folders(root, "train")[1] / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def enormous(root):
    put(folders(root, "train"), "z", np.full((2, 4), 40_000, np.uint16))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (colours, r"z\.png is a picture of mode RGB: expected a PNG of one channel"),
        (other_size, r"of 4x2 pixels and its image .*z\.png of 4x3"),
        (no_mask, r"1 of 3 images in .* no mask .*: lonely\.png"),
        (beyond, r"has label 2: expected 0 to 1 of 2 classes"),
        (other_names, r"train.* has sky, sea, land; .*val.* has sky, land, sea"),
        (new_label, r"training masks have labels 0, 1, 2, test masks 0, 1, 2, 4, 5, 6, 7"),
        (no_test, r"no test images in .*val"),
        (jpeg, r"j\.jpg is a JPEG, which changes values"),
        (black_and_white, r"has one class, 0: .* write masks of black and white as 0 and 1"),
        (broken, r"a\.png cannot be read"),
        (two_bits, r"a\.png is a grey PNG of less than 8 bits a pixel"),
        (enormous, r"z\.png has label 40000: expected class indices below 32,768"),
    ],
)
def test_one_line_for_each_mistake(tmp_path, spoil, says):
    spoil(fill(tmp_path))
    with pytest.raises(Refusal, match=says) as refusal:
        open_scenes(str(tmp_path))
    assert "\n" not in str(refusal.value) and refusal.value.status == 2


def test_classes_without_a_training_pixel_are_named(tmp_path):
    fill(tmp_path)
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\nship\n")
    train, test, note = open_scenes(str(tmp_path))
    assert "1 classes have no training pixel: ship" in note
    assert train.pixels.shape == (2, 4) and test.pixels.shape == (1, 4)


def test_no_folder_of_masks(tmp_path):
    with pytest.raises(Refusal, match="segmentation needs masks"):
        open_scenes("cifar10")
    with pytest.raises(Refusal, match="has no masks that are found: expected images/training"):
        open_scenes(str(tmp_path))


def test_built_in_scenes_are_made_of_items():
    scenes = compose("test", 12)
    assert scenes.classes is not None and scenes.classes[0] == "background" and len(scenes.classes) == 11
    again = compose("test", 12)
    assert scenes.fingerprint() == again.fingerprint() != compose("train", 12).fingerprint()
    for i in range(12):
        image, mask = scenes.read(i, 1)[0].numpy(), scenes.mask(i).numpy()
        assert image.shape == mask.shape == (64, 64) and ((image > 0) == (mask > 0)).all()
        assert scenes.pixels[i].sum() == 64 * 64 and 1 <= (scenes.pixels[i][1:] > 0).sum() <= 4
    items = open_data("builtin", "test")
    assert items.labels is not None
    stock = {}
    for k in range(len(items)):
        item = items.read(k, 1)[0].numpy()
        stock[boxed(np.where(item > 24, item, 0)).tobytes()] = int(items.labels[k])
    alone = [(scenes.read(i, 1)[0].numpy(), scenes.mask(i)) for i in range(12) if (scenes.pixels[i] > 0).sum() == 2]
    found = [
        (stock[boxed(image).tobytes()], int(mask.max()) - 1) for image, mask in alone if boxed(image).tobytes() in stock
    ]
    assert len(found) >= 2 and all(label == said for label, said in found)


def boxed(image: np.ndarray) -> np.ndarray:
    rows, columns = np.flatnonzero(image.any(1)), np.flatnonzero(image.any(0))
    return np.ascontiguousarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
