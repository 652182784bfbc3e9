"""Features kept on the disk: mapped into memory, and extracted in parts by all processes of a job.

    cache/<hash of the key>/mean.npy, class.npy, ...   (K, D) float32 each, and index.npy (K,) int64
                            complete.json              the key, and the arrays' SHA-256; written last
                            part-*.safetensors         only until there are all of them

Evaluations keep theirs beside their reports, in RUN/evaluate/cache. An entry has 4 bytes for each number: two times
384 of each of 1.28 million images are 3.9 GB. Nothing is thrown away unasked, and all of it may be: whatever is
missing is extracted again.
"""

import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from common.batches.unreadable import USUAL, Limit
from common.checkpoints.storage import sha256, write_atomically
from common.data import Images
from common.errors import Refusal
from common.features.extraction import Part, digest, refuse_unreadable, tell_unreadable
from common.processes import collectives

T = TypeVar("T")
Extract = Callable[[Sequence[range], Callable[[int], None]], Iterator[Part]]  # (parts, `seen`), see extract_parts

PART, LEAST = 4096, 256  # images in a part: at most, and the step in which smaller data sets have less
COMPLETE = "complete.json"
OFTEN = 5.0  # seconds between lines about progress
BROKEN = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what a damaged file may lead to
LEFT_BEHIND = 3600.0  # seconds after which a half-written file has no writer any more


def cached(
    folder: Path,
    key: Mapping[str, Any],
    images: Images,
    extract: Extract,
    say: Callable[[str], None] = print,
    *,
    larger: Sequence[Mapping[str, Any]] = (),
    limit: Limit = USUAL,
    part: int | None = None,
) -> dict[str, Tensor]:
    """Features of `key`, mapped into memory from a folder in `folder`; extracted first if they are not there.

    Extraction goes part by part, `part` images each, and every part is kept at once: one that is interrupted goes on
    with the parts that are missing. The processes of a job divide the parts among them and all wait for the last; each
    is then given all features, from a folder that they have to share. A folder or a part that was made for another
    key, is truncated, or has changed since, is said to be so and extracted again. Writing to what is returned changes
    no file. What was made before any of the files was written, replaced or moved (`Images.stamp`) is not used. Whatever
    is kept for a key in `larger` has these features among others, and is returned in place of an extraction. Raises
    Refusal if more of `images` cannot be read than `limit` allows.
    """
    stamp = _everybody(images.stamp() if collectives.rank() == 0 else "")[0]  # elsewhere they may lie on other disks
    key, *larger = ({**one_key, "files": stamp} for one_key in (key, *larger))
    text, home = _place(folder, key)
    features, missing = None, []
    if collectives.rank() == 0:
        features = _checked(home, text, say)
        for other in larger:
            if features is None and _is_whole(*_place(folder, other)):
                home = _place(folder, other)[1]
                features = _mapped(home)
        missing = [] if features else _missing(home, text, _ranges(len(images), part), say)
    answers = _everybody((text, home if features else None, missing))
    if any(theirs != text for theirs, _, _ in answers):
        raise Refusal(f"the processes of this job see different weights or images, of {images.where} at least")
    _, whole, missing = answers[0]
    if whole is None:
        home.mkdir(parents=True, exist_ok=True)
        _extract(home, text, missing, extract, say)
        problem = ""
        if collectives.rank() == 0:
            try:
                _merge(home, text, images, _ranges(len(images), part), limit, say)
            except (Refusal, OSError) as error:
                problem = str(error)
        _refuse(problem)
    return features or _mapped(whole or home)


def _place(folder: Path, key: Mapping[str, Any]) -> tuple[str, Path]:
    """The key in words, and the folder of its features."""
    text = json.dumps(key, sort_keys=True)
    return text, folder / hashlib.sha256(text.encode()).hexdigest()[:24]


def _ranges(images: int, part: int | None) -> list[range]:
    """The parts: at least sixteen of a larger data set, so that processes have equal shares."""
    size = part or max(LEAST, min(PART, -(-images // (16 * LEAST)) * LEAST))
    return [range(images)[at : at + size] for at in range(0, images, size)]


def _file(home: Path, rows: range) -> Path:
    return home / f"part-{rows.start:09d}-{rows.stop:09d}.safetensors"


# ------------------------------------------------------------------------------------------------ what there is already


def _checked(home: Path, text: str, say: Callable[[str], None]) -> dict[str, Tensor] | None:
    """Load the features if they are complete and unchanged, else None; says if they were damaged."""
    if not (home / COMPLETE).exists():
        return None
    try:
        _check(home, text)
        return _mapped(home)
    except BROKEN as error:
        say(f"cached features {home} are not used ({error}): extracting them again")
        (home / COMPLETE).unlink(missing_ok=True)
        return None


def _is_whole(text: str, home: Path) -> bool:
    try:
        _check(home, text)
    except BROKEN:
        return False
    return True


def _check(home: Path, text: str) -> None:
    """Raises one of BROKEN unless what is in `home` was made for the key `text`, and is all of it and unchanged."""
    complete = json.loads((home / COMPLETE).read_text(encoding="utf-8"))
    if complete["key"] != text:
        raise ValueError("made from other weights, data or settings")
    for name, expected in complete["sha256"].items():
        if sha256(home / f"{name}.npy") != expected:
            raise ValueError(f"the checksum of {name}.npy is wrong")


def _mapped(home: Path) -> dict[str, Tensor]:
    names = json.loads((home / COMPLETE).read_text(encoding="utf-8"))["sha256"]
    # "c": pages are read when they are used, as with "r", and one that is written to is this process' own
    return {name: torch.from_numpy(np.load(home / f"{name}.npy", mmap_mode="c")) for name in names}


def _missing(home: Path, text: str, ranges: Sequence[range], say: Callable[[str], None]) -> list[range]:
    """Parts still to extract; also prints how many are done."""
    missing, damaged = [], []
    for rows in ranges:
        file = _file(home, rows)
        try:
            with safe_open(file, framework="pt") as part:  # a file shorter than its header says is an error here
                metadata = part.metadata() or {}
                if metadata.get("key") != text:
                    raise ValueError("made from other weights, data or settings")
                if metadata.get("digest") != digest({name: part.get_tensor(name) for name in part.keys()}):  # noqa: SIM118
                    raise ValueError("its checksum is wrong")
        except FileNotFoundError:
            missing.append(rows)
        except (SafetensorError, OSError, ValueError) as error:
            missing.append(rows)
            damaged.append(f"{file.name}: {error}")
    if damaged:
        what = f"{len(damaged)} of {len(ranges)} parts of cached features {home}"
        say(f"{what} are not used ({damaged[0]}): extracting them again")
    if len(missing) < len(ranges):
        say(f"{len(ranges) - len(missing)} of {len(ranges)} parts were extracted before: going on with the others")
    return missing


# ---------------------------------------------------------------------------------------------------- extraction


def _extract(home: Path, text: str, missing: Sequence[range], extract: Extract, say: Callable[[str], None]) -> None:
    """Extract the parts that are `missing`, this process its share, and write each. Raises Refusal in every process."""
    processes, rank = collectives.processes(), collectives.rank()
    mine = missing[rank::processes]
    parts = extract(mine, _progress(sum(map(len, mine)), processes, say)) if mine else iter(())
    for at in range(0, len(missing), processes):  # in step, so that no process goes on for hours after another failed
        problem = ""
        try:
            if at + rank < len(missing):
                part = next(parts)
                _write(_file(home, part.rows), part, text)
        except (Refusal, OSError) as error:
            problem = str(error)
            if processes == 1:
                raise
        _refuse(problem)


def _write(path: Path, part: Part, text: str) -> None:
    contents = {name: tensor.contiguous() for name, tensor in part.features.items()}
    metadata = {"key": text, "digest": digest(contents), "unreadable": json.dumps(part.unreadable)}
    write_atomically(path, lambda aside: save_file(contents, aside, metadata=metadata))


def _progress(images: int, processes: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Function to call after every few images, which now and then prints how far this process has come."""
    began = said = time.monotonic()
    done = 0

    def count(more: int) -> None:
        nonlocal said, done
        now, done = time.monotonic(), done + more
        if now - said >= OFTEN and done < images:
            said = now
            rate = done / (now - began)
            share = f" (the share of one of {processes} processes)" if processes > 1 else ""
            left = timedelta(seconds=round((images - done) / rate))
            say(f"  {done:,} of {images:,} images{share}, {rate:,.0f} per second, {left} left")

    return count


def _merge(
    home: Path, text: str, images: Images, ranges: Sequence[range], limit: Limit, say: Callable[[str], None]
) -> None:
    """Make one array of the parts of each kind, and remove the parts. Raises Refusal if one is missing."""
    files = [_file(home, rows) for rows in ranges]
    unreadable: list[str] = []
    shapes: dict[str, list[int]] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as part:
                unreadable += json.loads(part.metadata()["unreadable"])
                for name in part.keys():  # noqa: SIM118
                    rows, *width = part.get_slice(name).get_shape()
                    shapes.setdefault(name, [0, *width])[0] += rows
        refuse_unreadable(unreadable, len(images), images, limit)
        for name, shape in shapes.items():
            write_atomically(home / f"{name}.npy", functools.partial(_concatenate, files, name, shape))
    except FileNotFoundError as error:
        if _checked(home, text, say):  # by another job that has extracted the same
            return
        raise Refusal(
            f"a part of the features is not there ({error}): do all processes share the folder {home}?"
        ) from None
    sums = {name: sha256(home / f"{name}.npy") for name in shapes}
    content = json.dumps({"key": text, "sha256": sums, "unreadable": unreadable}, indent=2)
    write_atomically(home / COMPLETE, lambda aside: aside.write_text(content + "\n", encoding="utf-8"))
    tell_unreadable(unreadable, images, say)
    for file in home.iterdir():
        if file.match("part-*") or (file.match(".*") and time.time() - file.stat().st_mtime > LEFT_BEHIND):
            file.unlink(missing_ok=True)


def _concatenate(files: Sequence[Path], name: str, shape: Sequence[int], aside: Path) -> None:
    kind = np.dtype("<i8" if name == "index" else "<f4")
    with aside.open("wb") as array:
        header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": tuple(shape)}
        np.lib.format.write_array_header_1_0(array, header)
        for file in files:
            with safe_open(file, framework="np") as part:
                if name in part.keys():  # noqa: SIM118  (not of images none of which can be read)
                    array.write(np.ascontiguousarray(part.get_tensor(name), dtype=kind).data)


# ------------------------------------------------------------------------------------------------------- agreement


def _refuse(problem: str) -> None:
    """Raises Refusal in every process if one has a problem: the first one is who tells the user."""
    problems = [theirs for theirs in _everybody(problem) if theirs]
    if problems:
        raise Refusal(problems[0])


def _everybody(said: T) -> list[T]:
    """Gather a value from every process, by rank."""
    if collectives.processes() == 1:
        return [said]
    everybody: list[Any] = [None] * collectives.processes()
    dist.all_gather_object(everybody, said, group=_patient())
    return everybody


@functools.cache
def _patient() -> Any:
    """Group of all processes on the CPU that waits for days: a large backbone may take an hour for a part."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=7))
