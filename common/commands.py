"""The command line: what was typed, read strictly, and commands to type next, as they have to be typed here."""

import argparse
import os
import re
import shlex
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from .errors import Refusal, nearest
from .processes.launch import COMMAND, ROOT, scripts


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are Refusals, one line each, and to which `--key value` and `key=value` say
    the same. With `options`, a recipe's, those become words, `key=value`; all else becomes flags."""

    def __init__(self, *, options: Collection[str] = (), **keywords: Any) -> None:
        """`options`: their names, with dots; one that ends with a dot stands for all that begin so."""
        super().__init__(allow_abbrev=False, **keywords)
        self.options = options

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, either form of an option. Raises Refusal for what is not understood."""
        return super().parse_args(self._in_one_form(args), namespace)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, either form of an option. Raises Refusal for what is not understood."""
        return super().parse_intermixed_args(self._in_one_form(args), namespace)

    def _in_one_form(self, args: Sequence[str] | None) -> list[str]:
        words = sys.argv[1:] if args is None else args
        return self.as_words(words) if self.options else self.as_flags(words)

    def as_words(self, argv: Sequence[str]) -> list[str]:
        """`argv`, with `--threads 1` or `--threads=1` of a recipe's option as the word `threads=1`. Raises Refusal
        where a value is missing."""
        groups = tuple(name for name in self.options if name.endswith("."))
        words, left = list[str](), list(argv)
        while left:
            word = left.pop(0)
            name, equals, value = word.removeprefix("--").partition("=")
            group, dot, last = name.rpartition(".")
            name = f"{group}{dot}{last.replace('-', '_')}"
            known = name in self.options or name.startswith(groups)
            if not word.startswith("--") or word.partition("=")[0] in self._option_string_actions or not known:
                words.append(word)
                continue
            if not equals:
                if not left or left[0].startswith("--"):
                    raise Refusal(f"{word} needs a value: {word} VALUE, or {name}=VALUE")
                value = left.pop(0)
            words.append(f"{name}={value}")
        return words

    def as_flags(self, words: Sequence[str]) -> list[str]:
        """`words`, with `key=value` of a known flag in that flag's form. Raises Refusal for a switch's odd value."""
        flags: list[str] = []
        for word in words:
            key, equals, value = word.partition("=")
            action = self._option_string_actions.get(f"--{key.replace('_', '-')}")
            before = self._option_string_actions.get(flags[-1]) if flags else None
            behind = before is not None and before.nargs is None  # the value of the flag before it
            if not equals or action is None or behind or not re.fullmatch(r"[a-z][a-z_-]*", key):
                flags.append(word)
            elif action.nargs == 0:
                if value.lower() not in ("true", "false"):
                    raise Refusal(f"{word}: expected {key}=true, or {action.option_strings[0]}")
                flags += action.option_strings[:1] if value.lower() == "true" else []
            elif action.nargs in ("+", "*"):
                flags += [action.option_strings[0], *value.strip("[]").replace(",", " ").split()]
            else:
                flags.append(f"{action.option_strings[0]}={value}")
        return flags

    def error(self, message: str) -> Any:
        """Raise Refusal, with the nearest option to the first word that is none."""
        flags = {"--debug", "--help", *self._option_string_actions}
        words = [word.split("=")[0].rstrip(":") for word in message.replace(",", " ").split()
                 if word.startswith("-") or "=" in word]  # fmt: skip
        unknown = next((f"--{word.lstrip('-')}" for word in words if word not in flags), "")
        near = nearest(unknown, sorted(flags | {f"--{name}" for name in self.options})) if unknown else ""
        raise Refusal(f"{message}{near}; --help lists the options")


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
    on_path = shutil.which(name)
    if program == name or (on_path is not None and os.path.abspath(on_path) == os.path.abspath(program)):
        return name
    near = os.path.relpath(program)
    return shlex.quote(program if near.startswith("..") else near)
