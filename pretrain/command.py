"""The command line of `pretrain/run.py`: words to options."""

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import config as configuration
from common.checkpoints.run_folder import CONFIG
from common.commands import Parser
from common.data.location import OPTIONS
from common.errors import Refusal
from common.paths import expanded_path
from pretrain import flight, identity, objectives
from pretrain.config import PretrainConfig, check, load, option_names, resumed

MOVED = tuple(OPTIONS.values())  # options that a replayed step may differ in


@dataclass
class Arguments:
    """What was typed."""

    stem: str = "quickstart"  # the recipe's name, after which an unnamed run is numbered
    recipe: Path | None = None
    words: list[str] = field(default_factory=list)  # key=value
    resume: Path | None = None
    replay: Path | None = None  # the record of a step
    dry_run: bool = False
    overwrite: bool = False


def parse(argv: list[str], usage: str) -> Arguments:
    """Read the command line; --help prints every option and exits. Raises Refusal for what is not understood."""
    if "--help" in argv or "-h" in argv:
        print(help_text(usage))
        sys.exit(0)
    parser = Parser(add_help=False, options=option_names())
    parser.add_argument("words", nargs="*")
    parser.add_argument("--resume", type=expanded_path)
    parser.add_argument("--replay", type=expanded_path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    given = parser.parse_intermixed_args(argv)
    recipes = [word for word in given.words if "=" not in word]
    words = [word for word in given.words if "=" in word]
    if len(recipes) > 1:
        raise Refusal(f"expected one recipe and key=value words, found {', '.join(recipes)}")
    if given.replay is not None:
        return _replayed(given, recipes, words)
    if given.resume is not None:
        if recipes or given.overwrite:
            raise Refusal(
                f"--resume {given.resume} continues the stored recipe: leave out "
                f"{recipes[0] if recipes else '--overwrite'}"
            )
        if not (given.resume / CONFIG).is_file():
            raise Refusal(f"--resume {given.resume}: no run there (expected a folder with {CONFIG})")
        return Arguments(given.resume.name, None, words, given.resume.resolve(), dry_run=given.dry_run)
    recipe = configuration.find_recipe(recipes[0] if recipes else "quickstart", "pretrain")
    return Arguments(recipe.stem, recipe, words, dry_run=given.dry_run, overwrite=given.overwrite)


def _replayed(given: argparse.Namespace, recipes: list[str], words: list[str]) -> Arguments:
    """What `--replay RECORD` stands for. Raises Refusal for anything beside it but where the images are."""
    flags = {"--resume": given.resume is not None, "--overwrite": given.overwrite, "--dry-run": given.dry_run}
    others = [flag for flag, there in flags.items() if there] + recipes
    others += [word for word in words if word.partition("=")[0] not in MOVED]
    if others:
        raise Refusal(
            f"--replay {given.replay} repeats a step as it was: leave out {others[0]} (only "
            f"{' and '.join(f'{name}=' for name in MOVED)} may be given, where the images were moved)"
        )
    flight.read(given.replay)
    return Arguments(given.replay.name, None, words, replay=given.replay.resolve())


def read(arguments: Arguments) -> tuple[PretrainConfig, Path | None]:
    """The options, and the run folder that was named (None: it numbers itself). Raises Refusal."""
    stored = arguments.resume or arguments.replay
    if stored is not None:
        config = resumed(stored, arguments.words)
        check(config)
        return config, arguments.resume
    config = load(arguments.recipe, arguments.words)
    return config, Path(config.run) if config.run else None


def written(config: PretrainConfig, reasons: dict[str, str]) -> str:
    """config.yaml: every option as it was resolved, with where the automatic ones came from."""
    lines = [f"# {name}: {reason}" for name, reason in sorted(reasons.items())]
    return "\n".join([identity.new_line(), "# Automatic values", *lines, configuration.as_yaml(config)])


def help_text(usage: str) -> str:
    """What --help prints."""
    parts = [
        usage.strip(),
        "",
        "  --resume RUN   continue an interrupted run",
        "  --replay RECORD",
        "                 repeat a step that was not finite (RUN/flight/step_*) and tell what in it was not; status 0",
        "                 if every number is as recorded, 1 if not",
        "  --dry-run      print the resolved options, cost and speed; write nothing",
    ]
    parts += [
        "  --overwrite    replace the run folder named by run=",
        "  --debug        show tracebacks",
        "",
        "Options, key=value. A text is taken as it is typed (null, or nothing, unsets one that may be null); in a",
        "path, ~ is the home folder; ${model.name} refers to another option:",
    ]
    parts.append(configuration.describe(PretrainConfig))
    for name in objectives.names():
        parts += [
            "",
            f"Options of objective {name}:",
            configuration.describe(objectives.find(name).Options, f"objectives.{name}."),
        ]
    return "\n".join(parts)
