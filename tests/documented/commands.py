"""The commands of README.md and docs/, and what they become in a test."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

from common import config as configuration

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


NAMES = {"poslabel knn", "poslabel NAME"}  # how a command begins, in the text
COMMANDS = sorted({command for path in PAGES for command in commands_of(path)} - NAMES)
SHELL = [command for command in COMMANDS if command.split()[0] in ("make", "pip", "source", "tensorboard")]
SCRIPTED = [command for command in COMMANDS if command not in SHELL]  # scripts of ours
NOT_RUN = {
    "make test": "it is what runs the tests",
    "make simd": "makes a second environment: a compiler, headers, a network and 6 GB",
    "pip install .": "changes the environment; tests/test_install.py builds the wheel and installs it elsewhere",
    "pip install '.[onnx]'": "changes the environment, from a network; the tests' own has this extra",
    "pip install '.[segmentation]'": "changes the environment, from a network; the tests' own has this extra",
    "pip install '.[simplejpeg]'": "changes the environment, from a network",
    "pip install '.[torchcodec]'": "changes the environment, from a network",
    "pip install '.[remote]'": "changes the environment, from a network; the tests' own has this extra",
    "accelerate launch pretrain/run.py vit_small 'data=http://HOST/{000..099}.tar' data_stream=true steps=100000": (
        "wants a server; tests/pretrain/streaming has one"
    ),
    "accelerate launch --multi_gpu pretrain/run.py vit_small 'data=~/photos'": "wants several GPUs",
}  # command: why no test runs it
NARROW = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}  # in place of a recipe's ViT-S or -B
SHORT = [
    "epochs=null", "steps=2", "batch=4", "precision=fp32", "model.attention=explicit", "threads=1", "log_every=1",
    "loader.workers=0", "monitor.most=4", "monitor.bank=8",
]  # fmt: skip


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


def small(words: list[str], home: Path) -> list[str]:
    """Words of a training as documented, and others that make it a short one of a narrow model on small images."""
    given = [word.replace("hf:PATH", f"hf:{home}/labelled").replace("=PATH", f"={home}/fashion") for word in words]
    if "--resume" in words:
        return [*given, "steps=3"]
    recipe = next((word for word in words if "=" not in word and not word.startswith("--")), "quickstart")
    content = configuration.read_yaml(configuration.find_recipe(recipe, "pretrain"))
    shape = [f"model.kwargs.{name}={value}" for name, value in NARROW.items()]
    size = [f"views.{name}.size={32 if name == 'local' else 64}" for name in content.views]
    if {"patch_size", "channels"} & content.model.get("kwargs", {}).keys():  # small as it is
        shape = size = []
    elif any(word.startswith("model.name=spvit") for word in words):  # of its own depth and width
        shape = []
    elif any(word.startswith("model.init=timm:") for word in words):  # of the depth and width of what is published
        shape = [f"model.weights={home}/weights.safetensors"]
    if "runs/" in str(content.model.get("init")):
        shape.append(f"model.init={home}/token_runs/tokens_lvvit")
    return [*given, *SHORT, *shape, *size]


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
