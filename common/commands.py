"""Commands to type next, as they have to be typed where this program was started."""

import os
import shlex
import shutil
import sys
from pathlib import Path

from .processes.launch import COMMAND, ROOT, scripts


def command(name: str, *words: object, processes: int | None = None) -> str:
    """The line that runs script `name` (`pretrain`, `knn`, ...) with these arguments, quoted for a shell.

    It begins with `poslabel NAME` where this process was started by that command, or an installed wheel has no scripts
    to name; else with the launcher and the path of the checkout's script, as seen from the working directory.
    `processes`: exactly so many are needed; None: as many as the launcher chooses, or as there are now.
    """
    return " ".join([_start(name, processes), *(shlex.quote(str(word)) for word in words)])


def _start(name: str, processes: int | None) -> str:
    running = int(os.environ.get("WORLD_SIZE", "1"))
    many = processes or running
    typed = os.environ.get(COMMAND)
    if typed or not (ROOT / "pyproject.toml").is_file():
        options = f"--num_processes {many} " if many > 1 else ""
        return f"{_shortest(typed or 'poslabel')} {options}{name}"
    script = scripts()[name]
    here = Path.cwd()
    path = shlex.quote(str(script.relative_to(here) if script.is_relative_to(here) else script))
    if many > 1 and "ACCELERATE_MIXED_PRECISION" not in os.environ:  # which `accelerate launch` sets, and torchrun not
        return f"{_shortest(_beside('torchrun'))} --nproc-per-node {many} {path}"
    if processes == 1 or not Path(_beside("accelerate")).is_file():
        return f"{_shortest(sys.executable)} {path}"
    return f"{_shortest(_beside('accelerate'))} launch {f'--num_processes {many} ' if many > 1 else ''}{path}"


def _beside(tool: str) -> str:
    """A program of the environment that is running."""
    return str(Path(sys.executable).parent / tool)


def _shortest(program: str) -> str:
    """A program as one may type it here: by its name where a shell finds it by that, else by its path."""
    name = Path(program).name
    found = shutil.which(name)
    if program == name or (found is not None and os.path.abspath(found) == os.path.abspath(program)):
        return name
    near = os.path.relpath(program)
    return shlex.quote(program if near.startswith("..") else near)
