"""Runs and what evaluations found of them, side by side: seeds of one recipe, what each scored, who is ahead.

A `Row` is a recipe (runs that differ in nothing but their seed), or a baseline. A `Cell` is what one row scored in one
column. Nothing is averaged or subtracted that was not measured on the same test images by the same protocol.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import bootstrap, report
from ..errors import Refusal, nearest
from .costs import Cost, cost
from .reports import APART, COLUMNS, Report, Run

TITLES = {"knn": "k-NN", "linear": "linear probe", "fewshot": "low-shot", "finetune": "finetuning"}
BASELINES = ("random", "pixels")
# Neither the samples nor what is learned from them depends on these, nor do runs of one recipe have them in common.
SEED_ONLY = ("seed", "run", "threads", "loader", "log_every", "checkpoint_every", "checkpoint_minutes", "keep",
             "milestone_every", "tensorboard", "allow_leak", "data_root")  # fmt: skip
OF_MONITOR = ("every", "control_every")


@dataclass(eq=False)
class Row:
    """A line of the table: the runs of one recipe, or a baseline and the runs whose reports have it."""

    label: str
    kind: str  # subject, random or pixels
    runs: list[Run]

    @property
    def seeds(self) -> list[Any]:
        """Of pretraining."""
        return [run.training.get("seed") for run in self.runs] if self.kind == "subject" else []


@dataclass
class Cell:
    """What a row scored in a column, or why there is nothing."""

    why: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    by_run: list[float] = field(default_factory=list)
    features: str = ""
    method: str = ""  # of the interval: bootstrap or wilson
    reports: list[Report] = field(default_factory=list)
    outcomes: list[np.ndarray] = field(default_factory=list)  # of each run, (S, K, ...)

    @property
    def std(self) -> float | None:
        """Spread over pretraining seeds."""
        return statistics.stdev(self.by_run) if len(self.by_run) > 1 else None


@dataclass
class Gap:
    """A row minus the reference, paired by test image, or why it cannot be told."""

    why: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


# ------------------------------------------------------------------------------------------------------------- the rows


def rows(runs: Sequence[Run], baselines: Sequence[str] = ()) -> list[Row]:
    """The lines of a table: runs of one recipe together, in the order given, then the baselines asked for.

    There is one untrained baseline for each architecture (with its way to use positions), and one of raw pixels for
    each size.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = recipe_key(run)
        seeds = [other.training.get("seed") for other in groups.get(key, [])]
        groups.setdefault(key if run.training.get("seed") not in seeds else f"{key} {run.weights}", []).append(run)
    found = [Row(label_of(group), "subject", group) for group in groups.values()]
    for kind in (name for name in BASELINES if name in baselines):
        alike: dict[str, list[Run]] = {}
        for run in runs:
            about = run.description
            what = ("name", "kwargs", "size", "position", "irpe") if kind == "random" else ("size",)
            alike.setdefault(json.dumps([about.get(name) for name in what], sort_keys=True), []).append(run)
        for group in alike.values():
            word = {"random": "random init", "pixels": "raw pixels"}[kind]
            of = f" (as {label_of(group[:1])})" if len(alike) > 1 else ""
            found.append(Row(word + of, kind, group))
    return found


def recipe_key(run: Run) -> str:
    """What runs of one recipe have in common, all but the seed."""
    if run.config is None:
        return str(run.weights)
    config = {name: value for name, value in run.config.items() if name not in SEED_ONLY}
    monitor = config.get("monitor")
    if isinstance(monitor, dict):
        config["monitor"] = {name: value for name, value in monitor.items() if name not in OF_MONITOR}
    state = [run.training.get(name) for name in ("step", "data_fingerprint", "exported")]
    return json.dumps([config, state], sort_keys=True, default=str)


def label_of(group: Sequence[Run]) -> str:
    """What runs are called together: what their names begin with, and their seeds."""
    if len(group) == 1:
        return group[0].name
    first, last = min(run.name for run in group), max(run.name for run in group)
    shared = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    stem = first[:shared].rstrip("-_./ 0123456789") or group[0].name
    stem = stem.removesuffix("seed").removesuffix("s").rstrip("-_./ ") or stem
    return f"{stem} (seeds {', '.join(str(run.training.get('seed', '?')) for run in group)})"


def differing(config: Any, other: Any, path: str = "") -> list[str]:
    """`key=value` of every option in which `config` differs from `other`, but for those in `SEED_ONLY`."""
    if isinstance(config, dict) and isinstance(other, dict):
        names = [name for name in dict.fromkeys([*config, *other]) if path or name not in SEED_ONLY]
        return [
            line
            for name in names
            for line in differing(config.get(name), other.get(name), f"{path}.{name}" if path else str(name))
            if path != "monitor" or name not in OF_MONITOR
        ]
    return [] if config == other else [f"{path}={json.dumps(config, default=str)}"]


# ------------------------------------------------------------------------------------------------------------ the cells


def columns(runs: Sequence[Run]) -> list[str]:
    """Names of the columns for which some run has a report that can be used."""
    there = {
        name
        for run in runs
        for name, each in run.reports.items()
        if each.content["evaluation"] not in APART and not each.stale
    }
    return [name for name in COLUMNS if name in there] + sorted(there - set(COLUMNS))


def headline(kinds: Mapping[str, Any], pooling: str, wanted: str | None = None) -> str:
    """Which features stand for a row: those chosen on held-out images, else what the training pooled (or `wanted`).

    It is settled before any number is looked at.
    """
    return next((kind for kind in (wanted, "chosen", pooling) if kind is not None and kind in kinds), next(iter(kinds)))


def cell(row: Row, column: str, wanted: str | None = None) -> Cell:
    """What `row` scored in `column`, without an interval yet. A baseline is that of the first report that has it."""
    reports = [run.reports[column] for run in row.runs if column in run.reports]
    usable = [each for each in reports if not each.stale and each.content["values"].get(row.kind)]
    if not usable:
        return Cell(next((each.stale for each in reports if each.stale), "not evaluated"))
    if row.kind != "subject":
        usable = usable[:1]
    if len({each.test for each in usable}) > 1:
        return Cell("its runs were judged on different test images", reports=usable)
    if len({method(each) for each in usable}) > 1:
        return Cell("its runs were judged by different protocols", reports=usable)
    found = Cell(reports=usable)
    for each in usable:
        pooling = next(run.description.get("pooling", "mean") for run in row.runs if each in run.reports.values())
        kinds = each.content["values"][row.kind]
        kind = headline(kinds, pooling, wanted)
        found.features = found.features or kind
        found.by_run.append(float(kinds[kind]["accuracy"]))
        outcomes = each.outcomes.get(f"{row.kind}/{kind}")
        found.outcomes += [outcomes] if outcomes is not None else []
    found.value = statistics.fmean(found.by_run)
    interval = usable[0].content["values"][row.kind][found.features].get("interval")
    if len(found.outcomes) != len(usable):
        found.outcomes = []
    if len(usable) == 1 and interval:
        found.low, found.high = interval
        found.method = "as reported"
    return found


def title_of(column: str) -> str:
    """How a table calls a column."""
    return TITLES.get(column, column.replace("_", " "))


def method(one: Report) -> str:
    """The id of a protocol, and what of it the headline is: `knn/dino, k=20`."""
    headline = one.content["protocol"].get("headline")
    told = f"k={headline}" if one.content["evaluation"] == "knn" else headline
    return one.protocol if headline is None else f"{one.protocol}, {told}"


def judge(cells: Sequence[Cell], reference: int | None) -> list[Gap]:
    """Give the cells of one column their bootstrap intervals; return each row minus row `reference`, paired.

    Runs of a row count alike, whatever their numbers of seeds. Raises nothing: what cannot be told says why.
    """
    alike: dict[Any, list[int]] = {}
    for number, each in enumerate(cells):
        if each.outcomes and len({test_key(one, 0) for one in each.reports}) == 1:
            alike.setdefault(test_key(each.reports[0], each.outcomes[0].ndim), []).append(number)
    drawn: dict[int, np.ndarray] = {}
    for numbers in alike.values():
        found = bootstrap.distribution([outcomes for number in numbers for outcomes in cells[number].outcomes])
        at = 0
        for number in numbers:
            runs = len(cells[number].outcomes)
            drawn[number] = found[at : at + runs].mean(0)
            at += runs
            low, high = bootstrap.quantiles(drawn[number])
            if high > low or cells[number].low is None:  # all right or all wrong: Wilson's says more
                cells[number].low, cells[number].high, cells[number].method = low, high, "bootstrap"
    return [Gap("") if reference is None else gap(cells, number, reference, drawn) for number in range(len(cells))]


def test_key(found: Report, ndim: int) -> tuple[str, str, bytes, int]:
    """What two sets of outcomes must have in common to be paired."""
    return found.test, found.metric, found.outcomes["index"].tobytes(), ndim


def gap(cells: Sequence[Cell], number: int, reference: int, drawn: Mapping[int, np.ndarray]) -> Gap:
    """One row minus the reference."""
    this, other = cells[number], cells[reference]
    if number == reference:
        return Gap("reference")
    if this.value is None or other.value is None:
        return Gap(this.why if this.value is None else f"the reference: {other.why}")
    a, b = this.reports[0], other.reports[0]
    if a.test != b.test:
        return Gap("other test images than the reference: not paired")
    if method(a) != method(b):
        return Gap(f"by {method(a)}, the reference by {method(b)}: not paired")
    if number not in drawn or reference not in drawn:
        return Gap("no outcomes of single images: evaluate again")
    if test_key(a, this.outcomes[0].ndim) != test_key(b, other.outcomes[0].ndim):
        return Gap("not all images of the reference were read: not paired")
    return Gap("", this.value - other.value, *bootstrap.quantiles(drawn[number] - drawn[reference]))


def remarks(name: str, cells: Sequence[Cell], labels: Sequence[str]) -> list[str]:
    """What a reader of a column has to know: different test images, training images, protocols, settings."""
    found = [(label, each.reports[0]) for label, each in zip(labels, cells, strict=True) if each.value is not None]
    lines = []
    aspects: tuple[tuple[str, Callable[[Report], str]], ...] = (
        ("test images", lambda one: f"{one.spec} ({one.test})"),
        ("training images", lambda one: f"{one.spec} ({one.content['data'].get('train', {}).get('fingerprint')})"),
        ("protocols", method),
    )
    for what, of in aspects:
        groups: dict[str, list[str]] = {}
        for label, one in found:
            groups.setdefault(of(one), []).append(label)
        if len(groups) > 1:
            told = "; ".join(f"{value}: {', '.join(members)}" for value, members in groups.items())
            lines.append(f"{title_of(name)}: different {what}, so not comparable: {told}")
    for _, one in dict(found).items():
        if one.note:
            lines.append(f"{title_of(name)}: {one.note}")
    return list(dict.fromkeys(lines))


# ------------------------------------------------------------------------------------------------------- all together


@dataclass
class Comparison:
    """All that is told of some runs."""

    runs: list[Run]
    rows: list[Row]
    columns: list[str]
    cells: dict[str, list[Cell]]  # by column, in the order of the rows
    gaps: dict[str, list[Gap]]
    costs: list[Cost]  # of one run of each row, on average
    reference: int  # the row that differences are to
    notes: list[str]

    @property
    def title(self) -> str:
        """What is compared."""
        return "Comparison of " + ", ".join(row.label for row in self.rows)


def compared(
    runs: Sequence[Run], baselines: Sequence[str] = (), against: str | None = None, features: str | None = None
) -> Comparison:
    """Everything from runs whose reports were read. `against`: one of the runs or baselines, the first run if None.
    Raises Refusal if it is none of them."""
    lines = rows(runs, baselines)
    reference = 0 if against is None else place_of(against, lines)
    names = columns(runs)
    cells = {name: [cell(row, name, features) for row in lines] for name in names}
    gaps = {name: judge(cells[name], reference) for name in names}
    remarked = [line for name in names for line in remarks(name, cells[name], [row.label for row in lines])]
    for row in lines:
        for name in names:
            there = len(cells[name][lines.index(row)].by_run)
            if row.kind == "subject" and 0 < there < len(row.runs):
                remarked.append(f"{title_of(name)} of {row.label}: {there} of {len(row.runs)} runs only")
    for run in runs:
        remarked += [f"{run.name}: {line}" for line in run.notes]
        remarked += [
            f"{run.name}: {title_of(name)} is left out: {one.stale}" for name, one in run.reports.items() if one.stale
        ]
        steps, step = run.training.get("steps"), run.training.get("step")
        if steps is not None and step is not None and step < steps:
            remarked.append(f"{run.name}: stopped at step {step:,} of {steps:,}")
        if leak := report.leak_note(run.description):
            remarked.append(f"{run.name}: {leak}")
    return Comparison(list(runs), lines, names, cells, gaps, [mean_cost(row) for row in lines], reference, remarked)


def place_of(word: str, lines: Sequence[Row]) -> int:
    """Which line `word` is in: a baseline, a run as it was given, its name, or another path of it. Raises Refusal."""
    for number, row in enumerate(lines):
        if row.kind != "subject":
            if row.kind == word:
                return number
        elif any(word in (run.word, run.name) or Path(word).resolve() in (run.weights, run.weights.parent)
                 for run in row.runs):  # fmt: skip
            return number
    given = [run.word for row in lines for run in row.runs if row.kind == "subject"]
    raise Refusal(f"--against {word}: expected one of {', '.join(given)}, random or pixels{nearest(word, given)}")


def mean_cost(row: Row) -> Cost:
    """Of one run of a row."""
    if row.kind != "subject":
        return Cost()
    found = [cost(run.description, run.config, run.weights.parent) for run in row.runs]
    whole = [[each for each in values if each is not None] for values in zip(*found, strict=True)]
    images, flops, hours = (statistics.fmean(each) if len(each) == len(found) else None for each in whole)
    return Cost(None if images is None else round(images), flops, hours)
