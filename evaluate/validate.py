"""Top-1 and top-5 of a classifier, class by class: runs with labels, authors' files by their published names, timm's.

    accelerate launch evaluate/validate.py --ckpt runs/quickstart-001/evaluate/finetune/trained-seed0
    accelerate launch evaluate/validate.py --ckpt RUN OTHER --data PATH --size 384 --crop 1.0
    accelerate launch evaluate/validate.py --ckpt timm:vit_small_patch16_224 --weights FILE --data IMAGENET
    accelerate launch evaluate/validate.py --model lvvit_s --weights FILE --data IMAGENET --real real.json

Judges the test split with the classifier that is there: a run's head.safetensors, or the one in the published file,
LV-ViT's and SP-ViT's with half of their auxiliary head's maximum. --real: ImageNet-ReaL (arXiv 2006.07159), right
where the class is one of an image's; images without any are skipped. Nothing is trained or chosen here.

Writes RUN/evaluate/validate.json, and into RUN/evaluate/validate classes.csv and confusion.png. Several checkpoints
stand in one table, validate/validate.csv. One process or many, each on its share of the images.
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/validate.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry  # first: it sets what torch reads when it is imported

# isort: split
import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
from torch import nn

from common.checkpoints.pretrained import TIMM
from common.commands import Parser
from common.errors import Refusal
from common.features.metrics import wilson
from common.paths import expanded
from common.processes import group
from evaluate.job.arguments import chosen_device, parser
from evaluate.job.classifier import answers, load
from evaluate.job.evaluation import Evaluation, begin, first_process, refuse_unwritable
from evaluate.job.report import Outcomes, accuracies, interval, percent, table, tell, write
from evaluate.validating.classes import by_class, counts, draw, shown, write_csv
from evaluate.validating.images import judged_images, numbered, real_labels

TOP = 5
KIND = "logits"  # what is judged, beside the kinds of features of other reports
OF_PICKLES = (".pth", ".pt", ".bin", ".tar", ".npz")
WEIGHTS = {  # as a finetuning says, or a pretraining with labels
    "average": "average of the weights (EMA)",
    "last": "weights of the last step",
    "student": "the weights themselves, no average of them",
}


@dataclass
class Judged:
    """A classifier to be judged: its job, its network, and which class of the data each of its classes is."""

    job: Evaluation
    network: nn.Module
    number_of: np.ndarray  # (K,), -1 for none

    @property
    def weights(self) -> str:
        """Which weights these are, where there may be several."""
        training = self.job.subject.description["training"]
        return str(training.get("weights", training.get("exported", "")))


def main(argv: list[str]) -> int:
    """Judge each classifier and write its report, then the table. Returns the exit status."""
    arguments = options().parse_args(argv)
    words, size, out = read(arguments)
    device = chosen_device(arguments.device)
    loaded = [load(ckpt, weights, size, arguments.crop) for ckpt, weights in words]
    trainings = [subject.description["training"] for subject, _ in loaded]
    splits = cache(partial(judged_images, trainings=trainings))
    judged: list[Judged] = []
    for (ckpt, weights), (subject, network) in zip(words, loaded, strict=True):
        own = vars(arguments) | {"ckpt": ckpt, "weights": weights, "out": None if out else arguments.out}
        job = begin("validate", argparse.Namespace(**own), device=device, subject=subject, splits=splits)
        if any(job.out == each.job.out for each in judged):
            raise Refusal(f"--ckpt {ckpt}: two reports would lie in {job.out}; judge these one after the other")
        if judged and job.location != judged[0].job.location:
            raise Refusal(
                f"{judged[0].job.subject.name} was trained on {judged[0].job.spec}, {subject.name} on {job.spec}: say "
                "on which images both are judged with --data"
            )
        names = subject.description["training"].get("label_names")
        table = numbered(job.classes, names, network.num_classes, subject.name, job.spec)
        judged.append(Judged(job, network.to(device), table))
    first = judged[0].job
    real, about = real_labels(arguments.real, first.test, len(first.classes)) if arguments.real else (None, {})
    group.join(cpu=device.type == "cpu")
    rows = []
    for each in judged:
        found = judge(each, real, about)
        if first_process():
            rows.append(report(each, found, single=out is None))
    if first_process() and out is not None:
        table_of(judged, rows, out)
    return 0


def options() -> Parser:
    """Parser of the options of this script."""
    options = parser(__doc__ or "", precision=None, crop=True, several=True)
    add = options.add_argument
    add("--model", metavar="NAME", help="architecture of --weights, with the classifier in it: the same as --ckpt "
        "timm:NAME")  # fmt: skip
    add("--size", type=int, nargs="+", metavar="N", help="pixels: a side, or height and width (default: as trained)")
    add("--real", type=expanded, metavar="FILE", help="ImageNet-ReaL's labels, real.json: a list of classes for each "
        "image, in the order of the file names")  # fmt: skip
    return options


def read(arguments: argparse.Namespace) -> tuple[list[tuple[str, str | None]], list[int] | None, Path | None]:
    """Read what is to be judged: ((checkpoint, its file of weights) each, size, where a table of several goes; None
    for one). Raises Refusal."""
    words: list[tuple[str, str | None]] = [(ckpt, None) for ckpt in dict.fromkeys(arguments.ckpt)]
    if arguments.model is not None:
        words.append((f"{TIMM}{arguments.model.removeprefix(TIMM)}", arguments.weights))
    elif arguments.weights is not None:
        published = [ckpt for ckpt, _ in words if ckpt.startswith(TIMM)]
        if len(published) != 1:
            raise Refusal(
                f"--weights {arguments.weights}: of which architecture? Give --model NAME, such as lvvit_s, or one "
                "--ckpt timm:NAME"
            )
        words = [(ckpt, arguments.weights if ckpt in published else None) for ckpt, _ in words]
    if not words:
        raise Refusal("nothing to judge: give --ckpt RUN, --ckpt timm:NAME, or --model NAME --weights FILE")
    for ckpt, _ in words:
        if ckpt.endswith(OF_PICKLES) and Path(ckpt).is_file():
            raise Refusal(f"--ckpt {ckpt}: of which architecture? Give --model NAME --weights {ckpt}")
    if arguments.like is not None:
        raise Refusal(f"--like {arguments.like} goes with --ckpt random, which has no classifier: leave it out")
    size = arguments.size
    if size is not None and (len(size) > 2 or min(size) < 1):
        raise Refusal(f"--size {' '.join(map(str, size))}: expected a number of pixels, or two")
    if len(words) == 1:
        return words, size and [size[0], size[-1]], None
    out = Path(arguments.out or "validate")
    out = out if out.suffix == ".csv" else out / "validate.csv"
    refuse_unwritable(out.parent, f"the table {out}", "choose another with --out")
    return words, size and [size[0], size[-1]], out


@dataclass
class Found:
    """What a classifier said of the n test images that could be read."""

    index: np.ndarray  # (n,) which images
    labels: np.ndarray  # (n,)
    said: np.ndarray  # (n, k) likeliest classes of the data, -1 for none of them
    entry: dict[str, Any]  # of the report
    in_top: np.ndarray | None  # (C,) images of each class whose class is among the likeliest; None for few classes


def judge(each: Judged, real: Sequence[frozenset[int]] | None, about: dict[str, Any]) -> Found:
    """Ask the classifier, with all processes, and count. `real`: further right classes of every image; `about`: what
    the report says of them."""
    job, many = each.job, len(each.number_of) > TOP
    job.say(f"judging {job.subject.name}")
    index, said_by = answers({KIND: each.network}, job, TOP if many else 1)
    said = each.number_of[said_by[KIND]]
    assert job.test.labels is not None
    labels = job.test.labels[index]
    entry = accuracies([float((said[:, 0] == labels).mean())], len(index))
    among = (said == labels[:, None]).any(1)
    if many:
        entry["top5"] = share_of(among)
    if real is not None:
        pairs = [(row, real[i]) for row, i in zip(said.tolist(), index.tolist(), strict=True) if real[i]]
        entry["real"] = about | share_of(np.array([row[0] in right for row, right in pairs]))
        if many:
            entry["real"]["top5"] = share_of(np.array([not right.isdisjoint(row) for row, right in pairs]))
    in_top = np.bincount(labels[among], minlength=len(job.classes)) if many else None
    return Found(index, labels, said, entry, in_top)


def share_of(right: np.ndarray) -> dict[str, Any]:
    """Entry of a report: the share of images (n,) that are right, and its interval."""
    share = float(right.mean()) if len(right) else 0.0
    return {"accuracy": share, "interval": list(wilson(share, max(len(right), 1))), "images": len(right)}


def report(each: Judged, found: Found, single: bool) -> dict[str, Any]:
    """Write the report of a classifier, its classes and their picture; print them if it is the `single` one. Returns
    its row of a table of several."""
    job, entry = each.job, found.entry
    confusion = counts(found.labels, found.said[:, 0], len(job.classes))
    rows = by_class(confusion, found.in_top, job.classes)
    folder = job.out.with_suffix("")
    write_csv(folder / "classes.csv", rows)
    title = f"{job.subject.name} on {job.spec}: {percent(entry)} % of {len(found.index):,} images"
    draw(folder / "confusion.png", confusion, job.classes, title)
    notes = [WEIGHTS[each.weights]] if each.weights in WEIGHTS else []
    if (more := len(each.number_of) - len(job.classes)) > 0:
        notes.append(f"it knows {more} classes that the data lack; saying one of them is wrong")
    protocol = {"id": "validate/top-1", "selection": "none: nothing is trained or chosen", "notes": notes}
    outcomes = Outcomes(found.index)
    outcomes.add("subject", KIND, found.said[:, 0] == found.labels)
    write(job, protocol, {"subject": {KIND: entry | {"classes": rows}}}, len(found.index), outcomes)
    size = "x".join(map(str, job.size))
    row = {"checkpoint": job.subject.name, "model": job.subject.description["name"], "size": size, "crop": job.crop}
    row |= {"weights": each.weights, "images": len(found.index)}
    for name, part in (("", entry), ("real_", entry.get("real"))):
        for top, numbers in (("top1", part), ("top5", part and part.get("top5"))):
            row |= {f"{name}{top}": numbers["accuracy"], f"{name}{top}_95": numbers["interval"]} if numbers else {}
    if single:
        files = f"{folder / 'classes.csv'}, {folder / 'confusion.png'}"
        text = "\n".join([table(*columns([row])), "", shown(rows), *notes, f"class by class: {files}"])
        tell(job, "top-1 and top-5 (%)" if found.in_top is not None else "top-1 (%)", text)
    return row


def columns(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table of classifiers."""
    titles = {"top1": "top-1", "top5": "top-5", "real_top1": "ReaL", "real_top5": "ReaL top-5"}
    present = [name for name in titles if any(name in row for row in rows)]
    header = ["classifier", "", *(word for name in present for word in (titles[name], "95 %"))]
    lines = []
    for row in rows:
        numbers = []
        for name in present:
            known = {"accuracy": row.get(name), "interval": row.get(f"{name}_95")}
            numbers += [percent(known), interval(known)] if name in row else ["", ""]
        weights = f", {row['weights']}" if row["weights"] else ""
        lines.append([row["checkpoint"], f"{row['model']}, {row['size']} px{weights}", *numbers])
    return header, lines


def table_of(judged: Sequence[Judged], rows: list[dict[str, Any]], out: Path) -> None:
    """Print the table of several classifiers, and write it as CSV."""
    job = judged[0].job
    names = [row["checkpoint"] for row in rows]
    for each, row in zip(judged, rows, strict=True):
        row["checkpoint"] = each.job.arguments.ckpt if names.count(row["checkpoint"]) > 1 else row["checkpoint"]
    write_csv(out, rows)
    job.say(f"\ntop-1 and top-5 (%) on {job.spec}")
    job.say(f"{len(job.test):,} test images, {len(job.classes)} classes; {job.note}")
    places = "\n".join(f"report: {each.job.out}" for each in judged)
    warnings = [f"warning: {line}" for each in judged for line in each.job.warnings]
    job.say("\n".join([f"\n{table(*columns(rows))}", *dict.fromkeys(warnings), f"\n{places}\ntable: {out}"]))


if __name__ == "__main__":
    entry(main)()
