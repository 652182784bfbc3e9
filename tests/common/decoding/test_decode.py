"""Decoding: images of every kind become three channels, and a broken one is named."""

import contextlib
import io
import os
import pickle
import struct
import sys
import warnings
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from pictures import photo, save
from PIL import Image, features

from common.data import Unreadable, open_data
from common.data.images import with_channels
from common.decoding import decode

WEBP = ["webp"] if features.check("webp") else []  # a pillow-simd may be built without
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
SOURCE = os.environ.get("POSLABEL_FASHION_MNIST")  # a folder with the whole set, to compare the extract with


def read_one(folder: Path, channels: int = 3) -> torch.Tensor:
    images = open_data(str(folder))
    assert len(images) == 1
    return images.read(0, channels)


@pytest.mark.parametrize("ending", ["png", *WEBP, "bmp", "tif", "gif", "PNG"])
def test_any_format_becomes_three_channels(tmp_path, ending):
    image = Image.fromarray(np.full((4, 6, 3), (10, 20, 30), np.uint8))
    image.save(tmp_path / f"a.{ending}", lossless=True)  # an option of WebP that the others ignore
    pixels = read_one(tmp_path)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 4, 6) and pixels.is_contiguous()
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]


def test_jpeg_is_what_pil_makes_of_it(tmp_path):
    path = save(tmp_path / "a.jpeg", photo(), quality=90)
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    pixels = read_one(tmp_path)
    assert pixels.is_contiguous()
    assert np.abs(pixels.permute(1, 2, 0).numpy() - expected).max() <= 2
    luma = np.asarray(Image.open(path).convert("L")).astype(int)
    assert np.abs(read_one(tmp_path, channels=1)[0].numpy() - luma).max() <= 2


@pytest.mark.parametrize("channels", [1, 3])
def test_pillow_reads_jpegs_as_the_fast_decoder_does(tmp_path, monkeypatch, channels):
    save(tmp_path / "a.jpg")  # colourful: the luma of Pillow's colours is up to 26 levels from the stored one
    expected = read_one(tmp_path, channels)
    monkeypatch.setattr(decode, "jpeg_decoder", lambda: None)
    assert (read_one(tmp_path, channels).int() - expected.int()).abs().max() <= 2


def test_the_fastest_jpeg_decoder_that_is_installed_is_taken(tmp_path, monkeypatch):
    torchcodec, simplejpeg = ModuleType("torchcodec.decoders"), ModuleType("simplejpeg")
    torchcodec.decode_jpeg = lambda data, mode: torch.full((3 if mode == "RGB" else 1, 2, 2), len(data)).byte()
    simplejpeg.decode_jpeg = lambda data, mode: np.full((1, 1, 3 if mode == "RGB" else 1), 7, np.uint8)
    monkeypatch.setattr(decode, "jpeg_decoder", decode.jpeg_decoder.__wrapped__)
    monkeypatch.setitem(sys.modules, "simplejpeg", simplejpeg)
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", torchcodec)
    path = save(tmp_path / "a.jpg")
    assert read_one(tmp_path).tolist() == [[[7]]] * 3 and read_one(tmp_path, 1).tolist() == [[[7]]]
    assert decode.jpeg_decoder_name() == "simplejpeg"
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    before = read_one(tmp_path)
    assert before.shape[1:] != (2, 2) and decode.jpeg_decoder_name() == "torchvision"
    monkeypatch.setattr(torch.ops, "image", None)
    assert (read_one(tmp_path) == path.stat().st_size % 256).all() and read_one(tmp_path, 1).shape == (1, 2, 2)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    assert (read_one(tmp_path).int() - before.int()).abs().max() <= 2 and decode.jpeg_decoder_name() == "Pillow"


@pytest.mark.parametrize("channels", [1, 3])
def test_fast_jpeg_decoders_have_the_same_pixels_and_warn_of_nothing(tmp_path, channels):
    data = np.fromfile(save(tmp_path / "a.jpg"), np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoders = {}
        for name, load in decode.JPEG_DECODERS.items():
            with contextlib.suppress(ImportError, AttributeError):
                decoders[name] = load()
        pixels = [decoder(data, channels) for decoder in decoders.values()]
    assert all(torch.equal(pixels[0], each) and each.shape[0] == channels for each in pixels)


def test_loose_layout_has_the_same_pixels(tmp_path):
    save(tmp_path / "a.jpg")
    images = open_data(str(tmp_path))
    loose = images.read(0, contiguous=False)
    assert torch.equal(loose, images.read(0))


def test_grey_becomes_colour_and_colour_grey(tmp_path):
    save(tmp_path / "grey.png", np.array([[0, 100], [200, 255]], np.uint8))
    assert read_one(tmp_path).tolist() == [[[0, 100], [200, 255]]] * 3
    assert read_one(tmp_path, channels=1).tolist() == [[[0, 100], [200, 255]]]
    row = np.array([[RED, GREEN, BLUE, (7, 7, 7)]], np.uint8)
    expected = np.asarray(Image.fromarray(row).convert("L"))
    assert with_channels(torch.from_numpy(row).permute(2, 0, 1), 1)[0].tolist() == expected.tolist()


def test_transparent_pixels_lie_on_white(tmp_path):
    save(tmp_path / "a.png", np.array([[(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 128)]], np.uint8))
    assert read_one(tmp_path).permute(1, 2, 0)[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 127]]


def test_grey_with_alpha(tmp_path):
    Image.fromarray(np.array([[(40, 255), (40, 0)]], np.uint8), "LA").save(tmp_path / "a.png")
    assert read_one(tmp_path, channels=1).tolist() == [[[40, 255]]]


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([*BLUE, *GREEN])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    assert read_one(tmp_path).permute(1, 2, 0)[0].tolist() == [list(BLUE), list(GREEN)]
    image.save(tmp_path / "a.png", transparency=1)
    assert read_one(tmp_path).permute(1, 2, 0)[0].tolist() == [list(BLUE), [255, 255, 255]]


def test_sixteen_bits_keep_their_upper_eight(tmp_path):
    Image.fromarray(np.array([[0, 256, 0x8000, 65535]], np.uint16)).save(tmp_path / "a.png")
    assert read_one(tmp_path, channels=1).tolist() == [[[0, 1, 128, 255]]]


def test_floating_point_tiff(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "a.tif")
    assert read_one(tmp_path, channels=1).tolist() == [[[0, 128, 255]]]


def test_cmyk_jpeg(tmp_path):
    Image.new("RGB", (16, 16), (200, 60, 30)).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    red, green, blue = read_one(tmp_path)[:, 8, 8].tolist()
    assert abs(red - 200) < 6 and abs(green - 60) < 6 and abs(blue - 30) < 6


@pytest.mark.parametrize("ending", ["jpg", "png", *WEBP])
def test_exif_turns_the_image_upright(tmp_path, ending):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255  # right half white
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / f"a.{ending}", exif=exif)
    upright = read_one(tmp_path)
    assert upright.shape == (3, 16, 8)
    assert upright[:, 0].float().mean() < 20 and upright[:, -1].float().mean() > 235  # right became bottom


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_one(tmp_path)[:, 0, 0].tolist() == list(RED)


def broken_files() -> dict[str, bytes]:
    jpeg, png = io.BytesIO(), io.BytesIO()
    Image.fromarray(photo(200, 300)).save(jpeg, "JPEG")
    Image.fromarray(photo(200, 300)).save(png, "PNG")
    huge = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = png.getvalue()[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", huge), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b""))
    )
    frame = jpeg.getvalue().index(b"\xff\xc0")
    large = bytearray(jpeg.getvalue())
    large[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 60000)
    return {
        "empty.jpg": b"",
        "text.jpg": b"no picture at all",
        "cut.jpg": jpeg.getvalue()[:1500],
        "cut.png": png.getvalue()[: len(png.getvalue()) // 2],
        "bomb.png": bomb,
        "bomb.jpg": bytes(large),
    }


@pytest.mark.parametrize("name", ["empty.jpg", "text.jpg", "cut.jpg", "cut.png", "bomb.png", "bomb.jpg"])
@pytest.mark.parametrize("channels", [1, 3])
def test_broken_files_are_named(tmp_path, name, channels):
    (tmp_path / name).write_bytes(broken_files()[name])
    with pytest.raises(Unreadable) as caught:
        read_one(tmp_path, channels)
    assert caught.value.name == str(tmp_path / name) and caught.value.reason and "\n" not in str(caught.value)
    again = pickle.loads(pickle.dumps(caught.value))  # as it travels from a worker
    assert str(again) == str(caught.value)


def test_a_file_that_vanished_is_unreadable(tmp_path):
    path = save(tmp_path / "a.png")
    images = open_data(str(tmp_path))
    path.unlink()
    with pytest.raises(Unreadable, match=r"a\.png"):
        images.read(0)
