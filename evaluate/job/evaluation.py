"""An evaluation from its arguments to its report: its subject, its labelled images, and which process does it."""

import argparse
import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import data
from common.batches.sampler import held_out
from common.batches.unreadable import LISTED, USUAL, Limit, Look, look_at
from common.checkpoints.run_folder import refuse_links
from common.data import Images, Location, labelled_splits
from common.data.location import changed_location
from common.errors import Refusal
from common.features.extraction import RAW, Eye, extract
from common.features.finite import OTHER_WEIGHTS, not_finite, spoiled
from common.models import Backbone
from common.models.plan import TokenPlan
from common.printable import printable_lines
from common.processes import group
from common.processes.launch import set_threads
from common.training.precision import DTYPES, refuse_impossible
from evaluate.job import subjects
from evaluate.job.arguments import LABELS, chosen_device, data_options
from evaluate.job.subjects import Subject

NAMED = 3  # images that a refusal names


def first_process() -> bool:
    """Whether this process is the first of those that a launcher started: the one that answers."""
    return os.environ.get("RANK", "0") == "0"


def only_first(name: str) -> bool:
    """Whether this is the first process, of an evaluation that uses one; says so where there are others."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and first_process():
        print(f"{name} runs in one process; the other {launched - 1} have nothing to do", flush=True)
    return first_process()


def join_processes(name: str) -> None:
    """Join the processes that a launcher started: all extract features, and the first one answers from them.

    Call it once, after everything that may be refused. Raises Refusal if they cannot reach each other.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        group.join(cpu=True)  # they exchange a few words; features go through the cache
        if first_process():
            print(f"{name}: {launched} processes extract features, the first one answers from them", flush=True)


@dataclass
class Evaluation:
    """One evaluation from its arguments to its report."""

    name: str
    arguments: argparse.Namespace
    subject: Subject
    train: Images
    test: Images
    location: Location
    note: str
    device: torch.device
    precision: str
    out: Path
    threads: int
    limit: Limit = USUAL  # of unreadable images, over both splits
    look: Look = field(default_factory=Look)  # at the images, before anything else
    quiet: bool = False
    warnings: list[str] = field(default_factory=list)  # what the report repeats
    began: float = field(default_factory=time.perf_counter)

    @property
    def spec(self) -> str:
        """Name of the data set, as --data takes it."""
        return self.location.spec

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, the same in both splits."""
        return self.train.classes or ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        return tuple(self.subject.description["size"])

    @property
    def crop(self) -> float:
        """Share of the short side that the evaluation transform shows."""
        return self.subject.description.get("crop", 0.875)

    @property
    def eye(self) -> Eye:
        """How its images are looked at."""
        channels = len(self.subject.description["mean"])
        return Eye(self.size, self.crop, channels, self.arguments.workers, self.limit)

    @property
    def raw(self) -> bool:
        """Whether features without a network, raw pixels or patches, are all that is judged."""
        return self.arguments.ckpt in RAW

    @property
    def baselines(self) -> list[str]:
        """Rows of the table beside the subject, in order; a subject without weights is itself one of them."""
        if self.raw:
            return [self.arguments.ckpt]
        untrained = [self.subject.name] if self.subject.state is None else []
        return [row for row in LABELS if row in (*untrained, *self.arguments.baselines)]

    @property
    def seeds(self) -> list[int]:
        """Seeds without repetitions, in the order given."""
        return list(dict.fromkeys(self.arguments.seeds))

    def say(self, line: str) -> None:
        """Print a line, from one process only."""
        if not self.quiet:
            print(printable_lines(line), flush=True)

    def warn(self, line: str) -> None:
        """Print a warning to readers of the numbers, once; the report repeats it."""
        if line not in self.warnings:
            self.warnings.append(line)
            self.say(f"warning: {line}")

    def refuse_unreadable(self) -> None:
        """Name the unreadable images. Raises Refusal if there are more of them than --max-bad allows."""
        look = self.look
        try:
            self.limit.refuse(len(look.bad), look.looked, look.images, self.spec, look.bad)
        except Refusal:
            self.say("\n".join(look.lines("too many", most=LISTED)))
            raise
        for line in look.lines("they are left out, and listed beside the report"):
            self.say(line)

    @property
    def training_images(self) -> int:
        """Number of training images that can be read, at the least."""
        bad = len(self.look.bad) if self.look.is_whole else self.limit.allowed(self.look.images)
        return max(0, len(self.train) - bad)

    def refuse_not_finite(
        self,
        features: Mapping[str, Tensor],
        images: Images,
        name: str,
        network: tuple[Backbone, TokenPlan],
        cached: bool,
    ) -> None:
        """Raises Refusal unless all `features` of `images`, {kind: (K, ...)} and "index", are finite.

        It says of which model (`name`), of how many images, and why, for which the first of these images is run through
        the `network` once more; `cached`: whether an earlier evaluation may have extracted them.
        """
        bad, index = not_finite(features), features["index"]
        if not bad.any():
            return
        rows = index[bad.to(index.device)].tolist()
        named = ", ".join(images.name(i) for i in rows[:NAMED]) + (", ..." if len(rows) > NAMED else "")
        why = _cause(*network, images.subset(rows[:1]), self.precision, self.out.parent / "cache" if cached else None)
        raise Refusal(
            f"{name}: the features of {len(rows):,} of {len(index):,} images in {images.where} are not finite, or too "
            f"large to be compared ({named}): {why}"
        )


def _cause(backbone: Backbone, plan: TokenPlan | None, image: Images, precision: str, cache: Path | None) -> str:
    """Reason why the features of `image` are not finite, and what to do."""
    if words := spoiled(backbone.model.state_dict()):
        return f"the weights are not finite in {words}; {OTHER_WEIGHTS}"
    how: dict[str, Any] = {"device": backbone.mean.device, "warn": lambda line: None}
    if cache is not None and not not_finite(extract(backbone, plan, image, precision=precision, **how)).any():
        return f"computed again they are, so what was kept of them is damaged: delete {cache} and evaluate again"
    if precision != "fp32" and not not_finite(extract(backbone, plan, image, **how)).any():
        return f"numbers overflow in {precision}, in fp32 they are finite: use --precision fp32"
    return f"every weight is finite, but numbers overflow on the way through the network; {OTHER_WEIGHTS}"


def begin(
    name: str,
    arguments: argparse.Namespace,
    *,
    device: torch.device | None = None,
    quiet: bool = False,
    raw: bool = False,
    subject: Subject | None = None,
    splits: Callable[[Location], tuple[Images, Images, str]] = labelled_splits,
) -> Evaluation:
    """Check the arguments, open the subject and the data. Writes nothing. Raises Refusal for what cannot be evaluated.

    raw: whether --ckpt may also be pixels or patches. subject: that of --ckpt, where it is open already.
    splits: location -> (training images, test images, note), such as `any_splits` where no labels are needed.
    """
    threads, _ = set_threads(arguments.threads)
    if arguments.workers < 0 or min(arguments.seeds) < 0:
        raise Refusal("--workers and --seeds: expected numbers from 0")
    device = device or chosen_device(arguments.device)
    crop = getattr(arguments, "crop", None)
    if crop is not None and not 0 < crop <= 1:
        raise Refusal(f"--crop {crop}: expected a share of the short side, above 0 and up to 1")
    subject = subject or subjects.subject_of(arguments.ckpt, arguments.like, arguments.weights, raw)
    if crop is not None:
        subject = dataclasses.replace(subject, description=subject.description | {"crop": crop})
    training = subject.description.get("training", {})
    out = _out(arguments.out, subject, name)
    precision = _precision(arguments.precision, training.get("precision"), device)
    location = changed_location(training, data_options(arguments))
    train, test, note = splits(location)
    subject = dataclasses.replace(subject, images=train, workers=arguments.workers)
    if train.labels is not None:
        refuse_gaps(train, test, location.spec)
    usual = training.get("max_bad") if arguments.data is None else None
    limit = Limit(arguments.max_bad or usual or "auto", len(train) + len(test), "--max-bad ").check()
    job = Evaluation(name, arguments, subject, train, test, location, note, device, precision, out, threads, limit)
    job.quiet = quiet or not first_process()
    for folder, left_out in dict.fromkeys((images.where, images.left_out) for images in (train, test)):
        if left_out:
            job.say(f"not read in {folder}: {left_out}")
    if first_process():
        job.look = look_at([train, test], len(subject.description["mean"]), job.say)
    if not getattr(arguments, "resume", False):  # else by the limit that was stored, see `recipes.resumed`
        job.refuse_unreadable()
    if subject.notes:
        job.say(f"weights of {subject.name}: {'; '.join(subject.notes)}")
    return job


def any_splits(location: Location) -> tuple[Images, Images, str]:
    """Open (train, test, note) for evaluations that need no labels: labelled if both splits are, else without."""
    train, test, spec = data.open_data(location), data.open_split(location, "test"), location.spec
    if train.has_labels and (test is None or test.has_labels):
        return labelled_splits(location)
    note = f"as split in {spec}"
    if test is None:
        fit, held = held_out(len(train), 0.2, len(train))
        train, test = train.subset(fit), train.subset(held)
        note = f"no test split in {spec}: judged on a fixed fifth, which a pretraining on the same data has seen"
    for images in (train, test):
        images.labels = images.classes = None
    return train, test, note


def _precision(requested: str | None, of_training: str | None, device: torch.device) -> str:
    """Precision of the backbone: the requested one, else that of the training if the device has it, else fp32."""
    precision = requested or of_training or "fp32"
    with contextlib.nullcontext() if requested else contextlib.suppress(Refusal):
        refuse_impossible(precision, device)
        precision = precision if precision in DTYPES else "fp32"
    return precision


def _out(requested: str | None, subject: Subject, name: str) -> Path:
    path = Path(requested) if requested is not None else subject.folder
    if requested is None:  # --out may lead through links: its user chose it
        refuse_links(path.parent, (path.name,))
    path = path if path.suffix == ".json" else path / f"{name}.json"
    refuse_unwritable(path.parent, f"the report {path}", "choose another with --out")
    return path


def refuse_unwritable(folder: Path, what: str, advice: str) -> None:
    """Raises Refusal if `what` cannot be written because its `folder` can be neither written to nor made."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise Refusal(f"{what} cannot be written: {folder} is read-only or no folder; {advice}")


def refuse_gaps(train: Images, test: Images, spec: str) -> None:
    """Raises Refusal unless there are two classes or more, training images of each, and something to judge on."""
    classes = train.classes or ()
    assert train.labels is not None and test.labels is not None
    highest = max(int(train.labels.max(initial=0)), int(test.labels.max(initial=0)))
    if len(classes) < 2 or highest >= len(classes):
        raise Refusal(
            f"data={spec} has {len(classes)} classes and labels up to {highest}: expected two or more, each named"
        )
    counts = np.bincount(train.labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    if empty:
        raise Refusal(
            f"data={spec}: {len(empty)} of {len(classes)} classes have no training image ({', '.join(empty[:5])}), "
            f"among {len(train)} labelled ones; add some, or leave those classes out of both splits"
        )
    if not len(test):
        raise Refusal(f"data={spec} has no labelled test image; expected some in its test split")
