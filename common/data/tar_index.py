"""Index of a tar archive: its pictures and where they lie, from one pass over its headers, kept for the next time.

An archive in an archive, as ImageNet's classes are in ILSVRC2012_img_train.tar, is a folder of its name. What belongs
to a picture as WebDataset has it, NAME.cls or NAME.json beside NAME.jpg, is read on the way.
"""

from __future__ import annotations

import json
import os
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from .. import kept
from ..errors import Refusal
from ..printable import printable
from .huggingface import CANONICAL, LABEL_NAMES
from .listing import LeftOut, is_hidden

FORMAT = 2  # of the stored index
BLOCK = 512  # bytes of a header; contents begin and end on blocks
SUM = slice(148, 156)  # of a header: the sum of its bytes, with spaces in its place
RUN = 1000  # headers that are read at a time
PATIENCE, OFTEN = 5.0, 10.0  # seconds of a pass after which it is told, and between lines
MOST_LABEL = 1 << 20  # bytes of a label's member
CLASS = "cls"
COMPRESSED = {  # how a file begins -> what it is, and what undoes it
    b"\x1f\x8b": ("gzip", "gunzip --keep"),
    b"BZh": ("bzip2", "bunzip2 --keep"),
    b"\xfd7zXZ": ("xz", "unxz --keep"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}


@dataclass(frozen=True)
class Wanted:
    """What of an archive is asked for."""

    endings: frozenset[str]  # of pictures, in lower case, with the dot
    image: str | None = None  # what follows the first dot of a picture's name, where a sample has several
    label: str | None = None  # field of .json in which the label is


@dataclass
class Index:
    """Pictures of one archive, sorted by name.

    ends, buffer      int64 (n,), uint8: names, as `images.NamedFiles` has them
    offsets, sizes    int64 (n,): where the content of each lies
    text_ends, texts  int64 (n,), uint8: the label of each as text, empty where it has none
    facts             what a user should know: `others`, `special`, `replaced`, `alone`, `field`, `why`
    """

    ends: np.ndarray
    buffer: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    text_ends: np.ndarray
    texts: np.ndarray
    facts: dict[str, Any]

    def names(self) -> list[bytes]:
        """Return the names, one by one."""
        return split(self.ends, self.buffer)

    def labels(self) -> list[bytes]:
        """Return the text of the label of each picture, one by one."""
        return split(self.text_ends, self.texts)


OF_EACH = ("ends", "offsets", "sizes", "text_ends")
ARRAYS = (*OF_EACH, "buffer", "texts")


def split(ends: np.ndarray, buffer: np.ndarray) -> list[bytes]:
    """Return the texts that end at `ends` in a buffer."""
    whole, stops = buffer.tobytes(), ends.tolist()
    return [whole[start:end] for start, end in zip([0, *stops], stops, strict=False)]


def packed(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return (where each text ends, all of them), the opposite of `split`."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    return ends, np.frombuffer(b"".join(texts), np.uint8)


def index_of(path: str, wanted: Wanted) -> Index:
    """Return the index of the archive at `path`: the one that is kept for its size and time of change, or a new one.

    Raises Refusal for what is no whole tar archive.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise Refusal(f"cannot read {printable(path)}: {error.strerror}; expected a tar archive") from error
    asked = json.dumps([FORMAT, sorted(wanted.endings), wanted.image, wanted.label])
    state = f"{status.st_size} {status.st_mtime_ns}"

    def built() -> kept.Index:
        index = build(path, wanted)
        return kept.Index({name: getattr(index, name) for name in ARRAYS}, index.facts)

    def is_whole(index: kept.Index) -> bool:
        return index.arrays.keys() == set(ARRAYS) and len({len(index.arrays[name]) for name in OF_EACH}) == 1

    stored = kept.index_of("archives", path, asked, state, built, is_whole)
    return Index(**stored.arrays, facts=stored.facts)


# -------------------------------------------------------------------------------------------------------- one pass


def build(path: str, wanted: Wanted) -> Index:
    """Read all headers of the archive at `path`. Raises Refusal for what is no whole tar archive."""
    try:
        with open(path, "rb") as file:
            before = os.fstat(file.fileno())
            reader = _Pass(path, file, wanted)
            reader.read(0, before.st_size)
            after = os.fstat(file.fileno())
    except OSError as error:
        raise Refusal(f"cannot read {printable(path)}: {error.strerror or error}; expected a tar archive") from error
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise Refusal(f"{printable(path)} is being written: wait until it is whole")
    return reader.index()


class Member(NamedTuple):
    """Member of an archive: a file, or what `kind` says; `link`: the name of the file whose content a hard link has."""

    name: bytes
    offset: int
    size: int
    kind: str = ""
    link: bytes = b""


LINK, FOLDER = "link(s) to no picture in it", "folder"


def members(file: BinaryIO, start: int, end: int, shown: str) -> Iterator[Member]:
    """Yield the members of the archive that lies at bytes `start` to `end` of a file.

    `tarfile` by itself takes a damaged header, and a file that ends early, for the end of the archive. Raises Refusal
    for both.
    """
    archive, place = _begun(file, start, shown), start
    while True:
        if not archive.pax_headers:
            run, place = plain_run(file.fileno(), place, end)
            yield from run
        file.seek(place)
        block = file.read(BLOCK) if place < end else b""
        if len(block) < BLOCK:
            raise Refusal(f"{shown} is cut short at byte {place:,}: it has no end mark; fetch or write it again")
        if not any(block):
            break
        try:
            file.seek(place)
            member = _described(tarfile.TarInfo.fromtarfile(archive))
        except (tarfile.TarError, ValueError) as error:
            raise Refusal(f"{shown} is damaged at byte {place:,}: {error}; fetch or write it again") from None
        if not place < archive.offset <= end:
            name = printable(member.name)
            raise Refusal(f"{shown} is cut short in {name}, at byte {end:,}; fetch or write it again")
        place = archive.offset
        yield member
    file.seek(place)
    while place < end and (rest := file.read(min(1 << 20, end - place))):
        if rest.strip(b"\0"):
            raise Refusal(
                f"{shown} goes on after its end mark at byte {place:,}: archives that were joined by cat; join them "
                "with tar --concatenate, or name them all"
            )
        place += len(rest)


def _begun(file: BinaryIO, start: int, shown: str) -> tarfile.TarFile:
    """Return the archive at byte `start` of a file. Raises Refusal where there is none."""
    file.seek(start)
    beginning = file.read(8)
    for magic, (name, undone_by) in COMPRESSED.items():
        if beginning.startswith(magic):
            raise Refusal(
                f"{shown} is compressed ({name}), and what is in it cannot be reached picture by picture: undo that "
                f"once ({undone_by} FILE) and name the archive that comes of it"
            )
    try:
        file.seek(start)
        return tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
    except tarfile.TarError:
        raise Refusal(f"{shown} is no tar archive; expected one, not compressed") from None


def plain_run(handle: int, place: int, end: int) -> tuple[list[Member], int]:
    """Read headers of plain files, as nearly all are, from byte `place` on: (their members, where the next one begins
    that is none of them, or whose sum is wrong). At most RUN of them, in a tenth of the time that `tarfile` takes."""
    blocks, places, sizes = list[bytes](), list[int](), list[int]()
    while len(blocks) < RUN and place < end:
        block = os.pread(handle, BLOCK, place)
        if block[257:262] != b"ustar" or block[156] not in b"0\0":
            break
        try:
            size = int(block[124:136].partition(b"\0")[0], 8)
        except ValueError:  # a size above 8 GB is written in another way
            break
        after = place + BLOCK + -(-size // BLOCK) * BLOCK
        if size < 0 or after > end or len(block) < BLOCK:
            break
        blocks.append(block)
        places.append(place)
        sizes.append(size)
        place = after
    if not blocks:
        return [], place
    values = np.frombuffer(b"".join(blocks), np.uint8).reshape(-1, BLOCK)
    sums = values.sum(1, dtype=np.int64) - values[:, SUM].sum(1, dtype=np.int64) + 8 * ord(" ")
    run = list[Member]()
    for block, at, size, total in zip(blocks, places, sizes, sums.tolist(), strict=True):
        name, before = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
        try:
            is_sound = int(block[SUM].partition(b"\0")[0], 8) == total and not name.endswith(b"/")
        except ValueError:
            is_sound = False
        if not is_sound:
            return run, at
        run.append(Member(b"/".join((before, name)) if before else name, at + BLOCK, size))
    return run, place


def _described(member: tarfile.TarInfo) -> Member:
    """Return what `tarfile` read as ours."""
    name, link = (text.encode("utf-8", "surrogateescape") for text in (member.name, member.linkname))
    kind = ""
    if member.isdir():
        kind = FOLDER
    elif member.islnk():
        kind = LINK
    elif member.issym():
        kind = "symbolic link(s)"
    elif member.issparse():
        kind = "sparse file(s)"
    elif not member.isreg():
        kind = "FIFO" if member.isfifo() else "device"
    return Member(name, member.offset_data, member.size, kind, link)


class _Pass:
    """Pass over the headers of one archive."""

    def __init__(self, path: str, file: BinaryIO, wanted: Wanted) -> None:
        self.path, self.file, self.wanted = path, file, wanted
        self.pictures = frozenset(map(os.fsencode, wanted.endings))
        self.left = LeftOut()
        self.names: list[bytes] = []
        self.offsets: list[int] = []
        self.sizes: list[int] = []
        self.links: list[tuple[bytes, bytes]] = []  # name, and that of the member whose content it has
        self.texts: dict[str, dict[bytes, bytes]] = {}  # cls, or a field of .json -> key of a sample -> its label
        self.types: dict[str, str] = {}  # fields whose values are no labels
        self.fields: list[str] = []  # of the first .json
        self.described: Counter[str] = Counter()  # members that may hold labels, by ending
        self.visible: dict[bytes, bytes | None] = {}  # folder as it is written -> as it is known; None: hidden
        self.count, self.said = 0, time.monotonic() + PATIENCE - OFTEN

    def read(self, start: int, end: int, prefix: bytes = b"") -> None:
        """Read the headers at bytes `start` to `end`; names there begin with `prefix`. Raises Refusal."""
        shown = printable(self.path) + (f"/{printable(prefix[:-1])}.tar" if prefix else "")
        for member in members(self.file, start, end, shown):
            self.count += 1
            if self.count % 1000 == 0:
                self._tell(member.offset)
            name = self._known(prefix + member.name)
            if name is None or member.kind == FOLDER:
                continue
            if member.kind == LINK:
                self.links.append((name, self._known(prefix + member.link) or b""))
            elif member.kind:
                self.left.special[member.kind] += 1
            elif name[-4:].lower() == b".tar" and not prefix:
                self.read(member.offset, member.offset + member.size, name[:-4] + b"/")
            else:
                self._file(name, member.offset, member.size)

    def _tell(self, place: int) -> None:
        if (now := time.monotonic()) - self.said >= OFTEN:
            self.said = now
            share = place / max(1, os.fstat(self.file.fileno()).st_size)
            print(f"indexing {printable(self.path)}: {self.count:,} members, {share:.0%}", file=sys.stderr, flush=True)

    def _known(self, name: bytes) -> bytes | None:
        """Return a name without what says nothing, ./ and //; None if it, or a folder of it, is hidden."""
        folder, _, file = name.rstrip(b"/").rpartition(b"/")
        if folder not in self.visible:
            parts = [part for part in folder.split(b"/") if part not in (b"", b".")]
            hidden = any(is_hidden(os.fsdecode(part)) for part in parts)
            self.visible[folder] = None if hidden else b"".join(part + b"/" for part in parts)
        before = self.visible[folder]
        return None if before is None or is_hidden(os.fsdecode(file)) else before + file

    def _file(self, name: bytes, offset: int, size: int) -> None:
        ending = name[name.rfind(b".") :].lower()
        if ending in self.pictures:
            self.names.append(name)
            self.offsets.append(offset)
            self.sizes.append(size)
        elif ending in (b".cls", b".json") and size <= MOST_LABEL:
            self.file.seek(offset)
            self._label(*key_of(name), self.file.read(size))
            self.described[ending.decode()] += 1
        else:
            self.left.count(os.fsdecode(name.rpartition(b"/")[2]))

    def _label(self, key: bytes, what: str, content: bytes) -> None:
        """Take down what a member says of the sample `key`; `what`: cls or json."""
        if what == CLASS:
            self.texts.setdefault(CLASS, {})[key] = content.strip()
            return
        try:
            values = json.loads(content)
        except (ValueError, RecursionError):
            values = None
        if what != "json" or not isinstance(values, dict):
            return
        self.fields = self.fields or list(values)
        label = self.wanted.label
        for name in values if label is None else {label} & set(values):
            value = values[name]
            if label is None and name.lower() not in LABEL_NAMES:
                continue
            if isinstance(value, bool | int | str):
                self.texts.setdefault(f".{name}", {})[key] = str(value).encode("utf-8", "surrogatepass")
            elif value is not None:
                self.types[name] = type(value).__name__

    # -------------------------------------------------------------------------------------------- what comes of it

    def index(self) -> Index:
        """Return the index of what was read. Raises Refusal where a choice among pictures or labels has to be made."""
        at = {name: i for i, name in enumerate(self.names)}  # of members of one name the last one counts, as for tar
        facts: dict[str, Any] = {"replaced": len(self.names) - len(at)}
        for name, target in self.links:
            if target in at and name[name.rfind(b".") :].lower() in self.pictures:
                at[name] = at[target]
            else:
                self.left.special[LINK] += 1
        facts["field"], facts["why"] = self._field()
        labels = self.texts.get(facts["field"] or "", {})
        if self.wanted.image is not None or (labels and any(key_of(name)[0] in labels for name in at)):
            at = self._samples(at)
            keys = {key_of(name)[0] for name in at}
            facts["alone"] = sum(key not in keys for key in labels)
        elif facts["field"] is not None:  # a .json that says something else
            facts["field"], labels = None, {}
        used = facts["field"] and (".cls" if facts["field"] == CLASS else ".json")
        self.left.others.update({ending: n for ending, n in self.described.items() if ending != used})
        names = sorted(at)
        chosen = [at[name] for name in names]
        texts = [labels.get(key_of(name)[0], b"") for name in names] if labels else [b""] * len(names)
        facts |= {"others": dict(self.left.others), "special": dict(self.left.special), "fields": self.fields}
        offsets, sizes = (np.array(values, np.int64)[chosen] for values in (self.offsets, self.sizes))
        return Index(*packed(names), offsets, sizes, *packed(texts), facts)

    def _field(self) -> tuple[str | None, str]:
        """Return (where labels are: cls or .FIELD, why they are nowhere)."""
        label = self.wanted.label
        if label is not None:
            return (f".{label}", "") if f".{label}" in self.texts else (None, self.types.get(label, ""))
        if CLASS in self.texts:
            return CLASS, ""
        names = sorted(where[1:] for where in self.texts)
        chosen = names[0] if len(names) == 1 else CANONICAL.get((names[0], names[-1])) if len(names) == 2 else None
        if chosen is not None:
            return f".{chosen}", ""
        if names:
            return None, f"several fields of .json may be labels, {', '.join(names)}: choose one with data_label=NAME"
        if self.fields:
            return None, f"no field of .json is called label or the like; there is {', '.join(self.fields[:12])}"
        return None, ""

    def _samples(self, at: dict[bytes, int]) -> dict[bytes, int]:
        """Choose one picture of each sample, by what follows the first dot of its name. Raises Refusal."""
        kinds: dict[str, list[bytes]] = {}
        for name in at:
            kinds.setdefault(key_of(name)[1], []).append(name)
        there = ", ".join(f".{kind}" for kind in sorted(kinds)) or "no picture"
        wanted = self.wanted.image
        chosen = [kind for kind in kinds if kind == wanted] if wanted else [kind for kind in kinds if "." not in kind]
        if wanted is None and not chosen and len(kinds) == 1:
            chosen = list(kinds)
        names = [name for kind in chosen for name in kinds[kind]]
        if not names and wanted is not None:
            raise Refusal(f"data_image={wanted}: no picture in {printable(self.path)} ends so; there is {there}")
        if not names or len({key_of(name)[0] for name in names}) < len(names):
            raise Refusal(
                f"samples of {printable(self.path)} have several pictures, {there}: choose one with data_image=ENDING "
                "(--data-image ENDING)"
            )
        for kind in set(kinds) - set(chosen):
            self.left.others[f".{kind}"] += len(kinds[kind])
        return {name: at[name] for name in names}


def key_of(name: bytes) -> tuple[bytes, str]:
    """Return (the sample of a member, what it is of that), divided at the first dot of its file name (WebDataset)."""
    folder, slash, file = name.rpartition(b"/")
    stem, _, kind = file.partition(b".")
    return folder + slash + stem, os.fsdecode(kind).lower()
