"""Standard input, output and error, where the other end may be closed, gone or full: a run goes on without them."""

import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET)  # `| head -1`, a terminal that was closed
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a log on a full disk: what cannot be written is lost, no more


def reopen_closed() -> None:
    """Give descriptors 0, 1 and 2 to the null device where the caller closed them (`>&-`): the next file that is opened
    would get the number, and whatever is printed with it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
    sys.stdout = sys.stdout or open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False, encoding="utf-8")  # noqa: SIM115


def protect() -> None:
    """Let nothing that is printed end the program: see `Stream`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            stream.flush()
            opened = io.open(stream.fileno(), "wb", buffering=0, closefd=False)  # noqa: SIM115, UP020
            setattr(sys, name, Stream(opened, stream))


class Stream(io.TextIOWrapper):
    """A standard stream whose failures are silence. When its reader is gone, it becomes the null device."""

    def __init__(self, raw: Any, like: io.TextIOWrapper) -> None:
        super().__init__(
            io.BufferedWriter(raw),
            encoding=like.encoding,
            # an ASCII or C locale has no word for ü, and "surrogateescape" is of no help with it
            errors="backslashreplace" if like.errors in ("strict", "surrogateescape") else like.errors,
            line_buffering=like.line_buffering or like.isatty(),
        )

    def write(self, text: str) -> int:
        """Do as every stream does."""
        try:
            return super().write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """Do as every stream does."""
        try:
            super().flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if error.errno in GONE:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
        elif error.errno not in FULL:
            raise error
