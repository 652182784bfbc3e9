"""The folder of a run: its name, its birth in one piece, and the lock that keeps a second writer out."""

import errno
import itertools
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from ..errors import Refusal
from ..processes.launch import ROOT
from .disk import writing
from .storage import BEST, BEST_HEAD, PUBLIC

try:
    import fcntl
except ImportError:  # Windows has no POSIX locks: two writers are not noticed there
    fcntl = None  # type: ignore[assignment]

CONFIG, LOCK = "config.yaml", "lock"
# what a training writes into its run folder
FILES = (CONFIG, LOCK, "metrics.jsonl", "bad_files.txt", *PUBLIC, BEST, BEST_HEAD, "best.json")
FOLDERS = ("state", "tb", "pictures", "flight")
WAIT = 60.0  # seconds a resume waits for an interrupted process to finish its checkpoint


def commit() -> str | None:
    """Return the commit of the checkout this code runs from, with "+" if it was changed; None outside a checkout."""
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = [*git, "status", "--porcelain", "-uno", "--", ".", ":!RESULTS.md"]  # rows are added while runs go on
        changed = subprocess.run(status, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raises Refusal if any of `names` in `folder`, or anything in a sub-folder of that name, is a symbolic link: what
    is written, or thrown away, would be somebody else's. The run folder itself may be one."""
    for name in names:
        below = (Path(place) / item for place, folders, files in os.walk(folder / name) for item in (*folders, *files))
        for path in itertools.chain([folder / name], below):
            if path.is_symlink():
                raise Refusal(
                    f"{path} is a link to {os.readlink(path)}: nothing is written through links in such a folder; "
                    f"put in its place what it links to, or make {folder} itself a link to the disk with more room"
                )


def open_for_good(path: Path, mode: str) -> IO[Any]:
    """Open a text file of a run to read and write ("r+") or to append ("a"), made if it is not there. Raises OSError
    where it is a link or no file."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    number = os.open(path, flags | (os.O_APPEND if mode == "a" else 0), 0o666)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(number, mode)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raises Refusal if a run cannot be begun at `path`; nothing is touched."""
    if not path.exists():
        _refuse_unwritable(path)
        return
    if not overwrite:
        raise Refusal(
            f"run={path} exists: choose another name, continue it with --resume {path}, or replace it with --overwrite"
        )
    if not (path / CONFIG).is_file():
        raise Refusal(f"run={path} exists and is no run (no {CONFIG} in it), so --overwrite will not delete it")
    _refuse_unwritable(path)
    RunLock(path).release()


def _refuse_unwritable(path: Path) -> None:
    """Try to make and remove a folder beside where the run will be: asking for permissions is not the same."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    probe = parent / f".probe-{os.getpid()}"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise Refusal(
            f"run={path} cannot be written: {error.strerror} in {parent}; choose another with run=PATH"
        ) from None


def create(path: Path | None, stem: str, config: str, overwrite: bool) -> Path:
    """Make the folder of a new run, with `config` in config.yaml from its first moment; None numbers it
    runs/<stem>-001."""
    if path is not None:
        refuse_existing(path, overwrite)
        if path.exists():
            shutil.rmtree(path)
        if not _born(path, config):
            raise Refusal(f"run={path} was made by another process just now: choose another name")
        return path
    runs = Path("runs").resolve()
    taken = [int(name.name[len(stem) + 1 :]) for name in runs.glob(f"{stem}-*") if name.name[len(stem) + 1 :].isdigit()]
    number = max(taken, default=0) + 1
    while not _born(runs / f"{stem}-{number:03d}", config):
        number += 1
    return runs / f"{stem}-{number:03d}"


def _born(path: Path, config: str) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)  # of a killed process that had the same number
    aside.mkdir()
    try:
        with writing(path / CONFIG, len(config)):
            (aside / CONFIG).write_text(config, encoding="utf-8")
        os.rename(aside, path)  # fails if another run took the name and has files
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if path.exists():
            return False
        raise
    return True


class RunLock:
    """Lock of a run folder, held by the process that writes the run, and gone with it however it ends (a POSIX lock:
    not inherited by workers)."""

    def __init__(self, run: Path, wait: float = 0.0) -> None:
        """Raises Refusal if another process still writes `run` after `wait` seconds."""
        self.file = None
        if fcntl is None:
            return
        refuse_links(run, (*FILES, *FOLDERS))
        path = run / LOCK
        try:
            self.file = open_for_good(path, "r+")
        except OSError as error:
            raise Refusal(
                f"the run folder {run} cannot be written: {error.strerror}; make it writable, or copy it"
            ) from None
        content = self.file.read(40).strip()
        if content and not (content.isdecimal() and len(content) < 20):  # perhaps one file under two names
            raise Refusal(f"{path} is no lock of poslabel: expected a process number in it; remove or rename it")
        deadline = time.monotonic() + wait
        waiting = False
        while True:
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                self.file.seek(0)
                owner = self.file.read().strip() or "?"
                if time.monotonic() >= deadline:
                    raise Refusal(
                        f"process {owner} is still writing {run}: stop it first (kill {owner}; it saves before it ends)"
                    ) from None
                if not waiting:
                    print(f"waiting for process {owner}, which is still writing {run}", flush=True)
                    waiting = True
                time.sleep(0.2)
        self.file.seek(0)
        self.file.truncate()
        self.file.write(str(os.getpid()))
        self.file.flush()

    def release(self) -> None:
        """Let others write."""
        if self.file is not None:
            self.file.close()
