"""The page of a comparison: the tables first, then intervals, curves, pictures, all numbers, a card for each report.

What stands on it is gathered here; page.html says how it looks.
"""

import base64
import datetime
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from common import config as configuration
from common.decoding.decode import open_picture
from common.training.tracking import METRICS
from evaluate.comparison import plots
from evaluate.comparison.costs import records
from evaluate.comparison.plots import Bar, Curve, Plot
from evaluate.comparison.reports import Report, Run, entries
from evaluate.comparison.rows import title_of
from evaluate.comparison.table import Comparison, Line, Shown, Table, differences, notes, scores
from evaluate.comparison.table import numbers as reported
from evaluate.job.arguments import LABELS

WIDEST = 1600  # pixels of a picture; wider ones are made smaller
CODE = ("weights, SHA-256", "command", "report")  # entries of a card that are set as code
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


def page(comparison: Comparison) -> str:
    """The whole page, as text."""
    runs = comparison.runs
    used = [report for run in runs for report in run.reports.values() if not report.stale]
    data = ", ".join(dict.fromkeys(report.spec for report in used))
    subjects = [row.label for row in comparison.rows if row.kind == "subject"]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    return environment.get_template("page.html").render(
        title=comparison.title,
        judged=f"{len(runs)} run{'s' if len(runs) > 1 else ''}, judged on {data}",
        scores=scores(comparison),
        differences=differences(comparison),
        reference=comparison.rows[comparison.reference].label,
        intervals=intervals(comparison),
        notes=notes(comparison),
        curves=curves(comparison),
        key=[(name, plots.key(at)) for at, name in enumerate(subjects)],
        pictures=pictures(runs),
        numbers=list(numbers(comparison)),
        cards=[
            (f"{run.name}: {title_of(stem)}, {report.protocol}", list(card(run, report)))
            for run in runs
            for stem, report in run.reports.items()
            if not report.stale
        ],
        code=CODE,
        now=datetime.datetime.now().astimezone().isoformat(timespec="minutes"),
        command=configuration.command_line(),
    )


def intervals(comparison: Comparison) -> list[Plot]:
    """A plot for each column in which something is known."""
    drawn = []
    for name in comparison.columns:
        scored = enumerate(zip(comparison.rows, comparison.cells[name], strict=True))
        values = [
            Bar(row.label, one.value, one.low, one.high, at) for at, (row, one) in scored if one.value is not None
        ]
        drawn += [plots.intervals(title_of(name), values)] if values else []
    return drawn


def numbers(comparison: Comparison) -> Iterator[tuple[str, Table]]:
    """(title, every number of every report) of one evaluation after the other."""
    lines: dict[str, list[Line]] = {name: [] for name in comparison.columns}
    for run, name, _, entry in reported(comparison, apart=True):
        low_high = "" if entry.low is None else f"{number_of(entry.low)} to {number_of(entry.high)}"
        words = (run.name, LABELS.get(entry.row, entry.row), entry.features, entry.setting or "headline", entry.metric,
                 number_of(entry.value), low_high)  # fmt: skip
        lines.setdefault(name, []).append(Line([*map(Shown, words)]))
    header = [*map(Shown, ("run", "row", "features", "setting", "metric", "value", "95 %, as reported"))]
    for name, rows in lines.items():
        caption = f"{title_of(name)}: shares from 0 to 1, intervals as the reports have them"
        if rows:
            yield title_of(name), Table(caption, header, rows)


def number_of(value: float | None) -> str:
    """Write a number with four decimals."""
    return "" if value is None else f"{value:.4f}".replace("-", "−")


# ------------------------------------------------------------------------------------------------------------- curves


def curves(comparison: Comparison) -> list[Plot]:
    """Plots of what was logged while the runs trained, and of what evaluations found layer by layer."""
    runs = [(at, run) for at, row in enumerate(comparison.rows) if row.kind == "subject" for run in row.runs]
    logged = {run.name: records(run.home / METRICS) for _, run in runs}
    every = dict.fromkeys(name for lines in logged.values() for _, record in lines for name in record)
    names = [name for name in every if CURVES.search(name)]
    names.sort(key=lambda name: (not name.startswith(("knn", "ridge")), name != "loss", name.startswith("control")))
    names = [name for name in names if not (name.endswith("/loss") and len(names) > MOST_CHARTS)][:MOST_CHARTS]
    drawn: list[Plot | None] = []
    before: list[list[Curve]] = []
    for name in names:
        lines = []
        for at, run in runs:
            points = [
                (step, record[name]) for step, record in logged[run.name] if type(record.get(name)) in (int, float)
            ]
            lines.append(Curve(run.name, points, at))
        if lines not in before:  # the loss of a single objective is the loss
            drawn.append(plots.curves(name, lines, "step", percent=bool(SHARES.search(name))))
        before.append(lines)
    return [plot for plot in [*drawn, *layered(runs)] if plot is not None]


def layered(runs: list[tuple[int, Run]]) -> Iterator[Plot | None]:
    """Plots of position and meaning by layer, of reports of evaluate/layers.py."""
    titles = {"position": "position of single tokens, by layer", "knn": "k-NN of the mean token, by layer"}
    for setting, title in titles.items():
        lines = []
        for at, run in runs:
            report = run.reports.get("layers")
            report = None if setting == "knn" and report is not None and report.superseded else report
            points = [
                (int(entry.features.removeprefix("layer ")), entry.value)
                for entry in (entries(report.content) if report is not None and not report.stale else ())
                if entry.row == "subject" and entry.setting == setting and entry.features.startswith("layer ")
            ]
            lines.append(Curve(run.name, points, at))
        yield plots.curves(title, lines, "layer", percent=True)


# ----------------------------------------------------------------------------------------------------------- pictures


def pictures(runs: list[Run]) -> list[dict[str, Any]]:
    """The newest boards and the sheets of every run; what is out of date is left out, what cannot be read is said."""
    parts = []
    for run in runs:
        shown, broken, left_out = [], [], {}
        for path, caption, stem in [*boards(run), *sheets(run)]:
            if stem and stem not in run.reports:
                left_out[title_of(stem)] = "they have no whole report"
            elif stem and (stale := run.reports[stem].stale):
                left_out[title_of(stem)] = f"its report is {stale}"
            elif (image := picture(path)) is None:
                broken.append(path.name)
            else:
                shown.append(image | {"caption": caption})
        remarks = [f"Pictures of {name} are left out: {why}" for name, why in left_out.items()]
        remarks += [f"Cannot be read: {', '.join(broken)}"] if broken else []
        if shown or remarks:
            parts.append({"name": run.name, "shown": shown, "remarks": remarks})
    return parts


def picture(path: Path) -> dict[str, Any] | None:
    """A picture as a data URL with its size in pixels, or None if it cannot be read."""
    try:
        content = path.read_bytes()
        with open_picture(np.frombuffer(content, np.uint8)) as (image, _):
            image.load()
            kind, size = image.get_format_mimetype(), image.size  # type: ignore[attr-defined]
            if size[0] > WIDEST or kind not in ("image/png", "image/jpeg", "image/webp"):
                smaller = image.convert("RGB")
                smaller.thumbnail((WIDEST, WIDEST * 4))
                aside = io.BytesIO()
                smaller.save(aside, "PNG")
                content, kind, size = aside.getvalue(), "image/png", smaller.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow says of a damaged file
        return None
    source = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    return {"source": source, "width": size[0], "height": size[1]}


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
        caption = next((words for word, words in WATCHED.items() if word in name), name)
        yield path, f"{caption} ({name}, step {step:,})", ""


def sheets(run: Run) -> Iterator[tuple[Path, str, str]]:
    """(file, caption, name of the report they belong to) of what evaluations drew."""
    for name, caption in SHEETS.items():
        if (path := run.folder / "explain" / f"{name}.png").is_file():
            yield path, caption, "explain"
    if (path := run.folder / "layers.png").is_file():
        yield path, "Position against meaning, layer by layer", "layers"
    for path in sorted(run.folder.glob("segmentation*/*.png"))[:MOST_PICTURES]:
        stem = path.parent.name
        yield path, f"{title_of(stem)}: {path.stem.replace('_', ' ')}", stem


# -------------------------------------------------------------------------------------------------------------- cards


def card(run: Run, one: Report) -> Iterator[tuple[str, object]]:
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
    yield "weights, SHA-256", content.get("weights_sha256") or "none: untrained"
    yield "trained", f"step {content.get('step')}, recipe {subject.get('recipe')} on {subject.get('trained_on')}"
    yield "pretraining seed", str(run.training.get("seed", "unknown"))
    yield "seeds of heads and baselines", words(content.get("seeds"))
    yield "hardware", words(content.get("hardware"))
    yield "versions", words(content.get("versions"))
    yield "command", content.get("command", "unknown")
    yield "when", f"{content.get('date', 'unknown')}, {content.get('seconds', '?')} s"
    yield "report", one.path
    if one.note:
        yield "note", one.note


def words(value: Any) -> str:
    """JSON without most of its marks."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {words(each)}" for name, each in value.items())
    if isinstance(value, list):
        return ", ".join(words(each) for each in value)
    return value if isinstance(value, str) else json.dumps(value)
