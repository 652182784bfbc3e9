"""All that is told of some runs: their rows, what these scored, who is ahead, what it cost, and what to know of it."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.errors import Refusal, nearest
from evaluate.comparison.cells import Cell, Gap, cell, judge, remarks
from evaluate.comparison.costs import Cost, cost
from evaluate.comparison.reports import APART, COLUMNS, Run
from evaluate.comparison.rows import BASELINES, Row, rows, title_of
from evaluate.job import report


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


def columns(runs: Sequence[Run]) -> list[str]:
    """Names of the columns for which some run has a report that can be used."""
    there = {
        name
        for run in runs
        for name, each in run.reports.items()
        if each.content["evaluation"] not in APART and not each.stale
    }
    return [name for name in COLUMNS if name in there] + sorted(there - set(COLUMNS))


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
        remarked += about(run)
    return Comparison(list(runs), lines, names, cells, gaps, [mean_cost(row) for row in lines], reference, remarked)


def about(run: Run) -> list[str]:
    """What a reader has to know of a run: reports that are left out, an unfinished or leaking training, its start."""
    lines = [f"{run.name}: {line}" for line in run.notes]
    left_out = run.damaged | {name: one.stale for name, one in run.reports.items() if one.stale}
    lines += [f"{run.name}: {title_of(name)} is left out: {why}" for name, why in left_out.items()]
    steps, step = run.training.get("steps"), run.training.get("step")
    if steps is not None and step is not None and step < steps:
        lines.append(f"{run.name}: stopped at step {step:,} of {steps:,}")
    if init := run.training.get("init"):
        lines.append(f"{run.name}: its costs are without what it began from, {init}")
    if leak := report.leak_note(run.description):
        lines.append(f"{run.name}: {leak}")
    return lines


def place_of(word: str, lines: Sequence[Row]) -> int:
    """Which line `word` is in: a baseline, a run as it was given, its name, or another path of it. Raises Refusal."""
    for number, row in enumerate(lines):
        if row.kind != "subject":
            if row.kind == word:
                return number
        elif any(word in (run.word, run.name) or Path(word).resolve() in (run.weights.resolve(), run.weights.parent)
                 for run in row.runs):  # fmt: skip
            return number
    given = [run.word for row in lines for run in row.runs if row.kind == "subject"]
    raise Refusal(f"--against {word}: expected one of {', '.join(given)}, {', '.join(BASELINES)}{nearest(word, given)}")


def mean_cost(row: Row) -> Cost:
    """Of one run of a row."""
    if row.kind != "subject":
        return Cost()
    found = [cost(run.description, run.config, run.home) for run in row.runs]
    whole = [[each for each in values if each is not None] for values in zip(*found, strict=True)]
    images, flops, hours = (statistics.fmean(each) if len(each) == len(found) else None for each in whole)
    return Cost(None if images is None else round(images), flops, hours)
