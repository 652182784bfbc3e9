"""Pictures of more than 8 bits: what is black and white is declared, asked for, unambiguous or refused."""

import struct

import numpy as np
import pytest
from pictures import png, tiff

from common.data import Location, Unreadable, open_data
from common.data.location import changed_location, location_of
from common.decoding.decode import decode
from common.decoding.depth import STRIP, parse_range
from common.errors import Refusal

SIXTEEN, TWELVE = np.array([[0, 256, 0x8000, 65535]], np.uint16), np.array([[0, 256, 2048, 4095]], np.uint16)
TINTED = np.array([[[0, 2048, 4095]]], np.uint16)


def grey(data: bytes, span=None) -> list[int]:
    return decode(np.frombuffer(data, np.uint8).copy(), 1, span)[0, 0].tolist()


def said(data: bytes, span=None, channels: int = 1) -> str:
    with pytest.raises(ValueError) as caught:
        decode(np.frombuffer(data, np.uint8).copy(), channels, span)
    return str(caught.value)


@pytest.mark.parametrize("order", ["<", ">"])
def test_what_the_file_declares_is_black_and_white(order):
    assert grey(tiff(TWELVE, (281, 3, [4095]), order=order)) == [0, 16, 128, 255]  # MaxSampleValue
    floats = np.array([[0, 0.6, 1.2]], np.float32)
    assert grey(tiff(floats, (341, 11, [1.2]), kind=3, order=order)) == [0, 127, 255]  # SMaxSampleValue
    signed = np.array([[-1, 0, 1]], np.float32)
    assert grey(tiff(signed, (340, 11, [-1]), (341, 11, [1]), kind=3, order=order)) == [0, 128, 255]
    assert "floats from 0 to 1.2, but the file declares 0 to 1" in said(
        tiff(floats, (341, 12, [1.0]), kind=3, order=order)
    )


def test_twelve_bits_of_several_formats():
    packed = np.frombuffer(bytes([0, 0x01, 0x00, 0x80, 0x0F, 0xFF]), np.uint8).reshape(1, 6)
    twelve = tiff(packed, bits=12).replace(struct.pack("<HHLL", 256, 4, 1, 6), struct.pack("<HHLL", 256, 4, 1, 4))
    assert grey(twelve) == [0, 16, 128, 255]
    assert grey(b"P5 4 1 4095\n" + TWELVE.astype(">u2").tobytes()) == [0, 16, 128, 255]
    assert grey(png(TWELVE, bits=16, before=((b"sBIT", b"\x0c"),))) == [0, 16, 128, 255]  # left where they were
    spread = TWELVE << 4 | TWELVE >> 8  # as PNG wants them
    assert grey(png(spread, bits=16, before=((b"sBIT", b"\x0c"),))) == [0, 16, 128, 255]
    assert grey(png(spread >> 4 << 4 & 0x0FFF, bits=16, before=((b"sBIT", b"\x0c"),))) == [0, 0, 0, 15]  # and dark


def test_sixteen_bits_undeclared_are_all_used_or_refused():
    assert grey(png(SIXTEEN, bits=16)) == grey(tiff(SIXTEEN)) == [0, 1, 128, 255]
    assert grey(png(SIXTEEN * 0, bits=16)) == [0] * 4
    for most in (255, 1023, 4095, 16383):
        values = np.array([[0, most]], np.uint16)
        assert f"16-bit values from 0 to {most}: expected 0 to 65535" in said(png(values, bits=16))
        assert "set data_range=LOW:HIGH" in said(tiff(values, order=">"))
        assert grey(tiff(values), (0, most)) == [0, 255]
    assert grey(png(TWELVE, bits=16), (0, 65535)) == [0, 1, 8, 15]  # a dark picture, by word of the user


def test_floats_and_integers_without_a_declared_range():
    for values, expected in ([0, 0.5, 1], [0, 128, 255]), ([0, 100.5, 255], [0, 100, 255]), ([0, 0, 0], [0, 0, 0]):
        assert grey(tiff(np.array([values], np.float32), kind=3)) == expected
    for values in ([0, 0.5, 1.2], [-0.1, 0, 1], [0, 1, 63], [0, 7, 4095], [-1, 0, 1]):
        message = said(tiff(np.array([values], np.float32), kind=3))
        assert f"floats from {min(values):g} to {max(values):g}: expected 0 to 1 or 0 to 255" in message
    assert grey(tiff(np.array([[-1, 0, 3]], np.float32), kind=3), (-1, 1)) == [0, 128, 255]  # clipped as asked
    assert "NaN" in said(tiff(np.array([[0, np.nan]], np.float32), kind=3), (0, 1))
    for kind, dtype in ((2, np.int32), (1, np.uint32), (2, np.int16)):
        assert grey(tiff(np.array([[0, 1, 128, 255]], dtype), kind=kind)) == [0, 1, 128, 255]
        assert "integers from 0 to 4095: expected 0 to 255" in said(tiff(np.array([[0, 4095]], dtype), kind=kind))
    assert "integers from 0 to 4e+09" in said(tiff(np.array([[0, 4_000_000_000]], np.uint32)))
    assert grey(tiff(np.array([[-1000, 1000, 3000]], np.int16), kind=2), (-1000, 3000)) == [0, 128, 255]  # CT


def test_rounding_is_within_the_range_and_signed_bytes_are_refused():
    most = np.nextafter(np.float32(1), np.float32(2))
    assert grey(tiff(np.array([[0, 0.5, most, -1e-7]], np.float32), kind=3)) == [0, 128, 255, 0]
    assert "floats from 0 to 1.2" in said(tiff(np.array([[0, 1.2]], np.float32), kind=3))
    signed = tiff(np.array([[-128, 127]], np.int8), kind=2)
    for channels in (1, 3):
        assert "signed values of 8 bits" in said(signed, channels=channels)


def test_colours_of_sixteen_bits():
    full = TINTED * 16
    for data in (png(full, 2, 16), tiff(full)):
        assert decode(np.frombuffer(data, np.uint8).copy())[:, 0, 0].tolist() == [0, 128, 255]
    for data in (png(TINTED, 2, 16), tiff(TINTED), png(np.dstack([TWELVE, SIXTEEN]), 4, 16)):
        assert "16-bit colours below 4096" in said(data, channels=3)
    assert decode(np.frombuffer(png(TINTED, 2, 16), np.uint8).copy(), 3, (0, 65535))[:, 0, 0].tolist() == [0, 8, 15]
    assert "only the upper eight bits" in said(png(TINTED, 2, 16), (0, 4095))


def test_zero_may_be_white_and_one_value_transparent():
    assert grey(tiff(SIXTEEN, zero_is_white=True)) == [255, 254, 127, 0]
    assert grey(tiff(np.array([[0, 0.5, 1]], np.float32), kind=3, zero_is_white=True)) == [255, 127, 0]
    assert grey(png(SIXTEEN, bits=16, before=((b"tRNS", struct.pack(">H", 256)),))) == [0, 255, 128, 255]


def test_large_pictures_are_converted_in_strips():
    values = np.linspace(0, 65535, STRIP * 3 // 2).astype(np.uint16).reshape(-1, 1024)
    pixels = decode(np.frombuffer(tiff(values), np.uint8).copy(), 1)[0].numpy()
    assert (pixels == values >> 8).all()


def test_the_option():
    assert parse_range("auto") is None and parse_range("4095") == (0, 4095) and parse_range("-1:1") == (-1, 1)
    for text in ("", "bright", "5:1", "0", "nan", "0:inf"):
        with pytest.raises(Refusal, match="expected auto, the value of white"):
            parse_range(text)


def test_the_option_reaches_the_files_and_the_fingerprint(tmp_path):
    (tmp_path / "a.png").write_bytes(png(TWELVE, bits=16))
    images, asked = open_data(str(tmp_path)), open_data(Location(str(tmp_path), span="4095"))
    with pytest.raises(Unreadable, match=r"a\.png: 16-bit values from 0 to 4095: .* set data_range=LOW:HIGH"):
        images.read(0, 1)
    assert asked.read(0, 1)[0, 0].tolist() == asked.subset([0]).read(0, 1)[0, 0].tolist() == [0, 16, 128, 255]
    assert asked.fingerprint() != images.fingerprint() == open_data(Location(str(tmp_path))).fingerprint()
    with pytest.raises(Refusal, match="data_range=4095 goes with a folder"):
        open_data(Location("builtin", span="4095"))
    with pytest.raises(Refusal, match="data_range=dark: expected auto, the value of white"):
        open_data(Location(str(tmp_path), span="dark"))
    options = location_of({"data": str(tmp_path), "data_range": "0:4095"}).options()
    assert options["data_range"] == "0:4095" and changed_location(options, {}).span == "0:4095"  # so evaluations ask
