"""Checkpoints and the reports that evaluations left of them: read, checked, and told from those that are out of date.

A report's column is the name of its file: RUN/evaluate/knn.json is in column "knn".
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf

from common import config as configuration
from common.checkpoints import public, storage
from common.checkpoints.run_folder import CONFIG
from common.data import Images, Location, labelled_splits
from common.data.location import changed_location, place
from common.errors import Refusal
from common.features.neighbors import FIELD
from evaluate.comparison.settings import settings
from evaluate.job import report

COLUMNS = ("knn", "linear", "fewshot", "finetune", "segmentation")  # in the order of a table; others come after them
APART = ("layers", "explain")  # their values are no accuracies of the whole subject
WHOLE_DATA = ("knn", "linear", "fewshot", "finetune")  # of which the fingerprint is that of the data as they are
NOT_CENTRED = "its k-NN is of features that are not centred"
SUPERSEDED = {"knn/dino": NOT_CENTRED, "layers/position+knn": NOT_CENTRED}  # by id: what earlier versions did otherwise


@dataclass(eq=False)
class Report:
    """One report: its content, outcomes {"index", "row/kind"}, and why it is of no use now, if it is not."""

    path: Path
    content: dict[str, Any]
    outcomes: dict[str, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)  # what others must have in common to be compared
    stale: str = ""
    note: str = ""  # what could not be checked

    @property
    def protocol(self) -> str:
        """Its id."""
        return str(self.content["protocol"].get("id", "?"))

    @property
    def superseded(self) -> str:
        """What an earlier version did otherwise, if its protocol is that of one."""
        return SUPERSEDED.get(self.protocol, "")

    @property
    def test(self) -> str:
        """Fingerprint of the test images."""
        return str(self.content["data"]["test"]["fingerprint"])

    @property
    def train(self) -> str:
        """Fingerprint of the training images."""
        return str(self.content["data"]["train"]["fingerprint"])

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
    weights: Path  # absolute; a link to weights that lie elsewhere has its own reports, beside it
    description: dict[str, Any]
    config: dict[str, Any] | None  # as it was trained, where that is known
    name: str
    reports: dict[str, Report] = field(default_factory=dict)
    damaged: dict[str, Refusal] = field(default_factory=dict)  # reports that cannot be read, and why
    notes: list[str] = field(default_factory=list)  # what lies beside the reports and is none

    @property
    def folder(self) -> Path:
        """Of its reports."""
        folder = self.weights.parent / "evaluate"
        return folder / "student" if self.weights.name == storage.STUDENT else folder

    @property
    def home(self) -> Path:
        """Where it was trained: the folder of its logs."""
        return self.weights.resolve().parent

    @property
    def training(self) -> dict[str, Any]:
        """What its description says of how it was trained."""
        return self.description.get("training") or {}


def open_runs(words: Sequence[str]) -> list[Run]:
    """The runs, their descriptions checked against their weights. Raises Refusal for what is no run, for two times
    the same, and for two whose reports would lie in one folder."""
    runs: list[Run] = []
    for word in words:
        found = public.weights_file(word)
        weights = found.parent.resolve() / found.name
        earlier = next((run for run in runs if run.weights.resolve() == weights.resolve()), None)
        if earlier is not None:
            raise Refusal(f"{word} is the same run as {earlier.word}: give each run once")
        description = public.read_description(weights)
        path = weights.resolve().parent / CONFIG
        config: Any = OmegaConf.to_container(configuration.read_yaml(path)) if path.is_file() else None
        run = Run(word, weights, description, config, "")
        beside = next((other for other in runs if other.folder == run.folder), None)
        if beside is not None:
            raise Refusal(
                f"{word} and {beside.word} lie in one folder, where the reports of one would replace the other's: "
                "give each a folder of its own"
            )
        runs.append(run)
    for run, name in zip(runs, distinct([run.weights for run in runs]), strict=True):
        run.name = name
    return runs


def distinct(weights: Sequence[Path]) -> list[str]:
    """A short name of each: its folder's, with as many of the folders above as tell it from the others."""
    tails = [(*path.parent.parts, path.stem) if path.name != storage.WEIGHTS else path.parent.parts for path in weights]
    names = []
    for tail in tails:
        parts = 1 + (tail[-1] == "student" and len(tail) > 1)
        while parts < len(tail) and sum(other[-parts:] == tail[-parts:] for other in tails) > 1:
            parts += 1
        names.append("/".join(tail[-parts:]))
    return names


def read_reports(run: Run) -> None:
    """Read every report in the run's folder. What is damaged or of another format goes to `run.damaged`; a file of
    another name that is no report is left out, which is noted."""
    run.reports, run.damaged, run.notes = {}, {}, []
    for path in sorted(run.folder.glob("*.json")):
        try:
            content, outcomes = report.read(path)
            refuse_malformed(path, content, outcomes)
        except Refusal as refusal:
            if path.stem in (*COLUMNS, *APART):
                run.damaged[path.stem] = refusal
            else:
                run.notes.append(f"left out: {refusal}")
            continue
        found = Report(path, content, outcomes, settings(content, run.description))
        sha = run.description["weights_sha256"]
        if content.get("weights_sha256") != sha:
            found.stale = f"of other weights (SHA-256 {str(content.get('weights_sha256'))[:12]}, now {sha[:12]})"
        run.reports[path.stem] = found


def refuse_malformed(path: Path, content: Mapping[str, Any], outcomes: Mapping[str, np.ndarray]) -> None:
    """Raises Refusal unless a report has what is read here, and its outcomes fit each other."""
    try:
        expect(content["evaluation"], str, "evaluation")
        protocol = expect(content["protocol"], dict, "protocol")
        transform = expect(protocol.get("transform") or {}, dict, "protocol.transform")
        for name in ("size", "stride"):
            for number in expect(transform.get(name, []), list, f"protocol.transform.{name}"):
                expect(number, int, f"protocol.transform.{name}")
        expect(content.get("subject") or {}, dict, "subject")
        for side in ("train", "test"):
            images = expect(content["data"][side], dict, f"data.{side}")
            expect(images["fingerprint"], str, f"data.{side}.fingerprint")
            expect(images.get("images"), (int, NoneType), f"data.{side}.images")
        for entry in entries(content):
            expect(entry.value, (int, float), f"{entry.row}, {entry.features} {entry.setting}")
            for bound in (entry.low, entry.high, entry.std):
                expect(bound, (int, float, NoneType), f"interval or std of {entry.row}, {entry.features}")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise Refusal(f"{path} is no whole report ({why}); evaluate again") from None
    index = outcomes.get("index")
    for name, each in outcomes.items():
        if index is None or index.ndim != 1 or (name != "index" and not fits(each, len(index))):
            raise Refusal(
                f"{path}: its outcomes do not fit each other ({name} has shape {each.shape}, of "
                f"{'unknown' if index is None else len(index)} test images); evaluate again"
            )


def expect(value: Any, kind: type | tuple[type, ...], what: str) -> Any:
    """`value`, if it is of this kind and, as a number, finite. Raises TypeError."""
    if not isinstance(value, kind) or isinstance(value, bool) or (isinstance(value, float) and not isfinite(value)):
        raise TypeError(f"{what} is {value!r:.60}")
    return value


def fits(outcomes: np.ndarray, images: int) -> bool:
    """Whether these are (S, K) or (S, K, C, 3) numbers of so many images."""
    known = outcomes.ndim == 2 or (outcomes.ndim == 4 and outcomes.shape[-1] == 3)
    return known and outcomes.shape[0] > 0 and outcomes.shape[1] == images > 0 and outcomes.dtype.kind in "biuf"


def location_of_report(run: Run, found: Report, given: Mapping[str, str | None]) -> Location:
    """Where the images of a report are now: as `given`, else as it says, or the run where they are its own data."""
    parts = found.content["data"].get("location")
    own = run.training if found.spec == run.training.get("data") else {}
    return changed_location({**(own if parts is None else parts), "data": found.spec}, given)


def check_data(runs: Sequence[Run], given: Mapping[str, str | None]) -> None:
    """Mark reports as stale that are of other images than their data have now, or than the data that are `given`.

    Data that cannot be opened are not checked, and the report says so. A segmentation has data of its own, with masks:
    it stays, and says so.
    """
    data = place(str(given["data"])) if given.get("data") is not None else None
    for run in runs:
        for found in run.reports.values():
            evaluation = found.content["evaluation"]
            if found.stale:
                continue
            if data is not None and found.spec != data:
                if evaluation == "segmentation":
                    found.note = f"on data of its own, {found.spec}, not {data}"
                else:
                    found.stale = f"of {found.spec}, not {data}"
                continue
            if evaluation not in WHOLE_DATA:
                continue
            splits = _splits(location_of_report(run, found, given))
            if isinstance(splits, Refusal):
                found.note = f"whether {found.spec} is what it was could not be checked: {splits}"
            elif not (splits[0].has_fingerprint(found.train) and splits[1].has_fingerprint(found.test)):
                found.stale = f"of other images than {found.spec} has now"
            else:  # reports of one kind of fingerprint are compared with those of another
                for side, images in zip(("train", "test"), splits, strict=True):
                    found.content["data"][side]["fingerprint"] = images.fingerprint()


def fingerprints(where: Location) -> list[str] | Refusal:
    """Of the labelled training and test images, or why they cannot be opened."""
    splits = _splits(where)
    return splits if isinstance(splits, Refusal) else [images.fingerprint() for images in splits]


@functools.cache
def _splits(where: Location) -> tuple[Images, Images] | Refusal:
    """The labelled training and test images. Opened once: many runs share data."""
    try:
        train, test, _ = labelled_splits(where, download=False)
    except (Refusal, OSError) as error:
        return error if isinstance(error, Refusal) else Refusal(str(error))
    return train, test


class Entry(NamedTuple):
    """One number of a report."""

    row: str
    features: str
    setting: str  # what of the protocol it is, where that is not the headline
    metric: str
    value: float
    low: float | None
    high: float | None
    std: float | None = None  # over whatever the evaluation repeats: heads, draws


def entries(content: Mapping[str, Any]) -> Iterator[Entry]:
    """Every number of a report with the interval it has there: headlines, and other k, subsets, layers, methods."""
    metric = str(content["protocol"].get("metric", "accuracy"))
    for row, kinds in content["values"].items():
        for kind, entry in kinds.items():
            if content["evaluation"] == "explain":
                for method, values in entry.items():
                    if "gap" in values:
                        low, high = values["gap_interval"]
                        yield Entry(row, method, kind, "area below random", values["gap"], low, high)
            elif content["evaluation"] == "layers":
                for what in ("position", "knn"):
                    if what in entry:
                        yield _entry(row, kind, what, "accuracy", entry[what])
            else:
                yield _entry(row, kind, "", metric, entry)
                for k, values in entry.get("k", {}).items():
                    yield _entry(row, kind, f"k={k}", metric, values)
                for k, values in entry.get(FIELD, {}).get("k", {}).items():
                    yield _entry(row, kind, f"k={k}, not centred", metric, values)
                for name, by_classifier in entry.get("subsets", {}).items():
                    for classifier, values in by_classifier.items():
                        yield _entry(row, kind, f"{name}, {classifier}", metric, values)
                if "pixel_accuracy" in entry:
                    yield Entry(row, kind, "", "pixel accuracy", entry["pixel_accuracy"], None, None)


def _entry(row: str, kind: str, setting: str, metric: str, values: Mapping[str, Any]) -> Entry:
    low, high = values.get("interval") or (None, None)
    return Entry(row, kind, setting, metric, values["accuracy"], low, high, values.get("std"))
