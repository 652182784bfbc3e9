"""Evaluations that train by a recipe: their command line, the folder their trainings lie in, and how they go on.

A recipe is a file of configs/evaluate; flags and key=value words change its options, which are a dataclass.
"""

import argparse
import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from accelerate import Accelerator

from common import config as configuration
from common.checkpoints.run_folder import CONFIG, WAIT, RunLock
from common.checkpoints.storage import write_atomically
from common.commands import Parser
from common.config import run_or_recipe
from common.errors import Refusal
from common.limits import BelowOne, Betas, Count, NotNegative, flag
from common.paths import path_option
from evaluate.job.evaluation import Evaluation
from evaluate.job.subjects import RANDOM

FREE = (
    "log_every",
    "checkpoint_every",
    "checkpoint_minutes",
    "keep",
    "tensorboard",
    "max_bad",
    "cache_root",
)  # may differ at a resume
Config = TypeVar("Config", bound="TrainingOptions")


@dataclass
class TrainingOptions:
    """Options that every training of an evaluation has. A recipe file of configs/evaluate, flags, and words set it."""

    like: str | None = field(default=None, metadata=path_option(run_or_recipe))
    """Architecture of --ckpt random where --like says nothing: a run, or a pretraining recipe."""
    accumulate: Count = 1
    """Parts a step is computed in, one after the other, to save memory."""
    weight_decay: NotNegative = 0.05
    """Of matrices; biases, norms, position embeddings and tokens have none."""
    betas: Betas = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the two moments."""
    clip: NotNegative = 0.0
    """Largest gradient norm; 0 does not clip."""
    drop_path: BelowOne = 0.0
    """Share of the images that skip the last block; it grows linearly from 0 in the first."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: Count | None = None
    """Steps between checkpoints; null leaves it to checkpoint_minutes."""
    checkpoint_minutes: NotNegative = 10.0
    """Minutes between checkpoints; 0 leaves it to checkpoint_every."""
    keep: Count = 2
    """So many last checkpoints are kept until the training is done."""
    tensorboard: bool = True
    """Write TensorBoard's event files."""
    max_bad: str | None = None
    """Unreadable images that are borne, see --max-bad; null: as the run."""


def add_options(options: argparse.ArgumentParser, kind: type) -> None:
    """Add --resume, --overwrite, recipe and key=value words, and a flag for every option of the dataclass `kind` that
    `options` has not yet."""
    add = options.add_argument
    add("words", nargs="*", metavar="RECIPE|key=value", help="a recipe, and options by name")
    add("--resume", action="store_true", help="go on with what was interrupted")
    add("--overwrite", action="store_true", help="begin again where something was interrupted")
    taken = {action.dest.removeprefix("option.") for action in options._actions}
    for name, noun, default, about in configuration.fields(kind):
        if name in taken:
            continue
        usual = "null" if default is None else default
        bare: dict[str, Any] = {"nargs": "?", "const": "true"} if noun == "bool" else {}
        word, _, limits = noun.partition(", ")
        about += f" ({limits}; default: {usual})" if limits else f" (default: {usual})"
        metavar = word if "|" in word else word.split()[0].upper()
        add(flag(name), dest=f"option.{name}", metavar=metavar, help=about.replace("%", "%%"), **bare)


def read(options: Parser, kind: type[Config], argv: Sequence[str]) -> tuple[argparse.Namespace, str | None, Config]:
    """Read the command line: (arguments, recipe's name, options). Raises Refusal for values unknown or of another
    type."""
    argv = options.as_flags(argv)
    # `--seeds 0 1 epochs=3`: argparse would take the last word for a seed
    loose = [at for at, word in enumerate(argv) if re.match(r"\w+=", word) and at and not _takes(argv[at - 1], options)]
    arguments = options.parse_intermixed_args([word for at, word in enumerate(argv) if at not in loose])
    arguments.words += [argv[at] for at in loose]
    recipes = [word for word in arguments.words if "=" not in word]
    if len(recipes) > 1:
        raise Refusal(f"expected one recipe and key=value words, found {', '.join(recipes)}")
    flags = [(key.partition(".")[2], value) for key, value in vars(arguments).items() if key.startswith("option.")]
    words = [f"{name}={value}" for name, value in flags if value is not None]
    words += [word for word in arguments.words if "=" in word]
    words += [f"max_bad={arguments.max_bad}"] if arguments.max_bad is not None else []
    path = configuration.find_recipe(recipes[0], "evaluate") if recipes else None
    config = configuration.load(kind, path, words)
    arguments.recipe, arguments.said = path, words
    arguments.max_bad = config.max_bad
    if arguments.ckpt == RANDOM:
        arguments.like = arguments.like or config.like
    return arguments, path.stem if path is not None else None, config


def _takes(word: str, options: argparse.ArgumentParser) -> bool:
    """Whether `word` is a flag that needs a word behind it."""
    action = options._option_string_actions.get(word)
    return action is not None and action.nargs is None


def resumed(job: Evaluation, kind: type[Config], recipe: str | None, config: Config) -> tuple[str | None, Config]:
    """Read the recipe and options that were stored at the beginning. Raises Refusal if others are given now."""
    path = folder_of(job) / CONFIG
    if not path.is_file():
        raise Refusal(f"--resume: nothing was begun in {path.parent}: leave --resume out")
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    stored = configuration.load(kind, path, [])
    if job.arguments.recipe is None:  # what is not said stays as it was
        config = configuration.load(kind, path, job.arguments.said)
    for name, before in _values(stored).items():
        now = getattr(config, name)
        if now != before and name not in FREE:
            raise Refusal(
                f"--resume: {name}={now}, and {path.parent} was begun with {name}={before}: give the same options, or "
                "none, or begin again with --overwrite"
            )
    if config.max_bad is not None:
        job.limit = dataclasses.replace(job.limit, max_bad=config.max_bad).check()
    job.refuse_unreadable()
    return first.removeprefix("# recipe: ") if first.startswith("# recipe: ") else recipe, config


def fit_batch(batch: int, accumulate: int, images: int, processes: int, of_each: int = 1) -> tuple[int, str]:
    """Fit the batch to `images` and processes: (batch, note on what was changed).

    `of_each`: images that every process needs in every accumulated part; 2 where they are mixed in pairs. Raises
    Refusal, with the number that is needed, where there are too few images or the batch cannot be shared.
    """
    parts = processes * accumulate
    unit = parts * of_each
    of = f"{_counted(processes, 'process')} x {_counted(accumulate, 'accumulation step')}"
    if images < unit:
        needed = "one image" if of_each == 1 else "two images, as they are mixed in pairs,"
        smaller = ["a smaller --accumulate"] if accumulate > 1 else []
        smaller += ["fewer processes"] if processes > 1 else []
        smaller += ["--mixup 0 --cutmix 0"] if of_each > 1 else []
        instead = f", or choose {' or '.join(smaller)}" if smaller else ""
        raise Refusal(
            f"{_counted(images, 'training image')} and a step needs at least {unit}: {needed} for each of {of}; "
            f"give more images{instead}"
        )
    if batch > images:
        fitting = images // unit * unit
        return fitting, f"batch {fitting}: there are {_counted(images, 'training image')}"
    if batch % unit:
        pairs = "" if of_each == 1 else ", each an even number of images, as they are mixed in pairs"
        raise Refusal(f"--batch {batch} cannot be shared by {of}{pairs}: choose a multiple of {unit}")
    return batch, ""


def _counted(number: int, noun: str) -> str:
    """Count in words: `1 process`, `2 processes`."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def folder_of(job: Evaluation) -> Path:
    """Folder of the trainings of a report."""
    return job.out.with_suffix("")


def prepare(job: Evaluation, recipe: str | None, config: Any, accelerator: Accelerator) -> RunLock | None:
    """Make the folder of the trainings, with the options in it; what finished ones left there goes. The first process
    holds a lock on it. Raises Refusal if it holds what was interrupted, unless that is to be resumed or overwritten."""
    folder, resume = folder_of(job), job.arguments.resume
    left = interrupted(folder, job.out)
    if left and not resume and not job.arguments.overwrite:
        raise Refusal(
            f"{left[0]} was interrupted: go on with --resume, or begin again with --overwrite (or elsewhere: --out)"
        )
    accelerator.wait_for_everyone()
    lock = None
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder, WAIT if resume else 0.0)
        for old in [] if resume else [path for path in folder.glob("*-seed*") if path.is_dir()]:
            shutil.rmtree(old)
        head = f"# recipe: {recipe}\n" if recipe else "# no recipe\n"
        if not resume:
            text = head + configuration.as_yaml(config)
            write_atomically(folder / CONFIG, lambda aside: aside.write_text(text, encoding="utf-8"))
    accelerator.wait_for_everyone()
    return lock


def interrupted(folder: Path, report: Path) -> list[Path]:
    """Trainings below `folder` that no `report` covers yet: interrupted after a checkpoint, or done when another
    was."""
    cut = {path.parents[1] for path in folder.glob("*/state/step_*") if not (path.parents[1] / "result.json").exists()}
    written = report.stat().st_mtime if report.is_file() else 0.0
    done = {path.parent for path in folder.glob("*-seed*/result.json") if path.stat().st_mtime > written}
    return sorted(cut) + sorted(done - cut)


def identity(job: Evaluation, batch: int) -> dict[str, Any]:
    """Facts that a training must have in common with the one it continues."""
    return {
        "classes": len(job.classes),
        "data": job.spec,
        "training images": job.train.fingerprint(),
        "test images": job.test.fingerprint(),
        "model": job.subject.description["name"],
        "size": list(job.size),
        "precision": job.precision,
        "batch": batch,
    }


def earlier(job: Evaluation, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Identity that an earlier version stored for the same images: fingerprints of the first kind."""
    sides = {"training images": job.train, "test images": job.test}
    return {name: identity[name] for name, images in sides.items() if images.has_fingerprint(str(identity.get(name)))}


def changed(recipe: str | None, config: Any) -> list[str]:
    """Names of the options that are not as in the recipe's file, if there is one."""
    path = configuration.find_recipe(recipe, "evaluate") if recipe is not None else None
    if path is None or not path.is_file():
        return []
    before, now = _values(configuration.load(type(config), path, [])), _values(config)
    return sorted(name for name in before if name not in FREE and before[name] != now[name])


def _values(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)
