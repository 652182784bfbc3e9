"""Headers of pictures, read without decoding: size, orientation, range of values.

`read_header` also returns the picture's bytes without what it only says about itself (texts, profiles, thumbnails,
previews, later pages): such things never decide whether it can be read. A file that is cut or wrong in its pixels stays
so. Nothing is raised: what cannot be understood is left to the decoder.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

from .tags import ORIENTATION, Directory, byte_order, known_orientation, orientation_of
from .tags import START as EXIF


@dataclass(slots=True)
class Header:
    """Header of a picture: what it says of itself, as far as that is understood.

    height, width  as stored, None if the format is not looked into here
    components     per pixel, of a JPEG; 0 else
    orientation    1 to 8, as EXIF counts
    deep           colours or grey values of 16 bits
    significant    bits that a PNG calls significant (sBIT), 0 if it does not
    lowest, highest  what a TIFF calls the range of its values
    unsigned, inverted  of a TIFF: its integers have no sign; zero is white
    """

    kind: str = ""
    height: int | None = None
    width: int | None = None
    components: int = 0
    orientation: int = 1
    deep: bool = False
    significant: int = 0
    bits: int = 0
    lowest: float | None = None
    highest: float | None = None
    unsigned: bool = False
    inverted: bool = False


def read_header(data: memoryview, bare: bool = True) -> tuple[Header, bytes]:
    """Read the header and, with `bare`, the bytes without texts, profiles, previews and later pages; else no bytes."""
    start = bytes(data[:16])
    if start[:3] == b"\xff\xd8\xff":
        header, pieces = _jpeg(data, bare)
    elif start[:8] == PNG_START:
        header, pieces = _png(data)
    elif start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        header, pieces = _webp(data)
    elif byte_order(start):
        header, pieces = _tiff(data, bare)
    elif start[4:8] == b"jP  " or start[:4] == JPEG2000_START:
        header, pieces = _jpeg_2000(data), [data]
    elif start[4:8] == b"ftyp":
        header = Header("AVIF" if b"avi" in bytes(data[8:64]) else "HEIF")
        pieces = [_without_exif(data)] if bare else []
    else:
        header, pieces = Header(), [data]
    return header, b"".join(pieces) if bare else b""


JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"


def _jpeg(data: memoryview, bare: bool) -> tuple[Header, list[Any]]:
    """Read the segments up to the first scan. Among those of applications, only JFIF and Adobe's tell of colours.

    It runs for every image that is read, so the pieces are gathered only if they are wanted.
    """
    header, pieces = Header("JPEG"), [data[:2]]
    exif: list[bytes] = []
    xmp, at, end = b"", 2, len(data)
    while at + 4 <= end:
        marker = data[at + 1]
        if data[at] != 0xFF or marker == 0x00 or marker == 0xFF:  # decoders skip what is between segments, fill bytes
            at += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # these have no length
            at += 2
            continue
        if marker == 0xDA or marker == 0xD9:  # the scan, or the end
            break
        stop = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            if marker == 0xE1:
                body = bytes(data[at + 4 : stop])
                if body.startswith(EXIF):
                    exif.append(body[6:])
                elif body.startswith(JPEG_XMP):
                    xmp = body
            elif bare and _tells_of_colours(marker, bytes(data[at + 4 : at + 18]), stop - at):
                pieces.append(data[at:stop])
        else:
            if marker <= 0xCF and marker >= 0xC0 and marker not in (0xC4, 0xC8, 0xCC) and at + 9 < end:
                # a frame; the three are DHT, JPG, DAC
                header.height, header.width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
                header.components = data[at + 9]
            if bare:
                pieces.append(data[at:stop])
        at = max(stop, at + 2)
    pieces.append(data[at:])
    if exif or xmp:
        blocks = [b"".join(exif), *exif] if len(exif) > 1 else exif  # Pillow reads several segments as one
        header.orientation = orientation_of(blocks, xmp)
    return header, pieces


def _tells_of_colours(marker: int, start: bytes, length: int) -> bool:
    """Return whether a segment of this `length`, whose data begin with `start`, is a valid JFIF's or Adobe's."""
    if marker == 0xE0:
        return len(start) == 14 and start[:5] == b"JFIF\0" and length >= 18
    return marker == 0xEE and start[:5] == b"Adobe" and length >= 16


PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
EXIF_PROFILE = b"Raw profile type exif"  # as ImageMagick writes it: hexadecimal, after a line with its length
XMP_TEXT = b"XML:com.adobe.xmp"
MOST_TEXT = 1 << 22  # bytes of one compressed text that are looked at


def _png(data: memoryview) -> tuple[Header, list[Any]]:
    """Read the chunks up to the end of the picture."""
    header, pieces = Header("PNG"), [data[:8]]
    exif: dict[bytes, bytes] = {}
    xmp, at = b"", 8
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), bytes(data[at + 4 : at + 8])
        body = data[at + 8 : at + 8 + length]
        if kind == b"IHDR" and length >= 13 and len(body) >= 13:
            header.width, header.height = struct.unpack(">II", body[:8])
            header.deep, header.bits = body[8] == 16, body[8]
        elif kind == b"sBIT" and len(body):
            header.significant = max(body)
        elif kind == b"eXIf":
            exif[b"eXIf"] = bytes(body)
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            name = bytes(body[:80]).partition(b"\0")[0]
            if name == XMP_TEXT:
                xmp = _text(kind, body)
            elif name == EXIF_PROFILE:
                exif[name] = _from_profile(_text(kind, body))
        if kind in PNG_PIXELS:
            pieces.append(data[at : at + 12 + length])
        at += 12 + length
        if kind == b"IEND":
            break
    blocks = [exif[name] for name in (b"eXIf", EXIF_PROFILE) if name in exif]
    header.orientation = orientation_of(blocks, xmp)
    return header, pieces


def _text(kind: bytes, body: memoryview) -> bytes:
    """Return the text of a PNG's chunk, decompressed, at most MOST_TEXT bytes of it."""
    _, _, rest = bytes(body).partition(b"\0")
    packed = kind == b"zTXt"
    if packed:
        rest = rest[1:]
    elif kind == b"iTXt":
        packed, rest = rest[:1] == b"\1", rest[2:]
        rest = rest.split(b"\0", 2)[-1]  # a language and the keyword in it
    try:
        return zlib.decompressobj().decompress(rest, MOST_TEXT) if packed else rest[:MOST_TEXT]
    except zlib.error:
        return b""


def _from_profile(text: bytes) -> bytes:
    """Return the EXIF block in a text with three lines before it; nothing if it is not hexadecimal."""
    try:
        return bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii"))
    except ValueError:
        return b""


WEBP_PIXELS = {b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"}
WEBP_METADATA = 0x20 | 0x08 | 0x04  # flags of a WebP: profile, EXIF, XMP


def _webp(data: memoryview) -> tuple[Header, list[Any]]:
    """Read the chunks; of an animation, those of the first picture."""
    header = Header("WEBP")
    pieces: list[tuple[bytes, Any]] = []
    exif: list[bytes] = []
    xmp, at, total = b"", 12, 4
    while at + 8 <= len(data):
        kind, length = bytes(data[at : at + 4]), int.from_bytes(data[at + 4 : at + 8], "little")
        padded = length + length % 2
        body = data[at + 8 : at + 8 + length]
        if header.width is None:
            header.width, header.height = _webp_size(kind, bytes(body[:10]))
        if kind == b"EXIF":
            exif.append(bytes(body))
        elif kind == b"XMP ":
            xmp = bytes(body)
        elif kind in WEBP_PIXELS and (kind != b"ANMF" or all(name != b"ANMF" for name, _ in pieces)):
            piece: Any = data[at : at + 8 + padded]
            if kind == b"VP8X" and len(body):
                piece = bytes(piece[:8]) + bytes([body[0] & ~WEBP_METADATA]) + bytes(piece[9:])
            pieces.append((kind, piece))
            total += 8 + padded
        at += 8 + padded
    header.orientation = orientation_of(exif, xmp)
    start = b"RIFF" + struct.pack("<I", min(total, 0xFFFFFFFE)) + b"WEBP"
    return header, [start, *(piece for _, piece in pieces)]


def _webp_size(kind: bytes, body: bytes) -> tuple[int | None, int | None]:
    """Return (width, height) in a WebP's first chunk."""
    if kind == b"VP8X" and len(body) >= 10:
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8L" and len(body) >= 5:
        packed = int.from_bytes(body[1:5], "little")
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(body) >= 10:
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return None, None


XMP = 700  # tags of a TIFF
WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLES = 256, 257, 258, 262, 277
LOWEST, HIGHEST = (340, 280), (341, 281)  # SMinSampleValue, MinSampleValue; SMaxSampleValue, MaxSampleValue
SAMPLE_FORMAT = 339
UNSIGNED = 1  # a sample format
# The tags that say how pixels are stored: TIFF 6.0, with JPEG, LERC and old JPEG.
STRUCTURE = {
    *(254, WIDTH, HEIGHT, BITS, 259, PHOTOMETRIC, 266, 273, SAMPLES, 278, 279, 284, 290, 291, 292, 293, 317, 320),
    *(322, 323, 324, 325, 332, 334, 338, SAMPLE_FORMAT, 347, *range(512, 522), 529, 530, 531, 532, 50674, 0xBC01),
}


def _tiff(data: memoryview, bare: bool) -> tuple[Header, list[Any]]:
    """Read the first page. Its directory is written anew without the tags that do not tell of pixels."""
    header, tags = Header("TIFF"), Directory(data)
    header.width, header.height = tags.value(WIDTH), tags.value(HEIGHT)
    header.bits = int(tags.value(BITS) or 1)
    header.deep, header.inverted = header.bits == 16, tags.value(PHOTOMETRIC) == 0
    header.unsigned = (tags.value(SAMPLE_FORMAT) or UNSIGNED) == UNSIGNED
    header.lowest, header.highest = tags.value(*LOWEST), tags.value(*HIGHEST)
    stored = tags.value(ORIENTATION)
    header.orientation = (
        orientation_of([], tags.bytes_of(XMP, MOST_TEXT)) if stored is None else known_orientation(stored)
    )
    if not bare or not tags.entries:
        return header, [data]
    entries = sorted((tag, place) for tag, (_, _, place) in tags.entries.items() if tag in STRUCTURE)
    kept = [bytes(data[place : place + tags.entry_size]) for _, place in entries]
    next_page = struct.pack(tags.order + tags.offset, 0)
    table = struct.pack(tags.order + tags.count, len(kept)) + b"".join(kept) + next_page
    return header, [data[: tags.start], table, data[tags.start + len(table) :]]


MOST_BOXES = 1 << 16  # bytes of a file of boxes that are searched
JPEG2000_START = b"\xff\x4f\xff\x51"  # of its code stream, which begins with the sizes


def _jpeg_2000(data: memoryview) -> Header:
    """Read the sizes in the code stream."""
    header = Header("JPEG2000")
    start = bytes(data[:MOST_BOXES])
    at = start.find(JPEG2000_START)
    if at >= 0 and at + 43 <= len(start):
        right, bottom, left, top = struct.unpack_from(">4L", start, at + 8)
        header.width, header.height = max(0, right - left), max(0, bottom - top)
        header.bits = (start[at + 42] & 0x7F) + 1
        header.deep = header.bits == 16
    return header


def _without_exif(data: memoryview) -> bytes:
    """Rename the EXIF item of an AVIF: how it is turned stands in its own boxes, not in EXIF."""
    start = re.sub(rb"(infe[\x02\x03](?:.{7}|.{9}))Exif", rb"\1none", bytes(data[:MOST_BOXES]), flags=re.DOTALL)
    return start + bytes(data[MOST_BOXES:])
