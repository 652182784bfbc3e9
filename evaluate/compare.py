"""Runs side by side: every evaluation in one table, with intervals, paired differences, costs, curves and pictures.

    python evaluate/compare.py runs/first runs/second random pixels
    python evaluate/compare.py runs/*-seed? runs/other --against runs/other --make knn linear --out comparison
    python evaluate/compare.py runs/first runs/second --no-run

Evaluations that are missing, or were made of other weights or data than now or by a protocol that has been replaced,
are made first, by their own scripts. Runs that differ in nothing but their seed are one line. The words `random`,
`pixels` and `patches` add baselines. Writes compare.md, compare.csv, differences.csv and compare.html, a page that
needs no other file. One process. The exit status is 1 if an evaluation failed; the table is made without it.
"""

import sys
from pathlib import Path

if not __package__:  # `python evaluate/compare.py` puts evaluate/ first, where `import common` fails
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.processes.launch import entry, run_script, scripts  # first: it sets what torch reads when it is imported

# isort: split
import argparse
import io
import shlex
from collections.abc import Sequence
from typing import Any

from common import data
from common.checkpoints.pretrained import TIMM
from common.checkpoints.storage import write_atomically
from common.commands import Parser, command
from common.data.location import OPTIONS, changed_location
from common.errors import Refusal, nearest
from common.features.extraction import KINDS, RAW
from common.paths import expanded
from evaluate.comparison.page import page
from evaluate.comparison.reports import (
    APART,
    COLUMNS,
    WHOLE_DATA,
    Report,
    Run,
    check_data,
    open_runs,
    read_reports,
    splits_of,
)
from evaluate.comparison.rows import BASELINES, title_of
from evaluate.comparison.table import compared, differences_csv, markdown, numbers_csv
from evaluate.job.arguments import BASELINES as USUAL_BASELINES
from evaluate.job.arguments import add_data, chosen_device, data_options
from evaluate.job.evaluation import only_first, refuse_unwritable

USUAL = ("knn", "linear", "fewshot")
POSSIBLE = (*COLUMNS, *APART)


def main(argv: list[str]) -> int:
    """Arguments -> reports, made where they are missing -> tables and page. Returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of folders may be what a terminal cannot show
    arguments = options().parse_args(argv)
    words, baselines = check(arguments)
    if not only_first("compare"):
        return 0
    out = Path(arguments.out)
    refuse_unwritable(out, f"--out {arguments.out}", "choose another")
    runs = open_runs(words)
    failed = [] if arguments.no_run else complete(runs, arguments, baselines)
    for run in runs:
        read_reports(run)
        if arguments.no_run and run.damaged:
            raise next(iter(run.damaged.values()))
    check_data(runs, data_options(arguments))
    comparison = compared(runs, baselines, arguments.against, arguments.features)
    comparison.notes = failed + comparison.notes
    if all(one.stale for run in runs for one in run.reports.values()):
        places = ", ".join(str(run.folder) for run in runs)
        none = "run it without --no-run" if arguments.no_run else "no evaluation could be made, for the reasons above"
        why = "; ".join(comparison.notes) or none
        raise Refusal(f"no report to compare in {places}: {why}")
    text = markdown(comparison)
    out.mkdir(parents=True, exist_ok=True)
    files = {
        "compare.md": text,
        "compare.csv": numbers_csv(comparison),
        "differences.csv": differences_csv(comparison),
        "compare.html": page(comparison),
    }
    for name, content in files.items():
        shown = content.encode("utf-8", errors="backslashreplace")
        write_atomically(out / name, lambda aside, shown=shown: aside.write_bytes(shown))  # type: ignore[misc]
    print(f"\n{text}\ntables and page: {', '.join(str(out / name) for name in files)}", flush=True)
    return 1 if failed else 0


def options() -> argparse.ArgumentParser:
    """The command line."""
    options = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    row: dict[str, Any] = {"type": expanded, "metavar": "RUN|random|pixels|patches"}
    add("words", nargs="+", **row, help="run folders or weights files, and baselines")
    add("--against", **row, help="what differences are to (default: the first run)")
    usual = f"{' '.join(USUAL)}, where there are labels; {' and '.join(APART)} where they are out of date"
    add("--make", nargs="+", metavar="NAME", help=f"what is made where it is missing, of {', '.join(POSSIBLE)} "
        f"(default: {usual})")  # fmt: skip
    add("--no-run", action="store_true", help="read what is there, and say what is missing")
    add("--features", metavar="KIND", help="class, mean or both (default: chosen by the probe, or as trained)")
    add_data(options, "evaluate on this; reports of other data are made again")
    usual = "of the tables and the page (default: compare)"
    add("--out", type=expanded, metavar="FOLDER", default="compare", help=usual)
    add("--device", help="of the evaluations that are made")
    add("--workers", type=int, metavar="N", help="of the evaluations that are made")
    add("--threads", type=int, metavar="N", help="of the evaluations that are made")
    return options


def check(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(runs, baselines) that are compared. Raises Refusal for what cannot be."""
    baselines = [word for word in dict.fromkeys(arguments.words) if word in BASELINES]
    words = [word for word in arguments.words if word not in BASELINES]
    if not words:
        raise Refusal(f"{', '.join(baselines)}: baselines stand beside a run, whose reports have them; give a run too")
    for word in words:
        if word.startswith(TIMM) and not Path(word).exists():
            raise Refusal(
                f"{word}: only runs and weights files of poslabel can be compared, weights of timm have no run folder; "
                f"judge them by themselves: {command('knn', '--ckpt', word)}"
            )
    if arguments.against in BASELINES and arguments.against not in baselines:
        baselines.append(arguments.against)
    if arguments.features is not None and arguments.features not in KINDS:
        known = ", ".join(KINDS)
        raise Refusal(f"--features {arguments.features}: expected one of {known}{nearest(arguments.features, KINDS)}")
    if arguments.make and arguments.no_run:
        raise Refusal("--make and --no-run: expected one of them")
    for name in arguments.make or ():
        if name not in POSSIBLE:
            raise Refusal(
                f"--make {name}: expected some of {', '.join(POSSIBLE)}{nearest(name, POSSIBLE)}; runs come before it"
            )
        if name not in scripts():
            raise Refusal(f"--make {name}: this version has no evaluate/{name}.py")
    for name, least in (("workers", 0), ("threads", 1)):
        if (number := getattr(arguments, name)) is not None and number < least:
            raise Refusal(f"--{name} {number}: expected a number from {least}")
    if not arguments.no_run:  # now, not when the first evaluation has run
        if arguments.device is not None:
            chosen_device(arguments.device)
        if arguments.data is not None:
            data.open_data(changed_location({}, data_options(arguments)))
    return words, baselines


def complete(runs: Sequence[Run], arguments: argparse.Namespace, baselines: Sequence[str]) -> list[str]:
    """Make the evaluations that are missing, damaged or stale, each by its own script; what failed, in words."""
    for run in runs:
        read_reports(run)
    check_data(runs, data_options(arguments))
    failed = []
    for run in runs:
        where = changed_location(run.training, data_options(arguments))
        for name in arguments.make or wanted(run):
            one = run.reports.get(name)
            lacks = [row for row in baselines if row in RAW and one is not None and row not in one.content["values"]]
            lacks = lacks if name in USUAL else []
            if one is not None and not one.stale and not one.superseded and not lacks:
                continue
            if name in WHOLE_DATA and isinstance(labels := splits_of(where), Refusal):
                line = f"{run.name}: {title_of(name)} is left out: {labels}"
                print(line, flush=True)
                failed += [line] if arguments.make else []
                continue
            why = "" if one is None else one.stale or one.superseded or f"without {', '.join(lacks)}"
            why = "damaged" if name in run.damaged else why
            command = ["--ckpt", run.word]
            of_data = () if name == "segmentation" else OPTIONS.values()  # masks are not where labels are
            for option in (*of_data, "device", "workers", "threads"):
                value = getattr(arguments, option)
                command += [f"--{option.replace('_', '-')}", str(value)] if value is not None else []
            command += rows_of(one, baselines) if name in USUAL else []
            print(f"\n{run.name}: {f'{why}: ' if why else ''}{shlex.join([f'{name}.py', *command])}", flush=True)
            if status := run_script(name, command):
                failed.append(f"{run.name}: evaluate/{name}.py failed with status {status}; its own words are above")
                print(f"warning: {failed[-1]}", flush=True)
    return failed


def rows_of(one: Report | None, baselines: Sequence[str]) -> list[str]:
    """--baselines of an evaluation that is made where `one` is missing or to be replaced: none of its rows is lost."""
    wished = {*USUAL_BASELINES, *baselines, *(one.content["values"] if one is not None else ())}
    rows = [row for row in BASELINES if row in wished]
    return [] if rows == list(USUAL_BASELINES) else ["--baselines", *rows]


def wanted(run: Run) -> list[str]:
    """What is made where nothing is said: the usual, and sheets and layers that are there, and out of date."""
    reports = [run.reports[name] for name in APART if name in run.reports]
    old = [name for name in APART if name in run.damaged]
    old += [one.path.stem for one in reports if one.stale or one.superseded]
    return [*USUAL, *old]


if __name__ == "__main__":
    entry(main)()
