"""Pictures for tests: a smooth one, folders of noisy colours that features tell apart, and files made by hand."""

import gzip
import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"blue": (40, 60, 200), "green": (50, 190, 60), "red": (210, 50, 40)}


def write_images(folder, per_class, seed=0, names=COLOURS):
    rng = np.random.default_rng(seed)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(per_class):
            pixels = np.clip(np.array(COLOURS.get(name, (0, 0, 0))) + rng.normal(0, 25, (8, 8, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{seed}-{i}.png")


Member = tuple[str, bytes]  # of an archive: name and content


def write_tar(path: Path, members: Iterable[Member], format_: int = tarfile.DEFAULT_FORMAT) -> Path:
    """Write a tar archive of these files; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format_) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write an array in the format of MNIST, compressed if the path ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">I", n) for n in array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def photo(height: int = 24, width: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth uint8 (height, width, 3), so that JPEG hardly changes it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def save(path: Path, pixels: np.ndarray | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo() if pixels is None else pixels).save(path, **options)
    return path


def png(values: np.ndarray, colour: int = 0, bits: int = 8, before: tuple = (), after: tuple = ()) -> bytes:
    """A PNG of the values (H, W) or (H, W, C), of PNG's type `colour`, with more (kind, data) around its pixels."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values)
    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    chunks = [head, *before, (b"IDAT", zlib.compress(rows)), *after, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def tiff(values: np.ndarray, *more: tuple, kind: int = 1, order: str = "<", bits: int = 0, zero_is_white: bool = False):
    """An uncompressed TIFF of the values (H, W), or (H, W, 3) for colours, with more (tag, type, values); `kind`: 1 for
    unsigned, 2 for signed, 3 for floats."""
    height, width, samples = (*values.shape, 1)[:3]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    sizes = [bits or 8 * values.itemsize] * samples
    colour = 2 if samples == 3 else int(not zero_is_white)
    entries = [(256, 4, [width]), (257, 4, [height]), (258, 3, sizes), (259, 3, [1]), (262, 3, [colour]),
               (273, 4, [0]), (277, 3, [samples]), (278, 4, [height]), (279, 4, [len(data)]),
               (339, 3, [kind] * samples), *more]  # fmt: skip
    aside, table, place = b"", b"", 14 + 12 * len(entries)
    packed = {1: "B", 3: "H", 4: "L", 8: "h", 9: "l", 11: "f", 12: "d"}
    room = sum(len(found) for *_, found in map(list, entries)) * 8  # for all values that lie aside
    for tag, form, numbers in sorted(entries):
        numbers = [place + room] if tag == 273 else numbers
        value = struct.pack(f"{order}{len(numbers)}{packed[form]}", *numbers)
        where = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(order + "L", place + len(aside))
        aside += value if len(value) > 4 else b""
        table += struct.pack(order + "HHL", tag, form, len(numbers)) + where
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HLH", 42, 8, len(entries))
    return start + table + bytes(4) + aside.ljust(room, b"\0") + data


def exif(orientation: int, order: str = ">", kind: int = 3, count: int = 1) -> bytes:
    """An EXIF block that says only how the picture is turned; `kind`: 3 for SHORT, 4 for LONG."""
    value = struct.pack(f"{order}{count}{ {3: 'H', 4: 'L'}[kind] }", *[orientation] * count)
    where = value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(order + "L", 26)
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HLH", 42, 8, 1)
    return start + struct.pack(order + "HHL", 274, kind, count) + where + bytes(4) + (value if len(value) > 4 else b"")
