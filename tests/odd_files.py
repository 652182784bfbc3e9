"""Odd files, each with what has to come of it: `python tests/odd_files.py FOLDER` writes them and odd_files.txt.

The picture is one of 24x32 pixels in four flat quarters, so that a turn, a wrong range or a wrong colour is seen.
"""

import bz2
import gzip
import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, features

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests.pictures import exif, png, tiff

Colour = tuple[int, int, int]
RED, GREEN, BLUE, SAND = (200, 30, 30), (30, 180, 40), (30, 40, 190), (220, 210, 120)
QUARTERS: tuple[Colour, ...] = (RED, GREEN, BLUE, SAND)  # top left, top right, bottom left, bottom right
GREYS = (30, 90, 150, 230)  # likewise
HEIGHT, WIDTH = 24, 32
EXIF = b"Exif\0\0"  # begins the block in a JPEG
WEBP, AVIF, JPEG2000 = features.check("webp"), features.check("avif"), features.check("jpg_2000")


@dataclass(frozen=True)
class Odd:
    """A file, and what has to come of it: a picture of this size and these quarters, a reason, or not being listed."""

    name: str
    content: Callable[[], bytes]
    quarters: tuple[Colour, ...] = QUARTERS
    size: tuple[int, int] = (HEIGHT, WIDTH)
    near: int = 3  # grey levels
    reason: str = ""  # regular expression; of one that cannot be read
    listed: bool = True  # among the images
    needs: bool = True  # whether this installation has what it takes

    @property
    def is_read(self) -> bool:
        """Whether a picture comes of it."""
        return self.listed and not self.reason

    def outcome(self) -> str:
        """What has to come of it, in words."""
        if not self.listed:
            return "not listed"
        return f"unreadable: {self.reason}" if self.reason else f"{self.size[1]}x{self.size[0]}, {self.quarters}"


def quartered(colours: tuple = QUARTERS, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """uint8 (height, width, 3), or (height, width) of greys, in four quarters."""
    top, left = np.arange(height) < height // 2, np.arange(width) < width // 2
    which = 2 * (~top)[:, None] + (~left)[None]
    return np.array(colours, np.uint8)[which]


def saved(kind: str, pixels: np.ndarray | Image.Image | None = None, mode: str | None = None, **options) -> bytes:
    """The picture as Pillow writes it."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(quartered() if pixels is None else pixels)
    aside = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(aside, kind, **options)
    return aside.getvalue()


def jpeg(**options) -> bytes:
    """The picture as a JPEG of high quality."""
    return saved("JPEG", quality=95, **options)


def segment(data: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with a segment put at its beginning."""
    return data[:2] + b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body + data[2:]


def grey() -> np.ndarray:
    """The picture in greys, uint8 (24, 32)."""
    return quartered(GREYS)


def same(values: tuple[int, ...]) -> tuple[Colour, ...]:
    """Greys as colours."""
    return tuple((value, value, value) for value in values)


def turned(orientation: int) -> tuple[tuple[Colour, ...], tuple[int, int]]:
    """(quarters, size) of the picture when it is turned as EXIF's number says."""
    a, b, c, d = QUARTERS
    order = {1: (a, b, c, d), 2: (b, a, d, c), 3: (d, c, b, a), 4: (c, d, a, b), 5: (a, c, b, d), 6: (c, a, d, b),
             7: (d, b, c, a), 8: (b, d, a, c)}[orientation]  # fmt: skip
    return order, (WIDTH, HEIGHT) if orientation >= 5 else (HEIGHT, WIDTH)


def see_through() -> Image.Image:
    """The picture, its last quarter transparent."""
    image = Image.fromarray(quartered()).convert("RGBA")
    image.paste((0, 0, 0, 0), (WIDTH // 2, HEIGHT // 2, WIDTH, HEIGHT))
    return image


def animated(kind: str, **options) -> bytes:
    """The picture, and a black one after it."""
    more = [Image.new("RGB", (WIDTH, HEIGHT))]
    return saved(kind, save_all=True, append_images=more, **options)


def palette_bmp(top_down: bool = False, bits: int = 24) -> bytes:
    """An uncompressed BMP by hand, whose rows go down if its height is below 0."""
    rows = quartered()[:, :, ::-1]
    rows = rows if top_down else rows[::-1]
    if bits == 32:
        rows = np.concatenate([rows, np.zeros((HEIGHT, WIDTH, 1), np.uint8)], 2)
    height = -HEIGHT if top_down else HEIGHT
    head = struct.pack("<LllHHLLllLL", 40, WIDTH, height, 1, bits, 0, rows.nbytes, 2835, 2835, 0, 0)
    return b"BM" + struct.pack("<LHHL", 54 + rows.nbytes, 0, 0, 54) + head + rows.tobytes()


def oversized_png() -> bytes:
    """A PNG that says it has 60,000 x 60,000 pixels."""
    data = bytearray(png(grey()))
    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def oversized_jpeg() -> bytes:
    """A JPEG that says it has 60,000 x 60,000 pixels."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 60000, 60000)
    return bytes(data)


def broken_checksum(kind: bytes) -> bytes:
    """A PNG whose chunk of this kind has another checksum."""
    data = bytearray(png(quartered(), 2, before=((b"tEXt", b"Comment\0nothing"),)))
    at = data.index(kind)
    length = int.from_bytes(data[at - 4 : at], "big")
    data[at + 4 + length] ^= 1
    return bytes(data)


def broken_pixels() -> bytes:
    """A PNG in whose packed pixels a byte is another, with a checksum that fits it."""
    data = png(quartered(), 2)
    at = data.index(b"IDAT")
    body = bytearray(data[at + 4 : at + 4 + int.from_bytes(data[at - 4 : at], "big")])
    body[len(body) // 2] ^= 0x55
    return data[: at + 4] + body + struct.pack(">I", zlib.crc32(b"IDAT" + body)) + data[at + 8 + len(body) :]


def text_bomb() -> bytes:
    """A PNG with a compressed text of 100 MB."""
    body = b"Comment\0\0" + zlib.compress(bytes(100_000_000))
    return png(quartered(), 2, before=((b"zTXt", body),))


def apng() -> bytes:
    """An animated PNG."""
    return animated("PNG", duration=100)


def few_bits(bits: int) -> bytes:
    """A PNG of greys 0 to 3, each of 2 or 4 bits."""
    values = quartered((0, 1, 2, 3)).reshape(HEIGHT, -1, 8 // bits)
    packed = (values << np.arange(8 - bits, -1, -bits, dtype=np.uint8)).sum(-1).astype(np.uint8)
    data = bytearray(png(packed, 0, bits))
    data[16:20] = struct.pack(">I", WIDTH)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def commented() -> bytes:
    """A PNG with a text in Latin-1 and one of 60 kB."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Author", "Müller")
    texts.add_text("Comment", "x" * 60000)
    return saved("PNG", pnginfo=texts)


def packed_zip() -> bytes:
    """A zip archive with a JPEG in it."""
    aside = io.BytesIO()
    with zipfile.ZipFile(aside, "w") as archive:
        archive.writestr("a.jpg", jpeg())
    return aside.getvalue()


def text(words: str) -> Callable[[], bytes]:
    """What writes these words."""
    return words.encode


NOT_OPENED = "none of the kinds of pictures that are opened|broken, or a kind of"
BROKEN = (
    "[Tt]runcat|broken|corrupt|ended|not enough|unrecognized|premature|Unsupported|negative|not identify"
    "|could not create decoder"
)
TOO_MANY = "more than the 89,478,485 allowed"
HTML = "<!DOCTYPE html><html><body><h1>404 Not Found</h1></body></html>"
SVG = "<svg width='32' height='24'><rect width='9' height='9'/></svg>"
POSTSCRIPT = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 24\nshowpage\n"
ON_WHITE: tuple[Colour, ...] = (RED, GREEN, BLUE, (255, 255, 255))
FADED = (*same((81, 119, 54)), (255, 255, 255))  # luma
HALVES = same((0, 0, 255, 255))
BITS = quartered((0, 0, 255, 255)) > 0


def deep(top: int, values: tuple[int, ...] = GREYS) -> np.ndarray:
    """The greys as uint16 (24, 32), with `top` as white."""
    return np.rint(quartered(values).astype(np.float64) * top / 255).astype(np.uint16)


JPEGS = [
    Odd("baseline.jpg", jpeg),
    Odd("progressive.jpg", lambda: jpeg(progressive=True)),
    Odd("full-chroma.jpg", lambda: jpeg(subsampling=0)),
    Odd("restarts.jpg", lambda: jpeg(restart_marker_blocks=1)),
    Odd("stored-rgb.jpg", lambda: jpeg(keep_rgb=True)),
    Odd("grey.jpg", lambda: saved("JPEG", grey(), quality=95), same(GREYS)),
    Odd("cmyk.jpg", lambda: saved("JPEG", mode="CMYK", quality=95), near=6),
    *[Odd(f"turned-{n}.jpg", lambda n=n: jpeg(exif=EXIF + exif(n)), *turned(n)) for n in range(2, 9)],
    Odd("turned-6-little-endian.jpg", lambda: jpeg(exif=EXIF + exif(6, "<")), *turned(6)),
    Odd("turned-0.jpg", lambda: jpeg(exif=EXIF + exif(0))),
    Odd("turned-9.jpg", lambda: jpeg(exif=EXIF + exif(9))),
    Odd("exif-of-nonsense.jpg", lambda: jpeg(exif=EXIF + b"II*\0\xff\xff\xff\xff")),
    Odd("long-comment.jpg", lambda: segment(jpeg(), 0xFE, b"x" * 65000)),
    Odd("colour-profile.jpg", lambda: jpeg(icc_profile=bytes(100_000))),
    Odd("text-after-the-end.jpg", lambda: jpeg() + b"<?php echo 1; ?>" * 100),
    Odd("two-pictures.mpo", lambda: animated("MPO", quality=95)),
    Odd("one-pixel.jpg", lambda: saved("JPEG", np.full((1, 1, 3), RED, np.uint8), quality=95), (RED,) * 4, (1, 1)),
    Odd("one-row.jpg", lambda: saved("JPEG", quartered((*QUARTERS[:2],) * 2, 1, 500), quality=95),
        (RED, GREEN, RED, GREEN), (1, 500), near=6),
    Odd("half.jpg", lambda: jpeg()[: len(jpeg()) // 2], reason=BROKEN),
    Odd("head-alone.jpg", lambda: jpeg()[:100], reason=BROKEN),
    Odd("start-alone.jpg", lambda: b"\xff\xd8\xff\xe0", reason=BROKEN),
    Odd("oversized.jpg", oversized_jpeg, reason=TOO_MANY),
]  # fmt: skip
PNGS = [
    Odd("colour.png", lambda: png(quartered(), 2), near=0),
    Odd("interlaced.png", lambda: INTERLACED, same(GREYS), near=0),
    Odd("grey.png", lambda: png(grey()), same(GREYS), near=0),
    Odd("one-bit.png", lambda: saved("PNG", Image.fromarray(BITS)), HALVES, near=0),
    Odd("two-bits.png", lambda: few_bits(2), same((0, 85, 170, 255)), near=0),
    Odd("four-bits.png", lambda: few_bits(4), same((0, 17, 34, 51)), near=0),
    Odd("palette.png", lambda: saved("PNG", mode="P"), near=40),
    Odd("palette-transparent.png", lambda: saved("PNG", see_through().quantize(8)), ON_WHITE, near=8),
    Odd("transparent.png", lambda: saved("PNG", see_through()), ON_WHITE, near=0),
    Odd("grey-transparent.png", lambda: saved("PNG", see_through(), "LA"), FADED, near=2),
    Odd("transparent-colour.png", lambda: png(quartered(), 2, before=((b"tRNS", struct.pack(">3H", *SAND)),)),
        ON_WHITE, near=0),
    Odd("sixteen-bits.png", lambda: png(deep(65535), bits=16), same(GREYS), near=1),
    Odd("sixteen-bits-colour.png", lambda: png(quartered().astype(np.uint16) * 257, 2, 16), near=1),
    Odd("twelve-bits-declared.png", lambda: png(deep(65535), bits=16, before=((b"sBIT", b"\x0c"),)),
        same(GREYS), near=2),
    Odd("sixteen-bits-dark.png", lambda: png(deep(4095), bits=16), reason="data_range"),
    Odd("turned.png", lambda: saved("PNG", exif=exif(6)), *turned(6), near=0),
    Odd("animated.png", apng, near=0),
    Odd("texts.png", commented, near=0),
    Odd("text-bomb.png", text_bomb, near=0),
    Odd("wrong-checksum-of-a-text.png", lambda: broken_checksum(b"tEXt"), near=0),
    Odd("wrong-checksum-of-pixels.png", lambda: broken_checksum(b"IDAT"), near=0),
    Odd("broken-pixels.png", broken_pixels, reason="broken data stream"),
    Odd("half.png", lambda: png(quartered(), 2)[:70], reason=BROKEN),
    Odd("head-alone.png", lambda: png(quartered(), 2)[:33], reason=BROKEN),
    Odd("oversized.png", oversized_png, reason=TOO_MANY),
]  # fmt: skip
TIFFS = [
    Odd("plain.tif", lambda: tiff(quartered()), near=0),
    Odd("big-endian.tiff", lambda: tiff(grey(), order=">"), same(GREYS), near=0),
    Odd("zero-is-white.tif", lambda: tiff(grey(), zero_is_white=True), same(tuple(255 - v for v in GREYS)), near=0),
    Odd("lzw.tif", lambda: saved("TIFF", compression="tiff_lzw"), near=0),
    Odd("deflate.tif", lambda: saved("TIFF", compression="tiff_adobe_deflate"), near=0),
    Odd("fax.tif", lambda: saved("TIFF", Image.fromarray(BITS), compression="group4"), HALVES, near=0),
    Odd("cmyk.tif", lambda: saved("TIFF", mode="CMYK"), near=6),
    Odd(
        "several-of-grey-and-alpha.tif",
        lambda: saved("TIFF", see_through(), "LA"),
        (*same((81, 119, 54)), (255,) * 3),
        near=2,
    ),
    Odd("two-pages.tif", lambda: animated("TIFF"), near=0),
    Odd("sixteen-bits.tif", lambda: tiff(deep(65535)), same(GREYS), near=1),
    Odd("twelve-bits.tif", lambda: tiff(deep(4095), (281, 3, [4095])), same(GREYS), near=1),
    Odd("floats.tif", lambda: tiff((grey() / 255).astype(np.float32), kind=3), same(GREYS), near=1),
    Odd("floats-to-255.tif", lambda: tiff(grey().astype(np.float32), kind=3), same(GREYS), near=1),
    Odd("floats-below-0.tif", lambda: tiff(grey().astype(np.float32) - 100, kind=3), reason="data_range"),
    Odd("signed-bytes.tif", lambda: tiff((grey() // 2).astype(np.int8), kind=2), reason="signed values of 8 bits"),
    Odd("half.tif", lambda: tiff(quartered())[:900], reason=BROKEN),
    Odd("turned.tif", lambda: tiff(quartered(), (274, 3, [3])), *turned(3), near=0),
]
OTHERS = [
    Odd("colour.bmp", palette_bmp, near=0),
    Odd("top-down.bmp", lambda: palette_bmp(top_down=True), near=0),
    Odd("unused-fourth-channel.bmp", lambda: palette_bmp(bits=32), near=0),
    Odd("palette.bmp", lambda: saved("BMP", mode="P"), near=40),
    Odd("one-bit.bmp", lambda: saved("BMP", Image.fromarray(BITS)), HALVES, near=0),
    Odd("half.bmp", lambda: palette_bmp()[:900], reason=BROKEN),
    Odd("animated.gif", lambda: animated("GIF"), near=8),
    Odd("transparent.gif", lambda: saved("GIF", see_through()), ON_WHITE, near=8),
    Odd("half.gif", lambda: saved("GIF")[:60], reason=BROKEN),
    Odd("binary.ppm", lambda: saved("PPM"), near=0),
    Odd("written-out.pgm", lambda: b"P2 2 2 255\n30 90\n150 230\n", same(GREYS), (2, 2), near=0),
    Odd("bits.pbm", lambda: b"P1 2 2\n1 1\n0 0\n", HALVES, (2, 2), near=0),
    Odd("ten-bits.pgm", lambda: b"P5 32 24 1023\n" + deep(1023).astype(">u2").tobytes(), same(GREYS), near=1),
    Odd("short.ppm", lambda: saved("PPM")[:500], reason=BROKEN),
    Odd("packed.tga", lambda: saved("TGA", compression="tga_rle"), near=0),
    Odd("from-the-bottom.tga", lambda: saved("TGA", orientation=-1), near=0),
    Odd("plain.pcx", lambda: saved("PCX"), near=0),
    Odd("plain.sgi", lambda: saved("SGI"), near=0),
    Odd("lossy.webp", lambda: saved("WEBP", quality=95), near=12, needs=WEBP),
    Odd("transparent.webp", lambda: saved("WEBP", see_through(), lossless=True), ON_WHITE, near=0, needs=WEBP),
    Odd("animated.webp", lambda: animated("WEBP", lossless=True), near=0, needs=WEBP),
    Odd("turned.webp", lambda: saved("WEBP", lossless=True, exif=exif(8)), *turned(8), near=0, needs=WEBP),
    Odd("half.webp", lambda: saved("WEBP")[:60], reason=BROKEN, needs=WEBP),
    Odd("plain.jp2", lambda: saved("JPEG2000"), near=0, needs=JPEG2000),
    Odd("plain.avif", lambda: saved("AVIF", quality=100, subsampling="4:4:4"), near=6, needs=AVIF),
]
NO_PICTURES = [
    Odd("empty.jpg", lambda: b"", reason="the file is empty"),
    Odd("zeros.jpg", lambda: bytes(10_000), reason=NOT_OPENED),
    Odd("page-of-a-server.jpg", text(HTML), reason=NOT_OPENED),
    Odd("drawing.png", text(SVG), reason=NOT_OPENED),
    Odd("postscript.jpg", text(POSTSCRIPT), reason=NOT_OPENED),
    Odd("document.png", text("%PDF-1.4\n1 0 obj\n"), reason=NOT_OPENED),
    Odd("archive.jpg", packed_zip, reason=NOT_OPENED),
    Odd("compressed.jpg", lambda: gzip.compress(jpeg()), reason=NOT_OPENED),
    Odd("packed.png", lambda: bz2.compress(png(grey())), reason=NOT_OPENED),
    Odd("telephone.jpg", lambda: struct.pack(">L", 24) + b"ftypheic" + bytes(300), reason=NOT_OPENED),
    Odd("pointer-of-lfs.jpg", text("version 1 of git-lfs\noid sha256:0\nsize 9\n"),
        reason=NOT_OPENED),
    Odd("notes.txt", text("none"), listed=False),
    Odd("telephone.heic", lambda: struct.pack(">L", 24) + b"ftypheic", listed=False),
    Odd("drawing.svg", text(SVG), listed=False),
    Odd("page.pdf", text("%PDF-1.4\n"), listed=False),
    Odd(".hidden.png", lambda: png(grey()), listed=False),
    Odd("._resource.jpg", lambda: b"\0\5\x16\7" + bytes(100), listed=False),
    Odd("Thumbs.db", lambda: bytes(100), listed=False),
]  # fmt: skip
NAMES = [
    Odd("a jpeg.png", jpeg),
    Odd("a png.jpg", lambda: png(quartered(), 2), near=0),
    Odd("UPPER.JPEG", jpeg),
    Odd("two.jpg.png", lambda: png(quartered(), 2), near=0),
    Odd("a\nline.png", lambda: png(quartered(), 2), near=0),
    Odd("Größe 圖 🙂.png", lambda: png(quartered(), 2), near=0),
    Odd("%41 {0} $HOME 'quoted'.png", lambda: png(quartered(), 2), near=0),
    Odd("-rf.png", lambda: png(quartered(), 2), near=0),
    Odd("n" * 246 + ".png", lambda: png(quartered(), 2), near=0),
]


def _interlaced() -> bytes:
    """A PNG of greys in Adam7's seven passes."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(
        b"\0" + row.tobytes() for y, x, down, right in passes for row in grey()[y::down, x::right] if row.size
    )
    head = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 0, 0, 0, 1)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


INTERLACED = _interlaced()
CORPUS = [odd for odd in [*JPEGS, *PNGS, *TIFFS, *OTHERS, *NO_PICTURES, *NAMES] if odd.needs]


def write(folder: Path) -> None:
    """Write all of them into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for odd in CORPUS:
        (folder / odd.name).write_bytes(odd.content())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    lines = [f"{odd.name!r}: {odd.outcome()}\n" for odd in CORPUS]
    (Path(sys.argv[1]) / "odd_files.txt").write_text("".join(lines), encoding="utf-8")
    print(f"{len(CORPUS)} files in {sys.argv[1]}, what has to come of each in odd_files.txt")
