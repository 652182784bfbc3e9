"""A full disk, said the same way whichever library meets it: which file, how much room there is, and what to do."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
WORDS = ("No space left", "quota exceeded", "File too large", "unexpected pos")  # the last is torch's


class DiskFull(OSError):
    """A file that cannot be written for want of room, in one line."""


def is_full(error: BaseException) -> bool:
    """Return whether `error`, of the system, torch or safetensors, means that there was no room."""
    if isinstance(error, DiskFull):
        return False  # said already
    return getattr(error, "errno", None) in FULL or any(word in str(error) for word in WORDS)


@contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raise DiskFull where there is no room for `path`, which is written inside; `needed`: its bytes, if known."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise DiskFull(no_room(path, error, needed)) from error


def no_room(path: Path | str, error: BaseException, needed: int | None = None) -> str:
    """Return the line about `path`, which could not be written."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    needs = "" if needed is None else f", {needed:,} are needed"
    return (
        f"cannot write {path}: {reason}; {shutil.disk_usage(place).free:,} bytes are free there{needs}: make room, "
        "then give the same command again, for a training with --resume; its checkpoints so far are intact"
    )
