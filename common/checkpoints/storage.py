"""The files of a run by name, and how they are written: aside, flushed to the disk, renamed, never by halves."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .disk import writing

FORMAT = 1
WEIGHTS, DESCRIPTION, STATE, MANIFEST = "backbone.safetensors", "backbone.json", "state.pt", "manifest.json"
STUDENT = "student.safetensors"  # with its student.json: beside the teacher's, where both are exported
HEAD = "head.safetensors"  # of a classifier: its linear layer, beside the backbone it belongs to
BEST, BEST_HEAD = "best.safetensors", "best_head.safetensors"  # with best.json: of a classifier that was judged best
BESIDE = {STUDENT: "student", BEST: "best"}  # weights beside the newest ones, and the folder of their reports
PUBLIC = (HEAD, WEIGHTS, DESCRIPTION, STUDENT, "student.json")  # what of a checkpoint is copied to the run folder


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, write: Callable[[Path], object], needed: int | None = None) -> None:
    """Let `write` fill a file beside `path`, flush it to the disk and rename it, so that `path` is never
    half-written. Raises DiskFull where there is no room for it; `needed`: its bytes, if known."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path, needed):
            write(aside)
            sync(aside)
            os.replace(aside, path)
            sync(path.parent)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def sweep(path: Path) -> None:
    """Remove what a killed `write_atomically` of `path` left behind; for the only process that writes it."""
    for left in path.parent.glob(f".{path.name}.*"):
        left.unlink(missing_ok=True)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` as an indented JSON file, atomically."""
    write_atomically(path, lambda aside: aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


def checkpoints_of(run: Path) -> list[Path]:
    """List the checkpoint folders of a run, newest first."""
    folders = [path for path in (run / "state").glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name[5:]), reverse=True)
