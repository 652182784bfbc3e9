"""A comparison of runs, and its tables: each described once, and written as Markdown, as CSV, or by page.html."""

import csv
import io
import re
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from common.errors import Refusal, nearest
from common.features.extraction import RAW
from evaluate.comparison.cells import Cell, Estimate, Gap, cell_of, judge, method, remarks
from evaluate.comparison.costs import NOT_COUNTED, Cost, cost
from evaluate.comparison.reports import APART, COLUMNS, Entry, Report, Run, entries
from evaluate.comparison.rows import BASELINES, Row, differing, rows, title_of
from evaluate.job import report

COSTS = ("images seen", "training FLOPs", "hours")
KINDS = {"class": "class token", "mean": "mean patch", "both": "class + mean"} | {raw: raw for raw in RAW}
FINE = 0.01  # intervals narrower than this are told with a decimal more
NUMBERS = ("run", "row", "column", "evaluation", "features", "setting", "metric", "value", "low", "high", "interval",
           "std_over_seeds", "pretraining_seeds", "headline", "protocol", "data", "test_fingerprint", "weights_sha256",
           "step", "report", "seeds", "std")  # fmt: skip
DIFFERENCES = ("row", "against", "column", "difference", "low", "high", "excludes_0", "why_not")


# ----------------------------------------------------------------------------------------------------- the comparison


@dataclass
class Comparison:
    """Some runs: their rows, what these scored, who is ahead, what it cost, and what to know of it."""

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

    @property
    def pairs(self) -> list[tuple[str, Row, Cell, Gap]]:
        """(column, row, its cell, its gap), column by column."""
        return [
            (name, *each)
            for name in self.columns
            for each in zip(self.rows, self.cells[name], self.gaps[name], strict=True)
        ]


def compared(
    runs: Sequence[Run], baselines: Sequence[str] = (), against: str | None = None, features: str | None = None
) -> Comparison:
    """Compare runs whose reports were read, to one of them or a baseline, the first if None. Raises Refusal."""
    lines = rows(runs, baselines)
    reference = 0 if against is None else place_of(against, lines)
    usable = {
        name
        for run in runs
        for name, each in run.reports.items()
        if each.content["evaluation"] not in APART and not each.stale
    }
    names = [name for name in COLUMNS if name in usable] + sorted(usable - set(COLUMNS))
    cells = {name: [cell_of(row, name, features) for row in lines] for name in names}
    gaps = {name: judge(cells[name], reference) for name in names}
    notes = [line for name in names for line in remarks(name, cells[name], [row.label for row in lines])]
    for at, row in enumerate(lines):
        for name in names:
            scored = len(cells[name][at].by_run)
            if row.kind == "subject" and 0 < scored < len(row.runs):
                notes.append(f"{title_of(name)} of {row.label}: {scored} of {len(row.runs)} runs only")
    notes += [f"{run.name}: {line}" for run in runs for line in about(run)]
    return Comparison(list(runs), lines, names, cells, gaps, [mean_cost(row) for row in lines], reference, notes)


def about(run: Run) -> Iterator[str]:
    """What a reader has to know of a run: reports that are left out, an unfinished or leaking training, its start."""
    yield from run.notes
    left_out = run.damaged | {name: one.stale for name, one in run.reports.items() if one.stale}
    yield from (f"{title_of(name)} is left out: {why}" for name, why in left_out.items())
    steps, step = run.training.get("steps"), run.training.get("step")
    if steps is not None and step is not None and step < steps:
        yield f"stopped at step {step:,} of {steps:,}"
    if init := run.training.get("init"):
        yield f"its costs are without what it began from, {init}"
    if leak := report.leak_note(run.description):
        yield leak


def place_of(word: str, lines: Sequence[Row]) -> int:
    """Which line `word` is in: a baseline, a run as it was given, its name, or another path of it. Raises Refusal."""
    for number, row in enumerate(lines):
        if row.kind != "subject":
            if row.kind == word:
                return number
        elif any(word in (run.word, run.name) or Path(word).resolve() in (run.weights.resolve(), run.weights.parent)
                 for run in row.runs):  # fmt: skip
            return number
    words = [run.word for row in lines for run in row.runs if row.kind == "subject"]
    raise Refusal(f"--against {word}: expected one of {', '.join(words)}, {', '.join(BASELINES)}{nearest(word, words)}")


def mean_cost(row: Row) -> Cost:
    """Average the costs of a row's runs; what is not known of each is not known."""
    if row.kind != "subject":
        return Cost()
    by_kind = zip(*(cost(run.description, run.config, run.home) for run in row.runs), strict=True)
    images, flops, hours = (None if None in values else statistics.fmean(values) for values in by_kind)
    return Cost(None if images is None else round(images), flops, hours)


# ----------------------------------------------------------------------------------------------- tables, described once


class Shown(NamedTuple):
    """A cell of a table: its text, small lines, a title to point at, and the tone of a clear difference."""

    text: str
    small: tuple[str, ...] = ()  # the first is the interval; of a column's head, the protocol
    title: str = ""  # why there is nothing; the small line then says so too
    tone: str = ""  # "up" or "down"


class Line(NamedTuple):
    """A line of a table, the row's label first."""

    cells: list[Shown]
    baseline: bool = False


class Table(NamedTuple):
    """A table as it is read: its caption, the heads of its columns, its lines."""

    caption: str
    header: list[Shown]
    rows: list[Line]


def scores(comparison: Comparison) -> Table:
    """The table of scores and costs."""
    lines = []
    for at, row in enumerate(comparison.rows):
        cells = [comparison.cells[name][at] for name in comparison.columns]
        label = Shown(row.label, (recipe(comparison, row),))
        shown = [label, *map(score, cells), *map(Shown, costs(comparison.costs[at]))]
        lines.append(Line(shown, row.kind != "subject"))
    several = any(len(row.seeds) > 1 for row in comparison.rows)
    spread = ", ± standard deviation over pretraining seeds" if several else ""
    heads = [Shown(title_of(name), protocol_and_data(comparison.cells[name])) for name in comparison.columns]
    return Table(
        f"Scores in percent{spread}; below each, its 95 % interval over test images. A dash: not known.",
        [Shown("features of"), *heads, *map(Shown, COSTS)],
        lines,
    )


def differences(comparison: Comparison) -> Table | None:
    """The table of differences to the reference, clear ones marked; None if none is known."""
    if all(gap.value is None for *_, gap in comparison.pairs):
        return None
    lines = []
    for at, row in enumerate(comparison.rows):
        if at != comparison.reference:
            shown = [change(comparison.gaps[name][at]) for name in comparison.columns]
            lines.append(Line([Shown(row.label), *shown], row.kind != "subject"))
    return Table(
        "In points, paired by test image, with a 95 % interval. ▲ better, ▼ worse: the interval excludes 0. "
        "It covers neither seeds nor training.",
        [Shown(""), *(Shown(title_of(name)) for name in comparison.columns)],
        lines,
    )


def protocol_and_data(cells: Sequence[Cell]) -> tuple[str, ...]:
    """(protocol and headline, data) of the first report of a column; nothing if it has none."""
    for one in (cell.reports[0] for cell in cells if cell.value is not None):
        return ", ".join([method(one), *([one.metric] if one.metric != "accuracy" else [])]), one.spec
    return ()


def recipe(comparison: Comparison, row: Row) -> str:
    """In what a row's recipe differs from the reference's; of the reference and beside a baseline, its name."""
    reference = comparison.rows[comparison.reference]
    if row.kind != "subject":
        return ""
    if row is reference or reference.kind != "subject":
        return str(row.runs[0].training.get("recipe") or "")
    options = differing(row.runs[0].config, reference.runs[0].config) if row.runs[0].config else []
    return ", ".join(options[:4]) + (f" and {len(options) - 4} more" if len(options) > 4 else "")


def percents(one: Estimate, sign: str = "") -> tuple[str, str, str, int]:
    """(value, low, high) in percent and their number of decimals; nothing where one is not known."""
    known = one.low is not None and one.high is not None
    places = 2 if known and 0 < one.high - one.low < FINE else 1  # type: ignore[operator]
    shares = (one.value, one.low if known else None, one.high if known else None)
    value, low, high = ("" if share is None else f"{100 * share:{sign}.{places}f}" for share in shares)
    return value, low, high, places


def score(cell: Cell) -> Shown:
    """`77.1`, or `77.5 ±0.6` over several pretraining seeds, with its interval `75.2–78.9`; or a dash that says why."""
    if cell.value is None:
        return Shown("–", (cell.why,), cell.why)
    value, low, high, places = percents(cell)
    spread = "" if cell.std is None else f" ±{100 * cell.std:.{places}f}"
    return Shown(value + spread, (f"{low}–{high}",) if low else ())


def change(gap: Gap) -> Shown:
    """`+3.1` with its interval `+1.9 to +4.2`, or a dash that says why."""
    if gap.value is None:
        return Shown("–", title=gap.why)
    value, low, high, _ = (str(word).replace("-", "−") for word in percents(gap, "+"))
    return Shown(value, (f"{low} to {high}",), tone=("up" if gap.value > 0 else "down") if gap.clear else "")


def costs(cost: Cost) -> list[str]:
    """Cells of `COSTS`; a dash for what is not known."""
    hours = cost.hours or 0.0
    places = 3 if hours < 0.1 else 2 if hours < 10 else 0
    return [
        "–" if cost.images is None else f"{cost.images:,}",
        "–" if cost.flops is None else f"{cost.flops:.2e}".replace("e+", "e"),
        "–" if cost.hours is None else f"{hours:,.{places}f}",
    ]


# --------------------------------------------------------------------------------------------------------------- notes


def features_of(comparison: Comparison) -> str:
    """Which features the numbers of the table are of; by row, where they differ."""
    columns: dict[str, list[str]] = {}
    for name in comparison.columns:
        kinds: dict[str, list[str]] = {}
        for row, cell in zip(comparison.rows, comparison.cells[name], strict=True):
            if cell.value is not None and row.kind not in RAW:
                kinds.setdefault(KINDS.get(cell.features, cell.features), []).append(row.label)
        by_row = [f"{kind} of {', '.join(labels)}" for kind, labels in kinds.items()]
        columns.setdefault(" and ".join(by_row if len(kinds) > 1 else kinds), []).append(title_of(name))
    return "; ".join(f"{kinds}: {', '.join(names)}" for kinds, names in columns.items() if kinds)


def notes(comparison: Comparison) -> list[str]:
    """What a reader has to know before believing the table."""
    lines = [
        "[low, high] is a 95 % interval over test images: the percentile bootstrap with 1,000 draws, or where there "
        "are no outcomes of single images the report's own. It covers neither seeds, nor training, nor which images a "
        "low-shot evaluation has drawn"
        if comparison.columns
        else "there is no number for the table: what the evaluations found is in compare.csv and on the page"
    ]
    if any(len(row.runs) > 1 for row in comparison.rows if row.kind == "subject"):
        lines.append(
            "± is the standard deviation over pretraining seeds; runs that differ in nothing else are one line"
        )
    tried = sum(gap.value is not None for *_, gap in comparison.pairs)
    if tried:
        among = f"; if nothing differed, each of these {tried} would still have a chance of 5 % to exclude 0"
        lines.append(f"differences are paired by test image{among if tried > 1 else ''}")
    if features := features_of(comparison):
        lines.append(f"features: {features}")
    if any(cost.images is not None for cost in comparison.costs):
        lines.append(NOT_COUNTED)
    pairs = comparison.pairs
    lines += [f"{title_of(name)} of {row.label}: {cell.why}" for name, row, cell, _ in pairs if cell.why]
    unpaired = [each for each in pairs if each[3].why not in ("", "reference") and not each[2].why]
    lines += [f"{title_of(name)}, {row.label}: {gap.why}" for name, row, _, gap in unpaired]
    return lines + comparison.notes


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown(comparison: Comparison) -> str:
    """The tables and what to know of them, aligned, so that they can be read as they are."""
    parts = [f"# {plain(comparison.title)}", aligned(scores(comparison))]
    if (table := differences(comparison)) is not None:
        label = plain(comparison.rows[comparison.reference].label)
        parts += [f"Differences to {label}, in points; * the interval excludes 0", aligned(table)]
    parts.append("\n".join(f"- {plain(line)}" for line in notes(comparison)))
    return "\n\n".join(parts) + "\n"


def plain(words: str) -> str:
    """Text that Markdown takes as it is, on one line."""
    return " ".join(re.sub(r"[\\`<>|]", r"\\\g<0>", words).split())


def aligned(table: Table) -> str:
    """A table as Markdown; numbers to the right."""

    def written(cell: Shown, marks: str) -> str:
        small = "" if cell.title or not cell.small else cell.small[0]
        return cell.text + (f" {marks[0]}{small}{marks[1]}" if small else "") + (" *" if cell.tone else "")

    lines = [["", *(written(cell, "()") for cell in table.header[1:])]]
    lines += [[row.cells[0].text, *(written(cell, "[]") for cell in row.cells[1:])] for row in table.rows]
    lines = [[plain(word) for word in line] for line in lines]
    widths = [max(3, *(len(line[at]) for line in lines)) for at in range(len(lines[0]))]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    padded = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


# ----------------------------------------------------------------------------------------------------------------- CSV


def numbers(comparison: Comparison, apart: bool = False) -> Iterator[tuple[Run, str, Report, Entry]]:
    """(run, column, report, number): every number of every report that was used. Of baselines only those asked for,
    but all of evaluations that stand `apart`, if so."""
    asked_for = {row.kind for row in comparison.rows}
    for run in comparison.runs:
        for column, one in run.reports.items():
            for entry in entries(one.content) if not one.stale else ():
                if entry.row not in BASELINES or entry.row in asked_for or (apart and column in APART):
                    yield run, column, one, entry


def numbers_csv(comparison: Comparison) -> str:
    """compare.csv: every number of every report that was used, of every run; then each line of the table. Baselines
    have neither weights nor a pretraining seed; `seeds` and `std` are the report's own, of heads and baselines."""
    lines: list[dict[str, object]] = []
    for run, column, one, entry in numbers(comparison):
        interval = None if entry.low is None else str(one.content.get("interval") or "as reported")
        lines.append({"run": run.name, "column": column, "interval": interval, "headline": False}
                     | origin([run], entry.row, [one]) | entry._asdict())  # fmt: skip
    for column, row, cell, _ in comparison.pairs:
        if cell.value is not None:
            one = cell.reports[0]
            std = one.content["values"][row.kind][cell.features].get("std") if len(cell.reports) == 1 else None
            lines.append({"run": row.label, "row": row.kind, "column": column, "features": cell.features,
                          "setting": method(one).partition(", ")[2], "metric": one.metric, "value": cell.value,
                          "low": cell.low, "high": cell.high, "interval": cell.method, "std_over_seeds": cell.std,
                          "headline": True, "std": std} | origin(row.runs, row.kind, cell.reports))  # fmt: skip
    return as_csv(NUMBERS, lines)


def origin(runs: Sequence[Run], row: str, reports: Sequence[Report]) -> dict[str, object]:
    """Fields of compare.csv: where a number of these runs, from these reports, comes from."""
    one = reports[0]
    fields = {"evaluation": one.content["evaluation"], "protocol": one.protocol, "data": one.spec,
              "test_fingerprint": one.test}  # fmt: skip
    if len(reports) == 1:
        seeds = one.content.get("seeds")
        fields |= {"report": one.path, "seeds": " ".join(map(str, seeds)) if isinstance(seeds, list) else None}
    if row == "subject":
        seeds = [run.training.get("seed") for run in runs if any(each in reports for each in run.reports.values())]
        fields |= {"step": one.content.get("step"), "pretraining_seeds": " ".join(map(str, seeds))}
        fields |= {"weights_sha256": one.content.get("weights_sha256")} if len(reports) == 1 else {}
    return fields


def differences_csv(comparison: Comparison) -> str:
    """differences.csv: each line of the table minus the reference."""
    reference = comparison.rows[comparison.reference]
    return as_csv(DIFFERENCES, (
        {"row": row.label, "against": reference.label, "column": column, "difference": gap.value, "low": gap.low,
         "high": gap.high, "excludes_0": None if gap.value is None else gap.clear, "why_not": gap.why}
        for column, row, _, gap in comparison.pairs
        if row is not reference
    ))  # fmt: skip


def as_csv(fields: Sequence[str], lines: Iterable[dict[str, Any]]) -> str:
    """Lines as CSV; what is not known is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return file.getvalue()
