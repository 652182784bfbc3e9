"""Paths among options: `~` is the home folder, and what is stored does not depend on the working directory.

A dataclass marks an option as a path, `field(default=None, metadata=path_option())`; `common.config` makes its value
absolute once, when the options are read. A command line has `type=expanded`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACE = "place"  # metadata of an option: text as it was given -> text as it is used and stored


def path_option(place: Callable[[str], str] | None = None) -> dict[str, Any]:
    """Metadata of an option that is a path. `place` stands for `absolute` where a text may also mean something else."""
    return {PLACE: place or absolute}


def expanded(text: str) -> str:
    """Text with ~ and ~name replaced by that home folder."""
    return os.path.expanduser(text)


def absolute(text: str) -> str:
    """Absolute path with links followed, unless they lead to a name that is not UTF-8, which could not be stored."""
    real = str(Path(expanded(text)).resolve())
    return real if real.isascii() or real.encode(errors="ignore").decode() == real else os.path.abspath(expanded(text))


def if_there(text: str) -> str:
    """The absolute path of something that exists; any other text as it is, for instance the name of a recipe."""
    return absolute(text) if os.path.exists(expanded(text)) else expanded(text)


def expanded_path(text: str) -> Path:
    """Path of `expanded`."""
    return Path(expanded(text))
