"""The page of a comparison: the tables first, then intervals, curves, pictures, all numbers, and a card for each."""

import datetime
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import config as configuration
from common.training.tracking import METRICS
from evaluate.comparison.cells import Gap
from evaluate.comparison.costs import records
from evaluate.comparison.html import (
    Bar,
    Curve,
    Html,
    bars,
    card,
    chart,
    document,
    joined,
    key,
    listing,
    picture,
    section,
    table,
    tag,
)
from evaluate.comparison.reports import APART, Report, Run, entries
from evaluate.comparison.rows import BASELINES, Row, differing, title_of
from evaluate.comparison.whole import Comparison
from evaluate.comparison.words import (
    COSTS,
    between,
    change,
    change_between,
    column_notes,
    costs,
    notes,
    score,
)
from evaluate.job.arguments import LABELS

CURVES = re.compile(r"loss$|knn/|ridge/|rankme/|val/.*(loss|accuracy)$|control/.*/noise$")
SHARES = re.compile(r"knn/|ridge/|accuracy$|/noise$")  # of those, what is a share
MOST_CHARTS, MOST_PICTURES = 16, 12
SHEETS = {  # RUN/evaluate/explain/
    "maps": "What matters to it: attention, rollout, attributions, and patch features as colours",
    "heads": "Attention by head",
    "neighbors": "Nearest training images",
    "deletion": "The score as patches are deleted, most relevant first",
}
WATCHED = {  # RUN/pictures/: what the name of a picture says
    "board": "Above what the model saw, below where it believes each patch belongs",
    "places": "Which places are found",
    "offsets": "Which offsets are found",
    "distances": "How far off its answers are",
}


def page(found: Comparison) -> str:
    """The whole page, as text."""
    now = datetime.datetime.now().astimezone().isoformat(timespec="minutes")
    used = [one for run in found.runs for one in run.reports.values() if not one.stale]
    data = ", ".join(dict.fromkeys(one.spec for one in used))
    header = [
        tag("h1", found.title),
        tag("p", f"{len(found.runs)} run{'s' if len(found.runs) > 1 else ''}, judged on {data}", class_="note"),
    ]
    sections = [
        scores(found),
        section("Training curves", *curves(found)),
        section("Pictures", *pictures(found)),
        section("All numbers", *everything(found)),
        section(
            "Protocol cards",
            tag("p", "How each number was obtained. Open one to read it.", class_="note"),
            *cards(found),
        ),
    ]
    footer = [tag("p", "Made ", now, " by ", tag("code", configuration.command_line()))]
    return document(found.title, header, [part for part in sections if part], footer)


# ------------------------------------------------------------------------------------------------------------- tables


def row_name(found: Comparison, number: int) -> Html:
    """A row's label, and in what its recipe differs from the reference's."""
    row, reference = found.rows[number], found.rows[found.reference]
    what = ""
    if row.kind == "subject" and reference.kind == "subject" and number != found.reference:
        options = differing(row.runs[0].config, reference.runs[0].config) if row.runs[0].config else []
        what = ", ".join(options[:4]) + (f" and {len(options) - 4} more" if len(options) > 4 else "")
    elif row.kind == "subject":
        what = str(row.runs[0].training.get("recipe") or "")
    return joined([row.label, tag("small", what)] if what else [row.label])


def scores(found: Comparison) -> Html:
    """The tables, the intervals drawn, and the notes."""
    heads: list[object] = ["features of"]
    for name in found.columns:
        about, spec = column_notes(found, name)
        heads.append(joined([title_of(name), tag("small", about), tag("small", spec)]))
    lines, classes = [], []
    for number, row in enumerate(found.rows):
        cells = [found.cells[name][number] for name in found.columns]
        shown = [
            joined([tag("span", score(cell), title=cell.why or None), tag("small", between(cell) or cell.why)])
            for cell in cells
        ]
        lines.append([row_name(found, number), *shown, *costs(found.costs[number])])
        classes.append("base" if row.kind != "subject" else None)
    spread = ", ± standard deviation over pretraining seeds" if any(len(row.seeds) > 1 for row in found.rows) else ""
    parts: list[object] = [
        table(
            f"Scores in percent{spread}; below each, its 95 % interval over test images. A dash: not known.",
            [*heads, *COSTS],
            lines,
            classes,
        )
    ]
    if any(gap.value is not None for gaps in found.gaps.values() for gap in gaps):
        parts += [tag("h3", f"Differences to {found.rows[found.reference].label}"), gaps_table(found)]
    drawn = [
        bars(title_of(name), [
            Bar(row.label, cell.value, cell.low, cell.high, number)
            for number, (row, cell) in enumerate(zip(found.rows, found.cells[name], strict=True))
            if cell.value is not None
        ])
        for name in found.columns
        if any(cell.value is not None for cell in found.cells[name])
    ]  # fmt: skip
    parts += [tag("h3", "Intervals"), tag("div", *drawn, class_="grid")] if drawn else []
    parts += [tag("h3", "Before believing them"), listing(notes(found))]
    return section("Scores", *parts)


def gaps_table(found: Comparison) -> Html:
    """The differences, marked where the interval excludes 0."""
    lines, classes = [], []
    for number, row in enumerate(found.rows):
        if number != found.reference:
            lines.append([row.label, *(gap_cell(found.gaps[name][number]) for name in found.columns)])
            classes.append("base" if row.kind != "subject" else None)
    caption = (
        "In points, paired by test image, with a 95 % interval. ▲ better, ▼ worse: the interval excludes 0. "
        "It covers neither seeds nor training."
    )
    return table(caption, ["", *(title_of(name) for name in found.columns)], lines, classes)


def gap_cell(gap: Gap) -> Html:
    """A difference with its interval."""
    if gap.value is None:
        return joined([tag("span", "–", title=gap.why)])
    better = gap.value > 0
    mark = f" {'▲' if better else '▼'}" if gap.clear else ""
    told = f", clearly {'better' if better else 'worse'}" if gap.clear else ""
    shown = tag("span", change(gap), tag("span", mark, aria_hidden="true"), tag("span", told, class_="hidden"),
                class_=("up" if better else "down") if gap.clear else None)  # fmt: skip
    return joined([shown, tag("small", change_between(gap))])


def everything(found: Comparison) -> Iterator[Html]:
    """Every number of every report, folded by evaluation."""
    stems = list(dict.fromkeys([*found.columns, *(name for run in found.runs for name in run.reports)]))
    kinds = {row.kind for row in found.rows}
    for stem in stems:
        lines = []
        for run in found.runs:
            one = run.reports.get(stem)
            for each in entries(one.content) if one is not None and not one.stale else ():
                if each.row not in BASELINES or each.row in kinds or stem in APART:
                    low_high = "" if each.low is None else f"{number_of(each.low)} to {number_of(each.high)}"
                    lines.append([run.name, LABELS.get(each.row, each.row), each.features, each.setting or "headline",
                                  each.metric, number_of(each.value), low_high])  # fmt: skip
        if lines:
            heads = ["run", "row", "features", "setting", "metric", "value", "95 %, as reported"]
            caption = f"{title_of(stem)}: shares from 0 to 1, intervals as the reports have them"
            told = f"{title_of(stem)}: {len(lines)} numbers"
            yield tag("details", tag("summary", told), table(caption, heads, lines, words=5))


def number_of(value: float | None) -> str:
    """Four decimals."""
    return "" if value is None else f"{value:.4f}".replace("-", "−")


# ------------------------------------------------------------------------------------------------------------- curves


def curves(found: Comparison) -> list[Html]:
    """What was logged while the runs trained, and what evaluations found layer by layer."""
    lines = [(number, run) for number, row in enumerate(found.rows) if row.kind == "subject" for run in row.runs]
    logged = {run.name: records(run.home / METRICS) for _, run in lines}
    names = list(dict.fromkeys(
        name for each in logged.values() for _, record in each for name in record if CURVES.search(name)
    ))  # fmt: skip
    names.sort(key=lambda name: (not name.startswith(("knn", "ridge")), name != "loss", name.startswith("control")))
    names = [name for name in names if not (name.endswith("/loss") and len(names) > MOST_CHARTS)][:MOST_CHARTS]
    drawn: list[Html] = []
    seen: list[list[Curve]] = []
    for name in names:
        each = []
        for number, run in lines:
            points = [(step, record[name]) for step, record in logged[run.name] if is_number(record.get(name))]
            each.append(Curve(run.name, [step for step, _ in points], [value for _, value in points], number))
        if each not in seen:  # the loss of a single objective is the loss
            drawn.append(chart(name, each, "step", percent=bool(SHARES.search(name))))
        seen.append(each)
    drawn += list(layered(lines))
    drawn = [one for one in drawn if one]
    if not drawn:
        return [tag("p", "No run has any.", class_="note")]
    labels = [row.label for row in found.rows if row.kind == "subject"]
    return [key(labels), tag("div", *drawn, class_="grid")]


def is_number(value: Any) -> bool:
    """Whether a record's value can be drawn: null is what was not finite."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def layered(lines: list[tuple[int, Run]]) -> Iterator[Html]:
    """Position and meaning by layer, of reports of evaluate/layers.py."""
    titles = {"position": "position of single tokens, by layer", "knn": "k-NN of the mean token, by layer"}
    for what, title in titles.items():
        each = []
        for number, run in lines:
            one = run.reports.get("layers")
            one = None if what == "knn" and one is not None and one.superseded else one
            points = [
                (int(entry.features.removeprefix("layer ")), entry.value)
                for entry in (entries(one.content) if one is not None and not one.stale else ())
                if entry.row == "subject" and entry.setting == what and entry.features.startswith("layer ")
            ]
            each.append(Curve(run.name, [layer for layer, _ in points], [value for _, value in points], number))
        yield chart(title, each, "layer", percent=True)


# ----------------------------------------------------------------------------------------------------------- pictures


def pictures(found: Comparison) -> list[Html]:
    """The newest boards and the sheets of every run; what is out of date is left out, what cannot be read is said."""
    parts: list[Html] = []
    for run in found.runs:
        shown, broken, left_out = [], [], {}
        for path, caption, stem in [*boards(run), *sheets(run)]:
            if why := out_of_date(run, stem):
                left_out[title_of(stem)] = why
            elif (figure := picture(path, f"{run.name}: {caption}", caption)) is None:
                broken.append(path.name)
            else:
                shown.append(figure)
        if shown or broken or left_out:
            parts += [tag("h3", run.name), tag("div", *shown, class_="sheets")]
        parts += [tag("p", f"Pictures of {what} are left out: {why}", class_="note") for what, why in left_out.items()]
        if broken:
            parts.append(tag("p", f"Cannot be read: {', '.join(broken)}", class_="note"))
    return parts or [tag("p", "No run has any.", class_="note")]


def out_of_date(run: Run, stem: str) -> str:
    """Why the pictures beside the report `stem` are not those of the weights and data as they are; or nothing."""
    if not stem or (stem in run.reports and not run.reports[stem].stale):
        return ""
    return f"its report is {run.reports[stem].stale}" if stem in run.reports else "they have no whole report"


def boards(run: Run) -> Iterator[tuple[Path, str, str]]:
    """(file, caption, no report) of the newest pictures that were drawn while a run trained."""
    newest: dict[str, tuple[int, Path]] = {}
    for path in sorted((run.home / "pictures").glob("*.png")):
        name, _, at = path.stem.rpartition("-")
        if name and at.isdigit():
            newest[name] = max(newest.get(name, (-1, path)), (int(at), path))
    boards_first = sorted(newest, key=lambda name: ("board" not in name, name))
    for name in boards_first[:MOST_PICTURES]:
        step, path = newest[name]
        about = next((words for word, words in WATCHED.items() if word in name), name)
        yield path, f"{about} ({name}, step {step:,})", ""


def sheets(run: Run) -> Iterator[tuple[Path, str, str]]:
    """(file, caption, name of the report they belong to) of what evaluations drew."""
    for name, about in SHEETS.items():
        if (path := run.folder / "explain" / f"{name}.png").is_file():
            yield path, about, "explain"
    if (path := run.folder / "layers.png").is_file():
        yield path, "Position against meaning, layer by layer", "layers"
    for path in sorted(run.folder.glob("segmentation*/*.png"))[:MOST_PICTURES]:
        stem = path.parent.name
        yield path, f"{title_of(stem)}: {path.stem.replace('_', ' ')}", stem


# -------------------------------------------------------------------------------------------------------------- cards


def cards(found: Comparison) -> Iterator[Html]:
    """One for each report that was used."""
    for run in found.runs:
        for stem, one in run.reports.items():
            if not one.stale:
                yield card(f"{run.name}: {title_of(stem)}, {one.protocol}", list(about(run, one, found.rows)))


def about(run: Run, one: Report, rows: list[Row]) -> Iterator[tuple[str, object]]:
    """(name, value) of what a number depends on."""
    content = one.content
    subject, data = content.get("subject") or {}, content["data"]
    protocol = {name: value for name, value in content["protocol"].items() if name not in ("id", "transform")}
    yield "protocol", one.protocol
    yield "settings", words(protocol)
    yield "head selection", str(content["protocol"].get("selection", "none: nothing is chosen"))
    yield "transform", words(content["protocol"].get("transform"))
    yield "data", f"{one.spec}; {data.get('note', '')}"
    for side in ("train", "test"):
        images = data[side].get("images")
        count = "?" if images is None else f"{images:,}"
        yield f"{side} images", f"{count}, fingerprint {data[side]['fingerprint']}"
    yield "judged on", f"{data['test'].get('judged', '?')} test images"
    yield "model", words(subject.get("model"))
    yield "position embedding", str(subject.get("position"))
    yield "weights, SHA-256", tag("code", content.get("weights_sha256") or "none: untrained")
    yield "trained", f"step {content.get('step')}, recipe {subject.get('recipe')} on {subject.get('trained_on')}"
    yield "pretraining seed", str(run.training.get("seed", "unknown"))
    yield "seeds of heads and baselines", words(content.get("seeds"))
    yield "hardware", words(content.get("hardware"))
    yield "versions", words(content.get("versions"))
    yield "command", tag("code", content.get("command", "unknown"))
    yield "when", f"{content.get('date', 'unknown')}, {content.get('seconds', '?')} s"
    yield "report", tag("code", one.path)
    if one.note:
        yield "note", one.note


def words(value: Any) -> str:
    """JSON without most of its marks."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(words(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value)
