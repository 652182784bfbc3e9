"""Tags of a picture, as TIFF files and EXIF blocks keep them in directories, and the orientation that they give.

Nothing is raised: what a block does not reach, or what is no number, is None.
"""

from __future__ import annotations

import re
import struct
from typing import Any

ORIENTATION = 274
START = b"Exif\0\0"  # before the block in a JPEG, and in other pictures that were made from one
TYPES = {3: "H", 4: "L", 5: "LL", 8: "h", 9: "l", 10: "ll", 11: "f", 12: "d", 13: "L", 16: "Q", 17: "q"}  # of values


def byte_order(start: bytes) -> str:
    """Return "<" or ">" for a TIFF or EXIF block, nothing for anything else."""
    order = {b"II": "<", b"MM": ">"}.get(start[:2], "")
    return order if len(start) >= 8 and sorted(start[2:4]) in ([0, 42], [0, 43]) else ""


class Directory:
    """First directory of a TIFF or EXIF block, as far as the block reaches.

    order    "<" or ">" of its numbers
    start    where it begins
    entries  tag -> (type, count, place of its entry)
    """

    def __init__(self, block: Any) -> None:
        """Read the directory of `block`, bytes for which `byte_order` is known."""
        self.block, self.order = block, byte_order(bytes(block[:8]))
        self.is_big = 43 in bytes(block[2:4])  # a BigTIFF: places and counts of 8 bytes
        self.offset = "Q" if self.is_big else "L"
        self.entries: dict[int, tuple[int, int, int]] = {}
        self.start = len(block) if self.is_big and len(block) < 16 else self._place(8 if self.is_big else 4)
        self.count, entry = ("Q", "HHQ8x") if self.is_big else ("H", "HHL4x")
        first = self.start + struct.calcsize(self.order + self.count)
        self.entry_size = struct.calcsize(self.order + entry)
        if first <= len(block):
            (count,) = struct.unpack_from(self.order + self.count, block, self.start)
            end = first + self.entry_size * min(count, (len(block) - first) // self.entry_size)
            for k, (tag, kind, number) in enumerate(struct.iter_unpack(self.order + entry, block[first:end])):
                self.entries[tag] = kind, number, first + self.entry_size * k

    def _place(self, at: int) -> int:
        return struct.unpack_from(self.order + self.offset, self.block, at)[0]

    def value(self, *tags: int) -> Any:
        """Return the first value of the first of these tags that has one, an int or a float; else None."""
        return next((value for value in map(self._value, tags) if value is not None), None)

    def _value(self, tag: int) -> int | float | None:
        kind, count, at = self.entries.get(tag, (0, 0, 0))
        letters = TYPES.get(kind)
        if letters is None or count < 1:
            return None
        place, room = (at + 12, 8) if self.is_big else (at + 8, 4)
        size = struct.calcsize("<" + letters)
        if size * count > room:
            place = self._place(place)
        if place + size > len(self.block):
            return None
        value, *divisor = struct.unpack_from(self.order + letters, self.block, place)
        return value if not divisor else value / divisor[0] if divisor[0] else None

    def bytes_of(self, tag: int, most: int) -> bytes:
        """Return the bytes of a tag that is kept as bytes, at most `most` of them; nothing without that tag."""
        if tag not in self.entries:
            return b""
        _, count, at = self.entries[tag]
        place = self._place(at + (12 if self.is_big else 8))
        return bytes(self.block[place : place + min(count, most)])


def orientation_of(exif: list[bytes], xmp: bytes) -> int:
    """Return the orientation, 1 to 8, of the first EXIF block that knows it, or XMP as Pillow reads it; else 1."""
    for block in exif:
        block = block.removeprefix(START).removeprefix(START)
        value = Directory(block).value(ORIENTATION) if byte_order(block[:8]) else None
        if value is not None:
            return known_orientation(value)
    match = xmp and re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)
    return int(match[1]) if match else 1


def known_orientation(value: float) -> int:
    """Return a stored orientation, or 1 where it is not one of 1 to 8."""
    return int(value) if value in range(1, 9) else 1
