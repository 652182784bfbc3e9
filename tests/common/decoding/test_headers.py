"""What pictures say of themselves: how they are turned counts, wherever it stands, and nothing else decides."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from pictures import exif, photo, png, tiff
from PIL import Image, ImageFile, ImageOps, features

from common.data import Unreadable, open_data
from common.decoding.decode import MAX_PIXELS, PICTURES, decode, endings, open_picture

WEBP = features.check("webp")  # a pillow-simd may be built without
AVIF = features.check("avif")
XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0" + XMP
PROFILE = b"\nexif\n%8d\n" % (len(exif(6)) + 6) + (b"Exif\0\0" + exif(6)).hex().encode() + b"\n"


def encoded(kind: str, pixels: np.ndarray | None = None, mode: str = "RGB", **options) -> bytes:
    aside = io.BytesIO()
    Image.fromarray(photo(16, 24) if pixels is None else pixels).convert(mode).save(aside, kind, **options)
    return aside.getvalue()


def jpeg(*segments: tuple[int, bytes], late: bool = False, mode: str = "RGB") -> bytes:
    """A JPEG with segments (marker, data) at its beginning, or just before its scan."""
    data = encoded("JPEG", mode=mode, quality=95)
    more = b"".join(b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body for marker, body in segments)
    at = data.index(b"\xff\xda") if late else 2
    return data[:at] + more + data[at:]


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    data = encoded("WEBP", lossless=True, exif=exif(1))  # so that it is of the extended kind
    kept, at = b"", 12
    while at < len(data):
        size = 8 + int.from_bytes(data[at + 4 : at + 8], "little") + (data[at + 4] & 1)
        kept += b"" if data[at : at + 4] == b"EXIF" else data[at : at + size]
        at += size
    kept += b"".join(kind + struct.pack("<I", len(body)) + body + bytes(len(body) % 2) for kind, body in chunks)
    return b"RIFF" + struct.pack("<I", len(kept) + 4) + b"WEBP" + kept


def both(data: bytes, monkeypatch, channels: int = 3) -> np.ndarray:
    """(C, H, W) as torchvision's decoder gives it, which has to be what PIL's gives."""
    array = np.frombuffer(data, np.uint8).copy()
    pixels = decode(array, channels).numpy().astype(int)
    with monkeypatch.context() as patched:
        patched.setattr("common.decoding.decode.jpeg_decoder", lambda: None)
        again = decode(array, channels).numpy()
    assert pixels.shape == again.shape and np.abs(pixels - again).max() <= 4
    return pixels


def test_jpegs_are_turned_alike_by_both_decoders_whatever_the_number_is_stored_as(monkeypatch):
    for order in "<>":
        for kind in (3, 4):
            for count in (1, 3):  # of three it is the first, which lies aside
                for value in range(10):
                    data = jpeg((0xE1, b"Exif\0\0" + exif(value, order, kind, count)))
                    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))).transpose(2, 0, 1)
                    pixels = both(data, monkeypatch)
                    assert pixels.shape == expected.shape and np.abs(pixels - expected).max() <= 4


def tall(pixels: np.ndarray) -> bool:
    return pixels.shape[1:] == (24, 16)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_places_where_a_jpeg_says_how_it_is_turned(monkeypatch, mode):
    turned = (0xE1, b"Exif\0\0" + exif(6, kind=4))
    profile, comment = (0xE2, b"ICC_PROFILE\0\1\1" + bytes(500)), (0xFE, b"x" * 60_000)
    cut = len(turned[1]) // 2
    pieces = (0xE1, turned[1][:cut]), (0xE1, b"Exif\0\0" + turned[1][cut:])
    for segments in ((turned,), (profile, comment, comment, turned), ((0xE1, JPEG_XMP), turned), pieces):
        assert tall(both(jpeg(*segments, mode=mode), monkeypatch))
    assert tall(both(jpeg(turned, late=True, mode=mode), monkeypatch))
    assert tall(both(jpeg((0xE1, JPEG_XMP), mode=mode), monkeypatch))
    for rubbish in (b"Exif\0\0" + b"rubbish!" * 9, b"Exif\0\0", b"Exif\0\0" + exif(6)[:20]):
        assert not tall(both(jpeg((0xE1, rubbish), mode=mode), monkeypatch))
    for segment in ((0xE0, b"JFIF\0"), (0xEE, b"Adobe\0"), (0xE2, b"MPF\0rubbish")):
        assert not tall(both(jpeg(segment, mode=mode), monkeypatch))


def test_places_where_other_formats_say_it(monkeypatch):
    pixels = photo(16, 24)
    texts = [(b"eXIf", exif(6)), (b"tEXt", b"Raw profile type exif\0" + PROFILE),
             (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE)),
             (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP),
             (b"iTXt", b"XML:com.adobe.xmp\0\1\0en\0k\0" + zlib.compress(XMP))]  # fmt: skip
    for chunk in texts:
        assert tall(both(png(pixels, 2, before=(chunk,)), monkeypatch))
        assert tall(both(png(pixels, 2, after=(chunk,)), monkeypatch))
    for tag in ((274, 3, [6]), (274, 4, [6]), (700, 1, list(XMP))):
        for order in "<>":
            assert tall(both(tiff(pixels, tag, order=order), monkeypatch))
    if WEBP:
        for chunk in ((b"EXIF", exif(6)), (b"EXIF", b"Exif\0\0" + exif(6, "<", 4)), (b"XMP ", XMP)):
            assert tall(both(webp(chunk), monkeypatch))
    if AVIF:
        block = Image.Exif()
        block[274], block[270] = 6, "some words"
        data = encoded("AVIF", exif=block.tobytes())
        assert tall(both(data, monkeypatch))
        broken = data.replace(b"II*\0", b"rubb").replace(b"MM\0*", b"rubb")
        assert broken != data and tall(both(broken, monkeypatch))  # EXIF does not decide, the file's own boxes do


def test_what_a_picture_says_of_itself_does_not_decide_whether_it_is_one(monkeypatch):
    pixels = photo(16, 24)
    rubbish = [(b"zTXt", b"long\0\0" + zlib.compress(bytes(2 << 20))), (b"zTXt", b"other method\0\7xyz"),
               (b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20))), (b"iCCP", b"profile\0\7xyz"),
               (b"eXIf", b"rubbish!" * 9), (b"pHYs", b"1"), (b"gAMA", b""), (b"acTL", b"1")]  # fmt: skip
    for chunk in rubbish:
        assert (both(png(pixels, 2, before=(chunk,)), monkeypatch) == pixels.transpose(2, 0, 1)).all()
        assert (both(png(pixels, 2, after=(chunk,)), monkeypatch) == pixels.transpose(2, 0, 1)).all()
    damaged = png(pixels, 2, before=((b"tEXt", b"words\0words"),)).replace(b"words\0words", b"words\0w0rds")
    assert (both(damaged, monkeypatch) == pixels.transpose(2, 0, 1)).all()  # its check sum is wrong
    beyond = (270, 4, [1 << 30] * 5)
    data = tiff(pixels, beyond).replace(struct.pack("<HHL", 270, 4, 5), struct.pack("<HHL", 270, 2, 1 << 30))
    assert (both(data, monkeypatch) == pixels.transpose(2, 0, 1)).all()
    if WEBP:
        for chunk in ((b"EXIF", b"rubbish!" * 9), (b"EXIF", b""), (b"ICCP", bytes(2 << 20)), (b"XMP ", b"\xff" * 99)):
            assert (both(webp(chunk), monkeypatch) == pixels.transpose(2, 0, 1)).all()
        frames = [Image.fromarray(np.roll(pixels, k, 1)) for k in range(3)]
        moving = encoded("WEBP", save_all=True, append_images=frames[1:], lossless=True)
        assert (both(moving[:-40], monkeypatch) == pixels.transpose(2, 0, 1)).all()  # its last picture is cut
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_postscript_is_not_handed_to_a_program(tmp_path, monkeypatch):
    """Whatever the file is called; a `gs` on the path would leave a mark."""
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin32c"):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    folder = tmp_path / "images"
    folder.mkdir()
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    binary = b"\xc5\xd0\xd3\xc6" + struct.pack("<6L", 30, len(eps), 0, 0, 0, 0) + b"\xff\xff" + eps
    metafile = b"\xd7\xcd\xc6\x9a" + bytes(40)
    for k, data in enumerate((eps, binary, metafile, b"GRIB" + bytes(60), b"SIMPLE  =" + b" " * 3000)):
        for ending in ("jpg", "png", "tif"):
            (folder / f"{k}.{ending}").write_bytes(data)
    images = open_data(str(folder))
    assert len(images) == 15
    for i in range(15):
        with pytest.raises(Unreadable, match="none of the kinds of pictures that are opened"):
            images.read(i)
    assert not (tmp_path / "started").exists()
    assert not {"EPS", "WMF", "FITS", "GRIB", "BUFR", "HDF5", "MPEG", "ICNS", "IPTC"} & set(PICTURES)
    assert {".jpg", ".png", ".tif", ".mpo"} <= endings() and not {".eps", ".ps", ".emf", ".fits"} & endings()


def test_content_decides_among_the_kinds_that_are_opened(tmp_path):
    (tmp_path / "a.png").write_bytes(jpeg())
    (tmp_path / "b.jpg").write_bytes(encoded("GIF"))
    (tmp_path / "c.mpo").write_bytes(encoded("MPO", save_all=True, append_images=[Image.new("RGB", (24, 16))]))
    images = open_data(str(tmp_path))
    assert [tuple(images.read(i).shape) for i in range(3)] == [(3, 16, 24)] * 3


def huge(kind: str) -> bytes:
    """A small file that says it is of 10,000 x 10,000 pixels."""
    side = 10_000
    if kind == "PNG":
        return png(np.zeros((1, 1)), 0).replace(struct.pack(">II", 1, 1), struct.pack(">II", side, side), 1)
    if kind == "TIFF":
        data = tiff(np.zeros((1, 1), np.uint8))
        for tag in (256, 257):
            data = data.replace(struct.pack("<HHLL", tag, 4, 1, 1), struct.pack("<HHLL", tag, 4, 1, side))
        return data
    if kind == "GIF":
        return encoded("GIF").replace(struct.pack("<HH", 24, 16), struct.pack("<HH", side, side))
    if kind == "BMP":
        return encoded("BMP").replace(struct.pack("<II", 24, 16), struct.pack("<II", side, side))
    if kind == "WEBP":
        size = (side - 1).to_bytes(3, "little") * 2
        return webp().replace((23).to_bytes(3, "little") + (15).to_bytes(3, "little"), size)
    data = jpeg()
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the module's own filter
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "GIF", "BMP", "JPEG", *(["WEBP"] if WEBP else [])])
def test_pictures_of_too_many_pixels_are_not_decoded(kind, monkeypatch):
    assert MAX_PIXELS < 10_000**2
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=r"^10000x10000 pixels are more than the 89,478,485 allowed"):
        decode(np.frombuffer(huge(kind), np.uint8).copy())
    with pytest.raises(ValueError, match="10000x10000"), open_picture(np.frombuffer(huge(kind), np.uint8)):
        pytest.fail("opened")
