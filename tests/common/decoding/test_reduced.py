"""JPEGs decoded to a part of their sides: Pillow's pixels, and crops that keep the pixels of their views."""

import io
import itertools
from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import exif, photo, save, write_tar
from PIL import Image, ImageOps

from common.batches.crops import CROP_TRIES, DRAWS, crop_draws, divisor_of, reduced_box, reduction
from common.batches.sampler import generator
from common.batches.samples import Faster, Samples
from common.batches.views import View
from common.data import open_data
from common.decoding.decode import REDUCTIONS, decode, decode_reduced

TURNED = b"Exif\0\0"
PLAIN = {"jitter": 0.0, "grayscale": 0.0}
VIEWS = {"global": View(32, count=2, flip=0.5, **PLAIN), "local": View(16, count=3, scale=[0.1, 0.4], **PLAIN)}


def jpeg(height: int, width: int, mode: str = "RGB", orientation: int = 1) -> np.ndarray:
    packed = io.BytesIO()
    Image.fromarray(photo(height, width)).convert(mode).save(
        packed, "JPEG", quality=92, exif=TURNED + exif(orientation)
    )
    return np.frombuffer(packed.getvalue(), np.uint8).copy()


def one_eighth(height: int, width: int) -> int:
    return 8


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_reduced_jpeg_has_the_pixels_of_pillows_draft(channels, mode):
    for orientation, divisor in itertools.product(range(1, 9), REDUCTIONS[1:]):
        data = jpeg(50, 67, mode, orientation)
        pixels, whole = decode_reduced(data, channels, None, lambda height, width, n=divisor: n)
        with Image.open(io.BytesIO(data)) as image:
            image.draft("L" if channels == 1 else None, (67 // divisor, 50 // divisor))
            assert image.size == (-(-67 // divisor), -(-50 // divisor))
            expected = np.asarray(ImageOps.exif_transpose(image.convert("L" if channels == 1 else "RGB")))
        assert whole == ((50, 67) if orientation < 5 else (67, 50))
        assert pixels.shape[0] == channels and divisor_of(tuple(pixels.shape[1:]), whole) == divisor
        assert np.array_equal(pixels[0] if channels == 1 else pixels.permute(1, 2, 0), expected)


def test_what_cannot_be_reduced_is_decoded_whole():
    png = io.BytesIO()
    Image.fromarray(photo(50, 67)).save(png, "PNG")
    for data in (np.frombuffer(png.getvalue(), np.uint8).copy(), jpeg(50, 67, "CMYK")):
        pixels, whole = decode_reduced(data, 3, None, one_eighth)
        assert pixels.equal(decode(data)) and whole == tuple(pixels.shape[1:])


def test_the_image_is_reduced_as_far_as_every_crop_keeps_its_pixels():
    def row(area: float) -> list[float]:
        return [area] * CROP_TRIES + [0.5] * CROP_TRIES + [0.0] * (DRAWS - 2 * CROP_TRIES)

    whole = View(8, scale=[0.01, 1.0], ratio=[1.0, 1.0])
    for side, divisor in ((7, 1), (8, 1), (15, 1), (16, 2), (31, 2), (32, 4), (63, 4), (64, 8), (500, 8)):
        assert reduction(side, side, [(whole, row(1.0))]) == divisor
        assert reduction(2 * side, side, [(View([16, 8], scale=[1, 1], ratio=[0.5, 0.5]), row(1.0))]) == divisor
    assert reduction(64, 64, [(whole, row(1.0)), (whole, row(0.25))]) == 4  # a crop of 32 among them


def test_a_box_in_a_reduced_image_keeps_the_pixels_of_its_view():
    for divisor, (height, width) in itertools.product(REDUCTIONS, ((50, 67), (64, 64), (9, 200))):
        for top, rows in itertools.combinations(range(height + 1), 2):
            y, _, tall, wide = reduced_box((top, 0, rows - top, width), divisor)
            assert tall >= (rows - top) // divisor and wide == (width + divisor // 2) // divisor
            assert y + tall <= -(-height // divisor) and abs(y - top / divisor) <= 0.5


def folder_of(path: Path, count: int = 6) -> Path:
    for k in range(count):
        height, width = ((300, 400), (257, 333), (90, 60))[k % 3]
        save(path / "ab"[k % 2] / f"{k}.jpg", photo(height, width, seed=k), quality=92, exif=TURNED + exif(1 + k % 8))
    save(path / "a" / "drawn.png", photo(200, 300))
    return path


def test_crops_are_nearly_those_of_whole_images_and_of_the_same_places(tmp_path):
    images = open_data(str(folder_of(tmp_path)))
    keys = [(epoch, index) for epoch in range(3) for index in range(len(images))]
    made = [
        Samples(images, VIEWS, 3, 3, faster=Faster(scaled=scaled)).__getitems__(keys).views for scaled in (False, True)
    ]
    for name in VIEWS:
        full, scaled = (views[name].float() for views in made)
        assert full.shape == scaled.shape and not full.equal(scaled)
        assert (full - scaled).abs().mean() < 1.5 and (full - scaled).abs().mean((1, 2, 3)).max() < 8
    drawn = [k for k, (_, index) in enumerate(keys) if images.name(index).endswith("png")]
    assert drawn and all(made[0]["global"][k].equal(made[1]["global"][k]) for k in drawn)


def test_every_source_has_the_same_scaled_crops(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    folder = folder_of(tmp_path / "all")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_tar(tmp_path / "all.tar", [(str(path.relative_to(folder)), path.read_bytes()) for path in files])
    cells = [{"bytes": path.read_bytes(), "path": None} for path in files]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": cells}, features=features).to_parquet(tmp_path / "all.parquet")
    keys = [(5, index) for index in range(len(files))]
    places = (folder, tmp_path / "all.tar", f"hf:{tmp_path}/all.parquet")
    first, *others = (
        Samples(open_data(str(place)), VIEWS, 1, 3, faster=Faster(scaled=True)).__getitems__(keys) for place in places
    )
    assert all(first.views[name].equal(other.views[name]) for other in others for name in VIEWS)


def test_a_broken_picture_is_named_and_another_one_read(tmp_path):
    path = save(tmp_path / "broken.jpg", photo(300, 400))
    path.write_bytes(path.read_bytes()[:400])
    save(tmp_path / "whole.jpg", photo(100, 90))
    batch = Samples(open_data(str(tmp_path)), VIEWS, 0, 3, faster=Faster(scaled=True)).__getitems__([(0, 0), (0, 1)])
    assert len(batch.unreadable) == 1 and "broken.jpg" in batch.unreadable[0]
    alone = Samples(open_data(str(tmp_path)).subset([1]), VIEWS, 0, 3, faster=Faster(scaled=True)).__getitems__(
        [(0, 0)]
    )
    assert batch.views["global"][::2].equal(alone.views["global"])


def test_rows_of_draws_are_those_of_one_crop_after_the_other():
    rng = generator(0, 1, 2, "view/local")
    assert crop_draws(VIEWS["local"], generator(0, 1, 2, "view/local")) == [rng.random(DRAWS).tolist() for _ in "abc"]
