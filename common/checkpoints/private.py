"""The private state of a run: checkpoints in state/step_*, written whole, and the newest of them that is whole."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import Refusal
from .disk import DiskFull
from .storage import (
    DESCRIPTION,
    FORMAT,
    MANIFEST,
    PUBLIC,
    STATE,
    WEIGHTS,
    checkpoints_of,
    sha256,
    sweep,
    sync,
    write_atomically,
    write_json,
)

MILESTONE = "milestone"  # an empty file that keeps its checkpoint for good


def save_state(
    run: Path, step: int, state: dict[str, Any], export_to: Callable[[Path], None], keep: int, milestone: bool = False
) -> None:
    """Write the checkpoint of `step` under run/state, then drop the oldest beyond the last `keep`; milestones stay.

    What `export_to` writes is then copied to the run folder, see `write_checkpoint`. Raises OSError (a full disk, say)
    with every earlier checkpoint intact.
    """
    for name in PUBLIC:
        sweep(run / name)
    parent = run / "state"
    try:
        final = write_checkpoint(parent, step, state, export_to, milestone)
    except OSError as error:
        raise OSError(
            f"cannot write the checkpoint of step {step} to {parent}: {error}; "
            f"{shutil.disk_usage(parent).free:,} bytes are free there: make room, then continue with --resume {run} "
            "from the checkpoint before"
        ) from error
    for name in PUBLIC:
        if (final / name).exists():
            write_atomically(run / name, partial(shutil.copyfile, final / name), needed=(final / name).stat().st_size)
        else:  # exported before, and no longer: it would be of an earlier step than what lies beside it
            (run / name).unlink(missing_ok=True)
    checkpoints = checkpoints_of(run)
    newer = [path for path in checkpoints if int(path.name[5:]) > step]  # damaged, or this run had gone on from there
    for old in (*newer, *checkpoints[len(newer) :][keep:]):
        if old in newer or not (old / MILESTONE).exists():
            shutil.rmtree(old)


def write_checkpoint(
    parent: Path, step: int, state: dict[str, Any], export_to: Callable[[Path], None], milestone: bool = False
) -> Path:
    """Write the checkpoint of `step` as a folder of `parent`, whole or not at all; returns it.

    `state`: tensors, numbers, strings and containers of them; `export_to(folder)` writes one backbone there, or two.
    Raises OSError, which says why in a line.
    """
    parent.mkdir(exist_ok=True)
    for left in parent.glob(".writing-*"):  # an earlier attempt was cut short
        shutil.rmtree(left, ignore_errors=True)
    aside, final = parent / f".writing-{step:08d}", parent / f"step_{step:08d}"
    try:
        aside.mkdir()
        torch.save(state, aside / STATE)
        sync(aside / STATE)
        export_to(aside)
        if milestone:
            (aside / MILESTONE).touch()
        files = {item.name: {"sha256": sha256(item), "bytes": item.stat().st_size} for item in sorted(aside.iterdir())}
        write_json(aside / MANIFEST, {"format": FORMAT, "step": step, "files": files})
        sync(aside)
        if final.exists():  # the same step again, after a resume: equal content
            shutil.rmtree(final)
        os.rename(aside, final)
        sync(parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk has a name of its own in each library
        shutil.rmtree(aside, ignore_errors=True)
        first = error.__cause__ if isinstance(error, DiskFull) else error
        raise OSError(str(first).splitlines()[0]) from error  # torch tells its stack below; and a full disk otherwise
    return final


def newest_whole(run: Path, warn: Callable[[str], None]) -> Path | None:
    """Return the folder of the newest whole checkpoint of a run, or None if none was written yet; each damaged one is
    told to `warn`. Raises Refusal if there are checkpoints and none of them is whole."""
    checkpoints = checkpoints_of(run)
    for folder in checkpoints:
        damage = damage_of(folder)
        if damage is None:
            return folder
        warn(f"checkpoint {folder} is damaged ({damage}); trying the one before")
    if checkpoints:
        raise Refusal(
            f"every checkpoint under {run / 'state'} is damaged: start again with --overwrite, or restore a copy"
        )
    return None


def damage_of(folder: Path) -> str | None:
    """Return what is wrong with the files of a checkpoint; None if they are whole. Raises Refusal for another
    format."""
    return next(_damage(folder), None)


def _damage(folder: Path) -> Iterator[str]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()}
        format_ = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield f"{MANIFEST} cannot be read: {type(error).__name__}"
        return
    if format_ != FORMAT:
        raise Refusal(
            f"{folder} has checkpoint format {format_}, this version reads format {FORMAT}: "
            "continue the run with the version of poslabel that wrote it"
        )
    if not {STATE, WEIGHTS, DESCRIPTION} <= files.keys():
        yield f"{MANIFEST} does not list every file"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes, not {size}"
        elif sha256(path) != digest:
            yield f"the checksum of {name} is wrong"
