"""Checkpoints and the reports that evaluations left of them: read, checked, and told from those that are out of date.

A report's column is the name of its file: RUN/evaluate/knn.json is in column "knn".
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from .. import checkpoint, report
from .. import config as configuration
from ..data import labelled_splits
from ..errors import Refusal
from ..run_folder import CONFIG

COLUMNS = ("knn", "linear", "fewshot", "finetune", "segmentation")  # in the order of a table; others come after them
APART = ("layers", "explain")  # their values are no accuracies of the whole subject
WHOLE_DATA = ("knn", "linear", "fewshot", "finetune")  # of which the fingerprint is that of the data as they are


@dataclass(eq=False)
class Report:
    """One report: its content, outcomes {"index", "row/kind"}, and why it is of no use now, if it is not."""

    path: Path
    content: dict[str, Any]
    outcomes: dict[str, np.ndarray]
    stale: str = ""
    note: str = ""  # what could not be checked

    @property
    def protocol(self) -> str:
        """Its id."""
        return str(self.content["protocol"].get("id", "?"))

    @property
    def test(self) -> str:
        """Fingerprint of the test images."""
        return str(self.content["data"]["test"]["fingerprint"])

    @property
    def spec(self) -> str:
        """The data, as they are named."""
        return str(self.content["data"].get("spec", "?"))

    @property
    def metric(self) -> str:
        """What its headline number is."""
        return str(self.content["protocol"].get("metric", "accuracy"))


@dataclass(eq=False)
class Run:
    """A checkpoint that is compared."""

    word: str  # as it was given
    weights: Path
    description: dict[str, Any]
    config: dict[str, Any] | None  # as it was trained, where that is known
    name: str
    reports: dict[str, Report] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what lies beside the reports and is none

    @property
    def folder(self) -> Path:
        """Of its reports."""
        folder = self.weights.parent / "evaluate"
        return folder / "student" if self.weights.name == checkpoint.STUDENT else folder

    @property
    def training(self) -> dict[str, Any]:
        """What its description says of how it was trained."""
        return self.description.get("training") or {}


def open_runs(words: Sequence[str]) -> list[Run]:
    """The runs, their descriptions checked against their weights. Raises Refusal for what is no run, and for two times
    the same."""
    runs: list[Run] = []
    for word in words:
        weights = checkpoint.find(word).resolve()
        earlier = next((run for run in runs if run.weights == weights), None)
        if earlier is not None:
            raise Refusal(f"{word} is the same run as {earlier.word}: give each run once")
        description = checkpoint.read_description(weights)
        path = weights.parent / CONFIG
        config: Any = OmegaConf.to_container(configuration.read_yaml(path)) if path.is_file() else None
        runs.append(Run(word, weights, description, config, ""))
    for run, name in zip(runs, distinct([run.weights for run in runs]), strict=True):
        run.name = name
    return runs


def distinct(weights: Sequence[Path]) -> list[str]:
    """A short name of each: its folder's, with as many of the folders above as tell it from the others."""
    tails = [
        (*path.parent.parts, path.stem) if path.name != checkpoint.WEIGHTS else path.parent.parts for path in weights
    ]
    names = []
    for tail in tails:
        parts = 1 + (tail[-1] == "student" and len(tail) > 1)
        while parts < len(tail) and sum(other[-parts:] == tail[-parts:] for other in tails) > 1:
            parts += 1
        names.append("/".join(tail[-parts:]))
    return names


def read_reports(run: Run) -> None:
    """Read every report in the run's folder. Raises Refusal for one that is damaged or of another format; a file of
    another name that is no report is left out, which is noted."""
    run.reports, run.notes = {}, []
    for path in sorted(run.folder.glob("*.json")):
        try:
            content, outcomes = report.read(path)
            refuse_malformed(path, content, outcomes)
        except Refusal as refusal:
            if path.stem in (*COLUMNS, *APART):
                raise
            run.notes.append(f"left out: {refusal}")
            continue
        found = Report(path, content, outcomes)
        sha = run.description["weights_sha256"]
        if content.get("weights_sha256") != sha:
            found.stale = f"of other weights (SHA-256 {str(content.get('weights_sha256'))[:12]}, now {sha[:12]})"
        run.reports[path.stem] = found


def refuse_malformed(path: Path, content: Mapping[str, Any], outcomes: Mapping[str, np.ndarray]) -> None:
    """Raises Refusal unless a report has what is read here, and its outcomes fit each other."""
    try:
        content["data"]["test"]["fingerprint"] + content["evaluation"]
        assert isinstance(content["protocol"], dict)
        for kinds in content["values"].values():
            for entry in kinds.values():
                if content["evaluation"] not in APART:
                    float(entry["accuracy"])
    except (KeyError, TypeError, AttributeError, ValueError, AssertionError) as error:
        raise Refusal(f"{path} is no whole report ({type(error).__name__}: {error}); evaluate again") from None
    index = outcomes.get("index")
    for name, each in outcomes.items():
        if index is None or index.ndim != 1 or (name != "index" and not fits(each, len(index))):
            raise Refusal(
                f"{path}: its outcomes do not fit each other ({name} has shape {each.shape}, of "
                f"{'unknown' if index is None else len(index)} test images); evaluate again"
            )


def fits(outcomes: np.ndarray, images: int) -> bool:
    """Whether these are (S, K) or (S, K, C, 3) numbers of so many images."""
    known = outcomes.ndim == 2 or (outcomes.ndim == 4 and outcomes.shape[-1] == 3)
    return known and outcomes.shape[0] > 0 and outcomes.shape[1] == images > 0 and outcomes.dtype.kind in "biuf"


def check_data(runs: Sequence[Run], data: str | None, root: str | None) -> None:
    """Mark reports as stale that are of other images than their data have now, or than `data`, where that is given.

    Data that cannot be opened are not checked, and the report says so.
    """
    for run in runs:
        for found in run.reports.values():
            if found.content["evaluation"] not in WHOLE_DATA or found.stale:
                continue
            if data is not None and found.spec != data:
                found.stale = f"of {found.spec}, not {data}"
                continue
            own = data is None and found.spec == run.training.get("data")
            now = fingerprints(found.spec, (run.training.get("data_root") if own else None) or root)
            if isinstance(now, Refusal):
                found.note = f"whether {found.spec} is what it was could not be checked: {now}"
            elif now != [found.content["data"][side]["fingerprint"] for side in ("train", "test")]:
                found.stale = f"of other images than {found.spec} has now"


@functools.cache
def fingerprints(spec: str, root: str | None) -> list[str] | Refusal:
    """Of the labelled training and test images, or why they cannot be opened. Looked at once: many runs share data."""
    try:
        train, test, _ = labelled_splits(spec, root, download=False)
    except (Refusal, OSError) as error:
        return error if isinstance(error, Refusal) else Refusal(str(error))
    return [train.fingerprint(), test.fingerprint()]


class Entry(NamedTuple):
    """One number of a report."""

    row: str
    features: str
    setting: str  # what of the protocol it is, where that is not the headline
    metric: str
    value: float
    low: float | None
    high: float | None


def entries(found: Report) -> Iterator[Entry]:
    """Every number of a report with the interval it has there: headlines, and other k, subsets, layers, methods."""
    for row, kinds in found.content["values"].items():
        for kind, entry in kinds.items():
            if found.content["evaluation"] == "explain":
                for method, values in entry.items():
                    if "gap" in values:
                        yield Entry(row, method, kind, "area below random", values["gap"], *values["gap_interval"])
            elif found.content["evaluation"] == "layers":
                for what in ("position", "knn"):
                    if what in entry:
                        yield _entry(row, kind, what, "accuracy", entry[what])
            else:
                yield _entry(row, kind, "", found.metric, entry)
                for k, values in entry.get("k", {}).items():
                    yield _entry(row, kind, f"k={k}", found.metric, values)
                for name, by_classifier in entry.get("subsets", {}).items():
                    for classifier, values in by_classifier.items():
                        yield _entry(row, kind, f"{name}, {classifier}", found.metric, values)
                if "pixel_accuracy" in entry:
                    yield Entry(row, kind, "", "pixel accuracy", entry["pixel_accuracy"], None, None)


def _entry(row: str, kind: str, setting: str, metric: str, values: Mapping[str, Any]) -> Entry:
    low, high = values.get("interval") or (None, None)
    return Entry(row, kind, setting, metric, values["accuracy"], low, high)
