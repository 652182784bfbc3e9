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

from common.commands import Parser
from common.processes.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from accelerate import PartialState

from common.batches.strong import auto_augment
from common.caching.building import Builders, read_cached
from common.caching.pixels import Cache
from common.data import Images
from common.errors import Refusal
from common.features.finite import refuse_spoiled
from common.processes import group
from common.processes.stopping import StopSignal
from common.training.tracking import check_tensorboard
from evaluate.finetuning.options import FinetuneConfig, check, fit_batch, num_steps, unwise
from evaluate.finetuning.training import bits, finetune
from evaluate.job import frozen, recipes
from evaluate.job.arguments import LABELS, chosen_device, parser
from evaluate.job.evaluation import Evaluation, begin, first_process
from evaluate.job.report import Outcomes, accuracies, interval, kind_name, ordered, percent, table, tell, write
from evaluate.job.subjects import at_size
from evaluate.probing.probe import probe

NAMES = LABELS | {"random": "from scratch", "pixels": "raw pixels, linear"}
HABIT = (
    "best epoch: the highest accuracy on the test images at any look at them. It was chosen by the answer, as is the "
    "field's habit, and is no estimate"
)


def main(argv: list[str]) -> int:
    """Finetune once for each row and seed, and judge. Returns the exit status."""
    stop = StopSignal()
    arguments, recipe, config = read(argv)
    device = chosen_device(arguments.device)
    check_tensorboard(config.tensorboard)
    job = begin("finetune", arguments, device=device, quiet=not first_process())
    recipe, config = recipes.resumed(job, FinetuneConfig, recipe, config) if arguments.resume else (recipe, config)
    pooling = config.pool or job.subject.description.get("pooling", "mean")
    subject, note = at_size(job.subject, config.size, config.crop)
    job.subject = dataclasses.replace(job.subject, description=subject.description)
    if pooling != "mean" and not subject.description.get("num_prefix_tokens", 1):
        raise Refusal(f"--pool {pooling}: {subject.description['name']} has no class token; use --pool mean")
    if config.rand_augment is not None:  # tried once, before any time is spent
        auto_augment(config.rand_augment, job.size, subject.description["mean"], "--rand-augment ")
    refuse_spoiled(subject.state, subject.name)
    group.join(cpu=device.type == "cpu")
    accelerator = group.accelerator(job.precision)
    job.device = accelerator.device
    config, changed = fit_batch(config, len(job.train), accelerator.num_processes)
    notes = [line for line in (note, changed, *unwise(config, len(job.train))) if line]
    subjects = [("subject", subject)] if subject.state is not None else []
    subjects += [("random", subject.untrained())] if arguments.baselines or not subjects else []
    images = shown(job, config, stop)
    lock = recipes.prepare(job, recipe, config, accelerator)
    identity = recipes.identity(job, config.batch) | {"pooling": pooling}

    histories: dict[str, list[list[dict[str, Any]]]] = {}
    for row, judged in subjects:
        for seed in job.seeds:
            job.say(f"{LABELS[row] if row == 'random' else judged.name}, seed {seed}:")
            folder = recipes.folder_of(job)
            history, added = finetune(job, config, judged, images, seed, identity, folder, accelerator, stop)
            if stop.received is not None:
                job.say("stopped: no report is written; the same command with --resume goes on")
                return stop.status
            histories.setdefault(row, []).append(history)
            notes += [added] if added and added not in notes else []
    if lock is not None:
        lock.release()
    if first_process():
        report(job, recipe, config, pooling, histories, notes)
    return 0


def shown(job: Evaluation, config: FinetuneConfig, stop: StopSignal) -> Images:
    """Images to train on, read from a cache where one is asked for. What else looks at the same images decodes them:
    features of theirs are kept for other evaluations."""
    images = job.train.subset(np.arange(len(job.train)))
    if config.cache is not None:
        cache = Cache.of(images, config.cache, len(job.subject.description["mean"]), config.cache_root)
        builders = Builders(PartialState(), job.arguments.workers, job.say, lambda: stop.received)
        job.say(f"cache      {read_cached([images], cache, builders, job.limit, '--cache ')}")
    return images


def options() -> Parser:
    """Parser of the options of every evaluation, and of those of a recipe."""
    options = parser(__doc__ or "", precision=None)
    recipes.add_options(options, FinetuneConfig)
    words = "neither from scratch nor raw pixels"
    options.add_argument("--no-baselines", dest="baselines", action="store_false", help=words)
    return options


def read(argv: Sequence[str]) -> tuple[argparse.Namespace, str | None, FinetuneConfig]:
    """Read the command line: (arguments, recipe's name, options). Raises Refusal for values unknown or out of range."""
    arguments, recipe, config = recipes.read(options(), FinetuneConfig, argv)
    check(config)
    return arguments, recipe, config


def report(
    job: Evaluation,
    recipe: str | None,
    config: FinetuneConfig,
    pooling: str,
    histories_of_rows: dict[str, list[list[dict[str, Any]]]],
    notes: list[str],
) -> None:
    """Write and print the report of the histories: {row: [history of each seed]}."""
    values: dict[str, dict[str, Any]] = {}
    count = len(job.test)
    read = bits(next(iter(histories_of_rows.values()))[0][-1]["images"]["read"], count)
    judged, outcomes = int(read.sum()), Outcomes(np.flatnonzero(read))
    for row, histories in histories_of_rows.items():
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
        raw = frozen.pixels(job)
        sides = (raw.train["pixels"], raw.train_labels, raw.test["pixels"], raw.test_labels, len(job.classes))
        probed = [probe(*sides, seed=seed) for seed in job.seeds]
        for result in probed:
            outcomes.add("pixels", "pixels", result.predictions == raw.test_labels.cpu())
        values["pixels"] = {"pixels": accuracies([result.accuracy for result in probed], judged)}
    settings = protocol(job, recipe, config, pooling) | {"notes": notes}
    write(job, settings, values, judged, outcomes)
    rows = []
    for row, kind, entry in ordered(values):
        best = entry.get("best_on_test")
        average = [percent(entry["ema"]) if "ema" in entry else ""] if config.ema is not None else []
        shown_best = f"{100 * best['accuracy']:.1f}*" if best else ""
        rows.append([NAMES[row], kind_name(row, kind, job.size), percent(entry), interval(entry), *average, shown_best])
    header = ["training of", "", "accuracy", "95 %", *(["average"] if config.ema is not None else []), "best epoch"]
    tell(job, "finetuning accuracy (%)", "\n".join([table(header, rows), f"* {HABIT}", *notes]), frozen=False)


def protocol(job: Evaluation, recipe: str | None, config: FinetuneConfig, pooling: str) -> dict[str, Any]:
    """Settings for the report."""
    quiet = {*recipes.FREE, "like", "size", "crop", "pool", "epochs", "steps", "judge_every"}
    changed = recipes.changed(recipe, config)
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
