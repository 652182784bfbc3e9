"""Commands that are hinted at are those that can be typed here."""

import os
import shlex
import sys
from pathlib import Path

import pytest

from common import commands
from common.commands import command
from common.processes.launch import COMMAND

BESIDE = Path(sys.executable).parent


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Started by Python, in an environment that is active and has accelerate and torchrun, outside the checkout."""
    for name in (COMMAND, "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("python", "accelerate", "torchrun", "poslabel"):
        (programs / name).write_text("")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.chdir(tmp_path)
    return programs


def test_a_checkout_is_told_its_scripts(monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    assert command("knn", "--ckpt", "a b") == f"accelerate launch {commands.ROOT}/evaluate/knn.py --ckpt 'a b'"
    monkeypatch.chdir(commands.ROOT)
    assert command("knn", "--ckpt", "runs/x") == "accelerate launch evaluate/knn.py --ckpt runs/x"
    assert command("pretrain", "--resume", "x", processes=1) == "python pretrain/run.py --resume x"
    assert command("pretrain", processes=2) == "torchrun --nproc-per-node 2 pretrain/run.py"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert command("pretrain", "--resume", "r") == "torchrun --nproc-per-node 4 pretrain/run.py --resume r"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert command("audit") == "accelerate launch --num_processes 4 pretrain/audit.py"


def test_what_is_not_on_the_path_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch, plain: Path) -> None:
    monkeypatch.setenv("PATH", os.devnull)
    assert command("linear").startswith("bin/accelerate launch /")
    (plain / "accelerate").unlink()
    assert command("linear").startswith("bin/python /")
    monkeypatch.chdir(commands.ROOT)
    assert shlex.split(command("linear"))[0] == str(plain / "python")


def test_an_installed_wheel_and_who_typed_poslabel_are_told_poslabel(
    monkeypatch: pytest.MonkeyPatch, plain: Path
) -> None:
    monkeypatch.setenv(COMMAND, str(plain / "poslabel"))
    assert command("knn", "--ckpt", "runs/x") == "poslabel knn --ckpt runs/x"
    monkeypatch.setenv(COMMAND, "bin/poslabel")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command("pretrain", "--resume", "r").endswith("poslabel --num_processes 2 pretrain --resume r")
    monkeypatch.delenv(COMMAND)
    monkeypatch.setattr(commands, "ROOT", plain)  # site-packages have no pyproject.toml
    monkeypatch.delenv("WORLD_SIZE")
    assert command("linear", "--ckpt", "r") == "poslabel linear --ckpt r"
