"""What is compared, in words: titles, cells, costs and notes of the table, for Markdown and the page alike."""

from common.features.extraction import RAW
from evaluate.comparison.cells import Cell, Gap, method
from evaluate.comparison.costs import NOT_COUNTED, Cost
from evaluate.comparison.rows import title_of
from evaluate.comparison.whole import Comparison

COSTS = ("images seen", "training FLOPs", "hours")
KINDS = {"class": "class token", "mean": "mean patch", "both": "class + mean"} | {raw: raw for raw in RAW}
FINE = 0.01  # intervals narrower than this are told with a decimal more


def column_notes(found: Comparison, column: str) -> tuple[str, str]:
    """(protocol and headline, data) of the first report of a column."""
    one = next((cell.reports[0] for cell in found.cells[column] if cell.value is not None), None)
    if one is None:
        return "", ""
    metric = one.metric if one.metric != "accuracy" else ""
    return ", ".join(word for word in (method(one), metric) if word), one.spec


def digits(low: float | None, high: float | None) -> int:
    """Decimals of a number in percent."""
    return 2 if low is not None and high is not None and 0 < high - low < FINE else 1


def score(cell: Cell) -> str:
    """`77.1`, or `77.5 ±0.6` over several pretraining seeds; a dash where there is nothing."""
    if cell.value is None:
        return "–"
    places = digits(cell.low, cell.high)
    spread = "" if cell.std is None else f" ±{100 * cell.std:.{places}f}"
    return f"{100 * cell.value:.{places}f}{spread}"


def between(cell: Cell) -> str:
    """`75.2–78.9`."""
    if cell.value is None or cell.low is None or cell.high is None:
        return ""
    places = digits(cell.low, cell.high)
    return f"{100 * cell.low:.{places}f}–{100 * cell.high:.{places}f}"


def change(gap: Gap) -> str:
    """`+3.1`."""
    return "–" if gap.value is None else f"{100 * gap.value:+.{digits(gap.low, gap.high)}f}".replace("-", "−")


def change_between(gap: Gap) -> str:
    """`+1.9 to +4.2`."""
    if gap.value is None or gap.low is None or gap.high is None:
        return ""
    places = digits(gap.low, gap.high)
    return f"{100 * gap.low:+.{places}f} to {100 * gap.high:+.{places}f}".replace("-", "−")


def costs(cost: Cost) -> list[str]:
    """Cells of `COSTS`; a dash for what is not known."""
    return [
        "–" if cost.images is None else f"{cost.images:,}",
        "–" if cost.flops is None else f"{cost.flops:.2e}".replace("e+", "e"),
        "–"
        if cost.hours is None
        else f"{cost.hours:,.{2 if cost.hours < 10 else 0}f}"
        if cost.hours >= 0.1
        else f"{cost.hours:.3f}",
    ]


def scores_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, lines) of the main table."""
    protocols = {name: column_notes(found, name)[0] for name in found.columns}
    titles = [f"{title_of(name)} ({told})" if told else title_of(name) for name, told in protocols.items()]
    header = ["", *titles, *COSTS]
    lines = []
    for number, row in enumerate(found.rows):
        cells = [found.cells[name][number] for name in found.columns]
        shown = [f"{score(cell)} [{between(cell)}]" if between(cell) else score(cell) for cell in cells]
        lines.append([row.label, *shown, *costs(found.costs[number])])
    return header, lines


def differences_table(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """(header, lines) of the differences to the reference."""
    header = ["", *(title_of(name) for name in found.columns)]
    lines = []
    for number, row in enumerate(found.rows):
        if number != found.reference:
            gaps = [found.gaps[name][number] for name in found.columns]
            shown = [
                change(gap)
                if gap.value is None
                else f"{change(gap)} [{change_between(gap)}]{' *' if gap.clear else ''}"
                for gap in gaps
            ]
            lines.append([row.label, *shown])
    return header, lines


def features_of(found: Comparison) -> str:
    """Which features the numbers of the table are of; by row, where they differ."""
    columns: dict[str, list[str]] = {}
    for name in found.columns:
        kinds: dict[str, list[str]] = {}
        for row, cell in zip(found.rows, found.cells[name], strict=True):
            if cell.value is not None and row.kind not in RAW:
                kinds.setdefault(KINDS.get(cell.features, cell.features), []).append(row.label)
        by_row = [f"{kind} of {', '.join(labels)}" for kind, labels in kinds.items()]
        told = " and ".join(by_row) if len(kinds) > 1 else next(iter(kinds), "")
        columns.setdefault(told, []).append(title_of(name))
    return "; ".join(f"{told}: {', '.join(names)}" for told, names in columns.items() if told)


def notes(found: Comparison) -> list[str]:
    """What a reader has to know before believing the table."""
    lines = [
        "[low, high] is a 95 % interval over test images: the percentile bootstrap with 1,000 draws, or where there "
        "are no outcomes of single images the report's own. It covers neither seeds, nor training, nor which images a "
        "low-shot evaluation has drawn"
        if found.columns
        else "there is no number for the table: what the evaluations found is in compare.csv and on the page",
    ]
    if any(len(row.runs) > 1 for row in found.rows if row.kind == "subject"):
        lines.append(
            "± is the standard deviation over pretraining seeds; runs that differ in nothing else are one line"
        )
    tried = sum(gap.value is not None for gaps in found.gaps.values() for gap in gaps)
    if tried:
        among = f"; if nothing differed, each of these {tried} would still have a chance of 5 % to exclude 0"
        lines.append(f"differences are paired by test image{among if tried > 1 else ''}")
    if features := features_of(found):
        lines.append(f"features: {features}")
    if any(cost.images is not None for cost in found.costs):
        lines.append(NOT_COUNTED)
    missing = [
        f"{title_of(name)} of {row.label}: {cell.why}"
        for name in found.columns
        for row, cell in zip(found.rows, found.cells[name], strict=True)
        if cell.why
    ]
    unpaired = [
        f"{title_of(name)}, {row.label}: {gap.why}"
        for name in found.columns
        for row, cell, gap in zip(found.rows, found.cells[name], found.gaps[name], strict=True)
        if gap.why and gap.why != "reference" and not cell.why
    ]
    return [*lines, *missing, *unpaired, *found.notes]
