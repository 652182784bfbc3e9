"""A comparison as CSV, for who goes on from here."""

import csv
import io
from collections.abc import Sequence

from evaluate.comparison.cells import Cell, method
from evaluate.comparison.reports import Report, Run, entries
from evaluate.comparison.rows import BASELINES
from evaluate.comparison.whole import Comparison

FIELDS = ("run", "row", "column", "evaluation", "features", "setting", "metric", "value", "low", "high", "interval",
          "std_over_seeds", "pretraining_seeds", "headline", "protocol", "data", "test_fingerprint", "weights_sha256",
          "step", "report", "seeds", "std")  # fmt: skip


def numbers(found: Comparison) -> str:
    """compare.csv: every number of every report that was used, of every run; then each line of the table. Baselines
    have neither weights nor a pretraining seed; `seeds` and `std` are the report's own, of heads and baselines."""
    lines: list[dict[str, object]] = []
    for run in found.runs:
        for column, one in run.reports.items():
            for each in entries(one.content) if not one.stale else ():
                if each.row not in BASELINES or each.row in {row.kind for row in found.rows}:
                    how = None if each.low is None else str(one.content.get("interval") or "as reported")
                    lines.append({"run": run.name, "column": column, "interval": how, "headline": False,
                                  **origin([run], each.row, [one]), **each._asdict()})  # fmt: skip
    for column, cells in found.cells.items():
        for row, cell in zip(found.rows, cells, strict=True):
            if cell.value is not None:
                lines.append({"run": row.label, "row": row.kind, "column": column, **headline_of(cell, row.kind),
                              **origin(row.runs, row.kind, cell.reports)})  # fmt: skip
    return written(FIELDS, [[line.get(name) for name in FIELDS] for line in lines])


def headline_of(cell: Cell, row: str) -> dict[str, object]:
    """Fields of compare.csv: the number of a cell of the table."""
    one = cell.reports[0]
    entry = one.content["values"][row][cell.features]
    return {"features": cell.features, "setting": method(one).partition(", ")[2], "metric": one.metric,
            "value": cell.value, "low": cell.low, "high": cell.high, "interval": cell.method,
            "std_over_seeds": cell.std, "headline": True,
            "std": entry.get("std") if len(cell.reports) == 1 else None}  # fmt: skip


def origin(runs: Sequence[Run], row: str, reports: Sequence[Report]) -> dict[str, object]:
    """Fields of compare.csv: where a number of these runs, from these reports, comes from."""
    one = reports[0]
    of = {"evaluation": one.content["evaluation"], "protocol": one.protocol, "data": one.spec,
          "test_fingerprint": one.test}  # fmt: skip
    if len(reports) == 1:
        of |= {"report": one.path, "seeds": spaced(one.content.get("seeds"))}
    if row == "subject":
        ours = [run for run in runs if any(each in reports for each in run.reports.values())]
        of |= {"step": one.content.get("step"), "pretraining_seeds": spaced([run.training.get("seed") for run in ours])}
        of |= {"weights_sha256": one.content.get("weights_sha256")} if len(reports) == 1 else {}
    return of


def differences(found: Comparison) -> str:
    """differences.csv: each line of the table minus the reference."""
    header = ["row", "against", "column", "difference", "low", "high", "excludes_0", "why_not"]
    reference = found.rows[found.reference].label
    lines = [
        [row.label, reference, column, gap.value, gap.low, gap.high, None if gap.value is None else gap.clear, gap.why]
        for column, gaps in found.gaps.items()
        for number, (row, gap) in enumerate(zip(found.rows, gaps, strict=True))
        if number != found.reference
    ]
    return written(header, lines)


def written(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    """As CSV; what is not known is empty."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if value is None else value for value in line] for line in lines)
    return file.getvalue()


def spaced(values: object) -> str | None:
    """A list in one field."""
    return " ".join(map(str, values)) if isinstance(values, list) else None
