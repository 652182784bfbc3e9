"""Which values of masks are classes: label 0, 255 and 65535, and values that are not as they were written."""

from pathlib import Path

import numpy as np
import pytest
from pictures import exif, png, tiff
from PIL import Image

from common.errors import Refusal
from evaluate.segmenting.data import IGNORED, open_scenes
from evaluate.segmenting.masks import Labels, read_mask


def write(root: Path, labels, *, classes: int = 0, dtype=np.uint8, ade: bool = True) -> str:
    """A data set of two images, in ADE20K's layout or with masks/, whose masks hold `labels`."""
    for split in ("training", "validation") if ade else ("train", "val"):
        images, masks = root / "images" / split, root / ("annotations" if ade else "masks") / split
        for folder in (images, masks):
            folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (len(labels), 1), (9, 9, 9)).save(images / "a.png")
        Image.fromarray(np.array([labels], dtype)).save(masks / "a.png")
    if classes:
        (root / "classes.txt").write_text("".join(f"kind {k}\n" for k in range(classes)))
    return str(root)


def opened(spec: str, reduce_zero: str = "auto") -> tuple[list[int], tuple[str, ...], str]:
    train, test, note = open_scenes(spec, reduce_zero=reduce_zero)
    assert train.mask(0).tolist() == test.mask(0).tolist() and train.classes is not None
    counts = [int((train.mask(0) == k).sum()) for k in range(len(train.classes))]
    assert train.pixels[0].tolist() == test.pixels[0].tolist() == counts
    return train.mask(0)[0].tolist(), train.classes, note


def test_label_0_counts_where_the_masks_hold_indices_of_classes_txt(tmp_path):
    values, classes, note = opened(write(tmp_path / "a", [0, 1, 2, 255], classes=3))
    assert values == [0, 1, 2, IGNORED] and classes == ("kind 0", "kind 1", "kind 2")
    assert "label 0 is a class, 255 means that there is none (3 classes; --reduce-zero-label no, or yes" in note
    values, _, note = opened(write(tmp_path / "b", [0, 1, 3, 255], classes=3))
    assert values == [IGNORED, 0, 2, IGNORED] and "label 0 is ignored, 255 means" in note
    values, classes, note = opened(write(tmp_path / "c", [0, 1, 150, 255]))  # ADE20K itself
    assert values == [IGNORED, 0, 149, IGNORED] and len(classes) == 150 and "label 0 is ignored" in note
    assert opened(write(tmp_path / "d", [0, 1, 7, 255], classes=150))[0] == [IGNORED, 0, 6, IGNORED]  # a part of it
    assert opened(write(tmp_path / "e", [0, 1, 2, 255], classes=3, ade=False))[0] == [0, 1, 2, IGNORED]


def test_labels_that_fit_both_ways_are_refused_and_not_shifted(tmp_path):
    for k, (labels, classes) in enumerate((([1, 2], 3), ([0, 1], 3), ([0, 1, 255], 3), (list(range(150)), 150))):
        spec = write(tmp_path / str(k), labels, classes=classes)
        with pytest.raises(
            Refusal, match=r"labels . to \d+ beside .* say --reduce-zero-label no if label 0 is .* class .kind 0., y"
        ):
            open_scenes(spec)
        first, last = opened(spec, "no")[0][0], opened(spec, "yes")[0][0]
        assert first == labels[0] and last == (labels[0] - 1 if labels[0] else IGNORED)


def test_the_option_goes_before_what_the_masks_hold(tmp_path):
    spec = write(tmp_path / "a", [0, 1, 2, 255], classes=3)
    values, _, note = opened(spec, "yes")
    assert values == [IGNORED, 0, 1, IGNORED] and "label 0 is ignored" in note and "reduce-zero" not in note
    fingerprints = {open_scenes(spec, reduce_zero=asked)[1].fingerprint() for asked in ("auto", "no", "yes")}
    assert len(fingerprints) == 2  # so that the two are never held against each other
    other = write(tmp_path / "b", [0, 1, 2, 255], ade=False)
    assert opened(other, "yes")[:2] == ([IGNORED, 0, 1, IGNORED], ("1", "2"))


def test_a_label_that_is_no_class_is_refused_by_the_name_of_its_file(tmp_path):
    with pytest.raises(Refusal, match=r"a\.png has label 4: expected 0 to 2 of 3 classes, or 255 where there is none$"):
        open_scenes(write(tmp_path / "a", [0, 1, 4], classes=3))
    with pytest.raises(Refusal, match=r"has label 3: expected 0 to 2 .* label 0 means none, say --reduce-zero-label"):
        open_scenes(write(tmp_path / "b", [0, 1, 3], classes=3, ade=False))
    with pytest.raises(Refusal, match=r"has label 4: expected 1 to 3 of 3 classes"):
        open_scenes(write(tmp_path / "c", [0, 1, 4], classes=3), reduce_zero="yes")
    with pytest.raises(Refusal, match=r"has label 254: expected 1 to 150"):  # of other programs, for ignored
        open_scenes(write(tmp_path / "d", [0, 1, 254]))


def test_255_is_a_class_of_16_bits_where_there_are_more_labels_than_8_bits_hold(tmp_path):
    labels = [0, 254, 255, 256, 65535]
    for k, classes in enumerate((300, 0)):  # by their names, or by what occurs
        values, _, note = opened(write(tmp_path / f"a{k}", labels, classes=classes, dtype=np.uint16, ade=False))
        assert values == [0, 254, 255, 256, IGNORED]
        assert "65535 and, in masks of 8 bits, 255 mean that there is none" in note
    few = [0, 1, 255, 65535]
    assert opened(write(tmp_path / "b", few, dtype=np.uint16, ade=False))[0] == [0, 1, IGNORED, IGNORED]
    assert opened(write(tmp_path / "c", few, classes=2, dtype=np.uint16))[0] == [0, 1, IGNORED, IGNORED]
    reduced = opened(write(tmp_path / "d", [0, 1, 255, 300], classes=300, dtype=np.uint16))[0]
    assert reduced == [IGNORED, 0, 254, 299]
    assert Labels(wide=True).classes(np.array([[0, 255]]), deep=False).tolist() == [[0, IGNORED]]


def test_values_are_those_that_were_written(tmp_path):
    mask = np.array([[0, 1, 2, 255], [2, 2, 0, 1]], np.uint8)
    palette = Image.fromarray(mask, "P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200] + [9] * 759)
    for name in ("palette.png", "palette.tif", "palette.bmp"):
        palette.save(tmp_path / name)
        assert read_mask(tmp_path / name)[0].tolist() == mask.tolist(), name
    Image.fromarray(mask).save(tmp_path / "grey.png")
    assert read_mask(tmp_path / "grey.png")[0].tolist() == mask.tolist()
    (tmp_path / "turned.png").write_bytes(png(mask, before=((b"eXIf", exif(6)),)))
    assert read_mask(tmp_path / "turned.png")[0].tolist() == np.rot90(mask, -1).tolist()
    deep = np.array([[0, 300, 65535, 255]])
    for dtype, kind in ((np.uint16, 1), (np.int32, 2), (np.uint32, 1)):
        for order in "<>" if dtype is not np.uint32 else "<":
            (tmp_path / "deep.tif").write_bytes(tiff(deep.astype(dtype), kind=kind, order=order))
            assert read_mask(tmp_path / "deep.tif")[0].tolist() == deep.tolist()
    (tmp_path / "signed.tif").write_bytes(tiff(np.array([[0, -1, 7]], np.int16), kind=2))
    assert Labels().classes(*read_mask(tmp_path / "signed.tif")).tolist() == [[0, IGNORED, 7]]


def changed_when_read() -> dict[str, tuple[bytes, str]]:
    two_bits = tiff(np.array([[0x1B]], np.uint8), bits=2)
    return {
        "two.tif": (two_bits, "a grey TIFF of less than 8 bits"),
        "turned.tif": (tiff(np.array([[0, 1]], np.uint8), zero_is_white=True), "a TIFF in which zero is white"),
        "few.pgm": (b"P5 2 1 20\n\x00\x14", "another largest value"),
        "low.tif": (tiff(np.array([[0, -2]], np.int32), kind=2), "has labels -2 to 0: expected class indices"),
        "high.tif": (tiff(np.array([[0, 70_000]], np.int32), kind=2), "has labels 0 to 70000: expected class"),
        "colour.png": (png(np.zeros((1, 2, 3)), 2), "a picture of mode RGB: expected a PNG of one channel"),
        "alpha.png": (png(np.zeros((1, 2, 2)), 4), "a picture of mode LA"),
        "floats.tif": (tiff(np.zeros((1, 2), np.float32), kind=3), "a picture of mode F"),
    }


@pytest.mark.parametrize("name", changed_when_read())
def test_masks_that_hold_no_indices_are_refused(tmp_path, name):
    data, says = changed_when_read()[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(Refusal, match=says):
        read_mask(tmp_path / name)


def test_lossy_masks_are_refused(tmp_path):
    for name, options in (("a.jpg", {}), ("a.tif", {"compression": "jpeg"}), ("a.jp2", {})):
        Image.new("L", (8, 8)).save(tmp_path / name, **options)
        with pytest.raises(Refusal, match="which changes values"):
            read_mask(tmp_path / name)
