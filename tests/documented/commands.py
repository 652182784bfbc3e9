"""The commands of README.md and docs/, and what they become in a test."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STARTS = r"(?:[A-Z_]+=\S+ )?(?:accelerate launch|torchrun|python|poslabel|pip install|make|tensorboard|source) "
INLINE = re.compile(rf"(?<!`)`({STARTS}[^`\n]+)`")


def blocks(path: Path, language: str) -> list[str]:
    """Contents of the code blocks of a page that are marked as `language`."""
    return [content for marked, content in FENCE.findall(path.read_text()) if marked == language]


def commands_of(path: Path) -> list[str]:
    """Commands of a page: the lines of its bash blocks without comments, and code in its text that begins as one."""
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    typed = [shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()]
    return typed + [shlex.join(shlex.split(code)) for code in INLINE.findall(FENCE.sub("", path.read_text()))]


COMMANDS = sorted({command for path in PAGES for command in commands_of(path)} - {"poslabel knn", "poslabel NAME"})
SHELL = [command for command in COMMANDS if command.split()[0] in ("make", "pip", "source", "tensorboard")]
SCRIPTED = [command for command in COMMANDS if command not in SHELL]  # scripts of ours
NOT_RUN = {
    "make test": "it is what runs the tests",
    "make simd": "compiles for minutes, with headers and a network; tests/common/decoding tests what a run says of it",
    "pip install .": "changes the environment; tests/test_install.py builds the wheel and installs it elsewhere",
    "pip install '.[onnx]'": "changes the environment, from a network; the tests' own has this extra",
    "pip install '.[segmentation]'": "changes the environment, from a network; the tests' own has this extra",
    "pip install '.[torchcodec]'": "changes the environment, from a network",
    "accelerate launch --multi_gpu pretrain/run.py vit_small 'data=~/photos'": "several GPUs",
}  # command: why no test runs it


def part(start: str) -> list[str]:
    """The commands that run a script whose path begins so, without those that no test runs."""
    return [command for command in SCRIPTED if split(command)[0].startswith(start) and command not in NOT_RUN]


def split(command: str) -> tuple[str, list[str]]:
    """(script relative to the repository, its words) of a Python command; its launcher's own words are parsed too."""
    from common.processes.launch import scripts

    words = shlex.split(command)
    words = words[1:] if "=" in words[0] else words
    if words[0] == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script, launched.training_script_args
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        launched = get_args_parser().parse_args(words[1:])
        return launched.training_script, launched.training_script_args
    if words[0] == "poslabel":
        return scripts()[words[1]].relative_to(ROOT).as_posix(), words[2:]
    assert words[0] == "python", f"no test knows how to run: {command}"
    return words[1], words[2:]


def module_of(script: str) -> ModuleType:
    """An entry script as a module."""
    spec = importlib.util.spec_from_file_location(f"documented.{Path(script).stem}", ROOT / script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(module: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """`main` of an entry script in this process, whether it takes its words or reads them from sys.argv."""
    monkeypatch.setattr(sys, "argv", [str(module.__file__), *words])
    return (module.main(words) if module.main.__code__.co_argcount else module.main()) or 0
