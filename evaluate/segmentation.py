"""Semantic segmentation from a backbone: a linear layer on its tokens, UperNet, or votes of patches most alike.

    accelerate launch evaluate/segmentation.py --ckpt runs/quickstart-001
    accelerate launch evaluate/segmentation.py --ckpt runs/quickstart-001 --head knn
    accelerate launch evaluate/segmentation.py --ckpt runs/quickstart-001 --head upernet --steps 1000
    accelerate launch evaluate/segmentation.py segmentation_ade20k_linear --ckpt runs/mine --data ADEChallengeData2016
    accelerate launch evaluate/segmentation.py segmentation_lvvit_s --ckpt runs/mine --data PATH --multi-scale
    accelerate launch evaluate/segmentation.py --ckpt runs/mine --resume

--data is `builtin` (items of Fashion-MNIST on a canvas, with their masks), ADE20K's folder, or one with images/train,
masks/train, images/val, masks/val, whose masks are PNGs of class indices with 255 where there is none (and 0, with
--reduce-zero-label yes). A recipe is a file, or a name in configs/evaluate; flags and key=value words change it. The
last step's model is judged. Beside it stand an untrained backbone, for a frozen one also raw pixels, and the class that
most training pixels are of. Writes RUN/evaluate/segmentation.json (of other heads segmentation_HEAD.json) and, in a
folder of the same name, predictions.png and a folder for each training. One process or many (DDP).
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/segmentation.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.commands import Parser
from common.processes.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from common.checkpoints.storage import write_atomically
from common.errors import Refusal
from common.features.finite import refuse_spoiled
from common.features.neighbors import CENTRED, TREATMENTS
from common.processes import group
from common.processes.stopping import StopSignal
from common.training.tracking import check_tensorboard
from evaluate.job import recipes
from evaluate.job.arguments import LABELS, chosen_device, parser
from evaluate.job.evaluation import Evaluation, begin, first_process
from evaluate.job.report import Outcomes, interval, percent, show_in_tensorboard, table, tell, write
from evaluate.job.subjects import Subject, at_size
from evaluate.segmenting import heads
from evaluate.segmenting.data import CANVAS, Scenes, open_scenes
from evaluate.segmenting.inference import MULTI, SINGLE, stride_of
from evaluate.segmenting.options import (
    SegmentationConfig,
    check,
    fit_batch,
    is_frozen,
    peak_of,
    rate_of,
    refuse_single,
    refuse_unused,
)
from evaluate.segmenting.pictures import sheet
from evaluate.segmenting.scores import constant, summary
from evaluate.segmenting.training import Found, answer

NAMES = LABELS | {"majority": "majority class"}
WHAT = "95 %, bootstrap over test images; it covers neither seeds nor training"


def main(argv: list[str]) -> int:
    """Train a decoder once for each row and seed, and judge. Returns the exit status."""
    stop = StopSignal()
    arguments, recipe, config = read(argv)
    device = chosen_device(arguments.device)
    check_tensorboard(config.tensorboard)
    name = "segmentation" if config.head == "linear" else f"segmentation_{config.head}"
    splits = functools.partial(open_scenes, reduce_zero=config.reduce_zero_label)
    job = begin(name, arguments, device=device, quiet=not first_process(), splits=splits)
    job.name = "segmentation"
    if arguments.resume:
        asked = config.reduce_zero_label
        recipe, config = recipes.resumed(job, SegmentationConfig, recipe, config)
        if config.reduce_zero_label != asked:  # as it was begun
            job.train, job.test, job.note = open_scenes(job.location, config.reduce_zero_label)
    subject, note = resized(job, config)
    refuse_spoiled(subject.state, subject.name)
    group.join(cpu=device.type == "cpu")
    accelerator = group.accelerator(job.precision)
    job.device = accelerator.device
    config, changed = fit_batch(config, len(job.train), accelerator.num_processes)
    refuse_single(config, accelerator.num_processes)
    if config.head != "knn":  # built once before anything is written or deleted: it may be refused
        how: dict[str, Any] = {"frozen": True, "blocks": config.blocks, "channels": config.channels}
        heads.make(config.head, subject.untrained().backbone(), len(job.classes), **how)
    notes = [line for line in (note, changed, rate_of(config)[1]) if line]
    lock = recipes.prepare(job, recipe, config, accelerator)
    identity = recipes.identity(job, config.batch)

    answers: dict[str, list[Found]] = {}
    for row, judged in rows(config, subject, arguments.baselines):
        for seed in job.seeds:
            job.say(f"{judged.name if row == 'subject' else LABELS[row]}, seed {seed}:")
            result, added = answer(job, config, row, judged, seed, identity, recipes.folder_of(job), accelerator, stop)
            if result is None:
                job.say("stopped: no report is written; the same command with --resume goes on")
                return stop.status
            answers.setdefault(row, []).append(result)
            notes += [added] if added and added not in notes else []
    if lock is not None:
        lock.release()
    if first_process():
        picture = draw(job, answers)
        report(job, recipe, config, answers, notes, picture)
    return 0


def rows(config: SegmentationConfig, subject: Subject, baselines: bool) -> list[tuple[str, Subject]]:
    """Rows to compare: the subject, an untrained backbone and, where no backbone is trained, patches of raw pixels."""
    chosen = [("subject", subject)] if subject.state is not None else []
    if baselines or not chosen:
        chosen.append(("random", subject.untrained()))
    if baselines and is_frozen(config) and config.head != "upernet":  # pixels have no blocks
        chosen.append(("pixels", subject.untrained()))
    return chosen


def resized(job: Evaluation, config: SegmentationConfig) -> tuple[Subject, str]:
    """Resize the subject for crops of the requested size: (subject, note on what was done). Raises Refusal."""
    subject, size = job.subject, config.size
    if size is None and job.spec == "builtin":
        size = [min(CANVAS, side) for side in subject.description["size"]]
    if config.mode == "whole":  # test images have any size
        description = subject.description
        description = description | {"kwargs": {**description["kwargs"], "dynamic_img_size": True}}
        subject = dataclasses.replace(subject, description=description)
        try:
            subject.backbone()
        except Refusal:
            raise Refusal(
                f"--mode whole: {description['name']} takes images of one size only; use --mode slide"
            ) from None
    subject, note = at_size(subject, size, None)
    job.subject = dataclasses.replace(job.subject, description=subject.description)
    stride_of(config, job.size)
    return subject, note


# ------------------------------------------------------------------------------------------------------ options


def options() -> Parser:
    """Parser of the options of every evaluation, and of those of a recipe."""
    options = parser(__doc__ or "", precision=None)
    switch = options.add_mutually_exclusive_group()
    frozen: dict[str, Any] = {"dest": "option.frozen", "action": "store_const"}
    switch.add_argument("--frozen", **frozen, const="true", help="keep the backbone")
    switch.add_argument("--end-to-end", **frozen, const="false", help="train the backbone too")
    recipes.add_options(options, SegmentationConfig)
    words = "neither an untrained backbone nor raw pixels"
    options.add_argument("--no-baselines", dest="baselines", action="store_false", help=words)
    return options


def read(argv: Sequence[str]) -> tuple[argparse.Namespace, str | None, SegmentationConfig]:
    """Read the command line: (arguments, recipe's name, options). Raises Refusal for values unknown or out of range."""
    arguments, recipe, config = recipes.read(options(), SegmentationConfig, argv)
    check(config)
    refuse_unused(config, [word.partition("=")[0] for word in arguments.said])
    return arguments, recipe, config


# ------------------------------------------------------------------------------------------------------- report


def report(
    job: Evaluation,
    recipe: str | None,
    config: SegmentationConfig,
    answers_of_rows: dict[str, list[Found]],
    notes: list[str],
    picture: Path,
) -> None:
    """Write and print the report of the answers: {row: [answer of each seed]}."""
    assert isinstance(job.train, Scenes) and isinstance(job.test, Scenes)
    values: dict[str, dict[str, Any]] = {}
    read = next(iter(answers_of_rows.values()))[0].read
    outcomes = Outcomes(np.flatnonzero(read))
    for row, results in answers_of_rows.items():
        values[row] = {config.head: summary(np.stack([result.counts[SINGLE][read] for result in results]), job.classes)}
        for result in results:
            outcomes.add(row, config.head, result.counts[SINGLE][read])
        if all(MULTI in result.counts for result in results):
            several = summary(np.stack([result.counts[MULTI][read] for result in results]), job.classes)
            values[row][config.head]["multi_scale"] = several
        values[row][config.head]["history"] = [result.history for result in results]
    chosen = int(job.train.pixels.sum(0).argmax())
    answers = constant(job.test.pixels[read], chosen)[None]
    values["majority"] = {"majority": summary(answers, job.classes) | {"class": job.classes[chosen]}}
    settings = protocol(job, recipe, config) | {"notes": notes, "picture": str(picture)}
    judged = int(read.sum())
    write(job, settings, values, judged, outcomes, interval=WHAT)
    multi = any("multi_scale" in kinds.get(config.head, {}) for kinds in values.values())
    lines = []
    for row, kinds in values.items():
        (kind, result), = kinds.items()  # fmt: skip
        score = percent(result["multi_scale"]) if "multi_scale" in result else ""
        right = f"{100 * result['pixel_accuracy']:.1f}"
        label = result.get("class", kind)
        lines.append([NAMES[row], label, percent(result), interval(result), *([score] if multi else []), right])
    header = ["", "", "mIoU", "95 %", *(["multi-scale"] if multi else []), "pixel accuracy"]
    below = [*best_and_worst(values, config.head), *notes, f"predictions: {picture}"]
    how = "" if is_frozen(config) else ", end to end"
    shown = "\n".join([table(header, lines), *below])
    tell(job, f"segmentation, {config.head}{how}: mIoU (%)", shown, is_frozen(config))


def best_and_worst(values: dict[str, dict[str, Any]], head: str, count: int = 3) -> list[str]:
    """Name the best and worst classes of the first row."""
    first = next(iter(values.values()))[head]["per_class"]
    known = sorted(((value, name) for name, value in first.items() if value is not None), reverse=True)
    said = [", ".join(f"{name} {100 * value:.1f}" for value, name in some) for some in (known[:count], known[-count:])]
    return [f"best classes: {said[0]}; worst: {said[1]}"] if len(known) >= 2 * count else []


def protocol(job: Evaluation, recipe: str | None, config: SegmentationConfig) -> dict[str, Any]:
    """Settings for the report."""
    changed = recipes.changed(recipe, config)
    quiet = {*recipes.FREE, "like", "size", "short", "long", "frozen", "mode", "stride", "judge_every"}
    quiet.add("reduce_zero_label")  # what it gave is in the fingerprints and in the note on the data
    name = config.head if recipe is None else recipe.removeprefix("segmentation_")
    return {
        "id": f"segmentation/{name}" + (f", changed: {', '.join(changed)}" if changed else ""),
        "metric": "mIoU",
        "recipe": recipe,
        "changed": changed,
        "frozen": is_frozen(config),
        "transform": {
            "name": f"segmentation, {config.mode}",
            "size": list(job.size),
            "stride": list(stride_of(config, job.size)),
            "short": config.short,
            "long": config.long,
            "interpolation": "bilinear",
        },
        **{name: value for name, value in dataclasses.asdict(config).items() if name not in quiet},
        "lr": peak_of(config),
        "similarity": f"cosine of patches, {TREATMENTS[CENTRED]}" if config.head == "knn" else None,
        "judged_at": "the size of the image as it is stored",
        "ignored_in_loss": "counted as 0 in the mean over all pixels, as mmsegmentation's",
        "layer_decay_from_scratch": None,
        "selection": "none: the model after the last step",
    }


def draw(job: Evaluation, answers: dict[str, list[Found]]) -> Path:
    """Write predictions.png of the first row, and show it beside the curves of the run if it has some."""
    first = next(iter(answers.values()))[0]
    path = recipes.folder_of(job) / "predictions.png"
    assert isinstance(job.test, Scenes)
    drawn = sheet(first.model, job.test, first.view, len(job.subject.description["mean"]), job.device)
    write_atomically(path, lambda aside: Image.fromarray(drawn).save(aside, format="PNG"))
    show_in_tensorboard(job, [(job.out.stem, drawn)])
    return path


if __name__ == "__main__":
    entry(main)()
