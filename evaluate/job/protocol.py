"""What every evaluation shares: its arguments, its labelled data, and the features of its subject and its baselines."""

import argparse
import contextlib
import dataclasses
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import data
from common.batches.sampling import held_out
from common.batches.unreadable import LISTED, USUAL, Limit, Look, look_at
from common.checkpoints.run_folder import refuse_links
from common.data import Images, Location, labelled_splits
from common.data.location import OPTIONS, changed
from common.errors import Refusal, nearest
from common.features.extraction import RAW
from common.features.finite import refuse_not_finite
from common.models import Backbone
from common.models.plan import TokenPlan
from common.paths import expanded
from common.printable import printable_lines
from common.processes import group
from common.processes.launch import set_threads
from common.training.precision import DTYPES, refuse_impossible
from evaluate.job import subjects
from evaluate.job.subjects import Subject

LABELS = {"subject": "trained", "random": "random init", "pixels": "raw pixels", "patches": "patches"}  # a table's rows
BASELINES = ("random", "pixels")  # that stand beside what is judged unless asked otherwise; patches take their time


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are Refusals: one line, exit status 2."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, where `threads=1` says --threads 1."""
        return super().parse_args(self.as_flags(sys.argv[1:] if args is None else args), namespace)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, where `threads=1` says --threads 1."""
        return super().parse_intermixed_args(self.as_flags(sys.argv[1:] if args is None else args), namespace)

    def as_flags(self, words: Sequence[str]) -> list[str]:
        """`words`, with `key=value` of a known flag in that flag's form, as pretraining has it the other way round."""
        found: list[str] = []
        for word in words:
            key, equals, value = word.partition("=")
            action = self._option_string_actions.get(f"--{key.replace('_', '-')}")
            before = self._option_string_actions.get(found[-1]) if found else None
            behind = before is not None and before.nargs is None  # the value of the flag before it
            if not equals or action is None or behind or not re.fullmatch(r"[a-z][a-z_-]*", key):
                found.append(word)
            elif action.nargs == 0:
                if value.lower() not in ("true", "false"):
                    raise Refusal(f"{word}: expected {key}=true, or {action.option_strings[0]}")
                found += action.option_strings[:1] if value.lower() == "true" else []
            elif action.nargs in ("+", "*"):
                found += [action.option_strings[0], *value.strip("[]").replace(",", " ").split()]
            else:
                found.append(f"{action.option_strings[0]}={value}")
        return found

    def error(self, message: str) -> Any:
        known = [word for action in self._actions for word in action.option_strings]
        words = [word.split("=")[0] for word in message.split() if word.startswith("--") or "=" in word]
        words = [f"--{word.lstrip('-').rstrip(':')}" for word in words]
        near = "".join(nearest(word, known) for word in words[:1] if word not in known)
        raise Refusal(f"{message}{near}; --help lists the options")


def parser(script: str, precision: str | None = "fp32", crop: bool = False, raw: bool = False) -> Parser:
    """The options that every evaluation takes, with `crop` also --crop, and with `raw` --ckpt pixels, --ckpt patches
    and --baselines; `script` is the
    docstring of the entry script."""
    parser = Parser(description=script, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    word = "RUN|FILE|random|pixels|patches|timm:NAME" if raw else "RUN|FILE|random|timm:NAME"
    add("--ckpt", required=True, type=expanded, metavar=word, help="what is judged")
    add("--weights", type=expanded, metavar="FILE", help="local weights of timm:NAME; of a file with several models "
        "FILE::PART, such as FILE::student (default: the teacher, else an average, else the model)")  # fmt: skip
    size = ", size of `pixels` and `patches`" if raw else ""
    add("--like", type=expanded, metavar="RUN|RECIPE",
        help=f"architecture of `random`{size} (default: the quickstart recipe's)")  # fmt: skip
    add_data(parser, "images, labelled but for layers (default: what the run was trained on)")
    add("--seeds", "--seed", type=int, nargs="+", default=[0], metavar="N", help="of baselines and heads (default: 0)")
    add("--out", type=expanded, metavar="PATH", help="folder or .json file (default: RUN/evaluate)")
    add("--device", help="cpu, cuda, cuda:1 (default: a GPU if there is one)")
    usual = precision or "as trained"
    add("--precision", choices=list(DTYPES), default=precision, help=f"of the backbone (default: {usual})")
    if raw:
        rows, usual = list(LABELS)[1:], " ".join(BASELINES)
        add("--baselines", nargs="*", choices=rows, default=list(BASELINES), metavar="NAME", help="rows beside it, of "
            f"{', '.join(rows)} (default: {usual}; patches take about a minute for 10,000 images)")  # fmt: skip
    if crop:
        add("--crop", type=float, metavar="SHARE", help="of the short side that is shown: 0.875, 224 of 256 pixels, is "
            "DINO's, DINOv2's and MAE's (default: as the checkpoint says; timm says 0.9 of many)")  # fmt: skip
    add("--max-bad", metavar="N|SHARE", help="unreadable images, of both splits together, that are borne: a share "
        "below 1 (0.01 or 1%%), a number from 1, 0 for none, or auto: a hundredth or, of less than 600, 5 but no more "
        "than a tenth (default: as the run, else auto)")  # fmt: skip
    add("--workers", type=int, default=0, metavar="N", help="processes that decode images (default: 0)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: the usable cores)")
    return parser


def add_data(parser: argparse.ArgumentParser, about: str) -> None:
    """Add --data, `about` which the help says so much, and what else says where images are."""
    add = parser.add_argument
    add("--data", type=expanded, metavar="SPEC", help=about)
    add("--data-root", type=expanded, metavar="DIR", help="where a named data set is looked for, and fetched to")
    add("--data-train", type=expanded, metavar="NAME", help="sub-folder or split to train on (default: by its name)")
    add(
        "--data-validation",
        type=expanded,
        metavar="NAME",
        help="sub-folder or split to judge on",
    )
    add("--data-image", metavar="COLUMN", help="of the images in hf: (default: the only one)")
    add("--data-label", metavar="COLUMN", help="of their labels in hf: (default: the only one)")
    add("--data-range", metavar="LOW:HIGH", help="values of black and white in pictures of more than 8 bits")


def given_data(arguments: argparse.Namespace) -> dict[str, str | None]:
    """What the arguments of `add_data` say, by the names that a run stores them under."""
    return {name: getattr(arguments, name) for name in OPTIONS.values()}


def first_process() -> bool:
    """Whether this is the one process that evaluates, of those a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def alone(name: str) -> bool:
    """As `first_process`, for an evaluation that uses one process; the first one says so."""
    group = int(os.environ.get("WORLD_SIZE", "1"))
    if group > 1 and first_process():
        print(f"{name} runs in one process; the other {group - 1} have nothing to do", flush=True)
    return first_process()


def together(name: str) -> None:
    """Join the processes that a launcher started: they extract features together, and the first one, which says so,
    answers from all of them. Call it once, after everything that may be refused. Raises Refusal if they cannot meet.
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
    where: Location
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
        """The data, as they are named."""
        return self.where.spec

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, the same in both splits."""
        return self.train.classes or ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images that are judged."""
        return tuple(self.subject.description["size"])

    @property
    def crop(self) -> float:
        """Share of the short side that the evaluation transform shows."""
        return self.subject.description.get("crop", 0.875)

    @property
    def raw(self) -> bool:
        """Whether features without a network, raw pixels or patches, are all that is judged."""
        return self.arguments.ckpt in RAW

    @property
    def baselines(self) -> list[str]:
        """The rows beside the subject, in the order of a table; of what has no weights, the subject itself."""
        if self.raw:
            return [self.arguments.ckpt]
        own = [self.subject.name] if self.subject.state is None else []
        wanted = [*own, *self.arguments.baselines]
        return [row for row in LABELS if row in wanted]

    @property
    def seeds(self) -> list[int]:
        """Seeds, as given."""
        return list(dict.fromkeys(self.arguments.seeds))

    def say(self, line: str) -> None:
        """A line on the terminal, from one process only."""
        if not self.quiet:
            print(printable_lines(line), flush=True)

    def warn(self, line: str) -> None:
        """Say what a reader of the numbers has to know, once; the report repeats it."""
        if line not in self.warnings:
            self.warnings.append(line)
            self.say(f"warning: {line}")

    def refuse_unreadable(self) -> None:
        """Raises Refusal if a look at the images has found more unreadable ones than are borne; says which they are."""
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
        """How many training images can be read, at the least."""
        bad = len(self.look.bad) if self.look.is_whole else self.limit.allowed(self.look.images)
        return max(0, len(self.train) - bad)

    def refuse_not_finite(
        self,
        features: Mapping[str, Tensor],
        images: Images,
        name: str,
        backbone: Backbone,
        plan: TokenPlan | None,
        cached: bool = False,
    ) -> None:
        """Raises Refusal, with the cause, if the `features` that `backbone` gives of `images`, {kind: (K, ...)} and
        "index", are not all finite; `cached`: whether they may have been extracted by an earlier evaluation."""
        refuse_not_finite(
            features, features["index"], images, name,
            backbone=backbone, plan=plan, precision=self.precision, cache=self.out.parent / "cache" if cached else None,
        )  # fmt: skip


def begin(
    name: str,
    arguments: argparse.Namespace,
    *,
    device: torch.device | None = None,
    quiet: bool = False,
    raw: bool = False,
    splits: Callable[[Location], tuple[Images, Images, str]] = labelled_splits,
) -> Evaluation:
    """Check the arguments, open the subject and the data. Writes nothing. Raises Refusal for what cannot be.

    `raw`: whether --ckpt pixels and --ckpt patches can be judged, too. `splits`: location -> (training images, test
    images, note); for what needs no labels, one that asks for none.
    """
    threads, _ = set_threads(arguments.threads)
    if arguments.workers < 0 or min(arguments.seeds) < 0:
        raise Refusal("--workers and --seeds: expected numbers from 0")
    device = device or chosen_device(arguments.device)
    crop = getattr(arguments, "crop", None)
    if crop is not None and not 0 < crop <= 1:
        raise Refusal(f"--crop {crop}: expected a share of the short side, above 0 and up to 1")
    subject = subjects.find(arguments.ckpt, arguments.like, arguments.weights, raw)
    if crop is not None:
        subject = dataclasses.replace(subject, description=subject.description | {"crop": crop})
    training = subject.description.get("training", {})
    out = _out(arguments.out, subject, name)
    precision = arguments.precision or training.get("precision") or "fp32"
    with contextlib.nullcontext() if arguments.precision else contextlib.suppress(Refusal):
        refuse_impossible(precision, device)
        precision = precision if precision in DTYPES else "fp32"
    where = changed(training, given_data(arguments))
    train, test, note = splits(where)
    if train.labels is not None:
        refuse_gaps(train, test, where.spec)
    quiet = quiet or not first_process()
    usual = training.get("max_bad") if arguments.data is None else None
    limit = Limit(arguments.max_bad or usual or "auto", len(train) + len(test), "--max-bad ").check()
    job = Evaluation(
        name, arguments, subject, train, test, where, note, device, precision, out, threads, limit, quiet=quiet
    )
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


def any_splits(where: Location) -> tuple[Images, Images, str]:
    """(train, test, note): labelled where both are labelled, else without labels: for `begin`, of what needs none."""
    train, test, spec = data.open_data(where), data.find(where, "test"), where.spec
    if train.has_labels and (test is None or test.has_labels):
        return labelled_splits(where)
    note = f"as split in {spec}"
    if test is None:
        fit, held = held_out(len(train), 0.2, len(train))
        train, test = train.subset(fit), train.subset(held)
        note = f"no test split in {spec}: judged on a fixed fifth, which a pretraining on the same data has seen"
    for images in (train, test):
        images.labels = images.classes = None
    return train, test, note


def chosen_device(wished: str | None) -> torch.device:
    """The device of --device, or a GPU where there is one and Accelerate was not told to do without; each of several
    processes has a GPU of its own, as far as there are enough. Raises Refusal."""
    without = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    try:
        device = torch.device(wished or ("cuda" if torch.cuda.is_available() and not without else "cpu"))
        if device == torch.device("cuda") and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % max(1, torch.cuda.device_count()))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was compiled with CUDA
        reason = str(error).splitlines()[0]
        raise Refusal(f"--device {wished}: {reason}; expected cpu, or cuda on a machine with a GPU") from None
    return device


def _out(wished: str | None, subject: Subject, name: str) -> Path:
    path = Path(wished) if wished is not None else subject.folder
    if wished is None:  # who gives --out knows where it leads
        refuse_links(path.parent, (path.name,))
    path = path if path.suffix == ".json" else path / f"{name}.json"
    parent = path.parent.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise Refusal(
            f"the report {path} cannot be written: {parent} is read-only or no folder; choose another with --out"
        )
    return path


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
