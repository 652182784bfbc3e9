"""Indexes kept in the user's cache folder: what takes long to find out about files, for the next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoints.storage import sweep, write_atomically

UNKEPT = "unkept"  # fact: why an index could not be kept


@dataclass
class Index:
    """What was found out: arrays by their names, and facts that JSON can say."""

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]


def cache_folder() -> Path:
    """Return the folder for what is fetched or made once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "poslabel"


def load(room: str, path: str, asked: str, state: str = "") -> Index | None:
    """Return the index that is kept of the files at `path`; None if there is none, or of another state, or damaged.

    room   sub-folder of the cache folder
    asked  what was asked for: one index is kept for each path and question
    state  what the files are known by
    """
    return _stored(_file(room, path, asked), _about(path, asked, state))


def keep(room: str, path: str, asked: str, state: str, index: Index) -> None:
    """Keep an index for `load`. Leave it to another process that is about to; raises OSError where it cannot be."""
    from filelock import FileLock, Timeout

    file = _file(room, path, asked)
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(Timeout, NotImplementedError), FileLock(_lock(room, path), timeout=0):
        _store(file, index, _about(path, asked, state))


def index_of(
    room: str,
    path: str,
    asked: str,
    state: str,
    build: Callable[[], Index],
    is_whole: Callable[[Index], bool] = lambda index: True,
) -> Index:
    """Return the index that is kept, as `load` does, or a new one, which several processes that ask build once.

    Where it cannot be kept, it is built each time, and a fact says why.
    """
    from filelock import FileLock

    def known() -> Index | None:
        index = load(room, path, asked, state)
        return index if index is not None and is_whole(index) else None

    if (index := known()) is not None:
        return index
    file = _file(room, path, asked)
    with contextlib.ExitStack() as held:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(_lock(room, path)))
        except (OSError, NotImplementedError) as error:
            index = build()
            index.facts[UNKEPT] = str(error)
            return index
        if (index := known()) is not None:  # another process was faster
            return index
        index = build()
        try:
            _store(file, index, _about(path, asked, state))
        except OSError as error:
            index.facts[UNKEPT] = str(error)
    return index


def _file(room: str, path: str, asked: str) -> Path:
    return cache_folder() / room / f"{_digest(path)}-{_digest(asked)}.safetensors"


def _lock(room: str, path: str) -> str:
    return str(cache_folder() / room / f".{_digest(path)}.lock")


def _about(path: str, asked: str, state: str) -> str:
    return json.dumps([os.fsencode(path).decode(errors="backslashreplace"), asked, state])


def _digest(text: str) -> str:
    return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]


def _store(file: Path, index: Index, about: str) -> None:
    """Keep an index. For the only process that writes there."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(array) for name, array in index.arrays.items()}
    sweep(file)
    metadata = {"about": about, "facts": json.dumps(index.facts)}
    write_atomically(file, lambda aside: save_file(arrays, aside, metadata))


def _stored(file: Path, about: str) -> Index | None:
    """Load what is kept; None if there is nothing that is `about` this, or it is damaged."""
    from safetensors import SafetensorError, safe_open

    if not file.exists():
        return None
    try:
        with safe_open(file, "numpy") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("about") != about:
                return None
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118  (it is no dict)
            return Index(arrays, json.loads(metadata["facts"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
