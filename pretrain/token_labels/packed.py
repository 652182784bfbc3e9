"""The packed file: dense labels of many images in one memory-mappable file.

    line 1      "poslabel dense labels, format 1"
    line 2      JSON: how many images and classes, the map's shape, annotator, geometry; see `Header`
    ...         spaces up to a multiple of 4,096 bytes; so is every part that follows
    ends        int64 (n,)     where each name ends in `names`
    names       bytes          relative file names as the disk has them, in the order of the records
    digests     uint32 (n,)    CRC-32 of each image's pixels
    states      uint8 (n,)     1: labelled, 2: the image could not be read (0, in an unfinished file: not yet)
    records     (n, 2, k, H, W) of 16 bits: the k largest logits of each cell as float16, and their classes as uint16

While it is made it is called NAME.part; it gets its name when every record is there. A record's state is written after
the record has reached the disk, so that what a killed process left is gone on with, and ends as the same bytes.
All numbers are little-endian. Letters: n images, k classes of each cell, H x W cells of a map.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.checkpoints.disk import writing
from common.checkpoints.storage import sync
from common.errors import Refusal

FORMAT = 1
MAGIC = "poslabel dense labels, format "
PAGE = 4096
LONGEST = 1 << 26  # bytes of a header: a million class names
NOT_YET, LABELLED, UNREADABLE = 0, 1, 2
MOST_CLASSES = 1 << 16


@dataclass(frozen=True)
class Header:
    """What a packed file says of itself; nothing that differs between two runs of one command."""

    images: int
    names_bytes: int
    names_crc: int  # CRC-32 of ends and names
    named: bool  # by files; else images are known by their number in the data set
    channels: int  # of the images whose pixels `digests` are of
    classes: int
    class_names: list[str] | None
    top: int  # classes kept of each cell
    grid: list[int]  # (H, W)
    size: list[int]  # (height, width) in pixels of what the annotator saw
    crop: float | None  # None: whole images, squashed to the size; else what of their tighter side, in the centre
    annotator: str
    weights_sha256: str
    precision: str
    batch: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of a record."""
        return 2, self.top, self.grid[0], self.grid[1]

    @property
    def record(self) -> int:
        """Bytes of a record."""
        return 2 * int(np.prod(self.shape))

    def encoded(self) -> bytes:
        """The first two lines and the spaces behind them."""
        text = f"{MAGIC}{FORMAT}\n{json.dumps(asdict(self), ensure_ascii=True)}\n".encode("ascii")
        return text.ljust(_pages(len(text)))

    def places(self, start: int) -> dict[str, int]:
        """Offset of every part of a file whose header takes `start` bytes, and `end`, its size."""
        sizes = {"ends": 8 * self.images, "names": self.names_bytes, "digests": 4 * self.images, "states": self.images}
        places, at = {}, start
        for part, size in (*sizes.items(), ("records", self.record * self.images)):
            places[part], at = at, at + (size if part == "records" else _pages(size))
        return places | {"end": at}


def index_crc(ends: np.ndarray, names: bytes) -> int:
    """CRC-32 of a list of names."""
    return zlib.crc32(names, zlib.crc32(ends.astype("<i8").tobytes()))


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def header_of(path: Path) -> tuple[Header, int]:
    """The header of a file and its bytes. Raises Refusal for what is no such file, of another format, or cut off."""
    try:
        with path.open("rb") as file:
            first, second = file.readline(100), file.readline(LONGEST)
    except OSError as error:
        raise Refusal(f"labels {path}: {error.strerror}; expected a file made by generate_labels") from None
    begin = MAGIC.encode()
    if not first.startswith(begin):
        raise Refusal(f"labels {path}: it is no file of dense labels; expected one made by generate_labels")
    if first != f"{MAGIC}{FORMAT}\n".encode():
        number = first[len(begin) :].decode("ascii", "replace").strip()
        newer = number.isdigit() and int(number) > FORMAT
        raise Refusal(
            f"labels {path}: it has format {number}, and this version reads format {FORMAT}: "
            f"{'update poslabel' if newer else 'generate it again'}"
        )
    try:
        content = json.loads(second)
        header = Header(**content)
        places = header.places(_pages(len(first) + len(second)))
        sound = min(header.images, header.top, *header.grid, *header.size) > 0 and len(header.grid) == 2
    except (ValueError, TypeError) as error:
        if not second.endswith(b"\n"):
            raise Refusal(f"labels {path}: it is cut off in its header; copy it again") from None
        raise Refusal(f"labels {path}: its header cannot be read ({error}); generate it again") from None
    if not sound:
        raise Refusal(f"labels {path}: its header says impossible things ({second[:80]!r}…); generate it again")
    if (size := path.stat().st_size) != places["end"]:
        what = "cut off" if size < places["end"] else "longer than it should be"
        raise Refusal(f"labels {path}: it is {what}: {size:,} bytes, expected {places['end']:,}; copy it again")
    return header, _pages(len(first) + len(second))


class Packed:
    """A finished packed file, opened to read: one memory map a process, however it got there."""

    def __init__(self, path: Path) -> None:
        """Raises Refusal for a file that is none, older, newer, cut off or damaged in its index."""
        self.path = path
        self.header, start = header_of(path)
        self.places = self.header.places(start)
        self._map: np.ndarray | None = None
        self._records: np.ndarray | None = None
        if index_crc(self.ends, self.names.tobytes()) != self.header.names_crc:
            raise Refusal(f"labels {path}: its list of images is damaged; copy it again")
        if unfinished := int((self.states == NOT_YET).sum()):
            raise Refusal(f"labels {path}: {unfinished:,} records are empty: it is damaged; generate it again")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None, "_records": None}  # opened again where it is unpickled

    @property
    def _bytes(self) -> np.ndarray:
        if self._map is None:
            self._map = np.asarray(np.memmap(self.path, np.uint8, "r"))  # a plain array is sliced in half the time
        return self._map

    def _part(self, name: str) -> np.ndarray:
        n = self.header.images
        sizes = {"ends": 8 * n, "names": self.header.names_bytes, "digests": 4 * n, "states": n}
        return self._bytes[self.places[name] : self.places[name] + sizes[name]]

    @property
    def ends(self) -> np.ndarray:
        """Where each name ends, int64 (n,)."""
        return self._part("ends").view("<i8")

    @property
    def names(self) -> np.ndarray:
        """All names, uint8."""
        return self._part("names")

    @property
    def digests(self) -> np.ndarray:
        """CRC-32 of each image's pixels, uint32 (n,)."""
        return self._part("digests").view("<u4")

    @property
    def states(self) -> np.ndarray:
        """State of each record, uint8 (n,)."""
        return self._part("states")

    def record(self, row: int) -> np.ndarray:
        """Record `row`, uint16 (2, k, H, W): logits as float16, classes; read-only, and not read before it is used."""
        if self._records is None:
            self._records = self._bytes[self.places["records"] :].view("<u2").reshape(-1, *self.header.shape)
        return self._records[row]


# ---------------------------------------------------------------------------------------------------- making one


def part_of(path: Path) -> Path:
    """Name of a packed file while it is made."""
    return path.with_name(f"{path.name}.part")


def begin(path: Path, header: Header, ends: np.ndarray, names: bytes) -> bool:
    """Make PATH.part with no record in it, or find that of an interrupted run of the same command: whether it was
    there. Raises Refusal if it is of another command."""
    part, encoded = part_of(path), header.encoded()
    places = header.places(len(encoded))
    if part.exists():
        _refuse_other(part, header)
        return True
    aside = part.with_name(f".{part.name}.{os.getpid()}")
    try:
        with writing(part, places["end"]), aside.open("wb") as file:
            for at, content in ((0, encoded), (places["ends"], ends.tobytes()), (places["names"], names)):
                file.seek(at)
                file.write(content)
            file.truncate(places["end"])  # empty records take no room yet
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, part)
        sync(part.parent)
    finally:
        aside.unlink(missing_ok=True)
    return False


def _refuse_other(part: Path, header: Header) -> None:
    try:
        found, _ = header_of(part)
    except Refusal as refusal:
        raise Refusal(f"{refusal}: remove {part} to begin anew") from None
    for each in fields(Header):
        before, now = (getattr(one, each.name) for one in (found, header))
        if before != now:
            what = (
                "the list of images" if each.name.startswith("names_") else f"{each.name} ({before} there, {now} now)"
            )
            raise Refusal(
                f"{part} is of an interrupted run that differs in {what:.200}: give its command again, or remove it to "
                "begin anew"
            )


class Writer:
    """Writes records into PATH.part; several processes may, each its own."""

    def __init__(self, path: Path, header: Header) -> None:
        self.part, self.header = part_of(path), header
        self.places = header.places(len(header.encoded()))
        self.file: BinaryIO = self.part.open("r+b", buffering=0)
        self.waiting: list[tuple[int, bytes]] = []  # states of records that are not surely on the disk

    def states(self) -> np.ndarray:
        """States of all records as they are now, uint8 (n,)."""
        return np.frombuffer(os.pread(self.file.fileno(), self.header.images, self.places["states"]), np.uint8).copy()

    def write(self, rows: Sequence[int], records: np.ndarray, digests: np.ndarray, states: np.ndarray) -> None:
        """Write records (b, 2, k, H, W) of 16 bits with digests (b,) and states (b,); `rows` follow each other."""
        assert records.shape == (len(rows), *self.header.shape) and list(rows) == list(range(rows[0], rows[-1] + 1))
        with writing(self.part, self.header.record * self.header.images):
            self._put(self.places["records"] + rows[0] * self.header.record, records.tobytes())
            self._put(self.places["digests"] + 4 * rows[0], digests.astype("<u4").tobytes())
        self.waiting.append((rows[0], states.astype(np.uint8).tobytes()))

    def commit(self) -> None:
        """Flush what was written to the disk, and say that it is there."""
        with writing(self.part):
            os.fsync(self.file.fileno())
            for row, states in self.waiting:
                self._put(self.places["states"] + row, states)
        self.waiting = []

    def _put(self, at: int, content: bytes) -> None:
        view = memoryview(content)
        while view:  # a signal, or a limit of the system, may cut a write short
            done = os.pwrite(self.file.fileno(), view, at)
            view, at = view[done:], at + done

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def finish(path: Path) -> None:
    """Give PATH.part, which is whole, its name."""
    part = part_of(path)
    sync(part)
    os.replace(part, path)
    sync(path.parent)
