"""README.md and docs/: every command in them is understood, every table says what made it, and
whatever they name exists."""

import argparse
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from documented.commands import FENCE, PAGES, README, ROOT, SCRIPTED, SHELL, call, module_of, split

from common.errors import Refusal

# how a command begins that makes figures
MADE = ("accelerate launch evaluate/", "accelerate launch pretrain/", "python pretrain/audit.py ", "python benchmarks/")


class Understood(Exception):
    """Raised in place of doing what a parsed command line asks for."""


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


RIGHT = {
    "make": target_exists,
    "pip": extra_exists,
    "source": lambda words: words[1:] == [".venv/bin/activate"],
    "tensorboard": lambda words: words[1:] == ["--logdir", "runs"],
}  # commands that are no script of ours


@pytest.mark.parametrize("command", SHELL)
def test_a_command_of_the_shell_is_right(command: str) -> None:
    words = shlex.split(command)
    assert RIGHT[words[0]](words)


@pytest.mark.parametrize("command", [command for command in SCRIPTED if "pretrain/run.py" in command])
def test_a_training_is_understood(command: str) -> None:
    """Its options are read from the recipe and the words; of a run to resume only the folder is missing."""
    from pretrain.command import parse, read

    _, words = split(command)
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            parse(words, "")
    elif "--resume" in words:
        with pytest.raises(Refusal, match=r"runs/photos.*no run"):
            parse(words, "")
    else:
        read(parse(words, ""))


@pytest.mark.parametrize("command", [command for command in SCRIPTED if "pretrain/run.py" not in command])
def test_a_command_is_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, words = split(command)
    only_parse(monkeypatch)
    with pytest.raises(Understood):
        call(module_of(script), words, monkeypatch)


# --------------------------------------------------------------------------------------------- quick: what is said


def test_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500


def test_readme_names_every_page_and_every_script() -> None:
    text = README.read_text()
    assert [path.name for path in PAGES[1:] if f"(docs/{path.name})" not in text] == []
    scripts = [f"evaluate/{path.name}" for path in (ROOT / "evaluate").glob("[!_]*.py")]
    assert [
        name
        for name in [*scripts, *(f"pretrain/{name}.py" for name in ("run", "audit", "generate_labels"))]
        if f"`{name}`" not in text
    ] == []


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
