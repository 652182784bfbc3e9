"""The command line of `pretrain/run.py`: words to options."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import config as configuration
from common.checkpoints.run_folder import CONFIG
from common.checkpoints.storage import MANIFEST
from common.commands import Parser
from common.data.location import ARCHIVE
from common.errors import Refusal
from common.paths import expanded_path
from pretrain import objectives
from pretrain.checkpoints import new_name
from pretrain.config import PretrainConfig, check, load, option_names, resumed

OLD_RECORD = "record.json"  # of a bad step, by versions up to commit a0f5e39


@dataclass
class Arguments:
    """What was typed."""

    stem: str = "quickstart"  # the recipe's name, after which an unnamed run is numbered
    recipe: Path | None = None
    words: list[str] = field(default_factory=list)  # key=value
    resume: Path | None = None
    checkpoint: Path | None = None  # of that run, after which steps are taken again
    last: int | None = None  # of those steps
    dry_run: bool = False
    overwrite: bool = False

    @property
    def typed(self) -> set[str]:
        """Names of the options that were given; of a run that is resumed its batch is."""
        return {"batch"} if self.resume is not None else {word.partition("=")[0] for word in self.words}


def parse(argv: list[str], usage: str) -> Arguments:
    """Read the command line; --help prints every option and exits. Raises Refusal for what is not understood."""
    if "--help" in argv or "-h" in argv:
        print(help_text(usage))
        sys.exit(0)
    parser = Parser(add_help=False, options=option_names())
    parser.add_argument("words", nargs="*")
    parser.add_argument("--resume", type=expanded_path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--overwrite", action="store_true")
    given = parser.parse_intermixed_args(argv)
    recipes = [word for word in given.words if "=" not in word]
    words = [word for word in given.words if "=" in word]
    if (count := sum(word.startswith("data=") and word.endswith(ARCHIVE) for word in words)) > 1:
        raise Refusal(
            f"{count} archives are named, as a shell makes of braces: quote them, data='NAME-{{000..099}}.tar'"
        )
    if len(recipes) > 1:
        raise Refusal(f"expected one recipe and key=value words, found {', '.join(recipes)}")
    if given.resume is not None:
        if recipes or given.overwrite:
            raise Refusal(
                f"--resume {given.resume} continues the stored recipe: leave out "
                f"{recipes[0] if recipes else '--overwrite'}"
            )
        if (given.resume / MANIFEST).is_file():
            return _repeated(given.resume.resolve(), words, given.dry_run)
        if (given.resume / OLD_RECORD).is_file():
            raise Refusal(
                f"--resume {given.resume} is a record of an earlier version: commit a0f5e39 repeats that step, with "
                f"pretrain/run.py --replay {given.resume}"
            )
        if not (given.resume / CONFIG).is_file():
            raise Refusal(f"--resume {given.resume}: no run there (expected a folder with {CONFIG})")
        return Arguments(given.resume.name, None, words, given.resume.resolve(), dry_run=given.dry_run)
    recipe = configuration.find_recipe(recipes[0] if recipes else "quickstart", "pretrain")
    return Arguments(recipe.stem, recipe, words, dry_run=given.dry_run, overwrite=given.overwrite)


def _repeated(folder: Path, words: list[str], dry_run: bool) -> Arguments:
    """What `--resume CHECKPOINT steps=N diagnose=true` stands for. Raises Refusal for anything else."""
    run = folder.parents[1]
    lasts = [word.partition("=")[2] for word in words if word.startswith("steps=")]
    if "diagnose=true" not in words or dry_run:
        raise Refusal(
            f"--resume {folder} is one checkpoint of {run}: --resume {run} goes on from its newest one; to take the "
            "steps after this one again, up to step N, and see what in them is not finite: steps=N diagnose=true"
        )
    if not (run / CONFIG).is_file():
        raise Refusal(f"--resume {folder}: it lies in no run (expected {run / CONFIG})")
    if lasts and not lasts[-1].isdecimal():
        raise Refusal(f"steps={lasts[-1]}: expected the number of the last step to take again")
    others = [word for word in words if not word.startswith("steps=")]
    return Arguments(run.name, None, others, run, folder, int(lasts[-1]) if lasts else None)


def read(arguments: Arguments) -> tuple[PretrainConfig, Path | None]:
    """The options, and the run folder that was named (None: it numbers itself). Raises Refusal."""
    if arguments.resume is not None:
        config = resumed(arguments.resume, arguments.words)
        check(config)
        return config, arguments.resume
    config = load(arguments.recipe, arguments.words)
    return config, Path(config.run) if config.run else None


def written(config: PretrainConfig, reasons: dict[str, str]) -> str:
    """config.yaml: every option as it was resolved, with where the automatic ones came from."""
    lines = [f"# {name}: {reason}" for name, reason in sorted(reasons.items())]
    return "\n".join([new_name(), "# Automatic values", *lines, configuration.as_yaml(config)])


def help_text(usage: str) -> str:
    """What --help prints."""
    parts = [
        usage.strip(),
        "",
        "  --resume RUN   continue an interrupted run",
        "  --resume CHECKPOINT steps=N diagnose=true",
        "                 take the steps after a checkpoint (RUN/flight/step_*, RUN/state/step_*) again, up to step N,",
        "                 and say what in them is not finite; status 1 if one was not. Writes nothing",
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
