"""Commands of README.md and docs/ as a shell has them: through their launchers, `make quickstart`, TensorBoard."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documented.commands import COMMANDS, NOT_RUN, README, ROOT, SHELL, blocks, part, small, split
from runs.children import Run

BIN = Path(sys.executable).parent
TORCHRUN = "ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 pretrain/run.py 'data=~/photos'"
LAUNCHED = {
    "accelerate launch pretrain/run.py mp3 'data=~/photos'": "done: 2 steps",
    "accelerate launch evaluate/knn.py --ckpt runs/photos": "report: runs/photos/evaluate/knn.json",
    TORCHRUN: "device     2 x CPU",
    "poslabel pretrain vit_small 'data=~/photos'": "done: 2 steps",
    "python pretrain/audit.py apl": "absolute: clean",
}  # one command of each launcher: words that it prints
POSLABEL = "import sys; sys.path.insert(0, {!r}); from common.processes.launch import main; main()"


def shell(command: str, home: Path, **environment: str) -> str:
    """What a command prints that is typed in the home folder; its status is 0."""
    path = f"{home / 'bin'}:{BIN}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-c", command], cwd=home, env=os.environ | {"PATH": path} | environment,
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return ended.stdout


def program(path: Path, text: str) -> None:
    """Write an executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_every_command_is_run_or_it_is_said_why_not() -> None:
    scripted = [*part("common/"), *part("pretrain/"), *part("evaluate/"), *part("benchmarks/")]
    here = ["make quickstart", "source .venv/bin/activate", "tensorboard --logdir runs"]
    assert sorted([*scripted, *here, *NOT_RUN]) == COMMANDS
    assert set(here) <= set(SHELL) and set(LAUNCHED) <= set(scripted)


@pytest.mark.slow
@pytest.mark.parametrize("command", LAUNCHED)
def test_a_launcher_starts_it(command: str, home: Path) -> None:
    """As typed, with `~` and the quotes of a shell, and the words that make a training short."""
    program(home / "bin" / "poslabel", f"#!{sys.executable}\n{POSLABEL.format(str(ROOT))}\n")
    script, words = split(command)
    more = small(words, home)[len(words) :] if script == "pretrain/run.py" else []
    assert LAUNCHED[command] in shell(f"{command} {' '.join(more)}", home)


def test_the_environment_is_entered(tmp_path: Path) -> None:
    if not (BIN / "activate").is_file():
        pytest.skip("these tests run in no virtual environment")
    (tmp_path / ".venv").symlink_to(BIN.parent)
    python = Path(shell("source .venv/bin/activate && command -v python", tmp_path).strip())
    assert python.parent.samefile(BIN)


@pytest.mark.slow
def test_tensorboard_finds_the_runs(home: Path) -> None:
    """`--inspect` in place of a server that nothing ends."""
    out = shell("tensorboard --logdir runs --inspect", home)
    for run in ("photos", "quickstart-001"):
        assert re.search(rf"^runs/{run}/tb\b", out, re.MULTILINE), out
    assert "absolute/accuracy" in out


def form(line: str) -> str:
    """A printed line with every number, every gap and every place alike."""
    line = re.sub(r"/\S*/runs/", "/…/runs/", line)
    return re.sub(r"[\s-]+", " ", re.sub(r"\d[\d,.:]*", "0", line)).strip()


@pytest.mark.slow
def test_the_quickstart_prints_what_readme_shows(home: Path) -> None:
    """In form: the same words in every line, whatever the numbers are. Its launcher appends what makes it short."""
    shorter = {"pretrain/run.py": "steps=4 log_every=2 monitor.every=4", "evaluate/linear.py": "--epochs 1 --baselines"}
    cases = "".join(f'*{script}*) set -- "$@" {words};;\n' for script, words in shorter.items())
    program(home / "venv/bin/accelerate", f'#!/bin/sh\ncase "$*" in\n{cases}esac\nexec {BIN}/accelerate "$@"\n')
    shell("rm -r runs; touch venv/bin/pip", home)
    out = shell("make quickstart VENV=venv -o venv/bin/.installed", home)
    assert Run(home / "runs/quickstart-001").steps == [2, 4]
    printed = {form(line) for line in out.splitlines()}
    shown = [line for line in blocks(README, "")[0].splitlines() if line != "…"]
    assert [line for line in shown if form(line) not in printed] == []
    named = re.findall(r"^(?:run|pictures|tables) +(\S+)[:/]", out, re.MULTILINE)[1:]
    assert len(named) == 3 and all((home / path.rstrip(":")).exists() for path in named), named
