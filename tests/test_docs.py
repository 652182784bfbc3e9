"""README.md and docs/: every command in them is understood (fast) and runs (slow), every table says what made it, and
whatever they name exists."""

import argparse
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import timm
from runs.children import training_here
from safetensors.torch import save_file

from common.errors import Refusal

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STARTS = r"(?:[A-Z_]+=\S+ )?(?:accelerate launch|torchrun|python|poslabel|pip install|make|tensorboard|source) "
INLINE = re.compile(rf"(?<!`)`({STARTS}[^`\n]+)`")
MADE = ("accelerate launch evaluate/", "python benchmarks/")  # how a command begins that makes figures


def blocks(path: Path, language: str) -> list[str]:
    """Contents of the code blocks of a page that are marked as `language`."""
    return [content for marked, content in FENCE.findall(path.read_text()) if marked == language]


def commands_of(path: Path) -> list[str]:
    """Commands of a page: the lines of its bash blocks without comments, and code in its text that begins as one."""
    lines = [line for block in blocks(path, "bash") for line in block.splitlines()]
    typed = [shlex.join(shlex.split(line, comments=True)) for line in lines if line.strip()]
    return typed + [shlex.join(shlex.split(code)) for code in INLINE.findall(FENCE.sub("", path.read_text()))]


COMMANDS = sorted({command for path in PAGES for command in commands_of(path)} - {"poslabel knn", "poslabel NAME"})


class Understood(Exception):
    """Raised in place of doing what a parsed command line asks for."""


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


def call(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """`main` of an entry script in this process, whether it takes its words or reads them from sys.argv."""
    main = module_of(script).main
    monkeypatch.setattr(sys, "argv", [script, *words])
    return (main(words) if main.__code__.co_argcount else main()) or 0


# ----------------------------------------------------------------------------------------------- quick: understood


def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let whatever parses its words with argparse end there."""

    def ended(parse: Callable) -> Callable:
        def parsed(self: argparse.ArgumentParser, *given: object) -> None:
            parse(self, *given)
            raise Understood

        return parsed

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, ended(getattr(argparse.ArgumentParser, name)))


def target_exists(words: list[str]) -> bool:
    return re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE) is not None


def extra_exists(words: list[str]) -> bool:
    extras = re.findall(r"\[(\w+)\]", words[2])
    return all(re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE) for extra in extras)


SHELL = {
    "make": target_exists,
    "pip": extra_exists,
    "source": lambda words: words[1:] == [".venv/bin/activate"],
    "tensorboard": lambda words: words[1:] == ["--logdir", "runs"],
}  # commands that are no script of ours


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.split()[0] in SHELL])
def test_a_command_of_the_shell_is_right(command: str) -> None:
    words = shlex.split(command)
    assert SHELL[words[0]](words)


SCRIPTED = [command for command in COMMANDS if command.split()[0] not in SHELL]


@pytest.mark.parametrize("command", [command for command in SCRIPTED if "pretrain/run.py" in command])
def test_a_training_is_understood(command: str) -> None:
    """Its options are read from the recipe and the words; of a run to resume only the folder is missing."""
    from pretrain.command import parse, read

    _, words = split(command)
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            parse(words, "")
    elif {"--resume", "--replay"} & set(words):
        with pytest.raises(Refusal, match=r"runs/photos.*(no run|no record)"):
            parse(words, "")
    else:
        read(parse(words, ""))


@pytest.mark.parametrize("command", [command for command in SCRIPTED if "pretrain/run.py" not in command])
def test_a_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, words = split(command)
    only_parse(monkeypatch)
    with pytest.raises(Understood):
        call(script, words, monkeypatch)


# --------------------------------------------------------------------------------------------- quick: what is said


def test_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500


def test_readme_names_every_page_and_every_script() -> None:
    text = README.read_text()
    assert [path.name for path in PAGES[1:] if f"(docs/{path.name})" not in text] == []
    scripts = [f"evaluate/{path.name}" for path in (ROOT / "evaluate").glob("[!_]*.py")]
    assert [name for name in [*scripts, "pretrain/run.py", "pretrain/audit.py"] if f"`{name}`" not in text] == []


def test_the_results_of_readme_are_those_of_results_md() -> None:
    assert module_of("benchmarks/results.py").summary() in README.read_text()


def tables(path: Path) -> Iterator[tuple[str, str]]:
    """(table, paragraphs directly before and after it) for each table of measured figures of a page."""
    parts = re.split(r"\n\n+", FENCE.sub("", path.read_text()))
    for i, part in enumerate(parts):
        if part.startswith("|") and re.search(r"\| \**\d+(\.\d+)?\b", part):
            yield part, " ".join([*parts[max(0, i - 1) : i], *parts[i + 1 : i + 2]])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_table_of_figures_says_which_command_made_it(path: Path) -> None:
    for table, around in tables(path):
        made = " ".join(around.split()).partition("Made by `")[2]
        assert made.startswith(MADE), table.splitlines()[0]
        if "RESULTS.md" in made:
            results = (ROOT / "RESULTS.md").read_text()
            assert [figure for figure in re.findall(r"\d+\.\d ± \d+\.\d", table) if figure not in results] == []


def test_what_the_documents_name_exists() -> None:
    """Paths of ours, dotted modules of ours, and links to pages; in LOG.md, which tells of the past, links alone."""
    missing = []
    for path in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "RESULTS.md", ROOT / "LOG.md"]:
        text = path.read_text()
        links = re.findall(r"\]\((?!http)([^)#]+)", text)
        missing += [f"{path.name}: {link}" for link in links if not (path.parent / link).exists()]
        if path.name in ("LOG.md", "RESULTS.md"):
            continue
        names = re.findall(r"(?<![\w/])(?:common|pretrain|evaluate|configs|benchmarks|tests|docs)/[\w./]*\w", text)
        missing += [f"{path.name}: {name}" for name in names if "NAME" not in name and not (ROOT / name).exists()]
        for name in re.findall(r"\b((?:common|pretrain|evaluate)(?:\.[a-z_]+)+)\b", text):
            place = ROOT / name.replace(".", "/")
            parts = [place, place.with_suffix(".py"), place.parent.with_suffix(".py"), place.parent / "__init__.py"]
            missing += [] if any(part.exists() for part in parts) else [f"{path.name}: {name}"]
    assert not missing


# ------------------------------------------------------------------------------------------------- slow: they run

STEPS = [
    "steps=2", "epochs=null", "batch=4", "precision=fp32", "model.attention=explicit", "threads=1", "log_every=1",
    "loader.workers=0", "tensorboard=false", "monitor.most=4", "monitor.bank=8",
]  # fmt: skip
NARROW = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2}
LESS = {
    "evaluate/fewshot.py": ["--shots", "1", "2"],
    "evaluate/finetune.py": ["--epochs", "1"],
    "evaluate/segmentation.py": ["--steps", "2"],
    "evaluate/explain.py": ["--images", "2"],
    "evaluate/compare.py": ["--make", "knn"],
    "evaluate/export.py": ["--to", "safetensors", "--force"],
    "benchmarks/positions.py": ["--model", "vit_tiny_patch16_224", "--size", "64", "--batch", "2", "--rounds", "1"],
    "benchmarks/backbones.py": ["--size", "64", "--batch", "1", "--rounds", "1", "--precision", "fp32"],
    "benchmarks/loader.py": ["--images", "8", "--rounds", "1"],
    "benchmarks/launch.py": ["--steps", "8", "--rounds", "1"],
    "benchmarks/probe.py": ["--images", "128", "--rounds", "1"],
}  # words that make a command small
ELSEWHERE = {
    "--replay": "tests/pretrain/test_flight.py",
    "benchmarks/results.py": "tests/test_results.py",
    "--weights FILE --data IMAGENET": "tests/evaluate/test_selftest.py",
    "data=fashion-mnist": "tests/common/data/test_data.py",
    "apl --input": "tests/pretrain/leaks",
}  # part of a command: where what it stands for is run
HERE = [command for command in SCRIPTED if not any(part in command for part in ELSEWHERE)]


@pytest.fixture(scope="session")
def furnished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with ~/photos, ~/labelled, and the runs that commands name in ~/runs."""
    place = tmp_path_factory.mktemp("home")
    shutil.copytree(images, place / "photos")
    for split_name in ("train", "test"):
        shutil.copytree(images, place / "labelled" / split_name)
    with training_here() as main:
        for name, recipe in (("quickstart-001", "quickstart"), ("photos", "vit_small")):
            words = [recipe, f"data={place / 'labelled'}", f"run={place / 'runs' / name}"]
            assert main(*smaller(words, place)) == 0
    return place


@pytest.fixture
def home(furnished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The furnished home folder as the one that ~ stands for."""
    monkeypatch.setenv("HOME", str(furnished))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return furnished


@pytest.fixture
def runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of the runs that commands name, below the working folder."""
    shutil.copytree(home / "runs", tmp_path / "here" / "runs")
    monkeypatch.chdir(tmp_path / "here")


def smaller(words: list[str], home: Path) -> list[str]:
    """Words of a training, with few steps of a narrow model appended; what comes from a network comes from a file."""
    given = [word.replace("hf:PATH", f"hf:{home / 'labelled'}") for word in words if "model.init" not in word]
    if "--resume" in words:
        return [*given, "steps=3"]
    if len(given) < len(words):
        weights = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True, **NARROW)
        save_file(weights.state_dict(), home / "weights.safetensors")
        given += ["model.init=timm:vit_small_patch16_224.dino", f"model.weights={home / 'weights.safetensors'}"]
    own_shape = any(word.startswith("model.name=") for word in given) or not {*given} & WITHOUT_SHAPE
    narrow = [] if own_shape else [f"model.kwargs.{name}={value}" for name, value in NARROW.items()]
    named = [] if any(word.startswith("run=") for word in given) else ["run=runs/tried"]
    return [*given, *STEPS, *narrow, *named, "--overwrite"]


WITHOUT_SHAPE = {path.stem for path in (ROOT / "configs" / "pretrain").glob("*.yaml")} - {
    "quickstart", "compare", "compare_dino",
}  # fmt: skip  # recipes of whole ViTs, that are narrowed; the others are small as they are
WITHOUT_SHAPE |= {f"supervised/{path.stem}" for path in (ROOT / "configs" / "supervised").glob("deit*.yaml")}


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in HERE if "pretrain/run.py" in command])
def test_a_training_runs(command: str, home: Path, inside: Callable[..., int], request: pytest.FixtureRequest) -> None:
    _, words = split(command)
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            inside(*words)
        return
    if "--resume" in words:
        request.getfixturevalue("runs")
    assert inside(*smaller(words, home)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in HERE if "pretrain/" not in command])
def test_a_command_runs(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    script, words = split(command)
    words = [word.replace("~", str(home)) for word in words]
    if script.startswith("benchmarks/"):
        here = ["--threads", "1"] if script == "benchmarks/positions.py" else []
        ended = subprocess.run(
            [sys.executable, str(ROOT / script), *words, *LESS.get(script, []), *here],
            cwd=home, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        lacking = "the package lightly is not installed" in ended.stderr
        assert ended.returncode == 0 or lacking, ended.stderr
        return
    request.getfixturevalue("runs")
    if "--resume" in words:
        call(script, [*(word for word in words if word != "--resume"), *LESS.get(script, [])], monkeypatch)
        assert call(script, words, monkeypatch) == 0
        return
    assert call(script, [*words, *LESS.get(script, [])], monkeypatch) == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in HERE if "pretrain/audit.py" in command])
def test_an_audit_runs(
    command: str, home: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    script, words = split(command)
    if "--ckpt" in words:
        request.getfixturevalue("runs")
    assert call(script, words, monkeypatch) == (1 if "objectives.absolute.position=full" in words else 0)


def test_every_command_is_run_somewhere() -> None:
    assert [part for part in ELSEWHERE if not any(part in command for command in SCRIPTED)] == []
    assert [test for test in ELSEWHERE.values() if not (ROOT / test).exists()] == []
    scripts = {split(command)[0] for command in HERE}
    assert {script.partition("/")[0] for script in scripts} <= {"pretrain", "evaluate", "benchmarks"}


def form(line: str) -> str:
    """A printed line with every number and every gap alike."""
    return re.sub(r"[\s-]+", " ", re.sub(r"\d[\d,.:]*", "0", line)).strip()


@pytest.mark.slow
def test_readme_shows_what_is_printed(
    inside: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In form: the same words in every line, whatever the numbers are."""
    words = ["steps=4", "log_every=2", "monitor.every=4", "tensorboard=false", "threads=2"]
    assert inside("quickstart", "run=runs/quickstart-001", *words) == 0
    assert call("evaluate/knn.py", ["--ckpt", "runs/quickstart-001"], monkeypatch) == 0
    printed = {form(line) for line in capsys.readouterr().out.splitlines()}
    shown = [line for line in blocks(README, "")[0].splitlines() if line != "…"]
    assert [line for line in shown if form(line) not in printed] == []
