"""What each row scored in each column, with its interval, and who is ahead.

Nothing is averaged or subtracted that was not measured on the same test images, after the same training images, by the
same protocol with the same settings.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from common.features.extraction import RAW
from evaluate.comparison.reports import MOST, Report, listed, unlike, value_of
from evaluate.comparison.rows import Row, title_of
from evaluate.job import bootstrap


@dataclass
class Estimate:
    """A share with its interval, or why there is none."""

    why: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass
class Cell(Estimate):
    """What a row scored in a column, or why there is nothing."""

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
class Gap(Estimate):
    """A row minus the reference, paired by test image, or why it cannot be told."""

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def headline(one: Report, row: str, pooling: str, wanted: str | None = None) -> str:
    """Which features stand for a row: `wanted`, and nothing else, where features can be chosen; without it those chosen
    on held-out images, else what the training pooled. Empty if they are not there.

    It is settled before any number is looked at.
    """
    kinds = one.content["values"][row]
    if wanted is not None and row not in RAW and one.content["evaluation"] != "segmentation":
        return wanted if wanted in kinds else ""
    return next((kind for kind in ("chosen", pooling) if kind in kinds), next(iter(kinds)))


def mixed(reports: Sequence[Report]) -> str:
    """Why the numbers of these reports must not be averaged; nothing if they may."""
    if len({each.test for each in reports}) > 1:
        return "its runs were judged on different test images"
    if len({each.train for each in reports}) > 1:
        return "its runs were evaluated with different training images"
    if len({method(each) for each in reports}) > 1:
        return "its runs were judged by different protocols"
    names = unlike(*(each.settings for each in reports))
    return f"its runs were judged with different settings ({listed(names)})" if names else ""


def cell_of(row: Row, column: str, wanted: str | None = None) -> Cell:
    """What `row` scored in `column`, without an interval yet. A baseline is that of the first report that has it."""
    reports = [(run, run.reports[column]) for run in row.runs if column in run.reports]
    usable = [(run, each) for run, each in reports if not each.stale and each.content["values"].get(row.kind)]
    if not usable:
        damaged = ["its report is damaged" for run in row.runs if column in run.damaged]
        return Cell(next((each.stale for _, each in reports if each.stale), (*damaged, "not evaluated")[0]))
    usable = usable if row.kind == "subject" else usable[:1]
    cell = Cell(reports=[each for _, each in usable])
    cell.why = mixed(cell.reports)
    kinds = [headline(each, row.kind, run.description.get("pooling", "mean"), wanted) for run, each in usable]
    if not all(kinds):
        known = cell.reports[kinds.index("")].content["values"][row.kind]
        cell.why = cell.why or f"no features {wanted} in its report, which has {', '.join(known)}"
    elif len(set(kinds)) > 1:
        cell.why = cell.why or f"its runs have different features ({', '.join(dict.fromkeys(kinds))})"
    if cell.why:
        return cell
    cell.features = kinds[0]
    entries = [each.content["values"][row.kind][cell.features] for each in cell.reports]
    cell.by_run = [float(entry["accuracy"]) for entry in entries]
    cell.value = statistics.fmean(cell.by_run)
    name = f"{row.kind}/{cell.features}"
    if all(name in each.outcomes for each in cell.reports):
        cell.outcomes = [each.outcomes[name] for each in cell.reports]
    if len(entries) == 1 and entries[0].get("interval"):
        cell.low, cell.high = entries[0]["interval"]
        cell.method = "as reported"
    return cell


def method(one: Report) -> str:
    """The id of a protocol, and what of it the headline is: `knn/dino, k=20`."""
    headline = one.content["protocol"].get("headline")
    choice = f"k={headline}" if one.content["evaluation"] == "knn" else headline
    return one.protocol if headline is None else f"{one.protocol}, {choice}"


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
        draws = bootstrap.distribution([outcomes for number in numbers for outcomes in cells[number].outcomes])
        at = 0
        for number in numbers:
            runs = len(cells[number].outcomes)
            drawn[number] = draws[at : at + runs].mean(0)
            at += runs
            low, high = bootstrap.quantiles(drawn[number])
            if high > low or cells[number].low is None:  # all right or all wrong: Wilson's says more
                cells[number].low, cells[number].high, cells[number].method = low, high, "bootstrap"
    return [Gap("") if reference is None else gap(cells, number, reference, drawn) for number in range(len(cells))]


def test_key(one: Report, ndim: int) -> tuple[str, str, bytes, int]:
    """What two sets of outcomes must have in common to be paired."""
    return one.test, one.metric, one.outcomes["index"].tobytes(), ndim


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
    if a.train != b.train:
        return Gap("other training images than the reference: not paired")
    if method(a) != method(b):
        return Gap(f"by {method(a)}, the reference by {method(b)}: not paired")
    if names := unlike(a.settings, b.settings):
        return Gap(f"other settings than the reference ({listed(names)}): not paired")
    if number not in drawn or reference not in drawn:
        return Gap("no outcomes of single images: evaluate again")
    if test_key(a, this.outcomes[0].ndim) != test_key(b, other.outcomes[0].ndim):
        return Gap("not all images of the reference were read: not paired")
    return Gap("", this.value - other.value, *bootstrap.quantiles(drawn[number] - drawn[reference]))


def remarks(name: str, cells: Sequence[Cell], labels: Sequence[str]) -> list[str]:
    """What a reader of a column has to know: different test images, training images, protocols, settings."""
    labelled = [(label, each.reports[0]) for label, each in zip(labels, cells, strict=True) if each.value is not None]
    aspects: tuple[tuple[str, Callable[[Report], str], Callable[[Report], str]], ...] = (
        ("test images", lambda one: one.test, lambda one: f"{one.spec} ({one.test})"),
        ("training images", lambda one: one.train, lambda one: f"{one.spec} ({one.train})"),
        ("protocols", method, method),
    )
    lines = []
    for what, key, name_of in aspects:
        groups = grouped(labelled, key)
        if len(groups) > 1:
            said = "; ".join(
                f"{name_of(members[0][1])}: {', '.join(label for label, _ in members)}" for members in groups.values()
            )
            lines.append(f"{title_of(name)}: different {what}, so not comparable: {said}")
    for alike in grouped(labelled, method).values():
        for setting in (names := unlike(*(one.settings for _, one in alike)))[:MOST]:
            groups = grouped(alike, lambda one, setting=setting: repr(one.settings.get(setting)))  # type: ignore[misc]
            said = "; ".join(
                f"{value_of(members[0][1].settings, setting)}: {', '.join(label for label, _ in members)}"
                for members in groups.values()
            )
            lines.append(f"{title_of(name)}: different {setting}, so not comparable: {said}")
        if len(names) > MOST:
            lines.append(f"{title_of(name)}: {len(names) - MOST} more settings differ: {', '.join(names[MOST:])}")
    lines += [f"{title_of(name)}: {one.note}" for each in cells for one in each.reports if one.note]
    return list(dict.fromkeys(lines))


def grouped(
    labelled: Sequence[tuple[str, Report]], key: Callable[[Report], str]
) -> dict[str, list[tuple[str, Report]]]:
    """(label, report) by what `key` says of the report."""
    groups: dict[str, list[tuple[str, Report]]] = {}
    for label, one in labelled:
        groups.setdefault(key(one), []).append((label, one))
    return groups
