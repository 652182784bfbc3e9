"""Finetuning with labels: the whole backbone and a linear head, AdamW with layer decay, beside training from scratch.

    accelerate launch evaluate/finetune.py --ckpt runs/quickstart-001 --epochs 10
    accelerate launch evaluate/finetune.py finetune_mae_vit_base --ckpt runs/mine batch=512 accumulate=4
    accelerate launch evaluate/finetune.py finetune_deit_scratch --ckpt random --data PATH
    accelerate launch evaluate/finetune.py --ckpt runs/mine --size 384 --crop 1.0
    accelerate launch evaluate/finetune.py --ckpt runs/mine --resume

A recipe is a file, or a name in configs/evaluate; flags and key=value words change it. The last step's model is
judged, never the best one: what the best epoch would have scored on the test images is printed beside, as is the
field's habit. Writes RUN/evaluate/finetune.json, and into RUN/evaluate/finetune a folder for each training, with
metrics.jsonl, TensorBoard's files and the finetuned weights. One process or many (DDP).
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/finetune.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.launch import StopSignal, entry  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import dataclasses
import re
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import Accelerator
from omegaconf import OmegaConf

from common import config as configuration
from common import processes
from common.errors import Refusal
from common.finetune_options import FREE, FinetuneConfig, check, fit_batch, num_steps, unwise
from common.finetuning import at_size, bits, train, unfinished
from common.probe import probe
from common.protocol import LABELS, Evaluation, begin, chosen_device, first_process, parser
from common.report import Outcomes, accuracies, interval, kind_name, ordered, percent, table, tell, write
from common.run_folder import CONFIG, WAIT, RunLock
from common.strong_augment import rand_augment
from common.subjects import RANDOM
from common.tracking import check_tensorboard

NAMES = LABELS | {"random": "from scratch", "pixels": "raw pixels, linear"}
HABIT = (
    "best epoch: the highest accuracy on the test images at any look at them. It was chosen by the answer, as is the "
    "field's habit, and is no estimate"
)


def main(argv: list[str]) -> int:
    """Arguments -> one training for each row and seed -> report. Returns the exit status."""
    stop = StopSignal()
    arguments, recipe, config = read(argv)
    device = chosen_device(arguments.device)
    check_tensorboard(config.tensorboard)
    job = begin("finetune", arguments, device=device, quiet=not first_process())
    recipe, config = resumed(job, recipe, config) if arguments.resume else (recipe, config)
    pooling = config.pool or job.subject.description.get("pooling", "mean")
    subject, note = at_size(job.subject, config.size, config.crop)
    job.subject = dataclasses.replace(job.subject, description=subject.description)
    if pooling != "mean" and not subject.description.get("num_prefix_tokens", 1):
        raise Refusal(f"--pool {pooling}: {subject.description['name']} has no class token; use --pool mean")
    if config.rand_augment is not None:  # tried once, before any time is spent
        rand_augment(config.rand_augment, job.size, subject.description["mean"])
    processes.join(cpu=device.type == "cpu")
    accelerator = processes.accelerator(job.precision)
    job.device = accelerator.device
    config, changed = fit_batch(config, len(job.train), accelerator.num_processes)
    notes = [line for line in (note, changed, *unwise(config, len(job.train))) if line]
    subjects = [("subject", subject)] if subject.state is not None else []
    subjects += [("random", subject.untrained())] if arguments.baselines or not subjects else []
    lock = prepare(job, recipe, config, accelerator)
    identity = common_to_all(job, config, pooling)

    found: dict[str, list[list[dict[str, Any]]]] = {}
    for row, each in subjects:
        for seed in job.seeds:
            job.say(f"{LABELS[row] if row == 'random' else each.name}, seed {seed}:")
            history, added = train(job, config, each, seed, identity, folder_of(job), accelerator, stop)
            if stop.received is not None:
                job.say("stopped: no report is written; the same command with --resume goes on")
                return stop.status
            found.setdefault(row, []).append(history)
            notes += [added] if added and added not in notes else []
    if lock is not None:
        lock.release()
    if first_process():
        report(job, recipe, config, pooling, found, notes)
    return 0


# ------------------------------------------------------------------------------------------------------ options


def options() -> argparse.ArgumentParser:
    """The command line: what every evaluation takes, and a flag for every option of a recipe."""
    options = parser(__doc__ or "", precision=None)
    add = options.add_argument
    add("words", nargs="*", metavar="RECIPE|key=value", help="a recipe, and options by name")
    add("--resume", action="store_true", help="go on with what was interrupted")
    add("--overwrite", action="store_true", help="begin again where something was interrupted")
    add("--no-baselines", dest="baselines", action="store_false", help="neither from scratch nor raw pixels")
    taken = {action.dest for action in options._actions}
    for name, kind, default, about in configuration.fields(FinetuneConfig):
        if name not in taken:
            usual = "null" if default is None else default
            add(f"--{name.replace('_', '-')}", dest=f"option.{name}", metavar=kind.split()[0].upper(),
                help=f"{about} (default: {usual})".replace("%", "%%"))  # fmt: skip
    return options


def read(argv: Sequence[str]) -> tuple[argparse.Namespace, str | None, FinetuneConfig]:
    """(arguments, the recipe's name, options). Raises Refusal for what is unknown or out of range."""
    # `--seeds 0 1 epochs=3`: argparse would take the last word for a seed
    loose = [at for at, word in enumerate(argv) if re.match(r"\w+=", word) and at and not argv[at - 1].startswith("-")]
    arguments = options().parse_intermixed_args([word for at, word in enumerate(argv) if at not in loose])
    arguments.words += [argv[at] for at in loose]
    recipes = [word for word in arguments.words if "=" not in word]
    if len(recipes) > 1:
        raise Refusal(f"expected one recipe and key=value words, found {', '.join(recipes)}")
    flags = [(key.partition(".")[2], value) for key, value in vars(arguments).items() if key.startswith("option.")]
    words = [f"{name}={value}" for name, value in flags if value is not None]
    words += [word for word in arguments.words if "=" in word]
    path = configuration.find_recipe(recipes[0], "evaluate") if recipes else None
    config = configuration.load(FinetuneConfig, path, words)
    check(config)
    arguments.recipe, arguments.said = path, words
    if arguments.ckpt == RANDOM:
        arguments.like = arguments.like or config.like
    return arguments, path.stem if path is not None else None, config


def resumed(job: Evaluation, recipe: str | None, config: FinetuneConfig) -> tuple[str | None, FinetuneConfig]:
    """The recipe and options that were stored when it was begun. Raises Refusal if others are given now."""
    path = folder_of(job) / CONFIG
    if not path.is_file():
        raise Refusal(f"--resume: nothing was begun in {path.parent}: leave --resume out")
    first = path.read_text().partition("\n")[0]
    stored = configuration.load(FinetuneConfig, path, [])
    if job.arguments.recipe is None:  # what is not said stays as it was
        config = configuration.load(FinetuneConfig, path, job.arguments.said)
    for name, before in dataclasses.asdict(stored).items():
        now = getattr(config, name)
        if now != before and name not in FREE:
            raise Refusal(
                f"--resume: {name}={now}, and {path.parent} was begun with {name}={before}: give the same options, or "
                "none, or begin again with --overwrite"
            )
    return first.removeprefix("# recipe: ") if first.startswith("# recipe: ") else recipe, config


def folder_of(job: Evaluation) -> Path:
    """Where the trainings of a report lie."""
    return job.out.with_suffix("")


def prepare(job: Evaluation, recipe: str | None, config: FinetuneConfig, accelerator: Accelerator) -> RunLock | None:
    """Make the folder of the trainings, with the options in it; what a finished finetuning left there goes. Raises
    Refusal if an unfinished one would."""
    folder, resume = folder_of(job), job.arguments.resume
    left = unfinished(folder)
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
            (folder / CONFIG).write_text(head + OmegaConf.to_yaml(OmegaConf.structured(config)))
    accelerator.wait_for_everyone()
    return lock


def common_to_all(job: Evaluation, config: FinetuneConfig, pooling: str) -> dict[str, Any]:
    """What trainings must have in common with those they go on with."""
    return {
        "classes": len(job.classes),
        "data": job.spec,
        "training images": job.train.fingerprint(),
        "test images": job.test.fingerprint(),
        "model": job.subject.description["name"],
        "size": list(job.size),
        "pooling": pooling,
        "precision": job.precision,
        "batch": config.batch,
    }


# ------------------------------------------------------------------------------------------------------- report


def report(
    job: Evaluation,
    recipe: str | None,
    config: FinetuneConfig,
    pooling: str,
    found: dict[str, list[list[dict[str, Any]]]],
    notes: list[str],
) -> None:
    """Write and tell what was found: {row: [history of each seed]}."""
    values: dict[str, dict[str, Any]] = {}
    outcomes, count = Outcomes(), len(job.test)
    read = bits(next(iter(found.values()))[0][-1]["images"]["read"], count)
    judged = int(read.sum())
    for row, histories in found.items():
        for history in histories:
            outcomes.add(row, pooling, bits(history[-1].pop("images")["raw"], count)[read])
        entry = accuracies([history[-1]["raw"] for history in histories], judged)
        if config.ema is not None:
            entry["ema"] = accuracies([history[-1]["ema"] for history in histories], judged)
        best = [max(history, key=lambda look: max(look["raw"], look.get("ema", 0.0))) for history in histories]
        shares = [max(look["raw"], look.get("ema", 0.0)) for look in best]
        entry["best_on_test"] = {
            "accuracy": sum(shares) / len(shares), "epochs": [look["epoch"] for look in best], "note": HABIT
        }  # fmt: skip
        entry["history"] = histories
        values[row] = {pooling: entry}
    if job.arguments.baselines:
        raw = job.pixels()
        sides = (raw.train["pixels"], raw.train_labels, raw.test["pixels"], raw.test_labels, len(job.classes))
        probed = [probe(*sides, seed=seed) for seed in job.seeds]
        for each in probed:
            outcomes.add("pixels", "pixels", each.predictions == raw.test_labels.cpu())
        values["pixels"] = {"pixels": accuracies([each.accuracy for each in probed], judged)}
    about = protocol(job, recipe, config, pooling) | {"notes": notes}
    write(job, about, values, judged, outcomes=outcomes.arrays(), index=np.flatnonzero(read))
    rows = []
    for row, kind, entry in ordered(values):
        best = entry.get("best_on_test")
        average = [percent(entry["ema"]) if "ema" in entry else ""] if config.ema is not None else []
        shown_best = f"{100 * best['accuracy']:.1f}*" if best else ""
        rows.append([NAMES[row], kind_name(row, kind, job.size), percent(entry), interval(entry), *average, shown_best])
    header = ["training of", "", "accuracy", "95 %", *(["average"] if config.ema is not None else []), "best epoch"]
    tell(job, "finetuning accuracy (%)", "\n".join([table(header, rows), f"* {HABIT}", *notes]))


def protocol(job: Evaluation, recipe: str | None, config: FinetuneConfig, pooling: str) -> dict[str, Any]:
    """The settings, as the report tells them."""
    quiet = {*FREE, "like", "size", "crop", "pool", "epochs", "steps", "judge_every"}
    given = FinetuneConfig() if recipe is None else None
    changed: list[str] = []
    if recipe is not None:
        path = configuration.find_recipe(recipe, "evaluate")
        given = configuration.load(FinetuneConfig, path, []) if path.is_file() else None
        before = dataclasses.asdict(given) if given is not None else {}
        now = dataclasses.asdict(config)
        changed = sorted(name for name in before if name not in FREE and before[name] != now[name])
    name = "adamw" if recipe is None else recipe.removeprefix("finetune_")
    return {
        "id": f"finetune/{name}" + (f", changed: {', '.join(changed)}" if changed else ""),
        "recipe": recipe,
        "changed": changed,
        "pooling": pooling,
        "steps": num_steps(config, len(job.train)),
        "epochs": num_steps(config, len(job.train)) / (len(job.train) // config.batch),
        **{name: value for name, value in dataclasses.asdict(config).items() if name not in quiet},
        "layer_decay_from_scratch": 1.0,
        "selection": "none: the model after the last step",
        "pixels": "a linear probe, as evaluate/linear.py" if job.arguments.baselines else None,
    }


if __name__ == "__main__":
    entry(main)()
