"""Natural images, one small ViT, every objective for the same time: a table of RESULTS.md and its pictures.

    python benchmarks/results.py --natural PATH --minutes 60                  # every row, seeds 0, 1 and 2
    python benchmarks/results.py --natural PATH batch=32 --minutes 5 --seeds 0 --rows MP3 DINO
    python benchmarks/results.py --natural PATH --minutes 60 --only-table     # of what is finished

PATH: labelled images of 32 pixels in train and test, such as CIFAR-10's. First a step of every row is timed, side by
side (runs/natural/costs.json); a run has as many steps as go into the minutes, so that a machine that is busy later
takes nothing from one row alone. What is finished is kept in runs/natural/ and never made again: killed, the same
command goes on. Rows of MAE and SimCLR need the package lightly, and are left out where it is not.
"""

import argparse
import datetime
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.natural import plots, running
from benchmarks.natural.rows import BASELINES, EIGHTHS, EVERY, PEERS, REFERENCE, ROOT, ROWS, Job, queue
from benchmarks.results import held_out_accuracy, section_of, spread, table
from common.errors import Refusal
from evaluate.job import bootstrap, report
from evaluate.job.report import CHOSEN

RESULTS, PICTURES = ROOT / "RESULTS.md", ROOT / "docs" / "pictures"
TITLE = "## Natural images, equal time"
TEXT = """
Written by `benchmarks/results.py --natural`. One small ViT, self-supervised on the training images, every row for as many steps as
go into the same minutes: a step's cost was measured before, all rows in turn in one process after the other, and the median of
its ratio to `absolute` is what counts (start-up, the audit and monitors are not in it). One cosine over each training; no
learning rate was tuned for a row. Top-1 in percent on all test images, mean ± standard deviation over seeds, features frozen.
*Field*: the last block's mean patch, or the class token where the objective trains it; k-NN of k = 20, centred. *Quarters*: the
readout of that name (docs/evaluation.md). *Minus*: the row less `absolute`, paired by seed and test image, with its 95 % interval
over other test images (bootstrap; it covers no other seed). *Audit*: whether the answer is in the question; `–` where no place
is asked. *Position*: right answers on held-out images; heads ask different questions, with different chances. *Took*:
minutes in which the steps were really made. lightly's rows are its own modules, transforms and losses on the same network, optimizer
and images (they also see the 500 that ours hold out). *Untrained* (the network of `absolute`, without
position embedding), *pixels*, *patches*: nothing learned, judged alike; all features are extracted in fp32.
Curves are of checkpoints on the way, whose learning rate has not fallen yet.

"""  # noqa: E501
MEASURES = {
    ("knn", "field"): "k-NN", ("linear", "field"): "linear",
    ("knn", "quarters"): "k-NN, quarters", ("linear", "quarters"): "linear, quarters",
}  # fmt: skip
COLUMNS = (
    "minutes", "row", "words", "steps", "images seen", "commit", "seeds", "audit", "position",
    *(name for measure in MEASURES.values() for name in (measure, f"{measure}: minus")),
    "step", "took", "hardware", "command",
)  # fmt: skip
KEY = 2  # the first columns, by which a row replaces an older one
Right = dict[tuple[str, str], np.ndarray]  # {(evaluation, readout): (n,) whether each test image was right}


@dataclass
class Finished:
    """What came of a run, or of a row that nobody trains."""

    right: Right
    index: np.ndarray
    hardware: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)  # as its checkpoint says
    position: float | None = None  # right answers of the positional label on held-out images
    took: float | None = None  # minutes
    seconds: float | None = None  # of a step, as measured beforehand
    curve: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # (eighths, {readout: k-NN accuracy})
    beside: dict[str, Right] = field(default_factory=dict)  # rows that were judged beside it


def answers(folder: Path, row: str, kind: str | None) -> tuple[Right, np.ndarray, dict[str, Any]]:
    """(whether each test image was right, which images, hardware) of a row of the reports in `folder`; `kind`: of the
    features in the field's readout, None of raw ones. Raises Refusal for a damaged report."""
    right, index, hardware = {}, np.empty(0), {}
    for evaluation, readout in MEASURES:
        name = f"{evaluation}{running.NAMES[readout]}.json"
        content, outcomes = report.read(folder / name)
        features = (kind if readout == "field" else CHOSEN) if kind else row
        right[evaluation, readout] = outcomes[f"{row}/{features}"][0]
        index, hardware = outcomes["index"], content["hardware"]
    return right, index, hardware


def finished(job: Job) -> Finished:
    """Read what came of a run. Raises Refusal for a damaged report."""
    description = running.read(job.folder / "backbone.json")
    done, kind = running.read(job.folder / running.DONE), description["pooling"]
    right, index, hardware = answers(job.folder / "evaluate", "subject", kind)
    of = {name: raw if raw in ("pixels", "patches") else None for name, raw in BASELINES.items()}
    beside = {}
    if job.row == REFERENCE:
        for name, word in BASELINES.items():
            beside[name], _, _ = answers(job.folder / "evaluate", word, None if of[name] else kind)
    curve = [(eighths, way(job.folder, done["steps"] // 8 * eighths, kind)) for eighths in EIGHTHS]
    curve.append((8, {readout: float(right["knn", readout].mean()) for readout in running.READOUTS}))
    position = None if job.row in PEERS else held_out_accuracy(job.folder / "metrics.jsonl")
    return Finished(
        right, index, hardware, description["training"], position, done["took"], done["seconds"], curve, beside
    )


def way(folder: Path, step: int, kind: str) -> dict[str, float]:
    """{readout: k-NN accuracy} of a checkpoint on the way."""
    found = {}
    for readout, name in running.NAMES.items():
        values = running.read(folder / "evaluate" / f"at-{step}" / f"knn{name}.json")["values"]["subject"]
        found[readout] = values[kind if readout == "field" else CHOSEN]["accuracy"]
    return found


def untrained(reference: Finished, name: str) -> Finished:
    """A row that was judged beside a run of the reference."""
    return Finished(reference.beside[name], reference.index, reference.hardware)


def minus(
    these: Sequence[Finished], others: Sequence[Finished], measure: tuple[str, str]
) -> tuple[float, tuple[float, float]]:
    """(accuracy of these runs less that of the others, its interval over test images), paired by seed and image.

    Raises Refusal where they were not judged on the same images.
    """
    if any(not np.array_equal(run.index, others[0].index) for run in [*these, *others]):
        raise Refusal("these runs were not judged on the same test images: move runs/natural away and run again")
    both = [np.stack([run.right[measure] for run in runs]) for runs in (these, others)]  # (S, n) each
    drawn = bootstrap.distribution(both)
    return float(both[0].mean() - both[1].mean()), bootstrap.quantiles(drawn[0] - drawn[1])


def row(name: str, minutes: float, runs: Mapping[str, Mapping[int, Finished]], command: str) -> list[str]:
    """Cells of a row, by the seeds that it and the reference have."""
    seeds = [seed for seed in runs[name] if seed in runs[REFERENCE]]
    these, others = ([runs[each][seed] for seed in seeds] for each in (name, REFERENCE))
    first, cells = these[0], []
    training, machine = first.training, first.hardware
    for measure in MEASURES:
        cells.append(spread([float(run.right[measure].mean()) for run in these]))
        if name == REFERENCE:
            cells.append("–")
            continue
        value, (low, high) = minus(these, others, measure)
        cells.append(f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]")
    positions = [run.position for run in these if run.position is not None]
    words = ROWS.get(name, [f"`benchmarks/natural/peers.py {PEERS[name]}`"] if name in PEERS else [])
    took = [run.took for run in these if run.took is not None]
    asked = training.get("audit") if positions else None
    return [
        f"{minutes:g}",
        name,
        " ".join(word if word.startswith("`") else f"`{word}`" for word in words) or "–",
        f"{training['steps']:,}" if training else "–",
        f"{training['images_seen']:,}" if training else "–",
        ", ".join(dict.fromkeys(str(run.training["commit"]) for run in these)) if training else "–",
        ", ".join(map(str, seeds)),
        str(asked or "–"),
        spread(positions) if positions else "–",
        *cells,
        f"{1000 * first.seconds:.0f} ms" if first.seconds else "–",
        f"{statistics.fmean(took):.1f} min" if took else "–",
        f"{machine['gpu'] or machine['cpu']}" + (f", {training['precision']}" if training else ""),
        f"`{command}` ({datetime.date.today()})",
    ]


def written(text: str, rows: Sequence[Sequence[str]]) -> str:
    """RESULTS.md with these rows in its section, in place of those of the same minutes and name."""
    before, section, after = section_of(text, TITLE)
    old = [old.strip("| ").split(" | ") for old in section.splitlines() if old.startswith("| ")][1:]
    kept = {tuple(cells[:KEY]): cells for cells in [*old, *rows]}
    order = [*BASELINES, *EVERY]
    best = sorted(kept.values(), key=lambda cells: (float(cells[0]), order.index(cells[1])))
    return f"{before.rstrip()}\n\n{TITLE}\n{TEXT}{table(COLUMNS, best)}{after}"


def shown(cells: Sequence[str]) -> str:
    """A row for the eye."""
    named = dict(zip(COLUMNS, cells, strict=True))
    return f"{named['row']:<30} " + "  ".join(f"{name} {named[name]}" for name in ("position", *MEASURES.values()))


def read(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line. Raises Refusal for a number outside its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--natural", metavar="PATH", required=True, help="labelled images, in train and test")
    add("words", nargs="*", help="key=value words for pretrain/run.py, for all rows")
    add("--recipe", default="cifar10_compare", help="what all rows have in common (default: cifar10_compare)")
    add("--minutes", type=float, default=60.0, help="of each training (default: 60)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--rows", nargs="+", choices=EVERY, metavar="NAME", help=f"beside {REFERENCE}: {'; '.join(EVERY)}")
    add("--only-table", action="store_true", help="write rows and pictures of what is finished")
    arguments = parser.parse_intermixed_args(argv)
    if not arguments.minutes > 0:
        raise Refusal(f"--minutes {arguments.minutes:g}: expected a number above 0")
    if wrong := [word for word in arguments.words if "=" not in word]:
        raise Refusal(f"{wrong[0]}: expected key=value words for pretrain/run.py")
    return arguments


def train(arguments: argparse.Namespace, rows: Sequence[str]) -> None:
    """Train and judge what is not finished. Raises Refusal."""
    place = Path(arguments.natural).expanduser()
    data = str(place.resolve()) if place.exists() else arguments.natural
    rows = running.possible(rows, arguments.rows is not None)
    jobs = queue(rows, arguments.seeds, arguments.minutes)
    names = list(dict.fromkeys(job.row for job in jobs))
    seconds = running.costs(names, arguments.recipe, data, arguments.words)
    wanted = [running.asked(job, arguments.recipe, data, arguments.words, seconds[job.row]) for job in jobs]
    for job, what in zip(jobs, wanted, strict=True):
        baselines = list(BASELINES.values()) if job.row == REFERENCE else []
        running.trained_and_judged(job, what, data, baselines)
        run = finished(job)
        told = ", ".join(f"{name} {spread([run.right[each].mean()])}" for each, name in MEASURES.items())
        print(f"{job.row}, seed {job.seed}: {told}; {run.took:.1f} min", flush=True)


def main(argv: list[str]) -> None:
    """Train, judge, write the rows, draw the pictures."""
    arguments = read(argv)
    rows = arguments.rows or EVERY
    if not arguments.only_table:
        train(arguments, rows)
    runs: dict[str, dict[int, Finished]] = {}
    for job in queue(rows, arguments.seeds, arguments.minutes):
        if running.is_done(job):
            runs.setdefault(job.row, {})[job.seed] = finished(job)
    if REFERENCE not in runs:
        raise Refusal(
            f"no finished run of {REFERENCE} in {ROOT / 'runs' / 'natural'} for --minutes {arguments.minutes:g}"
        )
    for name in BASELINES:
        runs[name] = {seed: untrained(run, name) for seed, run in runs[REFERENCE].items()}
    command = ["python benchmarks/results.py --natural PATH", *arguments.words, f"--minutes {arguments.minutes:g}"]
    command += [] if arguments.recipe == "cifar10_compare" else [f"--recipe {arguments.recipe}"]
    command += ["--seeds", *map(str, arguments.seeds)]
    cells = [
        row(name, arguments.minutes, runs, " ".join(command))
        for name in [*BASELINES, *EVERY]
        if runs.get(name, {}).keys() & runs[REFERENCE].keys()
    ]
    RESULTS.write_text(written(RESULTS.read_text(encoding="utf-8"), cells), encoding="utf-8")
    print("\n".join(map(shown, cells)))
    batch = runs[REFERENCE][min(runs[REFERENCE])].training["batch"]
    for picture in plots.draw(runs, arguments.minutes, batch, PICTURES):
        print(f"picture: {picture}")
