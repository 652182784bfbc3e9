"""Part files: the decoded pixels of some hundred or thousand images that follow each other, to be memory-mapped.

    line 1     "poslabel decoded images, format 1"
    line 2     JSON: whose images these are and how they were scaled, how many, and the bytes of what follows
    ...        spaces up to 4,096 bytes
    pixels     uint8, each image as (H, W, C), one behind the other
    index      (n,) of ENTRY: where each image begins in `pixels`, its height and width, CRC-32 of its pixels
    reasons    JSON: {place of an image that cannot be read: why}; its height is 0

A part gets its name when it is whole (`write_atomically`), so whatever has the name can be read. All numbers are
little-endian.
"""

import json
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checkpoints.storage import write_atomically

# Copying an image out of the file would cost a fifth of a crop's time; crops are copies anyway.
warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)

FORMAT = 1
MAGIC = f"poslabel decoded images, format {FORMAT}\n".encode()
PAGE = 4096
ENTRY = np.dtype([("start", "<i8"), ("height", "<i4"), ("width", "<i4"), ("crc", "<u4")])


class Damaged(ValueError):
    """Error about a part file that is not what was written; it says what is wrong."""


def write(path: Path, about: str, images: Iterable[Tensor | str]) -> int:
    """Write a part of images, uint8 (C, H, W), or reasons why one cannot be read; returns how many cannot.

    about  whose images they are and how they were scaled, see `Part`
    """
    entries: list[tuple[int, int, int, int]] = []
    reasons: dict[int, str] = {}

    def fill(aside: Path) -> None:
        with aside.open("wb") as file:
            file.seek(PAGE)
            for place, image in enumerate(images):
                start = file.tell() - PAGE
                if isinstance(image, str):
                    reasons[place] = image
                    entries.append((start, 0, 0, 0))
                    continue
                pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
                file.write(pixels.data)
                entries.append((start, *pixels.shape[:2], zlib.crc32(pixels.data)))
            tail = np.array(entries, ENTRY).tobytes(), json.dumps(reasons).encode()
            head = {
                "about": about,
                "images": len(entries),
                "pixels": file.tell() - PAGE,
                "reasons": len(tail[1]),
                "crc": zlib.crc32(b"".join(tail)),
            }
            file.write(b"".join(tail))
            file.seek(0)
            file.write((MAGIC + json.dumps(head).encode() + b"\n").ljust(PAGE))

    write_atomically(path, fill)
    return len(reasons)


class Part:
    """One part file, mapped into memory.

    `index`, `reasons`: see the head of this module. Raises Damaged, or OSError, for a file that is none, or is about
    other images.
    """

    def __init__(self, path: Path, about: str, channels: int) -> None:
        self.path, self.channels = path, channels
        if path.stat().st_size < PAGE:
            raise Damaged("it is cut off")
        self._bytes = np.asarray(np.memmap(path, np.uint8, "r"))  # a plain array is sliced in half the time
        head = self._head(about)
        self.pixels = head["pixels"]
        ends = np.cumsum([PAGE + self.pixels, head["images"] * ENTRY.itemsize, head["reasons"]]).tolist()
        if len(self._bytes) != ends[-1]:
            raise Damaged(f"it has {len(self._bytes):,} bytes, expected {ends[-1]:,}")
        if zlib.crc32(self._bytes[ends[0] :].data) != head["crc"]:
            raise Damaged("its index is not what was written")
        self.index = self._bytes[ends[0] : ends[1]].view(ENTRY)
        self.reasons = {int(place): why for place, why in json.loads(self._bytes[ends[1] :].tobytes()).items()}

    def _head(self, about: str) -> dict[str, Any]:
        start = self._bytes[:PAGE].tobytes()
        if not start.startswith(MAGIC):
            raise Damaged(f"it does not begin with {MAGIC.decode().strip()!r}")
        try:
            head = json.loads(start[len(MAGIC) :])
            if head["about"] != about:
                raise Damaged("it is of other images")
            return {name: head[name] if name == "about" else int(head[name]) for name in head}
        except (ValueError, KeyError, TypeError) as error:
            raise error if isinstance(error, Damaged) else Damaged(f"its head cannot be read ({error})") from None

    def _flat(self, place: int) -> np.ndarray:
        start, height, width, _ = self.index[place].tolist()
        return self._bytes[PAGE + start : PAGE + start + height * width * self.channels]

    def read(self, place: int) -> Tensor:
        """Return image number `place` of this part, uint8 (C, H, W), channels last in memory that is the file's, which
        cannot be written to. Raises ValueError, with the reason, for one that could not be read."""
        if place in self.reasons:
            raise ValueError(self.reasons[place])
        _, height, width, _ = self.index[place].tolist()
        return torch.from_numpy(self._flat(place)).view(height, width, self.channels).permute(2, 0, 1)

    def check(self, place: int) -> None:
        """Raises Damaged if the pixels of an image are not those that were written."""
        if place not in self.reasons and zlib.crc32(self._flat(place).data) != self.index[place]["crc"]:
            raise Damaged(f"the pixels of its image {place} are not what was written")
